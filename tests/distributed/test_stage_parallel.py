"""Stages shared out over processes compute what one process does, and each process has its share alone."""

import copy
import json
import math
import re
import time

import pytest
import torch
from encoders import build, inputs
from engines import WEIGHTS, cut, step
from processes import watched
from safetensors.torch import load_file
from shared_out import main, run
from torch.nn.functional import cross_entropy
from transformers import BertForSequenceClassification

from hf_mmst import MMSTConfig, Stagewise, load_stages
from hf_mmst.distributed.stage_shares import is_released, share_out, take_share
from hf_mmst.method.stepping import parameters_by_stage

SAVING = {
    "gradient_accumulation_steps": 2,
    "max_steps": -1,
    "num_train_epochs": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "load_best_model_at_end": True,
    "transport_schedule": "adaptive",
}
RESUMING = {**SAVING, "load_best_model_at_end": False}
SETTINGS = {
    "plain": ("vit", {}),
    "saving": ("bert", SAVING),
    "bf16": ("bert", {"bf16": True, "max_grad_norm": 0, "stage_clipping": False}),
    "resumed": ("bert", RESUMING),
    "resumed_by_two": ("bert", RESUMING),
    "twice": ("vit", {"max_steps": 5, "activation_checkpointing": True, "optim": "adagrad"}),
    "dropout": ("vit", {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}),
    "dropout_resumed": ("vit", {"max_steps": 4}),
}


