"""The metrics of each stage, collected while the host's Trainer evaluates the model or predicts."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective

from ..cut.objectives import Objective
from ..cut.temporary_attributes import replaced
from ..records.results import ENSEMBLE
from .stage_parallel import AllStages
from .stage_run import StageRun
from .stage_scores import StageScores
from .task_loss import TaskLoss


def unpack(packed: Any) -> tuple[Any, Sequence[Any]]:
    """The model's predictions and each head's logits, as they were gathered; lists where batches are not joined."""
    if not isinstance(packed, list):
        return packed or (None, ())
    predictions, logits = zip(*packed, strict=True)
    return [*predictions], [[*batches] for batches in zip(*logits, strict=True)]


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


class StageEvaluation:
    """
    One evaluation or prediction loop, in which the metrics of all stages are collected beside the model's own.

    Without `compute`, or where only losses are asked for, there are still losses, transport and, of language models,
    perplexities (the exponentials of the losses); no logits are kept then.

    Args:
        objective ([`Objective`]): the task.
        stages ([`AllStages`]): brings together what the processes have, where they share out the stages.
        compute (`Callable`, *optional*), preprocess (`Callable`, *optional*), pad: as in [`StageMetrics`].
    """

    def __init__(
        self,
        objective: Objective,
        stages: AllStages,
        compute: Callable[[EvalPrediction], dict] | None,
        preprocess: Callable | None,
        pad: Callable[[tuple], tuple],
    ):
        self._objective, self._stages, self._scores = objective, stages, StageScores()
        self._metrics: StageMetrics | None = None
        if compute is not None:
            losses = lambda apart: stages.scores_of_all(self._scores).losses(apart)  # noqa: E731
            self._metrics = StageMetrics(compute, preprocess, pad, stages.predictions_of_all, losses)

    @contextlib.contextmanager
    def in_place_of_metrics(self, trainer: Any) -> Iterator[None]:
        """Within this context the host's Trainer asks for the metrics of each stage where it asks for the user's."""
        with contextlib.ExitStack() as stack:
            if self._metrics is not None:
                stack.enter_context(replaced(trainer, "compute_metrics", self._metrics.compute_packed))
                stack.enter_context(replaced(trainer, "preprocess_logits_for_metrics", self._metrics.preprocess_packed))
            yield

    @contextlib.contextmanager
    def batch(
        self, task: TaskLoss, inputs: Mapping[str, Any], loss_only: bool, gather: Callable
    ) -> Iterator[list[torch.Tensor | None]]:
        """
        Within this context the host predicts a batch.

        Args:
            task ([`TaskLoss`]): the loss of a head's logits.
            inputs (`Mapping[str, Any]`): of the model.
            loss_only (`bool`): whether no logits are kept.
            gather (`Callable`): gathers a tensor `[B, ...]` of all processes.

        Yields:
            `list`: to be filled with what the host has found: the loss, if there is one, first.
        """
        labels = task.labels_of(inputs)
        losses: list[torch.Tensor] = []
        found: list[torch.Tensor | None] = []
        keeps = self._metrics is not None and not loss_only
        tokens = None if keeps else task.tokens(labels)
        criterion = functools.partial(task.of, labels=labels, tokens=tokens)

        def read(logits: torch.Tensor) -> torch.Tensor | None:
            if labels is not None:
                losses.append(criterion(logits))
            return logits if keeps else None

        with self._stages.observing(task.staged, inputs, read, criterion, tokens) as view:
            yield found
        if found[0] is not None and labels is not None:
            losses.append(found[0])  # of the model's own head
        else:
            losses.clear()
        self._scores.add(view.movements, losses[: len(view.movements)], gather)
        if self._metrics is not None and keeps:
            self._metrics.heads = tuple(view.logits)

    def with_stages(self, output: EvalLoopOutput, prefix: str) -> tuple[EvalLoopOutput, set[str]]:
        """The output of the host's loop with the metrics of the stages, and the names of these."""
        predictions, own = self._stages.from_last((output.predictions, output.metrics))
        metrics, scores = self._metrics, self._stages.scores_of_all(self._scores)
        found = {**(metrics.by_stage if metrics else {}), **scores.means(perplexity=self._objective.head == "own")}
        by_stage = {f"{prefix}_{name}": value for name, value in found.items()}
        by_stage = {name: value for name, value in by_stage.items() if name not in own}
        predictions = unpack(predictions)[0] if metrics and metrics.packed else predictions
        return EvalLoopOutput(predictions, output.label_ids, {**own, **by_stage}, output.num_samples), {*by_stage}


def evaluated(
    trainer: Any, run: StageRun, host: Callable[[], EvalLoopOutput], prefix: str
) -> tuple[EvalLoopOutput, set[str]]:
    """What the host's evaluation loop finds, with the metrics of stages, and the names of these."""
    pad = functools.partial(trainer.accelerator.pad_across_processes, dim=1, pad_index=-100)
    compute = None if trainer.args.batch_eval_metrics else trainer.compute_metrics
    found = StageEvaluation(run.staged.objective, run.stages, compute, trainer.preprocess_logits_for_metrics, pad)
    with replaced(trainer, "_evaluation", found), found.in_place_of_metrics(trainer), run.stages.flowing():
        output = host()
    return found.with_stages(output, prefix)


def objective_of_model(metrics: Mapping[str, float], of_stages: Collection[str]) -> float:
    """The default objective of a search of hyper-parameters, without the metrics of stages, which `of_stages` names."""
    return default_compute_objective({name: value for name, value in metrics.items() if name not in of_stages})
