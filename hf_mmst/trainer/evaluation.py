"""What a forward pass shows of each stage, gathered along with the model's own predictions -> metrics of each stage."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective

from ..cut.objectives import Objective
from ..cut.partition import Partition
from ..memory.residency import Residency
from ..records.results import ENSEMBLE


def unpack(packed: Any) -> tuple[Any, Sequence[Any]]:
    """The model's predictions and each head's logits, as they were gathered; lists where batches are not joined."""
    if not isinstance(packed, list):
        return packed or (None, ())
    predictions, logits = zip(*packed, strict=True)
    return [*predictions], [[*batches] for batches in zip(*logits, strict=True)]


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

    def losses(self, apart: bool) -> list[Any]:
        """Of each stage, the loss of each sample's batch, as the host gives the model's: by batches, if `apart`."""
        batches = [rows.numpy() for rows in self._losses]
        if apart:
            return [list(stage) for stage in zip(*(rows.T for rows in batches), strict=True)]
        return list(np.concatenate(batches).T)

    def means(self, perplexity: bool = False) -> dict[str, float]:
        """`stage_<k>_loss`, its exponential `stage_<k>_perplexity` if asked for, `stage_<k>_transport`; k from 1."""
        moved, losses = (
            torch.cat(rows).double().mean(0) if rows else torch.empty(0) for rows in (self._movements, self._losses)
        )
        found = {"loss": losses, **({"perplexity": losses.exp()} if perplexity else {}), "transport": moved}
        return {f"stage_{k + 1}_{name}": one.item() for name, values in found.items() for k, one in enumerate(values)}


class StageMetrics:
    """
    Stands in for the user's metric functions while each head's logits go along with the model's, and applies them to
    each stage.

    Args:
        compute: the user's `compute_metrics`.
        preprocess: the user's `preprocess_logits_for_metrics`, or `None`.
        pad: pads a nest of tensors to the size of the largest of all processes.
        join: predictions and logits of some stages to those of all, if only some are there.
        losses: the losses of each stage, see [`StageScores.losses`].

    Attributes:
        heads (`tuple[torch.Tensor, ...]`, *optional*): each head's logits of the batch at hand, if it shows them.
        packed (`bool`): whether they go along with the predictions; not if a custom trainer makes those by itself.
        by_stage (`dict[str, float]`): the metrics of the stages, see [`compute_packed`].
    """

    def __init__(
        self,
        compute: Callable[[EvalPrediction], dict],
        preprocess: Callable | None,
        pad: Callable[[tuple], tuple],
        join: Callable[[tuple[Any, Sequence[Any]]], tuple[Any, Sequence[Any]]],
        losses: Callable[[bool], list[Any]],
    ):
        self.compute, self.preprocess, self.pad, self.join, self.losses = compute, preprocess, pad, join, losses
        self.heads: tuple[torch.Tensor, ...] | None = None
        self.packed = False
        self.by_stage: dict[str, float] = {}

    def preprocess_packed(self, logits: Any, labels: torch.Tensor) -> Any:
        """What the user's `preprocess_logits_for_metrics` makes of the model's logits, and beside it of each head's."""
        heads, self.heads = self.heads, None
        self.packed = heads is not None
        found = [logits, *self.pad(heads or ())]
        if self.preprocess is not None:
            found = [self.preprocess(one, labels) for one in found]
        return (found[0], tuple(found[1:])) if self.packed else found[0]

    def compute_packed(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        The user's metrics of the model.

        `by_stage` gets those of each stage, `stage_<k>_<name>`, k from 1, and those of the mean of all stages' logits,
        `ensemble_<name>`, where the predictions are logits `[N, num_labels]` and nothing else. With
        `include_for_metrics=["loss"]` each stage's are of its own losses, and there are none of all together.
        """
        if not self.packed:
            return self.compute(prediction)
        predictions, logits = self.join(unpack(prediction.predictions))
        stages = {f"stage_{k}": outputs for k, outputs in enumerate((*logits, predictions), start=1)}
        losses: dict[str, Any] = {}
        if prediction.losses is not None:
            losses = dict(zip(stages, self.losses(isinstance(prediction.losses, list)), strict=False))
        elif logits and self.preprocess is None and isinstance(predictions, np.ndarray) and predictions.ndim == 2:
            stages = {ENSEMBLE: np.mean((*logits, predictions), 0), **stages}
        for stage, outputs in stages.items():
            metrics = self.compute(
                EvalPrediction(outputs, prediction.label_ids, inputs=prediction.inputs, losses=losses.get(stage))
            )
            self.by_stage |= {f"{stage}_{name}": value for name, value in metrics.items()}
        return metrics


class StageEvaluation(Trainer):
    """The evaluations and predictions of [`MMSTTrainer`], which sets the attributes below."""

    partition: Partition
    compute_metrics: Any
    preprocess_logits_for_metrics: Any
    _objective: Objective
    _residency: Residency | None
    _criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    _labels_of: Callable[[Any], Any]
    _observing: Any
    _of_all: Callable[[StageScores], StageScores]
    _joined: Callable[[Any], Any]
    _names_of_stages: frozenset[str] = frozenset()  # metrics that are not the model's own

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """
        As the host's, with the metrics, loss and transport of each stage, `eval_stage_<k>_accuracy` and so on, and
        the metrics of all heads together, `eval_ensemble_accuracy`, see [`StageMetrics`].

        Without `compute_metrics`, or with `prediction_loss_only`, there are still losses, transport and, of language
        models, perplexities (the exponentials of the losses); no logits are kept then.
        """
        loop = functools.partial(
            super().evaluation_loop, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        streaming: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._residency is not None and not self.is_in_train:
            streaming = self._residency.streaming()
        if self.partition.num_stages == 1:
            with streaming:
                return loop()
        scores, metrics = StageScores(), None
        if self.compute_metrics is not None and not self.args.batch_eval_metrics:
            pad = functools.partial(self.accelerator.pad_across_processes, dim=1, pad_index=-100)
            metrics = StageMetrics(
                self.compute_metrics,
                self.preprocess_logits_for_metrics,
                pad,
                self._joined,
                lambda apart: self._of_all(scores).losses(apart),
            )
        with streaming, self._collecting(scores, metrics):
            output = loop()
        found = {
            **(metrics.by_stage if metrics else {}),
            **self._of_all(scores).means(perplexity=self._objective.head == "own"),
        }
        by_stage = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        by_stage = {name: value for name, value in by_stage.items() if name not in output.metrics}
        self._names_of_stages |= by_stage.keys()
        predictions = unpack(output.predictions)[0] if metrics and metrics.packed else output.predictions
        return EvalLoopOutput(predictions, output.label_ids, {**output.metrics, **by_stage}, output.num_samples)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As the host's, whose default objective is that of the model's own metrics, without those of its stages."""
        return super().hyperparameter_search(hp_space, compute_objective or self._own_objective, *args, **kwargs)

    def _own_objective(self, metrics: dict[str, float]) -> float:
        return default_compute_objective({k: value for k, value in metrics.items() if k not in self._names_of_stages})

    @contextlib.contextmanager
    def _collecting(self, scores: StageScores, metrics: StageMetrics | None) -> Iterator[None]:
        self._stage_scores, self._stage_metrics = scores, metrics
        if metrics is not None:
            self.compute_metrics = metrics.compute_packed
            self.preprocess_logits_for_metrics = metrics.preprocess_packed
        try:
            yield
        finally:
            if metrics is not None:
                self.compute_metrics, self.preprocess_logits_for_metrics = metrics.compute, metrics.preprocess
            del self._stage_scores, self._stage_metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As the host's; while metrics are collected, the logits of every stage go along."""
        if not hasattr(self, "_stage_scores"):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        given, losses = self._labels_of(inputs), []
        metrics = None if prediction_loss_only else self._stage_metrics

        def read(logits: torch.Tensor) -> torch.Tensor | None:
            if given is not None:
                losses.append(self._criterion(logits, given))
            return logits if metrics is not None else None

        with self._observing(inputs, read) as view:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        losses = [] if loss is None or given is None else [*losses, loss][: len(view.movements)]
        self._stage_scores.add(view.movements, losses, self.gather_function)
        if metrics is not None:
            metrics.heads = tuple(view.logits)
        return loss, logits, labels
