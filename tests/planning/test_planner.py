"""The planner: never a way that does not fit, and the least compute of those that do."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from benchmark_planner import BATCH, simulation
from benchmark_planner import make as build
from transformers import AutoModelForImageClassification, BertConfig, ViTConfig
from zoo import make

from hf_mmst import plan
from hf_mmst.cli.command import CHOICES, main
from hf_mmst.config import parse_bytes
from hf_mmst.planning.model_and_batch import batch_of
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import PRECISIONS

SMALL = ViTConfig(
    hidden_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=768,
    image_size=96,
    num_labels=5,
)


def test_layers_are_accounted_for():
    model = build("vit")
    found = simulation(model, "fp32").by_layer
    assert [layer.name for layer in found] == [f"vit.layers.{i}" for i in range(6)]
    first = found[0]
    assert first.weights == sum(p.nbytes for p in model.vit.layers[0].parameters())
    assert first.gradients == first.weights == first.states // 2
    assert first.output == BATCH * 37 * 192 * 4
    assert first.activations > 10 * first.output


def test_a_budget_chooses_the_least_compute_that_fits(remembered):
    everything = {row.way: row for row in plan(SMALL, 64).rows}
    peaks = sorted({row.peak.total for row in everything.values()})[::2]
    assert len(peaks) > 2
    compute, orders = [], set()
    for peak in peaks:
        found = plan(SMALL, 64, int(peak * 1.06))
        if found.chosen is not None:
            assert found.chosen.peak.total * 1.05 <= peak * 1.06
            assert found.settings.items() <= {**vars(found.chosen.way)}.items()
            assert "fits in" in found.reason
            assert all(f"{name}={value!r}" in found.config() for name, value in found.settings.items())
            orders.add(found.chosen.way.stage_order)
            compute.append(found.chosen.compute)
    assert compute == sorted(compute, reverse=True)
    assert len({*compute}) > 1
    assert {"simultaneous", "end_to_end"} <= orders


def test_a_budget_that_cannot_be_met_says_what_can(remembered):
    found = plan(SMALL, 64, "1MiB")
    assert found.chosen is None
    assert found.settings == {}
    least = min(row.peak.total for row in found.rows if row.way.num_stages > 1 or row.way.offload == "layers")
    need = -(-int(least * 1.05) // 2**20)
    assert f"needs {need} MiB" in found.reason
    assert f"{need - 1} MiB more" in found.reason
    assert plan(SMALL, 64, f"{need + 1}MiB").chosen is not None


def test_nothing_is_allocated_and_the_model_is_as_it_came():
    model = make("bert", num_hidden_layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan(model, 4, "1GiB", "bf16", seq_len=32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.is_activation_checkpointing
    huge = BertConfig(hidden_size=8192, num_hidden_layers=2, num_attention_heads=64, intermediate_size=32768)
    assert plan(huge, 4, seq_len=32, num_stages=1).rows[0].peak.total > 24 * 2**30


def test_swin_is_planned_without_checkpointing():
    """Its blocks are checkpointed together, stage boundaries and all."""
    found = plan(make("swin", depths=[2, 2], num_heads=[2, 4]).config, 8, "1KiB")
    assert not any(row.way.activation_checkpointing for row in found.rows)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("4GiB", 4 * 2**30), ("500 MB", 500_000_000), (1024, 1024), ("1.5k", 1500), ("2 TiB", 2 * 2**40), ("7b", 7)],
)
def test_bytes_are_read(value, expected):
    assert parse_bytes("budget", value) == expected


@pytest.mark.parametrize("value", ["", "4 GiB per GPU", "-1", 0, "GiB", "nan", True])
def test_what_is_no_number_of_bytes_is_refused(value):
    with pytest.raises(ValueError, match='Set budget to one with a unit, as in "4GiB"'):
        parse_bytes("budget", value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("vit", {"precision": "int4"}, "precision='int4' is not known. Set precision to one of auto, fp32, bf16, fp16"),
        ("vit", {"num_stages": 5}, "more than the 4 layers"),
        ("vit", {"num_stages": 0}, "num_stages=0 is not a whole number of at least 1"),
        ("vit", {"batch": 0}, "batch_size=0 is not a whole number of at least 1"),
        ("vit", {"batch": "8"}, "batch_size='8' is not a whole number"),
        ("vit", {"batch": {"pixel_values": None}, "image_size": 32}, "image_size=32, but the batch has its own"),
        ("vit", {"device": "tpu"}, "device='tpu' is not known. Set device to one of cpu, cuda"),
        (
            "vit",
            {"without": ["x"]},
            "without='x' is not known. Set without to one of simultaneous, sequential, end_to_end",
        ),
        ("vit", {"head_layers": -1}, "head_layers=-1 is not a whole number"),
        ("vit", {"seq_len": 8}, "seq_len=8 is for models that take input_ids.*Leave seq_len unset"),
        ("vit", {"image_size": 0}, "image_size=0 is not a whole number of at least 1"),
        ("vit", {"image_size": 7}, "image_size=7 is none that ViTForImageClassification can take.*Kernel size"),
        ("vit", {"image_size": 64}, "image_size=64 is none that .* doesn't match model"),
        ("bert", {"image_size": 32}, "image_size=32 is for models that take pixel_values.*Leave image_size unset"),
        ("bert", {"seq_len": -1}, "seq_len=-1 is not a whole number of at least 1"),
        ("bert", {"seq_len": 65}, "positions for 64 tokens. Set seq_len to 64 or less"),
        ("roberta", {"seq_len": 64}, "positions for 63 tokens. Set seq_len to 63 or less"),
    ],
)
def test_what_cannot_be_planned_is_refused(name, given, message):
    with pytest.raises(ValueError, match=message):
        plan(make(name), **{"batch": 8, **given})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device='cuda', but PyTorch finds no GPU here. Set device to cpu"):
        plan(SMALL, 8, device="cuda")


@pytest.mark.parametrize("name", ["", "/nowhere", "./nowhere", "a/b/c", "a b"])
def test_a_model_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=f"model='{name}' is neither a folder nor a name on the Hub. Set model to"):
        plan(name, 8)


@pytest.mark.parametrize(("name", "tokens"), [("bert", 64), ("roberta", 63), ("distilbert", 128), ("gpt2", 64)])
def test_texts_are_as_long_as_there_are_positions(name, tokens):
    model = make(name)
    assert batch_of(model, 2, None, None)["input_ids"].shape == (2, tokens)
    model(torch.zeros((1, tokens), dtype=torch.long) + 5)
    if tokens < 128:
        with pytest.raises((RuntimeError, IndexError)):
            model(torch.zeros((1, tokens + 1), dtype=torch.long) + 5)


def test_the_config_to_paste_is_the_whole_plan(remembered):
    assert {row.way.num_stages for row in plan(SMALL, 64, num_stages=1).rows} == {1}
    found = plan(SMALL, 64, "1GiB", "bf16", num_stages=3)
    assert found.config() == 'MMSTConfig("output", num_stages=3, per_device_train_batch_size=64, bf16=True)'
    assert "times the compute of end-to-end training" in found.reason
    resident = plan(SMALL, 64, "70MiB", num_stages=3, without=["end_to_end", "stage_clipping"])
    assert resident.chosen.way.offload == "stages"
    assert f"{resident.chosen.compute:.2f} times" in resident.reason
    assert f"{resident.chosen.resting_bytes / 2**20:,.0f} MiB at rest" in resident.reason
    assert "bf16" not in resident.config()


def test_precision_is_chosen_where_it_is_left_open(remembered):
    only = {precision: plan(SMALL, 64, None, precision, num_stages=2) for precision in ("fp32", "bf16")}
    simultaneous = {precision: found.rows[-1].peak.total for precision, found in only.items()}
    assert simultaneous["bf16"] < simultaneous["fp32"]
    between = (simultaneous["bf16"] + simultaneous["fp32"]) // 2
    assert plan(SMALL, 64, "4GiB", "auto").precision == "fp32"
    found = plan(SMALL, 64, int(1.06 * between), "auto", num_stages=2)
    assert (found.precision, found.chosen.way.num_stages) == ("bf16", 2)
    assert "bf16=True" in found.config()
    assert plan(SMALL, 64, "1MiB", "auto").chosen is None


def test_offloaded_layers_are_among_the_ways(remembered):
    found = plan(SMALL, 64)
    (row,) = [row for row in found.rows if row.way.offload == "layers"]
    assert row.name == "end to end, layers offloaded"
    assert 1.2 < row.compute < 4 / 3  # a layer's last product is not recomputed
    assert row.resting_bytes > 3 * found.layers[0].weights * 3
    assert plan(SMALL, 64, int(1.06 * row.peak.total)).chosen.way == row.way


def test_only_rivals_fit(remembered):
    (lora,) = [row for row in plan(SMALL, 8, num_stages=2).rows if row.way.lora]
    found = plan(
        SMALL, 8, int(1.06 * lora.peak.total), num_stages=2, without=["end_to_end", "offload", "stage_clipping"]
    )
    assert found.chosen is None
    assert "No way of this package fits in" in found.reason
    assert lora.name in found.reason


def test_the_command_says_what_it_takes_without_loading_torch():
    code = """
