"""Predicted times: counted operations, moved bytes, and the speeds of a device."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, LlamaConfig, ViTConfig, ViTForImageClassification

from hf_mmst import plan
from hf_mmst.cli.command import PLANNED_TASKS, main
from hf_mmst.cut.example_inputs import dummy_inputs
from hf_mmst.planning.costs import step_of
from hf_mmst.planning.devices import GPUS, Device, device_like, device_named, in_machine, measured_cpu
from hf_mmst.planning.model_and_batch import TASKS, batch_of, model_of
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.step_time import Phase, Step, predict
from hf_mmst.planning.ways import Way

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VIT = ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=5)
DEEP = ViTConfig(**{**SMALL, "num_hidden_layers": 8}, image_size=32, patch_size=8, num_labels=5)
UNIT = Device("unit", {"fp32": 2.0}, memory_bandwidth=4.0, link=5.0, host_bandwidth=10.0)


def test_a_phase_is_the_longest_of_its_parts_on_a_gpu_and_their_sum_on_a_cpu():
    phase = Phase(flops=8, nbytes=8, moved_in=15, moved_out=5, stepped=20, on_host=True)
    assert phase.seconds(UNIT, "fp32") == 4 + 2
    assert phase.seconds(UNIT, "fp32", batches=0.1) == 3
    host = replace(UNIT, is_host=True)
    assert phase.seconds(host, "fp32") == 4 + 2 + 3 + 1 + 2
    assert phase.seconds(host, "fp32", batches=2) == 12 + 3 + 1 + 2
    assert Phase(flops=8, stepped=20).seconds(UNIT, "fp32") == 4 + 5
    assert replace(phase, made=6).seconds(host, "fp32") == phase.seconds(host, "fp32")
    with_pages = replace(host, link_out=1, new_memory=2)
    assert replace(phase, made=6).seconds(with_pages, "fp32") == 4 + 2 + 3 + 3 + 5 + 2


def test_the_batch_for_90_percent_is_the_one_that_has_it():
    step = Step((Phase(flops=8, moved_in=25), Phase(stepped=20, on_host=True)))
    found = predict(step, UNIT, "fp32", 1000)
    assert found.seconds == 5 + 2
    assert found.speed == (4 + 5) / 7  # had it been on the device, the step would have been slower
    host = replace(UNIT, is_host=True)
    slower = Step((Phase(flops=8, moved_in=100),))
    found = predict(slower, host, "fp32", 1000)
    assert found.tokens == pytest.approx(1000 * 9 * 20 / 4, rel=0.01)
    assert slower.speed(host, "fp32", found.tokens / 1000) == pytest.approx(0.9, abs=1e-3)
    assert predict(Step((Phase(flops=8),)), UNIT, "fp32", 1000).tokens is None


def test_operations_of_a_step_are_those_of_the_formula():
    rows = {row.name: row for row in plan(VIT, 4, num_stages=1).rows}
    tokens, width, inner = 4 * 17, 64, 128
    products = 2 * tokens * (4 * width**2 + 2 * width * inner)
    attention = 2 * 2 * 4 * 17 * 17 * width
    layers = 2 * (products + attention)
    around = 2 * 4 * 16 * (3 * 8 * 8) * width + 2 * 4 * width * 5  # patches and classifier
    flops = rows["end to end"].peak.operations.flops
    assert flops["forward"] == layers + around
    assert flops["backward"] == pytest.approx(2 * flops["forward"], rel=0.1)
    for name in ("end to end, checkpointing", "end to end, layers offloaded"):
        again = rows[name].peak.operations.flops
        assert again["forward"] == flops["forward"]
        # A layer's last product is not recomputed: nobody's gradient needs what it puts out.
        assert again["backward"] - flops["backward"] == pytest.approx(layers - 2 * 2 * tokens * width * inner, rel=0.01)


def test_layers_in_files_are_stepped_there_and_make_their_memory_anew():
    """On a CPU; a GPU's memory is reused, and the step in pinned memory writes to no file."""
    model = ViTForImageClassification(ViTConfig(**{**SMALL, "hidden_size": 512}, image_size=64, patch_size=8))
    batch = {**dummy_inputs(model, 32), "labels": torch.zeros(32, dtype=torch.long)}
    offloaded = Way(stage_order="end_to_end", offload="layers")
    for for_gpu in (False, True):
        simulated = Simulation(model, batch, for_gpu=for_gpu)
        whole, peak = simulated.peak(Way()), simulated.peak(offloaded)
        forward, backward, step, _ = step_of(simulated, offloaded, peak, whole).phases
        assert not any(phase.made for phase in step_of(simulated, Way(), whole, whole).phases)
        if for_gpu:
            assert (forward.made, backward.made, step.moved_in, step.moved_out) == (0, 0, 0, 0)
            continue
        weights = sum(p.nbytes for p in model.vit.layers.parameters())
        assert (step.moved_in, step.moved_out) == (weights, 3 * weights)
        tokens, width = 32 * 65 * 4, 512
        # At least four norms, four products of tokens' width, and attention; what is smaller than a MiB does not count.
        assert 2 * 8 * tokens * width <= forward.made <= 2 * 16 * tokens * width
        assert backward.made > forward.made


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "A100-40GB"])
def test_gpus_are_known_by_name(name):
    assert device_named(name) in GPUS.values()


