"""`Plan`: the result of `plan`, with its tables, the chosen settings, and the reason in words."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .layer_memory import LayerMemory
from .simulation import Peak
from .ways import Way

if TYPE_CHECKING:
    from rich.table import Table


HEADROOM = 1.05  # of a peak, for what is not counted in tensors


@dataclass(frozen=True)
class Row:
    """
    Memory and compute of one way of training.

    Attributes:
        name (`str`): in words.
        way ([`Way`]): its settings.
        peak ([`Peak`]): bytes in device memory.
        compute (`float`): floating-point operations per epoch of every stage, as a ratio to end-to-end training; about
            the ratio of the times.
        resting_bytes (`int`): bytes of weights and optimizer states that rest in host memory (CUDA) or on disk (CPU).
        moved_bytes (`int`): bytes that come from there or go there in a step, on average over the stages.
        cache_bytes (`int`): bytes of the feature cache on disk, for each sample.
    """

    name: str
    way: Way
    peak: Peak
    compute: float
    resting_bytes: int = 0
    moved_bytes: int = 0
    cache_bytes: int = 0

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
    """

    rows: list[Row]
    layers: list[LayerMemory]
    budget: int | None
    chosen: Row | None
    reason: str
    precision: str
    batch_size: int

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of [`MMSTConfig`] that make the chosen way; empty if none was."""
        return {} if self.chosen is None else self.chosen.way.settings

    def table(self) -> "Table":
        """The rows, as a table of the rich library."""
        from rich.table import Table

        numbers = (
            "peak MiB",
            "weights",
            "states",
            "the rest",
            "time",
            "MiB at rest",
            "MiB moved/step",
            "cache MiB/sample",
        )
        title = (
            f"Memory in MiB and time as a ratio to end to end, {self.batch_size} samples at once in {self.precision}"
        )
        table = Table("", "way of training", *numbers, title=title)
        for row in self.rows:
            peak = row.peak
            rest = peak.total - peak.weights - peak.states
            mib = [f"{value / 2**20:,.0f}" for value in (peak.total, peak.weights, peak.states, rest)]
            elsewhere = [f"{n / 2**20:,.0f}" if n else "-" for n in (row.resting_bytes, row.moved_bytes)]
            cache = f"{row.cache_bytes / 2**20:,.2f}" if row.cache_bytes else "-"
            mark = ">" if row is self.chosen else "" if row.fits(self.budget) else "x"
            table.add_row(mark, row.name, *mib, f"{row.compute:.2f}", *elsewhere, cache)
        return table

    def layer_table(self) -> "Table":
        """What each layer takes in end-to-end training, in MiB, as a table of the rich library."""
        from rich.table import Table

        table = Table("layer", "weights", "gradients", "states", "activations")
        for layer in self.layers:
            sizes = layer.weights, layer.gradients, layer.states, layer.activations
            table.add_row(layer.name, *(f"{size / 2**20:,.1f}" for size in sizes))
        return table

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
    plain = [row for row in rows if row.way.num_stages == 1 and row.way.stage_order != "coupled"]
    fitting = [row.name for row in plain if row.fits(limit)]
    if chosen is None and fitting:
        return f"No way of this package fits in {limit / 2**20:,.0f} MiB. These do: {'; '.join(fitting)}."
    ours = [row for row in rows if row not in plain]
    if chosen is None and not ours:
        return (
            "No way of this package is for this run: stages cannot learn, for the layers attend causally or the task "
            "has no local loss, and the coupled order is ruled out. Leave memory_budget unset."
        )
    if chosen is None:
        least = min(ours, key=lambda row: row.peak.total)
        need = math.ceil(least.peak.total * HEADROOM / 2**20)
        return (
            f"Nothing fits in {limit / 2**20:,.0f} MiB. The least of this package's ways, {least.name}, needs {need:,} "
            f"MiB, with 5 % for what is not in tensors: {need - limit / 2**20:,.0f} MiB more. Set the budget to "
            f"{need}MiB, or use a smaller batch or lower precision."
        )
    others = f" So do, without stages: {'; '.join(fitting)}." if fitting else " End-to-end training does not."
    elsewhere = f", and has {chosen.resting_bytes / 2**20:,.0f} MiB at rest" if chosen.resting_bytes else ""
    return (
        f"{chosen.name} fits in {limit / 2**20:,.0f} MiB with {chosen.peak.total / 2**20:,.0f} MiB and 5 % to spare, "
        f"at the least compute of this package's ways that do: {chosen.compute:.2f} times that of end-to-end "
        f"training{elsewhere}.{others}"
    )
