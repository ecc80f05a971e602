"""Two processes with the model in shards between them, by FSDP2 and by DeepSpeed, give what one process gives."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from pages import block
from processes import ranks
from safetensors.torch import load_file
from sharded import RESUMED, main, train, trainer
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForSequenceClassification
from zoo import make

from hf_mmst import MMSTConfig, load_stages
from hf_mmst.cut.layers import find_layers
from hf_mmst.cut.partition import Partition
from hf_mmst.distributed.compiling import refuse_compilation
from hf_mmst.distributed.wrappers import DeepSpeedWrapper, FullyShardedWrapper, Wrapper, wrapper_of
from hf_mmst.method.heads import HEADS, StageHeads
from hf_mmst.trainer.refusals import refuse_placement

KINDS = {
    "fsdp": ["bert", "vit", "swin", "beit", "gpt2", "llama", "distilbert"],
    "zero2": ["bert", "gpt2", "distilbert"],
    "zero3": ["roberta"],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gets, by name; trained when it is first asked for."""
    folder, known = tmp_path_factory.mktemp("alone"), {}

    def result(name):
        if name not in known:
            known[name] = train("alone", str(folder / name), name)
        return known[name]

    return result


@pytest.fixture(scope="module", params=KINDS)
def shards(request, tmp_path_factory):
    """The kind of sharding, and the folder in which two processes have trained."""
    if request.param != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed, as the extra dev does; FSDP runs without it")
    folder = tmp_path_factory.mktemp(request.param)
    ranks(2, main, request.param, str(folder), *KINDS[request.param], folder=folder)
    return request.param, folder


def test_weights_metrics_and_logs_are_those_of_one_process(shards, alone):
    kind, folder = shards
    for name in KINDS[kind]:
        first, second = (load_file(folder / f"{kind}.{name}.{rank}") for rank in range(2))
        expected = alone(name)
        assert first.keys() == expected.keys()
        exact = name != "distilbert"  # in bfloat16, wrappers round at other places than autocast does
        for key, tensor in expected.items():
            assert torch.equal(first[key], second[key]), key
            if name in ("gpt2", "llama") and key.startswith("eval"):
                continue  # means over batches, which have unlike numbers of labels
            message = lambda m, key=key, name=name: f"{name} {key}: {m}"  # noqa: E731
            rtol, atol = (1e-4, 1e-6) if exact else (2e-2, 5e-3)
            if exact or "accuracy" not in key:
                torch.testing.assert_close(first[key].to(tensor.dtype), tensor, rtol=rtol, atol=atol, msg=message)


def test_the_best_model_is_loaded(shards):
    kind, folder = shards
    if kind == "fsdp":  # elsewhere stages cannot learn in turn, and all get better with each step
        assert 0 < load_file(folder / "fsdp.vit.0")["best"] < 8


def test_a_run_that_is_resumed_is_bitwise_the_run_without_a_break(shards):
    kind, folder = shards
    for rank in range(2):
        straight = load_file(folder / f"{kind}.{RESUMED[kind]}.{rank}")
        resumed = load_file(folder / f"{kind}.resumed.{rank}")
        assert straight.keys() == resumed.keys()
        for key, tensor in straight.items():
            assert torch.equal(resumed[key], tensor), key


def test_checkpoints_are_plain_models_with_their_heads(shards):
    kind, folder = shards
    weights = load_file(folder / f"{kind}.{RESUMED[kind]}.0")
    path = folder / RESUMED[kind] / "checkpoint-4"
    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = model.state_dict() | {f"{HEADS}.{k}": v for k, v in load_stages(path).heads.state_dict().items()}
    for key, tensor in found.items():
        assert torch.equal(tensor, weights[key]), key
    assert found.keys() >= {key for key in weights if key.startswith(HEADS)}


def fsdp(**plugin):
    plugin = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": None, **plugin}
    plugin = {"activation_checkpointing": False, **plugin}
    return FullyShardedWrapper(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))))


def deepspeed(zero_stage=2, **config):
    plugin = SimpleNamespace(deepspeed_config=config, zero_stage=zero_stage)
    return DeepSpeedWrapper(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))


