"""`plan`: estimates the memory of ways of training a model, and chooses the one of least compute in a budget."""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PretrainedConfig

from ..cut.layers import checkpoints_across
from ..cut.objectives import objective_of
from ..cut.token_flow import attends_causally
from ..field_checks import one_of, parse_bytes, whole
from .costs import cache_bytes, moved_bytes, relative_compute, resting_bytes, step_of
from .devices import Device, device_named
from .model_and_batch import batch_of, model_of, with_adapters
from .operations import Peak
from .plans import Plan, Row, reason_for
from .simulation import Simulation
from .step_time import predict
from .ways import PRECISIONS, Way

LOCAL_ORDERS = ("simultaneous", "sequential")  # in which stages learn from losses of their own
AVOIDABLE = (
    *(*LOCAL_ORDERS, "end_to_end"),
    *("stage_order", "offload", "stage_clipping", "activation_checkpointing"),
)


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
) -> Plan:
    """
    Estimate the memory of ways of training a model, without allocating it, and choose one that fits.

    Each way's step is run on tensors that have no data (see [`Simulation`]); the last of these rows are for comparison.
    Ways are tried from the least compute to the most: all stages at once, each stage stepping by itself, end to end
    with layers offloaded, in turn with stages offloaded, the same with checkpointing; with stages, few
    rather than many.

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

    Raises:
        `ValueError`: for an argument that cannot be, or a model that cannot be cut.
    """
    one_of("precision", precision, ("auto", *PRECISIONS))
    one_of("device", device, ("cpu", "cuda"))
    one_of("head_pooling", head_pooling, ("auto", "mean", "cls"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but PyTorch finds no GPU here. Set device to cpu.")
    one_of("stage_objective", stage_objective, ("local", "model"))
    without = {without} if isinstance(without, str) else {*without}
    for name in without:
        one_of("without", name, AVOIDABLE)
    if num_stages is not None:
        whole(1, "1 trains end to end")("num_stages", num_stages)
    if head_layers is not None:
        whole(0, "0 is a head without layers")("head_layers", head_layers)
    if isinstance(speeds, str):
        speeds = device_named(speeds)
    if budget is None and speeds is not None:
        budget = speeds.memory
    limit = None if budget is None else parse_bytes("budget", budget)
    model = model_of(model, task)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"The weights of {type(model).__name__} are quantized, which is not planned for. Choose num_stages and "
            "stage_order yourself, and leave memory_budget unset."
        )
    if lora is not None:
        whole(1, "such as 16")("lora", lora)
        model = with_adapters(model, lora)
    if precision == "auto":
        plans = [
            plan(
                *(model, batch, budget, one, device, num_stages, without, head_layers, seq_len, image_size),
                *(head_pooling, stage_objective, speeds),
            )
            for one in ("fp32", "bf16")
        ]
        return min(plans, key=lambda found: math.inf if found.chosen is None else found.chosen.compute)
    inputs = batch_of(model, batch, seq_len, image_size)
    for_gpu = speeds is not None and not speeds.is_host
    simulation = Simulation(model, inputs, precision, device, head_layers, head_pooling, for_gpu)
    without_data = any(torch.is_tensor(value) and value.is_meta for value in inputs.values())
    example = None if without_data else simulation.example  # it is run, for which it needs data
    local = stage_objective == "local"
    if local and simulation.objective.head == "pooled" and attends_causally(model, simulation.layers, example):
        without |= {*LOCAL_ORDERS}
    if num_stages is not None and num_stages > len(simulation.ends):
        raise ValueError(f"num_stages={num_stages} is more than the {len(simulation.ends)} layers. Set it to fewer.")
    rows: dict[Way, Row] = {}

    def row(way: Way, peak: Peak | None = None) -> Row:
        found = peak or simulation.peak(way)
        whole = rows[Way()].peak if way != Way() else found
        step = step_of(simulation, way, found, whole)
        return Row(
            way.name,
            way,
            found,
            relative_compute(simulation, way, found, whole),
            resting_bytes=resting_bytes(simulation, way),
            moved_bytes=moved_bytes(simulation, way).total,
            cache_bytes=cache_bytes(simulation, way),
            prediction=None if speeds is None else predict(step, speeds, precision, simulation.by_layer[0].tokens),
        )

    def fits(way: Way) -> bool:
        if limit is not None and _held(simulation, way) > limit:
            return False
        if way not in rows:
            rows[way] = row(way)
        return rows[way].fits(limit)

    for way in _rivals(simulation):
        fits(way)
    numbers = [num_stages] if num_stages is not None else _stage_numbers(len(simulation.ends))
    plain = rows[Way()].peak
    chosen = None
    least: list[Way] = []
    for family in _families(simulation) if local else _block_families(simulation):
        if {family.stage_order, *family.settings} & without:
            continue
        if chosen is not None:
            break
        if limit is None and family.activation_checkpointing:
            continue
        if limit is not None and _least(family, plain) > limit:
            continue
        ways = [family]
        if family.stage_order != "end_to_end":
            ways = [replace(family, num_stages=number) for number in numbers]
        least.append(ways[-1])  # more stages take less
        if fits(ways[-1]) and limit is not None:
            chosen = ways[bisect_left(ways[:-1], True, key=fits)]
    for way in least if chosen is None else []:  # one of them says what would be needed
        if way not in rows:
            rows[way] = row(way)
    for way in [*rows]:
        if (
            way.stage_order == "sequential"
            and way.num_stages > 1
            and (way == chosen or not way.activation_checkpointing)
        ):
            cached = replace(way, feature_cache="disk")
            rows[cached] = row(cached, rows[way].peak)  # what is read takes the place of what was computed
    found = sorted(rows.values(), key=lambda row: (row.way.num_stages > 1, -row.peak.total))
    best = None if chosen is None else rows[chosen]
    reason = reason_for(found, limit, best)
    return Plan(found, simulation.by_layer, limit, best, reason, precision, simulation.num_samples, speeds)


def _rivals(simulation: Simulation) -> Iterator[Way]:
    yield Way()
    if _checkpoints_layers(simulation):
        yield Way(activation_checkpointing=True)
    layers = [simulation.model.get_submodule(name) for name in simulation.layers]
    linear = any(isinstance(module, nn.Linear) for layer in layers for module in layer.modules())
    # What an adapter is put beside, and what learns as a whole, is known of models with a local loss.
    adapted = any("lora_" in name for name, _ in simulation.model.named_parameters())
    if linear and not adapted and objective_of(simulation.given) is not None and find_spec("peft") is not None:
        yield Way(lora=True)


def _families(simulation: Simulation) -> Iterator[Way]:
    """Ways of stage-wise training but for the number of stages, from the least compute to the most."""
    resident = Way(stage_order="sequential", offload="stages")
    yield Way()
    yield Way(stage_clipping=True)
    if len(simulation.ends) == len(simulation.layers):  # single modules are not recomputed one by one
        yield Way(stage_order="end_to_end", offload="layers")
    yield resident
    if _checkpoints_layers(simulation):
        yield replace(resident, activation_checkpointing=True)


def _block_families(simulation: Simulation) -> Iterator[Way]:
    """The same for stages that learn from the model's loss."""
    in_turn = Way(stage_order="sequential", stage_objective="model")
    yield in_turn
    if _checkpoints_layers(simulation):
        yield replace(in_turn, activation_checkpointing=True)
    if len(simulation.ends) == len(simulation.layers):
        yield replace(in_turn, offload="stages")


def _checkpoints_layers(simulation: Simulation) -> bool:
    """Whether activation checkpointing runs each layer by itself."""
    able = getattr(simulation.model, "supports_gradient_checkpointing", False)
    return able and checkpoints_across(simulation.model, simulation.partition(len(simulation.ends))) is None


def _stage_numbers(num_layers: int) -> list[int]:
    return [number for number in (2, 4, 8, 16, 32, 64) if number < num_layers] + [num_layers]


def _least(way: Way, whole: Peak) -> int:
    """Bytes that a way of training takes whatever the number of stages."""
    if way.offload != "none":
        return 0
    if way.stage_objective == "model":
        return whole.weights
    return whole.weights + whole.states + (0 if way.stage_clipping else whole.states // 2)  # gradients


def _held(simulation: Simulation, way: Way) -> int:
    """Bytes that a resident stage surely takes: what its layers hold when its forward pass ends; 0 for other ways."""
    if way.offload != "stages" or way.activation_checkpointing or way.stage_objective == "model":
        return 0
    held = {layer.name: layer.weights + layer.states + layer.activations for layer in simulation.by_layer}
    return max(sum(held[name] for name in stage) for stage in simulation.partition(way.num_stages).stages)
