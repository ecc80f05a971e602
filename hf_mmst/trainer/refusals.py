"""Errors for what cannot be trained in stages: each says what was given, why it cannot be, and what to set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import unwrap_peft_model

from ..config import MMSTConfig
from ..cut.layers import checkpoints_across
from ..cut.objectives import objective_of
from ..cut.partition import Partition


def refuse_other_arguments(args: Any) -> None:
    """
    Raises:
        `TypeError`: if `args` is not an [`MMSTConfig`].
    """
    if not isinstance(args, MMSTConfig):
        raise TypeError(
            f"MMSTTrainer got args of type {type(args).__name__}. Use MMSTConfig in its place: it takes all that "
            "TrainingArguments takes."
        )


def refuse_task(model: nn.Module, args: MMSTConfig, label_names: Sequence[str], has_own_loss: bool) -> None:
    """
    Refuse a model whose stages could not learn from losses of their own.

    Args:
        model (`nn.Module`): the model, an adapter's wrapper around it included.
        args ([`MMSTConfig`]): the settings of the run.
        label_names (`Sequence[str]`): the trainer's.
        has_own_loss (`bool`): whether there is a `compute_loss_func`.

    Raises:
        `ValueError`: saying what to set.
    """
    base = unwrap_peft_model(model)
    objective, config = objective_of(model), getattr(base, "config", None)
    if objective is None and not has_own_loss:
        raise ValueError(
            f"{type(base).__name__} has no head of which the stages' local losses could be made: these are known "
            "for classification and regression of sequences, images and audio, for classification of tokens, and "
            "for masked and causal language models with one stack of layers. Pass such a model, a "
            "compute_loss_func for a loss of your own (of pooled logits), or set num_stages to 1."
        )
    if len(label_names) > 1 and "labels" not in label_names:
        raise ValueError(
            f"label_names={label_names} are several, but the loss of a stage is of one. Set label_names to "
            "one name, or num_stages to 1."
        )
    if objective is not None and objective.head != "pooled" and args.head_pooling != "auto":
        raise ValueError(
            f'head_pooling="{args.head_pooling}", but a {type(base).__name__} has a label for each token, and '
            'nothing is pooled. Set head_pooling="auto".'
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits=True adds a loss of all routers at once, from which the stages of "
            f"{type(base).__name__} before the last would not learn. Set it to False."
        )


def refuse_placement(trainer: Trainer) -> None:
    """
    Refuse placements of the model that know nothing of stages.

    Raises:
        `ValueError`: for FSDP on XLA, a model that was sharded when it was loaded, and `nn.DataParallel`.
    """
    if trainer.is_fsdp_xla_enabled or getattr(trainer, "is_distributed_loading_by_transformers", False):
        what = "FSDP on XLA" if trainer.is_fsdp_xla_enabled else "A model that was put in shards when it was loaded"
        raise ValueError(f"{what} cannot be trained in stages. Load the model whole, and set fsdp=True without xla.")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs are visible to one process, which nn.DataParallel cannot train in stages. "
            "Start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
        )


def refuse_half(model: nn.Module) -> None:
    """
    Raises:
        `ValueError`: if weights that learn are float16.
    """
    if any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError(
            f"Weights of {type(model).__name__} that learn are float16, as its checkpoint may be: small steps are "
            "lost and squared gradients overflow. Load the model with dtype=torch.float32, and set bf16=True or "
            "fp16=True for mixed precision."
        )


def refuse_checkpointing(model: nn.Module, partition: Partition, args: MMSTConfig) -> None:
    """
    Raises:
        `ValueError`: if activation checkpointing recomputes a module within which a stage ends, or has the inputs of
            layers rest where there is no accelerator.
    """
    by_host = args.activation_checkpointing and (args.offload != "layers" or args.resident_layers > 0)
    if by_host and args.rests_inputs and args.device.type == "cpu":
        raise ValueError(
            'activation_checkpointing_kwargs={"offload": True} has inputs of layers rest in pinned memory, which there '
            "is beside an accelerator only, but training is on a CPU. Leave offload out of "
            'activation_checkpointing_kwargs, or set offload="layers" and resident_layers=0, by which they rest in '
            "files."
        )
    name = checkpoints_across(model, partition)
    if name is not None and model.get_submodule(name).gradient_checkpointing:
        raise ValueError(
            f"Activation checkpointing runs {name} of {type(model).__name__} twice as a whole, although a stage "
            "ends within it. Set gradient_checkpointing=False; a larger num_stages saves activations, too."
        )


def refuse_rates(args: MMSTConfig, optimizer: Any) -> None:
    """
    Raises:
        `ValueError`: if rates of stages or heads are set, but the user has made the optimizer.
    """
    for name in ("head_learning_rate", "stage_learning_rate_decay"):
        if optimizer is not None and getattr(args, name) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)} has no effect on an optimizer of your own. Give its groups the "
                f"rates you want and leave {name} unset, or leave the optimizer to the trainer."
            )


def refuse_other_loader(trainer: str) -> None:
    """
    Raises:
        `ValueError`: always; `trainer`, a class, has a data loader of its own beside a feature cache.
    """
    raise ValueError(
        f"get_train_dataloader of {trainer} does not call that of MMSTTrainer, which marks samples "
        'so that their features are found again. Set feature_cache="none" and leave cache_views unset, or call '
        "super().get_train_dataloader()."
    )
