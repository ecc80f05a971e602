"""What `stage_order` and `offload` are where they are unset: by the model, and by what layers cannot rest with."""

from collections.abc import Collection
from typing import Any, Literal

from .field_conflicts import launched_with

StageOrder = Literal["simultaneous", "sequential", "multi_lap", "end_to_end"]
Offload = Literal["none", "stages", "layers"]
# Fields that have an effect without stages, too.
OF_ALL = {
    "num_stages",
    "stage_order",
    "offload",
    "resident_layers",
    "layer_batch_size",
    "offloaded_step",
    "memory_budget",
    "head_learning_rate",
    "stage_learning_rate_decay",
    "cache_views",
    "model_card",
}


def order_for(args: Any, is_pretrained: bool | None, names: Collection[str]) -> StageOrder | None:
    """
    The order of an [`MMSTConfig`] in which it is unset; `None` as long as it depends on a model that is not there.

    Args:
        args ([`MMSTConfig`]): the settings.
        is_pretrained (`bool`, *optional*): whether the model is.
        names (`Collection[str]`): of the fields that `TrainingArguments` does not have.
    """
    fields = type(args).__dataclass_fields__
    for_stages = any(getattr(args, name) != fields[name].default for name in names if name not in OF_ALL)
    if is_pretrained is False or for_stages or not args.chooses_stages:
        return "simultaneous"
    return "end_to_end" if is_pretrained else None


def place_for(args: Any, is_movable: bool) -> Offload | None:
    """
    What is offloaded where that is unset; `None` as long as the order is.

    Args:
        args ([`MMSTConfig`]): the settings.
        is_movable (`bool`): whether there is no wrapper or compilation with which layers cannot be offloaded.
    """
    if args.stage_order is None:
        return None
    half = args.fp16 or args.fp16_full_eval or args.bf16_full_eval
    wrapped = args.fsdp or args.deepspeed or launched_with("FSDP", "DEEPSPEED") or not is_movable
    unasked = args.world_size > 1 and args.chooses_order  # there is an accelerator without shards by now
    other = args.torch_compile or args.accelerator_config.dispatch_batches
    return "none" if args.stage_order != "end_to_end" or half or wrapped or unasked or other else "layers"
