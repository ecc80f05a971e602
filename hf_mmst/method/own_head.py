"""The model's own head for any stage: its forward pass on the same inputs with all layers left out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..cut.chosen_tokens import ChosenTokens
from ..cut.example_inputs import ExampleInputs
from ..cut.hidden_states import hidden_states_of, without_tensors
from ..cut.probe import evaluating, run_example
from .partial_forward import left_out


class ModelsOwnHead:
    """
    Whatever comes after the layers of a model: norms, an output embedding, a cap on logits.

    Args:
        model (`nn.Module`): the model.
        layers (`Sequence[str]`): the names of all its layers, in order.

    Attributes:
        inputs (`tuple`): what the model was called with, positional and by name, without labels; see [`remember`].
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]):
        self.model, self.layers = model, layers
        self.inputs: tuple[tuple, dict[str, Any]] = (), {}

    def remember(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A hook before the model's forward pass; no keys and values are cached in it: they would outlive a stage."""
        config: Any = model.config
        if getattr(config, "use_cache", False):
            kwargs = {**kwargs, "use_cache": False}
        self.inputs = args, {name: value for name, value in kwargs.items() if name != "labels"}
        return args, kwargs

    def logits(self, hidden: torch.Tensor, output: Any, tokens: ChosenTokens | None = None) -> torch.Tensor:
        """
        `[B, N, vocab_size]` of hidden states `[B, N, D]`, of which a layer's `output` shows in what they come.

        With `tokens`, `[M, vocab_size]` of them alone, which are packed into fewer rows; see [`is_of_single_tokens`].
        Where the layers have padded the tokens, those of all are made, and theirs taken.
        """
        args, kwargs = self.inputs
        packs = tokens is not None and hidden.shape[:2] == tokens.shape
        given = tokens.packed(hidden) if tokens is not None and packs else hidden
        with left_out(self.model, dict.fromkeys(self.layers, without_tensors(output)), self.layers, given):
            # Not the instance's own forward, which may end at the last stage that learns.
            found = type(self.model).forward(self.model, *args, **kwargs)[0]
        if tokens is None:
            return found
        return tokens.unpacked(found) if packs else tokens.among(found)


def is_of_single_tokens(model: nn.Module, layers: Sequence[str], example: ExampleInputs) -> bool:
    """
    Whether what comes after a model's layers is done to each token by itself, so that [`ChosenTokens`] can be packed.

    Found by trial, with random hidden states, half of them padding: the logits are the same, packed and not. `False`
    for a model without data (on the meta device). Arguments are those of [`profile_layers`].
    """
    head = ModelsOwnHead(model, layers)
    found: dict[str, Any] = {}
    if next(model.parameters()).is_meta:
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
        run_example(model, layers[-1:], found.__setitem__, example)
        output = found[layers[-1]]
        hidden = hidden_states_of(output)
        if hidden.dim() != 3:
            return False
        torch.manual_seed(0)
        hidden = torch.randn(hidden.shape).to(hidden)
        values = example.on(model)
        numbers = torch.arange(hidden[..., 0].numel(), device=hidden.device).view(hidden.shape[:2])
        if "input_ids" in values:
            values["attention_mask"] = (numbers % hidden.shape[1] < hidden.shape[1] // 2).long()
        head.inputs = (), values
        tokens = ChosenTokens.of(numbers % 3 == 2)
        if tokens is None:
            return False
        try:
            whole, packed = (head.logits(hidden, output, some) for some in (None, tokens))
        except Exception:  # whatever a model raises where it gets other shapes than it expects
            return False
    expected = whole.flatten(0, -2)[tokens.numbers[: tokens.count]]
    return packed.shape == expected.shape and torch.allclose(packed, expected, rtol=1e-3, atol=1e-4)
