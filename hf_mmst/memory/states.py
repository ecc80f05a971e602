"""States of an optimizer at rest in host memory, but for those that a step is about to use."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from .slabs import HOST, Slab

Keys = tuple[tuple[torch.Tensor, str], ...]  # parameters and the names of their states


class RestingStates:
    """
    Keeps an optimizer's states in [`Slab`]s, and brings them to the device of their parameters for a step.

    Args:
        optimizer (`torch.optim.Optimizer`): whose states they are. It makes them at its first step.
        layers (`Mapping[str, list[nn.Parameter]]`): the parameters of each layer, whose states rest together; those of
            any other parameter rest by themselves.
        kept (`Collection[torch.Tensor]`): parameters whose states do not rest.
        device (`torch.device`), folder (`str`), slab (`type`): see [`Slab`].
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: Mapping[str, list[nn.Parameter]],
        kept: Collection[torch.Tensor],
        device: torch.device,
        folder: str,
        slab: type[Slab] = Slab,
    ):
        self.optimizer = optimizer
        self._device, self._folder, self._slab = device, folder, slab
        self._kept = kept
        self._layer_of = {id(p): name for name, parameters in layers.items() for p in parameters}
        self._slabs: dict[Keys, Slab] = {}
        self._taken: set[Keys] = set()

    def take(self) -> None:
        """Bring the states of parameters that have gradients."""
        self._forget_replaced()
        self._take_numbers()
        for keys, slab in self._slabs.items():
            if keys not in self._taken and any(parameter.grad is not None for parameter, _ in keys):
                self._taken.add(keys)
                for (parameter, name), tensor in zip(keys, slab.take(keys[0][0].device), strict=True):
                    self.optimizer.state[parameter][name] = tensor

    def nbytes_of(self, parameters: Collection[nn.Parameter]) -> int:
        """Bytes of the states at rest of some parameters."""
        wanted = {*parameters}
        return sum(slab.nbytes for keys, slab in self._slabs.items() if keys[0][0] in wanted)

    def _take_numbers(self) -> None:
        """Bring numbers of steps, which do not rest, where PyTorch keeps them with their parameters."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                on_device = group.get("fused") or group.get("capturable") or parameter.device == HOST
                for name, value in self.optimizer.state.get(parameter, {}).items():
                    if torch.is_tensor(value) and value.numel() == 1 and on_device and parameter.grad is not None:
                        self.optimizer.state[parameter][name] = value.to(parameter.device)

    def rest(self) -> None:
        """Put those that were taken to rest where they came from, and new ones in a new place."""
        state = self.optimizer.state
        self._forget_replaced()
        fresh = self._fresh()
        for keys in fresh:
            self._slabs[keys] = self._slab([state[p][name] for p, name in keys], self._device, self._folder)
        for keys in [*self._taken, *fresh]:
            slab = self._slabs[keys]
            slab.put([state[p][name] for p, name in keys])
            for (parameter, name), tensor in zip(keys, slab.tensors, strict=True):
                state[parameter][name] = tensor
            slab.let_go()
        self._taken.clear()

    def _fresh(self) -> list[Keys]:
        """States that do not rest yet: by layer, or else by parameter, what is taken together."""
        known = {key for keys in self._slabs for key in keys}
        found: dict[Any, list[tuple[torch.Tensor, str]]] = {}
        for parameter, values in self.optimizer.state.items():
            if parameter in self._kept:
                continue
            for name, value in values.items():
                is_new = torch.is_tensor(value) and value.numel() > 1 and (parameter, name) not in known
                if is_new and value.device.type == self._device.type:  # what is in host memory beside a device may stay
                    found.setdefault(self._layer_of.get(id(parameter), id(parameter)), []).append((parameter, name))
        return [tuple(keys) for keys in found.values()]

    def _forget_replaced(self) -> None:
        """Forget the states at rest in whose place others have come, as with a checkpoint that was loaded."""
        state = self.optimizer.state
        for keys in self._slabs.keys() - self._taken:
            resting = zip(keys, self._slabs[keys].tensors, strict=True)
            if any(state.get(parameter, {}).get(name) is not tensor for (parameter, name), tensor in resting):
                del self._slabs[keys]
