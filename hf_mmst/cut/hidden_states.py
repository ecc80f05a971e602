"""Find and replace hidden states: the one tensor of a layer's input or output that the next layer transforms."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map


def hidden_states_of(value: Any) -> torch.Tensor:
    """The hidden states, `[B, N, D]` or `[B, C, H, W]`, of a layer's positional arguments or of its output."""
    while isinstance(value, tuple | list):
        value = value[0]
    return value


def input_hidden_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states that a layer is called with, by position or by name."""
    return hidden_states_of(tuple(args) or tuple(kwargs.values()))


def with_hidden_states(output: Any, hidden: torch.Tensor) -> Any:
    """A value built as `output`, with `hidden` in the place of its hidden states."""
    return (with_hidden_states(output[0], hidden), *output[1:]) if isinstance(output, tuple | list) else hidden


def call_with(layer: Callable, hidden: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `layer` returns for these hidden states, wherever they go in, and the rest of another layer's arguments."""
    before = input_hidden_states(args, kwargs)
    args, kwargs = tree_map(lambda value: hidden if value is before else value, (tuple(args), dict(kwargs)))
    return layer(*args, **kwargs)


def detached(output: Any) -> Any:
    """A layer's output with every tensor cut off from the graph; shapes and structure are kept."""
    return tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, output)


def without_tensors(output: Any) -> Any:
    """A layer's output with `None` in the place of every tensor."""
    return tree_map(lambda x: None if torch.is_tensor(x) else x, output)


def mask_of(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The padding mask, `[B, N]`, if it is one of these tokens, `[B, N, D]`, else `None`."""
    return mask if mask is not None and hidden.dim() == 3 and mask.shape == hidden.shape[:2] else None
