"""What a way of training costs beside device memory: compute, and bytes at rest, moved and cached."""

from collections.abc import Sequence

import torch

from ..memory.ring import BUFFERS
from ..memory.slabs import has_streams
from .simulation import Simulation
from .ways import Way

EPOCHS = 3  # of each stage, over which a feature cache pays off


def relative_compute(simulation: Simulation, way: Way) -> float:
    """
    Floating-point operations of a way of training, per epoch of every stage, relative to end-to-end training; by the
    model's loss, per epoch of all stages together.

    A forward pass counts once, a backward pass twice, or once where only activations need gradients.
    """
    passes = (2 if way.lora else 3) + (way.activation_checkpointing or way.stage_order == "coupled")
    if way.stage_order != "sequential":
        return passes / 3
    costs = {layer.name: layer.flops for layer in simulation.profile}
    stages = [sum(costs[name] for name in stage) for stage in simulation.partition(way.num_stages).stages]
    if way.stage_objective == "model":
        return _compute_of_blocks(stages, way) / (3 * sum(stages))
    before = [sum(stages[:k]) for k in range(way.num_stages)]
    again = sum(before) if way.feature_cache == "none" else sum(stages[:-1]) / EPOCHS
    return (passes + again / sum(stages)) / 3


def _compute_of_blocks(stages: Sequence[float], way: Way) -> float:
    """Cost of a step from the model's loss, on average over the stages, of which `stages` are the forward passes."""
    total = 0.0
    for k, own in enumerate(stages):
        before, rest = sum(stages[:k]), sum(stages[k:])
        again = rest if way.activation_checkpointing else rest - own if way.stage_residency == "stage" else 0
        total += (before if way.feature_cache == "none" else before / EPOCHS) + 2 * rest + own + again
    return total / len(stages)


def bytes_elsewhere(simulation: Simulation, way: Way) -> tuple[int, int, int]:
    """Bytes at rest outside the device, bytes moved in a step, and bytes of the feature cache for each sample."""
    resting = moved = cache = 0
    layers = {layer.name: layer for layer in simulation.by_layer} if way.stage_order != "simultaneous" else {}
    if way.stage_residency == "stage":
        resting = sum(layer.weights + layer.states for layer in layers.values())
    if way.stage_order == "coupled":
        resting = sum(layer.weights + layer.gradients + layer.states for layer in layers.values())
        # Weights in for the forward and the backward pass, gradients out; the step is where they rest.
        moved = sum(2 * layer.weights + layer.gradients for layer in layers.values())
        if has_streams(torch.device(simulation.device)):  # the backward pass finds in the ring what the forward left
            moved -= sum(layers[name].weights for name in simulation.layers[-BUFFERS:])
    elif resting:
        stages = simulation.partition(way.num_stages).stages
        # A layer comes once in the turns of later stages, and, by the model's loss, twice in those of earlier ones.
        later, earlier = int(way.feature_cache == "none"), 2 * (way.stage_objective == "model")
        times = [later * (way.num_stages - 1 - k) + earlier * k for k in range(way.num_stages)]
        moved = sum(times[k] * layers[name].weights for k, stage in enumerate(stages) for name in stage)
        moved //= way.num_stages
    if way.feature_cache != "none":
        boundaries = simulation.partition(way.num_stages).boundaries[:-1]
        cache = 2 * max(layers[name].output for name in boundaries) // simulation.num_samples
    return resting, moved, cache
