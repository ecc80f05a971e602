"""Passes over a model before training: what each layer costs and puts out, and whether the model can be cut."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .copies import copied
from .example_inputs import ExampleInputs
from .hidden_states import hidden_states_of, input_hidden_states
from .layers import run_ends
from .partition import Partition
from .quick_shapes import QuickShapes
from .tracing import Recorder, Trace

# What a pass without data raises where data decides. Any other error comes again when the model is run as it is.
_DEPENDS_ON_DATA = (RuntimeError, NotImplementedError, AssertionError)


@dataclass(frozen=True)
class LayerProfile:
    """
    The cost and output of one layer, for one sample.

    Attributes:
        name (`str`): qualified name of the layer.
        flops (`int`): floating-point operations of its forward pass.
        width (`int`): width D of its output.
        is_map (`bool`): whether the output is a feature map `[D, H, W]` rather than tokens `[N, D]`.
        keeps_shape (`bool`): whether the output has the shape of the input of the layer's run (see [`run_ends`]), so
            that there is a transport term.
    """

    name: str
    flops: int
    width: int
    is_map: bool = False
    keeps_shape: bool = True


def profile_layers(model: nn.Module, layers: Sequence[str], example: ExampleInputs | None = None) -> list[LayerProfile]:
    """
    Run a copy of `model` on the meta device, where tensors have shapes but no data, and watch its layers.

    A model whose forward pass depends on data (it looks into a mask, say) is run as it is; the operations of a layer
    are then taken to be as many as its parameters.

    Args:
        model (`nn.Module`): the model; it is not changed.
        layers (`Sequence[str]`): names of its layers, in the order in which they should run.
        example ([`ExampleInputs`], *optional*): made up by default.

    Returns:
        `list[LayerProfile]`: one a layer, for one sample (the unit cancels in a cut by cost).

    Raises:
        `ValueError`: if the layers do not each run exactly once in that order, as in models that share layers, or do
            not give one row for each sample, or give maps with the channels last; or if the model is on the meta device
            and its forward pass depends on data.
    """
    example = example or ExampleInputs.made_up(model)
    got: dict[str, torch.Size] = {}
    shapes: dict[str, torch.Size] = {}
    calls: list[str] = []

    def enter(name, args, kwargs):
        got[name] = input_hidden_states(args, kwargs).shape

    def watch(name, output):
        calls.append(name)
        shapes[name] = hidden_states_of(output).shape

    try:
        with torch.no_grad(), QuickShapes(), FlopCounterMode(display=False) as counter:
            run_example(on_meta(model), layers, watch, example, enter)
        counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        flops = {name: counts.get(f"{type(model).__name__}.{name}", 0) // example.num_samples for name in layers}
    except _DEPENDS_ON_DATA as error:
        if next(model.parameters()).is_meta:
            raise ValueError(
                f"The forward pass of {type(model).__name__} depends on data, so that it cannot be followed on tensors "
                "without data. It can be trained in stages, but not planned."
            ) from error
        calls.clear()
        with torch.no_grad():
            run_example(model, layers, watch, example, enter)
        flops = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in layers}
    if calls != list(layers):
        raise ValueError(
            f"The {len(layers)} layers of {type(model).__name__} ({layers[0]} .. {layers[-1]}) ran {len(calls)} times "
            "in a forward pass: layers that are shared, skipped or run out of order cannot be cut into stages. Set "
            "num_stages to 1, or pass a model whose layers each run once."
        )
    for name, shape in shapes.items():
        if shape[0] != example.num_samples:
            raise ValueError(
                f"{name} of {type(model).__name__} puts out {list(shape)} for {example.num_samples} samples, not "
                "one row for each, so that no head can judge it. Set num_stages to 1."
            )
        if len(shape) == 4 and shape[1] == shape[2] != shape[3]:
            raise ValueError(
                f"{name} of {type(model).__name__} puts out {list(shape)}, maps with the channels last, of which heads "
                "are not made. Set num_stages to 1."
            )
    profile = []
    begin = None
    ends = set(run_ends(model, layers))
    for name in layers:
        begin = got[name] if begin is None else begin
        is_map = len(shapes[name]) == 4
        width = shapes[name][1 if is_map else -1]
        profile.append(LayerProfile(name, flops[name], width, is_map, shapes[name] == begin))
        begin = None if name in ends else begin
    return profile


def check_cut(model: nn.Module, partition: Partition, example: ExampleInputs | None = None) -> Trace:
    """
    Trace the model's stages, and check that what a stage learns from reaches no activation of an earlier stage by a way
    around that stage's end, and that all of its layers can learn from its own loss.

    Arguments are those of [`profile_layers`].

    Raises:
        `ValueError`: if not, naming a layer or parameter; or if layers of two stages share weights.
    """
    stage_of: dict[nn.Parameter, int] = {}
    for stage, names in enumerate(partition.stages):
        for name in names:
            for parameter in model.get_submodule(name).parameters():
                if stage_of.setdefault(parameter, stage) != stage:
                    raise ValueError(
                        f"{name} of {type(model).__name__}, in stage {stage + 1}, shares weights with a layer of stage "
                        f"{stage_of[parameter] + 1}, which would not be the same after it has learned. Set "
                        "stage_boundaries so that they are in one stage, or num_stages to 1."
                    )
    trace = trace_stages(model, partition, example)
    if trace.twice is not None:
        raise ValueError(
            f"In {type(model).__name__}, what stage {trace.twice[0] + 1} learns from reaches {trace.twice[1]} of an "
            "earlier stage by a way around the end of that stage, so that it cannot be cut there. Set stage_boundaries "
            "to other layers, or num_stages to 1."
        )
    if trace.streams:
        raise ValueError(
            f"{trace.streams[0]} of {type(model).__name__} hands on a second stream beside its hidden states, of which "
            "alone the head of its stage judges, so that not all of it would learn there. Set num_stages to 1."
        )
    for stage, names in enumerate(partition.stages):
        layers = tuple(f"{name}." for name in names)
        own = [name for name, p in model.named_parameters() if name.startswith(layers) and p.requires_grad]
        if own and not any(name in trace.learners for name in own):
            raise ValueError(
                f"What {partition.boundaries[stage]} of {type(model).__name__} puts out has no graph, so that stage "
                f"{stage + 1} would not learn: the model makes its gradients in a way of its own, as reversible layers "
                "do. Set num_stages to 1."
            )
    return trace


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits, or else the first tensor, of what a model returns."""
    if isinstance(outputs, Mapping) and torch.is_tensor(outputs.get("logits")):
        return outputs["logits"]
    return next(x for x in tree_leaves(outputs) if torch.is_tensor(x))


