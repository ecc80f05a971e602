"""Model and its layers' names -> what each layer costs and puts out, from one forward pass without data."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from .hidden_states import detached, hidden_states_of, with_hidden_states
from .partition import Partition

SAMPLES = 2  # in a batch that is looked at
# What a pass without data raises where data decides. Any other error comes again when the model is run on zeros.
_DEPENDS_ON_DATA = (RuntimeError, NotImplementedError, AssertionError)


@dataclass(frozen=True)
class LayerProfile:
    """
    What one layer does to one sample: its name, floating-point operations, the width D of its output, and whether
    that is a map `[D, H, W]` rather than tokens `[N, D]`.
    """

    name: str
    flops: int
    width: int
    is_map: bool = False


def profile_layers(model: nn.Module, layers: Sequence[str]) -> list[LayerProfile]:
    """
    Run a copy of `model` on the meta device, where tensors have shapes but no data, and watch its layers.

    A model whose forward pass depends on data (it looks into a mask, say) is run as it is, on zeros; the operations of
    a layer are then taken to be as many as its parameters.

    Args:
        model (`nn.Module`): the model; it is not changed.
        layers (`Sequence[str]`): names of its layers, in the order in which they should run.

    Returns:
        `list[LayerProfile]`: one a layer, for one sample (text: 16 tokens; the unit cancels in a cut by cost).

    Raises:
        `ValueError`: if the layers do not each run exactly once in that order, as in models that share layers, or do
            not give one row for each sample, or give maps with the channels last; or if the model is on the meta device
            and its forward pass depends on data.
    """
    shapes: dict[str, torch.Size] = {}
    calls: list[str] = []

    def watch(name, output):
        calls.append(name)
        shapes[name] = hidden_states_of(output).shape

    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _run(on_meta(model).eval(), layers, watch)
        counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        flops = {name: counts.get(f"{type(model).__name__}.{name}", 0) // SAMPLES for name in layers}
    except _DEPENDS_ON_DATA as error:
        if next(model.parameters()).is_meta:
            raise ValueError(
                f"The forward pass of {type(model).__name__} depends on data, so that it cannot be followed on tensors "
                "without data. It can be trained in stages, but not planned."
            ) from error
        calls.clear()
        with torch.no_grad():
            _run(model, layers, watch)
        flops = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in layers}
    if calls != list(layers):
        raise ValueError(
            f"The {len(layers)} layers of {type(model).__name__} ({layers[0]} .. {layers[-1]}) ran {len(calls)} times "
            "in a forward pass: layers that are shared, skipped or run out of order cannot be cut into stages. Set "
            "num_stages to 1, or pass a model whose layers each run once."
        )
    for name, shape in shapes.items():
        if shape[0] != SAMPLES:
            raise ValueError(
                f"{name} of {type(model).__name__} puts out {list(shape)} for {SAMPLES} samples, not one row for each, "
                "so that no head can judge it. Set num_stages to 1."
            )
        if len(shape) == 4 and shape[1] == shape[2] != shape[3]:
            raise ValueError(
                f"{name} of {type(model).__name__} puts out {list(shape)}, maps with the channels last, of which heads "
                "are not made. Set num_stages to 1."
            )
    return [
        LayerProfile(name, flops[name], shapes[name][1 if len(shapes[name]) == 4 else -1], len(shapes[name]) == 4)
        for name in layers
    ]


def check_cut(model: nn.Module, partition: Partition) -> None:
    """
    Check that what a stage learns from reaches no activation of an earlier stage by a way around that stage's end.

    Raises:
        `ValueError`: if it does, naming a parameter behind that activation; or if layers of two stages share weights.
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
    try:
        found = _reached_twice(_learning_twin(model), partition)
    except _DEPENDS_ON_DATA:
        found = _reached_twice(model, partition)
    if found is not None:
        raise ValueError(
            f"In {type(model).__name__}, what stage {found[0] + 1} learns from reaches {found[1]} of an earlier stage "
            "by a way around the end of that stage, so that it cannot be cut there. Set stage_boundaries to other "
            "layers, or num_stages to 1."
        )


def own_pooling(model: nn.Module, last_layer: str) -> str:
    """
    How the model's own head pools the tokens: `"cls"` if it reads the first one only, else `"mean"`.

    The model is run on zeros, and all other tokens that leave its last layer are made NaN, which spreads to whatever
    is computed from them. A model without data (on the meta device) is taken to read them all.
    """

    def after(_name, output):
        hidden = hidden_states_of(output).clone()
        hidden[:, 1:] = torch.nan
        return with_hidden_states(output, hidden)

    if next(model.parameters()).is_meta:
        return "mean"
    with torch.no_grad():
        outputs = _run(model, [last_layer], after)
    logits = outputs[0] if isinstance(outputs, tuple) else next(iter(outputs.values()))
    return "cls" if bool(logits.isfinite().all()) else "mean"


@dataclass(frozen=True)
class Trace:
    """
    What a forward pass of the model in stages shows.

    Attributes:
        outputs (`dict[str, Any]`): what each layer returns, `None` in the place of each tensor, by name.
        learners (`dict[str, frozenset[int]]`): the stages whose loss reaches each parameter, by name; those that none
            reaches are left out.
    """

    outputs: dict[str, Any]
    learners: dict[str, frozenset[int]]


def trace_stages(model: nn.Module, partition: Partition) -> Trace:
    """
    Follow a forward pass of a copy of `model` on the meta device, in which the hidden states lose their graph at the
    end of each stage; a model whose forward pass depends on data is run as it is, on zeros.

    Raises:
        `ValueError`: if a stage learns from other tensors of the stage before than its hidden states.
    """
    try:
        return _trace(_learning_twin(model), partition)
    except _DEPENDS_ON_DATA:
        return _trace(model, partition)


