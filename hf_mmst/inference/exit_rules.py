"""`ExitRule`: at which stage a sample leaves. Also curves of accuracy against layers run, and temperatures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..cut.partition import Partition


@dataclass(frozen=True)
class ExitRule:
    """
    The rule by which a sample leaves at a stage.

    Args:
        threshold (`float`, *optional*, defaults to 0.9):
            A sample leaves at the first stage whose head gives one class at least this probability. Above 1 none does.
        patience (`int`, *optional*):
            In the place of the threshold: a sample leaves when this many heads in a row have agreed with the head
            before them.
        temperatures (`tuple[float, ...]`, *optional*):
            Of each of the K stages, by which its logits are divided, see [`calibrate`]; 1 by default.
        ensemble (`bool`, *optional*, defaults to `False`):
            A stage answers with the mean of the logits of all heads up to it, each divided by its temperature (the
            ensemble of Sedona, Pyeon et al., 2021). With a threshold above 1, all K heads answer together.

    Raises:
        `ValueError`: for a threshold or temperature that is not positive, a patience below 1, or another type.
    """

    threshold: float = 0.9
    patience: int | None = None
    temperatures: tuple[float, ...] = ()
    ensemble: bool = False

    def __post_init__(self):
        if not _is_positive(self.threshold):
            raise ValueError(
                f"threshold={self.threshold!r} is not above 0. Set it to a probability, or above 1 for no early exit."
            )
        if self.patience is not None and (type(self.patience) is not int or self.patience < 1):
            raise ValueError(
                f"patience={self.patience!r} is not a whole number of at least 1. Set it to 1 or more, or to None for "
                "the threshold."
            )
        if not isinstance(self.temperatures, tuple | list) or not all(map(_is_positive, self.temperatures)):
            raise ValueError(f"temperatures={self.temperatures!r} are not all above 0. Set them with calibrate.")
        if not isinstance(self.ensemble, bool):
            raise ValueError(f"ensemble={self.ensemble!r} is neither True nor False. Set it to one of them.")

    @property
    def asks_heads(self) -> bool:
        """Whether the auxiliary heads are needed."""
        return self.ensemble or self.patience is not None or self.threshold <= 1

    def answer(self, stage: int, logits: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """
        The answer of a stage: its logits, or the mean of the logits so far with `ensemble`.

        Args:
            stage (`int`): from 0.
            logits (`torch.Tensor`): of its head, `[B, num_labels]`.
            before (`torch.Tensor`, *optional*): the answer of the stage before, `[B, num_labels]`.
        """
        if not self.ensemble:
            return logits
        logits = logits / self._temperature(stage)
        return logits if before is None else before + (logits - before) / (stage + 1)

    def answers(self, logits: torch.Tensor) -> torch.Tensor:
        """The answers of all K stages, `[K, N, num_labels]`, from the logits of all."""
        found: list[torch.Tensor] = []
        for k, own in enumerate(logits):
            found.append(self.answer(k, own, found[-1] if found else None))
        return torch.stack(found)

    def confidence(self, stage: int, answer: torch.Tensor) -> torch.Tensor:
        """The highest probability in the answer `[B, num_labels]` of stage `stage` (from 0), `[B]`."""
        temperature = 1.0 if self.ensemble else self._temperature(stage)
        return (answer.float() / temperature).softmax(-1).amax(-1)

    def leaves(self, stage: int, answer: torch.Tensor, agreed: torch.Tensor) -> torch.Tensor:
        """Which samples leave at `stage`, `[B]`, given how many answers in a row have agreed, `[B]`."""
        return self.confidence(stage, answer) >= self.threshold if self.patience is None else agreed >= self.patience

    def _temperature(self, stage: int) -> float:
        return self.temperatures[stage] if self.temperatures else 1.0

    def decide(self, answers: torch.Tensor) -> torch.Tensor:
        """The stage (from 0) at which each sample leaves, `[N]`, given the answers of all, `[K, N, num_labels]`."""
        num_stages, num_samples = answers.shape[:2]
        stages = torch.full((num_samples,), num_stages - 1)
        agreed = torch.zeros(num_samples, dtype=torch.long)
        for k in range(num_stages - 1):
            if k > 0:
                agreed = (agreed + 1) * (answers[k].argmax(-1) == answers[k - 1].argmax(-1))
            stages[(stages == num_stages - 1) & self.leaves(k, answers[k], agreed)] = k
        return stages


@dataclass(frozen=True)
class HeadLogits:
    """
    Logits of all K stages for N samples, `[K, N, num_labels]`, and their labels, `[N]`; on the CPU.

    Raises:
        `ValueError`: if there are no samples, if a label is not the number of a class, or if a logit is not a number.
    """

    logits: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self):
        _, number, num_labels = self.logits.shape
        labels = self.labels
        if labels.shape != (number,) or labels.is_floating_point() or not number:
            raise ValueError(
                f"There are {number} samples, and labels of shape {[*labels.shape]} and {labels.dtype}. Pass one "
                "sample at least, and for each the number of its class."
            )
        if labels.min() < 0 or labels.max() >= num_labels:
            raise ValueError(
                f"Labels are from {labels.min()} to {labels.max()}, but the heads know {num_labels} classes. Pass "
                f"labels from 0 to {num_labels - 1}."
            )
        if self.logits.isnan().any():
            raise ValueError("Logits are not numbers (nan). Pass weights that are finite, and inputs that are.")


@dataclass(frozen=True)
class ExitPoint:
    """A rule, the accuracy (0 to 1) with it, and the mean number of layers run for a sample, those of heads too."""

    rule: ExitRule
    accuracy: float
    mean_layers: float


def exit_curve(
    rule: ExitRule, found: HeadLogits, partition: Partition, head_layers: int = 0, num_points: int = 50
) -> list[ExitPoint]:
    """
    Accuracy against mean number of layers, from the most early exits to none.

    Args:
        rule ([`ExitRule`]): whose threshold, or patience if that is set, is varied.
        found ([`HeadLogits`]): what the stages say, see [`EarlyExit.observe`].
        partition (`Partition`): the cut.
        head_layers (`int`, *optional*, defaults to 0): layers of each auxiliary head.
        num_points (`int`, *optional*, defaults to 50): number of thresholds, spread evenly over the samples.
    """
    num_stages, answers = len(found.logits), rule.answers(found.logits)
    if rule.patience is None:
        sure = torch.stack([rule.confidence(k, answers[k]) for k in range(num_stages - 1)] or [torch.ones(1)])
        levels = sure.double().flatten().quantile(torch.linspace(0, 1, num_points, dtype=torch.double)).tolist()
        rules = [replace(rule, threshold=level) for level in [*levels, 2.0]]
    else:
        rules = [replace(rule, patience=patience) for patience in range(1, num_stages + 1)]
    points = []
    for one in rules:
        stages, until = one.decide(answers), torch.tensor(layers_until(partition, one.asks_heads * head_layers))
        predictions = answers[stages, torch.arange(len(stages))].argmax(-1)
        accuracy = (predictions == found.labels).double().mean().item()
        points.append(ExitPoint(one, accuracy, until[stages].double().mean().item()))
    return points


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """
    T of least mean cross-entropy of `logits / T`, `[N, num_labels]`, between 1/100 and 100.

    The cross-entropy is convex in 1/T; its slope, mean of sum_j p_j z_j - z_y, is brought to 0 by bisection.
    """
    logits = logits.double()
    right = logits.gather(-1, labels[:, None])[:, 0].mean()
    low, high = math.log(0.01), math.log(100.0)
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((logits * math.exp(middle)).softmax(-1) * logits).sum(-1).mean()
        low, high = (low, middle) if expected > right else (middle, high)
    return math.exp(-middle)


def layers_until(partition: Partition, head_layers: int) -> Sequence[int]:
    """Number of layers from the first to the end of each stage, those of the auxiliary heads on the way too."""
    ends, heads = range(1, partition.num_stages + 1), partition.num_stages - 1
    return [sum(map(len, partition.stages[:k])) + head_layers * min(k, heads) for k in ends]


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
