"""Hidden states of a stage and the padding mask -> the task's logits, for every stage but the last."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..cut.copies import copied
from ..cut.example_inputs import ExampleInputs
from ..cut.hidden_states import call_with, hidden_states_of
from ..cut.objectives import HeadKind
from ..cut.token_flow import own_pooling
from .first_token import first_tokens_of, token_mixer

logger = logging.get_logger(__name__)

HEADS = "mmst_heads"  # the name by which the model has the heads while it trains


class PoolingHead(nn.Module):
    """
    The part of an auxiliary classifier F_k that is the stage's own: LayerNorm, pooling over tokens, Linear.

    The tokens are normalised before they are pooled, so that the only large tensor that is saved for the backward pass
    is the hidden state itself, which the transport term needs as well.

    Args:
        width (`int`): features D of the hidden states.
        num_labels (`int`): number of logits.
        pooling (`str`): `"mean"` over the tokens that are not padding, or `"cls"`, the first token.
        norm (`nn.LayerNorm`, *optional*): whose weights the norm begins with.
    """

    def __init__(self, width: int, num_labels: int, pooling: str = "mean", norm: nn.LayerNorm | None = None):
        super().__init__()
        self.pooling = pooling
        self.norm = nn.LayerNorm(width)
        if norm is not None:
            self.norm.load_state_dict(norm.state_dict(), strict=False)  # one without a bias has none to give
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[B, num_labels]` of hidden states `[B, N, D]` or `[B, D, H, W]` and a mask `[B, N]` (1: token)."""
        if hidden_states.dim() == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if self.pooling == "cls":
            hidden_states = hidden_states[:, 0]
        tokens = self.norm(hidden_states.to(self.norm.weight.dtype))
        if self.pooling == "cls":
            return self.classifier(tokens)
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


