"""Which layers are in device memory: those of the stages that learn, and of the others one at a time."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from ..cut.partition import Partition
from .eight_bits import hold_once, modules_of_eight_bits
from .new_weights import give_memory, is_without_data, make_weights
from .ring import Link, Ring, Streams, streams_of
from .slabs import Slab
from .states import RestingStates


class StageOffload:
    """
    Keeps the layers' weights and all optimizer states at rest, but for those of the stages that learn.

    In the forward passes within [`streaming`], the other layers come to the device one at a time. What is around the
    layers (embeddings, last norm, classifier) stays there throughout; its optimizer states rest as the others do.

    Args:
        model (`nn.Module`): the model, which is moved out of device memory here. Of one on the meta device, new weights
            are made where they rest.
        partition (`Partition`): the cut.
        device (`torch.device`): where training takes place.
        folder (`str`): for the memory-mapped files, see [`Slab`].
        resident (`Collection[str]`): names of layers that stay on the device for good, with their optimizer states.

    Attributes:
        link ([`Link`]): by which layers come to the device and go back, and which counts their bytes.
    """

    slab: type[Slab] = Slab
    streams_of: Callable[[torch.device], Streams | None] = staticmethod(streams_of)

    def __init__(
        self, model: nn.Module, partition: Partition, device: torch.device, folder: str, resident: Collection[str] = ()
    ):
        self._model, self._partition, self._device, self._folder = model, partition, device, folder
        self._layers = [name for name in partition.layers if name not in resident]
        self.states: RestingStates | None = None
        self._active: frozenset[str] = frozenset()
        self._away_from_rest: set[str] = set()  # layers whose weights have been taken
        self.is_streaming = False
        self._parameters = {name: list(model.get_submodule(name).parameters()) for name in self._layers}
        self._eight_bits = {name: modules_of_eight_bits(model.get_submodule(name)) for name in self._layers}
        self._resident = {p for name in resident for p in model.get_submodule(name).parameters()}
        self._slabs = {name: self.slab(parameters, device, folder) for name, parameters in self._parameters.items()}
        self._streams = self.streams_of(device)
        self.link = self._make_link()
        if is_without_data(model):
            for name in self._layers:
                give_memory(self._parameters[name], self._slabs[name].tensors)
            make_weights(model, self.let_go)
        for name in self._layers:
            self._put(name)
        inside = {id(p) for parameters in self._parameters.values() for p in parameters}
        for tensor in [*(p for p in model.parameters() if id(p) not in inside), *model.buffers()]:
            # A copy on a CPU, too: one tensor that maps the checkpoint's file keeps all that was read of it in memory.
            tensor.data = tensor.data.to(device, copy=True)

    def _make_link(self) -> Link:
        sizes = [len(self._sent(name).memory) for name in self._layers]
        return Link(self._device) if self._streams is None else Ring(self._device, max(sizes, default=0), self._streams)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on keep the states of `optimizer` at rest, too; they are taken when it is about to use them."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        if self.states is None or self.states.optimizer is not optimizer:
            self.states = RestingStates(
                optimizer, self._parameters, self._resident, self._device, self._folder, self.slab
            )
            self._hook(optimizer, self.states)

    def _hook(self, optimizer: torch.optim.Optimizer, states: RestingStates) -> None:
        optimizer.register_step_pre_hook(lambda *_: states.take())

    def activate(self, stages: Collection[int]) -> None:
        """Bring the layers of `stages` to the device and put all others to rest."""
        wanted = frozenset(name for stage in stages for name in self._partition.stages[stage])
        if wanted == self._active:
            return
        self.rest()
        self._active = wanted
        for name in self._layers:
            if name in wanted:  # in memory of their own, for longer than a pass
                self._set(name, self._slabs[name].take(self._device))
                self.link.bytes_in += self._slabs[name].nbytes

    def rest(self) -> None:
        """Put everything to rest, also what an error has left on the device."""
        self.link.wait()
        self.link.begin()
        for name in self._layers:
            if name in self._active:
                self.link.bytes_out += self._slabs[name].nbytes
                self._put(name)
            else:
                self._keep(name)
                self._rest(name)
        self._active = frozenset()
        if self.states is not None:
            self.states.rest()

    def let_go(self) -> None:
        """Let what has been read of the layers at rest leave this process's memory."""
        for slab in self._slabs.values():
            slab.let_go()

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """Within this context, forward passes of the model find each layer's weights on the device."""
        with contextlib.ExitStack() as stack:
            for name in self._layers:
                layer = self._model.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(functools.partial(self._before_layer, name)).remove)
                stack.callback(layer.register_forward_hook(functools.partial(self._after_layer, name)).remove)
            stack.callback(setattr, self, "is_streaming", False)
            self.is_streaming = True
            yield

    def __reduce_ex__(self, _protocol):
        """
        Raises:
            `TypeError`: always; the hooks of a model that streams would come with a copy of it.
        """
        raise TypeError(
            f"{type(self._model).__name__} has layers that are offloaded, so that it cannot be copied or pickled as a "
            "whole in training. Copy its state_dict(), copy it before trainer.train() or in on_train_begin, or set "
            'offload="none".'
        )

    def _before_layer(self, name: str, *_given: Any) -> None:
        if name == self._layers[0]:
            for resting in self._layers:
                self._keep(resting)
            self.link.begin()
            self._refresh(name, 1)
        if name not in self._active:
            self._take(name, 1)

    def _after_layer(self, name: str, *_given: Any) -> None:
        if name not in self._active:
            self._rest(name)
            torch.clear_autocast_cache()  # it would keep a copy of the weights in low precision

    def _take(self, name: str, step: int) -> None:
        """Bring a layer's weights to the device; the next one to come is `step` layers further."""
        self._set(name, self.link.take(self._sent(name)))
        number = self._layers.index(name) + step
        if 0 <= number < len(self._layers):
            following = self._layers[number]
            if following not in self._active:
                self._refresh(following, step)
                self.link.expect(self._sent(following))

    def _sent(self, name: str) -> Slab:
        """What goes to the device of a layer."""
        return self._slabs[name]

    def _refresh(self, name: str, step: int) -> None:
        """Make it ready for a forward pass; it stays as it is for the backward pass."""

    def _keep(self, name: str) -> None:
        """
        Put to rest what others have put in the place of a layer's weights at rest: `parameter.data = ...`.

        In a new place, for who did so may hold the tensors at rest, to put them back.
        """
        found, slab = [p.data for p in self._parameters[name]], self._slabs[name]
        if name in self._away_from_rest or slab.holds(found):
            return
        for tensor, resting in zip(found, slab.tensors, strict=True):
            if tensor.dtype != resting.dtype:
                raise ValueError(
                    f"Weights of {name} were {resting.dtype} when {type(self._model).__name__} was given to the "
                    f'trainer, but are {tensor.dtype} now. Convert it before, or set offload="none".'
                )
        self._slabs[name] = self.slab(found, self._device, self._folder)
        self._put(name)

    def _rest(self, name: str) -> None:
        """Leave a layer's weights where they rest, as they were before they were taken."""
        self._set(name, self._slabs[name].tensors)
        self.link.release(self._sent(name))

    def _put(self, name: str) -> None:
        """Put a layer's weights to rest, as they are now."""
        self._slabs[name].put([p.data for p in self._parameters[name]])
        self._rest(name)

    def _set(self, name: str, tensors: list[torch.Tensor]) -> None:
        if tensors is self._slabs[name].tensors:
            self._away_from_rest.discard(name)
        else:
            self._away_from_rest.add(name)
        for parameter, tensor in zip(self._parameters[name], tensors, strict=True):
            parameter.data = tensor
        for module in self._eight_bits[name]:
            hold_once(module)
