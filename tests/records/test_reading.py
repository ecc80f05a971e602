"""Files that others may have written: whatever is wrong with one, the error names it, before any memory is taken."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from runs import trainer
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import make

from hf_mmst import load_stages
from hf_mmst.inference.early_exit import EarlyExit
from hf_mmst.inference.exit_rules import ExitRule
from hf_mmst.records.results import read_results
from hf_mmst.records.stages import read_stages

READ = {
    "stages.json": load_stages,
    "stages.safetensors": load_stages,
    "exits.json": EarlyExit.from_pretrained,
    "results.json": lambda folder: read_results(folder / "results.json"),
}
BIAS = "heads.0.norm.bias"
RESULTS = {
    "num_stages": 2,
    "stages": [["a"], ["b"]],
    "stage_accuracy": [0.5, 0.6],
    "metrics": {"accuracy": 0.6},
    "command": "hf-mmst",
    "device": {"type": "cpu", "name": "x86_64"},
    "versions": {"torch": "2"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint with all files."""
    folder = tmp_path_factory.mktemp("written")
    run = trainer(folder, max_steps=2)
    run.train()
    run.save_model()
    early = EarlyExit.from_pretrained(folder)
    early.rule = ExitRule(temperatures=(1.0, 2.0, 3.0))
    early.save_rule(folder)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def replaced(content, keys, value):
    """A copy of JSON in which one value is another, or, for `...`, gone."""
    if not keys:
        return value
    content = json.loads(json.dumps(content))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if value is ...:
        del inner[keys[-1]]
    return content


def places(content, keys=()):
    yield keys
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield from places(content[key], (*keys, key))


def error_of(read):
    try:
        read()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", READ)
def test_what_cannot_be_read_is_one_error(name, folder):
    path = folder / name
    whole = path.read_bytes()
    READ[name](folder)
    spoilt = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
    spoilt += [b"[]", b"null", b"\xff" * 100, b"[" * 100_000, whole[:8] + bytes(len(whole) - 8)]
    for content in spoilt:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is damaged, or was not written by hf_mmst: .*Copy it again"):
            READ[name](folder)
    path.unlink()
    if name != "exits.json":  # which need not be there
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            READ[name](folder)


@pytest.mark.parametrize("name", ["stages.json", "exits.json", "results.json"])
def test_each_value_is_read_or_one_error(name, folder):
    path = folder / name
    content = json.loads(path.read_text())
    refused = 0
    for keys in places(content):
        for value in (None, [], {}, "x", -1, 10**400, float("nan"), 1.5, True, [[]], ...):
            if keys[:1] == ("config",) or (not keys and value is ...):
                continue
            path.write_text(json.dumps(replaced(content, keys, value), skipkeys=True))
            said = error_of(lambda: read_stages(folder) if name == "stages.json" else READ[name](folder))
            assert said is None or str(path) in said, (keys, value)
            refused += said is not None
    assert refused > 20


@pytest.mark.parametrize(
    ("name", "keys", "value", "said"),
    [
        ("stages.json", ("heads", "widths"), [10**9] * 2, "heads.widths[0] is 1000000000, not from 1 to 16777215"),
        ("stages.json", ("heads", "num_layers"), -1, "heads.num_layers is -1, not from 0"),
        ("stages.json", ("heads", "num_layers"), 5, "heads.num_layers is 5, but there are 4 layers"),
        ("stages.json", ("heads", "kind"), "some", "heads.kind is 'some', not one of pooled, tokens, own"),
        ("stages.json", ("heads", "maps"), [False], "heads.maps has 1 values, not 2, for 3 stages"),
        ("stages.json", ("stages", 0), [], "stages are not lists of different layers"),
        ("stages.json", ("stages", 0, 0), None, "stages[0][0] is None, not a string"),
        ("stages.json", ("config", "transport_norm"), ..., "config.transport_norm is missing"),
        ("stages.json", ("transport_state", "weights", 0), float("nan"), "transport_state.weights are [nan"),
        ("stages.json", ("transport_state", "steps", 0), 10**9, "transport_state.steps[0] is 1000000000"),
        ("exits.json", ("threshold",), "high", "threshold is 'high', not a number"),
        ("exits.json", ("patience",), 0, "patience=0 is not a whole number of at least 1"),
        ("exits.json", ("temperatures",), [1.0], "it has 1 temperatures, for 3 stages"),
        ("exits.json", ("more",), 1, "more is not known"),
        ("results.json", ("num_stages",), 3, "num_stages is 3, but stages has 2 of them"),
        ("results.json", ("metrics",), ..., "metrics is missing"),
        ("results.json", ("stage_accuracy",), ["x", "y"], "stage_accuracy is ['x', 'y'], not a list of numbers"),
    ],
)
def test_what_is_wrong_is_said(name, keys, value, said, folder):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(replaced(content, keys, value)))
    with pytest.raises(ValueError, match="is damaged") as raised:
        READ[name](folder)
    assert f"{folder / name} is damaged, or was not written by hf_mmst: {said}" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda heads: heads.pop(BIAS), f"{BIAS} is missing, in stages.json [32]"),
        (lambda heads: heads.update(more=torch.ones(2)), "more is [2], in stages.json missing"),
        (lambda heads: heads.update({BIAS: torch.ones(3)}), f"{BIAS} is [3], in stages.json [32]"),
        (lambda heads: heads[BIAS].fill_(float("nan")), f"{BIAS} has values that are not finite"),
        (lambda heads: heads.update({BIAS: heads[BIAS].int()}), f"{BIAS} is torch.int32"),
    ],
)
def test_heads_are_those_that_the_stages_ask_for(change, said, folder):
    heads = load_file(folder / "stages.safetensors")
    change(heads)
    save_file(heads, folder / "stages.safetensors")
    with pytest.raises(ValueError, match="stages.safetensors is damaged") as raised:
        load_stages(folder)
    assert said in str(raised.value)