import sys
from hf_mmst.cli.command import main
try:
    main(["plan", "--help"])
except SystemExit as end:
    print(end.code, {"torch", "transformers", "rich"} & set(sys.modules))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--seq-len" in said
    assert said.endswith("0 set()\n")
    assert ("auto", *PRECISIONS) == CHOICES


def test_the_command(remembered, tmp_path, capsys):
    SMALL.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--batch-size", "64", "--budget", "60MiB", "--layers"]) == 0
    out = capsys.readouterr().out
    assert "end to end, checkpointing" in out
    assert "LoRA" in out
    assert """MMSTConfig("output", stage_order='end_to_end', offload='layers', per_device_train_batch_size=64)""" in out
    assert "vit.layers.2" in out
    assert main(["plan", str(tmp_path), "--budget", "1MiB"]) == 1
    assert "Nothing fits" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--budget", "much"]) == 2
    assert "'much' is not a number of bytes" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vits"}))
    assert main(["plan", str(tmp_path)]) == 2
    assert "Set task, or pass the model itself" in capsys.readouterr().err


def test_what_is_moved_is_counted(remembered):
    rows = {row.name: row for row in plan(SMALL, 64).rows}
    weights = rows["end to end, layers offloaded"].resting_bytes // 4  # beside gradients and AdamW's two states
    assert rows["end to end, layers offloaded"].moved_bytes == 3 * weights
    assert rows["K = 3, stages offloaded"].moved_bytes == pytest.approx(weights / 3, rel=0.01)
    assert rows["K = 3, stages offloaded, features cached"].moved_bytes == 0
    assert rows["end to end"].moved_bytes == 0


