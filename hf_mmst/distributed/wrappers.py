"""What differs for stages inside DistributedDataParallel, FSDP2 and DeepSpeed."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from ..config import MMSTConfig
from ..cut.partition import Partition
from ..method.heads import StageHeads


class Wrapper:
    """
    How stages are trained with each process holding the whole model: alone, or in DistributedDataParallel.

    Subclasses override what differs in other wrappers.

    Args:
        accelerator (`accelerate.Accelerator`): the trainer's.

    Attributes:
        own_files (`bool`): whether it resumes from files of its own, which hold the heads with the model.
        reduces (`bool`): whether it averages the gradients of stages over the processes.
        steps_alone (`bool`): whether the optimizer can step the parameters of one stage.
        takes_shared (`bool`): whether gradients of side inputs that layers share may come by themselves.
        hooks_first (`bool`): whether stages end before the wrapper's own hooks on a layer have run.
    """

    own_files = False
    reduces = False
    steps_alone = True
    takes_shared = True
    hooks_first = True

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator

    def refuse(self, args: MMSTConfig, compiles: bool) -> None:
        """
        Refuse settings with which stages cannot be trained in this wrapper.

        Args:
            args ([`MMSTConfig`]): the settings.
            compiles (`bool`): whether layers are compiled.

        Raises:
            `ValueError`: saying what to set.
        """

    def refuse_checkpoint(self, folder: str) -> None:
        """
        Raises:
            `ValueError`: if `folder` is a checkpoint from which the optimizer could not go on in this wrapper.
        """
        if self._is_of_shards(folder):
            raise ValueError(
                f"{folder} was written by processes that held shards (FSDP), and this run has none. Go on from it with "
                "the same settings and two processes or more, or begin anew with the model that from_pretrained loads."
            )

    @staticmethod
    def _is_of_shards(folder: str) -> bool:
        return os.path.exists(os.path.join(folder, f"{FSDP_MODEL_NAME}.bin"))

    def prepare(self, model: nn.Module, partition: Partition, heads: StageHeads) -> None:
        """Set up the wrapper for the stages, before it is put around the model."""

    def backward(self, loss: torch.Tensor, **retain: bool) -> None:
        """Step back through the loss of a stage that is not the last; `retain` is as for [`torch.Tensor.backward`]."""
        self.accelerator.backward(loss, **retain)

    @contextlib.contextmanager
    def forward(self, model: nn.Module, partition: Partition) -> Iterator[None]:
        """Within this context, stages step back inside the model's forward pass."""
        yield

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Within this context, the module's parameters can be read and copied."""
        yield

    def state_dict(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The whole state of a module, at least in the main process; to be called in each of them."""
        with self.whole(module):
            return {name: _full(tensor).detach().cpu().clone() for name, tensor in module.state_dict().items()}


class FullyShardedWrapper(Wrapper):
    """
    FSDP2: each layer's parameters are sharded over the processes, and gathered for its forward and backward pass.

    Its hooks on a layer run first. So when a stage ends there, the layer's parameters have been let go, its output
    gathers them again when the stage steps back, and its gradients are reduced before the next stage runs.
    """

    own_files = True
    reduces = True
    steps_alone = False
    hooks_first = False

    def refuse(self, args: MMSTConfig, compiles: bool) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1:
            raise ValueError(
                "FSDP 1 flattens parameters, and would train the stages wrongly. Set version to 2 in fsdp_config, "
                "which is fsdp_version in the accelerate configuration."
            )
        if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            raise ValueError(
                f"{plugin.state_dict_type} saves no model that the stages could be saved with. Set state_dict_type to "
                "FULL_STATE_DICT in fsdp_config, which is fsdp_state_dict_type in the accelerate configuration."
            )
        if args.stage_objective == "model":
            raise ValueError(
                'stage_objective="model" freezes the other stages in turn, but FSDP knows from the beginning which '
                'weights learn. Set stage_objective="local", or leave FSDP out.'
            )
        _refuse_for_shards("FSDP", args)
        _refuse_cache("FSDP", args)

    def refuse_checkpoint(self, folder: str) -> None:
        if not self._is_of_shards(folder):
            raise ValueError(
                f"{folder} was not written by processes that held shards (FSDP), and this run has them. Go on from it "
                "with the same settings and one process, or begin anew with the model that from_pretrained loads."
            )

    def prepare(self, model: nn.Module, partition: Partition, heads: StageHeads) -> None:
        """Gather parameters layer by layer, if nothing else is set: what models say themselves is not made for it."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
            kinds = {type(model.get_submodule(name)).__name__ for name in partition.layers}
            plugin.transformer_cls_names_to_wrap = sorted(kinds)
        kinds = {*(plugin.transformer_cls_names_to_wrap or ())} if plugin.activation_checkpointing else set()
        for name, module in model.named_modules():
            if type(module).__name__ in kinds and any(_is_inside(end, name) for end in partition.boundaries[:-1]):
                raise ValueError(
                    f"FSDP's activation checkpointing runs {name} twice as a whole, although a stage ends within it. "
                    f"Leave {type(module).__name__} out of transformer_layer_cls_to_wrap in fsdp_config, or "
                    "activation_checkpointing."
                )

    @contextlib.contextmanager
    def forward(self, model: nn.Module, partition: Partition) -> Iterator[None]:
        """Keep gathered what is still running when a stage steps back: the model itself, and groups of layers."""
        running = [
            module
            for name, module in model.named_modules()
            if isinstance(module, FSDPModule) and any(_is_inside(end, name) for end in partition.boundaries)
        ]
        for module in running:
            module.set_reshard_after_backward(False, recurse=False)
        try:
            yield
        finally:  # the last stage's backward lets go of it, else the next step would see weights of before this one
            for module in running:
                module.set_reshard_after_backward(True, recurse=False)


class DeepSpeedWrapper(Wrapper):
    """
    DeepSpeed with ZeRO: an engine that reduces gradients, and steps when the last stage has stepped back.

    Every loss goes through the engine. For it, the stages before the last are micro-batches between two steps.
    """

    own_files = True
    reduces = True
    steps_alone = False
    takes_shared = False
    hooks_first = False

    def __init__(self, accelerator: Any):
        super().__init__(accelerator)
        self._config = accelerator.state.deepspeed_plugin.deepspeed_config
        self.zero_stage = accelerator.state.deepspeed_plugin.zero_stage

    def refuse(self, args: MMSTConfig, compiles: bool) -> None:
        _refuse_for_shards("DeepSpeed", args)
        for name in ("optimizer", "scheduler"):
            if name in self._config:
                raise ValueError(
                    f"The DeepSpeed configuration has {'an' if name == 'optimizer' else 'a'} {name} of its own, which "
                    f"knows neither heads nor stages. Leave {name} out of it, and set optim, learning_rate and "
                    "lr_scheduler_type of MMSTConfig."
                )
        in_turn = args.stage_order in ("sequential", "multi_lap")
        if in_turn or args.end_to_end_laps:
            rest = "stages" if in_turn else "heads"
            name, value = ("stage_order", '"simultaneous"') if in_turn else ("end_to_end_laps", 0)
            raise ValueError(
                f"{name}={getattr(args, name)!r}, but DeepSpeed steps all parameters, and so moves {rest} that "
                f"rest, too, by momentum and weight decay. Set {name}={value}, or use FSDP."
            )
        if args.stage_clipping:
            raise ValueError(
                "stage_clipping=True, but DeepSpeed clips the gradients of all stages together. Set "
                "stage_clipping=False."
            )
        if self.zero_stage == 3:
            _refuse_cache("ZeRO stage 3", args)
            if compiles:
                raise ValueError(
                    "torch.compile is switched on, but ZeRO stage 3 gathers parameters inside of the layers that would "
                    "be compiled. Set torch_compile=False (dynamo_backend to no in the accelerate configuration), "
                    "zero_optimization.stage to 2 in the DeepSpeed configuration, or use FSDP."
                )
            if args.activation_checkpointing:
                raise ValueError(
                    "activation_checkpointing=True, but a layer that ZeRO stage 3 gathers is not found again when a "
                    "stage's backward pass recomputes it. Set zero_optimization.stage to 2 in the DeepSpeed "
                    "configuration, or activation_checkpointing=False, or use FSDP."
                )

    def prepare(self, model: nn.Module, partition: Partition, heads: StageHeads) -> None:
        """Refuse what several stages share where gradients of several backward passes are not added up."""
        if self.zero_stage == 3 and (len(heads.layers) > 0 or heads.kind == "own"):
            shared, remedy = "The model's own head learns", ""
            if heads.kind != "own":
                shared, remedy = f"The heads have {len(heads.layers)} layers, which learn", "head_layers=0, or "
            raise ValueError(
                f"{shared} from the losses of several stages, but ZeRO stage 3 keeps the last one's gradient only. "
                f"Set {remedy}zero_optimization.stage to 2 in the DeepSpeed configuration, or use FSDP."
            )

    def backward(self, loss: torch.Tensor, **retain: bool) -> None:
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(loss, scale_wrt_gas=False, **retain)

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        sharded = [p for p in module.parameters() if hasattr(p, "ds_id")]
        if not sharded:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(sharded):
            yield


def wrapper_of(accelerator: Any) -> Wrapper:
    """The [`Wrapper`] that the accelerator will put around the model."""
    kinds = {DistributedType.FSDP: FullyShardedWrapper, DistributedType.DEEPSPEED: DeepSpeedWrapper}
    return kinds.get(accelerator.distributed_type, Wrapper)(accelerator)


def numel(parameter: torch.Tensor) -> int:
    """Number of elements of the whole parameter, of which this process may hold a part."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _is_inside(name: str, module: str) -> bool:
    """Whether the module of that name is inside another one; the model's own name is empty."""
    return name != module and f"{name}.".startswith(f"{module}." if module else "")


def _refuse_for_shards(kind: str, args: MMSTConfig) -> None:
    if args.offload not in (None, "none") and not args.shards_layers:
        raise ValueError(
            f'offload="{args.offload}" moves layers in and out of device memory, but {kind} does so, too, in its own '
            f'way. Set offload="none", or leave {kind} out.'
        )
    if args.memory_budget is not None and not args.shards_layers:
        raise ValueError(
            f'memory_budget="{args.memory_budget}" plans for a model that is whole in each process, but {kind} shards '
            f"it. Leave memory_budget unset and choose num_stages yourself, or leave {kind} out."
        )


def _refuse_cache(kind: str, args: MMSTConfig) -> None:
    if args.feature_cache != "none":
        raise ValueError(
            f'feature_cache="{args.feature_cache}" spares a process layers that the others may still have to run, but '
            f'with {kind} all have to run them together. Set feature_cache="none", or leave {kind} out.'
        )
