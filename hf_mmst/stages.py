"""What a checkpoint holds beside the plain model: the cut in `stages.json`, the heads in `stages.safetensors`."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from .files import replace
from .heads import StageHeads
from .partition import Partition

JSON_NAME, HEADS_NAME = "stages.json", "stages.safetensors"
FORMAT_VERSION = 2  # 2: heads of several kinds


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
            "kind": stages.heads.kind,
            "widths": stages.heads.widths,
            "num_labels": stages.heads.num_labels,
            "pooling": stages.heads.pooling,
            "num_layers": len(stages.heads.layers),
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


def load_stages(name: str | os.PathLike, model: nn.Module | None = None) -> Stages:
    """
    Read the stages of a checkpoint.

    Args:
        name (`str` or `os.PathLike`): a folder written by [`MMSTTrainer`], the model's own or `checkpoint-*`, or the
            name of a model on the Hub.
        model (`nn.Module`, *optional*):
            The model, for heads with layers like its own; by default one of the architecture in `config.json` is made,
            without weights. A folder of adapters has none.

    Raises:
        `FileNotFoundError`: if the folder holds no stages.
        `ValueError`: if they were written by a later version of the format, or the heads' layers cannot be made.
    """
    folder = checkpoint_folder(name)
    content = read_stages(folder)
    partition = Partition(tuple(tuple(stage) for stage in content["stages"]))
    number = content["heads"].pop("num_layers")
    layers: list[nn.Module] = []
    if number > 0:
        model = _architecture(name) if model is None else model
        layers = [model.get_submodule(name) for name in partition.layers[-number:]]
    heads = StageHeads(**content["heads"], layers=layers)
    heads.load_state_dict(load_file(folder / HEADS_NAME))
    return Stages(partition, heads, content["config"], content["transport_state"])


def read_stages(folder: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint's `stages.json` says. Errors: those of [`load_stages`]."""
    path = Path(folder) / JSON_NAME
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
    return content


def _architecture(name: str | os.PathLike) -> nn.Module:
    """A model as in the checkpoint's `config.json`, with buffers but without weights."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} holds no config.json, so the layers of its stages' heads cannot be made. Pass the model that it "
            "belongs to as model."
        ) from error
    with no_init_weights():
        return getattr(transformers, config.architectures[0])(config)
