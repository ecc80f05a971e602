"""What is planned with: a model on the meta device, from a name or configuration, and a batch of zeros for it."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..cut.example_inputs import dummy_inputs, num_positions
from ..cut.objectives import objective_of
from ..cut.probe import on_meta
from ..field_checks import a_model, whole

SEQ_LEN = 128


def model_of(model: nn.Module | PretrainedConfig | str) -> nn.Module:
    """
    The model, or on the meta device the one that a configuration, a name or a folder describes.

    Raises:
        `ValueError`: if there is none of that name, or it can do neither of the tasks that can be planned by name.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, PretrainedConfig):
        config = model
    else:
        if not os.path.isfile(model):
            a_model("model", model)
        config = AutoConfig.from_pretrained(model)
    autos: tuple[Any, ...] = (AutoModelForImageClassification, AutoModelForSequenceClassification)
    if {*(config.architectures or [])} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        autos = (AutoModelForCausalLM,)
    for auto in autos:
        if type(config) in auto._model_mapping:
            with torch.device("meta"), no_init_weights():
                return auto.from_config(config)
    raise ValueError(
        f"{type(config).__name__} has neither a model for image classification nor one for sequence classification. "
        "Pass the model itself."
    )


def batch_of(
    model: nn.Module, batch: int | Mapping[str, torch.Tensor], seq_len: int | None, image_size: int | None
) -> Mapping[str, torch.Tensor]:
    """
    The batch with labels, or as many samples of these sizes, on the meta device.

    Raises:
        `ValueError`: for sizes that the model cannot take.
    """
    if isinstance(batch, Mapping):
        for name, value in (("seq_len", seq_len), ("image_size", image_size)):
            if value is not None:
                raise ValueError(
                    f"{name}={value}, but the batch has its own. Set batch to a number, or leave {name} unset."
                )
    else:
        whole(1, "samples at once on one device")("batch_size", batch)
        batch = dummy_inputs(model, batch, "meta", **_sizes(model, seq_len, image_size))
        if seq_len is not None or image_size is not None:
            _try(model, batch, f"image_size={image_size}" if seq_len is None else f"seq_len={seq_len}")
    objective = objective_of(model)
    if "labels" in batch or objective is None:
        return batch
    shape = next(iter(batch.values())).shape
    if objective.head == "pooled":
        shape = shape[:1]
    return {**batch, "labels": torch.zeros(shape, dtype=torch.long, device="meta")}


def with_adapters(model: Any) -> nn.Module:
    """The model with LoRA of rank 16 in all linear layers, and its head learning as a whole (PEFT)."""
    from peft import LoraConfig, get_peft_model

    head = [name for name, _ in model.named_children() if name not in (model.base_model_prefix, "dropout")]
    config = LoraConfig(r=16, target_modules="all-linear", exclude_modules=head, modules_to_save=head)
    return get_peft_model(model, config)


def _sizes(model: nn.Module, seq_len: int | None, image_size: int | None) -> dict[str, int]:
    takes: Any = model.main_input_name
    for name, value, inputs in (("seq_len", seq_len, "input_ids"), ("image_size", image_size, "pixel_values")):
        if value is None:
            continue
        whole(1, "the model's own if unset")(name, value)
        if takes != inputs:
            raise ValueError(
                f"{name}={value} is for models that take {inputs}, but {type(model).__name__} takes {takes}. Leave "
                f"{name} unset."
            )
    if takes != "input_ids":
        return {} if image_size is None else {"image_size": image_size}
    most = num_positions(model)
    if seq_len is not None and most is not None and seq_len > most:
        raise ValueError(
            f"seq_len={seq_len}, but {type(model).__name__} has positions for {most} tokens. Set seq_len to {most} or "
            "less."
        )
    return {"seq_len": seq_len or min(SEQ_LEN, most or SEQ_LEN)}


def _try(model: nn.Module, batch: Mapping[str, torch.Tensor], size: str) -> None:
    """Run the model on inputs of a size that the user has set."""
    try:
        with torch.no_grad():
            on_meta(model).eval()(**batch)
    except (RuntimeError, ValueError) as error:
        name = size.partition("=")[0]
        raise ValueError(
            f"{size} is none that {type(model).__name__} can take ({error}). Set {name} to another, or leave it unset."
        ) from error
