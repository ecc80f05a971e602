"""Stage parallelism: activations are sent from process to process while both compute."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

DEPTH = 2  # tensors on their way out of a process, and as many into it
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_DIMS = 6
END = -1


class Relay:
    """
    Point-to-point communication: sends tensors from each process of the process group to the next one, in order.

    The sender goes on computing while a tensor is on its way, and a thread of the receiver fetches the next one while
    it computes. [`DEPTH`] tensors are on their way at most: a process that is faster than the next one waits for it.
    Shapes and all else travel through the CPU (gloo), the tensors by the default group's backend (NCCL on GPUs).

    Args:
        device (`torch.device`): where the tensors are used.
        timeout (`timedelta`): how long to wait for another process.

    Attributes:
        rank (`int`): of this process, from 0.
        num_ranks (`int`): number of processes P.
    """

    def __init__(self, device: torch.device, timeout: timedelta):
        self.rank, self.num_ranks, self.device = dist.get_rank(), dist.get_world_size(), device
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        self._headers = dist.new_group(backend="gloo", timeout=timeout)
        self._tensors = None if device.type == "cuda" else self._headers
        self._on_the_way: deque[tuple[dist.Work | None, torch.Tensor]] = deque()  # a header and a tensor by turns
        self._arrived: queue.Queue[Any] = queue.Queue(DEPTH - 1)  # one more is in the hands of the thread
        self._flows = False

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        """Within this context tensors can be passed on; to be entered by all processes. It may be nested."""
        if self._flows:
            yield
            return
        self._flows = True
        thread = threading.Thread(target=self._fetch, daemon=True)
        if self.rank > 0:
            thread.start()
        try:
            yield
            if self.rank < self.num_ranks - 1:
                self._send([END], torch.empty(0))
            while self._on_the_way:
                self._finish_sending()
            if self.rank > 0 and self._next() is not None:
                raise RuntimeError(f"Rank {self.rank} was handed more than it has taken.")
        finally:
            self._flows = False

    def hand_on(self, tensor: torch.Tensor, stamp: int) -> None:
        """Send `tensor` to the next process; `stamp` identifies the batch that it was computed from."""
        while len(self._on_the_way) >= 2 * DEPTH:
            self._finish_sending()
        self._send([tensor.dim(), DTYPES.index(tensor.dtype), stamp, *tensor.shape], tensor.contiguous())

    def take(self, stamp: int) -> torch.Tensor:
        """
        Receive the next tensor from the process before.

        Raises:
            `RuntimeError`: if its stamp is another one, or nothing comes.
        """
        tensor, theirs, there = self._next()
        if theirs != stamp:
            raise RuntimeError(
                f"Rank {self.rank} has read other labels or masks than rank {self.rank - 1}. All processes have to "
                "read the same samples in the same order: let the dataset and the collator do so, with "
                "dataloader_num_workers=0 if they draw random numbers."
            )
        if there is not None:
            torch.cuda.current_stream().wait_event(there)
            tensor.record_stream(torch.cuda.current_stream())
        return tensor

    def _send(self, numbers: list[int], tensor: torch.Tensor) -> None:
        header = torch.tensor(numbers + [0] * (MAX_DIMS + 3 - len(numbers)))
        with self._naming(self.rank + 1):
            for part, group in ((header, self._headers), (tensor, self._tensors)):
                work = dist.isend(part, self.rank + 1, group=group) if part.numel() else None
                self._on_the_way.append((work, part))

    def _finish_sending(self) -> None:
        work, _ = self._on_the_way.popleft()
        with self._naming(self.rank + 1):
            if work is not None:
                work.wait()

    def _next(self) -> Any:
        found = self._arrived.get()
        if isinstance(found, Exception):
            with self._naming(self.rank - 1):
                raise found
        return found

    def _fetch(self) -> None:
        try:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            while True:
                header = torch.empty(MAX_DIMS + 3, dtype=torch.long)
                dist.recv(header, self.rank - 1, group=self._headers)
                dims, dtype, stamp, *shape = header.tolist()
                if dims == END:
                    self._arrived.put(None)
                    return
                with torch.cuda.stream(stream):  # without a GPU this does nothing
                    tensor = torch.empty(shape[:dims], dtype=DTYPES[dtype], device=self.device)
                    if tensor.numel():
                        dist.recv(tensor, self.rank - 1, group=self._tensors)
                    there = None if stream is None else stream.record_event()
                self._arrived.put((tensor, stamp, there))
        except Exception as error:  # for the process's own thread to raise
            self._arrived.put(error)

    # ---- What all processes take part in ----

    def gather(self, value: Any) -> list[Any]:
        """All-gather: the `value` of every process, by rank."""
        found: list[Any] = [None] * self.num_ranks
        with self._naming():
            dist.all_gather_object(found, value, group=self._control)
        return found

    def from_last(self, value: Any) -> Any:
        """Broadcast: the `value` of the last process."""
        found = [value]
        with self._naming():
            dist.broadcast_object_list(found, self.num_ranks - 1, group=self._control)
        return found[0]

    def collect(self, own: Mapping[Any, Any]) -> dict[Any, Any]:
        """
        Gather by name what all processes have to the first of them, tensors on the CPU; the others return `own`.

        One tensor at a time is on its way.
        """
        found = {name: value.detach().cpu() if torch.is_tensor(value) else value for name, value in own.items()}
        with self._naming():
            if self.rank > 0:
                dist.send_object_list([{n: _described(v) for n, v in found.items()}], 0, group=self._control)
                for value in found.values():
                    if torch.is_tensor(value) and value.numel():
                        dist.send(value.contiguous(), 0, group=self._control)
                return found
            for rank in range(1, self.num_ranks):
                descriptions: list[Any] = [None]
                dist.recv_object_list(descriptions, rank, group=self._control)
                for name, value in descriptions[0].items():
                    if torch.is_tensor(value):
                        value = torch.empty_like(value, device="cpu")
                        if value.numel():
                            dist.recv(value, rank, group=self._control)
                    found[name] = value
        return found

    @contextlib.contextmanager
    def _naming(self, other: int | None = None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            them = "another rank" if other is None else f"rank {other}"
            raise RuntimeError(
                f"Rank {self.rank} of {self.num_ranks} lost {them}, which has ended, or has not come so far within "
                "ddp_timeout. Look for the first error among those of all ranks."
            ) from error


def _described(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if torch.is_tensor(value) else value
