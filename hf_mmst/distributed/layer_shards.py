"""`offload="layers"` in several processes: accelerate's FSDP2 with offloading to host memory, as our field sets it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.optim import SGD, Optimizer
from transformers.trainer_utils import unwrap_peft_model

from ..cut.layers import refuse_layerdrop, refuse_shared
from ..cut.temporary_attributes import replaced

PLUGIN = {  # which layers these are is filled in when the model is cut; accelerate's checkpointing would draw new masks
    "fsdp_version": 2,
    "cpu_offload": True,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "state_dict_type": "FULL_STATE_DICT",
}


@contextlib.contextmanager
def sharding_layers(trainer: Any) -> Iterator[None]:
    """
    Within this context the host's Trainer makes its accelerator, with FSDP2 if the settings ask for it.

    Args:
        trainer ([`MMSTTrainer`]): `accelerator` and `is_fsdp_enabled` are set when the context ends.

    Raises:
        `ValueError`: if the processes cannot exchange tensors in host memory.
    """
    args = trainer.args
    if not args.shards_layers:
        yield
        return
    backends = dist.get_backend_config()
    if "cpu" not in backends:
        raise ValueError(
            f'offload="layers" in {args.world_size} processes exchanges tensors in host memory, too, but their group, '
            f'which was made before MMSTConfig, has {backends} alone. Make MMSTConfig first, or set offload="none".'
        )
    # Accelerate would leave it in the environment, for all later runs of this process.
    with patch_environment(ACCELERATE_USE_FSDP="true"), replaced(args, "fsdp_plugin_args", PLUGIN):
        yield
    state = trainer.accelerator.state
    if state.distributed_type != DistributedType.FSDP:  # accelerate knows it on devices only, PyTorch on CPUs, too
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**PLUGIN)
        state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    # Gradients go to host memory with each micro-batch; else those of all layers would add up on the device.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


@contextlib.contextmanager
def keeping_parameters(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """
    Within this context accelerate leaves an optimizer its parameters, if the model is in shards already.

    It would look for them by the address of their memory, which empty shards, of a tensor with one row, have in common.
    """
    prepare = accelerator.prepare

    def prepared(*objects: Any, **kwargs: Any) -> Any:
        optimizers = [one for one in objects if isinstance(one, Optimizer)]
        before = [[*group["params"]] for one in optimizers for group in one.param_groups]
        found = prepare(*objects, **kwargs)
        groups = [group for one in optimizers for group in one.param_groups]
        for group, parameters in zip(groups, before, strict=True):
            group["params"] = parameters
        return found

    with replaced(accelerator, "prepare", prepared) if isinstance(model, FSDPModule) else contextlib.nullcontext():
        yield


def shard_untrained(accelerator: Any, model: nn.Module) -> None:
    """Shard a model that is evaluated before it is trained; accelerate does so only together with an optimizer."""
    if not accelerator._models:
        accelerator.prepare(model, SGD(model.parameters()))


def refuse_in_shards(model: nn.Module, layers: Sequence[str]) -> None:
    """
    Args:
        model (`nn.Module`): what is trained.
        layers (`Sequence[str]`): qualified names of its layers.

    Raises:
        `ValueError`: if the layers of the model cannot be offloaded in several processes.
    """
    refuse_shared(model, layers)
    refuse_layerdrop(model, "which the other processes would wait for")
    try:
        _refuse_shared_head(model)
    except NotImplementedError:
        raise ValueError(
            f"FSDP2 as accelerate sets it up asks for the input embeddings, of which {type(model).__name__} says "
            'nothing. Set offload="none", or start one process.'
        ) from None
    if getattr(unwrap_peft_model(model), "is_quantized", False):
        raise ValueError(
            f'The weights of {type(model).__name__} are quantized, and with offload="layers" in several processes each '
            'would get a part of them without their scales. Set offload="none", or start one process.'
        )


def _refuse_shared_head(model: nn.Module) -> None:
    """Refuse a head with weights that other modules than the input embeddings have, too (BERT's bias)."""
    ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    weights = {weight for end in ends if end is not None for weight in end.parameters()}
    for name, module in model.named_modules():
        for own, weight in module._parameters.items():
            if weight in weights and not any(module in end.modules() for end in ends if end is not None):
                raise ValueError(
                    f"{own} of {name} of {type(model).__name__} is a weight of its embeddings or head, too, which "
                    'FSDP2 puts in shards apart. Set offload="none", or start one process.'
                )
