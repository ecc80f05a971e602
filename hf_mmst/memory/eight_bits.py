"""Weights of 8 bits by bitsandbytes: their modules hold them a second time, and compute with that."""

from typing import Any

from torch import nn


def modules_of_eight_bits(layer: nn.Module) -> list[Any]:
    """Those of a layer whose weights have 8 bits."""
    return [module for module in layer.modules() if hasattr(module, "init_8bit_state")]


def hold_once(module: Any) -> None:
    """Have such a module compute with its weight where that is now."""
    if module.weight.CB is not None:
        module.init_8bit_state()
    module.state.CB = module.weight.data
