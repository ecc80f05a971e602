"""Side inputs: what a layer gets beside its hidden states, such as a position bias that all layers share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .hidden_states import input_hidden_states

_STAGE = "hf_mmst.stage"  # on the nodes of a graph at which the outputs of layers begin


@dataclass
class SideInputs:
    """
    The side inputs of a stage's layers that carry a graph.

    What the stage itself has made, such as a second stream of its layers, is left as it is. What an earlier stage has
    made comes without its graph: it has learned there. What was made around the layers, such as a position bias of all
    of them, has a graph that each stage steps back through: a stand-in gathers the stage's gradient, and [`step_back`]
    takes it on. Where a stage's loss reaches a part of that graph directly, too, as embeddings that are the first
    layer's hidden states, its own backward pass must leave that part for [`step_back`].

    Args:
        cut: what is handed on of a tensor that the given stage has made, an earlier one.

    Attributes:
        stand_ins (`dict[int, tuple[torch.Tensor, torch.Tensor]]`): tensors from around the layers, and what stands in.
    """

    cut: Callable[[torch.Tensor, int], torch.Tensor] = lambda tensor, stage: tensor.detach()
    stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def enter(self, stage: int, args: tuple, kwargs: dict[str, Any], last: bool) -> tuple[tuple, dict[str, Any]]:
        """Arguments for a layer of `stage`, with side inputs cut or replaced by stand-ins; none in the `last` stage."""
        hidden = input_hidden_states(args, kwargs)

        def entered(value):
            if not torch.is_tensor(value) or value.grad_fn is None:
                return value
            makers = _makers(value)
            if stage in makers or (last and not makers):
                return value
            if makers:
                return self.cut(value, max(makers))
            return self.stand_ins.setdefault(id(value), (value, value.detach().requires_grad_()))[1]

        return tree_map(lambda value: value if value is hidden else entered(value), (args, kwargs))

    def share_graph_with(self, loss: torch.Tensor) -> bool:
        """Whether the graph of a loss and the graphs of tensors with a stand-in have a node in common."""
        behind, _ = graph_behind(side.grad_fn for side, _ in self.stand_ins.values())
        return bool(behind and behind & graph_behind([loss.grad_fn])[0])

    def step_back(self) -> bool:
        """Backpropagate the gradients of the stand-ins into the tensors that they replace; whether there were any."""
        found = [(side, stand_in.grad) for side, stand_in in self.stand_ins.values() if stand_in.grad is not None]
        if found:
            torch.autograd.backward([side for side, _ in found], [gradient for _, gradient in found], retain_graph=True)
        shared = bool(self.stand_ins)
        self.stand_ins.clear()
        return shared


def mark(output: Any, stage: int) -> None:
    """Note on the graph of a layer's output which stage has made it."""
    for value in tree_leaves(output):
        if torch.is_tensor(value) and value.grad_fn is not None:
            _notes(value.grad_fn).setdefault(_STAGE, stage)


def graph_behind(nodes: Iterable[Any], through: Callable[[Any], bool] = lambda node: True) -> tuple[set[Any], set[int]]:
    """
    The nodes of the graph that begins at `nodes`, as far as it leads `through` them, and the ids of the parameters and
    other leaves that it ends in.
    """
    left, found, leaves = [*nodes], set(), set()
    while left:
        node = left.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        elif node is not None and node not in found:
            found.add(node)
            left += [one for one, _ in node.next_functions] if through(node) else []
    return found, leaves


def _makers(tensor: torch.Tensor) -> set[int]:
    """The stages whose layers have made a tensor; none if it was made around them."""
    found, _ = graph_behind([tensor.grad_fn], _is_around)
    return {_notes(node)[_STAGE] for node in found if not _is_around(node)}


def _is_around(node: Any) -> bool:
    return _STAGE not in _notes(node)


def _notes(node: Any) -> dict[str, Any]:
    return node.metadata
