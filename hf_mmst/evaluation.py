"""What a forward pass shows of each stage, gathered along with the model's own predictions -> metrics of each stage."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import EvalPrediction

from .stagewise import StageView


def pack(predictions: Any, view: StageView) -> tuple:
    """The model's predictions with the logits of each head, as a nest of tuples that the host pads and gathers."""
    return (predictions, tuple(view.logits))


def unpack(packed: Any) -> Any:
    """The model's own predictions, out of what [`pack`] made; of each batch, where batches were not joined."""
    return [one[0] for one in packed] if isinstance(packed, list) else packed and packed[0]


class StageScores:
    """
    The transport of each stage, and its loss, over all samples of an evaluation.

    Args:
        num_stages (`int`): K.
    """

    def __init__(self, num_stages: int):
        self.num_stages = num_stages
        self._rows: list[torch.Tensor] = []

    def add(
        self, movements: list[torch.Tensor], losses: list[torch.Tensor], gather: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """
        Add a batch of B samples.

        Args:
            movements (`list[torch.Tensor]`): of each sample in each stage, `[B]` each.
            losses (`list[torch.Tensor]`): the batch's mean loss of each stage, or none.
            gather (`Callable`): gathers a tensor `[B, ...]` of all processes.
        """
        rows = [*movements, *(loss.float().expand(len(movements[0])) for loss in losses)]
        self._rows.append(gather(torch.stack(rows, 1)).cpu())

    def means(self, perplexity: bool = False) -> dict[str, float]:
        """`stage_<k>_loss`, its exponential `stage_<k>_perplexity` if asked for, `stage_<k>_transport`; k from 1."""
        means = torch.cat(self._rows).double().mean(0) if self._rows else torch.empty(0)
        moved, losses = means[: self.num_stages], means[self.num_stages :]
        found = {"loss": losses, **({"perplexity": losses.exp()} if perplexity else {}), "transport": moved}
        return {f"stage_{k + 1}_{name}": one.item() for name, values in found.items() for k, one in enumerate(values)}


class StageMetrics:
    """
    Stands in for the user's metric functions while predictions are packed, and applies them to each stage.

    Args:
        compute: the user's `compute_metrics`.
        preprocess: the user's `preprocess_logits_for_metrics`, or `None`.
    """

    def __init__(self, compute: Callable[[EvalPrediction], dict], preprocess: Callable | None):
        self.compute, self.preprocess = compute, preprocess
        self.by_stage: dict[str, float] = {}

    def preprocess_packed(self, packed: tuple, labels: torch.Tensor) -> tuple:
        """The user's `preprocess_logits_for_metrics`, applied to the model's logits and to each head's."""
        predictions, logits = packed
        if self.preprocess is None:
            return packed
        return (self.preprocess(predictions, labels), tuple(self.preprocess(one, labels) for one in logits))

    def compute_packed(self, prediction: EvalPrediction) -> dict[str, float]:
        """The user's metrics of the model; `by_stage` gets those of each stage, `stage_<k>_<name>`, k from 1."""
        predictions, logits = prediction.predictions
        for k, outputs in enumerate((*logits, predictions), start=1):
            metrics = self.compute(
                EvalPrediction(outputs, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
            )
            self.by_stage |= {f"stage_{k}_{name}": value for name, value in metrics.items()}
        return metrics
