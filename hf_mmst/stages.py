"""What a checkpoint holds beside the plain model: the cut in `stages.json`, the heads in `stages.safetensors`."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from .files import replace
from .heads import StageHeads
from .partition import Partition

JSON_NAME, HEADS_NAME = "stages.json", "stages.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Stages:
    """
    The stages of a trained model.

    Attributes:
        partition (`Partition`): the cut.
        heads (`StageHeads`): the auxiliary heads of stages 1 .. K-1, on the CPU.
        config (`dict[str, Any]`): the fields of [`MMSTConfig`] that the stages were trained with.
        transport_state (`dict[str, Any]`): where the transport weights stood.
    """

    partition: Partition
    heads: StageHeads
    config: dict[str, Any]
    transport_state: dict[str, Any]


def save_stages(folder: str | os.PathLike, stages: Stages, weights: dict[str, Any] | None = None) -> None:
    """Write both files; each is written beside and renamed. `weights` are the heads' tensors, if not their own."""
    tensors = stages.heads.state_dict() if weights is None else weights
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(Path(folder) / HEADS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    content = {
        "format_version": FORMAT_VERSION,
        "stages": stages.partition.stages,
        "heads": {
            "widths": stages.heads.widths,
            "num_labels": stages.heads.num_labels,
            "pooling": stages.heads.pooling,
            "maps": stages.heads.maps,
        },
        "config": stages.config,
        "transport_state": stages.transport_state,
    }
    replace(Path(folder) / JSON_NAME, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


def checkpoint_folder(name: str | os.PathLike) -> Path:
    """The folder of a checkpoint, with its stages fetched from the Hub, if `name` is one there and no folder."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    cached_file(name, HEADS_NAME)
    return Path(cached_file(name, JSON_NAME)).parent


def load_stages(name: str | os.PathLike) -> Stages:
    """
    Read the stages of a checkpoint.

    Args:
        name (`str` or `os.PathLike`): a folder written by [`MMSTTrainer`], the model's own or `checkpoint-*`, or the
            name of a model on the Hub.

    Raises:
        `FileNotFoundError`: if the folder holds no stages.
        `ValueError`: if they were written by a later version of the format.
    """
    folder = checkpoint_folder(name)
    path = folder / JSON_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {JSON_NAME}, so it was not written by MMSTTrainer. Pass a folder that was, or train "
            "from the model's weights with from_pretrained."
        )
    content = json.loads(path.read_text())
    if content["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {content['format_version']}, this version of hf_mmst reads up to "
            f"{FORMAT_VERSION}. Upgrade hf_mmst."
        )
    heads = StageHeads(**content["heads"])
    heads.load_state_dict(load_file(folder / HEADS_NAME))
    partition = Partition(tuple(tuple(stage) for stage in content["stages"]))
    return Stages(partition, heads, content["config"], content["transport_state"])
