"""`Operations` and `Peak`: what a simulated step computes, operator by operator, and the memory that it takes."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._tools.mem_tracker import _MemRefType, _UpdateType
from torch.utils.flop_counter import flop_registry

from ..memory.heap import WHOLE_PAGES
from ..memory.tensor_peaks import FlatMemTracker

Values = TypeVar("Values")

aten = torch.ops.aten
_WITHOUT_COST = {aten.empty.memory_format, aten.detach.default}
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,  # which lacks the attention of a CPU
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Operations:
    """
    Counts of a step's forward and backward pass; what a backward pass recomputes is in the latter.

    Attributes:
        flops (`dict[str, int]`): floating-point operations of matrix products, attention and convolutions, of the
            `"forward"` and the `"backward"` pass.
        nbytes (`dict[str, int]`): bytes that all operators read and write, one after the other.
        made (`dict[str, int]`): bytes of the new tensors among them that have [`WHOLE_PAGES`] or more.
    """

    def __init__(self):
        self.flops = {"forward": 0, "backward": 0}
        self.nbytes = {"forward": 0, "backward": 0}
        self.made = {"forward": 0, "backward": 0}

    def count(self, func: Any, args: tuple, kwargs: dict, found: Any) -> None:
        """Count one call of an operator; clipping and the optimizer's step are neither forward nor backward."""
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and not torch.is_grad_enabled():
            return
        costs, makes, flops = _kind(func)
        if costs:
            phase = "backward" if in_backward else "forward"
            self.nbytes[phase] += _nbytes(args) + _nbytes((found,))
            if makes:
                self.made[phase] += _nbytes((found,), WHOLE_PAGES)
            if flops is not None:
                self.flops[phase] += flops(*args, **kwargs, out_val=found)


@functools.cache
def _kind(func: Any) -> tuple[bool, bool, Callable[..., int] | None]:
    """Whether an operator reads or writes anything, makes what it returns, and what counts its operations."""
    costs = not (func.is_view or func in _WITHOUT_COST)
    return costs, not func._schema.is_mutable, _FLOPS.get(func._overloadpacket)


def _nbytes(values: Iterable[Any], least: int = 0) -> int:
    """Of all tensors with at least so many."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += value.nbytes if value.nbytes >= least else 0
        elif isinstance(value, list | tuple):
            total += _nbytes(value, least)
    return total


def _storages(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@dataclass(frozen=True)
class Peak:
    """
    The peak of device memory in a step, in bytes: weights and optimizer states in it, and all tensors together.

    Attributes:
        operations ([`Operations`]): what the step computes.
    """

    weights: int
    states: int
    total: int
    operations: Operations = field(default_factory=Operations, compare=False)


class CountingTracker(FlatMemTracker):
    """
    A tracker of fake tensors that also counts what is computed.

    Attributes:
        operations ([`Operations`]): what has been computed while it was active.
    """

    def __init__(self):
        super().__init__()
        self.operations = Operations()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most calls are this one, which makes no tensor
        found = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.count(func, args, kwargs or {}, found)
        self.note(func)
        return found

    def leave_out(self, *tensors: torch.Tensor) -> None:
        """These are in other memory."""
        for tensor in tensors:
            for found in self._update_and_maybe_create_winfos(tensor, _MemRefType.OTH):
                self._update_snap(_UpdateType.DEL, found)
                found.mem_consumed = 0

    def note(self, func: Any) -> None:
        """An operator has run. See `Recorder`, as for what follows."""

    def mark(self, unit: int | None) -> None:
        """What runs from now on is of a unit."""

    def marking(self, by_unit: Iterable[Values]) -> Iterable[Values]:
        """The same, of which each is marked as it is asked for."""
        return by_unit

    def tails(self, one: Iterable[torch.Tensor]) -> Iterable[None]:
        """The end of a step, which is to be run as often as there are items."""
        return [None]

    def track_units(self, units: Iterable[Iterable[torch.Tensor]], optimizer: torch.optim.Optimizer) -> None:
        """Tensors of each unit, which are there when a step begins, as are their states."""

    def count_held(self, weights: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Bytes of weights, and of the optimizer's states."""
        states = [value for state in optimizer.state.values() for value in state.values()]
        return _storages(weights), _storages(states)
