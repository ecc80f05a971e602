"""Leaving early against deciding on full runs; calibration; pipelines."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import build
from PIL import Image
from runs import trainer
from transformers import ViTImageProcessor, pipeline
from zoo import batch, make

from hf_mmst import Partition, StageHeads, find_layers
from hf_mmst.inference.early_exit import EarlyExit, calibrate
from hf_mmst.inference.exit_rules import ExitRule, HeadLogits, exit_curve, temperature
from hf_mmst.inference.truncation import truncate
from hf_mmst.method.transport import TransportWeights
from hf_mmst.records.stages import Stages, save_stages

ROOT = Path(__file__).parents[2]
NAMES = ["vit", "dinov2", "swin", "beit", "bert", "roberta", "distilbert"]


def early_exit(name, rule=None, num_stages=3, seed=0, head_layers=0):
    """A model whose heads are more or less sure, because their weights are large."""
    model, partition, heads, _ = build(name, num_stages, seed=seed, head_layers=head_layers)
    model.eval()
    with torch.no_grad():
        for head in heads:
            head.classifier.weight.mul_(15)
    return EarlyExit(model, Stages(partition, heads, {}, {}), rule)


def inputs_of(name, size=16, seed=0):
    inputs = batch(name, size, seed)
    return inputs, {key: value for key, value in inputs.items() if key != "labels"}


def decided(early, inputs, rule):
    """Stage and logits of each sample, from a run of the whole model."""
    answers = rule.answers(early.observe([inputs]).logits)
    stages = rule.decide(answers)
    return stages, answers[stages, torch.arange(len(stages))]


@pytest.mark.parametrize("name", NAMES)
def test_without_exits_it_is_the_model_bit_for_bit(name):
    early = early_exit(name, ExitRule(threshold=1.1))
    _, inputs = inputs_of(name)
    with torch.no_grad():
        expected = early.model(**inputs).logits
    found = early(**inputs)
    assert torch.equal(found.logits, expected)
    assert found.exit_stages.tolist() == [3] * 16
    assert found.layers_run.tolist() == [len(early.partition.layers)] * 16


@pytest.mark.parametrize("size", [4, 16])  # 4 is the number of attention heads, too
@pytest.mark.parametrize("kind", ["threshold", "patience", "ensemble"])
@pytest.mark.parametrize(("name", "head_layers"), [*((name, 0) for name in NAMES), ("vit", 1), ("bert", 1)])
def test_samples_leave_where_a_full_run_says(name, head_layers, kind, size):
    early = early_exit(name, num_stages=4, head_layers=head_layers)
    inputs, plain = inputs_of(name, size)
    sure = early.rule.confidence(0, early.observe([inputs]).logits[0])
    early.rule = ExitRule(threshold=sure.median().item() + 1e-4) if kind != "patience" else ExitRule(patience=1)
    if kind == "ensemble":
        early.rule = replace(early.rule, ensemble=True, temperatures=(1.0, 2.0, 0.5, 1.5))
    stages, logits = decided(early, inputs, early.rule)
    assert len(set(stages.tolist())) > 1 or (kind, size) == ("patience", 4)
    early(**plain)
    rows = []
    for layer in early.partition.layers:
        early.model.get_submodule(layer).register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    found = early(**plain)
    assert (found.exit_stages - 1).tolist() == stages.tolist()
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
    until = [sum(map(len, early.partition.stages[: k + 1])) for k in range(4)]
    assert sum(rows) == sum(until[k] for k in stages)
    assert found.layers_run.tolist() == [until[k] + head_layers * min(k + 1, 3) for k in stages]


@pytest.mark.parametrize("temperatures", [(), (0.5, 2.0, 1.0)])
def test_all_heads_answer_together(temperatures):
    early = early_exit("bert", ExitRule(2.0, temperatures=temperatures, ensemble=True), head_layers=1)
    inputs, plain = inputs_of("bert")
    scale = torch.tensor(temperatures or (1.0, 1.0, 1.0))[:, None, None]
    found = early(**plain)
    torch.testing.assert_close(found.logits, (early.observe([inputs]).logits / scale).mean(0))
    assert found.exit_stages.tolist() == [3] * 16
    assert found.layers_run.tolist() == [len(early.partition.layers) + 2] * 16


def test_where_none_can_leave_no_head_is_asked():
    early = early_exit("bert", ExitRule(threshold=2.0), head_layers=1)
    early.heads.register_forward_hook(lambda *_: pytest.fail("a head ran"))
    assert early(**inputs_of("bert")[1]).layers_run.tolist() == [len(early.partition.layers)] * 16


def test_the_rule_written_as_a_loop():
    chance = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, 200, 3, generator=chance)
    scales = (1.0, 2.0, 0.5, 1.0, 1.0)
    for rule in (
        ExitRule(0.8),
        ExitRule(0.8, temperatures=scales),
        ExitRule(patience=2),
        ExitRule(0.7, temperatures=scales, ensemble=True),
    ):
        expected = []
        for sample in logits.unbind(1):
            streak, leaves_at = 0, 4
            for k in range(4):
                scaled = sample[k] / (rule.temperatures[k] if rule.temperatures else 1)
                if rule.ensemble:
                    scaled = sum(sample[j] / scales[j] for j in range(k + 1)) / (k + 1)
                streak = streak + 1 if k > 0 and sample[k].argmax() == sample[k - 1].argmax() else 0
                if (streak >= rule.patience) if rule.patience else (scaled.softmax(0).max() >= rule.threshold):
                    leaves_at = k
                    break
            expected.append(leaves_at)
        assert rule.decide(rule.answers(logits)).tolist() == expected
        assert len(set(expected)) > 2


def test_where_all_have_left_nothing_runs():
    early = early_exit("vit", ExitRule(threshold=0.01))
    early(**inputs_of("vit")[1])
    ran = []
    for name in early.partition.layers:
        early.model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    found = early(**inputs_of("vit")[1])
    assert ran == list(early.partition.stages[0])
    assert found.exit_stages.tolist() == [1] * 16


def test_the_model_is_as_it_came():
    early = early_exit("bert", ExitRule(threshold=0.01))
    early(**inputs_of("bert")[1])
    with pytest.raises(RuntimeError), early.active():
        raise RuntimeError
    assert "forward" not in vars(early.model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in early.model.modules())


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_undoes_a_scale(true):
    chance = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 4, generator=chance)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=chance)[:, 0]
    assert temperature(true * logits, labels) == pytest.approx(true, rel=0.05)


def heads_of_growing_skill(num_samples=2000):
    """Stages of which the later ones know more, all too sure of themselves."""
    chance = torch.Generator().manual_seed(1)
    labels = torch.randint(5, (num_samples,), generator=chance)
    right = torch.nn.functional.one_hot(labels, 5).float()
    noise = torch.randn(4, num_samples, 5, generator=chance)
    return HeadLogits(5 * (torch.tensor([1.5, 2.5, 3.0, 3.2])[:, None, None] * right + noise), labels)


def test_the_curve_goes_from_the_first_stage_to_the_whole_model():
    found, partition = heads_of_growing_skill(), Partition(tuple((f"{k}",) for k in range(4)))
    points = exit_curve(ExitRule(), found, partition)
    layers = [point.mean_layers for point in points]
    assert layers == sorted(layers)
    assert (layers[0], layers[-1]) == (1.0, 4.0)
    accuracies = [(logits.argmax(-1) == found.labels).double().mean().item() for logits in found.logits]
    assert (points[0].accuracy, points[-1].accuracy) == (accuracies[0], accuracies[-1])
    deep = exit_curve(ExitRule(), found, partition, head_layers=1)
    assert (deep[0].mean_layers, deep[-2].mean_layers > 6, deep[-1].mean_layers) == (2.0, True, 4.0)
    together = exit_curve(ExitRule(ensemble=True), found, partition, head_layers=1)[-1]
    right = found.logits.mean(0).argmax(-1) == found.labels
    assert (together.accuracy, together.mean_layers) == (right.double().mean().item(), 7.0)
    patient = exit_curve(ExitRule(patience=1), found, partition)
    assert [point.rule.patience for point in patient] == [1, 2, 3, 4]
    assert patient[-1].mean_layers == 4.0


@pytest.mark.parametrize("max_drop", [0.0, 0.005, 0.05])
@pytest.mark.parametrize("patience", [None, 1])
def test_calibration_spends_the_drop_that_is_allowed(patience, max_drop):
    early = early_exit("vit", ExitRule(patience=patience), num_stages=4)
    found = heads_of_growing_skill()
    point = calibrate(early, found, max_drop)
    whole = (found.logits[-1].argmax(-1) == found.labels).double().mean().item()
    assert point.accuracy >= whole - max_drop
    assert all(temperature > 1.5 for temperature in point.rule.temperatures)
    curve = exit_curve(point.rule, found, early.partition)
    assert not [one for one in curve if one.accuracy >= whole - max_drop and one.mean_layers < point.mean_layers]
    if max_drop >= 0.005 and patience is None:
        assert point.mean_layers < 3.5


def test_a_pipeline_of_images_exits_early(tmp_path):
    early = early_exit("vit", ExitRule(threshold=0.6))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(255, size=(32, 32, 3), dtype=np.uint8)) for _ in range(6)]
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    classify = pipeline("image-classification", model=early.model, image_processor=processor, device="cpu")
    with early.active():
        found = classify(images, batch_size=3, top_k=5)
    expected = early(**processor(images, return_tensors="pt"))
    assert len(set(expected.exit_stages.tolist())) > 1
    for answer, logits in zip(found, expected.logits, strict=True):
        assert [one["label"] for one in answer] == [f"LABEL_{i}" for i in logits.argsort(descending=True)]
        assert answer[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)


def test_a_pipeline_of_texts_exits_early(tmp_path):
    from pushes import TEXTS, tokenizer

    early = early_exit("bert")
    tokens, texts = tokenizer(tmp_path), [" ".join(TEXTS[i : i + 4]) for i in range(6)]
    inputs = tokens(texts, padding=True, return_tensors="pt")
    sure = early.rule.confidence(0, early.observe([{**inputs, "labels": torch.zeros(6).long()}]).logits[0])
    early.rule = ExitRule(threshold=sure.median().item() + 1e-4)
    classify = pipeline("text-classification", model=early.model, tokenizer=tokens, device="cpu")
    with early.active():
        found = classify(texts, batch_size=6)
    expected = early(**inputs)
    assert len(set(expected.exit_stages.tolist())) > 1
    assert [one["label"] for one in found] == [f"LABEL_{i}" for i in expected.logits.argmax(-1).tolist()]


def test_a_checkpoint_keeps_its_rule(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train()
    run.save_model()
    early = EarlyExit.from_pretrained(tmp_path)
    assert early.rule == ExitRule()
    early.rule = ExitRule(0.25, temperatures=(1.0, 2.0, 3.0))
    early.save_rule(tmp_path)
    again = EarlyExit.from_pretrained(tmp_path)
    assert again.rule == early.rule
    assert EarlyExit.from_pretrained(tmp_path, patience=2).rule.patience == 2
    _, inputs = inputs_of("vit")
    assert torch.equal(again(**inputs).logits, early(**inputs).logits)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "recipes" / "early_exit.md").read_text(), re.DOTALL)
    run = trainer(tmp_path / "vit-stages", max_steps=2)
    run.train()
    run.save_model()
    monkeypatch.chdir(tmp_path)
    inputs, plain = inputs_of("vit")
    exec(code, {"validation_batches": [inputs, inputs], "images": plain["pixel_values"]})
    assert "of 4 layers" in capsys.readouterr().out
    assert (tmp_path / "vit-stages" / "exits.json").is_file()


def test_the_recipe_calibrates_on_one_half_and_measures_on_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    import early_exit as recipe

    digits = recipe.mnist_digits()
    digits["test"] = digits["test"].shuffle(seed=0).select(range(60))
    monkeypatch.setattr(recipe, "mnist_digits", lambda: digits)
    model = make("vit", num_labels=10, image_size=28, patch_size=7, num_channels=1)
    layers = find_layers(model)
    model.save_pretrained(tmp_path)
    state = TransportWeights("constant", 0.0, 2).state_dict()
    stages = Stages(Partition.by_cost(layers, 2), StageHeads([32], 10), {"transport_norm": "relative"}, state)
    save_stages(tmp_path, stages)
    monkeypatch.setattr("sys.argv", ["early_exit.py", "images", str(tmp_path)])
    recipe.main()
    found = json.loads((tmp_path / "early_exit.json").read_text())
    assert (found["num_layers"], found["num_stages"], found["num_test_samples"]) == (4, 2, 30)
    assert found["num_validation_samples"] == 30
    assert found["whole"]["mean_layers"] == found["curve"][-1]["layers"] == 4
    assert found["whole"]["accuracy"] == found["curve"][-1]["accuracy"]
    assert len(found["rows"]) == 12
    assert found["together"]["mean_layers"] == 4
    assert "whole model: " in capsys.readouterr().out


def test_adapters_exit_early(tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"])
    run = trainer(tmp_path, "bert", peft.get_peft_model(make("bert"), config), max_steps=2)
    run.train()
    run.save_model()
    with pytest.raises(ValueError, match="adapters only.*EarlyExit"):
        EarlyExit.from_pretrained(tmp_path)
    early = EarlyExit(run.model, Stages(run.partition, run.heads, {}, {}), ExitRule(2.0))
    _, inputs = inputs_of("bert")
    with torch.no_grad():
        assert torch.equal(early(**inputs).logits, run.model(**inputs).logits)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: ExitRule(threshold=0.0), "threshold=0.0 is not above 0. Set it to a probability"),
        (lambda: ExitRule(threshold=float("nan")), "threshold=nan is not above 0"),
        (lambda: ExitRule(threshold="high"), "threshold='high' is not above 0"),
        (lambda: ExitRule(patience=0), "patience=0 is not a whole number of at least 1. Set it to 1 or more"),
        (lambda: ExitRule(patience=1.5), "patience=1.5 is not a whole number of at least 1"),
        (lambda: ExitRule(temperatures=(1.0, 0.0)), "are not all above 0. Set them with calibrate"),
        (lambda: ExitRule(temperatures=1.0), "temperatures=1.0 are not all above 0"),
        (lambda: ExitRule(ensemble="no"), "ensemble='no' is neither True nor False"),
        (lambda: early_exit("vit", ExitRule(temperatures=(1.0,))), "has 1 temperatures, the model 3 stages"),
        (
            lambda: EarlyExit(
                make("vit", num_labels=1), Stages(Partition((("vit.layers.0",),)), StageHeads([], 1), {}, {})
            ),
            "num_labels=1 .*Use the model by itself",
        ),
    ],
)
def test_what_cannot_be_is_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


@pytest.mark.parametrize("use", [EarlyExit, lambda model, stages: truncate(model, stages, 1)])
def test_stages_of_another_model_are_refused(use):
    stages = Stages(Partition((("vit.layers.0",), ("vit.layers.3",))), StageHeads([32], 5), {}, {})
    with pytest.raises(ValueError, match="has layers that BertFor.* does not have: vit.layers.0, vit.layers.3. Pass"):
        use(make("bert"), stages)
    with pytest.raises(ValueError, match="have num_labels=5, ViTFor.* has 7. Pass the model"):
        use(make("vit", num_labels=7), stages)


@pytest.fixture(scope="module")
def early():
    return early_exit("vit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: [], "There are no batches. Pass one at least"),
        (lambda batch: [{"pixel_values": batch["pixel_values"]}], "A batch has no labels. Pass a list of batches"),
        (lambda batch: batch, "A batch has no labels. Pass a list of batches"),
        (lambda batch: [batch | {"labels": batch["labels"] + 5}], "Labels are from 5 to 9, .* know 5 classes. Pass"),
        (lambda batch: [batch | {"labels": batch["labels"] - 100}], "Labels are from -100 to -96"),
        (lambda batch: [batch | {"labels": batch["labels"] / 2}], "torch.float32. Pass .*the number of its class"),
        (lambda batch: [batch | {"labels": batch["labels"][:3]}], r"There are 16 samples, and labels of shape \[3\]"),
        (lambda batch: [batch | {"pixel_values": batch["pixel_values"] / 0}], "Logits are not numbers"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused(change, message, early):
    inputs = batch("vit", 16)
    inputs["labels"] = torch.arange(16) % 5
    with pytest.raises(ValueError, match=message):
        early.observe(change(inputs))


@pytest.mark.parametrize("max_drop", [-1, float("nan"), 5, "little", True])
def test_a_drop_is_a_part_of_the_accuracy(max_drop, early):
    found = HeadLogits(torch.randn(3, 4, 5), torch.arange(4))
    with pytest.raises(ValueError, match=f"max_drop={max_drop!r} is not a number from 0 to 1"):
        calibrate(early, found, max_drop)
    with pytest.raises(ValueError, match="found is of 2 stages, but the model has 3. Pass what early.observe returns"):
        calibrate(early, replace(found, logits=found.logits[:2]))
