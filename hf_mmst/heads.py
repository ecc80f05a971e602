"""Hidden states of a stage and the padding mask -> the task's logits, for every stage but the last."""

from collections.abc import Sequence

import torch
from torch import nn

HEADS = "mmst_heads"  # the name by which the model has the heads while it trains


class PoolingHead(nn.Module):
    """
    Auxiliary classifier F_k of a stage: LayerNorm, pooling over tokens, Linear (the paper's head for Transformers).

    The tokens are normalised before they are pooled, so the only large tensor that is saved for the backward pass is
    the hidden state itself, which the transport term needs as well.

    Args:
        width (`int`): features D of the hidden states.
        num_labels (`int`): number of logits.
        pooling (`str`): `"mean"` over the tokens that are not padding, or `"cls"`, the first token.
    """

    def __init__(self, width: int, num_labels: int, pooling: str = "mean"):
        super().__init__()
        self.pooling = pooling
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[B, num_labels]` of hidden states `[B, N, D]` or `[B, D, H, W]` and a mask `[B, N]` (1: token)."""
        if hidden_states.dim() == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        tokens = self.norm(hidden_states.to(self.norm.weight.dtype))
        if self.pooling == "cls":
            return self.classifier(tokens[:, 0])
        if mask is None:
            return self.classifier(tokens.mean(1))
        kept = mask.to(tokens.dtype).unsqueeze(-1)
        return self.classifier((tokens * kept).sum(1) / kept.sum(1).clamp(min=1))


class ConvHead(nn.Module):
    """
    Auxiliary classifier F_k of a stage of a convolutional network (the paper's head for ResNet and VGG).

    Conv 3x3, ReLU, average pooling to 2 x 2, BatchNorm, Linear.

    Args:
        width (`int`): channels D of the feature maps.
        num_labels (`int`): number of logits.
    """

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(4 * width, num_labels)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[B, num_labels]` of feature maps `[B, D, H, W]`, which have no mask."""
        pooled = self.pool(self.conv(features.to(self.conv.weight.dtype)).relu())
        return self.classifier(self.norm(pooled).flatten(1))


class StageHeads(nn.ModuleList):
    """
    The auxiliary heads of stages 1 .. K-1, in order. The last stage keeps the model's own head.

    Args:
        widths (`Sequence[int]`): features D of the hidden states at the end of each of those stages.
        num_labels (`int`): number of logits.
        pooling (`str`): `"auto"`, `"mean"` or `"cls"`; `"auto"` is `"mean"`.
        maps (`Sequence[bool]`): which of those stages get a [`ConvHead`]; none by default.
        seed (`int`): seed of the initial weights; the global random state is left as it was.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_labels: int,
        pooling: str = "auto",
        seed: int = 0,
        maps: Sequence[bool] = (),
    ):
        self.widths, self.num_labels = tuple(widths), num_labels
        self.pooling = "mean" if pooling == "auto" else pooling
        self.maps = tuple(maps) or (False,) * len(self.widths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                ConvHead(width, num_labels) if is_map else PoolingHead(width, num_labels, self.pooling)
                for width, is_map in zip(self.widths, self.maps, strict=True)
            )
