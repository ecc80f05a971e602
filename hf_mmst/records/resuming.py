"""Which settings a run can change when it resumes from a checkpoint, and which it cannot."""

from collections.abc import Mapping
from typing import Any

from ..config import MMSTConfig

FIXED = (
    "stage_order",
    "num_laps",
    "end_to_end_laps",
    "stage_objective",
    "head_learning_rate",
    "stage_learning_rate_decay",
)
FROM_HERE_ON = ("transport_weight", "transport_schedule", "transport_norm", "stage_clipping", "cache_views")


def refuse_other_settings(folder: str, saved: Mapping[str, Any], args: MMSTConfig) -> None:
    """
    Refuse to resume with other values of settings on which the training so far has depended.

    Args:
        folder (`str`): the checkpoint.
        saved (`Mapping[str, Any]`): its fields of [`MMSTConfig`].
        args ([`MMSTConfig`]): those of this run.

    Raises:
        `ValueError`: saying which field to set to what.
    """
    for name in FIXED:
        before, now = saved.get(name, getattr(args, name)), getattr(args, name)
        if before != now:
            raise ValueError(
                f"{folder} was trained with {name}={before!r}, this run has {name}={now!r}, so that it cannot go on "
                f"from there. Set {name}={before!r}, or start anew from its weights with from_pretrained."
            )


def refuse_other_length(folder: str, saved: int, steps: int, num_turns: int) -> None:
    """
    Refuse a run of another length where its steps are shared out over turns, which would begin at other steps.

    Args:
        folder (`str`): the checkpoint.
        saved (`int`), steps (`int`): optimizer steps of its run and of this one, over all turns.
        num_turns (`int`): of both.

    Raises:
        `ValueError`: saying what to set.
    """
    if num_turns > 1 and saved != steps:
        raise ValueError(
            f"{folder} is of a run of {saved:,} optimizer steps in {num_turns} turns, this run has {steps:,}: stages "
            "that have had their turn would learn again, or others too little. Set max_steps or num_train_epochs (and "
            f"the size of a batch) so that there are {saved:,}, or start anew from its weights with from_pretrained."
        )


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Settings that apply from here on and had other values before, in words; empty if there are none."""
    found = [(name, saved.get(name, now[name]), now[name]) for name in FROM_HERE_ON]
    return ", ".join(f"{name}={value!r} (before: {before!r})" for name, before, value in found if before != value)
