"""`Device`: the speeds that a step's time is predicted with, of a GPU by its name or measured on this machine."""

import functools
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..memory.slabs import Slab
from .ways import PRECISIONS

GIB = 2**30
CONTEXT = 1.0  # GiB that the driver's context and its libraries take of a GPU
SECONDS = 0.03  # that each speed is measured for


@dataclass(frozen=True)
class Device:
    """
    Speeds of a device and of its host.

    Attributes:
        name (`str`): as it is shown.
        flops (`dict[str, float]`): floating-point operations per second that large matrix products reach in training,
            by precision.
        memory_bandwidth (`float`): bytes per second of what operators read and write.
        link (`float`): bytes per second to and from pinned host memory, in each direction; on a CPU, to and from files.
        host_bandwidth (`float`): bytes per second of host memory, for steps that are taken there.
        between (`float`, *optional*): bytes per second from one device to the next of several processes, in each
            direction; it depends on the machine, so that it is unknown unless it is given.
        memory (`int`, *optional*): bytes for tensors; unknown for a CPU.
        is_host (`bool`): whether the device is the host's own CPU.
        link_out (`float`, *optional*): bytes per second in the other direction; as `link` if it is not given.
        new_memory (`float`, *optional*): bytes per second of memory that the system gives a CPU's process anew, page by
            page; no time is predicted for that if it is not given.
    """

    name: str
    flops: dict[str, float]
    memory_bandwidth: float
    link: float
    host_bandwidth: float
    memory: int | None = None
    is_host: bool = False
    between: float | None = None
    link_out: float | None = None
    new_memory: float | None = None


def _gpu(name: str, fp32: float, bf16: float, fp16: float, memory: float, bandwidth: float, link: float, host: float):
    """TFLOP/s, GiB as PyTorch reports them, and GB/s."""
    flops = {"fp32": fp32 * 1e12, "bf16": bf16 * 1e12, "fp16": fp16 * 1e12}
    return Device(name, flops, 0.8e9 * bandwidth, 1e9 * link, 1e9 * host, int((memory - CONTEXT) * GIB))


# TFLOP/s in training: 0.7 of the data sheet's in fp32 (without TF32) and for gaming cards, 0.4 to 0.5 in 16 bits for
# those of data centres. GPUs without bf16 compute it at the speed of fp32. Links are PCI Express's: version 4 with 16
# lanes is 25 GB/s. Host memory is that of machines in which these GPUs are common.
GPUS = {
    "b200": _gpu("B200", 52, 900, 900, 178, 8000, 50, 300),
    "h200": _gpu("H200", 47, 400, 400, 139, 4800, 50, 200),
    "h100": _gpu("H100 80 GB", 47, 400, 400, 79.1, 3350, 50, 200),
    "a100": _gpu("A100 80 GB", 14, 150, 150, 79.1, 2039, 25, 150),
    "a100-40gb": _gpu("A100 40 GB", 14, 150, 150, 39.4, 1555, 25, 150),
    "l40s": _gpu("L40S", 60, 150, 150, 44.4, 864, 25, 100),
    "a6000": _gpu("RTX A6000", 25, 75, 75, 47.4, 768, 25, 60),
    "a10g": _gpu("A10G", 20, 45, 45, 22.0, 600, 25, 60),
    "l4": _gpu("L4", 18, 50, 50, 22.0, 300, 25, 60),
    "v100": _gpu("V100 16 GB", 11, 11, 55, 15.8, 900, 12, 60),
    "t4": _gpu("T4", 5, 5, 25, 14.6, 320, 12, 30),
    "rtx5090": _gpu("RTX 5090", 73, 150, 150, 31.4, 1792, 50, 70),
    "rtx4090": _gpu("RTX 4090", 55, 120, 120, 23.5, 1008, 25, 60),
    "rtx4060ti": _gpu("RTX 4060 Ti 16 GB", 15, 31, 31, 15.6, 288, 12, 50),
    "rtx3090": _gpu("RTX 3090", 25, 50, 50, 23.6, 936, 25, 50),
    "rtx3060": _gpu("RTX 3060 12 GB", 9, 18, 18, 11.6, 360, 25, 40),
}


_BESIDE = re.compile("nvidia|geforce|tesla|pcie|sxm[0-9]|hbm[0-9]e?|16gb|80gb")  # words beside the name in the table


def device_named(name: str) -> Device:
    """
    A GPU by its name, such as `"rtx4090"` or `"RTX 4090"`.

    Raises:
        `ValueError`: if it is not in the table.
    """
    key = "".join(letter for letter in name.lower() if letter.isalnum())
    known = {one.replace("-", ""): one for one in GPUS}
    if key not in known:
        raise ValueError(
            f"gpu={name!r} is not known. Set gpu to one of {', '.join(GPUS)}, or leave it unset and set budget to "
            "its memory: times are then those of this machine's CPU."
        )
    return GPUS[known[key]]


def device_like(name: str) -> Device | None:
    """The GPU that a driver calls so, such as `"NVIDIA GeForce RTX 4090"`; `None` if it is not in the table."""
    words = [word for word in re.split(r"[\s-]+", name.lower()) if not _BESIDE.fullmatch(word)]
    known = {one.replace("-", ""): device for one, device in GPUS.items()}
    return known.get("".join(words))


def in_machine(device: Device, host: float | None = None, between: float | None = None) -> Device:
    """
    The device in a machine whose host memory moves so many GB per second, and in which so many go from one device to
    the next; as it is without a number.
    """
    return replace(
        device,
        host_bandwidth=device.host_bandwidth if host is None else 1e9 * host,
        between=device.between if between is None else 1e9 * between,
    )


def measured_cpu(precision: str = "fp32") -> Device:
    """
    The CPU of this machine, measured in half a second: a matrix product as that of a layer and a softmax, both
    into memory that is there, sums in place and into new memory, and what rests in a file, read and written.
    """
    names = ("fp32", "bf16") if precision == "auto" else (precision,)
    flops = {}
    for name in names:
        tokens, weight = (torch.ones(n, 768, dtype=PRECISIONS[name] or torch.float32) for n in (512, 3072))
        product = functools.partial(torch.mm, tokens, weight.t(), out=tokens.new_empty(512, 3072))
        flops[name] = 2 * 512 * 768 * 3072 / _seconds(product)
    large, other = torch.ones(2, 2**14, 2**10)
    with tempfile.TemporaryDirectory() as folder:
        slab = Slab([large], large.device, folder)

        def used(use: Callable[[torch.Tensor], object]) -> None:
            use(slab.take(large.device)[0])
            slab.let_go()

        reading = _seconds(lambda: used(torch.sum))
        writing = _seconds(lambda: used(lambda tensor: tensor.add_(1)))
    scaling = _seconds(lambda: torch.softmax(large, -1, out=other))
    summing = _seconds(lambda: torch.add(large, large, out=other))
    making = _seconds(lambda: large + large)
    stepping = _seconds(lambda: large.add_(1))
    return Device(
        f"this machine's CPU, {torch.get_num_threads()} threads",
        flops,
        memory_bandwidth=2 * large.nbytes / scaling,
        link=large.nbytes / reading,
        host_bandwidth=2 * large.nbytes / stepping,
        is_host=True,
        link_out=large.nbytes / max(writing - stepping, stepping),
        new_memory=large.nbytes / max(making - summing, summing / 10),
    )


def _seconds(run: Callable[[], object]) -> float:
    """Of one call, the median of those in [`SECONDS`]; the first is not among them."""
    run()
    found: list[float] = []
    end = time.perf_counter() + SECONDS
    while not found or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)
