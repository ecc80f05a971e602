"""A model of texts -> how many tokens it has positions for."""

from typing import Any

from torch import nn


def num_positions(model: nn.Module) -> int | None:
    """Tokens of a text at most, where each position has an embedding of its own; `None` where it is computed."""
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    offsets = [
        0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa and its like count from there
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings >= most and _is_of_positions(name)
    ]
    return most - max(offsets) if offsets else None


def _is_of_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "position" in last or last == "wpe"
