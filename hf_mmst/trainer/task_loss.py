"""The task's loss of a stage, as the host's Trainer takes it of the model's own logits, and what it is a mean over."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from ..config import MMSTConfig
from ..cut.chosen_tokens import ChosenTokens
from ..cut.objectives import objective_of
from .learning import StageLearning
from .staging import StagedModel


@dataclass(frozen=True)
class TaskLoss:
    """
    The loss of a head's logits.

    Args:
        args ([`MMSTConfig`]), staged ([`StagedModel`]): of the run.
        label_names (`Sequence[str]`): entries of a batch that are labels.
        loss_func (`Callable`, *optional*): the user's `compute_loss_func`.
        label_smoother (`LabelSmoother`, *optional*): the host's.
        num_processes (`int`): over which the host averages.
    """

    args: MMSTConfig
    staged: StagedModel
    label_names: Sequence[str]
    loss_func: Callable | None
    label_smoother: Callable | None
    num_processes: int

    def labels_of(self, batch: Mapping[str, Any]) -> Any:
        """The labels of which a stage learns, or `None`."""
        return batch.get(self._label_name)

    @property
    def _label_name(self) -> str:
        return "labels" if "labels" in self.label_names or not self.label_names else self.label_names[0]

    def refuse_no_labels(self, batch: Mapping[str, Any]) -> None:
        """
        Raises:
            `ValueError`: if the batch has no labels for the stages' own losses.
        """
        if self.labels_of(batch) is None and not self.staged.uses_model_loss:
            raise ValueError(
                f"The batch has no {self._label_name}, only {', '.join(batch)}: every stage learns from it. Give the "
                "dataset such a column, or set label_names to the one that it has; remove_unused_columns=False keeps "
                "columns that the model does not know."
            )

    def tokens(self, labels: Any) -> ChosenTokens | None:
        """The tokens whose logits the loss of a head looks at, if it need not have those of others."""
        is_known = self.loss_func is None and self.label_smoother is None
        return self.staged.objective.tokens(labels) if is_known and self.staged.packs_tokens else None

    def of(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items: Any = None, tokens: ChosenTokens | None = None
    ) -> torch.Tensor:
        """
        A scalar.

        Args:
            logits (`torch.Tensor`), labels (`torch.Tensor`): of a micro-batch.
            num_items (`int` or `torch.Tensor`, *optional*): labels of its optimizer step that count.
            tokens ([`ChosenTokens`], *optional*): that the logits are of; all by default.
        """
        if self.loss_func is not None:
            loss = self.loss_func(SequenceClassifierOutput(logits=logits), labels, num_items_in_batch=num_items)
            scaled = self.args.average_tokens_across_devices and num_items is not None
            return loss * self.num_processes if scaled else loss
        objective = self.staged.objective
        if self.label_smoother is not None:
            return self.label_smoother({"logits": logits}, labels, shift_labels=objective.shifts)
        if tokens is not None:
            return objective.loss_of(tokens, logits, labels)
        return objective.loss(logits, labels, getattr(self.staged.model, "config", None))

    def share_of_step(self, labels: Any, learning: StageLearning, num_micro_batches: int) -> float:
        """
        The share that a micro-batch has of its optimizer step, by which the mean loss of it is weighed.

        By labels that count, so that the loss is the mean over the step's, if it is known which the model's loss
        counts; else all micro-batches have the same share, as in the host. 1 for `compute_loss_func`, which divides.
        """
        if self.loss_func is not None:
            return 1.0
        if not torch.is_tensor(labels) or objective_of(self.staged.model) is None:
            return 1 / num_micro_batches
        return learning.share_of_labels(labels)
