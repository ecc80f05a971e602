"""How stages learn from a micro-batch: what it counts in its optimizer step, when a stage steps, what is logged."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..config import MMSTConfig
from ..cut.chosen_tokens import ChosenTokens
from ..distributed.reduction import Reduction
from ..distributed.wrappers import Wrapper
from ..memory.layer_offload import LayerOffload
from ..method.order import Segment
from ..method.stepping import step_stage, steps_elementwise
from ..method.training_pass import StageStep
from .features import Features
from .stage_parallel import AllStages
from .staging import StagedModel
from .watch import Watch

Mean = Callable[[torch.Tensor], torch.Tensor]  # over the processes


class StageLearning:
    """
    Runs the micro-batches of an optimizer step by which stages learn.

    Losses are means over the samples (of tokens: over the labels that count) of an optimizer step, however it is split
    into micro-batches and processes.

    Args:
        args ([`MMSTConfig`]): the settings of the run.
        staged ([`StagedModel`]): what learns.
        stages ([`AllStages`]): which stages this process has, and how activations go on to the next one.
        features ([`Features`]): the inputs of stages that are cached.
        watch ([`Watch`]): refuses what a custom trainer must not do in a training step.

    Attributes:
        reduction ([`Reduction`], *optional*): averages the gradients of stages over several processes.
        sums (`torch.Tensor`): `[K, 3]`, of the losses, the transports and the optimizer steps since the last log.
    """

    def __init__(self, args: MMSTConfig, staged: StagedModel, stages: AllStages, features: Features, watch: Watch):
        self._args, self._staged = args, staged
        self._stages, self._features, self._watch = stages, features, watch
        self.reduction: Reduction | None = None
        self.sums = torch.zeros(staged.num_stages, 3)
        self._step_labels, self._step_samples = 0.0, 0.0
        self._early_norms: list[torch.Tensor] = []  # of the gradients of stages that have stepped already
        self._shares_gradients = False

    # ---- What a micro-batch counts ----

    def begin_micro_batches(self, batches: Iterable[Any], labels_of: Callable[[Any], Any], mean: Mean) -> None:
        """Count the labels and the samples of the micro-batches of an optimizer step: on average over processes."""
        labels = [labels_of(batch) for batch in batches if isinstance(batch, Mapping)]
        count = self._staged.objective.count
        numbers = sum(count(some) for some in labels), sum(len(some) for some in labels if torch.is_tensor(some))
        counts = torch.tensor([float(number) for number in numbers])
        if self._args.average_tokens_across_devices:
            counts = mean(counts)
        self._step_labels, self._step_samples = counts.tolist()

    def share_of_labels(self, labels: Any) -> float:
        """The share that a micro-batch has of the labels of its optimizer step."""
        count = self._staged.objective.count(labels)
        return count / (self._step_labels or count) if count else 0.0

    # ---- One micro-batch ----

    def loss(
        self,
        forward: Callable[[], tuple[torch.Tensor, Any]],
        turn: Segment,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        share: float,
        criterion: Callable[[torch.Tensor], torch.Tensor],
        tokens: ChosenTokens | None,
        optimizer: torch.optim.Optimizer,
        wrapper: Wrapper,
    ) -> tuple[torch.Tensor, Any]:
        """
        Let the stages of `turn` learn from a micro-batch, but for the last of them, whose loss is returned.

        Args:
            forward (`Callable`): the host's forward pass, to its loss and the model's outputs.
            turn ([`Segment`]): which stages learn.
            labels (`torch.Tensor`): of the micro-batch.
            mask (`torch.Tensor`, *optional*): `[B, N]`, 1 for tokens that count.
            share (`float`): the share that the micro-batch has of its optimizer step.
            criterion (`Callable`): logits of a head to the task's loss, a scalar.
            tokens ([`ChosenTokens`], *optional*): whose logits it gets; all by default.
            optimizer, wrapper: of the run.
        """
        args, staged = self._args, self._staged
        self._watch.learn(stepped=bool(self._early_norms))
        weigh, scale = _weighing(share)
        first, last = turn.stages[0], turn.stages[-1]
        # Transport is a mean over samples, whatever number of labels they have.
        number = len(labels) if torch.is_tensor(labels) else 0
        samples = number / (self._step_samples or number) if number else scale
        weights = [staged.weights[stage] * samples / scale for stage in range(staged.num_stages)]
        given = self._features.get(first) or self._stages.take()
        learning = staged.engine.step(
            criterion=lambda logits: weigh(criterion(logits)),
            weights=weights,
            stages=turn.stages,
            mask=mask,
            backward=lambda loss, **retain: wrapper.backward(loss * scale, **retain),
            learned=functools.partial(self._step_early, optimizer, wrapper),
            given=given and (given[0], given[1].to(args.device)),
            to_the_end=staged.uses_model_loss,
            tokens=tokens,
        )
        with wrapper.forward(staged.model, staged.partition), learning as step:
            loss, outputs = forward()
        self._stages.hand_on(step.output)
        self._features.add(first, step.features, given)
        loss = weigh(loss)
        step.losses[last] = loss.detach()
        self._record(step, scale, samples)
        if weights[last] > 0:
            loss = loss + weights[last] * step.transport
        loss = loss * scale
        self._watch.awaits(loss)
        return loss, outputs

    def _step_early(self, optimizer: torch.optim.Optimizer, wrapper: Wrapper, stage: int, shared: bool) -> None:
        """
        Step a stage right after its backward, where that makes no difference but to memory.

        With several processes its gradients are sent to the others, and the stage before it, whose are back, steps.
        """
        if shared and not wrapper.takes_shared:
            raise ValueError(
                f"The layers of {type(self._staged.model).__name__} share an input that learns, such as a position "
                "bias, and DeepSpeed cannot add up its gradients over the stages. Use FSDP, or set num_stages=1."
            )
        args, accelerator = self._args, wrapper.accelerator
        self._shares_gradients |= shared
        if self.reduction is not None and accelerator.sync_gradients:
            if not self._shares_gradients:
                self.reduction.start(stage)
            stage -= 1
        if (
            not self._shares_gradients
            and (args.stage_clipping or args.max_grad_norm == 0)
            and args.gradient_accumulation_steps == 1
            and stage >= 0
            and wrapper.steps_alone
            and not isinstance(self._staged.offload, LayerOffload)  # which puts gradients to rest later
            and accelerator.scaler is None
            and steps_elementwise(optimizer)
        ):
            if self.reduction is not None:
                self.reduction.wait(stage)
            norm = step_stage(optimizer, self._staged.parameters, stage, args.max_grad_norm or math.inf)
            self._early_norms.append(norm)

    # ---- What is logged ----

    def _record(self, step: StageStep, scale: float, samples: float) -> None:
        """Add what a micro-batch found, whose shares of its optimizer step are `scale` and, in samples, `samples`."""
        for stage, loss in step.losses.items():
            loss, moved = scale * loss.float(), samples * step.transports[stage]
            self.sums = self.sums.to(loss.device)
            self.sums[stage] += torch.stack([loss, moved, torch.full_like(loss, samples)])
            self._staged.weights.observe(stage, loss, moved)

    def read_log(self, mean: Mean) -> dict[str, float]:
        """`stage_<k>_loss` and `stage_<k>_transport` of each stage that has learned since the last log, k from 1."""
        logs = {}
        for k, (loss, moved, steps) in enumerate(mean(self.sums).tolist(), start=1):
            if steps > 0:
                logs[f"stage_{k}_loss"], logs[f"stage_{k}_transport"] = loss / steps, moved / steps
        self.sums.zero_()
        return logs

    def bring_together(self, loss: torch.Tensor, norm: Any) -> Any:
        """Make loss, sums and the norm of the gradients, which is returned, those of all stages, to be logged."""
        if not self._stages.are_shared:
            return norm
        found = self._stages.gather((loss.item(), float(norm), self.sums.cpu()))
        losses, norms, sums = zip(*found, strict=True)
        loss.fill_(losses[-1])
        self.sums = torch.stack(sums).sum(0)
        return math.hypot(*norms)

    def norm_with_early(self, norm: Any) -> Any:
        """The norm of the gradients of all stages, `norm` being of those that have not stepped early."""
        if self._early_norms:
            norm = torch.linalg.vector_norm(torch.stack([norm, *self._early_norms]))
            self._early_norms.clear()
        return norm

    # ---- What is left behind ----

    def begin_step(self) -> None:
        """Forget a step that was broken off."""
        self._early_norms.clear()

    def forget(self) -> None:
        """Leave nothing of a run behind."""
        Reduction.forget(self._staged.model)
        self._early_norms.clear()
        self.sums.zero_()


def weighed(loss: torch.Tensor, share: float) -> torch.Tensor:
    """A mean loss over a micro-batch that has that share of its optimizer step."""
    weigh, scale = _weighing(share)
    return weigh(loss) * scale


def _weighing(share: float) -> tuple[Callable[[Any], Any], float]:
    """How a mean loss is weighed: the mean of no labels is not a number, and has no gradient."""
    return (torch.nan_to_num, 1.0) if share == 0 else (lambda loss: loss, share)
