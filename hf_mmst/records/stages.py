"""`Stages`: what a checkpoint holds beside the plain model, in `stages.json` and `stages.safetensors`."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from ..config import TransportNorm
from ..cut.objectives import HeadKind
from ..cut.partition import Partition
from ..method.heads import StageHeads
from ..method.transport import TransportWeights
from .atomic_writes import write_atomically
from .reading import damaged, listed, read_json, read_tensors

JSON_NAME, HEADS_NAME = "stages.json", "stages.safetensors"
FORMAT_VERSION = 2  # 2: heads of several kinds
Size = Annotated[int, range(1, 2**24)]  # of tensors; products of larger ones overflow


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
    write_atomically(Path(folder) / HEADS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
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
    write_atomically(Path(folder) / JSON_NAME, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


def checkpoint_folder(name: str | os.PathLike) -> Path:
    """The folder of a checkpoint, with its stages fetched from the Hub, if `name` is one there and no folder."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"{name} is neither a folder nor a name on the Hub. Pass a folder that MMSTTrainer has written, or a name "
            "such as me/vit-stages."
        )
    cached_file(name, HEADS_NAME)
    return Path(cached_file(name, JSON_NAME)).parent


class _Format(TypedDict):
    format_version: Annotated[int, range(FORMAT_VERSION, 2**24)]


class _Heads(TypedDict):
    kind: HeadKind
    widths: list[Size]
    num_labels: Annotated[int, range(2**24)]
    pooling: Literal["mean", "cls"]
    num_layers: Annotated[int, range(2**24)]
    maps: list[bool]


class _Config(TypedDict):
    transport_norm: TransportNorm


class _Schedule(TypedDict, total=False):  # what earlier versions did not write
    schedule: str
    weight: float


class _TransportState(_Schedule):
    weights: list[float]
    multipliers: list[float]
    steps: list[Annotated[int, range(max(TransportWeights.INTERVAL.values()))]]
    sums: list[list[float]]


class _Content(_Format):
    stages: list[list[str]]
    heads: _Heads
    config: _Config
    transport_state: _TransportState


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
        `FileNotFoundError`: if there is no such folder, or it holds no stages.
        `ValueError`: if they are damaged or were written by a later version of the format, or the heads' layers cannot
            be made.
    """
    folder = checkpoint_folder(name)
    content = read_stages(folder)
    partition = Partition(tuple(tuple(stage) for stage in content["stages"]))
    settings = content["heads"]
    number = settings.pop("num_layers")
    layers: list[nn.Module] = []
    if number > 0:
        model = _architecture(name) if model is None else model
        _check_layers(model, partition)
        layers = [model.get_submodule(name) for name in partition.layers[-number:]]
    with torch.device("meta"):  # no memory before the file is known to hold such heads
        like = StageHeads(**settings).state_dict()
    like |= {
        f"layers.{i}.{key}": tensor for i, layer in enumerate(layers) for key, tensor in layer.state_dict().items()
    }
    tensors = read_tensors(folder / HEADS_NAME, like, JSON_NAME)
    heads = StageHeads(**settings, layers=layers)
    heads.load_state_dict(tensors)
    return Stages(partition, heads, content["config"], content["transport_state"])


def read_stages(folder: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint's `stages.json` says. Errors: those of [`load_stages`]."""
    path = Path(folder) / JSON_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {JSON_NAME}, so it was not written by MMSTTrainer. Pass a folder that was, or train "
            "from the model's weights with from_pretrained."
        )
    version = read_json(path, _Format)["format_version"]
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this version of hf_mmst reads up to {FORMAT_VERSION}. Upgrade "
            "hf_mmst."
        )
    content = read_json(path, _Content)
    stages, heads, state = content["stages"], content["heads"], content["transport_state"]
    names = [name for stage in stages for name in stage]
    if not stages or (len(stages) > 1 and not all(stages)) or len({*names}) < len(names):
        raise damaged(path, "stages are not lists of different layers")
    if heads["num_layers"] > len(names):
        raise damaged(path, f"heads.num_layers is {heads['num_layers']}, but there are {len(names)} layers")
    num_heads = len(stages) - 1 if heads["widths"] else 0  # none with stage_objective="model"
    lengths = [
        *((f"heads.{key}", heads[key], num_heads) for key in ("widths", "maps")),
        *((f"transport_state.{key}", value, len(stages)) for key, value in state.items() if isinstance(value, list)),
        *(("transport_state.sums", sums, 2) for sums in state["sums"]),
    ]
    for where, found, expected in lengths:
        if len(found) != expected:
            raise damaged(path, f"{where} has {len(found)} values, not {expected}, for {len(stages)} stages")
    for key in ("weights", "multipliers"):
        if not all(0 <= value < math.inf for value in state[key]):
            raise damaged(path, f"transport_state.{key} are {state[key]}")
    return content


def check_model(model: Any, stages: Stages) -> None:
    """
    Raises:
        `ValueError`: if the stages are those of another model, or have no heads.
    """
    _check_layers(model, stages.partition)
    if not len(stages.heads) and stages.partition.num_stages > 1:
        raise ValueError(
            f"The stages of this {type(model).__name__} have learned from its own loss and have no auxiliary heads, so "
            'that only the whole model answers. Use it by itself, or train with stage_objective="local".'
        )
    if len(stages.heads) and stages.heads.num_labels != model.config.num_labels:
        raise ValueError(
            f"The stages' heads have num_labels={stages.heads.num_labels}, {type(model).__name__} has "
            f"{model.config.num_labels}. Pass the model that was trained in these stages."
        )


def _check_layers(model: nn.Module, partition: Partition) -> None:
    lacking = {*partition.layers} - {name for name, _ in model.named_modules()}
    if lacking:
        raise ValueError(
            f"{JSON_NAME} has layers that {type(model).__name__} does not have: {listed(sorted(lacking))}. Pass the "
            "model that was trained in these stages."
        )


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
    kind = next(iter(config.architectures or ()), "model of no class")
    if not hasattr(transformers, kind):
        raise ValueError(
            f"{name} holds a {kind}, which transformers does not have, so the layers of its stages' heads cannot be "
            "made. Pass the model that it belongs to as model."
        )
    with no_init_weights():
        return getattr(transformers, kind)(config)
