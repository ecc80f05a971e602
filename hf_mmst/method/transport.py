"""The transport term: how far layers move the representation, and what weight that has in the loss over time."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LIMIT = 1e3  # of "relative"


def movement(
    x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None, norm: str = "relative"
) -> torch.Tensor:
    """
    How far a layer moves each sample: a norm of its residue r = y - x (the summand of the paper's equation 5).

    Args:
        x (`torch.Tensor`): the layer's input, `[B, N, D]` or `[B, C, H, W]`.
        y (`torch.Tensor`): its output, of the same shape.
        mask (`torch.Tensor`, *optional*): `[B, N]`, 1 for tokens that count, 0 for padding.
        norm (`str`): `"sum"`: ||r||^2 over tokens and features; `"mean"`: its mean over them;
            `"relative"`: ||r||^2 / ||x||^2, which has no unit, but 1,000 at most: a residue some thirty times as long
            as its input. Embeddings near 0, which a model from scratch may begin with, would else make it millions,
            beside which no loss counts.

    Returns:
        `torch.Tensor`: `[B]`, float32, not differentiable: [`transport`] is.
    """
    with torch.no_grad():
        moved = _squared_norm(_residue(x, y), mask)
        return moved * _scale(moved, x, mask, norm)


def transport(
    x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None, norm: str = "relative"
) -> torch.Tensor:
    """
    Mean over the batch of [`movement`], differentiable in `x` and `y` at no extra memory.

    Nothing is kept for the backward pass but `x` and `y` themselves, which the LayerNorms or linear maps of the model
    keep anyway; the residue is computed again from them. The divisor of `"relative"`, max(||x||^2, ||r||^2 / 1,000), is
    not differentiated, so that the gradient goes on pointing to less movement where the term is at its limit.
    Everything is computed in float32; where the stream itself is bfloat16, the residue carries the rounding of `y`,
    up to 2^-9 |y| an element, as the plain formula does.

    Returns:
        `torch.Tensor`: a scalar, float32.
    """
    return _Transport.apply(x, y, mask, norm)


class _Transport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, mask, norm):
        ctx.save_for_backward(x, y, mask)
        ctx.norm = norm
        return movement(x, y, mask, norm).mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, mask = ctx.saved_tensors
        residue = _residue(x, y)
        scale = 2 * grad_outputs[0] / x.shape[0] * _scale(_squared_norm(residue, mask), x, mask, ctx.norm)
        gradient = residue.mul_(scale.view(-1, *[1] * (x.dim() - 1)))
        if mask is not None:
            gradient.mul_(mask.unsqueeze(-1))
        grad_y = gradient.to(y.dtype)
        return (-grad_y).to(x.dtype) if ctx.needs_input_grad[0] else None, grad_y, None, None


def _residue(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.float() - x.float()


def _squared_norm(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """||x||^2 of each sample, `[B]`; squares are never stored for a whole batch of float32 input."""
    x = x.float()
    if mask is None:
        return torch.linalg.vector_norm(x.flatten(1), dim=1).square()
    return (torch.linalg.vector_norm(x, dim=-1).square() * mask).sum(1)


def _scale(moved: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, norm: str) -> torch.Tensor:
    """What `moved`, the ||r||^2 of each sample, is multiplied with, `[B]`."""
    if norm == "relative":
        return _squared_norm(x, mask).maximum(moved / LIMIT).clamp(min=1e-12).reciprocal()
    if norm == "sum":
        return torch.ones(x.shape[0], device=x.device)
    features = x[0].numel() if mask is None else mask.sum(1).clamp(min=1) * x.shape[-1]
    return torch.ones(x.shape[0], device=x.device) / features


class TransportWeights:
    """
    The weight of the transport term in each stage's loss, over time.

    - `"constant"`: w.
    - `"paper"`: w for the first half of the stages, w / 2 (doubled tau) for the second.
    - `"multipliers"`: w / lambda_k, with lambda_k = 1 at first and lambda_k += L_k every 50 of the stage's steps, L_k
      its mean task loss over them: Uzawa's method of multipliers with step size 1 (appendix D of the paper).
    - `"adaptive"`: 0.1 w L_k / T_k, renewed every 10 of the stage's steps from its mean task loss L_k and transport
      T_k over them: the transport term stays the same share of the loss, whatever the model or the task.

    Where L_k, or the T_k that divides it, is not positive and finite, the weight stays as it was.

    Args:
        schedule (`str`): one of the above.
        weight (`float`): w.
        num_stages (`int`): K.
    """

    INTERVAL = {"multipliers": 50, "adaptive": 10}
    ADAPTIVE_SHARE = 0.1

    def __init__(self, schedule: str, weight: float, num_stages: int):
        self.schedule, self.weight, self.num_stages = schedule, weight, num_stages
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._current = [self.weight / 2 if self._is_halved(k) else self.weight for k in range(self.num_stages)]
        self._multipliers = [1.0] * self.num_stages
        self._steps = [0] * self.num_stages
        self._sums = torch.zeros(self.num_stages, 2)

    def __getitem__(self, stage: int) -> float:
        return self._current[stage]

    def observe(self, stage: int, loss: torch.Tensor, transport: torch.Tensor, share: float = 1.0) -> None:
        """Add what one micro-batch, a `share` of its optimizer step's samples, found: two scalars, not read yet."""
        if self.schedule in self.INTERVAL:
            self._sums = self._sums.to(loss.device)
            self._sums[stage] += torch.stack([loss, transport]).detach().float() * share

    def step(self, stages: Sequence[int], mean: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Called after each optimizer step in which `stages` learned; `mean` averages a tensor over processes."""
        for stage in stages if self.schedule in self.INTERVAL else ():
            self._steps[stage] += 1
            if self._steps[stage] == self.INTERVAL[self.schedule]:
                loss, moved = (mean(self._sums[stage]) / self._steps[stage]).tolist()
                self._renew(stage, loss, moved)
                self._steps[stage] = 0
                self._sums[stage] = 0

    def sync(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Make the state the same in all processes, so that one may save it; to be called in each of them."""
        if self.schedule in self.INTERVAL:
            self._sums = mean(self._sums)

    def state_dict(self) -> dict[str, Any]:
        """What must be kept to go on exactly, as JSON."""
        return {
            "schedule": self.schedule,
            "weight": self.weight,
            "weights": self._current,
            "multipliers": self._multipliers,
            "steps": self._steps,
            "sums": self._sums.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load [`state_dict`]; that of another schedule is ignored, and another w applies from here on."""
        if state.get("schedule", self.schedule) != self.schedule:
            return
        before = state.get("weight", self.weight)
        if before == self.weight:
            self._current = list(state["weights"])
        elif self.schedule in self.INTERVAL and before > 0:
            self._current = [weight * self.weight / before for weight in state["weights"]]
        self._multipliers, self._steps = list(state["multipliers"]), list(state["steps"])
        self._sums = torch.tensor(state["sums"])

    def _is_halved(self, stage: int) -> bool:
        return self.schedule == "paper" and 2 * stage >= self.num_stages

    def _renew(self, stage: int, loss: float, moved: float) -> None:
        if not 0 < loss < math.inf:
            return
        if self.schedule == "multipliers":
            self._multipliers[stage] += loss
            self._current[stage] = self.weight / self._multipliers[stage]
        elif 0 < moved < math.inf:
            self._current[stage] = self.ADAPTIVE_SHARE * self.weight * loss / moved


@dataclass
class RunTracker:
    """
    Finds the input and output of each run of modules, between which transport is measured.

    The output is the last one of the run that has the shape of its input.

    Args:
        ends (`Collection[str]`): qualified names of the modules at which runs end, see [`run_ends`].
    """

    ends: Collection[str]
    _begin: torch.Tensor | None = None
    _end: torch.Tensor | None = None

    def until(self, name: str, x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """To be called after each module, with its input x and output y; returns the run's pair if it ends here."""
        self._begin = x if self._begin is None else self._begin
        self._end = y if y.shape == self._begin.shape else self._end
        if name not in self.ends:
            return []
        found = [] if self._end is None else [(self._begin, self._end)]
        self._begin = self._end = None
        return found
