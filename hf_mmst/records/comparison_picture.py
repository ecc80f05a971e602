"""The picture of a comparison: accuracy over depth of three ways of training, their memory and their time."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic_writes import write_atomically
from .colours import WAYS as COLOURS
from .pictures import light_page
from .results import standard_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {  # what is compared, and what it is called beside the others
    "end to end": "end to end",
    "stages, greedy": "stages, greedy",
    "stages": "stages, with transport",
}
LEAST_SPAN = 0.1  # of the axis of accuracy, so that a small difference looks small
APART = 0.1  # of an eighth of the layers, between the marks of ways at the same depth


def draw_comparison(found: Mapping[str, Any]) -> "Figure":
    """
    Accuracy of each stage over the layers run, and bars of memory and time.

    Args:
        found (`Mapping[str, Any]`): see [`compare`].
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows, depths = found["rows"], found["depths"]
    with light_page():
        figure = Figure(figsize=(9, 3.9), layout="constrained", facecolor="white")
        accuracy, memory, time = figure.subplots(1, 3, width_ratios=(2.6, 1, 1))
        for i, row in enumerate(rows):
            _draw_depth(accuracy, row, depths, APART * (i - 1) * depths[-1] / 8, found["num_eval_samples"])
        accuracy.set_title("test accuracy of each stage, ± standard error", fontsize=10)
        accuracy.set_xlabel("layers run")
        accuracy.set_xlim(0.4, depths[-1] + 0.6)
        accuracy.set_xticks(depths)
        accuracy.set_ylim(*_limits([value for row in rows for value in row["stage_accuracy"]]))
        accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        accuracy.grid(alpha=0.25)
        lines, names = accuracy.get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
        _draw_bars(memory, "peak of tensors, MiB", rows, [(row["peak_bytes"] or math.nan) / 2**20 for row in rows])
        _draw_bars(time, "training, seconds", rows, [row["seconds"] for row in rows])
        for axes in (accuracy, memory, time):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"{found['model']} on {found['dataset']}, {found['num_stages']} stages: {found['num_train_samples']:,} "
            f"samples to train on, {found['num_eval_samples']:,} to test on, one seed",
            fontsize=10,
        )
    return figure


def write_comparison(found: Mapping[str, Any], path: Path) -> bool:
    """Write [`draw_comparison`] to a PNG file; returns whether matplotlib was there to draw it."""
    if find_spec("matplotlib") is None:
        return False
    figure = draw_comparison(found)
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=130, metadata={"Software": None}))
    return True


def _draw_depth(axes: Any, row: Mapping[str, Any], depths: Sequence[int], shift: float, number: int) -> None:
    """A line over the stages; open marks are classifiers that were trained after the model."""
    values = row["stage_accuracy"]
    at = [depth + shift for depth in depths[-len(values) :]]
    errors = [standard_error(value, number) for value in values]
    probed, colour = row["num_stages"] == 1, COLOURS[row["way"]]
    style = {"color": colour, "capsize": 2, "linewidth": 1.4, "marker": "o", "markersize": 5}
    if not probed:
        axes.errorbar(at, values, errors, label=WAYS[row["way"]], **style)
        return
    style["linestyle"] = "--" if len(values) > 1 else "none"
    axes.errorbar(at, values, errors, markerfacecolor="white", **style)
    axes.errorbar(at[-1:], values[-1:], errors[-1:], **style)
    label = WAYS[row["way"]] + (" (open: linear classifiers, trained afterwards)" if len(values) > 1 else "")
    axes.plot([], [], label=label, **{name: value for name, value in style.items() if name != "capsize"})


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Whole steps of 5 points around the values, 10 points at least, and a little room above 100 %."""
    low, high = math.floor(20 * min(values) - 0.2) / 20, math.ceil(20 * max(values) + 0.2) / 20
    low = max(0.0, min(low, high - LEAST_SPAN))
    return low, min(high, 1.01)


def _draw_bars(axes: Any, title: str, rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> None:
    at = range(len(rows))
    bars = axes.bar(at, values, 0.7, color=[COLOURS[row["way"]] for row in rows])
    axes.bar_label(bars, fmt="{:,.0f}", padding=2)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(at, ["end\nto end", "greedy", "trans-\nport"])
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
