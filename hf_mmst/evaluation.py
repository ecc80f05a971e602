"""What a forward pass shows of each stage, gathered along with the model's own predictions -> metrics of each stage."""

from collections.abc import Callable, Sequence
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
    """

    def __init__(self) -> None:
        self._movements: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []

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
        columns = [*movements, *(loss.float().expand(len(movements[0])) for loss in losses)]
        rows = gather(torch.stack(columns, 1)).cpu()
        self._movements.append(rows[:, : len(movements)])
        self._losses.append(rows[:, len(movements) :])

    @classmethod
    def joined(cls, parts: Sequence["StageScores"]) -> "StageScores":
        """The scores of all stages, of those of some stages each, for the same samples."""
        whole = cls()
        whole._movements = [torch.cat(rows, 1) for rows in zip(*(part._movements for part in parts), strict=True)]
        whole._losses = [torch.cat(rows, 1) for rows in zip(*(part._losses for part in parts), strict=True)]
        return whole

    def means(self, perplexity: bool = False) -> dict[str, float]:
        """`stage_<k>_loss`, its exponential `stage_<k>_perplexity` if asked for, `stage_<k>_transport`; k from 1."""
        moved, losses = (
            torch.cat(rows).double().mean(0) if rows else torch.empty(0) for rows in (self._movements, self._losses)
        )
        found = {"loss": losses, **({"perplexity": losses.exp()} if perplexity else {}), "transport": moved}
        return {f"stage_{k + 1}_{name}": one.item() for name, values in found.items() for k, one in enumerate(values)}


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
        predictions, logits = packed
        if self.preprocess is None:
            return packed
        return (self.preprocess(predictions, labels), tuple(self.preprocess(one, labels) for one in logits))

    def compute_packed(self, prediction: EvalPrediction) -> dict[str, float]:
        """The user's metrics of the model; `by_stage` gets those of each stage, `stage_<k>_<name>`, k from 1."""
        predictions, logits = self.join(prediction.predictions)
        for k, outputs in enumerate((*logits, predictions), start=1):
            metrics = self.compute(
                EvalPrediction(outputs, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
            )
            self.by_stage |= {f"stage_{k}_{name}": value for name, value in metrics.items()}
        return metrics