def trace_stages(model: nn.Module, partition: Partition, example: ExampleInputs | None = None) -> Trace:
    """
    Follow a forward pass of a copy of `model` on the meta device, in which tensors lose their graph at the end of each
    stage as they do in training; a model whose forward pass depends on data is run as it is.

    Arguments are those of [`profile_layers`].
    """
    example = example or ExampleInputs.made_up(model)
    try:
        return _trace(_learning_twin(model), partition, example)
    except _DEPENDS_ON_DATA:
        return _trace(model, partition, example)


def _trace(model: nn.Module, partition: Partition, example: ExampleInputs) -> Trace:
    recorder = Recorder(partition)
    with torch.enable_grad(), QuickShapes():
        outputs = run_example(model, partition.layers, recorder.after, example, recorder.before)
    return recorder.trace(logits_of(outputs), model)


def run_example(
    model: nn.Module,
    layers: Sequence[str],
    after: Callable[[str, Any], Any],
    example: ExampleInputs,
    before: Callable[[str, tuple, dict], Any] = lambda name, args, kwargs: None,
) -> Any:
    """Run `model` in eval mode; `before` sees, and may replace, each layer's arguments, `after` its output."""
    hooks = []
    for name in layers:
        layer = model.get_submodule(name)
        entering = functools.partial(lambda name, _module, args, kwargs: before(name, args, kwargs), name)
        hooks.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda _module, _args, output, name=name: after(name, output)))
    try:
        with evaluating(model):
            return model(**example.on(model))
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def on_meta(model: nn.Module) -> nn.Module:
    """
    A copy of `model` in eval mode, whose parameters and buffers are on the meta device; nothing is allocated.

    Raises:
        `NotImplementedError`: for quantized weights, not all of whose operations run there.
    """
    if getattr(model, "is_quantized", False):
        raise NotImplementedError(f"The weights of {type(model).__name__} are quantized.")
    return copied(model, False, _meta_like)


def _learning_twin(model: nn.Module) -> nn.Module:
    """A copy on the meta device in eval mode, all weights of which learn."""
    twin = on_meta(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
