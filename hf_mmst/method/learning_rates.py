"""Learning rates of stages and heads, as parameter groups of an optimizer."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

PRETRAINED_FACTOR = 10.0  # new heads on layers that have learned much already have far to go
PRETRAINED_DECAY = 0.7  # a layer, however many a stage has: what early layers know serves all later ones


def rate_factors(
    parameters: Sequence[Sequence[nn.Parameter]], heads: Iterable[nn.Parameter], decay: float, head_factor: float
) -> dict[nn.Parameter, float]:
    """
    What the learning rate of each parameter is multiplied with: decay^(K - k) in stage k, `head_factor` in the heads.

    Layer-wise decay (ELECTRA, BEiT) with stages in the place of layers: early stages of a pretrained model, which hold
    what is general, move less.

    Args:
        parameters (`Sequence[Sequence[nn.Parameter]]`): of each of the K stages, its head's among them.
        heads (`Iterable[nn.Parameter]`): of the auxiliary heads of stages 1 .. K-1, and of the model's own.
        decay (`float`): between two stages.
        head_factor (`float`): of the heads, in every stage.
    """
    factors = {p: decay ** (len(parameters) - 1 - k) for k, own in enumerate(parameters) for p in own}
    return factors | dict.fromkeys(heads, head_factor)


def split_groups(optimizer: torch.optim.Optimizer, factors: Mapping[nn.Parameter, float]) -> None:
    """
    Split the optimizer's groups so that each parameter learns at its group's rate times its factor (or 1).

    Where there are parameters of factor 1 they come first, so that theirs is the rate that `Trainer` logs.
    """
    groups = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        ordered = sorted(by_factor.items(), key=lambda one: one[0] != 1)
        groups += [{**group, "params": own, "lr": group["lr"] * factor} for factor, own in ordered]
    optimizer.param_groups = groups


def join_groups(optimizer: torch.optim.Optimizer, own: Mapping[str, nn.Parameter], others: list[nn.Parameter]) -> None:
    """
    Add parameters to groups that an optimizer has, as schedulers that were made for it know no others.

    Matrices learn as the last matrix of the others does, vectors as the last vector, so that weight decay is theirs.

    Args:
        optimizer (`torch.optim.Optimizer`): whose groups grow.
        own (`Mapping[str, nn.Parameter]`): what is added, by name.
        others (`list[nn.Parameter]`): of the model, its own head last.
    """
    groups = optimizer.param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    last = {p.dim() > 1: group_of[id(p)] for p in others if id(p) in group_of}
    for name, parameter in own.items():
        group = last.get(parameter.dim() > 1, groups[-1])
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
