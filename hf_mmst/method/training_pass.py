"""One forward pass in which stages learn: each steps back through its loss at its end, and its graph is freed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..cut.hidden_states import detached, hidden_states_of, input_hidden_states, mask_of, without_tensors
from ..cut.partition import Partition
from ..cut.side_inputs import SideInputs, mark
from .partial_forward import StopForward, until_stopped
from .transport import RunTracker, transport


@dataclass
class StageStep:
    """
    Losses and transports of one training step, by stage number from 0.

    Attributes:
        losses (`dict[int, torch.Tensor]`): task loss of each stage that has already been stepped back through.
        transports (`dict[int, torch.Tensor]`): transport of each stage that learned, without graph.
        transport (`torch.Tensor`): transport of the last stage that learned, with graph: its loss is the caller's.
        features (`torch.Tensor`, *optional*): input of the first stage that learned, if that is not the model's first.
        output (`torch.Tensor`, *optional*): output of the last stage that learned, if that is not the model's last.
    """

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    transports: dict[int, torch.Tensor] = field(default_factory=dict)
    transport: torch.Tensor | float = 0.0
    features: torch.Tensor | None = None
    output: torch.Tensor | None = None


@dataclass
class TrainingPass:
    """
    Hooks on a model's layers for one forward pass in which some stages learn.

    Args:
        model (`nn.Module`): the model, not a wrapper around it.
        partition ([`Partition`]): the cut.
        run ([`RunTracker`]): where transport is measured.
        norm (`str`): see [`movement`].
        logits (`Callable`): see [`Stagewise.logits`].
        outputs (`dict[str, Any]`): where to note what layers that do not learn return, tensors left out, by name.
        criterion, weights, stages, mask, backward, learned, to_the_end: see [`Stagewise.step`].

    Attributes:
        found ([`StageStep`]): complete when the forward pass has returned.
    """

    model: nn.Module
    partition: Partition
    run: RunTracker
    norm: str
    logits: Callable[..., torch.Tensor]
    outputs: dict[str, Any]
    criterion: Callable[[torch.Tensor], torch.Tensor]
    weights: Sequence[float]
    stages: Sequence[int]
    mask: torch.Tensor | None
    backward: Callable[..., Any]
    learned: Callable[[int, bool], Any]
    to_the_end: bool = False
    found: StageStep = field(default_factory=StageStep)
    _terms: list[torch.Tensor] = field(default_factory=list)
    _sides: SideInputs = field(default_factory=SideInputs)

    def __post_init__(self):
        self.first, self.last = self.stages[0], self.stages[-1]
        self._ends = {*self.partition.boundaries}

    def before_layer(self, name: str, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cut side inputs off from the graph of earlier stages."""
        stage = self.partition.stage_of[name]
        if stage < self.first or self.to_the_end:  # one graph, which is stepped back through once
            return None
        return self._sides.enter(stage, args, kwargs, stage == self.last)

    def after_layer(self, name: str, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Add the layer's transport; at a stage's end, step back through it and return the output without its graph."""
        stage = self.partition.stage_of[name]
        if stage < self.first:
            self.outputs[name] = without_tensors(output)
            if stage == self.first - 1 and name in self._ends:  # all that runs from here on learns
                self.found.features = hidden_states_of(output)
                torch.set_grad_enabled(True)
                self.model.train()
            return None
        if stage > self.last:
            return None
        mark(output, stage)
        y = hidden_states_of(output)
        mask = mask_of(y, self.mask)
        for before, after in self.run.until(name, input_hidden_states(args, kwargs), y):
            with torch.set_grad_enabled(self.weights[stage] > 0):
                self._terms.append(transport(before, after, mask, self.norm))
        if name not in self._ends:
            return None
        term = torch.stack(self._terms).sum() if self._terms else y.new_zeros((), dtype=torch.float32)
        self._terms.clear()
        self.found.transports[stage] = term.detach()
        if stage == self.last:
            self.found.transport = term
        if stage == self.partition.num_stages - 1 or self.to_the_end:
            return None
        if stage == self.last:
            self.found.output = y.detach()
            raise StopForward(self.logits(stage, mask, args, kwargs, output))
        self._learn(stage, self.criterion(self.logits(stage, mask, args, kwargs, output)), term)
        return detached(output)

    def _learn(self, stage: int, loss: torch.Tensor, term: torch.Tensor) -> None:
        self.found.losses[stage] = loss.detach()
        device = loss.device.type
        with torch.autocast(device, enabled=False):
            loss = loss + self.weights[stage] * term
            self.backward(loss, **({"retain_graph": True} if self._sides.share_graph_with(loss) else {}))
            self.learned(stage, self._sides.step_back())
        if torch.is_autocast_enabled(device):
            torch.clear_autocast_cache()  # else the low-precision copies of every stage's weights pile up

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Context for the forward pass: stages before build no graph, and it ends after the last stage that learns."""
        if self.first == 0 and (self.to_the_end or self.last == self.partition.num_stages - 1):
            return contextlib.nullcontext()
        return until_stopped(self.model, self.criterion, self._frozen_at_first)

    @contextlib.contextmanager
    def _frozen_at_first(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.first == 0):
            self.model.train(self.first == 0)
            try:
                yield
            finally:
                self.model.train()
