"""Tests of which tokens a model uses: whether layers attend causally or ignore padding, and how its head pools."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .example_inputs import ExampleInputs
from .hidden_states import call_with, hidden_states_of, input_hidden_states, with_hidden_states
from .partition import Partition
from .probe import evaluating, logits_of, run_example
from .side_inputs import graph_behind
from .temporary_attributes import not_caching


def own_pooling(model: nn.Module, last_layer: str, example: ExampleInputs | None = None) -> str:
    """
    How the model's own head pools the tokens: `"cls"` if it reads the first one only, else `"mean"`.

    All other tokens that leave its last layer are made NaN, which spreads to whatever is computed from them. Of a model
    without data (on the meta device) the graph tells: whether all ways from the logits to the hidden states lead
    through the choice of the first token. Arguments are those of [`profile_layers`].
    """
    hidden: list[torch.Tensor] = []

    def after(_name, output):
        hidden.append(hidden_states_of(output).detach().clone())
        if is_meta:
            hidden[0].requires_grad_()
        else:
            hidden[0][:, 1:] = torch.nan
        return with_hidden_states(output, hidden[0])

    is_meta = next(model.parameters()).is_meta
    with torch.set_grad_enabled(is_meta):
        logits = logits_of(run_example(model, [last_layer], after, example or ExampleInputs.made_up(model)))
    if is_meta:
        _, leaves = graph_behind([logits.grad_fn], lambda node: not _chooses_first_token(node))
        return "mean" if id(hidden[0]) in leaves else "cls"
    return "cls" if bool(logits.isfinite().all()) else "mean"


def attends_causally(model: nn.Module, layers: Sequence[str], example: ExampleInputs | None = None) -> bool:
    """
    Whether no token of the hidden states depends on a later one in any layer, as in a decoder.

    Each layer is run again with another last token, until one is found of which the tokens before that come out
    otherwise. A model without data (on the meta device) is taken at its word, `is_causal`. Arguments are those of
    [`profile_layers`].
    """
    modules = [model.get_submodule(name) for name in layers]
    if next(model.parameters()).is_meta:
        return any(getattr(part, "is_causal", False) is True for module in modules for part in module.modules())
    example = example or ExampleInputs.made_up(model)
    calls: list[tuple[nn.Module, tuple, dict[str, Any], Any]] = []
    with torch.no_grad(), evaluating(model), not_caching(model):
        hooks = [module.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for module in modules]
        try:
            model(**example.on(model))
        finally:
            for hook in hooks:
                hook.remove()
        causal = False
        for layer, args, kwargs, output in calls:
            changed = _earlier_tokens_change(layer, args, kwargs, output, example.values.get("attention_mask"))
            if changed:
                return False
            causal |= changed is False
        return causal


def ignores_padding(model: nn.Module, partition: Partition, example: ExampleInputs | None = None) -> bool:
    """
    Whether the tokens of a text that count are the same at the end of each stage, however many others follow them.

    The first half of all tokens is looked at with the second as padding, and without it: a convolution or pooling over
    tokens sees the difference, masked attention does not. Hidden states that are not one of each token that the mask is
    for do not ignore padding. Arguments are those of [`profile_layers`].
    """
    taken = inspect.signature(model.forward).parameters
    masked = "attention_mask" in taken or any(one.kind == one.VAR_KEYWORD for one in taken.values())
    example = example or ExampleInputs.made_up(model)
    ids = example.values.get("input_ids")
    if not masked or not torch.is_tensor(ids) or next(model.parameters()).is_meta:
        return False
    half = ids.shape[1] // 2
    found: list[list[torch.Tensor]] = []
    for length in (ids.shape[1], half):
        mask = (torch.arange(length) < half).long().expand(len(ids), -1)
        values = {
            name: value[:, :length] if torch.is_tensor(value) and value.shape[:2] == ids.shape else value
            for name, value in example.values.items()
        }
        part = ExampleInputs({**values, "attention_mask": mask}, example.num_samples)
        hidden: dict[str, Any] = {}
        with torch.no_grad():
            outputs = run_example(model, partition.boundaries, hidden.__setitem__, part)
        ends = [hidden_states_of(output) for output in hidden.values()]
        if any(end.shape[:2] != mask.shape for end in ends):
            return False
        found.append([end[:, :half] if end.dim() == 3 else end for end in (*ends, logits_of(outputs))])
    rounding = torch.finfo(found[0][0].dtype).eps ** 0.5
    return all((a - b).abs().max() <= rounding * a.abs().max() for a, b in zip(*found, strict=True))


def _chooses_first_token(node: Any) -> bool:
    """Whether a node of a graph is that of `hidden[:, 0]`."""
    return (getattr(node, "_saved_dim", None), getattr(node, "_saved_index", None)) == (1, 0)


def _earlier_tokens_change(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, mask: Any
) -> bool | None:
    """Whether another last token, of those that count, changes the ones before it; `None` if there are no such ones."""
    hidden, before = input_hidden_states(args, kwargs), hidden_states_of(output)
    if hidden.dim() != 3 or before.shape != hidden.shape:
        return None
    counts = torch.ones(hidden.shape[:2], dtype=torch.bool)
    if torch.is_tensor(mask) and mask.shape == counts.shape:
        counts = mask.bool().cpu()
    last = torch.arange(len(counts)), counts.shape[1] - 1 - counts.long().flip(1).argmax(1)
    counts[last] = False
    if not counts.any():
        return None
    other = hidden.clone()
    other[last] = torch.linspace(-1, 1, hidden.shape[2]).to(hidden)
    after = hidden_states_of(call_with(layer, other, args, kwargs))
    return not torch.equal(after[counts], before[counts])
