"""Peak bytes of tensors by PyTorch's own tracker: on a CPU, whose allocator keeps no account, and of fake tensors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker


class FlatMemTracker(MemTracker):
    """PyTorch's tracker without its account by modules, which a backward pass within a forward pass would upset."""

    def __init__(self):
        super().__init__()
        self._mod_tracker: Any = _NoModules()


class _NoModules:
    parents: frozenset = frozenset()
    is_bw = False

    def register_user_hooks(self, *_args, **_kwargs): ...

    def clear_user_hooks(self): ...

    def get_known_fqn(self, _module): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


class TensorPeak(FlatMemTracker):
    """
    Measures the most bytes that tensors on the CPU take within `with` blocks, which it slows down.

    What was there before is not counted but for `held`: neither layers at rest in files nor a dataset in memory.

    Args:
        held (`Iterable[torch.Tensor]`): what is in memory before.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        self._most_before = 0  # in the blocks before this one
        self.track_external(*held)

    @property
    def peak_bytes(self) -> int:
        """The peak so far."""
        return max(self._most_before, self._peak_mem.get(torch.device("cpu"), 0))

    def __enter__(self) -> "TensorPeak":
        self._most_before = self.peak_bytes
        super().__enter__()
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shares = any(one.alias_info is not None for one in func._schema.returns)
        if shares and func is not torch.ops.aten.lift_fresh.default:  # what it returns takes no memory of its own
            return func(*args, **kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _track_optimizer_states(self, *_) -> None:
        """They are seen when they are made or taken; those at rest are not to be."""
