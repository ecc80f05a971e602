"""Activations of layers that are let go after the forward pass, and recomputed in the backward pass."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..cut.temporary_attributes import not_caching, replaced


@contextlib.contextmanager
def recomputing(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """
    Within this context the layers of those names are recomputed in the backward pass, with the same dropout.

    The numbers are those without it: what runs twice counts once in running statistics, and is not kept as keys and
    values.
    """
    with not_caching(model), contextlib.ExitStack() as stack:
        for name in layers:
            layer: Any = model.get_submodule(name)
            forward = functools.partial(_forward, layer, layer.forward)
            stack.enter_context(replaced(layer, "gradient_checkpointing", False))  # the host would do so once more
            stack.enter_context(replaced(layer, "forward", forward))
        yield


@contextlib.contextmanager
def keeping_buffers(layer: nn.Module) -> Iterator[None]:
    """Within this context a layer runs once more; its buffers are as before afterwards."""
    buffers = [(buffer.data, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:  # it ends with an exception, once all that was needed is there
        for buffer, before in buffers:
            buffer.copy_(before)


def is_in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1


def _forward(layer: nn.Module, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(functools.partial(_run, layer, forward), *args, use_reentrant=False, **kwargs)


def _run(layer: nn.Module, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
    with keeping_buffers(layer) if is_in_backward() else contextlib.nullcontext():
        return forward(*args, **kwargs)
