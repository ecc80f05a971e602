"""Slabs in host memory -> buffers on a device, while it computes; and gradients back to rest."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .slabs import Slab, has_streams

BUFFERS = 2  # the layer that computes, and the next one


class Link:
    """
    How what rests comes to where layers compute, and goes back: as [`Slab`] has it, one after the other.

    Args:
        device (`torch.device`): where layers compute.

    Attributes:
        bytes_in (`int`): what has come from slabs since [`count`]. On a CPU it is used in place: mapped in.
        bytes_out (`int`): what has gone to slabs since then.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.count()

    def count(self) -> None:
        """Count from nothing."""
        self.bytes_in = self.bytes_out = 0

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What it takes on the device all along."""
        return []

    @property
    def moved(self) -> dict[str, int]:
        """What was counted, as it is logged."""
        return {"moved_in_bytes": self.bytes_in, "moved_out_bytes": self.bytes_out}

    def begin(self) -> None:
        """A forward pass begins: what rests may have changed since the last one."""

    def expect(self, slab: Slab) -> None:
        """What is about to be taken may come already."""

    def take(self, slab: Slab) -> list[torch.Tensor]:
        """The tensors of a slab on the device."""
        self.bytes_in += slab.nbytes
        return slab.take(self.device)

    def release(self, slab: Slab) -> None:
        """What was taken is used no more by what is computed from now on."""
        slab.let_go()

    def put(self, slab: Slab, tensors: Sequence[torch.Tensor]) -> None:
        """Put tensors to rest; they are there after [`wait`]."""
        slab.put(tensors)
        slab.let_go()

    def wait(self) -> None:
        """Wait until all that was put is at rest."""


class Streams:
    """
    The streams of a device: one to it, one from it, beside the one on which it computes.

    Args:
        device (`torch.device`): the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._ways = {"in": torch.Stream(device), "out": torch.Stream(device)}

    def copy(self, way: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Any:
        """Copy the second of each pair to the first, after an event; returns the event of its end."""
        stream = self._ways[way]
        stream.wait_event(after)
        with stream:
            for to, tensor in pairs:
                to.copy_(tensor, non_blocking=True)
        return stream.record_event()

    def mark(self) -> Any:
        """An event: all that was to be computed so far, is."""
        return torch.accelerator.current_stream(self._device).record_event()

    def wait(self, event: Any) -> None:
        """What is to be computed from now on, is after the event."""
        torch.accelerator.current_stream(self._device).wait_event(event)


class Ring(Link):
    """
    A [`Link`] whose copies run beside the computation, through buffers that are allocated once.

    A slab is copied as a whole to the buffer that was released first, after what was computed with it; what is computed
    next waits for its arrival. What is put to rest is referred to until the computation has waited for its copy, so
    that its memory is not used again before. A slab that a buffer still holds since [`begin`] is not copied again.

    Args:
        device (`torch.device`): where layers compute.
        size (`int`): bytes of the largest slab.
        streams ([`Streams`]): of the device.
    """

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
        """The buffer in which a slab is, or is about to be."""
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
    """Memory of a device, whose slab it holds, when that has arrived, and when what was computed with it has ended."""

    def __init__(self, memory: torch.Tensor):
        self.memory = memory
        self.slab: Slab | None = None
        self.is_used = False
        self.arrived: Any = None
        self.released: Any = None