@pytest.mark.parametrize(
    ("wrapper", "settings", "message"),
    [
        (fsdp(fsdp_version=1), {}, "FSDP 1 flattens parameters.*Set version to 2 in fsdp_config"),
        (fsdp(state_dict_type="SHARDED_STATE_DICT"), {}, "SHARDED_STATE_DICT saves no model.*FULL_STATE_DICT"),
        (fsdp(), {"stage_order": "end_to_end"}, 'offload="layers" moves layers.*Set offload="none"'),
        (fsdp(), {"stage_order": "sequential", "offload": "stages"}, 'Set offload="none"'),
        (fsdp(), {"stage_order": "sequential", "feature_cache": "disk"}, 'with FSDP all.*Set feature_cache="none"'),
        (
            fsdp(),
            {"stage_order": "sequential", "stage_objective": "model"},
            'FSDP knows.*Set stage_objective="local"',
        ),
        (fsdp(), {"memory_budget": "1GiB"}, 'memory_budget="1GiB" plans for a model that is whole'),
        (deepspeed(optimizer={}), {}, "an optimizer of its own.*Leave optimizer out of it, and set optim"),
        (deepspeed(scheduler={}), {}, "a scheduler of its own.*Leave scheduler out of it"),
        (deepspeed(), {"stage_clipping": True}, "DeepSpeed clips.*Set stage_clipping=False"),
        (deepspeed(), {"stage_order": "sequential"}, 'stages that rest.*Set stage_order="simultaneous"'),
        (deepspeed(), {"end_to_end_laps": 1}, "heads that rest.*Set end_to_end_laps=0"),
        (
            deepspeed(3),
            {"activation_checkpointing": True},
            "stage to 2.*activation_checkpointing=False",
        ),
        (deepspeed(3), {"torch_compile": True}, "torch.compile is switched on, but ZeRO stage 3.*torch_compile=False"),
    ],
)
def test_what_cannot_be_is_refused(wrapper, settings, message, tmp_path):
    args = MMSTConfig(str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(ValueError, match=message):
        wrapper.refuse(args, args.torch_compile)


def test_what_can_be_is_not_refused(tmp_path):
    simultaneous = MMSTConfig(str(tmp_path), use_cpu=True, activation_checkpointing=True)
    for wrapper in (fsdp(), deepspeed(1), deepspeed(2)):
        wrapper.refuse(simultaneous, compiles=True)
    sequential = MMSTConfig(str(tmp_path), use_cpu=True, stage_order="sequential", stage_clipping=True)
    fsdp().refuse(sequential, compiles=False)


SETTINGS = {
    '`stage_order="simultaneous"`': {},
    '`stage_order="sequential"`, `"multi_lap"`': {"stage_order": "sequential"},
    '`stage_objective="model"`': {"stage_order": "sequential", "stage_objective": "model"},
    "`end_to_end_laps`": {"end_to_end_laps": 1},
    '`stage_order="end_to_end"`, `offload="none"`': {"stage_order": "end_to_end", "offload": "none"},
    "`head_layers`": {"head_layers": 1},
    "accumulation, `max_grad_norm`": {"gradient_accumulation_steps": 2},
    "`stage_clipping`": {"stage_clipping": True},
    "`activation_checkpointing`": {"activation_checkpointing": True},
    '`offload="stages"`': {"stage_order": "sequential", "offload": "stages"},
    "`feature_cache`": {"stage_order": "sequential", "feature_cache": "disk"},
    "`memory_budget`": {"memory_budget": "1GiB"},
    "`torch_compile`": {"torch_compile": True},
}


def combinations(folder):
    """What works with what, as the page on several GPUs says it."""

    def works(wrapper, settings):
        args = MMSTConfig(str(folder), use_cpu=True, **settings)
        try:
            if wrapper is None:
                refuse_compilation(args, {})
            else:
                wrapper.refuse(args, args.torch_compile)
                heads = StageHeads([4], 2, layers=[nn.Linear(4, 4)] * (args.head_layers or 0))
                wrapper.prepare(nn.Module(), Partition(()), heads)
        except ValueError:
            return "-"
        return "yes"

    columns = {"FSDP2": fsdp(), "ZeRO-1, ZeRO-2": deepspeed(2), "ZeRO-3": deepspeed(3), "`torch_compile`": None}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, settings in SETTINGS.items():
        lines.append(" | ".join([f"| {name}", *(works(wrapper, settings) for wrapper in columns.values())]) + " |")
    return "\n".join(lines)


def test_the_table_of_combinations_is_true(tmp_path):
    assert block("recipes/several_gpus.md", "wrappers") == combinations(tmp_path)


def test_what_stages_share_is_refused_where_its_gradients_are_not_added_up():
    layers, own = StageHeads([4], 2, layers=[nn.Linear(4, 4)]), StageHeads([4], 2, kind="own")
    with pytest.raises(ValueError, match="The heads have 1 layers.*Set head_layers=0"):
        deepspeed(3).prepare(None, None, layers)
    with pytest.raises(ValueError, match="own head learns.*Set zero_optimization.stage to 2"):
        deepspeed(3).prepare(None, None, own)
    for heads in (layers, own):
        deepspeed(2).prepare(None, None, heads)


def test_layers_are_what_is_gathered_and_checkpointed():
    plugin = {"auto_wrap_policy": transformer_auto_wrap_policy, "transformer_cls_names_to_wrap": None}
    model = make("swin")
    partition = Partition.by_cost(find_layers(model), 6)
    wrapper = fsdp(**plugin, activation_checkpointing=True)
    wrapper.prepare(model, partition, None)
    assert wrapper.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == ["SwinLayer"]
    wrapper = fsdp(**plugin | {"transformer_cls_names_to_wrap": ["SwinStage"]}, activation_checkpointing=True)
    with pytest.raises(ValueError, match="runs swin.encoder.layers.0 twice.*Leave SwinStage out"):
        wrapper.prepare(model, partition, None)


def test_a_model_that_is_in_shards_already_is_refused(tmp_path):
    made = trainer("alone", str(tmp_path), "vit", use_cpu=True)
    made.is_distributed_loading_by_transformers = True
    with pytest.raises(ValueError, match="put in shards when it was loaded.*Load the model whole, and set fsdp=True"):
        refuse_placement(made)


def test_a_process_alone_has_no_wrapper():
    assert type(wrapper_of(SimpleNamespace(distributed_type=DistributedType.NO))) is Wrapper
    assert type(wrapper_of(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))) is Wrapper
