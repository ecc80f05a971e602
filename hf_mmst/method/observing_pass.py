"""One forward pass without learning, in which each stage's logits and transport are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..cut.hidden_states import hidden_states_of, input_hidden_states, mask_of
from ..cut.partition import Partition
from .partial_forward import StopForward
from .transport import RunTracker, movement


@dataclass
class StageView:
    """
    Logits and movements of stages in a forward pass without learning.

    Attributes:
        logits (`list[Any]`): what was read of their heads' logits, all but the model's own; see [`Stagewise.observe`].
        movements (`list[torch.Tensor]`): how far each of the stages moves each sample, `[B]` each.
        output (`torch.Tensor`, *optional*): output of the last of them, if that is not the model's last.
    """

    logits: list[Any] = field(default_factory=list)
    movements: list[torch.Tensor] = field(default_factory=list)
    output: torch.Tensor | None = None


@dataclass
class ObservingPass:
    """
    Hooks on a model's layers for one forward pass without learning; later passes are not looked at.

    Args:
        partition ([`Partition`]): the cut.
        run ([`RunTracker`]): where movement is measured.
        norm (`str`): see [`movement`].
        logits (`Callable`): see [`Stagewise.logits`].
        num_heads (`int`): number of stages with an auxiliary head, the first ones.
        mask, read, stages: see [`Stagewise.observe`].

    Attributes:
        view ([`StageView`]): complete when the forward pass has returned.
    """

    partition: Partition
    run: RunTracker
    norm: str
    logits: Callable[..., torch.Tensor]
    num_heads: int
    mask: torch.Tensor | None
    read: Callable[[torch.Tensor], Any]
    stages: Sequence[int]
    view: StageView = field(default_factory=StageView)
    _moved: list[torch.Tensor] = field(default_factory=list)

    def after_layer(self, name: str, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Add the layer's movement; at a stage's end, read its head's logits."""
        stage = self.partition.stage_of[name]
        if stage < self.stages[0] or len(self.view.movements) == len(self.stages):
            return
        y = hidden_states_of(output)
        mask = mask_of(y, self.mask)
        for before, after in self.run.until(name, input_hidden_states(args, kwargs), y):
            self._moved.append(movement(before, after, mask, self.norm))
        if name in self.partition.boundaries:
            self.view.movements.append(torch.stack(self._moved).sum(0) if self._moved else y.new_zeros(len(y)).float())
            self._moved.clear()
            if stage < self.num_heads:
                logits = self.logits(stage, mask, args, kwargs, output)
                self.view.logits.append(self.read(logits))
                if stage == self.stages[-1]:
                    self.view.output = y
                    raise StopForward(logits)
