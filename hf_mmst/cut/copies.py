"""Copies of modules, with other tensors in them if need be."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

Module = TypeVar("Module", bound=nn.Module)


def copied(
    module: Module, training: bool | None = None, like: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Module:
    """
    A copy of `module`, in train or eval mode if that is given, with tensors that `like` makes of its own.

    What was put in the place of a module's `train` or `eval` may be bound to that very module, and is left out.
    """
    memo: dict[int, Any] = {}
    if like is not None:
        tensors = [*tensors_of(module)]
        memo = {id(tensor): like(tensor) for tensor in tensors}
    twin = copy.deepcopy(module, memo)
    if like is not None:  # quantized weights know their scales
        for old in tensors:
            if type(old) not in (torch.Tensor, nn.Parameter, FakeTensor):
                vars(memo[id(old)]).update(copy.deepcopy(vars(old), memo))
    for one in twin.modules():
        one.training = one.training if training is None else training
        for name in ("train", "eval"):
            vars(one).pop(name, None)
    return twin


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and what else its modules hold: fixed position embeddings, scales of quantized weights."""
    for one in module.modules():
        for value in (*one._parameters.values(), *one._buffers.values(), *vars(one).values()):
            yield from _within(value)


def _within(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    is_plain = hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value)
    for inner in vars(value).values() if is_plain and depth else ():
        yield from _within(inner, depth - 1)
