"""Two processes that offload layers, each with its shard of them, give what one process gives."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from layer_shards import RUNS, main, train
from processes import ranks
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    TrainingArguments,
    training_args,
)
from zoo import make

from hf_mmst import MMSTConfig
from hf_mmst.cut.layers import find_layers
from hf_mmst.distributed.layer_shards import refuse_in_shards, sharding_layers
from hf_mmst.distributed.wrappers import FullyShardedWrapper


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have trained all runs, in one start."""
    folder = tmp_path_factory.mktemp("shards")
    ranks(2, main, folder, *RUNS, folder=folder)
    return folder


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        message = lambda m, key=key: f"{key}: {m}"  # noqa: E731
        torch.testing.assert_close(found[key].to(tensor.dtype), tensor, rtol=rtol, atol=atol, msg=message)


@pytest.mark.parametrize("run", ["vit", "bert", "gpt2", "lora", "vit none", "bert none"])
def test_weights_metrics_and_losses_are_those_of_one_process(run, folder, tmp_path):
    first, second = (load_file(folder / f"{run}.{rank}") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert_close(first, train(tmp_path, run))


def test_bf16_is_that_of_one_process_but_for_rounding(folder, tmp_path):
    assert_close(load_file(folder / "bf16.0"), train(tmp_path, "bf16"), rtol=2e-2, atol=5e-3)


def test_what_is_recomputed_has_the_same_masks(folder):
    """Each process draws masks of its own: so the other side are two processes, too."""
    weights = lambda found: {key: found[key] for key in found if "eval" not in key and "test" not in key}  # noqa: E731
    assert_close(*(weights(load_file(folder / f"{name}.0")) for name in ("dropout", "dropout none")))


def test_a_run_that_is_resumed_is_bitwise_the_run_without_a_break(folder):
    for rank in range(2):
        straight, resumed = (load_file(folder / f"{name}.{rank}") for name in ("bert", "resumed"))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)


@pytest.mark.parametrize(
    ("run", "cls"), [("vit", AutoModelForImageClassification), ("bert", AutoModelForSequenceClassification)]
)
def test_what_is_saved_is_a_plain_model(run, cls, folder):
    model, info = cls.from_pretrained(folder / run, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = load_file(folder / f"{run}.0")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


def test_each_layer_is_a_unit_of_fsdp2_that_rests_in_host_memory(folder):
    for run, cls in (("vit", "ViTLayer"), ("bert", "BertLayer"), ("lora", "BertLayer")):
        seen = json.loads((folder / f"{run}.json").read_text())
        assert seen["kind"] == "DistributedType.FSDP"
        assert seen["plugin"] == {
            "fsdp_version": 2,
            "cpu_offload": True,
            "reshard_after_forward": True,
            "classes": [cls],
        }
        assert seen["layers"]
        assert all(seen["layers"])
        assert seen["environment"] == []  # by which later runs of the process would be sharded, too
    seen = json.loads((folder / "vit none.json").read_text())
    assert (seen["kind"], seen["plugin"]) == ("DistributedType.MULTI_CPU", None)


@pytest.fixture
def in_two(monkeypatch):
    """The settings are those of one of two processes."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_order": "sequential", "offload": "stages"}, 'offload="stages" in 2 processes.*"sequential".*"none"'),
        ({"offload": "layers"}, 'offload="layers" in 2 processes.*stage_order="end_to_end", or start one'),
        ({"stage_order": "end_to_end", "offload": "layers", "fsdp": True}, "of your own. Leave fsdp unset"),
        ({"stage_order": "end_to_end", "auto_find_batch_size": True}, "Set auto_find_batch_size=False"),
        ({"stage_order": "end_to_end", "resident_layers": 1}, "Set resident_layers=0"),
        ({"stage_order": "end_to_end", "offload": "layers", "fp16": True}, "Set bf16=True in the place of fp16"),
    ],
)
def test_what_several_processes_cannot_offload_is_refused(settings, message, in_two, tmp_path):
    with pytest.raises(ValueError, match=message):
        MMSTConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(("kind", "message"), [("FSDP", "Leave fsdp unset"), ("DEEPSPEED", "Leave deepspeed unset")])
def test_a_launcher_that_shards_by_itself_is_refused(kind, message, in_two, monkeypatch, tmp_path):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=message):
        MMSTConfig(str(tmp_path), use_cpu=True, stage_order="end_to_end", offload="layers")
    assert MMSTConfig(str(tmp_path), use_cpu=True, stage_order="end_to_end").offload == "none"


@pytest.mark.parametrize(("offload", "expected"), [(None, "true"), ("none", None)])
def test_processes_that_offload_can_exchange_tensors_in_host_memory(offload, expected, monkeypatch, tmp_path):
    """By these, accelerate gives a process group on GPUs gloo, too."""
    seen = []
    state = training_args.PartialState
    names = ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS")
    look = lambda **kwargs: seen.append([os.environ.get(name) for name in names]) or state(**kwargs)  # noqa: E731
    monkeypatch.setattr(training_args, "PartialState", look)
    MMSTConfig(str(tmp_path), use_cpu=True, stage_order="end_to_end", offload=offload)
    assert seen == [[expected] * 2]
    assert not os.environ.keys() & {*names}


def test_a_process_group_without_host_memory_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    args = SimpleNamespace(shards_layers=True, world_size=2)
    with (
        pytest.raises(ValueError, match="has cuda:nccl alone. Make MMSTConfig first"),
        sharding_layers(SimpleNamespace(args=args)),
    ):
        pass


def test_models_whose_layers_cannot_be_in_shards_are_refused():
    model = make("vit")
    layers = find_layers(model)
    refuse_in_shards(model, layers)
    model.is_quantized = True
    with pytest.raises(ValueError, match='quantized.*Set offload="none", or start one process'):
        refuse_in_shards(model, layers)
    model.is_quantized, model.config.layerdrop = False, 0.1
    with pytest.raises(ValueError, match="layerdrop=0.1 skips layers at random, which the other processes would wait"):
        refuse_in_shards(model, layers)
    model.config.layerdrop = 0.0
    model.get_input_embeddings = lambda: (_ for _ in ()).throw(NotImplementedError)
    with pytest.raises(ValueError, match="asks for the input embeddings, of which ViTForImageClassification says"):
        refuse_in_shards(model, layers)
    masked = make("bert-mlm")
    with pytest.raises(ValueError, match='bias of cls.predictions of BertForMaskedLM is .*Set offload="none"'):
        refuse_in_shards(masked, find_layers(masked))
    tied = make("gpt2")
    refuse_in_shards(tied, find_layers(tied))
    model.vit.layers[1] = model.vit.layers[0]
    with pytest.raises(ValueError, match="shares weights with vit.layers.0"):
        refuse_in_shards(model, layers)


def test_checkpoints_of_shards_and_of_one_process_are_told_apart(folder, tmp_path):
    with pytest.raises(ValueError, match="was written by processes that held shards.*two processes or more"):
        train(tmp_path, "bert", resume=str(folder / "bert/checkpoint-2"))
    accelerator = SimpleNamespace()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="was not written by processes that held shards.*and one process"):
        FullyShardedWrapper(accelerator).refuse_checkpoint(str(tmp_path))
    FullyShardedWrapper(accelerator).refuse_checkpoint(str(folder / "bert/checkpoint-2"))
