"""The picture of a plan: memory of each way by kind, and its time beside."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..records.atomic_writes import write_atomically
from .plans import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour a kind of memory; these can be told apart without seeing red or green.
KINDS = {"weights": "#0072b2", "optimizer states": "#56b4e9", "gradients, activations, inputs": "#e69f00"}
TIME = "#8c8c8c"
BUDGET = "#d55e00"


def draw_plan(plan: Plan) -> "Figure":
    """
    Bars of memory by kind, and the time of each way beside them.

    Raises:
        `ImportError`: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture of a plan needs matplotlib: pip install 'hf-mmst[recipes]'.") from error
    rows = plan.in_order[::-1]
    timed = all(row.prediction is not None for row in rows)
    figure = Figure(figsize=(9, 1.6 + 0.36 * len(rows)), layout="constrained", facecolor="white")
    memory, time = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    at = range(len(rows))
    left = [0.0] * len(rows)
    parts = [(row.peak.weights, row.peak.states, row.peak.total - row.peak.weights - row.peak.states) for row in rows]
    for (kind, colour), sizes in zip(KINDS.items(), zip(*parts, strict=True), strict=True):
        gib = [size / 2**30 for size in sizes]
        memory.barh(at, gib, 0.7, left, color=colour, label=kind)
        left = [begin + more for begin, more in zip(left, gib, strict=True)]
    _label(memory, left, [f"{value:.3g}" for value in left])
    if plan.budget is not None:
        memory.axvline(
            plan.budget / 2**30, color=BUDGET, linestyle="--", label=f"budget, {plan.budget / 2**30:.3g} GiB"
        )
    memory.set_xlabel("peak of device memory, GiB of tensors", fontsize=9)
    memory.set_yticks(at, [f"{row.name}{'  (chosen)' if row is plan.chosen else ''}" for row in rows], fontsize=9)
    for label, row in zip(memory.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row is plan.chosen else "normal")
    values = [row.prediction.seconds if row.prediction is not None else row.compute for row in rows]
    time.barh(at, values, 0.7, color=TIME)
    _label(time, values, [f"{value:.3g}" for value in values])
    what = (
        f"predicted seconds of one batch,\n{plan.device.name}" if timed and plan.device else "compute, end to end = 1"
    )
    time.set_xlabel(what, fontsize=9)
    for axes in (memory, time):
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(f"{plan.batch_size} samples at once in {plan.precision}", fontsize=10)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def write_plan_picture(plan: Plan, path: Path) -> None:
    """Write [`draw_plan`] to a PNG file; raises what that raises."""
    figure = draw_plan(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=130, metadata={"Software": None}))


def _label(axes, ends: list[float], texts: list[str]) -> None:
    for y, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(text, (end, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * max(ends))
