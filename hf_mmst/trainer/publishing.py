"""The results and the model card of a run."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging

from ..config import MMSTConfig
from ..planning.budget import planned_peak
from ..records.card import CardContent, task_of, write_card
from ..records.pictures import draw_training, write_picture
from ..records.results import run_results
from ..records.stage_table import print_stages
from .stage_run import StageRun, batch_to_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)
FILE_FORMATS = ("csv", "json", "pandas", "parquet", "text", "imagefolder", "audiofolder", "generator")


class Reports:
    """What a trainer tells of its run, beside the methods of the host: results, table and picture of the stages."""

    _run: StageRun

    def results(self, metrics: Mapping[str, Any], **found: Any) -> dict[str, Any]:
        """What is known of the run, ready for JSON, with `metrics` of [`evaluate`] and what else is `found`."""
        return results_of(self, self._run, metrics, **found)

    def stages(self) -> None:
        """Print the table of the stages, by the last evaluation."""
        print_stages(last_evaluation(self))

    def plot(self) -> "Figure | None":
        """The picture of the run so far, see [`draw_training`], which a notebook shows; `None` before the first log."""
        return draw_training(
            cast(Any, self).state.log_history, self._run.peaks.by_name, self.results({})["planned_bytes"]
        )


def last_evaluation(trainer: Any) -> Mapping[str, Any]:
    """What the last evaluation found; nothing if there was none."""
    logs = (entry for entry in reversed(trainer.state.log_history) if any(name.startswith("eval_") for name in entry))
    return next(logs, {})


def results_of(trainer: Any, run: StageRun, metrics: Mapping[str, Any], **found: Any) -> dict[str, Any]:
    """
    What is known of a run after training, ready for JSON, see [`run_results`].

    Args:
        trainer ([`MMSTTrainer`]), run ([`StageRun`]): whose run it is.
        metrics (`Mapping[str, Any]`): of an evaluation.
        found: what else is to be kept.
    """
    staged, args = run.staged, trainer.args
    model = unwrap_peft_model(staged.model)
    config = getattr(model, "config", None)
    batch = batch_to_plan(trainer) or {}
    pixels, name = batch.get("pixel_values"), getattr(config, "_name_or_path", "")
    shape = None if pixels is None or trainer.processing_class is not None else list(pixels.shape[1:])
    known = {
        "task": task_of(model),
        "model": type(model).__name__,
        "base_model": name if name and not Path(name).exists() else None,
        "num_labels": getattr(config, "num_labels", None),
        "input_shape": shape,
        "planned_bytes": _planned_bytes(run, args, batch),
        **{what: trainer.peaks.most(what) for what in ("peak_bytes", "reserved_bytes", "process_bytes")},
        **run.moved,
    }
    return run_results(args, staged.partition, metrics, **{**known, **found})


def _planned_bytes(run: StageRun, args: MMSTConfig, batch: Mapping[str, Any]) -> int | None:
    """The most bytes of tensors that the run holds by its plan, made once; `None` where there is no plan."""
    staged = run.staged
    in_parts = args.stage_parallel or args.shards_layers  # this process has a part of the model
    if "labels" not in batch or not staged.partition.layers or in_parts:
        return None
    with run.not_streaming():
        learns = [parameter.requires_grad for parameter in staged.model.parameters()]
        shapes = [(name, getattr(value, "shape", None)) for name, value in batch.items()]
        labels = batch["labels"]  # of tokens without one there may be no logits
        labels = labels.tolist() if torch.is_tensor(labels) else labels
        key = str((args.to_dict(), learns, shapes, labels))
        if key not in run.planned:
            planned = planned_peak(args, staged.model, batch)
            run.planned[key] = None if planned is None else planned.total
    return run.planned[key]


def publish_card(
    trainer: Any,
    language: Any = None,
    license: str | None = None,
    tags: Any = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: Any = None,
    dataset_tags: Any = None,
    dataset: Any = None,
    dataset_args: Any = None,
) -> None:
    """
    Write `README.md` and the picture of the stages into the output folder; an error is logged, and ends no run.

    Args:
        trainer ([`MMSTTrainer`]): whose run it is.
        language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args: as in
            `Trainer.create_model_card`; what the run knows better is taken from there.
    """
    args, history = trainer.args, trainer.state.log_history
    try:
        results = trainer.results(last_evaluation(trainer), **_number_of(trainer.eval_dataset))
        builder = getattr(trainer.eval_dataset or trainer.train_dataset, "builder_name", None)
        found = [] if builder in (None, *FILE_FORMATS) else [builder]
        content = CardContent.from_results(
            results,
            trainer.hub_model_id or model_name or Path(args.output_dir).name,
            base_model=finetuned_from,
            task=_listed(tasks)[0] if tasks else None,
            dataset=", ".join(_listed(dataset) or found),
            datasets=_listed(dataset_tags) or found,
            language=_listed(language),
            license=license,
            tags=_listed(tags),
            library="peft" if hasattr(trainer._core(), "peft_config") else "transformers",
        )
        picture = write_picture(args.output_dir, history, trainer.peaks.by_name, results["planned_bytes"])
        write_card(args.output_dir, content, picture)
    except Exception as error:  # a card must not end a run
        logger.warning(f"hf_mmst wrote no model card ({type(error).__name__}: {error}). Set model_card=False.")


def _number_of(dataset: Any) -> dict[str, int]:
    return {"num_eval_samples": len(dataset)} if isinstance(dataset, Sized) and not isinstance(dataset, Mapping) else {}


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
