"""Plots of a run's stages over time, made from its log: in `training.png`, TensorBoard and trackio."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback
from transformers.utils import logging

from .atomic_writes import write_atomically
from .colours import PLANNED, of_stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)
PICTURE_NAME = "training.png"
MOST_POINTS = 120  # of a curve; where the log has more entries, a point is the mean of some
FEW_POINTS = 40  # are shown as such


def stage_curves(history: Sequence[Mapping[str, Any]], name: str, prefix: str = "") -> dict[int, list[float]]:
    """
    Curves of one logged number, one for each stage.

    Args:
        history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        name (`str`): what is logged of each stage, such as `"transport"`.
        prefix (`str`): `"eval_"` for what evaluations found, none for what training did.

    Returns:
        `dict[int, list[float]]`: by stage from 1, a value for each entry of the log with such numbers, NaN where this
        stage did not learn; and, under 0, the steps of these entries.
    """
    pattern = re.compile(rf"{prefix}stage_(\d+)_{name}")
    entries = [
        (entry["step"], {int(found[1]): value for key, value in entry.items() if (found := pattern.fullmatch(key))})
        for entry in history
    ]
    entries = list({step: (step, values) for step, values in entries if values}.values())  # of a step, the last
    curves: dict[int, list[float]] = {0: [step for step, _ in entries]}
    for stage in sorted({stage for _, values in entries for stage in values}):
        curves[stage] = [values.get(stage, math.nan) for _, values in entries]
    return curves


def metric_shown(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The metric of the stages that is shown: the accuracy, or else the first that is neither loss nor transport."""
    found = [re.fullmatch(r"eval_stage_\d+_(.+)", key) for entry in history for key in entry]
    names = [one[1] for one in found if one is not None and one[1] not in ("loss", "transport")]
    return "accuracy" if "accuracy" in names else next(iter(names), None)


def draw_training(
    history: Sequence[Mapping[str, Any]], peaks: Mapping[str, int] | None = None, planned_bytes: int | None = None
) -> "Figure | None":
    """
    Metric, task loss and transport of each stage over the steps, and memory as measured and as planned.

    Args:
        history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        peaks (`Mapping[str, int]`, *optional*): bytes of each turn of training by name, as `trainer.peaks.by_name`.
        planned_bytes (`int`, *optional*): what was planned for the turn that takes most.

    Returns:
        `Figure`: with a panel for each of these that is known; `None` if nothing is.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    metric = metric_shown(history)
    panels: list[tuple[str, dict[int, list[float]]]] = [
        *([(f"{metric} in evaluation", stage_curves(history, metric, "eval_"))] if metric is not None else []),
        ("task loss in training", stage_curves(history, "loss")),
        ("transport in training", stage_curves(history, "transport")),
    ]
    panels = [(title, curves) for title, curves in panels if len(curves[0]) > 1]  # one point shows no course
    count = len(panels) + bool(peaks)
    if count == 0:
        return None
    rows = 1 if count < 3 else 2
    stages = sorted({stage for _, curves in panels for stage in curves} - {0})
    last = max((step for _, curves in panels for step in curves[0]), default=0)
    shades = of_stages(stages)
    with light_page():
        figure = Figure(figsize=(9, 3.2 * rows), layout="constrained")
        spots = list(figure.subplots(rows, -(-count // rows), squeeze=False).flat)
        lines: dict[int, Any] = {}
        for axes, (title, curves) in zip(spots, panels, strict=False):
            for stage, values in curves.items():
                if stage > 0:
                    steps, means = _thinned(curves[0], values)
                    mark = "o" if len(steps) <= FEW_POINTS else ""
                    line = axes.plot(steps, means, color=shades[stage], marker=mark, markersize=3, linewidth=1.4)
                    lines[stage] = line[0]
            axes.set(title=title, xlabel="optimizer step", xlim=(0, 1.03 * last))
            axes.grid(alpha=0.25)
            if title.startswith("accuracy"):
                axes.set_ylim(top=1.02)
                axes.yaxis.set_major_formatter(PercentFormatter(1))
            else:
                axes.set_ylim(bottom=0)
        if peaks:
            _draw_memory(spots[len(panels)], peaks, planned_bytes, shades)
        for axes in spots[count:]:
            axes.remove()
        if len(lines) > 1:
            names = [f"stage {stage}" for stage in lines]
            figure.legend(lines.values(), names, loc="outside lower center", ncols=min(len(lines), 6), frameon=False)
    return figure


@contextlib.contextmanager
def light_page() -> Iterator[None]:
    """Within this context pictures are made on white, with dark text, whatever the user's style or page is."""
    from matplotlib import style

    with style.context("default"):
        yield


