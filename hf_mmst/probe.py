"""Model and its layers' names -> what each layer costs and puts out, from one forward pass that allocates nothing."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .hidden_states import hidden_states_of


@dataclass(frozen=True)
class LayerProfile:
    """What one layer does to one sample: its name, floating-point operations, and the width D of its output."""

    name: str
    flops: int
    width: int


def profile_layers(model: nn.Module, layers: Sequence[str]) -> list[LayerProfile]:
    """
    Run a copy of `model` on the meta device, where tensors have shapes but no data, and watch its layers.

    Args:
        model (`nn.Module`): the model; it is neither run nor changed.
        layers (`Sequence[str]`): names of its layers, in the order in which they should run.

    Returns:
        `list[LayerProfile]`: one a layer, for one sample (text: 16 tokens; the unit cancels in a cut by cost).

    Raises:
        `ValueError`: if the layers do not each run exactly once in that order, as in models that share layers.
    """
    twin = on_meta(model).eval()
    widths: dict[str, int] = {}
    calls: list[str] = []

    def watch(name, _module, _args, output):
        calls.append(name)
        hidden = hidden_states_of(output)
        widths[name] = hidden.shape[1] if hidden.dim() == 4 else hidden.shape[-1]

    for name in layers:
        twin.get_submodule(name).register_forward_hook(functools.partial(watch, name))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(**dummy_inputs(model, device="meta"))
    if calls != list(layers):
        raise ValueError(
            f"The {len(layers)} layers of {type(model).__name__} ({layers[0]} .. {layers[-1]}) ran {len(calls)} times "
            "in a forward pass: layers that are shared, skipped or run out of order cannot be cut into stages. Set "
            "num_stages to 1, or pass a model whose layers each run once."
        )
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return [LayerProfile(name, counts.get(f"{type(twin).__name__}.{name}", 0), widths[name]) for name in layers]


def dummy_inputs(
    model: nn.Module,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    seq_len: int = 16,
    image_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    Inputs of the right shape for `model`: zeros, `[B, channels, height, width]` for images, `[B, seq_len]` for text.

    Images are of the model's own size unless another is given.

    Raises:
        `ValueError`: if the model's main input is neither images nor token ids.
    """
    config, kind = model.config, model.main_input_name
    if kind == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = image_size or getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch_size, getattr(vision, "num_channels", 3), height, width)
        return {"pixel_values": torch.zeros(shape, device=device)}
    if kind == "input_ids":
        return {"input_ids": torch.zeros((batch_size, seq_len), dtype=torch.long, device=device)}
    raise ValueError(
        f"{type(model).__name__} takes {kind!r}; only models of images (pixel_values) and text (input_ids) can be cut "
        "into stages. Set num_stages to 1."
    )


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters and buffers are on the meta device; nothing is allocated."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, object] = {id(tensor): _meta_like(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo)


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
