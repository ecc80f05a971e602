"""Colours of the pictures: each way of training has one in all of them, and each stage a shade."""

from collections.abc import Sequence

WAYS = {
    "end to end": "#222222",
    "end to end, checkpointing": "#8c8c8c",
    "LoRA": "#e69f00",
    "last layers only": "#c5b000",
    "end to end, one layer on the device": "#0072b2",
    "the same, with LoRA": "#56b4e9",
    "blocks": "#6a3d9a",
    "stages, greedy": "#cc79a7",
    "stages": "#d55e00",
    "one stage on the device": "#009e73",
}
PLANNED = "#222222"


def of_stages(stages: Sequence[int]) -> dict[int, str]:
    """A shade for each stage, from the first, dark, to the last."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return {stage: to_hex(colormaps["viridis"](0.88 * i / max(len(stages) - 1, 1))) for i, stage in enumerate(stages)}
