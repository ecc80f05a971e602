"""One forward pass with early exit: samples that have left are no longer in the batch of the next layers."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_map, tree_map_with_path
from transformers.utils import ModelOutput

from ..cut.example_inputs import dummy_inputs
from ..cut.hidden_states import hidden_states_of, input_hidden_states, mask_of, with_hidden_states
from ..cut.partition import Partition
from ..method.heads import StageHeads
from .exit_rules import ExitRule, layers_until


@dataclass
class EarlyExitOutput(ModelOutput):
    """
    The output of [`EarlyExit`].

    Attributes:
        logits (`torch.Tensor`): `[B, num_labels]`, the answer of the stage at which each sample left.
        exit_stages (`torch.Tensor`): `[B]`, the number of that stage, from 1.
        layers_run (`torch.Tensor`): `[B]`, the number of layers that ran for each sample, those of heads too.
    """

    logits: torch.Tensor | None = None
    exit_stages: torch.Tensor | None = None
    layers_run: torch.Tensor | None = None


class AllHaveLeft(Exception):  # noqa: N818 - not an error
    """Ends a forward pass in which no sample is left."""


class ExitPass:
    """
    Hooks on a model's layers for one forward pass over `size` samples, of which those in `rows` have not left.

    Args:
        partition ([`Partition`]): the cut.
        heads ([`StageHeads`]): heads of the stages.
        rule ([`ExitRule`]): when a sample leaves.
        size (`int`): number of samples B.
        mask (`torch.Tensor`, *optional*): `[B, N]`, 1 for tokens that count.
        per_sample (`set[tuple]`): see [`per_sample_inputs`].
        device (`torch.device`): the model's.
    """

    def __init__(
        self,
        partition: Partition,
        heads: StageHeads,
        rule: ExitRule,
        size: int,
        mask: torch.Tensor | None,
        per_sample: set[tuple],
        device: torch.device,
    ):
        self.partition, self.heads, self.rule = partition, heads, rule
        self.size, self.mask, self.per_sample = size, mask, per_sample
        self.rows = torch.arange(size, device=device)
        self.stages = torch.full((size,), partition.num_stages - 1, device=device)
        self.agreed = torch.zeros(size, dtype=torch.long, device=device)
        self.answers: torch.Tensor | None = None

    def before_layer(self, name: str, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Leave out the rows of samples that have left."""
        hidden = input_hidden_states(args, kwargs)
        return tree_map_with_path(lambda path, value: self._select(name, path, value, hidden), (args, kwargs))

    def after_layer(self, name: str, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """At a stage's end, let samples leave; at the last layer's, put the others back in their rows."""
        partition = self.partition
        if name == partition.layers[-1]:  # what comes after the layers sees all samples again; of some nothing is read
            hidden = hidden_states_of(output)
            padded = hidden.new_zeros(self.size, *hidden.shape[1:])
            padded[self.rows] = hidden
            return with_hidden_states(output, hidden if len(self.rows) == self.size else padded)
        if name not in partition.boundaries or not self.rule.asks_heads:
            return None
        stage, hidden = partition.boundaries.index(name), hidden_states_of(output)
        mask = mask_of(hidden, None if self.mask is None else self.mask[self.rows])
        stay = self.leave(stage, self.heads(stage, hidden, mask, args, kwargs).float())
        if not stay.any():
            raise AllHaveLeft
        if stay.all():
            return None
        return tree_map(lambda value: value[stay] if torch.is_tensor(value) else value, output)

    def leave(self, stage: int, logits: torch.Tensor, whole: bool = False) -> torch.Tensor:
        """Let confident samples leave with their logits; returns a mask `[B]` of those in the batch that stay."""
        logits = logits[self.rows] if whole else logits
        before = None if self.answers is None else self.answers[self.rows]
        answer = self.rule.answer(stage, logits, before)
        if self.answers is None:
            self.answers = answer.new_zeros(self.size, answer.shape[-1])
        if before is not None:
            self.agreed[self.rows] = (self.agreed[self.rows] + 1) * (before.argmax(-1) == answer.argmax(-1))
        self.answers[self.rows] = answer
        left = torch.ones_like(self.rows, dtype=torch.bool)
        if not whole:
            left = self.rule.leaves(stage, answer, self.agreed[self.rows])
        self.stages[self.rows[left]] = stage
        self.rows = self.rows[~left]
        return ~left

    def _select(self, name: str, path: tuple, value: Any, hidden: torch.Tensor) -> Any:
        """The rows of a layer's input that belong to samples that are left."""
        if not torch.is_tensor(value) or value is hidden or len(self.rows) == self.size:
            return value
        return value[self.rows] if (name, path) in self.per_sample and len(value) == self.size else value

    def output(self) -> EarlyExitOutput:
        """The output for all samples of the batch."""
        head_layers = self.rule.asks_heads * len(self.heads.layers)
        until = torch.tensor(layers_until(self.partition, head_layers), device=self.stages.device)
        return EarlyExitOutput(logits=self.answers, exit_stages=self.stages + 1, layers_run=until[self.stages])


def per_sample_inputs(model: nn.Module, partition: Partition) -> set[tuple]:
    """Layers, and places in their arguments, of tensors with one row per sample, found with batches of two sizes."""
    sizes: list[dict[tuple, int]] = []

    def watch(name, _module, args, kwargs):
        leaves, _ = tree_flatten_with_path((args, kwargs))
        sizes[-1].update({(name, path): len(leaf) for path, leaf in leaves if torch.is_tensor(leaf) and leaf.dim()})

    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in partition.layers:
            hook = functools.partial(watch, name)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for size in (2, 3):
            sizes.append({})
            inputs = dummy_inputs(model, size, device)
            if "input_ids" in inputs:  # with padding, for models leave a mask out that hides nothing
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                inputs["attention_mask"][:, -1] = 0
            model(**inputs)
    return {where for where, size in sizes[0].items() if size == 2 and sizes[1].get(where) == 3}
