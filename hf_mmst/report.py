"""Metrics of a finished run -> a table of its stages, and `results.json`."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import replace
from .memory import PeakMemory

if TYPE_CHECKING:
    from .trainer import MMSTTrainer

PACKAGES = ("hf-mmst", "torch", "transformers", "accelerate", "datasets", "evaluate")
SETTINGS = (
    "stage_order",
    "num_laps",
    "head_pooling",
    "transport_weight",
    "transport_norm",
    "transport_schedule",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


@dataclass(frozen=True)
class StageRow:
    """What one stage reached: its number from 1, accuracy (0 to 1), mean task loss, mean transport."""

    stage: int
    accuracy: float
    loss: float
    transport: float


def stage_rows(metrics: Mapping[str, float], prefix: str = "eval") -> list[StageRow]:
    """The stages in the metrics that [`MMSTTrainer.evaluate`] returns, with an `accuracy` among the user's metrics."""
    rows: list[StageRow] = []
    while f"{prefix}_stage_{len(rows) + 1}_accuracy" in metrics:
        stage = len(rows) + 1
        found = [metrics[f"{prefix}_stage_{stage}_{name}"] for name in ("accuracy", "loss", "transport")]
        rows.append(StageRow(stage, *found))
    return rows


def print_stage_table(rows: list[StageRow]) -> None:
    """One line a stage, on the terminal."""
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
        path = write_results(
            trainer,
            metrics,
            model=model,
            dataset=dataset,
            peak_bytes=peak.peak_bytes,
            reserved_bytes=peak.reserved_bytes,
            seconds=seconds,
        )
        print(
            f"accuracy {metrics['eval_accuracy']:.2%}, peak memory {peak.peak_bytes / 2**20:.0f} MiB, "
            f"{seconds:.0f} s, written to {path}"
        )
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def write_results(trainer: "MMSTTrainer", metrics: Mapping[str, float], **found: Any) -> Path:
    """
    Write `results.json` in the output directory, beside and renamed.

    Args:
        trainer ([`MMSTTrainer`]): the trainer, after training.
        metrics (`Mapping[str, float]`): of [`MMSTTrainer.evaluate`], with an `accuracy` among them.
        found: what else is to be kept: `model`, `dataset`, `peak_bytes`, `reserved_bytes`, `seconds`.

    Returns:
        `Path`: the file.
    """
    args, rows = trainer.args, stage_rows(metrics)
    end_to_end = trainer.partition.num_stages == 1 and args.transport_weight == 0
    results = {
        "method": "end-to-end" if end_to_end else "mmst",
        "accuracy": metrics["eval_accuracy"],
        "stage_accuracy": [row.accuracy for row in rows],
        "stage_loss": [row.loss for row in rows],
        "stage_transport": [row.transport for row in rows],
        **found,
        "turn_peak_bytes": trainer.peaks.by_name,
        "num_stages": trainer.partition.num_stages,
        "stages": trainer.partition.stages,
        **{name: getattr(args, name) for name in SETTINGS},
        "num_processes": args.world_size,
        "num_train_samples": len(trainer.train_dataset),
        "num_eval_samples": len(trainer.eval_dataset),
        "command": _command(),
        "device": asdict(_device(args.device)),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    path = Path(args.output_dir) / "results.json"
    write_json(path, results)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to the file `path`, beside and renamed; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda beside: beside.write_text(json.dumps(content, indent=2) + "\n"))


@dataclass(frozen=True)
class Device:
    """Where a run took place: type, name, and number of processors of the machine."""

    type: str
    name: str
    processors: int


def _device(device: Any) -> Device:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Device(device.type, name, os.cpu_count() or 1)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _command() -> str:
    """The command line, with the last parts of absolute paths only."""
    script = Path(sys.argv[0])
    words = [f"{script.parent.name}/{script.name}", *sys.argv[1:]]
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)
