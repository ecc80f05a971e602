"""Parts of a model's forward pass: without layers whose output is given, or stopped at the end of a stage."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..cut.hidden_states import input_hidden_states, with_hidden_states
from ..cut.temporary_attributes import replaced


class StopForward(Exception):  # noqa: N818 - not an error
    """Ends a forward pass after the last stage that learns, carrying its logits."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits


class GivenOutput(nn.Module):
    """Replaces a layer that does not run: returns given hidden states, or its input if none are given."""

    def __init__(self, layer: nn.Module, output: Any, hidden: torch.Tensor | None):
        super().__init__()
        vars(self).update(_layer=layer, _output=output, _hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def forward(self, *args, **kwargs) -> Any:
        hidden = input_hidden_states(args, kwargs) if self._hidden is None else self._hidden
        return with_hidden_states(self._output, hidden)


@contextlib.contextmanager
def left_out(
    model: nn.Module, outputs: Mapping[str, Any], names: Sequence[str], hidden: torch.Tensor
) -> Iterator[None]:
    """
    Within this context, some layers do not run: the last of them returns `hidden`, the others their input.

    Args:
        model (`nn.Module`): the model.
        outputs (`Mapping[str, Any]`): what each of the layers returned before, tensors left out, by name.
        names (`Sequence[str]`): qualified names of the layers, in order.
        hidden (`torch.Tensor`): output of the last of them, `[B, N, D]` or `[B, C, H, W]`.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            layer = model.get_submodule(name)
            parent, _, child = name.rpartition(".")
            siblings = model.get_submodule(parent)._modules
            siblings[child] = GivenOutput(layer, outputs[name], hidden if name == names[-1] else None)
            stack.callback(siblings.__setitem__, child, layer)
        yield


@contextlib.contextmanager
def until_stopped(
    model: nn.Module,
    criterion: Callable[[torch.Tensor], torch.Tensor] | None,
    around: Callable[[], contextlib.AbstractContextManager],
) -> Iterator[None]:
    """
    Within this context, the model's forward pass returns the logits of the [`StopForward`] that ends it.

    Args:
        model (`nn.Module`): the model, not a wrapper around it.
        criterion (`Callable`, *optional*): logits to the task's loss, which is returned if labels are passed.
        around (`Callable`): makes the context within which the forward pass runs.
    """
    forward = model.forward

    @functools.wraps(forward)
    def from_first_to_last(*args, **kwargs):
        with around():
            try:
                return forward(*args, **kwargs)
            except StopForward as stop:
                loss = None if criterion is None or kwargs.get("labels") is None else criterion(stop.logits)
                return SequenceClassifierOutput(loss=loss, logits=stop.logits)

    with replaced(model, "forward", from_first_to_last):
        yield
