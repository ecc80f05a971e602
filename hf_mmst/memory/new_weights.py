"""New weights of a model on the meta device, made where they are to be: never all of them in memory at once."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import swap_tensors

from ..cut.temporary_attributes import replaced
from .slabs import HOST


def is_without_data(model: nn.Module) -> bool:
    """
    Whether a model is on the meta device.

    Raises:
        `ValueError`: if only a part of it is, or its class does not say how weights are made.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    without = [name for name, tensor in tensors.items() if tensor.is_meta]
    if without and len(without) < len(tensors):
        raise ValueError(
            f"{without[0]} of {type(model).__name__} is on the meta device, and so without data, but other weights are "
            "not. Load all of them, or make the whole model on the meta device, to have new weights."
        )
    if without and not hasattr(model, "initialize_weights"):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, and does not say how its weights are made: it has no "
            "initialize_weights. Make it on the CPU."
        )
    return bool(without)


def give_memory(parameters: Iterable[nn.Parameter], memory: Iterable[torch.Tensor]) -> None:
    """Put `memory` in the place of parameters on the meta device, which stay the same objects."""
    for parameter, tensor in zip(parameters, memory, strict=True):
        swap_tensors(parameter, nn.Parameter(tensor, parameter.requires_grad))


def make_weights(model: nn.Module, after_each: Callable[[], None]) -> None:
    """
    Make a model's weights by the rules of its class, with PyTorch's generator.

    What has no memory yet gets it on the CPU; `after_each` is called whenever a module has its weights.
    """
    around = [p for p in model.parameters() if p.is_meta]
    give_memory(around, [torch.empty_like(p, device=HOST) for p in around])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=HOST)
    made: Any = model
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "_init_weights"):
                stack.enter_context(replaced(module, "_init_weights", _followed(module._init_weights, after_each)))
        made.initialize_weights()
        made.tie_weights()


def _followed(init: Any, after: Callable[[], None]) -> Callable[[nn.Module], None]:
    def both(module: nn.Module) -> None:
        init(module)
        after()

    return both
