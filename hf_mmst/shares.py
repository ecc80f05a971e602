"""Stages, their costs and a number of processes -> the share of each process, and what it lets go of the others."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from .partition import Partition


def share_out(costs: Sequence[float], num_processes: int) -> list[range]:
    """
    The stages of each process: consecutive, and about equal in cost.

    Args:
        costs (`Sequence[float]`): positive cost of each of the K stages, in any unit.
        num_processes (`int`): P, at most K.

    Raises:
        `ValueError`: if there are more processes than stages.
    """
    if num_processes > len(costs):
        raise ValueError(
            f"{num_processes} processes cannot share out {len(costs)} stages. Set num_stages to {num_processes} or "
            f"more, or start {len(costs)} processes or less."
        )
    shares = Partition.by_cost([str(stage) for stage in range(len(costs))], num_processes, costs).stages
    return [range(int(share[0]), int(share[-1]) + 1) for share in shares]


def release(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Let the data of `tensors` go: they keep their shapes, and read as ones, of which a single one is stored."""
    for tensor in tensors:
        tensor.data = torch.ones((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def is_released(tensor: torch.Tensor) -> bool:
    """Whether [`release`] has let the data of a tensor, of several elements, go."""
    return tensor.untyped_storage().nbytes() < tensor.nbytes


def load_own(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Load a state dict, but for what was released of `module`; returns names that only one of the two has."""
    own = module.state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if name not in own or not is_released(own[name])}
    module.load_state_dict(kept, strict=False)
    return sorted(own.keys() ^ tensors.keys())
