"""Hidden states of a stage and the padding mask -> the task's logits, for every stage but the last."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .hidden_states import call_with, hidden_states_of

HEADS = "mmst_heads"  # the name by which the model has the heads while it trains


class StageHead(nn.Module):
    """
    Auxiliary classifier F_k of a stage: layers, if any, LayerNorm, pooling over tokens, Linear.

    Without layers it is the paper's head for Transformers. The tokens are normalised before they are pooled, so that
    the only large tensor that is saved for the backward pass is the hidden state itself, which the transport term needs
    as well. With layers, copies of the model's last ones, a stage is judged by what these make of its output (AugLocal,
    Ma et al., 2024, with pretrained weights).

    Args:
        width (`int`): features D of the hidden states.
        num_labels (`int`): number of logits.
        pooling (`str`): `"mean"` over the tokens that are not padding, or `"cls"`, the first token.
        layers (`Sequence[nn.Module]`): copied, weights and all.
    """

    def __init__(self, width: int, num_labels: int, pooling: str = "mean", layers: Sequence[nn.Module] = ()):
        super().__init__()
        self.pooling = pooling
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_labels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        args: Sequence[Any] = (None,),
        kwargs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): `[B, N, D]` or `[B, D, H, W]`.
            mask (`torch.Tensor`, *optional*): `[B, N]`, 1 for tokens that count.
            args, kwargs: what the stage's last layer was called with, hidden states first; the head's layers get the
                rest of it.

        Returns:
            `torch.Tensor`: logits, `[B, num_labels]`.
        """
        for layer in self.layers:
            hidden_states = hidden_states_of(call_with(layer, hidden_states, args, kwargs or {}))
        if hidden_states.dim() == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        tokens = self.norm(hidden_states.to(self.norm.weight.dtype))
        if self.pooling == "cls":
            return self.classifier(tokens[:, 0])
        if mask is None:
            return self.classifier(tokens.mean(1))
        kept = mask.to(tokens.dtype).unsqueeze(-1)
        return self.classifier((tokens * kept).sum(1) / kept.sum(1).clamp(min=1))


class StageHeads(nn.ModuleList):
    """
    The auxiliary heads of stages 1 .. K-1, in order. The last stage keeps the model's own head.

    Args:
        widths (`Sequence[int]`): features D of the hidden states at the end of each of those stages.
        num_labels (`int`): number of logits.
        pooling (`str`): `"auto"`, `"mean"` or `"cls"`; `"auto"` is `"mean"`.
        seed (`int`): seed of the initial weights; the global random state is left as it was.
        layers (`Sequence[nn.Module]`): layers that each head has a copy of.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_labels: int,
        pooling: str = "auto",
        seed: int = 0,
        layers: Sequence[nn.Module] = (),
    ):
        self.widths, self.num_labels, self.num_layers = tuple(widths), num_labels, len(layers)
        self.pooling = "mean" if pooling == "auto" else pooling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(StageHead(width, num_labels, self.pooling, layers) for width in widths)
