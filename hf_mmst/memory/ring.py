"""Transfers between host memory, where layers rest, and a device: streams beside the computation, a ring of buffers."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .slabs import Slab, has_streams

BUFFERS = 2  # the layer that computes, and the next one


class Link:
    """
    Transfers between host memory and a device, one after the other, in the order of the computation.

    On a CPU nothing is copied: what is taken is used where it rests, and its pages are let go when it is released.

    Args:
        device (`torch.device`): where layers compute.

    Attributes:
        bytes_in (`int`), bytes_out (`int`): bytes to the device and from it since [`count`]; on a CPU, bytes of pages
            that were mapped in, and of gradients that were written to rest.
        copies (`bool`): whether what is taken is a copy.
    """

    copies = False

    def __init__(self, device: torch.device):
        self.device = device
        self.count()

    def count(self) -> None:
        """Set the counters back to 0."""
        self.bytes_in = self.bytes_out = 0

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Memory that is allocated on the device all along."""
        return []

    @property
    def moved(self) -> dict[str, int]:
        """The counters, by the names under which they are logged."""
        return {"moved_in_bytes": self.bytes_in, "moved_out_bytes": self.bytes_out}

    def begin(self) -> None:
        """Begin a forward pass: copies of weights that were made before are out of date."""

    def expect(self, slab: Slab) -> None:
        """Prefetch a slab, which is taken next."""

    def take(self, slab: Slab) -> list[torch.Tensor]:
        """The tensors of a slab on the device."""
        self.bytes_in += slab.nbytes
        return slab.take(self.device)

    def release(self, slab: Slab) -> None:
        """End the use of a slab that was taken, by what is computed from now on."""
        slab.let_go()

    def put(self, slab: Slab, tensors: Sequence[torch.Tensor]) -> None:
        """Copy tensors to a slab; they are there after [`wait`]."""
        slab.put(tensors)
        slab.let_go()

    def wait(self) -> None:
        """Wait until all tensors that were put are in host memory."""


class Streams:
    """
    Two streams of a device for copies, one in each direction, beside the current stream, on which it computes.

    Args:
        device (`torch.device`): the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._ways = {"in": torch.Stream(device), "out": torch.Stream(device)}

    def copy(self, way: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Any:
        """Copy the second tensor of each pair to the first, "in" or "out", after an event; returns that of its end."""
        stream = self._ways[way]
        stream.wait_event(after)
        with stream:
            for to, tensor in pairs:
                to.copy_(tensor, non_blocking=True)
        return stream.record_event()

    def mark(self) -> Any:
        """Record an event in the computation."""
        return torch.accelerator.current_stream(self._device).record_event()

    def wait(self, event: Any) -> None:
        """Have the computation wait for an event."""
        torch.accelerator.current_stream(self._device).wait_event(event)


class Ring(Link):
    """
    Transfers that run beside the computation, to buffers that are allocated once.

    A slab is copied as a whole, to the buffer that was filled first of those that are not in use. The copy waits until
    what was computed with the buffer has ended, and the computation that takes it waits for the copy. Tensors that are
    put are referred to until the computation has waited for their copy, so that their memory is not used again before.
    A slab that is in a buffer since [`begin`] is not copied again.

    Args:
        device (`torch.device`): where layers compute.
        size (`int`): bytes of the largest slab.
        streams ([`Streams`]): of the device.
    """

    copies = True

    def __init__(self, device: torch.device, size: int, streams: Streams):
        super().__init__(device)
        self._streams = streams
        self._buffers = [_Buffer(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(BUFFERS)]
        self._leaving: list[tuple[Any, Sequence[torch.Tensor]]] = []
        for buffer in self._buffers:
            buffer.released = streams.mark()

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [buffer.memory for buffer in self._buffers]

    def begin(self) -> None:
        for buffer in self._buffers:
            if buffer.slab is not None:
                self.release(buffer.slab)  # a pass may have been broken off
            buffer.slab = None

    def expect(self, slab: Slab) -> None:
        self._buffer_of(slab)

    def take(self, slab: Slab) -> list[torch.Tensor]:
        buffer = self._buffer_of(slab)
        self._streams.wait(buffer.arrived)
        buffer.is_used = True
        return slab.views(buffer.memory)

    def release(self, slab: Slab) -> None:
        for buffer in self._buffers:
            if buffer.slab is slab and buffer.is_used:
                buffer.is_used, buffer.released = False, self._streams.mark()

    def put(self, slab: Slab, tensors: Sequence[torch.Tensor]) -> None:
        event = self._streams.copy("out", zip(slab.tensors, tensors, strict=True), self._streams.mark())
        self._leaving.append((event, tensors))
        if len(self._leaving) > BUFFERS:
            event, _ = self._leaving.pop(0)
            self._streams.wait(event)

    def wait(self) -> None:
        for event, _ in self._leaving:
            event.synchronize()
        self._leaving.clear()

    def _buffer_of(self, slab: Slab) -> "_Buffer":
        """The buffer that holds a slab, or that it is now copied to."""
        for buffer in self._buffers:
            if buffer.slab is slab:
                return buffer
        buffer = next(buffer for buffer in self._buffers if not buffer.is_used)
        self._buffers.remove(buffer)
        self._buffers.append(buffer)
        to = buffer.memory[: len(slab.memory)]
        buffer.slab, buffer.arrived = slab, self._streams.copy("in", [(to, slab.memory)], buffer.released)
        self.bytes_in += slab.nbytes
        return buffer


def streams_of(device: torch.device) -> Streams | None:
    """The [`Streams`] of a device; `None` if it has none."""
    return Streams(device) if has_streams(device) else None


class _Buffer:
    """A buffer on the device: the slab in it, the event of its arrival, and that of the end of its last use."""

    def __init__(self, memory: torch.Tensor):
        self.memory = memory
        self.slab: Slab | None = None
        self.is_used = False
        self.arrived: Any = None
        self.released: Any = None
