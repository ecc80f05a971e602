"""`Plan`: the result of `plan`, with its tables, the chosen settings, and the reason in words."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from .devices import Device
from .layer_memory import LayerMemory
from .operations import Peak
from .step_time import Prediction
from .ways import Way

HEADROOM = 1.05  # of a peak, for what is not counted in tensors


@dataclass(frozen=True)
class Row:
    """
    Memory and compute of one way of training.

    Attributes:
        name (`str`): in words.
        way ([`Way`]): its settings.
        peak ([`Peak`]): bytes in device memory.
        compute (`float`): floating-point operations per epoch of every stage, as a ratio to end-to-end training.
        resting_bytes (`int`): bytes of weights and optimizer states that rest in host memory (CUDA) or on disk (CPU).
        moved_bytes (`int`): bytes that come from there or go there in a step, on average over the stages.
        sent_bytes (`int`): bytes that come from other processes in a step, on average over the stages; as many go.
        cache_bytes (`int`): bytes of the feature cache on disk, for each sample.
        prediction ([`Prediction`], *optional*): its time on the plan's device; `None` without one, or if bytes are sent
            at an unknown speed.
    """

    name: str
    way: Way
    peak: Peak
    compute: float
    resting_bytes: int = 0
    moved_bytes: int = 0
    cache_bytes: int = 0
    prediction: Prediction | None = None
    sent_bytes: int = 0

    def fits(self, limit: int | None) -> bool:
        """Whether the peak is within `limit` bytes, with 5 % for what is not in tensors; always without a limit."""
        return limit is None or self.peak.total * HEADROOM <= limit


@dataclass(frozen=True)
class Plan:
    """
    The result of [`plan`].

    Attributes:
        rows (`list[Row]`): the ways of training that were tried.
        layers (`list[LayerMemory]`): what each layer takes in end-to-end training.
        budget (`int`, *optional*): bytes.
        chosen (`Row`, *optional*): of the ways of this package the one with the least compute that fits, if any.
        reason (`str`): why it was chosen, or what is missing.
        precision (`str`): `"fp32"`, `"bf16"` or `"fp16"`: that of all rows.
        batch_size (`int`): samples on one device, in all rows.
        device ([`Device`], *optional*): what times are predicted for.
        num_processes (`int`): that share the samples out; all bytes are those of one of them.
    """

    rows: list[Row]
    layers: list[LayerMemory]
    budget: int | None
    chosen: Row | None
    reason: str
    precision: str
    batch_size: int
    device: Device | None = None
    num_processes: int = 1

    @property
    def in_order(self) -> list[Row]:
        """The rows, the chosen one first."""
        return sorted(self.rows, key=lambda row: row is not self.chosen)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of [`MMSTConfig`] that make the chosen way; empty if none was."""
        return {} if self.chosen is None else self.chosen.way.settings

    def to_dict(self) -> dict[str, Any]:
        """The whole plan as plain data, as for JSON; bytes are numbers, times are predicted seconds."""
        return {
            "batch_size": self.batch_size,
            "num_processes": self.num_processes,
            "precision": self.precision,
            "budget_bytes": self.budget,
            "device": None if self.device is None else asdict(self.device),
            "chosen": None if self.chosen is None else self.chosen.name,
            "reason": self.reason,
            "config": self.config(),
            "rows": [
                {
                    "name": row.name,
                    "settings": row.way.settings,
                    "fits": row.fits(self.budget),
                    "peak_bytes": row.peak.total,
                    "weights_bytes": row.peak.weights,
                    "states_bytes": row.peak.states,
                    "compute": row.compute,
                    "resting_bytes": row.resting_bytes,
                    "moved_bytes": row.moved_bytes,
                    "sent_bytes": row.sent_bytes,
                    "cache_bytes_per_sample": row.cache_bytes,
                    "predicted": None if row.prediction is None else asdict(row.prediction),
                }
                for row in self.in_order
            ],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def config(self) -> str:
        """The chosen settings as code, ready to paste; empty if none was chosen."""
        if self.chosen is None:
            return ""
        settings = {**self.settings, "per_device_train_batch_size": self.batch_size}
        if self.precision != "fp32":
            settings[self.precision] = True
        return f'MMSTConfig("output", {", ".join(f"{name}={value!r}" for name, value in settings.items())})'


def reason_for(rows: list[Row], limit: int | None, chosen: Row | None) -> str:
    if limit is None:
        return "No budget was given, so nothing was chosen."
    plain = [row for row in rows if row.way.num_stages == 1 and row.way.offload == "none"]
    fitting = [row.name for row in plain if row.fits(limit)]
    if chosen is None and fitting:
        return f"No way of this package fits in {limit / 2**20:,.0f} MiB. These do: {'; '.join(fitting)}."
    ours = [row for row in rows if row not in plain] or [row for row in plain if row.sent_bytes and not row.way.lora]
    if chosen is None and not ours:
        return (
            "No way of this package is for this run: stages cannot learn, for the layers attend causally or the task "
            "has no local loss, and the end-to-end order is ruled out. Leave memory_budget unset."
        )
    if chosen is None:
        least = min(ours, key=lambda row: row.peak.total)
        need = math.ceil(least.peak.total * HEADROOM / 2**20)
        return (
            f"Nothing fits in {limit / 2**20:,.0f} MiB. The least of this package's ways, {least.name}, needs {need:,} "
            f"MiB, with 5 % for what is not in tensors: {need - limit / 2**20:,.0f} MiB more. Set the budget to "
            f"{need}MiB, or use a smaller batch or lower precision."
        )
    fitting = [name for name in fitting if name != chosen.name]
    others = f" So do: {'; '.join(fitting)}." if fitting else ""
    elsewhere = f", and has {chosen.resting_bytes / 2**20:,.0f} MiB at rest" if chosen.resting_bytes else ""
    return (
        f"{chosen.name} fits in {limit / 2**20:,.0f} MiB with {chosen.peak.total / 2**20:,.0f} MiB and 5 % to spare, "
        f"at {chosen.compute:.2f} times the compute of end-to-end "
        f"training{elsewhere}.{others}"
    )