def test_no_memory_is_taken_before_the_header_is_read(folder):
    content = json.loads((folder / "stages.json").read_text())
    content["heads"] |= {"widths": [2**23] * 2, "num_labels": 2**23}  # 512 TiB, which no machine gives
    (folder / "stages.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is \[\d+\], in stages.json \[8388608\]"):
        load_stages(folder)


class Plain(nn.Module):
    """A model that is not one of transformers."""

    def __init__(self):
        super().__init__()
        self.inner = make("vit")
        self.config = self.inner.config

    def forward(self, pixel_values, labels=None):
        return self.inner(pixel_values=pixel_values, labels=labels)


def adapted():
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    return peft.get_peft_model(make("bert"), config)


OTHERS = {  # of model, data, number of stages, file: what is lost, and what is said of it
    "vit": (lambda: make("vit"), "vit", 3, "model", "encoder.layer.1.output", "it lacks vit.layers.1.mlp.fc2.bias"),
    "tied": (lambda: make("bert-mlm"), "bert-mlm", 3, "model", "predictions.transform", "it lacks cls.predictions"),
    "plain": (Plain, "vit", 1, "model", "layers.1.mlp.fc2", "it lacks inner.vit.layers.1.mlp.fc2.bias"),
    "adapter": (adapted, "bert", 3, "adapter_model", "layer.1.attention", "it lacks base_model.model.bert"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_with_other_tensors_is_refused(kind, tmp_path):
    build, data, num_stages, file, part, said = OTHERS[kind]
    settings = {"max_steps": 1, "save_strategy": "steps", "num_stages": num_stages}
    trainer(tmp_path, data, build(), **settings).train()
    (folder,) = tmp_path.glob("checkpoint-*")
    path = folder / f"{file}.safetensors"
    again = trainer(tmp_path, data, build(), **settings)
    again.train(resume_from_checkpoint=str(folder))
    again.state.best_model_checkpoint = str(folder)
    again._load_best_model()
    whole = load_file(path)
    changes = {
        said: {name: tensor for name, tensor in whole.items() if part not in name},
        "has, unlike the model, deeper.layer.9": {**whole, "deeper.layer.9": torch.ones(2)},
    }
    for message, tensors in changes.items():
        save_file(tensors, path, metadata={"format": "pt"})
        for load in (lambda: again.train(resume_from_checkpoint=str(folder)), again._load_best_model):
            with pytest.raises(ValueError, match="does not hold this model: it ") as raised:
                load()
            assert message in str(raised.value)


def test_weights_that_are_left_to_chance_classify_nothing(folder):
    path = folder / "model.safetensors"
    whole = load_file(path)
    for tensors, said in (
        ({name: tensor for name, tensor in whole.items() if name != "classifier.bias"}, "it lacks classifier.bias"),
        ({**whole, "classifier.bias": torch.ones(7)}, "it has in other shapes classifier.bias"),
    ):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{folder} does not hold this model: {said}"):
            EarlyExit.from_pretrained(folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{folder} is damaged"):
        EarlyExit.from_pretrained(folder)


@pytest.mark.parametrize("read", [load_stages, EarlyExit.from_pretrained])
def test_a_path_that_is_not_there(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor a name on the Hub. Pass a folder"):
        read(tmp_path / "nowhere")
