"""Half of the bytes under autocast: weights that it would cast come cast, and their gradients go as they are."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .slabs import Slab

CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)  # by autocast, all that they have


def cast_by_autocast(layer: nn.Module) -> set[nn.Parameter]:
    """The parameters of a layer of which autocast makes copies in low precision wherever they are used."""
    cast: set[nn.Parameter] = set()
    kept: set[nn.Parameter] = set()
    for module in layer.modules():
        (cast if type(module) in CAST else kept).update(module.parameters(recurse=False))
    return {p for p in cast - kept if p.dtype == torch.float32}


class HalfSent:
    """
    Places in host memory for what goes over the link in low precision, beside those in which it rests in float32.

    The numbers are those of autocast: it casts the same weights, once on the device, and its gradients are cast back.

    Args:
        model (`nn.Module`): the model.
        layers (`Mapping[str, Sequence[nn.Parameter]]`): the parameters of each layer, by its name.
        dtype (`torch.dtype`): of autocast.
        make (`Callable[[Sequence[torch.Tensor]], Slab]`): makes room for such tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Sequence[nn.Parameter]],
        dtype: torch.dtype,
        make: Callable[[Sequence[torch.Tensor]], Slab],
    ):
        cast = {p for name in layers for p in cast_by_autocast(model.get_submodule(name))}
        self._make, self._dtypes = make, {p: dtype if p in cast else p.dtype for own in layers.values() for p in own}
        self.weights = {name: self._room_for(parameters) for name, parameters in layers.items()}
        self._gradients: dict[str, tuple[list[nn.Parameter], Slab]] = {}
        self._sent: list[tuple[str, set[nn.Parameter]]] = []
        self._earlier: dict[nn.Parameter, torch.Tensor] = {}

    def _room_for(self, parameters: Iterable[nn.Parameter]) -> Slab:
        return self._make([torch.empty_like(p, dtype=self._dtypes[p], device="meta") for p in parameters])

    def refresh(self, name: str, tensors: Sequence[torch.Tensor]) -> Slab:
        """What goes to the device of a layer whose weights at rest are `tensors`."""
        self.weights[name].put(tensors)
        return self.weights[name]

    def gradients(self, name: str, learning: Sequence[nn.Parameter]) -> Slab:
        """Where the gradients of a layer's parameters arrive."""
        before, slab = self._gradients.get(name, ([], None))
        if slab is None or [*map(id, before)] != [*map(id, learning)]:
            slab = self._room_for(learning)
            self._gradients[name] = [*learning], slab
        return slab

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take off parameters what earlier backward passes of the step have left at rest, to which this one adds."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._earlier[parameter], parameter.grad = parameter.grad, None

    def send(self, name: str, parameters: Collection[nn.Parameter]) -> None:
        """Note that gradients of a layer are on their way."""
        self._sent.append((name, {*parameters}))

    def arrive(self, resting: Mapping[str, tuple[list[nn.Parameter], Slab]]) -> set[nn.Parameter]:
        """
        Put all gradients that have come to rest.

        Args:
            resting (`Mapping[str, tuple[list[nn.Parameter], Slab]]`): where, by the names of layers.

        Returns:
            `set[nn.Parameter]`: those to whose gradients nothing was added, but the first.
        """
        first: set[nn.Parameter] = set()
        for name, parameters in self._sent:
            learning, slab = resting[name]
            come = zip(learning, slab.tensors, self._gradients[name][1].tensors, strict=True)
            found = [there if p not in parameters or p in self._earlier else new for p, there, new in come]
            slab.put(found)
            for p, there, new in zip(learning, slab.tensors, self._gradients[name][1].tensors, strict=True):
                if p in parameters and p in self._earlier:
                    there.add_(new)
                elif p in parameters:
                    first.add(p)
                if p in parameters or p in self._earlier:
                    p.grad = there
        self.forget()
        return first

    def forget(self) -> None:
        """Forget what is on its way."""
        self._sent.clear()
        self._earlier.clear()
