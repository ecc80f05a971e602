"""The feature cache of a run: samples that are found again, and the inputs of the stage that learns."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import MMSTConfig
from ..cut.temporary_attributes import replaced
from ..memory.feature_cache import FeatureCache, upstream_hash
from ..memory.sample_keys import KEYS, FixedViews, KeyedCollator, check_fixed
from ..method.order import Segment
from .refusals import refuse_other_loader
from .staging import StagedModel


class Features:
    """
    The feature cache of a run, if it has one, and the fixed views of its samples.

    Args:
        args ([`MMSTConfig`]): the settings of the run.
    """

    def __init__(self, args: MMSTConfig):
        self._args = args
        self._cache: FeatureCache | None = None
        self._views: FixedViews | None = None
        self._keys: list[int] = []  # of the batch at hand
        self._kept: torch.Tensor | None = None

    def loader(self, trainer: Any, load: Callable[[Any], Any], dataset: Any, staged: StagedModel) -> Any:
        """
        The data loader of a training run, whose batches have the keys of their samples.

        Args:
            trainer (`Trainer`): whose collator it is.
            load (`Callable`): makes a loader of a dataset, with the trainer's collator.
            dataset (`Dataset`): what is trained on.
            staged ([`StagedModel`]): what is trained.

        Raises:
            `ValueError`: if samples cannot be found again.
        """
        args, caches = self._args, self._args.feature_cache != "none"
        if not caches and not args.cache_views:
            return load(dataset)
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"A {type(dataset).__name__} has no length, so that features cannot be found again by its samples. Set "
                'feature_cache="none" and leave cache_views unset, or pass a dataset with a length.'
            )
        if args.cache_views:
            dataset = self._views = FixedViews(dataset, args.cache_views, args.seed)
        if not caches:
            return load(dataset)
        keyed = KeyedCollator(trainer.data_collator, trainer.label_names, staged.ignores_padding)
        with replaced(trainer, "data_collator", keyed):
            loader = load(dataset)
        check_fixed(loader.dataset, loader.collate_fn)
        folder = Path(args.output_dir) / f"_feature_cache_{args.process_index}"
        capacity = len(dataset) * (args.cache_views or 1)
        upstream = functools.partial(_upstream, staged, str(trainer.accelerator.mixed_precision))
        self._cache = FeatureCache(args.feature_cache, folder, capacity, upstream)
        return loader

    def refuse_other_loader(self, trainer: str) -> None:
        """
        Raises:
            `ValueError`: if the loader was not made by [`loader`], although features are to be found again.
        """
        args = self._args
        if (args.feature_cache != "none" and self._cache is None) or (args.cache_views and self._views is None):
            refuse_other_loader(trainer)

    def begin_epoch(self, epoch: int) -> None:
        """Show the views of `epoch`, from 0."""
        if self._views is not None:
            self._views.epoch = epoch

    def begin_step(self, turn: Segment) -> None:
        """Make ready for the stages of `turn`."""
        if self._cache is not None and not turn.end_to_end:
            self._cache.begin(turn.stages[0])

    def take_keys(self, inputs: dict[str, Any], ignores_padding: bool) -> None:
        """Take the keys of the samples, which no model knows, out of a batch."""
        self._keys = inputs.pop(KEYS).tolist() if KEYS in inputs else []
        self._kept = inputs.get("attention_mask") if ignores_padding else None

    def get(self, stage: int) -> tuple[int, torch.Tensor] | None:
        """The input of `stage` for the batch, or else of the stage before, with the number of it, if one is kept."""
        return self._cache.get(stage, self._keys, self._kept) if self._cache is not None else None

    def add(self, stage: int, features: torch.Tensor | None, given: tuple[int, torch.Tensor] | None) -> None:
        """Keep the input of `stage` for the batch, unless that is what [`get`] has given."""
        if self._cache is not None and features is not None and (given is None or given[0] < stage):
            self._cache.add(stage, self._keys, self._kept, features)

    def flush(self) -> None:
        """Keep the features on the disk, for a run that resumes, and let go of them here."""
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.flush()

    def delete(self) -> None:
        """Forget all features, on disk as well."""
        if self._cache is not None:
            self._cache.delete()


def _upstream(staged: StagedModel, precision: str, stage: int) -> dict[str, Any]:
    """What the features that `stage` gets depend on, beside the samples."""
    upstream = {
        "model": upstream_hash(staged.model, staged.partition, stage),
        "stages": staged.partition.stages[:stage],
        "precision": precision,
    }
    if staged.offload is not None:
        staged.offload.let_go()
    return upstream
