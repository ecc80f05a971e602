"""What a checkpoint holds beside the plain model, written and read back: its stages, their heads, transport weights."""

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..config import OWN_FIELDS, MMSTConfig
from ..cut.partition import Partition
from ..distributed.stage_shares import load_own
from ..distributed.wrappers import Wrapper
from ..method.heads import HEADS
from ..method.order import Order
from ..records.reading import load_whole, read_tensors, refuse_others, tensor_names
from ..records.resuming import changes, refuse_other_length, refuse_other_settings
from ..records.stages import HEADS_NAME, JSON_NAME, Stages, read_stages, save_stages
from .stage_parallel import AllStages
from .staging import StagedModel


def is_of_host(folder: str, staged: StagedModel) -> bool:
    """Whether a checkpoint was written by plain Trainer, from which a run with one stage may go on."""
    return staged.num_stages == 1 and not os.path.isfile(os.path.join(folder, JSON_NAME))


def write_stages(folder: str, staged: StagedModel, args: MMSTConfig, heads: dict[str, torch.Tensor]) -> None:
    """Write the cut, the settings, the transport weights and the heads' tensors beside a plain checkpoint."""
    config = {name: getattr(args, name) for name in sorted(OWN_FIELDS)}
    save_stages(folder, Stages(staged.partition, staged.heads, config, staged.weights.state_dict()), heads)


def copy_stages(checkpoint: str, folder: str) -> None:
    """Copy the files of the stages from a checkpoint to `folder`."""
    for name in (JSON_NAME, HEADS_NAME):
        shutil.copy(os.path.join(checkpoint, name), folder)


def states_of(
    staged: StagedModel, wrapper: Wrapper, stages: AllStages, state_dict: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The states of the model and of its heads, apart; of a model in shards, to be called in each process.

    Args:
        staged ([`StagedModel`]), wrapper ([`Wrapper`]), stages ([`AllStages`]): of the run.
        state_dict (`dict`, *optional*): what the host or a wrapper gives, which may hold both.
    """
    state_dict = stages.state_dict_of_all(staged, state_dict)
    heads, prefix = wrapper.state_dict(staged.heads), f"{HEADS}."
    state_dict = staged.model.state_dict() if state_dict is None else state_dict
    own = {name: tensor for name, tensor in state_dict.items() if not name.startswith(prefix)}
    inside = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    return own, heads | inside


def check_stages(folder: str, staged: StagedModel, args: MMSTConfig) -> dict[str, Any]:
    """
    What `folder` says of its stages, which must be those of this run.

    Raises:
        `ValueError`: if they are not, saying what to set.
    """
    content = read_stages(folder)
    refuse_other_settings(folder, content["config"], args)
    partition = Partition(tuple(tuple(stage) for stage in content["stages"]))
    if partition != staged.partition:
        raise ValueError(
            f"{folder} was cut into stages after {', '.join(partition.boundaries)}, this run after "
            f"{', '.join(staged.partition.boundaries)}. Set stage_boundaries to the former, or start anew."
        )
    number, own = content["heads"]["num_layers"], len(staged.heads.layers)
    if number != own:
        raise ValueError(
            f"{folder} has stage heads with {number} layers, this run with {own}. Set head_layers to {number}, or "
            "start anew."
        )
    pooling = content["heads"]["pooling"]
    if pooling != staged.heads.pooling:
        raise ValueError(
            f'{folder} has stage heads that pool "{pooling}", those of this run pool "{staged.heads.pooling}". Set '
            f'head_pooling to "{pooling}", or start anew.'
        )
    return content


def go_on(checkpoint: str, staged: StagedModel, args: MMSTConfig, order: Order) -> None:
    """
    Take up the transport weights of a checkpoint; a line says which settings are other from here on.

    Raises:
        `ValueError`: if the run cannot go on from there.
    """
    if is_of_host(checkpoint, staged):
        return
    content = check_stages(checkpoint, staged, args)
    steps = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).max_steps
    refuse_other_length(checkpoint, steps, order.total_steps, len(order.segments))
    schedule = staged.weights.schedule  # what "auto" has come to
    now = {**vars(args), "transport_schedule": schedule}
    state = content["transport_state"]
    saved = {**content["config"], "transport_schedule": state.get("schedule", schedule)}
    if saved["transport_norm"] == now["transport_norm"]:
        staged.weights.load_state_dict(state)
    changed = changes(saved, now)
    if changed and args.process_index == 0:
        print(f"hf_mmst: from {checkpoint} on {changed}")


def load(folder: str, staged: StagedModel, args: MMSTConfig, wrapper: Wrapper) -> bool:
    """
    Load the heads, and the model's weights by way of `from_pretrained`, if it is a plain Hugging Face model.

    `save_pretrained` writes the key names of the Hub. Where those are not the module's own (ViT, DeiT, Swin, ...),
    the host's `load_state_dict(strict=False)` would restore nothing and only warn.

    Returns:
        `bool`: whether the model's weights were loaded; if not, that is left to the host.

    Raises:
        `ValueError`: if the checkpoint is of other stages, or of a wrapper from which the optimizer cannot go on.
    """
    of_host = is_of_host(folder, staged)
    if not of_host:
        check_stages(folder, staged, args)
    wrapper.refuse_checkpoint(folder)
    if wrapper.own_files:
        return False
    heads, model = staged.heads, staged.model
    if not of_host:
        load_own(heads, read_tensors(Path(folder) / HEADS_NAME, heads.state_dict(), "this run"))
    if not isinstance(model, PreTrainedModel):
        _check_adapter(folder, model)
        return False
    widest = functools.reduce(torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()})
    load_own(model, load_whole(type(model), folder, config=model.config, dtype=widest).state_dict())
    return True


def _check_adapter(folder: str, model: Any) -> None:
    """
    Raises:
        `ValueError`: if the file of the adapter that learns has other tensors: the host would load what it finds.
    """
    adapter = model.active_adapters[0] if hasattr(model, "peft_config") else ""
    path = Path(folder, "" if adapter == "default" else adapter, ADAPTER_SAFE_WEIGHTS_NAME)
    if not adapter or not path.is_file():
        return
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    needed = {name for name in own if HEADS not in name}
    found = tensor_names(path)
    refuse_others(folder, model, needed - found, found - needed - model.state_dict().keys())  # embeddings may be there
