"""The table of a plan, and what its marks and columns say."""

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from .plans import Plan, Row

if TYPE_CHECKING:
    from rich.table import Table

Column = tuple[str, Callable[[Row], str], str]  # heading, cell, and what the legend says of it
EMPTY = "-"


def plan_table(plan: Plan) -> "Table":
    """The ways, the chosen one first, as a table of the rich library; columns that would be empty are left out."""
    from rich import box
    from rich.table import Table

    size = f"{plan.batch_size} samples at once in {plan.precision}"
    if plan.num_processes > 1:
        size += f", in each of {plan.num_processes} processes"
    budget = "" if plan.budget is None else f", in {plan.budget / 2**20:,.0f} MiB"
    table = Table(title=f"Ways of training {size}{budget}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    table.add_column("way of training", ratio=1, min_width=20)
    columns = _columns(plan)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for row in plan.in_order:
        table.add_row(_mark(plan, row), row.name, *(cell(row) for _, cell, _ in columns))
    return table


def plan_legend(plan: Plan) -> str:
    """What the marks and columns of [`plan_table`] say."""
    marks = []
    if plan.chosen is not None:
        marks.append("> chosen")
    if not all(row.fits(plan.budget) for row in plan.rows):
        marks.append("x does not fit, with 5 % to spare")
    lines = ["; ".join(marks)] if marks else []
    for heading, _, text in _columns(plan):
        name = heading.replace("\n", " ")
        lines.append(textwrap.fill(f"{name}: {text}", 100, subsequent_indent="    "))
    return "\n".join(lines)


def layer_table(plan: Plan) -> "Table":
    """What each layer takes in end-to-end training, in MiB, as a table of the rich library."""
    from rich.table import Table

    table = Table("layer", "weights", "gradients", "states", "activations")
    for layer in plan.layers:
        sizes = layer.weights, layer.gradients, layer.states, layer.activations
        table.add_row(layer.name, *(f"{size / 2**20:,.1f}" for size in sizes))
    return table


def _mark(plan: Plan, row: Row) -> str:
    return ">" if row is plan.chosen else "" if row.fits(plan.budget) else "x"


def _columns(plan: Plan) -> list[Column]:
    """Those that are not empty in all rows."""
    columns: list[Column] = [
        ("peak\nMiB", lambda row: _mib(row.peak.total), "the most that is in device memory at once, of tensors"),
        ("weights\nMiB", lambda row: _mib(row.peak.weights), "the part of it that the model takes throughout"),
        (
            "states\nMiB",
            lambda row: _mib(row.peak.states),
            "AdamW's; the rest of the peak is gradients, activations and inputs",
        ),
        ("at rest\nMiB", lambda row: _mib(row.resting_bytes), "in host memory, or beside a CPU in files"),
        ("moved\nMiB", lambda row: _mib(row.moved_bytes), "in a step, from there to the device and back"),
        ("sent\nMiB", lambda row: _mib(row.sent_bytes), "in a step, from other processes, and as much to them"),
        (
            "cache\nMiB",
            lambda row: f"{row.cache_bytes / 2**20:.2f}" if row.cache_bytes else EMPTY,
            "on disk, for each sample",
        ),
        (
            "compute",
            lambda row: f"{row.compute:.2f}",
            "floating-point operations, end to end = 1; where stages learn in turn, of an epoch of each",
        ),
    ]
    if plan.device is not None:
        name = plan.device.name
        columns += [
            ("time\ns", _seconds, f"of one batch on {name}, in all stages. PREDICTED from speeds, not measured"),
            ("speed\n%", _speed, "predicted, of the same computation with all of it in device memory"),
            ("90 % at\ntokens", _tokens, "the batch with which that would be 90 %"),
        ]
    return [one for one in columns if any(one[1](row) != EMPTY for row in plan.rows)]


def _mib(value: int) -> str:
    return f"{value / 2**20:,.0f}" if value else EMPTY


def _seconds(row: Row) -> str:
    if row.prediction is None:
        return EMPTY
    return f"{row.prediction.seconds:.3g}" if row.prediction.seconds < 100 else f"{row.prediction.seconds:,.0f}"


def _speed(row: Row) -> str:
    return EMPTY if row.prediction is None or row.prediction.tokens is None else f"{100 * row.prediction.speed:.0f}"


def _tokens(row: Row) -> str:
    tokens = None if row.prediction is None else row.prediction.tokens
    return EMPTY if tokens is None else f"{float(f'{tokens:.2g}'):,.0f}"
