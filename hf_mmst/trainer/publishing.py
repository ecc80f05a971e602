"""What a run tells of itself: its results, and the model card made of them."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging

from ..cut.example_inputs import first_batch
from ..memory.peaks import TurnPeaks
from ..memory.residency import Residency
from ..planning.budget import planned_peak
from ..records.card import CardContent, task_of, write_card
from ..records.pictures import PictureCallback, write_picture
from ..records.results import run_results
from .checkpoints import StageCheckpoints

logger = logging.get_logger(__name__)
FILE_FORMATS = ("csv", "json", "pandas", "parquet", "text", "imagefolder", "audiofolder", "generator")


class StageCards(StageCheckpoints):
    """The results and model cards of [`MMSTTrainer`]."""

    peaks: TurnPeaks
    data_collator: Any
    _residency: Residency | None
    _streams: contextlib.ExitStack

    def results(self, metrics: Mapping[str, Any], **found: Any) -> dict[str, Any]:
        """
        What is known of the run after training, ready for JSON, see [`run_results`].

        Args:
            metrics (`Mapping[str, Any]`): of [`evaluate`].
            found: what else is to be kept.
        """
        model = unwrap_peft_model(self._core())
        config = getattr(model, "config", None)
        batch = self._first_batch(self.args.per_device_train_batch_size) or {}
        shared_out = self.args.stage_parallel  # what one process takes is not planned yet
        pixels, name = batch.get("pixel_values"), getattr(config, "_name_or_path", "")
        with self._not_streaming():
            known_ways = "labels" in batch and self.partition.layers and not shared_out
            planned = planned_peak(self.args, self._core(), batch) if known_ways else None
        known = {
            "task": task_of(model),
            "model": type(model).__name__,
            "base_model": name if name and not Path(name).exists() else None,
            "num_labels": getattr(config, "num_labels", None),
            "input_shape": list(pixels.shape[1:]) if self.processing_class is None and pixels is not None else None,
            "peak_bytes": max(self.peaks.by_name.values(), default=None),
            "planned_bytes": None if planned is None else planned.total,
        }
        return run_results(self.args, self.partition, metrics, **{**known, **found})

    def picture_callback(self) -> PictureCallback:
        """What sends pictures of the stages to the loggers that show them."""
        return PictureCallback(
            lambda: self.callback_handler.callbacks, self.peaks.by_name, lambda: self.results({})["planned_bytes"]
        )

    @functools.wraps(Trainer.create_model_card)
    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
    ):
        if not self.args.model_card or not self.is_world_process_zero():
            return
        try:
            evaluations = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
            dataset_of_hub = getattr(self.eval_dataset or self.train_dataset, "builder_name", None)
            found = [] if dataset_of_hub in (None, *FILE_FORMATS) else [dataset_of_hub]
            results = self.results(evaluations[-1] if evaluations else {})
            content = CardContent.from_results(
                results,
                self.hub_model_id or model_name or Path(self.args.output_dir).name,
                base_model=finetuned_from,
                task=_listed(tasks)[0] if tasks else None,
                dataset=", ".join(_listed(dataset) or found),
                datasets=_listed(dataset_tags) or found,
                language=_listed(language),
                license=license,
                tags=_listed(tags),
                library="peft" if hasattr(self._core(), "peft_config") else "transformers",
            )
            folder = self.args.output_dir
            picture = write_picture(folder, self.state.log_history, self.peaks.by_name, results["planned_bytes"])
            write_card(folder, content, picture)
        except Exception as error:  # a card must not end a run
            logger.warning(f"hf_mmst wrote no model card ({type(error).__name__}: {error}). Set model_card=False.")

    @contextlib.contextmanager
    def _not_streaming(self) -> Iterator[None]:
        """Without the hooks by which layers stream through the device during training, which no plan can follow."""
        residency = self._residency
        if residency is None or not residency.is_streaming:
            yield
            return
        self._streams.close()
        try:
            yield
        finally:
            self._streams.enter_context(residency.streaming())

    def _first_batch(self, num_samples: int) -> Any:
        """The first samples of the data as the model gets them, drawn without a trace; `None` if there is no data."""
        dataset: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()), None)
        collate = self._get_collator_with_removed_columns(self.data_collator, description="planning")
        return None if dataset is None else first_batch(dataset, num_samples, collate)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
