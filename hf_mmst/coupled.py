"""End-to-end training with one layer in device memory: its own gradient, and everything else at rest."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from .partition import Partition
from .residency import Residency, Shelf


class CoupledResidency(Residency):
    """
    Runs forward and backward of a whole model while each layer is in device memory only when it is needed.

    The layers' activations must be checkpointed, each layer by itself. Then, within [`streaming`], a layer comes to the
    device for its forward pass and again when the backward pass recomputes it; its gradient is put to rest when the
    backward pass has reached the layer before it. [`step`] takes the layers once more, one at a time. The gradients are
    those of end-to-end training; what the device holds is one layer's weights, gradient, states and activations, the
    input of each layer, and what is around the layers.

    Args: those of [`Residency`].
    """

    def __init__(self, model: nn.Module, partition: Partition, device: torch.device, folder: str):
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
        with super().streaming(), contextlib.ExitStack() as stack:
            for name in self._partition.layers:
                layer: Any = self._model.get_submodule(name)
                checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
                if checkpoint is not None:
                    layer._gradient_checkpointing_func = functools.partial(self._checkpoint, name, checkpoint)
                    stack.callback(setattr, layer, "_gradient_checkpointing_func", checkpoint)
            yield

    def _checkpoint(self, name: str, checkpoint: Callable, forward: Callable, *args: Any) -> Any:
        if name in self._active:  # a stage that learns from its own loss
            return checkpoint(forward, *args)

        def run(*args):
            if torch._C._current_graph_task_id() != -1:  # the backward pass recomputes the layer
                self.settle()
                self._in_backward = name
                self._take(name)
            return forward(*args)

        return checkpoint(run, *args)

    def settle(self) -> None:
        """Put the layer to rest that the backward pass was at, and add its gradient to what it has."""
        name, self._in_backward = self._in_backward, None
        if name is None:
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
        self._rest(name)

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


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
