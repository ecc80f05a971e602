"""What a run says on the terminal: a bar with the time left, and one line at each evaluation."""

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..records.results import split_metrics

MOST_SHOWN = 8  # stages in a line


class QuietBar(ProgressCallback):
    """The host's bar, which does not print the logs."""

    def on_log(self, args, state, control, logs=None, **kwargs): ...


class EpochLines(TrainerCallback):
    """
    One line at each evaluation in training: accuracy of each stage, loss, transport, memory.

    Args:
        trainer ([`MMSTTrainer`]): whose run it is.
    """

    def __init__(self, trainer: Any):
        self._trainer, self._begun = trainer, False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not state.is_world_process_zero or not self._trainer.is_in_train or not metrics:
            return
        own, stages = split_metrics(metrics)
        peaks = self._trainer.peaks
        taken = peaks.most("peak_bytes")
        accuracies = _few([100 * value for value in stages.get("accuracy", [own.get("accuracy", float("nan"))])])
        columns = {
            "epoch": f"{state.epoch:>{len(str(round(state.num_train_epochs))) + 2}.3g}/{state.num_train_epochs:g}",
            f"accuracy of {'each stage' if len(stages) else 'the model'}, %": accuracies,
            "loss": f"{own.get('loss', float('nan')):.3f}",
            **({"transport": f"{sum(stages['transport']):.3f}"} if "transport" in stages else {}),
            "tensors"
            if taken is not None
            else "process": f"{(taken or peaks.most('process_bytes') or 0) / 2**20:,.0f} MiB",
        }
        if not self._begun:
            tqdm.write("  ".join(name.rjust(len(value)) for name, value in columns.items()))
            self._begun = True
        tqdm.write("  ".join(value.rjust(len(name)) for name, value in columns.items()))


def speak_in_lines(trainer: Any) -> None:
    """Let a trainer print a line at each evaluation in the place of each log; notebooks have the host's own table."""
    trainer.pop_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(QuietBar)
    trainer.add_callback(EpochLines(trainer))


def _few(values: Sequence[float]) -> str:
    shown = [f"{value:5.1f}" for value in values]
    if len(shown) > MOST_SHOWN:
        shown[MOST_SHOWN // 2 : -(MOST_SHOWN // 2)] = ["..."]
    return " ".join(shown)