def write_picture(folder: str | Path, history: Sequence[Mapping[str, Any]], *memory: Any) -> Path | None:
    """
    Write what [`draw_training`] draws to `training.png` in `folder`, if matplotlib is there and there is what to draw.

    That it cannot be written is a warning: a picture must not end a run.

    Returns:
        `Path`: the file, if it was written.
    """
    path = Path(folder) / PICTURE_NAME
    try:
        figure = draw_training(history, *memory) if find_spec("matplotlib") is not None else None
        if figure is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path, lambda beside: figure.savefig(beside, format="png", dpi=110, metadata={"Software": None})
        )
    except Exception as error:
        logger.warning(f"hf_mmst wrote no {PICTURE_NAME} ({type(error).__name__}: {error})")
        return None
    return path


class PictureCallback(TrainerCallback):
    """
    Sends the picture to TensorBoard and trackio, where `report_to` has them: after each evaluation and at the end.

    Args:
        callbacks (`Callable[[], Sequence[TrainerCallback]]`): the trainer's callbacks, with its loggers among them.
        peaks (`Mapping[str, int]`): see [`draw_training`]; the trainer's own, which grow.
        planned (`Callable[[], int | None]`): makes the plan, once, at the end of training.
    """

    def __init__(
        self,
        callbacks: Callable[[], Sequence[TrainerCallback]],
        peaks: Mapping[str, int],
        planned: Callable[[], int | None],
    ):
        self._callbacks, self._peaks, self._planned = callbacks, peaks, planned
        self._planned_bytes: int | None = None
        self._failed: set[type] = set()

    def on_evaluate(self, args, state, control, **kwargs):
        self._send(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "train_runtime" in logs:  # the last of training: loggers close after it
            self._send(state, ended=True)

    def _send(self, state: Any, ended: bool = False) -> None:
        loggers = [one for one in self._callbacks() if isinstance(one, TensorBoardCallback | TrackioCallback)]
        loggers = [one for one in loggers if type(one) not in self._failed]
        if not loggers or not state.is_world_process_zero or find_spec("matplotlib") is None:
            return
        for one in loggers:
            try:
                if ended and self._planned_bytes is None:
                    self._planned_bytes = self._planned()
                figure = draw_training(state.log_history, self._peaks, self._planned_bytes)
                if figure is not None:
                    _show(one, pixels(figure), state.global_step)
            except Exception as error:  # a logger must not end a run
                self._failed.add(type(one))
                logger.warning(
                    f"hf_mmst sends no pictures to {type(one).__name__} ({type(error).__name__}: {error}). The "
                    "numbers are logged as ever."
                )


def pixels(figure: "Figure") -> np.ndarray:
    """The figure as an image `[H, W, 3]`, 0 to 255."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _show(target: TrainerCallback, image: np.ndarray, step: int) -> None:
    if isinstance(target, TensorBoardCallback):
        if target.tb_writer is not None:
            target.tb_writer.add_image("stages", image, step, dataformats="HWC")
            target.tb_writer.flush()
        return
    import trackio

    trackio.log({"stages": trackio.Image(image), "train/global_step": step})


def _draw_memory(axes: Any, peaks: Mapping[str, int], planned_bytes: int | None, shades: Mapping[int, str]) -> None:
    """
    A bar for each turn of training: of the tensors, with a line at what was planned; of the process, if they are not
    known.
    """
    of_tensors = any(name.endswith("peak_bytes") for name in peaks)
    measured = {
        name: value for name, value in peaks.items() if name.endswith("peak_bytes" if of_tensors else "process_bytes")
    }
    found = [re.match(r"(?:stage_(\d+)|(end_to_end))?_?", name) for name in measured]
    labels = [one[1] or one[2] or "all stages" for one in found if one]
    colors = [shades.get(int(one[1]), "tab:grey") if one[1] else "tab:grey" for one in found if one]
    mib = [value / 2**20 for value in measured.values()]
    bars = axes.bar(range(len(mib)), mib, width=0.6 if len(mib) > 1 else 0.3, color=colors)
    if len(mib) <= 8:
        plate = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8, label_type="center", bbox=plate)
    highest = max(mib)
    if of_tensors and planned_bytes is not None:
        planned = planned_bytes / 2**20
        highest = max(highest, planned)
        axes.axhline(planned, color=PLANNED, linestyle="--", linewidth=1.4, label=f"planned: {planned:,.0f}")
        axes.legend(loc="upper left", fontsize=8)
    title = "most memory of tensors, MiB" if of_tensors else "most memory of the process, MiB"
    axes.set(title=title, xticks=range(len(mib)), xticklabels=labels, xlim=(-0.8, len(mib) - 0.2))
    axes.set_ylim(0, 1.3 * highest)
    axes.set_xlabel("turn of stage" if len(mib) > 1 else "")


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most [`MOST_POINTS`] points: means of as many entries each, of those in which the stage learned."""
    size = -(-len(steps) // MOST_POINTS)
    chunks = [slice(i, i + size) for i in range(0, len(steps), size)]
    return [steps[chunk][-1] for chunk in chunks], [_mean(values[chunk]) for chunk in chunks]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
