"""What a way of training costs beside device memory: compute, and bytes at rest, moved and cached."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..memory.half_sent import cast_by_autocast
from ..memory.layer_offload import resident_layers
from ..memory.ring import BUFFERS
from .layer_memory import LayerMemory
from .operations import Peak
from .simulation import Simulation
from .step_time import CLIPPING, UPDATE, Phase, Step
from .ways import Way

EPOCHS = 3  # of each stage, over which a feature cache pays off


def relative_compute(simulation: Simulation, way: Way, peak: Peak, whole: Peak) -> float:
    """
    Floating-point operations of a way of training, per epoch of every stage, relative to end-to-end training; by the
    model's loss, per epoch of all stages together.

    Those of the simulated steps are counted. Where stages learn in turn, a forward pass counts once, a backward pass
    twice.

    Args:
        simulation ([`Simulation`]), way ([`Way`]): what is trained, and how.
        peak ([`Peak`]), whole ([`Peak`]): of the way, and of end-to-end training.
    """
    if way.stage_order != "sequential":
        return sum(peak.operations.flops.values()) / max(sum(whole.operations.flops.values()), 1)
    costs = {layer.name: layer.flops for layer in simulation.profile}
    stages = [sum(costs[name] for name in stage) for stage in simulation.partition(way.num_stages).stages]
    if way.stage_objective == "model":
        return _compute_of_blocks(stages, way) / (3 * sum(stages))
    before = [sum(stages[:k]) for k in range(way.num_stages)]
    again = sum(before) if way.feature_cache == "none" else sum(stages[:-1]) / EPOCHS
    return (3 + way.activation_checkpointing + again / sum(stages)) / 3


def _compute_of_blocks(stages: Sequence[float], way: Way) -> float:
    """Cost of a step from the model's loss, on average over the stages, of which `stages` are the forward passes."""
    total = 0.0
    for k, own in enumerate(stages):
        before, rest = sum(stages[:k]), sum(stages[k:])
        again = rest if way.activation_checkpointing else rest - own if way.offload == "stages" else 0
        total += (before if way.feature_cache == "none" else before / EPOCHS) + 2 * rest + own + again
    return total / len(stages)


@dataclass(frozen=True)
class Moved:
    """Bytes to the device and from it in the passes of a step, on average over the stages."""

    forward_in: int = 0
    backward_in: int = 0
    backward_out: int = 0
    forward_out: int = 0
    step_in: int = 0
    step_out: int = 0

    @property
    def total(self) -> int:
        """Bytes in both directions."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Sent:
    """Bytes that one of several processes receives from the others in the passes of a step; it sends as many."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Bytes in one direction."""
        return self.forward + self.backward


