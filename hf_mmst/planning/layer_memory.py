"""Memory of each layer in end-to-end training, found in a forward pass on fake tensors."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..cut.hidden_states import hidden_states_of
from .operations import CountingTracker


@dataclass(frozen=True)
class LayerMemory:
    """
    Bytes of one layer in end-to-end training: weights, gradients, AdamW's states, saved activations, output.

    Attributes:
        tokens (`int`): rows of its output, of the whole batch.
    """

    name: str
    weights: int
    gradients: int
    states: int
    activations: int
    output: int
    tokens: int


def memory_by_layer(
    model: nn.Module, layers: Sequence[str], forward: Callable[[], object], device: str
) -> list[LayerMemory]:
    """
    What each layer takes, and its activations in end-to-end training.

    Args:
        model (`nn.Module`): a model of fake tensors.
        layers (`Sequence[str]`): qualified names of its layers.
        forward (`Callable`): runs its forward pass once.
        device (`str`): where tensors are counted.
    """
    begin: dict[str, int] = {}
    saved: dict[str, int] = {}
    output: dict[str, int] = {}
    tokens: dict[str, int] = {}
    tracker = CountingTracker()

    def held():
        # Before anything is held there is no entry: the first layer may be the first to allocate.
        return tracker.get_tracker_snapshot("current").get(torch.device(device), {}).get("Total", 0)

    def before(name, *_):
        begin[name] = held()

    def after(name, _module, _args, out):
        hidden = hidden_states_of(out)
        saved[name], output[name] = held() - begin[name], hidden.nbytes
        tokens[name] = hidden.numel() // hidden.shape[1 if hidden.dim() == 4 else -1]

    with contextlib.ExitStack() as stack:
        for name in layers:
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(functools.partial(before, name)).remove)
            stack.callback(layer.register_forward_hook(functools.partial(after, name)).remove)
        with tracker:
            forward()
    found = []
    for name in layers:
        parameters = [*model.get_submodule(name).parameters()]
        weights = sum(p.nbytes for p in parameters)
        learning = sum(p.nbytes for p in parameters if p.requires_grad)
        found.append(LayerMemory(name, weights, learning, 2 * learning, saved[name], output[name], tokens[name]))
    return found
