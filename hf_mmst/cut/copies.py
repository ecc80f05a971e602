"""Copies of modules, with other tensors in them if need be."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def copied(
    module: Module, training: bool | None = None, like: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Module:
    """
    A copy of `module`, in train or eval mode if that is given, with tensors that `like` makes of its own.

    What was put in the place of a module's `train` or `eval` may be bound to that very module, and is left out.
    """
    tensors: tuple[torch.Tensor, ...] = ()
    if like is not None:  # of tensors that are neither parameters nor buffers, too, such as fixed position embeddings
        others = (value for one in module.modules() for value in vars(one).values() if torch.is_tensor(value))
        tensors = (*module.parameters(), *module.buffers(), *others)
    twin = copy.deepcopy(module, {id(tensor): like(tensor) for tensor in tensors})  # type: ignore[misc]
    for one in twin.modules():
        one.training = one.training if training is None else training
        for name in ("train", "eval"):
            vars(one).pop(name, None)
    return twin