def sent_bytes(simulation: Simulation, way: Way, peak: Peak) -> Sent:
    """
    What goes between the processes, in rings: gradients to be averaged; layers in shards and input embeddings are
    gathered twice, what else is around them once.
    """
    number = simulation.num_processes
    if way.offload != "layers" or number == 1:
        gradients = peak.states // 2 if way.num_stages == 1 or way.stage_order == "simultaneous" else 0
        if not gradients and number > 1:
            gradients = sum(layer.gradients for layer in simulation.by_layer) // way.num_stages
        return Sent(0, 2 * gradients * (number - 1) // number)
    halves = 2 if simulation.dtype is not None else 1
    weights, again, gradients = _in_shards(simulation)
    share = (number - 1) / number / halves
    return Sent(int(share * weights), int(share * (again + gradients)))


def _in_shards(simulation: Simulation) -> tuple[int, int, int]:
    """Bytes of all weights, of those that are gathered again in the backward pass, and of gradients."""
    model, layers = simulation.model, {*simulation.layers}
    parameters = [*model.parameters()]
    embeddings, head = (getattr(model, f"get_{which}_embeddings")() for which in ("input", "output"))
    again = {p for name in layers for p in model.get_submodule(name).parameters()}
    if embeddings is not None and (head is None or head.weight is not embeddings.weight):
        again |= {*embeddings.parameters()}
    return (
        sum(p.nbytes for p in parameters),
        sum(p.nbytes for p in again),
        sum(p.nbytes for p in parameters if p.requires_grad),
    )


def moved_bytes(simulation: Simulation, way: Way) -> Moved:
    """What a way of training moves."""
    if way.offload == "none":
        return Moved()
    layers = {layer.name: layer for layer in simulation.by_layer}
    if way.offload == "layers" and simulation.num_processes > 1:
        return Moved(*(size // simulation.num_processes for size in _in_shards(simulation)))
    if way.offload == "layers":
        moving = _offloaded(simulation, way)
        sent = [_sent(simulation, layer.name) for layer in moving]
        weights, gradients = (sum(of) for of in zip(*sent, strict=True))
        # The backward pass finds in the ring what the forward pass left there.
        left = sum(of for of, _ in sent[-BUFFERS:]) if simulation.has_ring else 0
        inputs = _inputs_at_rest(simulation, way)
        step = (0, 0)
        if way.offloaded_step == "device":
            leaving = sum(layer.weights + layer.states for layer in moving)
            step = leaving + sum(layer.gradients for layer in moving), leaving
        return Moved(weights, weights - left + inputs, gradients, inputs, *step)
    # A layer comes once in the turns of later stages, and, by the model's loss, twice in those of earlier ones.
    once = twice = 0
    for k, stage in enumerate(simulation.partition(way.num_stages).stages):
        weights = sum(layers[name].weights for name in stage)
        once += (way.num_stages - 1 - k) * weights * (way.feature_cache == "none")
        twice += k * weights * (way.stage_objective == "model")
    return Moved((once + twice) // way.num_stages, twice // way.num_stages)


def resting_bytes(simulation: Simulation, way: Way) -> int:
    """Bytes at rest outside the device; shards beside a CPU are in the memory that is planned."""
    if way.offload == "layers" and simulation.num_processes > 1:
        weights, _, gradients = _in_shards(simulation)
        return (weights + 3 * gradients) // simulation.num_processes if simulation.has_ring else 0
    if way.offload == "layers":
        held = sum(layer.weights + layer.gradients + layer.states for layer in _offloaded(simulation, way))
        return held + _inputs_at_rest(simulation, way)
    if way.offload == "stages":
        return sum(layer.weights + layer.states for layer in simulation.by_layer)
    return 0


def _offloaded(simulation: Simulation, way: Way) -> list[LayerMemory]:
    resident = resident_layers(simulation.layers, way.resident_layers)
    return [layer for layer in simulation.by_layer if layer.name not in resident]


def _sent(simulation: Simulation, name: str) -> tuple[int, int]:
    """Bytes of a layer's weights, and of those that learn, as they go over the link."""
    layer = simulation.model.get_submodule(name)
    halves = simulation.has_ring and simulation.dtype == torch.bfloat16
    half = cast_by_autocast(layer) if halves else set()
    sizes = {p: p.nbytes // (2 if p in half else 1) for p in layer.parameters()}
    return sum(sizes.values()), sum(size for p, size in sizes.items() if p.requires_grad)


def _inputs_at_rest(simulation: Simulation, way: Way) -> int:
    """Bytes of the inputs of offloaded layers, which are taken to be as large as their outputs."""
    return sum(layer.output for layer in _offloaded(simulation, way)) if way.rests_inputs else 0


def cache_bytes(simulation: Simulation, way: Way) -> int:
    """Bytes of the feature cache for each sample."""
    if way.feature_cache == "none":
        return 0
    ends = {*simulation.partition(way.num_stages).boundaries[:-1]}
    return 2 * max(layer.output for layer in simulation.by_layer if layer.name in ends) // simulation.num_samples


def step_of(simulation: Simulation, way: Way, peak: Peak, whole: Peak) -> Step:
    """
    What one batch takes: a step, or where stages learn in turn from local losses, a step of each.

    Arguments are those of [`relative_compute`].
    """
    moved, sent, times = moved_bytes(simulation, way), sent_bytes(simulation, way, peak), 1
    counted = peak.operations
    flops: list[float] = [*counted.flops.values()]
    nbytes: list[float] = [*counted.nbytes.values()]
    made: list[float] = [*counted.made.values()]
    if way.stage_order == "sequential":
        times = way.num_stages if way.stage_objective == "local" else 1
        scale = relative_compute(simulation, way, peak, whole)
        flops = [scale * value for value in whole.operations.flops.values()]
        nbytes = [scale * value for value in whole.operations.nbytes.values()]
        made = [scale * value for value in whole.operations.made.values()]
    learned = (peak if way.lora else whole).states // 2  # AdamW's states are two for each weight
    resident = resident_layers(simulation.layers, way.resident_layers)
    on_device = sum(layer.states for layer in simulation.by_layer if layer.name in resident) // 2
    if way.offload != "layers" or way.offloaded_step == "device":
        on_device = learned
    into, out = times * moved.forward_in, times * moved.forward_out
    into_again, out_again = times * moved.backward_in, times * moved.backward_out
    step_in, step_out = moved.step_in, moved.step_out
    if way.offload == "none" or simulation.has_ring or simulation.num_processes > 1:
        made = [0, 0]  # it is reused
    elif way.offload == "layers":  # the step is in files
        moving = _offloaded(simulation, way)
        step_in = sum(layer.gradients for layer in moving)
        step_out = sum(layer.weights + layer.states for layer in moving)
    return Step(
        (
            Phase(flops[0], nbytes[0], into, out, sent=times * sent.forward, made=made[0]),
            Phase(flops[1], nbytes[1], into_again, out_again, sent=times * sent.backward, made=made[1]),
            Phase(0, 0, step_in, step_out, (UPDATE + CLIPPING) * on_device, overlaps=False),
            Phase(stepped=(UPDATE + CLIPPING) * (learned - on_device), on_host=True),
        )
    )
