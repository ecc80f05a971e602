"""Results of a finished run as plain data: metrics of each stage, settings, memory, device, versions."""

import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from ..config import MMSTConfig
from ..cut.partition import Partition
from .reading import damaged, read_json

PACKAGES = ("hf-mmst", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "timm")
SETTINGS = (
    "stage_order",
    "num_laps",
    "end_to_end_laps",
    "stage_objective",
    "head_pooling",
    "head_layers",
    "head_learning_rate",
    "stage_learning_rate_decay",
    "transport_weight",
    "transport_norm",
    "transport_schedule",
    "stage_clipping",
    "offload",
    "resident_layers",
    "layer_batch_size",
    "offloaded_step",
    "feature_cache",
    "activation_checkpointing",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "seed",
)
ENSEMBLE = "ensemble"  # begins the names of metrics of all heads together
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def standard_error(accuracy: float, num_samples: int) -> float:
    """The standard error of an accuracy (0 to 1) that was found with that many samples, each right or wrong."""
    return math.sqrt(accuracy * (1 - accuracy) / num_samples)


def split_metrics(
    metrics: Mapping[str, Any], prefix: str = "eval"
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """
    Split what [`MMSTTrainer.evaluate`] returns into the model's own metrics and those of stages.

    Returns:
        `tuple[dict, dict]`: the model's own metrics by name, without those of speed; and the stages' by name, a value
        for each stage, from the first to the last.
    """
    own: dict[str, float] = {}
    stages: dict[str, list[float]] = {}
    for name, value in metrics.items():
        found = re.fullmatch(rf"{prefix}_(?:stage_(\d+)_)?(.+)", name)
        if found is None or found[2] in SPEED or not isinstance(value, int | float):
            continue
        if found[1] is None:
            own[found[2]] = value
        else:
            stages.setdefault(found[2], []).append(value)
    return own, {name: tuple(values) for name, values in stages.items()}


def run_results(args: MMSTConfig, partition: Partition, metrics: Mapping[str, Any], **found: Any) -> dict[str, Any]:
    """
    Results of a run as a dict for JSON. Nothing in it is secret: tokens on the command line are left out.

    Args:
        args ([`MMSTConfig`]): the run's settings.
        partition (`Partition`): the cut.
        metrics (`Mapping[str, Any]`): of [`MMSTTrainer.evaluate`].
        found: what else is to be kept: `model`, `dataset`, `task`, `peak_bytes`, `planned_bytes`, ...
    """
    own, stages = split_metrics(metrics)
    return {
        "method": "end-to-end" if partition.num_stages == 1 else "mmst",
        **({"accuracy": own["accuracy"]} if "accuracy" in own else {}),
        **{f"stage_{name}": list(values) for name, values in stages.items()},
        "metrics": own,
        **found,
        "num_stages": partition.num_stages,
        "stages": partition.stages,
        **{name: _plain(getattr(args, name)) for name in SETTINGS},
        "num_processes": args.distributed_state.num_processes if args.stage_parallel else args.world_size,
        **provenance(args.device),
    }


class _Device(TypedDict):
    type: str
    name: str


class _Results(TypedDict):
    num_stages: int
    stages: list[list[str]]
    command: str
    device: _Device
    versions: dict[str, str]


class _MoreResults(_Results, total=False):
    accuracy: float
    metrics: dict[str, float]
    model: str | None
    dataset: str | None
    task: str | None
    base_model: str | None
    input_shape: list[int] | None
    num_labels: int | None
    peak_bytes: int | None
    planned_bytes: int | None
    process_bytes: int | None
    num_eval_samples: int
    max_steps: int


def read_results(path: Path) -> dict[str, Any]:
    """
    What [`run_results`] has found, from its file.

    Raises:
        `OSError`: if it cannot be read.
        `ValueError`: if it does not hold the results of a run.
    """
    results = read_json(path, _MoreResults)
    if len(results["stages"]) != results["num_stages"]:
        raise damaged(path, f"num_stages is {results['num_stages']}, but stages has {len(results['stages'])} of them")
    if not {"accuracy", "metrics"} & results.keys():
        raise damaged(path, "metrics is missing")
    for name, values in results.items():
        if name.startswith("stage_") and isinstance(values, list) and {*map(type, values)} - {int, float}:
            raise damaged(path, f"{name} is {values}, not a list of numbers")
    return results


def provenance(device: Any) -> dict[str, Any]:
    """How and where numbers were made, on a `torch.device` or its name: `command`, `device`, `versions`, for JSON."""
    return {
        "command": command_line(sys.argv),
        "device": asdict(device_of(device)),
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


@dataclass(frozen=True)
class Device:
    """Where a run took place: type, name, and number of processors of the machine."""

    type: str
    name: str
    processors: int


def device_of(device: Any) -> Device:
    """The [`Device`] of a `torch.device` or its name."""
    import torch

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Device(device.type, name, os.cpu_count() or 1)


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of packages, of those that are installed; by default of those that a run depends on."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command_line(words: Sequence[str]) -> str:
    """A command line with the last parts of absolute paths only, and without tokens."""
    script = Path(words[0])
    shown = [script.name if script.name == "hf-mmst" else f"{script.parent.name}/{script.name}"]
    hidden = False
    for word in words[1:]:
        flag, equals, _ = word.partition("=")
        secret = re.fullmatch(r"--[\w-]*token", flag) is not None
        if hidden or re.search(r"\bhf_\w{8,}", word):
            shown.append("***")
        elif secret and equals:
            shown.append(f"{flag}=***")
        else:
            shown.append(Path(word).name if Path(word).is_absolute() else word)
        hidden = secret and not equals
    return shlex.join(shown)
