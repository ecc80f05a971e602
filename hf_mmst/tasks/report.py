"""Train and report: a table of the stages on the terminal, and `results.json`."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records.atomic_writes import write_atomically
from ..records.pictures import write_picture
from ..records.results import standard_error
from ..records.stage_table import print_stages
from .progress import speak_in_lines

if TYPE_CHECKING:
    from ..trainer.mmst_trainer import MMSTTrainer

EVAL_PART = 8  # evaluate on an eighth as many samples as an epoch trains on: forward passes alone, of a third each


def train_and_report(trainer: "MMSTTrainer", *, model: str, dataset: str, begin: float) -> None:
    """
    The end of a recipe: train, evaluate, save, print the table of the stages, write `results.json`.

    Evaluations in training, on part of the samples, take about a twentieth of the time; the last one is on all.

    Args:
        trainer ([`MMSTTrainer`]): with an `accuracy` among its metrics.
        model (`str`), dataset (`str`): what they are called in the results.
        begin (`float`): `time.perf_counter()` when the recipe began.
    """
    args = trainer.args
    speak_in_lines(trainer)
    trainer.peaks.tracks_tensors = True
    with evaluating_part(trainer):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)  # type: ignore[call-arg]  # functools.wraps hides self
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print_stages(metrics)
        seconds = time.perf_counter() - begin
        results = write_results(trainer, metrics, model=model, dataset=dataset, seconds=seconds)
        ensemble = metrics.get("eval_ensemble_accuracy")
        together = "" if ensemble is None else f" (all heads together {ensemble:.2%})"
        error = standard_error(metrics["eval_accuracy"], results["num_eval_samples"])
        print(
            f"accuracy {metrics['eval_accuracy']:.2%}{together}, standard error {100 * error:.2f} points with "
            f"{results['num_eval_samples']:,} samples\n"
            f"memory: {trainer.peaks.summary(results['planned_bytes'])}\n"
            f"{seconds:.0f} s, written to {args.output_dir}/results.json"
        )
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


@contextlib.contextmanager
def evaluating_part(trainer: "MMSTTrainer") -> Iterator[None]:
    """Within this context evaluations are on a random part of the samples, unless they choose the best model."""
    args, whole, most = trainer.args, trainer.eval_dataset, max(1, len(trainer.train_dataset) // EVAL_PART)
    chooses = args.load_best_model_at_end or args.dataloader_persistent_workers  # whose loader would be kept
    if args.eval_strategy == "no" or chooses or len(whole) <= most:
        yield
        return
    if trainer.is_world_process_zero():
        print(f"Evaluations in training are on {most:,} of the {len(whole):,} samples, the last one is on all.")
    trainer.eval_dataset = whole.shuffle(seed=0).select(range(most))
    try:
        yield
    finally:
        trainer.eval_dataset = whole


def write_results(trainer: "MMSTTrainer", metrics: Mapping[str, float], **found: Any) -> dict[str, Any]:
    """
    Write `results.json` in the output directory, beside and renamed, and `training.png`, see [`draw_training`].

    Args:
        trainer ([`MMSTTrainer`]): the trainer, after training.
        metrics (`Mapping[str, float]`): of [`MMSTTrainer.evaluate`], with an `accuracy` among them.
        found: what else is to be kept: `model`, `dataset`, `seconds`.

    Returns:
        `dict[str, Any]`: what was written, see [`MMSTTrainer.results`].
    """
    results = trainer.results(
        metrics,
        **found,
        turn_peak_bytes=trainer.peaks.by_name,
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
