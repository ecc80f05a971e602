"""A recorded forward pass, cut as in training, whose graphs show what each stage learns from and hands on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .hidden_states import hidden_states_of, input_hidden_states, without_tensors
from .partition import Partition
from .side_inputs import SideInputs, graph_behind, mark


@dataclass(frozen=True)
class Trace:
    """
    What a recorded forward pass shows of the stages.

    Attributes:
        outputs (`dict[str, Any]`): what each layer returns, `None` in the place of each tensor, by name.
        learners (`dict[str, frozenset[int]]`): the stages whose loss reaches each parameter, by name; those that none
            reaches are left out.
        beside (`tuple[str, ...]`): the ends of stages of which what follows needs more than the hidden states.
        streams (`tuple[str, ...]`): those of them that hand on what they have made of what their stage got, or with
            weights that no stage's loss reaches.
        twice (`tuple[int, str]`, *optional*): a stage that reaches an activation of an earlier one by a way around
            that one's end, and a parameter behind it.
    """

    outputs: dict[str, Any]
    learners: dict[str, frozenset[int]]
    beside: tuple[str, ...]
    streams: tuple[str, ...]
    twice: tuple[int, str] | None

    def refuse_beside(self, model: nn.Module, remedy: str) -> None:
        """
        Raises:
            `ValueError`: if a stage needs more of the stage before than its hidden states.
        """
        if self.beside:
            raise ValueError(
                f"What follows {self.beside[0]} of {type(model).__name__} needs more of it than its hidden states. Set "
                f"stage_boundaries to other layers, or {remedy}."
            )


class Recorder:
    """
    Hooks on the layers that cut the graph between stages as in training, and keep each part to be examined.

    Args:
        partition (`Partition`): the cut.
    """

    def __init__(self, partition: Partition):
        self._partition = partition
        self._outputs: dict[str, Any] = {}
        self._ends: list[torch.Tensor] = []
        self._begins: dict[int, torch.Tensor] = {}
        self._sides = SideInputs(self._cut)
        self._cuts: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}  # by id: a copy, the original, its stage

    def before(self, name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """To be called before each layer; returns what it is to get."""
        stage = self._partition.stage_of[name]
        self._begins.setdefault(stage, input_hidden_states(args, kwargs))
        return self._sides.enter(stage, args, kwargs, last=stage == self._partition.num_stages - 1)

    def after(self, name: str, output: Any) -> Any:
        """To be called after each layer; returns what is to be handed on, if not `output`."""
        stage = self._partition.stage_of[name]
        mark(output, stage)
        self._outputs[name] = without_tensors(output)
        if name not in self._partition.boundaries[:-1]:
            return None
        hidden = hidden_states_of(output)
        self._ends.append(hidden)
        return tree_map(lambda value: _without_graph(value) if value is hidden else self._cut(value, stage), output)

    def trace(self, output: torch.Tensor, model: nn.Module) -> Trace:
        """The [`Trace`] of a pass that has returned `output`."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        around = {id(stand_in): side for side, stand_in in self._sides.stand_ins.values()}
        learners: dict[str, frozenset[int]] = {}
        reached: set[int] = set()
        gone: set[Any] = set()  # nodes that a stage has stepped back through
        twice = None
        for stage, end in enumerate([*self._ends, output]):
            own, leaves = graph_behind([end.grad_fn])
            shared, others = graph_behind(around[leaf].grad_fn for leaf in leaves & around.keys())
            again = (own | shared) & gone
            if again and twice is None:
                behind = [names[leaf] for leaf in graph_behind(again)[1] if leaf in names]
                twice = stage, min(behind, default="an activation")
            gone |= own - shared
            reached |= leaves | others
            for leaf in (leaves | others) & names.keys():
                learners[names[leaf]] = learners.get(names[leaf], frozenset()) | {stage}
        handed_on = [self._cuts[leaf][1:] for leaf in reached & self._cuts.keys()]
        weights = {leaf for leaf, name in names.items() if name not in learners}
        streams = [one for one in handed_on if self._is_stream(*one, weights)]
        return Trace(self._outputs, learners, self._ends_of(handed_on), self._ends_of(streams), twice)

    def _is_stream(self, tensor: torch.Tensor, stage: int, unlearned: set[int]) -> bool:
        """Whether a tensor that `stage` hands on is made of what the stage got, or with weights that are unlearned."""
        nodes, leaves = graph_behind([tensor.grad_fn])
        begin = self._begins[stage]
        return begin.grad_fn in nodes or id(begin) in leaves or bool(leaves & unlearned)

    def _ends_of(self, handed_on: Iterable[tuple[torch.Tensor, int]]) -> tuple[str, ...]:
        return tuple(self._partition.boundaries[stage] for stage in sorted({stage for _, stage in handed_on}))

    def _cut(self, value: Any, stage: int) -> Any:
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        copy = _without_graph(value)
        self._cuts[id(copy)] = copy, value, stage
        return copy


def _without_graph(value: torch.Tensor) -> torch.Tensor:
    """A copy at which the graph of what it is used for begins."""
    return value.detach().requires_grad_()
