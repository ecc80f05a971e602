"""A block of code -> the most memory that it held at once."""

import contextlib
import re
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """
    Measures the peak memory of a `with` block.

    ```python
    with PeakMemory(trainer.args.device) as peak:
        trainer.train()
    print(peak.peak_bytes)
    ```

    Args:
        device (`torch.device` or `str`): where the work runs.

    Attributes:
        peak_bytes (`int`): CUDA: most bytes allocated by tensors; CPU: most resident bytes of this process, above what
            it held on entry (Linux; 0 elsewhere).
        reserved_bytes (`int`, *optional*): CUDA: most bytes that the caching allocator held; `None` on the CPU.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.peak_bytes = 0
        self.reserved_bytes: int | None = None
        self._baseline = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _STATUS.exists():
            with contextlib.suppress(OSError):  # set the process's recorded peak back to what it holds now
                Path("/proc/self/clear_refs").write_text("5")
            self._baseline = _resident_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            self.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
        elif _STATUS.exists():
            self.peak_bytes = max(0, _resident_bytes("VmHWM") - self._baseline)


_STATUS = Path("/proc/self/status")


def _resident_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
