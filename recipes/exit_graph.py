"""An early-exit model -> one module to export: its stages in turn, each in a condition, with the rule."""

import contextlib
import functools
from collections.abc import Mapping

import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from hf_mmst import EarlyExit
from hf_mmst.cut.hidden_states import call_with, hidden_states_of, mask_of
from hf_mmst.cut.temporary_attributes import replaced


class ExitGraph(nn.Module):
    """
    What [`EarlyExit`] does, for `torch.export`: a stage runs unless all samples of the batch have left (`torch.cond`).

    Each sample's answer is that of the stage at which it left, so that it does not depend on the others in the batch.
    Each stage is exported by itself first: what is traced within a condition is then tensor operations alone.

    Args:
        early ([`EarlyExit`]): the model and its rule.
        inputs (`Mapping[str, torch.Tensor]`): an example of a batch, of two samples or more.

    Raises:
        `ValueError`: if stages put out hidden states of different shapes, which a condition cannot pass on.
    """

    def __init__(self, early: EarlyExit, inputs: Mapping[str, torch.Tensor]):
        super().__init__()
        stages = [_Stage(early, k) for k in range(early.partition.num_stages)]
        given: list[tuple] = [(dict(inputs),)]
        for k, stage in enumerate(stages):
            given.append((given[0][0], *stage(*given[-1])))
            if k > 0 and given[-1][1].shape != given[-2][1].shape:
                raise ValueError(
                    f"Stage {k + 1} makes hidden states {[*given[-1][1].shape]} of {[*given[-2][1].shape]}: it cannot "
                    "be skipped in a graph. Export the first stages with --num_stages, without --early_exit."
                )
        strict = early.heads.mixer is not None  # it ends a layer by raising, which only a strict export follows
        self.stages = nn.ModuleList()
        for stage, example in zip(stages, given, strict=False):
            sizes = tree_map(lambda value: dict.fromkeys(range(2 if value.dim() in (2, 3) else 1), Dim.AUTO), example)
            self.stages.append(torch.export.export(stage, example, dynamic_shapes=sizes, strict=strict).module())

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers `[B, num_labels]` and the numbers of the stages at which samples left, from 1, `[B]`."""
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        inputs = {name: value for name, value in given.items() if value is not None}
        state = self.stages[0](inputs)
        for stage in self.stages[1:]:
            state = torch.cond((state[2] == len(self.stages)).any(), stage, _keep, (inputs, *state))
        return state[1], state[2]


class _Stage(nn.Module):
    """
    One stage, its head and the rule: hidden states, answers, exits and agreements so far -> the same after the stage.

    The model runs as a whole around it. What does not reach the result is not in the exported graph.
    """

    def __init__(self, early: EarlyExit, stage: int):
        super().__init__()
        self.model, self.heads, self.rule, self.stage = early.model, early.heads, early.rule, stage
        names = early.partition.stages[stage]
        self.first, self.last = names[0], names[-1]

    def forward(self, inputs: dict[str, torch.Tensor], hidden=None, answers=None, exits=None, agreed=None) -> tuple:
        found: list[torch.Tensor] = []

        def begin(layer, *args, **kwargs):
            return call_with(layer, hidden, args, kwargs)

        def end(layer, *args, **kwargs):
            output = layer(*args, **kwargs)
            found.append(hidden_states_of(output))
            if self.stage < len(self.heads):
                mask = mask_of(found[0], inputs.get("attention_mask"))
                found.append(self.heads(self.stage, found[0], mask, args, kwargs))
            return output

        with contextlib.ExitStack() as stack:
            for name, function in ((self.first, begin), (self.last, end))[hidden is None :]:
                layer = self.model.get_submodule(name)
                stack.enter_context(replaced(layer, "forward", functools.partial(function, layer.forward)))
            found.append(self.model(**inputs).logits)

        answer = self.rule.answer(self.stage, found[1].float(), answers)
        number = len(self.heads) + 1
        if answers is None:
            answers, agreed = answer, torch.zeros_like(answer.argmax(-1))
            exits = agreed + number
        else:
            agreed = (agreed + 1) * (answer.argmax(-1) == answers.argmax(-1))
        stay = exits == number
        leave = stay & self.rule.leaves(self.stage, answer, agreed)
        if self.stage < len(self.heads):
            exits = torch.where(leave, self.stage + 1, exits)
        return found[0], torch.where(stay[:, None], answer, answers), exits.clone(), agreed


def _keep(_inputs: dict[str, torch.Tensor], *state: torch.Tensor) -> tuple:
    return tuple(value.clone() for value in state)
