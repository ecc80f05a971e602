"""Which layers are in device memory: those of the stages that learn, and of the others one at a time."""

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..cut.partition import Partition

ALIGNMENT = 64
StateKeys = tuple[tuple[torch.Tensor, str], ...]  # parameters and names of their states, at rest together


class Shelf:
    """
    Tensors at rest: beside a GPU in pinned host memory, otherwise in a memory-mapped file that has no name.

    Args:
        tensors (`Sequence[torch.Tensor]`): what is put on the shelf; the tensors themselves are left alone.
        device (`torch.device`): where they are used.
        folder (`str`): where the file lies, if there is one. It vanishes with the process, however that ends.

    Attributes:
        tensors (`list[torch.Tensor]`): the copies at rest, on the CPU. They can be read and written like any other.

    Raises:
        `OSError`: if the disk has no room for them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device, folder: str):
        self.device, self._map = device, None
        if device.type == "cuda":
            self.tensors = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        else:
            self._map = _unnamed_file(sum(_aligned(tensor.nbytes) for tensor in tensors), folder)
            self.tensors, offset = [], 0
            for tensor in tensors:
                flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
                self.tensors.append(flat.view(tensor.shape))
                offset += _aligned(tensor.nbytes)
        self.put(tensors)

    def take(self) -> list[torch.Tensor]:
        """Copies of the tensors in device memory."""
        taken = []
        for tensor in self.tensors:
            taken.append(tensor.to(self.device, copy=True, non_blocking=True))
            self.let_go()  # one at a time, else all would be in memory twice
        return taken

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite what is on the shelf."""
        for resting, tensor in zip(self.tensors, tensors, strict=True):
            resting.copy_(tensor)
            self.let_go()

    def let_go(self) -> None:
        """Let the file's pages leave this process's memory; what they hold stays."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


class Residency:
    """
    Keeps the layers' weights and all optimizer states at rest, but for those of the stages that learn.

    In the forward passes within [`streaming`], the other layers come to the device one at a time. What is around the
    layers (embeddings, last norm, classifier) stays there throughout; its optimizer states rest as the others do.

    Args:
        model (`nn.Module`): the model, which is moved out of device memory here.
        partition (`Partition`): the cut.
        device (`torch.device`): where training takes place.
        folder (`str`): for the memory-mapped files, see [`Shelf`].
    """

    shelf: type[Shelf] = Shelf

    def __init__(self, model: nn.Module, partition: Partition, device: torch.device, folder: str):
        self._model, self._partition, self._device, self._folder = model, partition, device, folder
        self._optimizer: torch.optim.Optimizer | None = None
        self._states: dict[StateKeys, Shelf] = {}
        self._taken: set[StateKeys] = set()
        self._active: frozenset[str] = frozenset()
        self.is_streaming = False
        self._parameters = {name: list(model.get_submodule(name).parameters()) for name in partition.layers}
        self._shelves: dict[str, Shelf] = {}
        for name, parameters in self._parameters.items():
            self._shelves[name] = self.shelf([p.data for p in parameters], device, folder)
            self._rest(name)
        inside = {id(p) for parameters in self._parameters.values() for p in parameters}
        for tensor in [*(p for p in model.parameters() if id(p) not in inside), *model.buffers()]:
            # A copy on a CPU, too: one tensor that maps the checkpoint's file keeps all that was read of it in memory.
            tensor.data = tensor.data.to(device, copy=True)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on keep the states of `optimizer` at rest, too; they are taken when it is about to use them."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        if optimizer is not self._optimizer:
            self._optimizer, self._states, self._taken = optimizer, {}, set()
            optimizer.register_step_pre_hook(lambda *_: self.take_states())

    def activate(self, stages: Collection[int]) -> None:
        """Bring the layers of `stages` to the device and put all others to rest."""
        wanted = frozenset(name for stage in stages for name in self._partition.stages[stage])
        if wanted == self._active:
            return
        self.rest()
        self._active = wanted
        for name in self._partition.layers:
            if name in wanted:
                self._take(name)

    def rest(self) -> None:
        """Put everything to rest, also what an error has left on the device."""
        for name in self._active:
            self._shelves[name].put([p.data for p in self._parameters[name]])
        for name in self._partition.layers:
            self._rest(name)
        self._active = frozenset()
        self._rest_states()

    def let_go(self) -> None:
        """Let what has been read of the layers at rest leave this process's memory."""
        for shelf in self._shelves.values():
            shelf.let_go()

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """Within this context, forward passes of the model find each layer's weights on the device."""
        with contextlib.ExitStack() as stack:
            for name in self._partition.layers:
                layer = self._model.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(self._before_layer(name)).remove)
                stack.callback(layer.register_forward_hook(self._after_layer(name)).remove)
            stack.callback(setattr, self, "is_streaming", False)
            self.is_streaming = True
            yield

    def _before_layer(self, name: str):
        def hook(_module, _args):
            if name not in self._active:
                self._take(name)

        return hook

    def _after_layer(self, name: str):
        def hook(_module, _args, _output):
            if name not in self._active:
                self._rest(name)
                torch.clear_autocast_cache()  # it would keep a copy of the weights in low precision

        return hook

    def _take(self, name: str) -> None:
        for parameter, tensor in zip(self._parameters[name], self._shelves[name].take(), strict=True):
            parameter.data = tensor

    def _rest(self, name: str) -> None:
        for parameter, tensor in zip(self._parameters[name], self._shelves[name].tensors, strict=True):
            parameter.data = tensor

    def take_states(self) -> None:
        """Bring the states of parameters that have gradients to the device."""
        assert self._optimizer is not None
        for keys, shelf in self._states.items():
            if keys not in self._taken and any(parameter.grad is not None for parameter, _ in keys):
                self._taken.add(keys)
                for (parameter, name), tensor in zip(keys, shelf.take(), strict=True):
                    self._optimizer.state[parameter][name] = tensor

    def _rest_states(self) -> None:
        """Put the states that are on the device on the shelf that they came from, or, new ones, on a new one."""
        if self._optimizer is None:
            return
        state = self._optimizer.state
        self._forget_replaced()
        known = {key for keys in self._states for key in keys}
        owner = {id(p): name for name, parameters in self._parameters.items() for p in parameters}
        new: dict[Any, list[tuple[torch.Tensor, str]]] = {}  # by layer, or else by parameter: what is taken together
        for parameter, values in state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.numel() > 1 and (parameter, name) not in known:
                    new.setdefault(owner.get(id(parameter), id(parameter)), []).append((parameter, name))
        for keys in self._taken:
            self._states[keys].put([state[parameter][name] for parameter, name in keys])
        fresh = [tuple(keys) for keys in new.values()]
        for keys in fresh:
            tensors = [state[parameter][name] for parameter, name in keys]
            self._states[keys] = self.shelf(tensors, self._device, self._folder)
        for keys in [*self._taken, *fresh]:
            for (parameter, name), tensor in zip(keys, self._states[keys].tensors, strict=True):
                state[parameter][name] = tensor
        self._taken.clear()

    def _forget_replaced(self) -> None:
        """Forget the states at rest in whose place others have come, as with a checkpoint that was loaded."""
        assert self._optimizer is not None
        state = self._optimizer.state
        for keys in self._states.keys() - self._taken:
            resting = zip(keys, self._states[keys].tensors, strict=True)
            if any(state.get(parameter, {}).get(name) is not tensor for (parameter, name), tensor in resting):
                del self._states[keys]


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