def test_all_of_a_budget_is_used(remembered):
    """Between all layers offloaded and none, as many stay on the device as fit, and the fastest way is taken."""
    model = build("vit").config
    model.num_hidden_layers = 4
    rows = {row.name: row for row in plan(model, BATCH, stage_order="end_to_end").rows}
    least, most = rows["end to end, layers offloaded"].peak.total, rows["end to end"].peak.total
    found = [plan(model, BATCH, int(least + share * (most - least)), stage_order="end_to_end") for share in (0.4, 0.8)]
    whole = AutoModelForImageClassification.from_config(model)
    residents = [one.settings.get("resident_layers", 0) for one in found]
    assert 0 < residents[0] < residents[1]
    for one in found:
        assert one.settings["offload"] == "layers"
        assert one.chosen.peak.total * 1.05 <= one.budget
        more = replace(one.chosen.way, resident_layers=one.chosen.way.resident_layers + 1)
        assert Simulation(whole, batch_of(whole, BATCH, None, None)).peak(more).total * 1.05 > one.budget
    assert plan(model, BATCH, 2 * most, stage_order="end_to_end").settings == {
        "stage_order": "end_to_end",
        "offload": "none",
    }
    # A model that was loaded, and the name of one, have exact gradients; what is cut is asked for.
    assert plan(model, BATCH, 2 * most).chosen.way.num_stages > 1
    assert plan(model, BATCH, 2 * most, num_stages=2).chosen.way.num_stages == 2


def test_stages_of_a_pretrained_model_are_shown_where_nothing_exact_is_chosen(remembered, tmp_path):
    SMALL.save_pretrained(tmp_path)
    for budget, shown in {None: {1, 3}, "4GiB": {1}, "1MiB": {1, 3}}.items():
        assert {row.way.num_stages for row in plan(str(tmp_path), 64, budget).rows} == shown
