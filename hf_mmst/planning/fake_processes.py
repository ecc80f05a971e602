"""Stand-ins for other processes in a simulation of one of several: tensors without data, which are sent nowhere."""

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy

from ..distributed.layer_shards import PLUGIN
from ..distributed.reduction import Reduction


@contextlib.contextmanager
def one_of_processes(number: int) -> Iterator[None]:
    """
    Within this context this process is one of so many.

    Raises:
        `ValueError`: if it is one of another number already.
    """
    if number == 1:
        yield
    elif dist.is_initialized():
        if dist.get_world_size() != number:
            raise ValueError(
                f"num_processes={number}, but this is one of {dist.get_world_size()} processes that run together. Set "
                f"num_processes to {dist.get_world_size()}, or plan in a process of its own."
            )
        yield
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def put_in_shards(
    model: nn.Module, layers: Sequence[str], device: str, dtype: torch.dtype | None
) -> dict[nn.Parameter, nn.Parameter]:
    """
    Put a model of tensors without data in shards, as [`sharding_layers`] has accelerate do it.

    Args:
        model (`nn.Module`): the model, which is changed.
        layers (`Sequence[str]`): qualified names of its layers.
        device (`str`): where layers are gathered.
        dtype (`torch.dtype`, *optional*): of autocast.

    Returns:
        `dict`: of each parameter, this process's shard.
    """
    plugin = FullyShardedDataParallelPlugin(**PLUGIN)
    plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
    plugin.transformer_cls_names_to_wrap = sorted({type(model.get_submodule(name)).__name__ for name in layers})
    if dtype is not None:
        plugin.set_mixed_precision(dtype)
    with unset_fake_temporarily():  # its ranks are data
        mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("shards",))
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no" if dtype is None else "bf16",
        is_main_process=False,
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=["shards"]),
    )
    fsdp2_prepare_model(accelerator, model)
    shards = {}
    for parameter in model.parameters():
        shards[parameter] = nn.Parameter(shard_of(parameter).detach(), requires_grad=parameter.requires_grad)
    return shards


def shard_of(tensor: Any) -> torch.Tensor:
    """What this process has of a tensor in shards: that very tensor, not a view."""
    return tensor._local_tensor


class FakeReduction(Reduction):
    """A reduction between processes in each of which the same parameters learn."""

    def __init__(self, stages: Sequence[Sequence[nn.Parameter]]):
        self._set_stages(stages)

    def _learned(self) -> list[nn.Parameter]:
        return [p for p in self._parameters if p.grad is not None]
