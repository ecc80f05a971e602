"""Model, its layers' names and example inputs -> what each layer costs and puts out, and where a cut can be."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from .copies import copied
from .examples import ExampleInputs
from .hidden_states import detached, hidden_states_of
from .partition import Partition

# What a pass without data raises where data decides. Any other error comes again when the model is run as it is.
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
    shapes: dict[str, torch.Size] = {}
    calls: list[str] = []

    def watch(name, output):
        calls.append(name)
        shapes[name] = hidden_states_of(output).shape

    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run_example(on_meta(model), layers, watch, example)
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
            run_example(model, layers, watch, example)
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
    return [
        LayerProfile(name, flops[name], shapes[name][1 if len(shapes[name]) == 4 else -1], len(shapes[name]) == 4)
        for name in layers
    ]


def check_cut(model: nn.Module, partition: Partition, example: ExampleInputs | None = None) -> None:
    """
    Check that what a stage learns from reaches no activation of an earlier stage by a way around that stage's end.

    Arguments are those of [`profile_layers`].

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
    example = example or ExampleInputs.made_up(model)
    try:
        found = _reached_twice(_learning_twin(model), partition, example)
    except _DEPENDS_ON_DATA:
        found = _reached_twice(model, partition, example)
    if found is not None:
        raise ValueError(
            f"In {type(model).__name__}, what stage {found[0] + 1} learns from reaches {found[1]} of an earlier stage "
            "by a way around the end of that stage, so that it cannot be cut there. Set stage_boundaries to other "
            "layers, or num_stages to 1."
        )


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits, or else the first tensor, of what a model returns."""
    if isinstance(outputs, Mapping) and torch.is_tensor(outputs.get("logits")):
        return outputs["logits"]
    return next(x for x in tree_leaves(outputs) if torch.is_tensor(x))


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


def trace_stages(model: nn.Module, partition: Partition, example: ExampleInputs | None = None) -> Trace:
    """
    Follow a forward pass of a copy of `model` on the meta device, in which the hidden states lose their graph at the
    end of each stage; a model whose forward pass depends on data is run as it is.

    Arguments are those of [`profile_layers`].

    Raises:
        `ValueError`: if a stage learns from other tensors of the stage before than its hidden states.
    """
    example = example or ExampleInputs.made_up(model)
    try:
        return _trace(_learning_twin(model), partition, example)
    except _DEPENDS_ON_DATA:
        return _trace(model, partition, example)


def _trace(model: nn.Module, partition: Partition, example: ExampleInputs) -> Trace:
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
        ends.append(logits_of(run_example(model, partition.layers, after, example)))
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


def _reached_twice(model: nn.Module, partition: Partition, example: ExampleInputs) -> tuple[int, str] | None:
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
            ends.append(logits_of(run_example(model, partition.layers, after, example)))
    finally:
        for hook in hooks:
            hook.remove()
    for stage, end in enumerate(ends):
        learning = [p for name in partition.stages[stage] for p in model.get_submodule(name).parameters()]
        if end.grad_fn is None and any(p.requires_grad for p in learning):
            raise ValueError(
                f"What {partition.boundaries[stage]} of {type(model).__name__} puts out has no graph, so that stage "
                f"{stage + 1} would not learn: the model makes its gradients in a way of its own, as reversible layers "
                "do. Set num_stages to 1."
            )
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


def run_example(
    model: nn.Module, layers: Sequence[str], after: Callable[[str, Any], Any], example: ExampleInputs
) -> Any:
    """Run `model` in eval mode; `after` sees, and may replace, each layer's output."""
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, name=name: after(name, output))
        for name in layers
    ]
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
        `NotImplementedError`: for quantized weights, whose scales the copy would lack.
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
