"""Train and report: a table of the stages on the terminal, and `results.json`."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..memory.peaks import PeakMemory
from ..records.atomic_writes import write_atomically
from ..records.pictures import write_picture
from ..records.results import StageRow, stage_rows

if TYPE_CHECKING:
    from ..trainer.mmst_trainer import MMSTTrainer


def print_stage_table(rows: list[StageRow]) -> None:
    """One line a stage, on the terminal; nothing where a model was trained end to end."""
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "accuracy", "loss", "transport", title="Accuracy, task loss and transport of each stage")
    for row in rows:
        table.add_row(str(row.stage), f"{row.accuracy:.2%}", f"{row.loss:.4f}", f"{row.transport:.4f}")
    Console().print(table)


def train_and_report(trainer: "MMSTTrainer", *, model: str, dataset: str, begin: float) -> None:
    """
    The end of a recipe: train, evaluate once, save, print the table of the stages, write `results.json`.

    Args:
        trainer ([`MMSTTrainer`]): with an `accuracy` among its metrics.
        model (`str`), dataset (`str`): what they are called in the results.
        begin (`float`): `time.perf_counter()` when the recipe began.
    """
    args = trainer.args
    with PeakMemory(args.device) as peak:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)  # type: ignore[call-arg]  # functools.wraps hides self
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print_stage_table(stage_rows(metrics))
        seconds = time.perf_counter() - begin
        results = write_results(
            trainer,
            metrics,
            model=model,
            dataset=dataset,
            peak_bytes=peak.peak_bytes,
            reserved_bytes=peak.reserved_bytes,
            seconds=seconds,
        )
        ensemble = metrics.get("eval_ensemble_accuracy")
        together = "" if ensemble is None else f" (all heads together {ensemble:.2%})"
        planned = f" (planned {results['planned_bytes'] / 2**20:.0f} of tensors)" if results["planned_bytes"] else ""
        above = "" if args.device.type == "cuda" else " above what was held before training"
        print(
            f"accuracy {metrics['eval_accuracy']:.2%}{together}, peak memory {peak.peak_bytes / 2**20:.0f} MiB{above}"
            f"{planned}, {seconds:.0f} s, written to {args.output_dir}/results.json"
        )
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def write_results(trainer: "MMSTTrainer", metrics: Mapping[str, float], **found: Any) -> dict[str, Any]:
    """
    Write `results.json` in the output directory, beside and renamed, and `training.png`, see [`draw_training`].

    Args:
        trainer ([`MMSTTrainer`]): the trainer, after training.
        metrics (`Mapping[str, float]`): of [`MMSTTrainer.evaluate`], with an `accuracy` among them.
        found: what else is to be kept: `model`, `dataset`, `peak_bytes`, `reserved_bytes`, `seconds`.

    Returns:
        `dict[str, Any]`: what was written, see [`MMSTTrainer.results`].
    """
    results = trainer.results(
        metrics,
        **found,
        turn_peak_bytes=trainer.peaks.by_name | trainer.peaks.reserved_by_name,
        num_train_samples=len(trainer.train_dataset),
        num_eval_samples=len(trainer.eval_dataset),
    )
    write_json(Path(trainer.args.output_dir) / "results.json", results)
    write_picture(trainer.args.output_dir, trainer.state.log_history, trainer.peaks.by_name, results["planned_bytes"])
    return results


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to the file `path`, beside and renamed; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda beside: beside.write_text(json.dumps(content, indent=2) + "\n"))
