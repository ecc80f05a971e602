"""A model, a batch and a budget -> how to train it in that much memory, beside end-to-end training and its rivals."""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..checks import one_of, parse_bytes, whole
from ..cut.objectives import objective_of
from ..cut.partition import checkpoints_across
from ..cut.token_flow import attends_causally
from .meta_models import batch_of, model_of
from .simulation import PRECISIONS, LayerMemory, Peak, Simulation, Way

if TYPE_CHECKING:
    from rich.table import Table

HEADROOM = 1.05  # of a peak, for what is not counted in tensors
LOCAL_ORDERS = ("simultaneous", "sequential")  # in which stages learn from losses of their own
AVOIDABLE = (
    *(*LOCAL_ORDERS, "coupled"),
    *("stage_order", "stage_residency", "stage_clipping", "activation_checkpointing"),
)
EPOCHS = 3  # of each stage, over which a feature cache pays off


@dataclass(frozen=True)
class Row:
    """
    What one way of training takes.

    Attributes:
        name (`str`): in words.
        way ([`Way`]): its settings.
        peak ([`Peak`]): bytes in device memory.
        compute (`float`): floating-point operations per epoch of every stage, as a ratio to end-to-end training; about
            the ratio of the times.
        resting_bytes (`int`): bytes of weights and optimizer states that rest in host memory (CUDA) or on disk (CPU).
        moved_bytes (`int`): bytes that come from there or go there in a step, on average over the stages.
        cache_bytes (`int`): bytes of the feature cache on disk, for each sample.
    """

    name: str
    way: Way
    peak: Peak
    compute: float
    resting_bytes: int = 0
    moved_bytes: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """
    What was found.

    Attributes:
        rows (`list[Row]`): the ways of training that were tried.
        layers (`list[LayerMemory]`): what each layer takes in end-to-end training.
        budget (`int`, *optional*): bytes.
        chosen (`Row`, *optional*): of the ways of this package the one with the least compute that fits, if any.
        reason (`str`): why it was chosen, or what is missing.
        precision (`str`): `"fp32"`, `"bf16"` or `"fp16"`: that of all rows.
        batch_size (`int`): samples on one device, in all rows.
    """

    rows: list[Row]
    layers: list[LayerMemory]
    budget: int | None
    chosen: Row | None
    reason: str
    precision: str
    batch_size: int

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of [`MMSTConfig`] that make the chosen way; empty if none was."""
        return {} if self.chosen is None else _settings(self.chosen.way)

    def table(self) -> "Table":
        """The rows, as a table of the rich library."""
        from rich.table import Table

        numbers = (
            "peak MiB",
            "weights",
            "states",
            "the rest",
            "time",
            "MiB at rest",
            "MiB moved/step",
            "cache MiB/sample",
        )
        title = (
            f"Memory in MiB and time as a ratio to end to end, {self.batch_size} samples at once in {self.precision}"
        )
        table = Table("", "way of training", *numbers, title=title)
        for row in self.rows:
            peak = row.peak
            rest = peak.total - peak.weights - peak.states
            mib = [f"{value / 2**20:,.0f}" for value in (peak.total, peak.weights, peak.states, rest)]
            elsewhere = [f"{n / 2**20:,.0f}" if n else "-" for n in (row.resting_bytes, row.moved_bytes)]
            cache = f"{row.cache_bytes / 2**20:,.2f}" if row.cache_bytes else "-"
            mark = ">" if row is self.chosen else "" if _fits(row, self.budget) else "x"
            table.add_row(mark, row.name, *mib, f"{row.compute:.2f}", *elsewhere, cache)
        return table

    def layer_table(self) -> "Table":
        """What each layer takes in end-to-end training, in MiB, as a table of the rich library."""
        from rich.table import Table

        table = Table("layer", "weights", "gradients", "states", "activations")
        for layer in self.layers:
            sizes = layer.weights, layer.gradients, layer.states, layer.activations
            table.add_row(layer.name, *(f"{size / 2**20:,.1f}" for size in sizes))
        return table

    def config(self) -> str:
        """The chosen settings, to be pasted; empty if none was chosen."""
        if self.chosen is None:
            return ""
        settings = {**self.settings, "per_device_train_batch_size": self.batch_size}
        if self.precision != "fp32":
            settings[self.precision] = True
        return f'MMSTConfig("output", {", ".join(f"{name}={value!r}" for name, value in settings.items())})'


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
) -> Plan:
    """
    Estimate the memory of ways of training a model, without allocating it, and choose one that fits.

    Each way's step is run on tensors that have no data (see [`Simulation`]); the last of these rows are for comparison.
    Ways are tried from the least compute to the most: all stages at once, each stage stepping by itself, end to end
    with one layer resident (the coupled order), one stage resident, the same with checkpointing; with stages, few
    rather than many.

    Args:
        model (`nn.Module`, `PretrainedConfig` or `str`): a model, a configuration, or a name or folder of one.
        batch (`int` or `Mapping[str, torch.Tensor]`): the number of samples on one device, or such a batch with labels.
        budget (`int` or `str`, *optional*): bytes, or as in `"4GiB"`. Without one, nothing is chosen.
        precision (`str`): `"fp32"`, or autocast to `"bf16"` or `"fp16"`; `"auto"`: bf16 where that fits with less
            compute than fp32, or where fp32 does not fit.
        device (`str`): `"cpu"` or `"cuda"`.
        num_stages (`int`, *optional*): the only K to try; several by default.
        without (`Collection[str]`): settings that must keep their defaults, such as `"stage_residency"`, or orders
            that must not be chosen, such as `"coupled"`.
        head_layers (`int`, *optional*): of the auxiliary heads, see [`MMSTConfig`].
        seq_len (`int`, *optional*): tokens of a text, if `batch` is a number; 128, or as many as there are positions.
        image_size (`int`, *optional*): side of an image, if `batch` is a number; the model's own by default.

    Raises:
        `ValueError`: for an argument that cannot be, or a model that cannot be cut.
    """
    one_of("precision", precision, ("auto", *PRECISIONS))
    one_of("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but PyTorch finds no GPU here. Set device to cpu.")
    without = {without} if isinstance(without, str) else {*without}
    for name in without:
        one_of("without", name, AVOIDABLE)
    if num_stages is not None:
        whole(1, "1 trains end to end")("num_stages", num_stages)
    if head_layers is not None:
        whole(0, "0 is a head without layers")("head_layers", head_layers)
    limit = None if budget is None else parse_bytes("budget", budget)
    model = model_of(model)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"The weights of {type(model).__name__} are quantized, which is not planned for. Choose num_stages and "
            "stage_order yourself, and leave memory_budget unset."
        )
    if precision == "auto":
        plans = [
            plan(model, batch, budget, one, device, num_stages, without, head_layers, seq_len, image_size)
            for one in ("fp32", "bf16")
        ]
        return min(plans, key=lambda found: math.inf if found.chosen is None else found.chosen.compute)
    inputs = batch_of(model, batch, seq_len, image_size)
    simulation = Simulation(model, inputs, precision, device, head_layers)
    without_data = any(torch.is_tensor(value) and value.is_meta for value in inputs.values())
    example = None if without_data else simulation.example  # it is run, for which it needs data
    if simulation.objective.head == "pooled" and attends_causally(model, simulation.layers, example):
        without |= {*LOCAL_ORDERS}
    if num_stages is not None and num_stages > len(simulation.ends):
        raise ValueError(f"num_stages={num_stages} is more than the {len(simulation.ends)} layers. Set it to fewer.")
    rows: dict[Way, Row] = {}

    def fits(way: Way) -> bool:
        if limit is not None and _held(simulation, way) > limit:
            return False
        if way not in rows:
            rows[way] = _row(simulation, way)
        return _fits(rows[way], limit)

    for way in _rivals(simulation):
        fits(way)
    numbers = [num_stages] if num_stages is not None else _stage_numbers(len(simulation.ends))
    plain = rows[Way()].peak
    chosen = None
    least: list[Way] = []
    for family in _families(simulation):
        if {family.stage_order, *_settings(family)} & without:
            continue
        if chosen is not None:
            break
        if limit is None and family.activation_checkpointing:
            continue
        if limit is not None and _least(family, plain) > limit:
            continue
        ways = [family]
        if family.stage_order != "coupled":
            ways = [replace(family, num_stages=number) for number in numbers]
        least.append(ways[-1])  # more stages take less
        if fits(ways[-1]) and limit is not None:
            chosen = ways[bisect_left(ways[:-1], True, key=fits)]
    for way in least if chosen is None else []:  # one of them says what would be needed
        if way not in rows:
            rows[way] = _row(simulation, way)
    for way in [*rows]:
        if (
            way.stage_order == "sequential"
            and way.num_stages > 1
            and (way == chosen or not way.activation_checkpointing)
        ):
            cached = replace(way, feature_cache="disk")
            rows[cached] = _row(simulation, cached, rows[way].peak)  # what is read takes the place of what was computed
    found = sorted(rows.values(), key=lambda row: (row.way.num_stages > 1, -row.peak.total))
    best = None if chosen is None else rows[chosen]
    reason = _reason(found, limit, best)
    return Plan(found, simulation.by_layer, limit, best, reason, precision, simulation.num_samples)


def _rivals(simulation: Simulation) -> Iterator[Way]:
    yield Way()
    if _checkpoints_layers(simulation):
        yield Way(activation_checkpointing=True)
    layers = [simulation.model.get_submodule(name) for name in simulation.layers]
    linear = any(isinstance(module, nn.Linear) for layer in layers for module in layer.modules())
    # What an adapter is put beside, and what learns as a whole, is known of models with a local loss.
    if linear and objective_of(simulation.given) is not None and find_spec("peft") is not None:
        yield Way(lora=True)


def _families(simulation: Simulation) -> Iterator[Way]:
    """Ways of stage-wise training but for the number of stages, from the least compute to the most."""
    resident = Way(stage_order="sequential", stage_residency="stage")
    yield Way()
    yield Way(stage_clipping=True)
    if len(simulation.ends) == len(simulation.layers):  # single modules are not recomputed one by one
        yield Way(stage_order="coupled")
    yield resident
    if _checkpoints_layers(simulation):
        yield replace(resident, activation_checkpointing=True)


def _checkpoints_layers(simulation: Simulation) -> bool:
    """Whether activation checkpointing runs each layer by itself."""
    able = getattr(simulation.model, "supports_gradient_checkpointing", False)
    return able and checkpoints_across(simulation.model, simulation.partition(len(simulation.ends))) is None


def _stage_numbers(num_layers: int) -> list[int]:
    return [number for number in (2, 4, 8, 16, 32, 64) if number < num_layers] + [num_layers]


def _least(way: Way, whole: Peak) -> int:
    """Bytes that a way of training takes whatever the number of stages."""
    if way.stage_residency == "stage" or way.stage_order == "coupled":
        return 0
    return whole.weights + whole.states + (0 if way.stage_clipping else whole.states // 2)  # gradients


def _held(simulation: Simulation, way: Way) -> int:
    """Bytes that a resident stage surely takes: what its layers hold when its forward pass ends; 0 for other ways."""
    if way.stage_residency != "stage" or way.activation_checkpointing:
        return 0
    held = {layer.name: layer.weights + layer.states + layer.activations for layer in simulation.by_layer}
    return max(sum(held[name] for name in stage) for stage in simulation.partition(way.num_stages).stages)


def _row(simulation: Simulation, way: Way, peak: Peak | None = None) -> Row:
    return Row(_name(way), way, peak or simulation.peak(way), _compute(simulation, way), *_elsewhere(simulation, way))


def _name(way: Way) -> str:
    words = ["LoRA (r = 16)" if way.lora else "end to end"] if way.num_stages == 1 else [f"K = {way.num_stages}"]
    if way.stage_order == "coupled":
        words.append("one layer resident")
    if way.num_stages > 1:
        words.append("one stage resident" if way.stage_residency == "stage" else "all stages at once")
    if way.stage_clipping:
        words.append("each steps by itself")
    if way.feature_cache != "none":
        words.append("features cached")
    if way.activation_checkpointing:
        words.append("checkpointing")
    return ", ".join(words)


def _compute(simulation: Simulation, way: Way) -> float:
    """Forward passes are counted once, backward passes twice, or once where only activations need gradients."""
    passes = (2 if way.lora else 3) + (way.activation_checkpointing or way.stage_order == "coupled")
    if way.stage_order != "sequential":
        return passes / 3
    costs = {layer.name: layer.flops for layer in simulation.profile}
    stages = [sum(costs[name] for name in stage) for stage in simulation.partition(way.num_stages).stages]
    before = [sum(stages[:k]) for k in range(way.num_stages)]
    again = sum(before) if way.feature_cache == "none" else sum(stages[:-1]) / EPOCHS
    return (passes + again / sum(stages)) / 3


def _elsewhere(simulation: Simulation, way: Way) -> tuple[int, int, int]:
    """Bytes at rest, bytes moved in a step, and bytes of the feature cache for each sample."""
    resting = moved = cache = 0
    layers = {layer.name: layer for layer in simulation.by_layer} if way.stage_order != "simultaneous" else {}
    if way.stage_residency == "stage":
        resting = sum(layer.weights + layer.states for layer in layers.values())
    if way.stage_order == "coupled":
        resting = sum(layer.weights + layer.gradients + layer.states for layer in layers.values())
        # Weights in the forward and backward pass, to the step and back; gradients five times, as they are clipped.
        moved = sum(4 * layer.weights + 5 * layer.gradients + 2 * layer.states for layer in layers.values())
    elif resting and way.feature_cache == "none":
        stages = simulation.partition(way.num_stages).stages
        after = [(way.num_stages - 1 - k) * layers[name].weights for k, stage in enumerate(stages) for name in stage]
        moved = sum(after) // way.num_stages
    if way.feature_cache != "none":
        boundaries = simulation.partition(way.num_stages).boundaries[:-1]
        cache = 2 * max(layers[name].output for name in boundaries) // simulation.num_samples
    return resting, moved, cache


def _settings(way: Way) -> dict[str, Any]:
    plain = Way()
    names = [field.name for field in fields(Way) if field.name != "lora"]
    return {name: getattr(way, name) for name in names if getattr(way, name) != getattr(plain, name)}


def _fits(row: Row, limit: int | None) -> bool:
    return limit is None or row.peak.total * HEADROOM <= limit


def _reason(rows: list[Row], limit: int | None, chosen: Row | None) -> str:
    if limit is None:
        return "No budget was given, so nothing was chosen."
    plain = [row for row in rows if row.way.num_stages == 1 and row.way.stage_order != "coupled"]
    fitting = [row.name for row in plain if _fits(row, limit)]
    if chosen is None and fitting:
        return f"No way of this package fits in {limit / 2**20:,.0f} MiB. These do: {'; '.join(fitting)}."
    ours = [row for row in rows if row not in plain]
    if chosen is None and not ours:
        return (
            "No way of this package is for this run: stages cannot learn, for the layers attend causally or the task "
            "has no local loss, and the coupled order is ruled out. Leave memory_budget unset."
        )
    if chosen is None:
        least = min(ours, key=lambda row: row.peak.total)
        need = math.ceil(least.peak.total * HEADROOM / 2**20)
        return (
            f"Nothing fits in {limit / 2**20:,.0f} MiB. The least of this package's ways, {least.name}, needs {need:,} "
            f"MiB, with 5 % for what is not in tensors: {need - limit / 2**20:,.0f} MiB more. Set the budget to "
            f"{need}MiB, or use a smaller batch or lower precision."
        )
    others = f" So do, without stages: {'; '.join(fitting)}." if fitting else " End-to-end training does not."
    elsewhere = f", and has {chosen.resting_bytes / 2**20:,.0f} MiB at rest" if chosen.resting_bytes else ""
    return (
        f"{chosen.name} fits in {limit / 2**20:,.0f} MiB with {chosen.peak.total / 2**20:,.0f} MiB and 5 % to spare, "
        f"at the least compute of this package's ways that do: {chosen.compute:.2f} times that of end-to-end "
        f"training{elsewhere}.{others}"
    )