def _trace(model: nn.Module, partition: Partition) -> Trace:
    outputs: dict[str, Any] = {}
    ends: list[torch.Tensor] = []
    beside: dict[int, tuple[str, torch.Tensor]] = {}  # what ends of stages hand on beside their hidden states

    def after(name, output):
        outputs[name] = tree_map(lambda x: None if torch.is_tensor(x) else x, output)
        if name not in partition.boundaries[:-1]:
            return None
        ends.append(hidden_states_of(output))
        output = detached(output)
        others = [x for x in tree_leaves(output) if torch.is_tensor(x) and x is not hidden_states_of(output)]
        beside.update({id(x.requires_grad_()): (name, x) for x in others if x.is_floating_point()})
        return output

    with torch.enable_grad():
        found = _run(model, partition.layers, after)
        ends.append(found[0] if isinstance(found, tuple) else next(iter(found.values())))
    names = {id(p): name for name, p in model.named_parameters()}
    learners: dict[str, frozenset[int]] = {}
    for stage, end in enumerate(ends):
        nodes, seen = [end.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [one for one, _ in node.next_functions]
            leaf = id(getattr(node, "variable", None))
            if leaf in beside:
                raise ValueError(
                    f"What follows {beside[leaf][0]} of {type(model).__name__} needs more of it than its hidden "
                    "states. Set stage_boundaries to other layers."
                )
            name = names.get(leaf)
            if name is not None:
                learners[name] = learners.get(name, frozenset()) | {stage}
    return Trace(outputs, learners)


def _reached_twice(model: nn.Module, partition: Partition) -> tuple[int, str] | None:
    """A stage that reaches an activation of an earlier one, and a parameter behind that, if there is such a stage."""
    ends: list[torch.Tensor] = []

    def before(_module, args, kwargs):  # side inputs of all layers are not a way around
        hidden = hidden_states_of(args or tuple(kwargs.values()))
        return tree_map(lambda x: x.detach() if torch.is_tensor(x) and x is not hidden else x, (args, kwargs))

    def after(name, output):
        if name not in partition.boundaries[:-1]:
            return None
        ends.append(hidden_states_of(output))
        return detached(output)

    names = {id(p): name for name, p in model.named_parameters()}
    hooks = [model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True) for name in partition.layers]
    owner: dict[Any, int] = {}  # of each node of the graph, the stage that steps back through it
    try:
        with torch.enable_grad():
            outputs = _run(model, partition.layers, after)
            ends.append(outputs[0] if isinstance(outputs, tuple) else next(iter(outputs.values())))
    finally:
        for hook in hooks:
            hook.remove()
    for stage, end in enumerate(ends):
        nodes = [end.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or hasattr(node, "variable") or owner.get(node) == stage:
                continue  # parameters may be shared
            if node in owner:
                return stage, _parameter_behind(node, names)
            owner[node] = stage
            nodes += [one for one, _ in node.next_functions]
    return None


def _parameter_behind(node: Any, names: dict[int, str]) -> str:
    nodes, seen = [node], set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            return names.get(id(node.variable), "an activation")
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [one for one, _ in node.next_functions]
    return "an activation"


def _run(model: nn.Module, layers: Sequence[str], after: Callable[[str, Any], Any]) -> Any:
    """Run `model` on zeros in eval mode; `after` sees, and may replace, each layer's output."""
    modes = {module: module.training for module in model.modules()}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, name=name: after(name, output))
        for name in layers
    ]
    try:
        return model.eval()(**dummy_inputs(model, SAMPLES, next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training


def dummy_inputs(
    model: nn.Module,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    seq_len: int = 16,
    image_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    Inputs of the right shape for `model`: zeros, `[B, channels, height, width]` for images, `[B, seq_len]` for text,
    half a second of audio at 16 kHz or a spectrogram of the model's own length.

    Images are of the model's own size unless another is given.

    Raises:
        `ValueError`: if the model's main input is neither images, nor token ids, nor audio.
    """
    config: Any = model.config
    kind: Any = model.main_input_name
    if kind == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = image_size or getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch_size, getattr(vision, "num_channels", 3), height, width)
        return {"pixel_values": torch.zeros(shape, device=device)}
    if kind == "input_ids":
        return {"input_ids": torch.zeros((batch_size, seq_len), dtype=torch.long, device=device)}
    bands, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if kind == "input_features" and bands is not None and frames is not None:
        return {kind: torch.zeros((batch_size, bands, 2 * frames), device=device)}
    if kind == "input_features" and hasattr(config, "feature_projection_input_dim"):
        return {kind: torch.zeros((batch_size, 64, config.feature_projection_input_dim), device=device)}
    if kind == "input_values" and bands is not None:
        return {kind: torch.zeros((batch_size, config.max_length, bands), device=device)}
    if kind == "input_values":
        return {kind: torch.zeros((batch_size, 8000), device=device)}
    raise ValueError(
        f"{type(model).__name__} takes {kind!r}; only models of images (pixel_values), text (input_ids) and audio "
        "(input_values, input_features) can be cut into stages. Set num_stages to 1."
    )


def on_meta(model: nn.Module) -> nn.Module:
    """
    A copy of `model` whose parameters and buffers are on the meta device; nothing is allocated.

    Raises:
        `NotImplementedError`: for quantized weights, whose scales the copy would lack.
    """
    if getattr(model, "is_quantized", False):
        raise NotImplementedError(f"The weights of {type(model).__name__} are quantized.")
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, object] = {id(tensor): _meta_like(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo)


def _learning_twin(model: nn.Module) -> nn.Module:
    """A copy on the meta device in eval mode, all weights of which learn."""
    twin = on_meta(model).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
