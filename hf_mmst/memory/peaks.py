"""Peak memory of a block of code, and of each turn of training."""

import contextlib
import re
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import psutil
import torch


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
        above (`str`): CPU only: what the process's memory is compared to, on `"entry"` of the block or at the
            `"import"` of this package, which a script does before it makes a model.

    Attributes:
        peak_bytes (`int`): CUDA: most bytes allocated by tensors; CPU: most resident bytes of this process, above what
            it held before. Within the block: so far, as of the last [`read`]. Where a process cannot reset its own peak
            (other systems than Linux, some containers), a peak below an earlier one is seen only if it lasts to a read.
        reserved_bytes (`int`, *optional*): CUDA: most bytes that the caching allocator held; `None` on the CPU.
    """

    _open: ClassVar[list["PeakMemory"]] = []

    def __init__(self, device: torch.device | str = "cpu", above: str = "entry"):
        self.device = torch.device(device)
        self.peak_bytes = 0
        self.reserved_bytes: int | None = None
        self._baseline = _AT_IMPORT
        self._above, self._highest_before = above, 0

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
            if self._above == "entry":
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
        by_name (`dict[str, int]`): bytes, as in [`PeakMemory`], above the import; the most, if a name comes again.
        reserved_by_name (`dict[str, int]`): CUDA: what the allocator held, "reserved" in the place of "peak".
    """

    def __init__(self, device: torch.device | str):
        self.device = device
        self.by_name: dict[str, int] = {}
        self.reserved_by_name: dict[str, int] = {}
        self._turn: tuple[str, PeakMemory] | None = None
        self._unread: set[str] = set()

    def begin(self, name: str) -> None:
        """End the turn and begin that of `name`, unless that has begun already."""
        if self._turn is None or self._turn[0] != name:
            self.end()
            self._turn = name, PeakMemory(self.device, above="import").__enter__()

    def read(self) -> dict[str, int]:
        """The names and peaks of the turns that have ended since the last call, and of the turn so far."""
        self._note()
        everything = self.by_name | self.reserved_by_name
        found = {name: everything[name] for name in sorted(self._unread)}
        self._unread.clear()
        return found

    def _note(self) -> None:
        if self._turn is not None:
            name, peak = self._turn
            _raise_to(self.by_name, name, peak.read())
            self._unread.add(name)
            if peak.reserved_bytes is not None:
                reserved = name.replace("peak", "reserved")
                _raise_to(self.reserved_by_name, reserved, peak.reserved_bytes)
                self._unread.add(reserved)

    def end(self) -> None:
        """End the turn, if one has begun."""
        if self._turn is not None:
            self._turn[1].__exit__(None, None, None)
            self._note()
            self._turn = None


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _raise_to(most: dict[str, int], name: str, value: int) -> None:
    most[name] = max(most.get(name, 0), value)


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


_AT_IMPORT = _resident_bytes()
