"""`plan`: estimates the memory of ways of training a model, and chooses the one of least compute in a budget."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..cut.token_flow import attends_causally
from ..distributed.layer_shards import refuse_in_shards
from ..field_checks import one_of, parse_bytes, whole
from ..method.heads import is_pretrained
from .choosing import Rows, choose, stage_numbers
from .devices import Device, device_named
from .model_and_batch import batch_of, model_of, with_adapters
from .plans import Plan, reason_for
from .simulation import Simulation
from .ways import PRECISIONS, Way

LOCAL_ORDERS = ("simultaneous", "sequential")  # in which stages learn from losses of their own
ORDERS = (*LOCAL_ORDERS, "end_to_end")
AVOIDABLE = (*ORDERS, "stage_order", "offload", "stage_clipping", "activation_checkpointing")


def plan(
    model: nn.Module | PretrainedConfig | str,
    batch: int | Mapping[str, torch.Tensor],
    budget: int | str | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    num_stages: int | None = None,
    without: Collection[str] = (),
    head_layers: int | None = None,
    seq_len: int | None = None,
    image_size: int | None = None,
    head_pooling: str = "auto",
    stage_objective: str = "local",
    speeds: Device | str | None = None,
    task: str | None = None,
    lora: int | None = None,
    stage_order: str | None = None,
    offloading: Mapping[str, Any] | None = None,
    num_processes: int = 1,
) -> Plan:
    """
    Estimate the memory of ways of training a model, without allocating it, and choose one that fits.

    Each way's step is run on tensors that have no data (see [`Simulation`]); some rows are for comparison.

    The gradients of a pretrained model are exact ones, unless `num_stages` or `stage_order` say otherwise: of
    end-to-end training in device memory, with checkpointing, and with all layers offloaded but as many as fit, the
    fastest that fits is chosen, by the predicted time, or without `speeds` by compute. Else ways are tried from the
    least compute to the most: all stages at once, each stage stepping by itself, end to end with layers offloaded, in
    turn with stages offloaded, the same with checkpointing; with stages, few rather than many.

    Args:
        model (`nn.Module`, `PretrainedConfig` or `str`): a model, a configuration, or a name or folder of one.
        batch (`int` or `Mapping[str, torch.Tensor]`): the number of samples on one device, or such a batch with labels.
        budget (`int` or `str`, *optional*): bytes, or as in `"4GiB"`. Without one, nothing is chosen.
        precision (`str`): `"fp32"`, or autocast to `"bf16"` or `"fp16"`; `"auto"`: bf16 where that fits with less
            compute than fp32, or where fp32 does not fit.
        device (`str`): `"cpu"` or `"cuda"`.
        num_stages (`int`, *optional*): the only K to try; several by default.
        without (`Collection[str]`): settings that must keep their defaults, such as `"offload"`, or orders
            that must not be chosen, such as `"end_to_end"`.
        stage_order (`str`, *optional*): the only order to choose, see [`MMSTConfig`]. Unset: `"end_to_end"` for the
            name of a checkpoint, or a model that was loaded from one, if `num_stages` is unset, too.
        head_layers (`int`, *optional*): of the auxiliary heads, see [`MMSTConfig`].
        seq_len (`int`, *optional*): tokens of a text, if `batch` is a number; 128, or as many as there are positions.
        image_size (`int`, *optional*): side of an image, if `batch` is a number; the model's own by default.
        head_pooling (`str`): of the auxiliary heads, see [`MMSTConfig`].
        stage_objective (`str`): see [`MMSTConfig`]. With `"model"`, the ways are those in which stages learn from the
            model's loss, in turn: all weights on the device, with checkpointing, stages offloaded.
        speeds ([`Device`] or `str`, *optional*): what times are predicted for: the name of a GPU, such as `"rtx4090"`,
            whose memory is then the budget if there is no other, or a [`Device`]. Without, no times are predicted.
        task (`str`, *optional*): of a configuration or a name: `"images"`, `"texts"`, `"tokens"`, `"masked-lm"` or
            `"causal-lm"`; by default what its checkpoint is for, or classification.
        lora (`int`, *optional*): rank of adapters beside all linear layers, which learn in the place of the weights.
        offloading (`Mapping[str, Any]`, *optional*): how layers are offloaded where they are: `layer_batch_size`,
            `offloaded_step` (by default the faster one, on a GPU with `speeds`, else `"host"`) and `rests_inputs`
            (inputs of layers rest, too; by default only if nothing else fits), see [`Way`].
        num_processes (`int`): that share the samples out, each with a device and a batch like this one. All bytes are
            those of one of them, with the whole model on each device beside the gradients that are sent, or end to end
            with the layers in shards (FSDP2, offloaded). Times are predicted only if `speeds` has `between`.

    Raises:
        `ValueError`: for an argument that cannot be, or a model that cannot be cut.
    """
    one_of("precision", precision, ("auto", *PRECISIONS))
    one_of("device", device, ("cpu", "cuda"))
    one_of("head_pooling", head_pooling, ("auto", "mean", "cls"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but PyTorch finds no GPU here. Set device to cpu.")
    one_of("stage_objective", stage_objective, ("local", "model"))
    if stage_order is not None:
        one_of("stage_order", stage_order, ORDERS)
    without = {without} if isinstance(without, str) else {*without}
    for name in without:
        one_of("without", name, AVOIDABLE)
    if num_stages is not None:
        whole(1, "1 trains end to end")("num_stages", num_stages)
    if head_layers is not None:
        whole(0, "0 is a head without layers")("head_layers", head_layers)
    whole(1, "more share the samples out")("num_processes", num_processes)
    offloading = offloading or {}
    if num_processes > 1 and any(offloading.values()):
        names = ", ".join(name for name, value in offloading.items() if value)
        raise ValueError(
            f"{names} in offloading is for layers that one process offloads, but num_processes={num_processes}. Leave "
            "offloading unset, or set num_processes=1."
        )
    if isinstance(speeds, str):
        speeds = device_named(speeds)
    if budget is None and speeds is not None:
        budget = speeds.memory
    limit = None if budget is None else parse_bytes("budget", budget)
    is_checkpoint = isinstance(model, str) or (isinstance(model, nn.Module) and is_pretrained(model))
    is_open = stage_order is None and num_stages is None and stage_objective == "local"
    exact = stage_order == "end_to_end" or (is_open and is_checkpoint)
    if stage_order is not None:
        without |= {*ORDERS} - {stage_order}
    model = model_of(model, task)
    if lora is not None:
        whole(1, "such as 16")("lora", lora)
        model = with_adapters(model, lora)
    if precision == "auto":
        plans = [
            plan(
                *(model, batch, budget, one, device, num_stages, without, head_layers, seq_len, image_size),
                *(head_pooling, stage_objective, speeds, None, None, stage_order, offloading, num_processes),
            )
            for one in ("fp32", "bf16")
        ]
        return min(plans, key=lambda found: math.inf if found.chosen is None else found.chosen.compute)
    inputs = batch_of(model, batch, seq_len, image_size)
    for_gpu = speeds is not None and not speeds.is_host
    simulation = Simulation(model, inputs, precision, device, head_layers, head_pooling, for_gpu, num_processes)
    whole_layers = None  # why layers cannot be in shards
    if num_processes > 1 and "offload" not in without:
        whole_layers = _why_not_in_shards(model, simulation.layers, precision)
        without |= {*()} if whole_layers is None else {"offload"}
    without_data = any(torch.is_tensor(value) and value.is_meta for value in inputs.values())
    example = None if without_data else simulation.example  # it is run, for which it needs data
    local = stage_objective == "local"
    if local and simulation.objective.head == "pooled" and attends_causally(model, simulation.layers, example):
        without |= {*LOCAL_ORDERS}
    if num_stages is not None and num_stages > len(simulation.ends):
        raise ValueError(f"num_stages={num_stages} is more than the {len(simulation.ends)} layers. Set it to fewer.")
    rows = Rows(simulation, limit, precision, speeds)
    numbers = [num_stages] if num_stages is not None else stage_numbers(len(simulation.ends))
    offloaded = [Way(offload="layers", **offloading)]
    if for_gpu and num_processes == 1 and "offloaded_step" not in offloading:
        offloaded.append(replace(offloaded[0], offloaded_step="device"))
    chosen = choose(rows, numbers, without, exact, local, offloaded)
    found = sorted(rows.all.values(), key=lambda row: (row.way.num_stages > 1, -row.peak.total))
    best = None if chosen is None else rows.all[chosen]
    reason = reason_for(found, limit, best) + (
        "" if whole_layers is None else f" Layers are not offloaded: {whole_layers}"
    )
    return Plan(
        found, simulation.by_layer, limit, best, reason, precision, simulation.num_samples, speeds, num_processes
    )


def _why_not_in_shards(model: nn.Module, layers: Sequence[str], precision: str) -> str | None:
    """Why several processes cannot offload the layers of a model; `None` if they can."""
    if precision == "fp16":
        return "a gradient scaler has to see all gradients on the device. Set precision to bf16."
    try:
        refuse_in_shards(model, layers)
    except ValueError as error:
        return str(error)
    return None
