"""Peak memory of a block of code, and of each turn of training."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import psutil
import torch

from .tensor_peaks import TensorPeak

TRACKED_STEPS = 2  # from the second on, optimizer states and the batch that the data loader has ready are there


class PeakMemory:
    """
    Measures the peak memory of a `with` block. Blocks may be nested.

    ```python
    with PeakMemory(trainer.args.device) as peak:
        trainer.train()
    print(peak.peak_bytes)
    ```

    Args:
        device (`torch.device` or `str`): where the work runs.
        whole (`bool`): CPU only: whether to count what the process held before the block, too.

    Attributes:
        peak_bytes (`int`): CUDA: most bytes allocated by tensors; CPU: most resident bytes of this process, if
            not `whole` above what it held before. Within the block: so far, as of the last [`read`]. Where a process
            cannot reset its own peak (other systems than Linux, some containers), a peak below an earlier one is seen
            only if it lasts to a read.
        reserved_bytes (`int`, *optional*): CUDA: most bytes that the caching allocator held; `None` on the CPU.
    """

    _open: ClassVar[list["PeakMemory"]] = []

    def __init__(self, device: torch.device | str = "cpu", whole: bool = False):
        self.device = torch.device(device)
        self.peak_bytes = 0
        self.reserved_bytes: int | None = None
        self._whole, self._baseline, self._highest_before = whole, 0, 0

    def read(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
            self.reserved_bytes = max(self.reserved_bytes or 0, torch.cuda.max_memory_reserved(self.device))
        else:
            highest = _highest_bytes()
            found = highest if highest > self._highest_before else _resident_bytes()
            self.peak_bytes = max(self.peak_bytes, found - self._baseline)
        return self.peak_bytes

    def __enter__(self) -> "PeakMemory":
        for outer in self._open:
            outer.read()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # set the process's recorded peak back to what it holds now
                _CLEAR_REFS.write_text("5")
            self._highest_before = _highest_bytes()
            if not self._whole:
                self._baseline = _resident_bytes()
        self._open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.read()
        self._open.remove(self)


class TurnPeaks:
    """
    The peaks of turns of training that follow one another, by name.

    Args:
        device (`torch.device` or `str`): where the work runs. CUDA's own peak statistics begin anew with each turn.

    Attributes:
        by_name (`dict[str, int]`): bytes, by the turn's name and `"peak_bytes"`, the most that tensors took (CUDA; CPU:
            where they are tracked), `"reserved_bytes"`, that the allocator held (CUDA), or `"process_bytes"`, that this
            process held in all (CPU). The most, if a turn comes again.
        tracks_tensors (`bool`): CPU: whether tensors are tracked, in the first two steps of each turn, which are slower
            then. They are not where layers rest in files or are compiled, nor in one of several processes.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.by_name: dict[str, int] = {}
        self.tracks_tensors = False
        self._turn: tuple[str, PeakMemory] | None = None
        self._tracker: TensorPeak | None = None
        self._steps = 0  # of the turn
        self._unread: set[str] = set()

    def begin(self, turn: str, held: Callable[[], Iterable[torch.Tensor]] | None = None) -> None:
        """
        Begin a step of the turn whose names begin with `turn`; `held` gives the tensors that are there before it, if
        they can be tracked.
        """
        if self._turn is not None and self._turn[0] == turn:
            self._steps += 1
            if self._steps == TRACKED_STEPS:
                self._end_tracking()
            return
        self.end()
        self._turn, self._steps = (turn, PeakMemory(self.device, whole=True).__enter__()), 0
        tracks = self.tracks_tensors and self.device.type == "cpu" and f"{turn}peak_bytes" not in self.by_name
        if tracks and held is not None:
            self._tracker = TensorPeak(held())
            self._tracker.__enter__()

    def read(self) -> dict[str, int]:
        """The names and peaks of the turns that have ended since the last call, and of the turn so far."""
        self._note()
        found = {name: self.by_name[name] for name in sorted(self._unread)}
        self._unread.clear()
        return found

    def most(self, what: str) -> int | None:
        """The most over all turns of `"peak_bytes"`, `"process_bytes"` or `"reserved_bytes"`, if it was measured."""
        return max((value for name, value in self.by_name.items() if name.endswith(what)), default=None)

    def summary(self, planned_bytes: int | None) -> str:
        """Measured and planned bytes of tensors, and what the process held, in words."""
        peak, process = self.most("peak_bytes"), self.most("process_bytes")
        known = {"measured": peak, "planned": planned_bytes}
        tensors = ", ".join(f"{how} {value / 2**20:,.0f} MiB" for how, value in known.items() if value is not None)
        parts = [f"tensors {tensors}"] if tensors else []
        return "; ".join(parts + ([f"the whole process {process / 2**20:,.0f} MiB"] if process is not None else []))

    def _note(self) -> None:
        if self._turn is not None:
            turn, peak = self._turn
            on_gpu = self.device.type == "cuda"
            self._raise(f"{turn}{'peak' if on_gpu else 'process'}_bytes", peak.read())
            if peak.reserved_bytes is not None:
                self._raise(f"{turn}reserved_bytes", peak.reserved_bytes)

    def _raise(self, name: str, value: int) -> None:
        self.by_name[name] = max(self.by_name.get(name, 0), value)
        self._unread.add(name)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context no tensors are tracked, as in an evaluation."""
        with contextlib.ExitStack() as stack:
            if self._tracker is not None:
                stack.callback(self._tracker.__enter__)
                self._tracker.__exit__(None, None, None)
            yield

    def _end_tracking(self) -> None:
        if self._tracker is not None and self._turn is not None:
            self._tracker.__exit__(None, None, None)
            self._raise(f"{self._turn[0]}peak_bytes", self._tracker.peak_bytes)
            self._tracker = None

    def end(self) -> None:
        """End the turn, if one has begun."""
        if self._turn is not None:
            self._end_tracking()
            self._turn[1].__exit__(None, None, None)
            self._note()
            self._turn = None


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _resident_bytes() -> int:
    """What the process holds now."""
    return _status("VmRSS") or psutil.Process().memory_info().rss


def _highest_bytes() -> int:
    """The most that it has held since that was last reset; 0 if the system does not say."""
    return _status("VmHWM")


def _status(field: str) -> int:
    text = _STATUS.read_text() if _STATUS.exists() else ""
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
