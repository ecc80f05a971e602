"""Tensors -> room for them in one piece of host memory, where they rest."""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence

import torch

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
        tensors (`list[torch.Tensor]`): those at rest, on the CPU. They can be read and written like any other.

    Raises:
        `OSError`: if the disk has no room for them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device, folder: str):
        size = sum(_aligned(tensor.nbytes) for tensor in tensors)
        self._map = _unnamed_file(size, folder) if device.type != "cuda" else None
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy() if self._map is None else self._map
        self.tensors, offset = [], 0
        for tensor in tensors:  # each with a storage of its own, as files of weights and states are made of storages
            self.tensors.append(_view(memory, offset, tensor))
            offset += _aligned(tensor.nbytes)

    def take(self, device: torch.device) -> list[torch.Tensor]:
        """The tensors on `device`: copies, unless it is where they rest."""
        return [tensor.to(device, non_blocking=True) for tensor in self.tensors]

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite what is at rest; what rests there already is left alone."""
        for resting, tensor in zip(self.tensors, tensors, strict=True):
            if resting.data_ptr() != tensor.data_ptr():
                resting.copy_(tensor)
                self.let_go()  # one at a time, else all would be in memory twice

    def let_go(self) -> None:
        """Let the file's pages leave this process's memory; what they hold stays."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def _view(memory, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor that lies in `memory` as `like` lies in its own."""
    if like.numel() == 0:
        return torch.empty_like(like, device="cpu")
    strides = torch.empty_like(like, device="meta").stride()
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset).as_strided(like.shape, strides)


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
            'folder on a disk with room for the weights and optimizer states, or stage_residency="all".',
        ) from error


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
