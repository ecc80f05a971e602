"""What is planned with: a model on the meta device, from a name or configuration, and a batch of zeros for it."""

import copy
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..cut.example_inputs import dummy_inputs, num_positions
from ..cut.objectives import objective_of
from ..cut.probe import on_meta
from ..field_checks import a_model, one_of, whole

SEQ_LEN = 128
TASKS = {
    "images": AutoModelForImageClassification,
    "texts": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
}


def model_of(model: nn.Module | PretrainedConfig | str, task: str | None = None) -> nn.Module:
    """
    The model, or on the meta device the one that a configuration, a name or a folder describes.

    Args:
        model (`nn.Module`, `PretrainedConfig` or `str`): what is planned for.
        task (`str`, *optional*): one of [`TASKS`], for a configuration or a name; by default that of a causal language
            model's, else classification of images or of texts.

    Raises:
        `ValueError`: if there is none of that name, or it has no model for the task.
    """
    if task is not None:
        one_of("task", task, TASKS)
    if isinstance(model, nn.Module):
        if task is not None:
            raise ValueError(f"task={task!r}, but a {type(model).__name__} has its own. Leave task unset.")
        return model
    if isinstance(model, PretrainedConfig):
        config = model
    else:
        if not os.path.isfile(model):
            a_model("model", model)
        config = AutoConfig.from_pretrained(model)
    autos: list[Any] = [TASKS["images"], TASKS["texts"]] if task is None else [TASKS[task]]
    if task is None and {*(config.architectures or [])} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        autos = [TASKS["causal-lm"]]
    for auto in autos:
        if type(config) in auto._model_mapping:
            if auto is TASKS["texts"] and config.get_text_config().pad_token_id is None:
                config = copy.deepcopy(config)
                config.get_text_config().pad_token_id = 0  # any token: a decoder looks for the last that is another
            with torch.device("meta"), no_init_weights():
                return auto.from_config(config)
    if task is not None:
        able = [name for name, auto in TASKS.items() if type(config) in cast(Any, auto)._model_mapping]
        has = f"Set task to one of {', '.join(able)}." if able else "Pass the model itself."
        raise ValueError(f"{type(config).__name__} has no model for task={task!r}. {has}")
    raise ValueError(
        f"{type(config).__name__} has neither a model for image classification nor one for sequence classification. "
        "Set task, or pass the model itself."
    )


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """
    A copy of a model on the meta device, in which LoRA adapters beside all linear layers learn, and the head itself.

    Raises:
        `ImportError`: without PEFT.
    """
    if find_spec("peft") is None:
        raise ImportError("lora needs PEFT: pip install peft.")
    from peft import LoraConfig, inject_adapter_in_model

    twin = on_meta(model)
    head = [name for name, _ in model.named_children() if name not in (model.base_model_prefix, "dropout")]
    config = LoraConfig(r=rank, target_modules="all-linear", exclude_modules=head, modules_to_save=head)
    return inject_adapter_in_model(config, twin)


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
