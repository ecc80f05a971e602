"""Checks of settings against each other: those that exclude each other are refused, with what to set instead."""

import os
from typing import Any

from accelerate import PartialState
from transformers.training_args import OptimizerNames

OF_OFFLOADED_LAYERS = ("layer_batch_size", "offloaded_step")
# What each of these fields must be where processes share out the stages.
_STAGE_PARALLEL = {
    "stage_order": "simultaneous",
    "offload": "none",
    "feature_cache": "none",
    "end_to_end_laps": 0,
    "memory_budget": None,
    "fp16": False,
    "fp16_full_eval": False,
    "bf16_full_eval": False,
    "auto_find_batch_size": False,
    "eval_use_gather_object": False,
    "deepspeed": None,
    "fsdp": None,
    "torch_compile": False,
}


def refuse_conflicts(args: Any) -> None:
    """
    Check the fields of an [`MMSTConfig`] against each other.

    Raises:
        `ValueError`: for fields that exclude each other, saying which to set to what.
    """
    _refuse_laps(args)
    _refuse_with_model_loss(args)
    _refuse_with_offload(args)
    _refuse_with_feature_cache(args)
    _refuse_with_budget(args)
    _refuse_processes(args)
    _refuse_host_settings(args)
    if args.stage_parallel:
        _refuse_with_stage_parallel(args)


def launched_with(*kinds: str) -> bool:
    """Whether accelerate's launcher has set up one of these kinds of sharding, `"FSDP"` or `"DEEPSPEED"`."""
    return any(os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true" for kind in kinds)


def _refuse_laps(args: Any) -> None:
    if args.num_laps > 1 and args.stage_order != "multi_lap":
        raise ValueError(
            f'num_laps={args.num_laps} has no effect with stage_order="{args.stage_order}". Set '
            'stage_order="multi_lap", or num_laps=1.'
        )
    if args.end_to_end_laps and args.stage_order == "end_to_end":
        raise ValueError(
            f'end_to_end_laps={args.end_to_end_laps} has no effect with stage_order="end_to_end", which is end to end '
            "all along. Set end_to_end_laps=0, or another stage_order."
        )


def _refuse_with_model_loss(args: Any) -> None:
    if args.stage_objective != "model":
        return
    planned = args.memory_budget is not None  # the order is not known yet
    if args.stage_order in ("simultaneous", "end_to_end") and not planned:
        raise ValueError(
            'stage_objective="model" lets one stage learn from the model\'s loss while the others are frozen, but with '
            f'stage_order="{args.stage_order}" all of them learn on each batch. Set stage_order to "sequential" or '
            '"multi_lap", or stage_objective="local".'
        )
    for name, value in (("head_layers", None), ("head_pooling", "auto")):
        if getattr(args, name) != value:
            raise ValueError(
                f'{name}={getattr(args, name)!r} has no effect with stage_objective="model", for which no auxiliary '
                f'heads are made. Leave {name} unset, or set stage_objective="local".'
            )


def _refuse_with_offload(args: Any) -> None:
    is_open = args.stage_order is None and args.offload in (None, "layers")
    if args.resident_layers and not is_open and (args.stage_order, args.offload) != ("end_to_end", "layers"):
        raise ValueError(
            f"resident_layers={args.resident_layers} keeps some layers on the device while the others are offloaded, "
            f'but stage_order="{args.stage_order}" and offload="{args.offload}". Set stage_order="end_to_end" and '
            'offload="layers", or resident_layers=0.'
        )
    for name in OF_OFFLOADED_LAYERS:
        if getattr(args, name) is not None and args.offload not in (None, "layers"):
            raise ValueError(
                f"{name}={getattr(args, name)!r} is for layers that are offloaded, but "
                f'offload="{args.offload}". Set offload="layers", or leave {name} unset.'
            )
    if args.offload in (None, "none"):
        return
    if args.offload == "stages" and args.stage_order in (None, "simultaneous", "end_to_end"):
        raise ValueError(
            f'offload="stages" keeps the stage that learns in device memory, but with stage_order={args.stage_order!r} '
            'all of them learn on each batch. Set stage_order to "sequential" or "multi_lap", or offload="layers".'
        )
    if (args.offload == "layers" or args.end_to_end_laps) and args.fp16:
        raise ValueError(
            f'offload="{args.offload}" steps layers one by one in host memory, which a gradient scaler cannot follow. '
            'Set bf16=True in the place of fp16, or offload="none".'
        )
    every = (args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
    if args.offload == "layers" and every != 1:
        raise ValueError(
            f'every_n_layers={every} has no effect with offload="layers", where each layer is recomputed once its '
            "weights have come again. Leave it out of activation_checkpointing_kwargs; resident_layers keeps some "
            "layers, and what they computed, on the device."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name}=True evaluates with all weights in low precision, but layers at rest come to the device "
                f"as they are. Set {name}=False: bf16=True evaluates in mixed precision, too."
            )
    if args.world_size > 1:
        _refuse_with_shards(args)
    elif args.accelerator_config.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True hands out batches on the device, but where anything is offloaded nothing is "
            "moved there beforehand. Leave dispatch_batches unset in accelerator_config."
        )


