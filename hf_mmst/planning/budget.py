"""Plans for the arguments of a run: its peak memory, and with `memory_budget` the settings that fit."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..config import MMSTConfig
from ..cut.layers import find_layers
from ..distributed.layer_shards import refuse_in_shards
from ..field_conflicts import OF_OFFLOADED_LAYERS
from .devices import device_like, measured_cpu
from .operations import Peak
from .planner import LOCAL_ORDERS, plan
from .plans import Plan, Row, reason_for
from .simulation import Simulation
from .ways import Way

logger = logging.get_logger(__name__)


def plan_for(
    args: MMSTConfig,
    model: nn.Module,
    batch: Mapping[str, Any] | None,
    has_local_losses: bool = True,
    can_offload: bool = True,
) -> Row:
    """
    Plan for `args.memory_budget` and write the chosen settings into `args`; the budget is then unset.

    A `num_stages` that the user has set is kept: end-to-end training, which has no stages, is not chosen then. In
    several processes layers are in shards if the accelerator is: where `stage_order="end_to_end"` was set.

    Args:
        args ([`MMSTConfig`]), model (`nn.Module`): what is trained.
        batch (`Mapping[str, Any]`, *optional*): on batches like this one; `None` if there are none.
        has_local_losses (`bool`): whether stages can learn; if not, the model is trained end to end.
        can_offload (`bool`): whether layers can be offloaded.

    Raises:
        `ValueError`: if nothing fits, saying what would, or if there is no batch.
    """
    if batch is None:
        raise ValueError(
            f'memory_budget="{args.memory_budget}" is planned with the first samples of train_dataset, but there '
            "are none, or none that could be read again. Pass a dataset with samples, or leave memory_budget unset."
        )
    precision, device = _precision_and_device(args)
    steps_at_once = args.gradient_accumulation_steps == 1 and not args.fp16
    num_stages = None if args.chooses_stages or not has_local_losses else args.num_stages
    several = args.world_size > 1
    offloads = not args.fp16 and args.feature_cache == "none" and num_stages in (None, 1)
    if args.shards_layers:
        refuse_in_shards(model, find_layers(model))
    try:
        found = plan(
            model,
            _inputs_of(batch),
            args.memory_budget,
            precision=precision,
            device=device,
            num_stages=num_stages,
            without=([*LOCAL_ORDERS] if not has_local_losses else [])
            + (["stage_clipping"] if not steps_at_once else [])
            + (["offload"] if not can_offload or (several and not args.shards_layers) else [])
            + (["end_to_end"] if not offloads else []),
            head_layers=args.head_layers,
            head_pooling=args.head_pooling,
            stage_objective=args.stage_objective,
            stage_order=None if args.chooses_order else args.stage_order,
            speeds=measured_cpu(precision) if device == "cpu" else device_like(torch.cuda.get_device_name()),
            # Of other optimizers it is not known yet whether they step layer by layer on the device.
            offloading={}
            if several
            else ({} if args.optim.startswith("adamw_torch") else {"offloaded_step": "host"}) | _offloading(args),
            num_processes=args.world_size,
        )
    except RuntimeError as error:  # which fake tensors raise where data decides
        raise ValueError(
            f'memory_budget="{args.memory_budget}", but a {type(model).__name__} cannot be followed on tensors without '
            f"data ({error}). Choose num_stages and stage_order yourself, and leave memory_budget unset."
        ) from error
    if args.shards_layers:  # as it was set up with the accelerator
        found = _in_shards(found)
    if found.chosen is None:
        given = "" if num_stages is None else f", num_stages={num_stages}"
        hint = " Or leave num_stages unset, so that it is planned, too." if given else ""
        if several and not args.shards_layers and args.chooses_order and not given:
            hint += ' Or set stage_order="end_to_end", with which layers are offloaded in several processes, too.'
        raise ValueError(f'memory_budget="{args.memory_budget}"{given}: {found.reason}{hint}')
    if args.process_index == 0:
        print(f"hf_mmst: {found.reason} {found.config()}")
    args.memory_budget = None
    for name, value in {"stage_order": "simultaneous", **found.settings}.items():
        setattr(args, name, {**(getattr(args, name) or {}), **value} if isinstance(value, dict) else value)
    if args.stage_order != "sequential" and args.feature_cache != "none":
        args.feature_cache = "none"
        if args.process_index == 0:
            print("hf_mmst: all stages learn on each batch, so there is nothing to keep in a feature cache")
    for name in OF_OFFLOADED_LAYERS if args.offload != "layers" else ():
        if getattr(args, name) is not None and args.process_index == 0:
            print(f"hf_mmst: no layers are offloaded, so {name} has no effect")
        setattr(args, name, None)
    args.check_stages()
    return found.chosen


def _in_shards(found: Plan) -> Plan:
    """The plan with the way in which layers are offloaded as the only one to choose."""
    row = next(row for row in found.rows if row.way.offload == "layers")
    chosen = row if row.fits(found.budget) else None
    return replace(found, chosen=chosen, reason=reason_for(found.rows, found.budget, chosen))


def _offloading(args: MMSTConfig) -> dict[str, Any]:
    """How layers are offloaded, as far as the arguments say."""
    given = {name: getattr(args, name) for name in OF_OFFLOADED_LAYERS}
    return {name: value for name, value in given.items() if value is not None} | {"rests_inputs": args.rests_inputs}


def planned_peak(args: MMSTConfig, model: nn.Module, batch: Mapping[str, Any]) -> Peak | None:
    """What the run that `args` describe takes; `None` for a cut by names, or a model that cannot be simulated."""
    if args.stage_boundaries is not None:
        return None
    try:
        simulation = simulation_of(args, model, batch)
        return max((simulation.peak(way) for way in ways_of(args, len(simulation.ends))), key=lambda peak: peak.total)
    except (ValueError, RuntimeError, NotImplementedError) as error:  # fake tensors raise these where data decides
        logger.warning(f"hf_mmst has no plan of this run to compare with ({type(error).__name__}: {error})")
        return None


def simulation_of(args: MMSTConfig, model: nn.Module, batch: Mapping[str, Any]) -> Simulation:
    """The simulation of a run with these arguments and batches like this one."""
    given = *_precision_and_device(args), args.head_layers, args.head_pooling
    return Simulation(model, _inputs_of(batch), *given, num_processes=args.world_size)


def _inputs_of(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch, if its shapes are all that a simulation needs of it."""
    for name, value in batch.items():
        if isinstance(value, list | tuple | dict):
            raise ValueError(
                f"{name} is a {type(value).__name__}, not a tensor, so that no step can be followed without data. "
                "Choose num_stages and stage_order yourself, and leave memory_budget unset."
            )
    return batch


def _precision_and_device(args: MMSTConfig) -> tuple[str, str]:
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return precision, "cuda" if args.device.type == "cuda" else "cpu"


def ways_of(args: MMSTConfig, num_layers: int) -> list[Way]:
    """The ways in which a run with these arguments trains, in its turns, a model of that many layers."""
    checkpointing = bool(args.activation_checkpointing)
    local = Way(
        num_stages=args.stages_of(num_layers),
        stage_order="sequential" if args.stage_order == "multi_lap" else args.order,
        stage_objective=args.stage_objective,
        offload=args.offload or "none",
        resident_layers=args.resident_layers,
        stage_clipping=args.stage_clipping,
        activation_checkpointing=checkpointing,
        **(_offloading(args) if args.offload == "layers" else {}),
    )
    offloaded = None if args.offload == "none" else Way(offload="layers", **_offloading(args))
    return [local, offloaded or Way(activation_checkpointing=checkpointing)] if args.end_to_end_laps else [local]
