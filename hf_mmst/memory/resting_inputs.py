"""Inputs of layers at rest in host memory, from the forward pass until the backward pass recomputes the layer."""

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from .ring import BUFFERS, Link, Streams
from .slabs import Slab


class RestingInputs:
    """
    Puts what autograd keeps of a layer's inputs to rest in a [`Slab`], and brings it back.

    Copies run beside the computation: out while the layers after it run forward; in, while those after it run backward,
    for when the input of one layer is taken, that of the layer before it is sent for. On a CPU it is read in the mapped
    file. Inputs without a gradient, such as masks, which layers share, stay where they are.

    Args:
        device (`torch.device`), folder (`str`), slab (`type`): see [`Slab`].
        link ([`Link`]): what counts the bytes.
        streams ([`Streams`], *optional*): of the device, if it has any.
    """

    def __init__(self, device: torch.device, folder: str, slab: type[Slab], link: Link, streams: Streams | None):
        self._device, self._folder, self._slab = device, folder, slab
        self._link, self._streams = link, streams
        self._free: list[Slab] = []  # to be used again
        self._inputs: list[weakref.ref[_Input]] = []  # in the order of the forward pass
        self._leaving: list[tuple[Any, torch.Tensor]] = []

    def saving(self) -> AbstractContextManager:
        """Within this context, what autograd saves rests."""
        return saved_tensors_hooks(self._put, self._take)

    def _put(self, tensor: torch.Tensor) -> Any:
        if not tensor.requires_grad:
            return tensor
        tensor = tensor.detach()
        one = _Input(self._room_for(tensor), self._free, self._streams)
        if self._streams is None:
            one.slab.put([tensor])
        else:
            one.gone = self._streams.copy("out", [(one.slab.tensors[0], tensor)], self._streams.mark())
            self._leaving.append((one.gone, tensor))  # so that its memory is not used again before
            self._let_leave(BUFFERS)
        self._inputs = [*(other for other in self._inputs if other() is not None), weakref.ref(one)]
        self._link.bytes_out += one.slab.nbytes
        return one

    def _take(self, one: Any) -> torch.Tensor:
        if torch.is_tensor(one):
            return one
        if self._streams is None:
            self._link.bytes_in += one.slab.nbytes
            return one.slab.take(self._device)[0]
        self._let_leave(0)
        self._send_for(one)
        others = [other() for other in self._inputs]
        if one in others[1:]:
            self._send_for(others[others.index(one) - 1])
        return one.wait()

    def _send_for(self, one: "_Input | None") -> None:
        if one is not None and one.here is None and self._streams is not None:
            self._streams.wait(one.gone)
            resting = one.slab.tensors[0]
            one.here = torch.empty_like(resting, device=self._device)
            one.arrived = self._streams.copy("in", [(one.here, resting)], self._streams.mark())
            self._link.bytes_in += one.slab.nbytes

    def _let_leave(self, number: int) -> None:
        """Keep on the device no more than that number of inputs that are being copied to host memory."""
        while self._streams is not None and len(self._leaving) > number:
            self._streams.wait(self._leaving.pop(0)[0])

    def _room_for(self, tensor: torch.Tensor) -> Slab:
        for slab in self._free:
            if _alike(slab.tensors[0], tensor):
                self._free.remove(slab)
                return slab
        self._free.clear()  # those of other sizes may not be needed again
        return self._slab([tensor], self._device, self._folder)

    def forget(self) -> None:
        """Wait for all copies, and keep no memory."""
        for event, _ in self._leaving:
            event.synchronize()
        self._leaving.clear()
        self._free.clear()


class _Input:
    """An input at rest, whose memory is used again when autograd needs it no longer."""

    def __init__(self, slab: Slab, free: list[Slab], streams: Streams | None):
        self.slab, self._free, self._streams = slab, free, streams
        self.gone: Any = None
        self.here: torch.Tensor | None = None
        self.arrived: Any = None

    def wait(self) -> Any:
        """The copy on the device, for which the computation waits."""
        if self._streams is not None and self.here is not None:
            self._streams.wait(self.arrived)
        return self.here

    def __del__(self):
        self.wait()  # a pass may have been broken off
        self.slab.let_go()
        self._free.append(self.slab)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