def _refuse_with_shards(args: Any) -> None:
    what = f'offload="{args.offload}" in {args.world_size} processes'
    if args.stage_order != "end_to_end":
        raise ValueError(
            f'{what} is for stage_order="end_to_end", in which each holds a shard of every layer, but it is '
            f'"{args.stage_order}". Set offload="none", stage_order="end_to_end", or start one process.'
        )
    if args.deepspeed or launched_with("DEEPSPEED"):
        raise ValueError(
            f"{what} is done by FSDP2, which cannot be combined with DeepSpeed. Leave deepspeed unset (and "
            "use_deepspeed in the accelerate configuration), or train with it as Trainer does: set num_stages=1, and "
            "leave stage_order unset."
        )
    if args.fsdp or launched_with("FSDP"):
        raise ValueError(
            f"{what} sets FSDP2 by itself, but there is an FSDP configuration of your own. Leave fsdp unset (and "
            'use_fsdp in the accelerate configuration), or set offload="none", by which yours is used.'
        )
    if args.resident_layers:
        raise ValueError(
            f"{what} has every layer in shards, but resident_layers={args.resident_layers} would keep some whole. Set "
            "resident_layers=0, or start one process."
        )
    for name in OF_OFFLOADED_LAYERS:
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is for layers that one process offloads, but there are "
                f"{args.world_size}. Leave {name} unset, or start one process."
            )
    if args.rests_inputs:
        raise ValueError(
            f"{what} keeps the inputs of layers on the device, but activation_checkpointing_kwargs would offload them. "
            "Leave offload out of activation_checkpointing_kwargs, or start one process."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            f"{what} gathers each layer from all of them, so that the others wait for ever for one whose memory is at "
            'an end. Set auto_find_batch_size=False and per_device_train_batch_size, or offload="none".'
        )


def _refuse_with_feature_cache(args: Any) -> None:
    planned = args.memory_budget is not None  # the order is not known yet
    if args.feature_cache != "none" and args.stage_order in ("simultaneous", "end_to_end") and not planned:
        raise ValueError(
            f'feature_cache="{args.feature_cache}" keeps what a stage gets while the stages before it rest, but '
            f'with stage_order="{args.stage_order}" all of them learn on each batch. Set stage_order to '
            '"sequential" or "multi_lap", or feature_cache="none".'
        )
    if args.cache_views is not None and args.dataloader_persistent_workers:
        raise ValueError(
            "Persistent workers do not learn which epoch it is, and with it which of the cache_views is due. "
            "Set dataloader_persistent_workers=False, or leave cache_views unset."
        )


def _refuse_with_budget(args: Any) -> None:
    if args.memory_budget is None:
        return
    laps_or_cut = args.stage_order == "multi_lap" or args.stage_boundaries is not None or args.end_to_end_laps
    if laps_or_cut or not args.chooses_offload or args.resident_layers:
        raise ValueError(
            f'memory_budget="{args.memory_budget}" chooses what is offloaded, and the cut. Leave offload, '
            "resident_layers, end_to_end_laps and stage_boundaries unset, and stage_order other than "
            '"multi_lap", or leave memory_budget unset.'
        )


def _refuse_processes(args: Any) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > PartialState().num_processes:
        raise ValueError(
            f"{started} processes were started, but each of them would train by itself: without a GPU they find "
            "each other only if told to use the CPU. Set use_cpu=True, or start one process."
        )
    if args.ddp_static_graph:
        raise ValueError(
            "ddp_static_graph=True awaits all gradients at the end of a step, but those of a stage are averaged "
            "when it has learned. Leave it unset."
        )


def _refuse_host_settings(args: Any) -> None:
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "Reentrant checkpointing would silently stop every stage but the first from learning, because a "
            "stage's input carries no gradient. Set use_reentrant to False in activation_checkpointing_kwargs."
        )
    staged = args.num_stages != 1 or args.stage_boundaries is not None or args.offload == "layers"
    optim = OptimizerNames(args.optim).value
    if staged and args.use_cache:
        raise ValueError(
            "use_cache=True keeps the keys and values of all layers in memory, and those that are recomputed or of "
            "heads with layers would be there twice. Set use_cache=False; generate has a setting of its own."
        )
    if staged and (optim in ("lomo", "adalomo") or optim.endswith("_layerwise")):
        raise ValueError(
            f'optim="{optim}" steps each weight within the backward pass, where the rates of stages '
            "and heads, clipping and offload do not reach it. Set optim to another, such as adafactor, and "
            "stage_clipping=True, so that each stage steps right after its backward."
        )


def _refuse_with_stage_parallel(args: Any) -> None:
    for name, value in _STAGE_PARALLEL.items():
        found = getattr(args, name)
        if found and found != value:
            raise ValueError(
                f"{name}={found!r} cannot be combined with stage_parallel=True, where all stages learn on each "
                f"batch, each in the process that holds it. Set {name} to {value!r}, or stage_parallel=False."
            )
    if not args.stage_clipping and args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} clips by the norm of the gradients of all stages, but with "
            "stage_parallel=True the stages are at different batches at any time. Set stage_clipping=True, which "
            "clips each stage by itself, or max_grad_norm=0."
        )
    if args.head_layers:
        raise ValueError(
            f"head_layers={args.head_layers} gives the heads of all stages the same layers, but with "
            "stage_parallel=True each process holds its own stages alone. Set head_layers=0."
        )
    if args.distributed_state is None or args.distributed_state.num_processes == 1:
        raise ValueError(
            "stage_parallel=True shares out the stages over several processes, but there is one. Start the script "
            "with `torchrun --nproc_per_node 2` or `accelerate launch --num_processes 2` (2 or more, at most the "
            "number of stages), or set stage_parallel=False."
        )
