"""Optimizer steps and gradient clipping of one stage at a time."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ..cut.layers import tail_parameters
from ..cut.partition import Partition
from .heads import StageHeads

ELEMENTWISE = ("torch.optim.", "transformers.optimization", "bitsandbytes.optim.")  # but for those in COUPLED
COUPLED = ("LBFGS",)


def parameters_by_stage(model: nn.Module, partition: Partition, heads: StageHeads) -> list[list[nn.Parameter]]:
    """
    All parameters, shared out over the K stages.

    A stage has those of its layers and of its head, if there is one; the first stage those that were registered before
    the layers (embeddings), the last stage those after them (last norm, classifier) and those that the heads share,
    whose gradient is there when all other stages have learned.
    """
    of_layers = {
        id(p): k
        for k, stage in enumerate(partition.stages)
        for name in stage
        for p in model.get_submodule(name).parameters()
    }
    found: list[list[nn.Parameter]] = [[*head.parameters()] for head in heads]
    found += [[] for _ in range(partition.num_stages - 1 - len(heads))]
    found.append(shared_parameters(model, partition, heads))
    of_heads = {id(p) for own in found for p in own}
    around = 0
    for parameter in model.parameters():
        if id(parameter) in of_layers:
            found[of_layers[id(parameter)]].append(parameter)
            around = partition.num_stages - 1
        elif id(parameter) not in of_heads:
            found[around].append(parameter)
    return found


def shared_parameters(model: nn.Module, partition: Partition, heads: StageHeads) -> list[nn.Parameter]:
    """Parameters that the losses of all stages step back through: the heads' layers, and the own head if it serves."""
    own = tail_parameters(model, partition.layers) if heads.kind == "own" and len(heads) else []
    return [*heads.layers.parameters(), *own]


def clip_by_stage(parameters: Iterable[Sequence[nn.Parameter]], max_norm: float) -> torch.Tensor:
    """Clip the gradients of each stage to `max_norm` by itself; returns the norm of all before that."""
    norms = [clip_grad_norm_(stage, max_norm) for stage in parameters if any(p.grad is not None for p in stage)]
    return torch.linalg.vector_norm(torch.stack(norms))


def steps_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of some parameters changes nothing for the others, as is known of the usual optimizers."""
    kind = type(getattr(optimizer, "optimizer", optimizer))  # out of accelerate's wrapper
    return f"{kind.__module__}.".startswith(ELEMENTWISE) and kind.__name__ not in COUPLED


def step_stage(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Sequence[nn.Parameter]], stage: int, max_norm: float
) -> torch.Tensor:
    """
    Step the parameters of `stage`, clipped to `max_norm`, and let their gradients go.

    Returns:
        `torch.Tensor`: the norm of their gradients before clipping.
    """
    own = parameters[stage]
    others = [p for k, found in enumerate(parameters) if k != stage for p in found if p.grad is not None]
    gradients = [p.grad for p in others]
    for parameter in others:
        parameter.grad = None
    norm = clip_grad_norm_(own, max_norm)
    optimizer.step()
    for parameter in own:
        parameter.grad = None
    for parameter, gradient in zip(others, gradients, strict=True):
        parameter.grad = gradient
    return norm
