"""Heads that run their layer for the first token alone: the same logits and gradients as behind the whole layer."""

import contextlib

import pytest
import torch
from encoders import MODELS, build, inputs
from runs import trainer
from zoo import batch, make

from hf_mmst import StageHeads, find_layers, load_stages
from hf_mmst.cut.hidden_states import input_hidden_states
from hf_mmst.cut.probe import profile_layers
from hf_mmst.cut.token_flow import own_pooling
from hf_mmst.inference.early_exit import EarlyExit
from hf_mmst.method.first_token import ATTENTION, FEW, first_tokens_of, token_mixer
from hf_mmst.method.heads import logger
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way

MAPS = ("PVT", "PVT v2", "SegFormer", "FocalNet", "LeViT", "PoolFormer", "ResNet", "RegNet", "BiT")
MAPS += ("VGG (one sequence of single modules, as in timm)", "ConvNeXt", "ConvNeXt v2", "MobileViT v2", "MobileNet v2")
WINDOWS = ("Swin", "Swin v2", "Donut's Swin", "Hiera")  # of less than all tokens; their layers have several widths
SEVERAL = ("Funnel", "wav2vec 2.0-Conformer")  # pooled queries; convolutions beside attention
EAGER = ("DeBERTa", "DeBERTa v2", "ConvBERT", "RoFormer", "Megatron-BERT", "LUKE", "BigBird", "RemBERT", "CANINE")
MIXERS = {
    **dict.fromkeys(MODELS, ATTENTION),
    **dict.fromkeys((*MAPS, *WINDOWS, *SEVERAL)),
    **dict.fromkeys((*EAGER, "Longformer"), "attention.self"),
    "MPNet": "attention.attn",
    "FNet": "fourier.self",
    "WavLM": "attention",
}


def heads_of(model, number=1, pooling="cls"):
    layers = [model.get_submodule(name) for name in find_layers(model)[-number:]]
    return StageHeads([profile_layers(model, find_layers(model))[-1].width], 5, pooling, layers=layers)


def second_call(model, values):
    """What the model's second layer is called with."""
    calls = []
    layer = model.get_submodule(find_layers(model)[1])
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**values)
    hook.remove()
    return calls[0]


def outcome(heads, mixer, hidden, call):
    """Logits, and the gradients of the hidden states and of all parameters."""
    heads.mixer = mixer
    hidden = hidden.clone().requires_grad_()
    logits = heads(0, hidden, None, *call)
    torch.nn.functional.cross_entropy(logits.float(), torch.arange(len(logits)) % 5).backward()
    found = {"logits": logits.detach(), "hidden": hidden.grad, **{n: p.grad for n, p in heads.named_parameters()}}
    heads.zero_grad(set_to_none=True)
    return found


def assert_equal(found, expected, rtol=1e-4, atol=1e-6):
    assert found.keys() == expected.keys()
    scale = max(tensor.abs().max().item() for tensor in expected.values() if tensor is not None)
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        if tensor is not None:
            message = f"{name}: {{}}".format
            torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol * scale, msg=message)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_whole_layer(name):
    """With padding, in train mode without dropout."""
    model = build(name)
    last = find_layers(model)[-1]
    assert token_mixer(model, last) == MIXERS[name]
    if MIXERS[name] is None:
        return
    heads = heads_of(model)
    heads.read_first_token(model, last)
    assert heads.mixer == MIXERS[name]
    assert not any("forward" in vars(module) for module in heads.modules())
    call = second_call(model, inputs(model))
    hidden = torch.randn(input_hidden_states(*call).shape, generator=torch.Generator().manual_seed(1))
    expected = outcome(heads, None, hidden, call)
    assert sum(tensor is not None for tensor in expected.values()) > 10
    assert_equal(outcome(heads, heads.mixer or MIXERS[name], hidden, call), expected)
    with first_tokens_of(heads.layers[0], MIXERS[name]), torch.no_grad():
        output = heads.layers[0](*call[0], **call[1])
    assert (output[0] if isinstance(output, tuple) else output).shape[1] == FEW


def test_of_several_layers_the_last_one():
    model = make("bert")
    heads = heads_of(model, 2)
    heads.read_first_token(model, find_layers(model)[-1])
    call = second_call(model, batch("bert"))
    hidden = torch.randn(input_hidden_states(*call).shape)
    assert_equal(outcome(heads, heads.mixer, hidden, call), outcome(heads, None, hidden, call))


def test_in_low_precision():
    model = make("vit")
    call = second_call(model, batch("vit"))
    heads, hidden = heads_of(model), torch.randn(input_hidden_states(*call).shape)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (outcome(heads, mixer, hidden, call) for mixer in (ATTENTION, None))
    assert_equal(found, expected, rtol=2e-2, atol=1e-2)


