"""What a forward pass shows of each stage, gathered along with the model's own predictions -> metrics of each stage."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from .stagewise import StageView


def pack(predictions: Any, view: StageView, losses: list[torch.Tensor]) -> tuple:
    """
    Pack the stages' results around the model's predictions, as a nest of tuples that the host pads and gathers.

    Args:
        predictions: what the model predicts for a batch of B samples.
        view (`StageView`): what was seen of the stages.
        losses (`list[torch.Tensor]`): the batch's mean loss of each of the K stages, or none of them.

    Returns:
        `tuple`: (predictions, scores `[B, K]` movements, then `[B, K]` losses if any, logits of each head).
    """
    scores = torch.stack([*view.movements, *(loss.float().expand(len(view.movements[0])) for loss in losses)], 1)
    return (predictions, scores, tuple(view.logits))


def unpack(packed: Any) -> Any:
    """The model's own predictions, out of what [`pack`] made; of each batch, where batches were not joined."""
    return [one[0] for one in packed] if isinstance(packed, list) else packed and packed[0]


class StageMetrics:
    """
    Stands in for the user's metric functions while predictions are packed, and applies them to each stage.

    Args:
        compute: the user's `compute_metrics`.
        preprocess: the user's `preprocess_logits_for_metrics`, or `None`.
        join: packed predictions of some stages to those of all, if only some are there.
    """

    def __init__(
        self,
        compute: Callable[[EvalPrediction], dict],
        preprocess: Callable | None,
        join: Callable[[Any], Any] = lambda packed: packed,
    ):
        self.compute, self.preprocess, self.join = compute, preprocess, join
        self.by_stage: dict[str, float] = {}

    def preprocess_packed(self, packed: tuple, labels: torch.Tensor) -> tuple:
        """The user's `preprocess_logits_for_metrics`, applied to the model's logits and to each head's."""
        predictions, scores, logits = packed
        if self.preprocess is None:
            return packed
        return (self.preprocess(predictions, labels), scores, tuple(self.preprocess(one, labels) for one in logits))

    def compute_packed(self, prediction: EvalPrediction) -> dict[str, float]:
        """The user's metrics of the model; `by_stage` gets those of each stage, `stage_<k>_<name>`, k from 1."""
        predictions, scores, logits = self.join(prediction.predictions)
        num_stages = len(logits) + 1
        means = np.asarray(scores, dtype=np.float64).mean(0)
        for k, outputs in enumerate((*logits, predictions), start=1):
            metrics = self.compute(
                EvalPrediction(outputs, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
            )
            self.by_stage |= {f"stage_{k}_{name}": value for name, value in metrics.items()}
            if len(means) > num_stages:
                self.by_stage[f"stage_{k}_loss"] = float(means[num_stages + k - 1])
            self.by_stage[f"stage_{k}_transport"] = float(means[k - 1])
        return metrics
