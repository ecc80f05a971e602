"""Stage parallelism: which process holds which stages, and how it frees the weights of the others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cut.partition import Partition
from ..cut.probe import profile_layers, trace_stages
from ..method.heads import HEADS, StageHeads


@dataclass(frozen=True)
class Share:
    """
    The stages of each of P processes, and which of them holds which tensor.

    Attributes:
        rank (`int`): of this process, from 0.
        stages (`tuple[range, ...]`): stages of each process.
        owners (`dict[str, int]`): rank that has each tensor of the model's state dict and, by the name by which the
            model has them in training, of the heads'.
        outputs (`dict[str, Any]`): what each layer returns, tensors left out, by name.
    """

    rank: int
    stages: tuple[range, ...]
    owners: dict[str, int]
    outputs: dict[str, Any]

    @property
    def own(self) -> range:
        """Stages of this process."""
        return self.stages[self.rank]

    def __str__(self) -> str:
        """The stages of each process, from 1, as in `1, 2, 3-4`."""
        return ", ".join(f"{s[0] + 1}-{s[-1] + 1}" if len(s) > 1 else str(s[0] + 1) for s in self.stages)


def take_share(
    model: nn.Module,
    partition: Partition,
    heads: StageHeads,
    parameters: Sequence[Sequence[nn.Parameter]],
    rank: int,
    num_processes: int,
    device: torch.device,
    clips: bool,
) -> Share:
    """
    Move the stages of this process to `device`, and free the weights of all other stages.

    A parameter is the process's own if the loss of one of its stages reaches it: embeddings are the first process's,
    the model's last norm and classifier the last one's.

    Args:
        model (`nn.Module`), partition ([`Partition`]), heads ([`StageHeads`]): what is shared out.
        parameters (`Sequence[Sequence[nn.Parameter]]`): all parameters by stage, see [`parameters_by_stage`].
        rank (`int`), num_processes (`int`): of the process, and P.
        device (`torch.device`): where it trains.
        clips (`bool`): whether gradients are clipped by stage, in which case that must be as in one process.

    Raises:
        `ValueError`: if a parameter learns from stages in different processes, or there are too few stages.
    """
    costs = {layer.name: max(layer.flops, 1) for layer in profile_layers(model, partition.layers)}
    shares = share_out([sum(costs[name] for name in stage) for stage in partition.stages], num_processes)
    rank_of = {stage: owner for owner, share in enumerate(shares) for stage in share}
    trace = trace_stages(model, partition)
    trace.refuse_beside(model, "stage_parallel=False")
    ranks = {id(p): rank_of[stage] for stage, some in enumerate(parameters) for p in some}
    kind = type(model).__name__
    for name, parameter in model.named_parameters():
        learners = {rank_of[stage] for stage in trace.learners.get(name, ())} or {ranks[id(parameter)]}
        if len(learners) > 1:
            raise ValueError(
                f"{name} of {kind} learns from stages that are in different processes. Set stage_parallel=False."
            )
        if clips and ranks[id(parameter)] not in learners:
            raise ValueError(
                f"{name} of {kind} is between the layers and is clipped with the last stage, which is in another "
                "process. Set max_grad_norm=0, or stage_parallel=False."
            )
        ranks[id(parameter)] = learners.pop()
    owners = _owners(model, ranks)
    for stage, head in enumerate(heads):
        owners |= dict.fromkeys((f"{HEADS}.heads.{stage}.{name}" for name in head.state_dict()), rank_of[stage])
    # What no loss reaches may still be read, as fixed position encodings are.
    layers = tuple(f"{name}." for name in partition.layers)
    learning = [p for n, p in model.named_parameters() if n in trace.learners or n.startswith(layers)]
    everything = [*model.parameters(), *heads.parameters()]
    release((p for p in [*learning, *heads.parameters()] if ranks[id(p)] != rank), device)
    for tensor in [*everything, *model.buffers(), *heads.buffers()]:
        if not is_released(tensor):
            tensor.data = tensor.data.to(device)
    return Share(rank, tuple(shares), owners, trace.outputs)


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
    """Free the data of `tensors`: they keep their shapes, and read as ones, of which a single one is stored."""
    for tensor in tensors:
        tensor.data = torch.ones((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def is_released(tensor: torch.Tensor) -> bool:
    """Whether [`release`] has freed the data of a tensor, of several elements."""
    return tensor.untyped_storage().nbytes() < tensor.nbytes


def load_own(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict, but for what was released of `module`."""
    own = module.state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if name not in own or not is_released(own[name])}
    module.load_state_dict(kept, strict=False)


def _owners(model: nn.Module, ranks: Mapping[int, int]) -> dict[str, int]:
    """The rank that has each tensor of the model: of a buffer, the one that has the nearest parameter."""
    owners = {name: ranks[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    for name, _ in model.named_buffers(remove_duplicate=False):
        module = name
        near: list[int] = []
        while module and not near:
            module = module.rpartition(".")[0]
            near = [rank for other, rank in owners.items() if not module or other.startswith(f"{module}.")]
        owners[name] = near[0]
    return owners
