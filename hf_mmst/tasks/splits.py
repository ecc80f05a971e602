"""Which samples of a dataset are trained on and evaluated on, and the accuracy metric."""

import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import datasets
import evaluate
import numpy as np

from ..field_checks import check_fields, fraction, whole
from .dataset_loading import split_off


@dataclass
class SplitArguments:
    """Arguments of which part of a dataset is used."""

    max_train_samples: Annotated[int, whole(1, "unset: all")] | None = field(
        default=None, metadata={"help": "Train on this many samples at most."}
    )
    max_eval_samples: Annotated[int, whole(1, "unset: all")] | None = field(
        default=None, metadata={"help": "Evaluate on this many samples at most."}
    )
    validation_fraction: Annotated[float, fraction] = field(
        default=0.0,
        metadata={"help": "Evaluate on this part of the train split, not on the test split: to choose settings."},
    )

    def __post_init__(self):
        check_fields(self)


def choose_splits(
    splits: datasets.DatasetDict, data: SplitArguments, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The samples to train on and those to evaluate on; where only some are used, a random choice of them."""
    if data.validation_fraction > 0:
        splits = split_off(splits["train"], data.validation_fraction, seed)
    limits = {"train": data.max_train_samples, "test": data.max_eval_samples}
    train, test = (
        splits[name].shuffle(seed=0).select(range(min(limit, len(splits[name])))) if limit else splits[name]
        for name, limit in limits.items()
    )
    return train, test


def labels_of(splits: datasets.DatasetDict) -> dict[str, Any]:
    """`id2label` and `label2id` for a model's configuration."""
    names = splits["train"].features["label"].names
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


class Accuracy(evaluate.Metric):
    """Fraction of predictions that equal their reference."""

    def _info(self):
        kind = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Accuracy",
            citation="",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def accuracy_metric(process_index: int):
    """A `compute_metrics` that gives the accuracy, for one of several processes."""
    metric = Accuracy(keep_in_memory=True, experiment_id=f"{process_index}-{time.time_ns()}")
    return lambda found: metric.compute(predictions=found.predictions.argmax(-1), references=found.label_ids)