def test_attention_of_another_kind_puts_out_all_tokens():
    """As where it is switched after the heads were made: the numbers stay right."""
    model = make("bert")
    call = second_call(model, {"input_ids": batch("bert")["input_ids"]})
    heads, hidden = heads_of(model), torch.randn(input_hidden_states(*call).shape)
    expected = outcome(heads, None, hidden, call)
    heads.layers[0].attention.self.config._attn_implementation = "eager"
    with first_tokens_of(heads.layers[0], ATTENTION):
        assert heads.layers[0](*call[0], **call[1]).shape[1] == 12
    assert_equal(outcome(heads, ATTENTION, hidden, call), expected)
    model.config._attn_implementation = "eager"
    assert token_mixer(model, find_layers(model)[-1]) == "attention.self"


class Alone(torch.nn.Module):
    """A layer without attention."""

    def __init__(self, layer):
        super().__init__()
        self.mlp = layer.mlp

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self.mlp(hidden_states)


def test_weights_that_hide_the_mixing_do_not_mislead():
    """A branch that begins at zero, as in some recipes; and nothing is concluded of a layer that does not mix."""
    model = make("vit")
    last = find_layers(model)[-1]
    layer = model.get_submodule(last)
    torch.nn.init.zeros_(layer.attention.o_proj.weight)
    assert token_mixer(model, last) == ATTENTION
    model.vit.layers[-1] = Alone(layer)
    assert token_mixer(model, last) is None


def saved(heads, call, hidden):
    """Bytes that a forward pass of the heads keeps for the backward pass, beside parameters and its input."""
    own = {p.data_ptr() for p in heads.parameters()} | {hidden.data_ptr()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        heads(0, hidden, None, *call).sum()
    return sum(kept.values())


def test_little_is_kept_for_the_backward_pass():
    model = make("vit")
    call = second_call(model, batch("vit", size=8))
    hidden = torch.randn(input_hidden_states(*call).shape, requires_grad=True)
    heads = heads_of(model)
    whole = saved(heads, call, hidden)
    heads.mixer = ATTENTION
    assert saved(heads, call, hidden) < 0.4 * whole


def test_only_where_all_heads_read_the_first_token_and_have_layers(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    model = make("bert")
    last = find_layers(model)[-1]
    for heads in (heads_of(model, 1, "mean"), StageHeads([32], 5, "cls")):
        heads.read_first_token(model, last)
        assert heads.mixer is None
    assert said == []
    heads = StageHeads([64], 5, "cls", layers=[make("swin").swin.encoder.layers[-1].blocks[-1]])
    heads.read_first_token(make("swin"), find_layers(make("swin"))[-1])
    assert heads.mixer is None
    assert "runs for all tokens" in said[0]


@contextlib.contextmanager
def whole_layers(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StageHeads, "read_first_token", lambda *_: None)
        yield


@pytest.mark.parametrize(
    ("name", "settings"),
    [("vit", {}), ("bert", {"activation_checkpointing": True}), ("bert", {"offload": "stages"})],
)
def test_training_evaluation_and_exits_agree_with_whole_layers(name, settings, tmp_path, monkeypatch):
    settings = {"head_layers": 1, "head_pooling": "cls", "max_steps": 4, "optim": "sgd", **settings}
    if "offload" in settings:
        settings |= {"stage_order": "sequential", "max_steps": 6}
    found = {}
    for kind, context in (("first", contextlib.nullcontext()), ("whole", whole_layers(monkeypatch))):
        with context:
            run = trainer(tmp_path / kind, name, **settings)
            run.train()
            run.save_model()
            scores = run.evaluate()
            stages = load_stages(tmp_path / kind)
            early = EarlyExit(run.model, stages)
            logits = early.observe([batch(name)]).logits
        assert (run.heads.mixer, early.heads.mixer) == ((ATTENTION, ATTENTION) if kind == "first" else (None, None))
        state = {**run.model.state_dict(), **{f"heads.{n}": t for n, t in stages.heads.state_dict().items()}}
        losses = {key: torch.tensor(value) for key, value in scores.items() if key.endswith("loss")}
        found[kind] = {**state, **losses, "exits": logits}
    assert len(found["first"]) > 60
    assert_equal(found["first"], found["whole"])


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_model_without_data_is_planned_as_with_data(name):
    model = make(name)
    model.config.name_or_path = "pretrained"
    values = batch(name, size=8)
    way, last = Way(num_stages=2), find_layers(model)[-1]
    with_data = Simulation(model, values).peak(way).total
    whole = Simulation(model, values, head_pooling="mean").peak(way).total
    empty = model.to("meta")
    assert own_pooling(empty, last) == "cls"
    assert token_mixer(empty, last) == ATTENTION
    without = Simulation(empty, {key: value.to("meta") for key, value in values.items()}).peak(way).total
    assert without == with_data < whole