def shared(root, kind, **more):
    name, settings = SETTINGS[kind]
    return {"name": name, "folder": str(root / kind), "settings": {**settings, "stage_parallel": True}, **more}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Runs of three processes, which end when one is killed, then of two, which end with an error."""
    root = tmp_path_factory.mktemp("shared")
    saved = str(root / "saving" / "checkpoint-4")
    three = watched(
        3,
        main,
        [
            *(shared(root, kind) for kind in ("plain", "saving", "bf16")),
            {"folder": str(root / "passed")},
            shared(root, "resumed", resume=saved),
            {**shared(root, "plain", killed=True), "folder": str(root / "killed")},
        ],
        folder=tmp_path_factory.mktemp("three"),
    )
    ended = time.time()
    two = watched(
        2,
        main,
        [
            shared(root, "resumed_by_two", resume=saved),
            shared(root, "twice", data="Drawn", times=2),
            shared(root, "dropout", dropout=True),
            shared(root, "dropout_resumed", dropout=True, resume=str(root / "dropout" / "checkpoint-2")),
            {**shared(root, "plain", data="Differing"), "folder": str(root / "differing")},
        ],
        folder=tmp_path_factory.mktemp("two"),
    )
    return root, three, ended, two


@pytest.fixture(scope="module")
def alone(tmp_path_factory, done):
    """The same runs in one process."""
    root = tmp_path_factory.mktemp("alone")
    found = {}
    for kind in ("plain", "saving", "bf16"):
        name, settings = SETTINGS[kind]
        found[kind] = run(name, str(root / kind), settings)
    name, settings = SETTINGS["resumed"]
    run(name, str(root / "resumed"), settings, resume=str(done[0] / "saving" / "checkpoint-4"))
    name, settings = SETTINGS["twice"]
    run(name, str(root / "twice"), settings, data="Drawn", times=2)
    return root, found


def found_by(root, kind, rank=0):
    return json.loads((root / kind / f"{rank}.json").read_text())


def assert_same_files(one, other):
    for file in ("model.safetensors", "stages.safetensors"):
        expected, found = load_file(one / file), load_file(other / file)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    assert (one / "stages.json").read_text().replace('"stage_parallel": false', '"stage_parallel": true') == (
        other / "stages.json"
    ).read_text()


@pytest.mark.parametrize("kind", ["plain", "saving", "bf16"])
def test_three_processes_equal_one(kind, done, alone):
    (root, three, *_), (root_alone, expected) = done, alone
    assert (root / kind / "0.json").exists(), three[1][-3000:]
    assert_same_files(root_alone / kind, root / kind)
    reports = [found_by(root, kind, rank) for rank in range(3)]
    for report in reports:
        assert report["predictions"] == expected[kind]["predictions"]
    own = {name: value for name, value in expected[kind]["metrics"].items() if "second" not in name}
    for name in own.keys() - {"eval_runtime", "eval_model_preparation_time"}:
        assert all(report["metrics"][name] == own[name] for report in reports), name
    for entry, other in zip(expected[kind]["log"], reports[0]["log"], strict=True):
        for name, value in entry.items():
            if "_bytes" not in name and "runtime" not in name and "second" not in name and "time" not in name:
                assert math.isclose(other[name], value, rel_tol=1e-6), name


def test_checkpoints_are_those_of_one_process(done, alone):
    ours, theirs = done[0] / "saving" / "checkpoint-4", alone[0] / "saving" / "checkpoint-4"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert_same_files(theirs, ours)
    for name in ("optimizer.pt", "scheduler.pt"):
        found, expected = (torch.load(folder / name, weights_only=True) for folder in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    model = BertForSequenceClassification.from_pretrained(ours)
    stages = load_stages(ours)
    assert len(stages.heads) == 3
    kinds = [torch.load(folder / "rng_state.pth", weights_only=False)["cpu"] for folder in (ours, theirs)]
    assert torch.equal(*kinds)
    assert all(torch.isfinite(tensor).all() for tensor in [*model.parameters(), *stages.heads.parameters()])


@pytest.mark.parametrize("kind", ["resumed", "resumed_by_two"])
def test_resuming_goes_on_as_if_nothing_had_been(kind, done, alone):
    root, three, _, two = done
    assert (root / kind / "0.json").exists(), (three[1] + two[1])[-3000:]
    assert_same_files(root / "saving" / "checkpoint-8", root / kind)
    assert_same_files(alone[0] / "resumed", root / kind)


def test_training_again_and_labels_drawn_at_random(done, alone):
    root, *_, two = done
    assert (root / "twice" / "0.json").exists(), two[1][-3000:]
    assert_same_files(alone[0] / "twice", root / "twice")


def test_what_is_drawn_at_random_is_drawn_again_after_resuming(done):
    root, *_, two = done
    assert (root / "dropout_resumed" / "0.json").exists(), two[1][-3000:]
    assert_same_files(root / "dropout", root / "dropout_resumed")


def test_each_process_has_its_share_alone(done, alone):
    expected = alone[1]["plain"]
    reports = [found_by(done[0], "plain", rank) for rank in range(3)]
    for what, more in (("weights", 1024), ("states", 0)):  # of each released tensor, one element is there
        parts = [report[what] for report in reports]
        assert expected[what] <= sum(parts) <= expected[what] + more
        assert max(parts) < 0.5 * expected[what]  # two of four layers are in one process


def test_processes_compute_at_the_same_time(done):
    """The first process begins with most batches before the last one has ended the batch before."""
    begins, ends = found_by(done[0], "passed", 0)["begins"], found_by(done[0], "passed", 2)["ends"]
    assert sum(begin < end for begin, end in zip(begins[1:], ends, strict=False)) > 7


def test_a_killed_process_ends_all(done):
    root, three, ended, _ = done
    assert three[0] == 1
    assert ended - float((root / "killed" / "killed").read_text()) < 60
    assert not (root / "killed" / "0.json").exists()


def test_an_error_in_one_process_ends_all_and_says_where(done):
    root, *_, two = done
    assert two[0] == 1
    assert "Rank 1 has read other labels or masks than rank 0." in two[1]
    assert "hf_mmst: raised in rank 1 of 2, with stages 3 to 4." in two[1]
    assert not (root / "differing" / "0.json").exists()


@pytest.mark.parametrize("name", ["ViT", "Swin", "RoFormer", "ResNet", "wav2vec 2.0"])
def test_shares_of_any_encoder_have_the_gradients_of_the_whole(name):
    """Three processes, one after the other in this one."""
    model = build(name)
    batch = inputs(model)
    partition, heads = cut(model)
    copies = [copy.deepcopy((model, heads)) for _ in range(3)]
    step(model, partition, heads, batch)
    with torch.no_grad(), Stagewise(model.eval(), partition, heads).observe(batch.get("attention_mask")) as whole:
        logits = model(**batch).logits
    expected = {f"{i}.{n}": p.grad for i, m in enumerate((model, heads)) for n, p in m.named_parameters()}
    found, given, seen, sizes = {}, None, None, []
    for rank, (own, own_heads) in enumerate(copies):
        every = parameters_by_stage(own, partition, own_heads)
        share = take_share(own, partition, own_heads, every, rank, 3, torch.device("cpu"), clips=False)
        assert list(share.own) == [rank]
        engine = Stagewise(own, partition, own_heads)
        engine.outputs.update(share.outputs)
        mask, labels = batch.get("attention_mask"), batch["labels"]
        with engine.step(lambda z: cross_entropy(z, labels), WEIGHTS, share.own, mask, given=given) as learned:  # noqa: B023
            loss = own(**batch).loss
        (loss + WEIGHTS[0] * learned.transport).backward()
        gradients = {f"{i}.{n}": p.grad for i, m in enumerate((own, own_heads)) for n, p in m.named_parameters()}
        assert not found.keys() & {n for n, gradient in gradients.items() if gradient is not None}
        found |= {n: gradient for n, gradient in gradients.items() if gradient is not None}
        given = (rank + 1, learned.output)
        with torch.no_grad(), engine.observe(mask, stages=share.own, given=seen) as view:
            last = own.eval()(**{n: value for n, value in batch.items() if n != "labels"}).logits
        seen = (rank + 1, view.output)
        torch.testing.assert_close(view.movements, whole.movements[rank : rank + 1])
        torch.testing.assert_close(last, [*whole.logits, logits][rank])
        sizes.append(sum(p.untyped_storage().nbytes() for p in own.parameters() if not is_released(p)))
    for key, gradient in expected.items():
        assert (gradient is None) == (key not in found), key
        if gradient is not None:
            assert torch.equal(found[key], gradient), key
    assert sum(sizes) < 1.05 * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "clips", "message"),
    [
        ("MPNet", False, "mpnet.encoder.relative_attention_bias.weight of MPNetForSequenceClassification learns from "),
        (
            "WavLM",
            False,
            "What follows wavlm.encoder.layers.1 of WavLMForSequenceClassification needs more of it than ",
        ),
        ("Swin", True, "is between the layers and is clipped with the last stage, which is in another process. Set "),
    ],
)
def test_what_cannot_be_shared_out_is_refused(name, clips, message):
    model = build(name)
    partition, heads = cut(model)
    every = parameters_by_stage(model, partition, heads)
    with pytest.raises(ValueError, match=re.escape(message)):
        take_share(model, partition, heads, every, 0, 3, torch.device("cpu"), clips)


def test_shares_are_balanced_and_not_more_than_stages():
    assert share_out([1, 1, 1, 3], 2) == [range(3), range(3, 4)]
    assert share_out([1, 1, 1, 1, 1], 5) == [range(k, k + 1) for k in range(5)]
    with pytest.raises(ValueError, match=re.escape("5 processes cannot share out 4 stages. Set num_stages to 5 or")):
        share_out([1, 1, 1, 1], 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_clipping": True}, "but there is one. Start the script with `torchrun --nproc_per_node 2`"),
        ({}, "max_grad_norm=1.0 clips by the norm of the gradients of all stages"),
        ({"max_grad_norm": 0, "head_layers": 1}, "Set head_layers=0."),
        ({"stage_order": "sequential"}, "stage_order='sequential' cannot be combined with stage_parallel=True"),
        ({"end_to_end_laps": 1}, "Set end_to_end_laps to 0, or stage_parallel=False."),
        ({"stage_order": "multi_lap", "offload": "stages"}, "cannot be combined with stage_parallel=True"),
        ({"memory_budget": "1GiB"}, "Set memory_budget to None"),
        ({"fp16": True}, "fp16=True cannot be combined with stage_parallel=True"),
    ],
)
def test_settings_that_cannot_be(settings, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        MMSTConfig(str(tmp_path), use_cpu=True, stage_parallel=True, **settings)
