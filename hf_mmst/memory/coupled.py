"""End-to-end training with one layer in device memory: its own gradient, and everything else at rest."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint

from ..cut.partition import Partition
from ..cut.temporary_attributes import not_caching, replaced
from .residency import Residency, Shelf


class CoupledResidency(Residency):
    """
    Runs forward and backward of a whole model while each layer is in device memory only when it is needed.

    Within [`streaming`], a layer comes to the device for its forward pass, whose activations are let go, and again when
    the backward pass recomputes it; its gradient is put to rest when the backward pass has reached the layer before it.
    [`step`] takes the layers once more, one at a time. The gradients are those of end-to-end training; what the device
    holds is one layer's weights, gradient, states and activations, the input of each layer, and what is around the
    layers.

    Args: those of [`Residency`].

    Raises:
        `ValueError`: if layers share weights, which could not rest with one of them.
    """

    def __init__(self, model: nn.Module, partition: Partition, device: torch.device, folder: str):
        _refuse_shared(model, partition)
        super().__init__(model, partition, device, folder)
        self._gradients: dict[str, Shelf] = {}
        self._filled: set[str] = set()
        self._in_backward: str | None = None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """As [`Residency.watch`]; the states go back to rest after each step, those around the layers among them."""
        before = self._optimizer
        super().watch(optimizer)
        if self._optimizer is not None and self._optimizer is not before:
            self._optimizer.register_step_post_hook(lambda *_: self._rest_states())

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """As [`Residency.streaming`], and in the backward pass, too."""
        with super().streaming(), not_caching(self._model), contextlib.ExitStack() as stack:
            for name in self._partition.layers:
                layer: Any = self._model.get_submodule(name)
                # The host would recompute it once more; where a stage learns from its own loss, that is done here, too.
                recomputed = getattr(layer, "gradient_checkpointing", False)
                forward = functools.partial(self._forward, name, layer.forward, recomputed)
                stack.enter_context(replaced(layer, "gradient_checkpointing", False))
                stack.enter_context(replaced(layer, "forward", forward))
            yield

    def _forward(self, name: str, forward: Callable, recomputed: bool, /, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or (name in self._active and not recomputed):
            return forward(*args, **kwargs)
        return checkpoint(functools.partial(self._run, name, forward), *args, use_reentrant=False, **kwargs)

    def _run(self, name: str, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:
            return forward(*args, **kwargs)
        # The backward pass recomputes it.
        if name not in self._active:
            if self._in_backward is not None:
                self._put_gradient(self._in_backward)
            self._in_backward = name
            self._take(name)
        buffers = [(buffer.data, buffer.clone()) for buffer in self._model.get_submodule(name).buffers()]
        try:
            return forward(*args, **kwargs)
        finally:  # it ends with an exception, once all that was needed is there
            for buffer, before in buffers:  # else a batch would count twice in running statistics
                buffer.copy_(before)

    def rest(self) -> None:
        """As [`Residency.rest`]; gradients of a step that was not taken are forgotten."""
        super().rest()
        self._in_backward = None
        self._filled.clear()

    def settle(self) -> None:
        """After a backward pass, put to rest what is left of it on the device."""
        self._in_backward = None
        for name in self._partition.layers:
            if name not in self._active:
                self._put_gradient(name)

    def _put_gradient(self, name: str) -> None:
        """Put a layer to rest, and add its gradient, if there is one, to what it has."""
        self._rest(name)
        if all(p.grad is None for p in self._parameters[name]):
            return
        gradients = [_gradient(p) for p in self._learning(name)]
        if name not in self._gradients:
            self._gradients[name] = self.shelf(gradients, self._device, self._folder)
        elif name in self._filled:
            before = self._gradients[name].take()
            self._gradients[name].put([old.add_(new) for old, new in zip(before, gradients, strict=True)])
        else:
            self._gradients[name].put(gradients)
        self._filled.add(name)
        for parameter in self._parameters[name]:
            parameter.grad = None

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; returns what it was."""
        around = [p.grad for p in self._model.parameters() if p.grad is not None]
        norms = [get_total_norm(around)] if around else []
        norms += [get_total_norm(self._gradients[name].take()) for name in sorted(self._filled)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if math.isfinite(max_norm):
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in around:
                gradient.mul_(scale)
            for name in self._filled:
                self._gradients[name].put([gradient.mul_(scale) for gradient in self._gradients[name].take()])
        return norm

    def step(self, optimizer: Any) -> None:
        """Step each layer's parameters; those around the layers keep their gradients, for the caller's step."""
        around = [(p, p.grad) for p in self._model.parameters() if p.grad is not None]
        for parameter, _ in around:
            parameter.grad = None
        for name in self._partition.layers:
            if name not in self._filled:
                continue
            self._take(name)
            for parameter, gradient in zip(self._learning(name), self._gradients[name].take(), strict=True):
                parameter.grad = gradient
            optimizer.step()
            self._shelves[name].put([p.data for p in self._parameters[name]])
            self._rest(name)
            for parameter in self._parameters[name]:
                parameter.grad = None
        self._filled.clear()
        for parameter, gradient in around:
            parameter.grad = gradient

    def _learning(self, name: str) -> list[nn.Parameter]:
        return [p for p in self._parameters[name] if p.requires_grad]


def _refuse_shared(model: nn.Module, partition: Partition) -> None:
    layer_of: dict[nn.Parameter, str] = {}
    for name in partition.layers:
        for parameter in model.get_submodule(name).parameters():
            if layer_of.setdefault(parameter, name) != name:
                raise ValueError(
                    f"{name} of {type(model).__name__} shares weights with {layer_of[parameter]}, so that the two "
                    'cannot rest one by one. Set stage_order to another than "coupled", or coupled_laps=0.'
                )


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