def test_the_table_of_gpus_is_plausible():
    for device in GPUS.values():
        assert 1e12 < device.flops["fp32"] <= device.flops["fp16"] < 2e15
        assert device.link < device.host_bandwidth < device.memory_bandwidth
        assert 8 * 2**30 < device.memory < 256 * 2**30
    with pytest.raises(ValueError, match=r"gpu='rtx1' is not known. Set gpu to one of .*h100.*rtx4090"):
        device_named("rtx1")
    assert in_machine(GPUS["t4"], 12.5).host_bandwidth == 12.5e9


def test_the_cpu_at_hand_is_measured():
    device = measured_cpu("auto")
    assert {*device.flops} == {"fp32", "bf16"}
    assert min(*device.flops.values(), device.memory_bandwidth, device.link, device.host_bandwidth) > 1e7
    assert min(device.link_out, device.new_memory) > 1e7
    assert device.is_host


def test_a_gpu_by_name_is_a_budget_and_its_speeds():
    found = plan(VIT, 8, speeds="t4", num_stages=2)
    assert found.budget == GPUS["t4"].memory
    assert found.chosen is not None
    assert found.chosen.prediction.tokens is None  # nothing moves
    slow = plan(VIT, 8, "1KiB", speeds="t4", num_stages=2)
    assert slow.budget == 1024
    moving = next(row for row in slow.rows if row.way.offload == "layers").prediction
    assert 0 < moving.speed < 1
    assert moving.tokens > 0


@pytest.mark.parametrize(("host", "place"), [(100, "host"), (0.1, "device")])
def test_the_step_is_where_it_is_faster(remembered, host, place):
    """Predicted by the host's memory beside the link, unless it is given."""
    speeds = replace(GPUS["t4"], host_bandwidth=host * GPUS["t4"].link)
    rows = [row for row in plan(VIT, 8, speeds=speeds, stage_order="end_to_end").rows if row.way.offload == "layers"]
    assert min(rows, key=lambda row: row.prediction.seconds).way.offloaded_step == place
    given = {"offloaded_step": "host"}
    rows = plan(VIT, 8, speeds=speeds, stage_order="end_to_end", offloading=given).rows
    assert {row.way.offloaded_step for row in rows} == {"host"}


def test_inputs_rest_where_nothing_else_fits(remembered):
    offloaded = next(row for row in plan(DEEP, 64).rows if row.way.offload == "layers").peak.total
    found = plan(DEEP, 64, offloaded, stage_order="end_to_end")  # of which 5 % are to spare
    assert found.chosen.way.rests_inputs
    assert found.settings["activation_checkpointing_kwargs"] == {"offload": True}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
    ],
)
def test_gpus_are_known_by_what_their_driver_calls_them(name, known):
    assert device_like(name) is (known and GPUS[known])


@pytest.mark.parametrize(
    ("config", "task", "kind"),
    [
        (BertConfig(**SMALL), "tokens", "BertForTokenClassification"),
        (BertConfig(**SMALL), "masked-lm", "BertForMaskedLM"),
        (LlamaConfig(**SMALL, vocab_size=100), "causal-lm", "LlamaForCausalLM"),
        (LlamaConfig(**SMALL, vocab_size=100), "texts", "LlamaForSequenceClassification"),
    ],
)
def test_tasks_without_data(config, task, kind):
    model = model_of(config, task)
    assert type(model).__name__ == kind
    inputs = batch_of(model, 2, 16, None)
    assert inputs["labels"].shape == ((2,) if task == "texts" else (2, 16))
    assert Simulation(model, inputs).peak(Way()).total > 0


def test_tasks_that_a_model_has_not_are_refused():
    assert (*TASKS,) == PLANNED_TASKS
    with pytest.raises(ValueError, match="ViTConfig has no model for task='causal-lm'. Set task to one of images."):
        plan(VIT, 2, task="causal-lm")
    with pytest.raises(ValueError, match="task='images', but a Linear has its own. Leave task unset"):
        plan(torch.nn.Linear(2, 2), 2, task="images")


def test_adapters_learn_in_the_place_of_the_weights():
    full, adapted = plan(VIT, 2, num_stages=1), plan(VIT, 2, num_stages=1, lora=4)
    assert adapted.rows[0].peak.states < 0.2 * full.rows[0].peak.states
    assert adapted.rows[0].peak.weights > full.rows[0].peak.weights
    assert not any(row.way.lora for row in adapted.rows)
    offloaded = {row.way.offload: row for row in adapted.rows}["layers"]
    assert offloaded.moved_bytes < 0.8 * {row.way.offload: row for row in full.rows}["layers"].moved_bytes
    with pytest.raises(ValueError, match="lora=0 is not a whole number of at least 1"):
        plan(VIT, 2, lora=0)


def test_the_command_shows_the_chosen_way_first_with_a_legend(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib; the table of a plan does not")
    VIT.save_pretrained(tmp_path)
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    flags = ["plan", str(tmp_path), "--gpu", "rtx3060", "--batch-size", "8", "--num-stages", "2"]
    assert main([*flags, "--json", str(out), "--plot", str(picture)]) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    lines = [line for line in said.splitlines() if "end to end" in line or "K =" in line]
    assert lines[0].lstrip().startswith(">")
    assert "PREDICTED from speeds, not measured" in said
    assert "RTX 3060 12 GB" in said
    found = json.loads(out.read_text())
    assert found["chosen"] == found["rows"][0]["name"]
    assert found["rows"][0]["predicted"]["seconds"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*flags, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == found["rows"]
    assert main(["plan", str(tmp_path), "--gpu", "rtx1"]) == 2
    assert "gpu='rtx1' is not known" in capsys.readouterr().err
