"""Slabs: pieces of host memory in which tensors rest, pinned or mapped from a file."""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence

import torch
from transformers.utils import logging

from .heap import give_back_freed

logger = logging.get_logger(__name__)

ALIGNMENT = 64
HOST = torch.device("cpu")


class Slab:
    """
    Host memory in which tensors rest, in one piece: pinned beside a GPU, otherwise a mapped file without a name.

    What is used where it rests is not copied: on a CPU, [`take`] gives the tensors at rest themselves.

    Args:
        tensors (`Sequence[torch.Tensor]`): what there is to be room for; [`put`] puts them in.
        device (`torch.device`): where they are used.
        folder (`str`): where the file lies, if there is one. It vanishes with the process, however that ends.

    Attributes:
        memory (`torch.Tensor`): all of it, `uint8`.
        tensors (`list[torch.Tensor]`): those at rest, on the CPU. They can be read and written like any other.

    Raises:
        `OSError`: if the disk has no room for them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device, folder: str):
        size = self._lay_out(tensors)
        self._map = None
        if not has_streams(device):
            self._map = _unnamed_file(size, folder)
            give_back_freed()
        self.memory = _pinned(size) if self._map is None else torch.frombuffer(self._map, dtype=torch.uint8)
        self.tensors = [_at(self.memory, offset, like) for offset, like in self._layout]

    def _lay_out(self, tensors: Sequence[torch.Tensor]) -> int:
        """Note where each tensor begins, and how it lies; returns the bytes of all of them."""
        self._layout: list[tuple[int, torch.Tensor]] = []
        size = 0
        for tensor in tensors:
            self._layout.append((size, torch.empty_like(tensor, device="meta")))
            size += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        return size

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in memory on any device to which all of this one was copied."""
        return [
            memory[offset : offset + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())
            for offset, like in self._layout
        ]

    def take(self, device: torch.device) -> list[torch.Tensor]:
        """The tensors on `device`: copies, unless it is where they rest."""
        return [tensor.to(device, non_blocking=True) for tensor in self.tensors]

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite what is at rest; what rests there already is left alone."""
        for resting, tensor in zip(self.tensors, tensors, strict=True):
            if resting.data_ptr() != tensor.data_ptr():
                resting.copy_(tensor)
                self.let_go()  # one at a time, else all would be in memory twice

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors at rest."""
        pairs = zip(self.tensors, tensors, strict=True)
        return all(resting.data_ptr() == tensor.data_ptr() for resting, tensor in pairs)

    def let_go(self) -> None:
        """Let the file's pages leave this process's memory; what they hold stays."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def has_streams(device: torch.device) -> bool:
    """Whether a device has memory of its own, and copies to it run beside what it computes."""
    return device.type in ("cuda", "xpu")


def _at(memory: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor in `memory` with a storage of its own: files of weights and states are made of storages."""
    if like.numel() == 0:
        return torch.empty_like(like, device=HOST)
    flat = torch.frombuffer(memory.numpy(), dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.as_strided(like.shape, like.stride())


def _pinned(size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        logger.warning_once(
            "hf_mmst: the system does not let more host memory be pinned, so that some layers rest in memory from "
            "which copies are slower, and do not run beside the computation. Raise its limit (ulimit -l; for WSL, "
            "memory in .wslconfig)."
        )
        return torch.empty(size, dtype=torch.uint8)


def _unnamed_file(size: int, folder: str) -> mmap.mmap:
    os.makedirs(folder, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            return mmap.mmap(file.fileno(), max(size, 1))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{size:,} bytes for layers at rest cannot be had in {folder} ({error.strerror}). Set output_dir to a "
            'folder on a disk with room for the weights and optimizer states, or offload="none".',
        ) from error