class TokenHead(nn.Module):
    """
    The part of an auxiliary classifier of tokens that is the stage's own: LayerNorm, Linear.

    Args:
        width (`int`): features D of the hidden states.
        num_labels (`int`): number of logits of a token.
        norm (`nn.LayerNorm`, *optional*): whose weights the norm begins with.
    """

    def __init__(self, width: int, num_labels: int, norm: nn.LayerNorm | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        if norm is not None:
            self.norm.load_state_dict(norm.state_dict(), strict=False)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[B, N, num_labels]` of hidden states `[B, N, D]`."""
        return self.classifier(self.norm(hidden_states.to(self.norm.weight.dtype)))


class OwnHead(nn.Module):
    """Leaves the hidden states to what the model itself has after its last layer; see [`Stagewise`]."""

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states `[B, N, D]`, as they are."""
        return hidden_states


class StageHeads(nn.Module):
    """
    The auxiliary heads of stages 1 .. K-1, in order. The last stage keeps the model's own head.

    Without `layers` they are the paper's for Transformers. With them, a stage is judged by what copies of the model's
    last layers make of its output (auxiliary networks of later layers: AugLocal, Ma et al., 2024, here with pretrained
    weights). All stages share the copies, which learn from the losses of all. Where the heads pool the first token,
    the last of the copies can be run for that alone, see [`read_first_token`].

    Args:
        widths (`Sequence[int]`): features D of the hidden states at the end of each of those stages.
        num_labels (`int`): number of logits.
        pooling (`str`): `"auto"`, `"mean"` or `"cls"`; `"auto"` is `"mean"`.
        maps (`Sequence[bool]`): which of those stages get a [`ConvHead`]; none by default.
        seed (`int`): seed of the initial weights; the global random state is left as it was.
        layers (`Sequence[nn.Module]`): copied, weights and all.
        norm (`nn.LayerNorm`, *optional*): the model's last norm, from which those of the heads begin.
        kind (`str`): `"pooled"`, `"tokens"` (a [`TokenHead`] each) or `"own"`: the model's own head, which all stages
            then share and whose gradient is the sum of theirs (as in LayerSkip, Elhoushi et al., 2024).

    Attributes:
        apart (`bool`): whether a model that has them keeps them out of its state dict, see [`heads_beside`].
        mixer (`str`, *optional*): where the last of `layers` mixes its tokens, if it is run for the first one alone.
    """

    apart = True

    def __init__(
        self,
        widths: Sequence[int],
        num_labels: int,
        pooling: str = "auto",
        seed: int = 0,
        maps: Sequence[bool] = (),
        layers: Sequence[nn.Module] = (),
        norm: nn.LayerNorm | None = None,
        kind: HeadKind = "pooled",
    ):
        super().__init__()
        self.widths, self.num_labels, self.kind = tuple(widths), num_labels, kind
        self.pooling = "mean" if pooling == "auto" else pooling
        self.maps = tuple(maps) or (False,) * len(self.widths)
        self.layers = nn.ModuleList(copied(layer) for layer in layers)
        self.mixer: str | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(
                self._head(width, is_map, norm) for width, is_map in zip(self.widths, self.maps, strict=True)
            )

    def read_first_token(self, model: nn.Module, last_layer: str, example: ExampleInputs | None = None) -> None:
        """
        From now on run the last of `layers` for the first token alone, if that is all that the heads read and the layer
        is found to put it out then as before; that of all others is said once.

        Args:
            model (`nn.Module`): whose layers were copied.
            last_layer (`str`): the name of the last of them.
            example ([`ExampleInputs`], *optional*): see [`token_mixer`].
        """
        if len(self.layers) == 0 or self.kind != "pooled" or self.pooling != "cls" or any(self.maps):
            return
        self.mixer = token_mixer(model, last_layer, example)
        if self.mixer is None:
            logger.warning_once(
                f"The heads read the first token alone, but their copy of {last_layer} of {type(model).__name__} runs "
                "for all tokens: it mixes them in more than one place. Set head_layers to 0 for heads that cost less."
            )

    def _head(self, width: int, is_map: bool, norm: nn.LayerNorm | None) -> nn.Module:
        if self.kind == "own":
            return OwnHead()
        if self.kind == "tokens":
            return TokenHead(width, self.num_labels, norm)
        if is_map:
            return ConvHead(width, self.num_labels)
        return PoolingHead(width, self.num_labels, self.pooling, norm)

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.heads)

    def forward(
        self,
        stage: int,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        args: Sequence[Any] = (None,),
        kwargs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """
        What a stage's output is classified as.

        Args:
            stage (`int`): from 0.
            hidden_states (`torch.Tensor`): `[B, N, D]` or `[B, D, H, W]`.
            mask (`torch.Tensor`, *optional*): `[B, N]`, 1 for tokens that count.
            args, kwargs: what the stage's last layer was called with, hidden states first; `layers` get the rest of it.

        Returns:
            `torch.Tensor`: logits, `[B, num_labels]` or `[B, N, num_labels]`; of kind `"own"`, what the model's own
            head is to get, `[B, N, D]`.
        """
        for layer in self.layers:
            mixer = self.mixer if layer is self.layers[-1] else None
            with contextlib.nullcontext() if mixer is None else first_tokens_of(layer, mixer):
                hidden_states = hidden_states_of(call_with(layer, hidden_states, args, kwargs or {}))
        return self.heads[stage](hidden_states, mask)


@contextlib.contextmanager
def heads_beside(model: nn.Module, heads: StageHeads) -> Iterator[None]:
    """
    Within this context the model has the heads, as `model.mmst_heads`: their parameters are among its own.

    Its state dict is that of the model alone, where [`StageHeads.apart`] says so, and one that is loaded lacks nothing.
    """
    model.add_module(HEADS, heads)
    hooks = [model.register_state_dict_post_hook(_leave_out), model.register_load_state_dict_post_hook(_do_not_miss)]
    try:
        yield
    finally:
        model._modules.pop(HEADS)
        for hook in hooks:
            hook.remove()


def _leave_out(model: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if model.mmst_heads.apart:
        for name in [name for name in state_dict if name.startswith(f"{prefix}{HEADS}.")]:
            del state_dict[name]


def _do_not_miss(model: Any, keys: Any) -> None:
    if model.mmst_heads.apart:
        keys.missing_keys[:] = [name for name in keys.missing_keys if HEADS not in name.split(".")]


def num_head_layers(given: int | None, model: Any, widths: Sequence[int], blocks: bool = True) -> int:
    """
    The number of layers of the heads: the given one, or else 1 for a pretrained model of one width, not quantized.

    Raises:
        `ValueError`: if the model's layers are single modules, not `blocks`, or quantized, or if the last ones cannot
            take the outputs of all stages, `widths` wide.
    """
    quantized = getattr(model, "is_quantized", False)
    fitting = blocks and len({*widths}) == 1 and not quantized
    if given and quantized:
        raise ValueError(
            f"head_layers={given}, but the layers of {type(model).__name__} are quantized, and a copy could not be "
            "read back from a checkpoint. Set head_layers to 0."
        )
    if given and not blocks:
        raise ValueError(
            f"head_layers={given}, but {type(model).__name__} is a sequence of single modules, without blocks that "
            "heads could have a copy of. Set head_layers to 0."
        )
    if given and not fitting:
        raise ValueError(
            f"head_layers={given}, but the last layers of {type(model).__name__} cannot take all stages' outputs, "
            f"which are {', '.join(map(str, dict.fromkeys(widths)))} wide. Set head_layers to 0."
        )
    return int(fitting and is_pretrained(model)) if given is None else given


def head_pooling(given: str, kind: HeadKind, model: Any, last_layer: str, example: ExampleInputs | None = None) -> str:
    """
    What the auxiliary heads pool: as `given`, or for `"auto"` as the own head of a pretrained model.

    Args:
        given (`str`): `"auto"`, `"mean"` or `"cls"`.
        kind (`str`): of the heads; only `"pooled"` ones pool.
        model, last_layer, example: see [`own_pooling`].
    """
    looks = given == "auto" and kind == "pooled" and is_pretrained(model)
    return own_pooling(model, last_layer, example) if looks else given


def is_pretrained(model: Any) -> bool:
    """Whether the model, or a model within it, was loaded with `from_pretrained`."""
    return any(getattr(getattr(module, "config", None), "name_or_path", "") for module in model.modules())
