"""What a trainer holds for a run in stages, beside the host's own state: the pieces, and how a run begins and ends."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..config import MMSTConfig
from ..cut.copies import tensors_of
from ..cut.example_inputs import first_batch
from ..cut.layers import resting_parameters
from ..cut.objectives import objective_of
from ..distributed.compiling import compiled, refuse_compilation, take_compilation
from ..distributed.layer_shards import shard_untrained
from ..distributed.reduction import Reduction
from ..distributed.wrappers import Wrapper, wrapper_of
from ..memory.layer_offload import LayerOffload
from ..memory.peaks import TurnPeaks
from ..memory.recomputing import recomputing
from ..method.heads import HEADS, heads_beside, is_pretrained
from ..method.stepping import clip_by_stage
from ..planning.budget import plan_for
from .features import Features
from .learning import StageLearning
from .refusals import refuse_half
from .stage_parallel import AllStages
from .staging import StagedModel, Staging
from .turns import Turns, turn_name
from .watch import Watch

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what the host sets on a layer


class StageRun:
    """
    The pieces of a run in stages.

    Args:
        args ([`MMSTConfig`]): the settings of the run.
        owner (`str`): the class of the trainer, for messages.

    Attributes:
        accelerator (`accelerate.Accelerator`), stages ([`AllStages`]), compilation (`dict`, *optional*): set by
            [`use`]: the host's accelerator, which stages this process has, and how layers are compiled.
        staged ([`StagedModel`]), turns ([`Turns`]), learning ([`StageLearning`]): set by [`cut`], anew for each model.
        features ([`Features`]), watch ([`Watch`]) and peaks ([`TurnPeaks`]): made once.
        moved (`dict[str, int]`): bytes that layers at rest moved in the last step, see [`Link`].
        planned (`dict[str, int | None]`): bytes that runs of this model take by their plan, by what was planned.
    """

    accelerator: Any
    stages: AllStages
    compilation: dict[str, Any] | None
    peaks: TurnPeaks
    staged: StagedModel
    turns: Turns
    learning: StageLearning

    def __init__(self, args: MMSTConfig, owner: str):
        self._args = args
        self.features = Features(args)
        self.watch = Watch(owner)
        self.moved: dict[str, int] = {}
        self.planned: dict[str, int | None] = {}
        self._with_heads = contextlib.ExitStack()  # holds the heads in the model
        self._streams = contextlib.ExitStack()  # holds what streams and compiles layers

    def use(self, accelerator: Any, stages: AllStages) -> None:
        """Use the accelerator that the host has made; what it would do to the model as a whole is taken out of it."""
        self.accelerator, self.stages = accelerator, stages
        self.compilation = take_compilation(accelerator)
        if self._args.offload not in (None, "none") and not self._args.shards_layers:
            accelerator.device_placement = False  # layers at rest are not moved to the device
        if not hasattr(self, "peaks"):
            self.peaks = TurnPeaks(self._args.device)

    @property
    def wrapper(self) -> Wrapper:
        """What is around the model when it trains."""
        return wrapper_of(self.accelerator)

    def refuse_wrapper(self) -> None:
        """
        Raises:
            `ValueError`: if what is around the model cannot be trained in, or compiled, as the settings ask for.
        """
        self.wrapper.refuse(self._args, self.compilation is not None)
        if self.compilation is not None:
            refuse_compilation(self._args, self.compilation)

    @property
    def is_plain(self) -> bool:
        """Whether this step is one of plain Trainer: one stage, whose loss is the model's own."""
        return self.staged.num_stages == 1 and not self.turns.now.end_to_end

    @property
    def layer_offload(self) -> LayerOffload | None:
        """What offloads layers, while all of them are."""
        offload = self.staged.offload
        return offload if isinstance(offload, LayerOffload) and self._all_rest else None

    @property
    def _all_rest(self) -> bool:
        """Whether the layers that learn are offloaded, too."""
        return self.turns.now.end_to_end or self._args.offload == "layers"

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the processes; to be called in each of them."""
        args = self._args
        return self.accelerator.reduce(values.to(args.device), "mean") if args.world_size > 1 else values

    def is_cut(self, model: nn.Module) -> bool:
        """Whether [`cut`] was called for this very model."""
        return hasattr(self, "staged") and self.staged.model is model

    def cut(self, model: nn.Module, staging: Staging) -> None:
        """Cut the model into stages and make their heads. Raises what [`Staging.of`] raises."""
        self.staged, self.planned = staging.of(model), {}
        self.turns = Turns(self._args, self.staged.num_stages)
        self.learning = StageLearning(self._args, self.staged, self.stages, self.features, self.watch)
        self.stages.take_share(self.staged, self._args)

    def prepare(self, keeps_half: bool) -> None:
        """
        Put the auxiliary heads into the model, unless they are there, and get ready what depends on parameters.

        Args:
            keeps_half (`bool`): whether weights that learn may be float16, as their wrapper keeps a copy in float32.
        """
        staged, wrapper = self.staged, self.wrapper
        core, heads = staged.model, staged.heads
        if core._modules.get(HEADS) is heads:
            return
        self._with_heads.close()  # of another model
        heads.apart = not wrapper.own_files  # files that are read before training begins
        self._with_heads.enter_context(heads_beside(core, heads))
        if not keeps_half:
            refuse_half(core)
        staged.share_out()
        wrapper.prepare(core, staged.partition, heads)
        if self._args.world_size > 1 and staged.num_stages > 1 and not wrapper.reduces:
            self.learning.reduction = Reduction(core, staged.parameters)
        for layer in heads.layers:  # checkpointed as the model's own
            own = vars(staged.layers[-1])
            vars(layer).update({name: own[name] for name in CHECKPOINTING if name in own})

    def watch_states(self, optimizer: Any) -> None:
        """Keep the states of an optimizer where layers at rest, and shares of stages, have them."""
        self._optimizer = optimizer
        if self.staged.offload is not None:
            self.staged.offload.watch(optimizer)
        self.stages.keep_own_states(optimizer)

    @contextlib.contextmanager
    def one_with_heads(self) -> Iterator[None]:
        """Within this context the heads are in the model's state dict, if a wrapper's own files hold them with it."""
        heads = self.staged.heads
        apart, heads.apart = heads.apart, heads.apart and not self.wrapper.own_files
        try:
            yield
        finally:
            heads.apart = apart

    def begin_step(self, step: int) -> None:
        """Make ready for the stages that learn at optimizer step `step`."""
        turn = self.turns.now = self.stages.own_part(self.turns.order.at(step))
        self.staged.rest(turn.stages)
        if self.staged.uses_model_loss and step == turn.start:
            self._forget_states()  # before what rests elsewhere is told of the new turn
        # A tracker does not see what is mapped in, compiled, or in another process.
        sees = self.staged.offload is None and self.compilation is None and self._args.world_size == 1
        self.peaks.begin(turn_name(turn) if self.turns.are_several else "", self._held if sees else None)
        if self.staged.offload is not None:
            self.staged.offload.activate(() if self._all_rest else turn.stages)
        self.features.begin_step(turn)

    def _forget_states(self) -> None:
        """But for those of what learns in every turn."""
        model, partition = self.staged.model, self.staged.partition
        for stage in range(partition.num_stages):
            for parameter in resting_parameters(model, partition, stage):
                self._optimizer.state.pop(parameter, None)

    def _held(self) -> Iterator[torch.Tensor]:
        """The model's tensors and the optimizer's states."""
        yield from tensors_of(self.staged.model)
        states = (value for state in self._optimizer.state.values() for value in state.values())
        yield from (value for value in states if torch.is_tensor(value))

    def begin_streaming(self) -> None:
        """From now on layers at rest stream through the device, and layers are compiled, if they are to be."""
        if self.staged.offload is not None:
            self._streams.enter_context(self.staged.offload.streaming())
        if self._args.shards_layers:
            self._streams.enter_context(recomputing(self.staged.model, self.staged.partition.layers))
        if self.compilation is not None:
            self._streams.enter_context(compiled([*self.staged.layers, *self.staged.heads.layers], **self.compilation))

    @contextlib.contextmanager
    def not_streaming(self) -> Iterator[None]:
        """Without the hooks by which layers stream through the device during training, which no plan can follow."""
        offload = self.staged.offload
        if offload is None or not offload.is_streaming:
            yield
            return
        self._streams.close()
        try:
            yield
        finally:
            self.begin_streaming()

    @contextlib.contextmanager
    def evaluating(self, is_in_train: bool) -> Iterator[None]:
        """Within this context layers at rest stream through the device, in training or not; no tensors are tracked."""
        if self._args.shards_layers:
            self.wrapper.prepare(self.staged.model, self.staged.partition, self.staged.heads)
            shard_untrained(self.accelerator, self.staged.model)
        offload = self.staged.offload
        streaming = offload.streaming() if offload is not None and not is_in_train else contextlib.nullcontext()
        with self.peaks.paused(), streaming:
            yield

    @contextlib.contextmanager
    def micro_batch(self, model: Any, inputs: Mapping[str, Any], seed: tuple[int, ...]) -> Iterator[None]:
        """Within this context the host trains on a micro-batch; gradients are averaged by stages, or put to rest."""
        reduction = self.learning.reduction
        with contextlib.ExitStack() as stack:
            if reduction is not None:
                stack.enter_context(reduction.micro_batch(model, last=self.accelerator.sync_gradients))
            stack.enter_context(self.stages.micro_batch(self.staged, inputs, seed))
            yield
        if isinstance(self.staged.offload, LayerOffload):
            self.staged.offload.settle()

    def clip(self, max_norm: float, are_seen: bool) -> torch.Tensor | None:
        """
        The norm of the gradients before clipping, where they are not the host's to clip; `None` where they are.

        Args:
            max_norm (`float`): to which they are clipped.
            are_seen (`bool`): whether something looks at them between clipping and the step.
        """
        as_a_whole = self.turns.now.end_to_end or self.is_plain or self.staged.uses_model_loss
        if as_a_whole or not self._args.stage_clipping:
            return None if self.layer_offload is None else self.layer_offload.clip(max_norm, at_once=are_seen)
        self.accelerator.unscale_gradients()
        return clip_by_stage(self.staged.parameters, max_norm)

    def norm_at_rest(self) -> torch.Tensor | None:
        """The norm of the gradients, where they are at rest."""
        return self.layer_offload.clip(math.inf) if self.layer_offload is not None else None

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Within this context a run takes place; however it ends, the model is as it came, and nothing stays behind."""
        with contextlib.ExitStack() as stack:  # what one of them raises keeps none of the others from it
            stack.callback(self._clean_up)
            stack.callback(self.features.flush)
            stack.callback(self.peaks.end)
            stack.callback(self._streams.close)
            stack.callback(self.watch.end)
            yield

    def _clean_up(self) -> None:
        self.staged.rest(range(self.staged.num_stages))
        self._with_heads.close()
        if self.staged.offload is not None:
            self.staged.offload.rest()
        self.learning.forget()


def first_batch_of(trainer: Any, num_samples: int) -> Any:
    """The first samples of a trainer's data as its model gets them, drawn without a trace; `None` without data."""
    dataset = trainer.train_dataset if trainer.train_dataset is not None else trainer.eval_dataset
    dataset = next(iter(dataset.values()), None) if isinstance(dataset, Mapping) else dataset
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="planning")
    return None if dataset is None else first_batch(dataset, num_samples, collate)


def batch_to_plan(trainer: Any) -> Any:
    """A first batch as plans need it: tokens without a label have one, if a loss looks at their logits, too."""
    batch = first_batch_of(trainer, trainer.args.per_device_train_batch_size)
    looks_at_all = trainer.compute_loss_func is not None or trainer.args.label_smoothing_factor > 0
    if looks_at_all and batch is not None and torch.is_tensor(batch.get("labels")):
        batch = {**batch, "labels": batch["labels"].clamp(min=0)}
    return batch


def settle(trainer: Any) -> int | None:
    """
    Settle what the settings leave to the model: the plan for `memory_budget`, the order, and what is offloaded.

    Returns:
        `int`, *optional*: the bytes that the plan takes, if there is one.
    """
    args, model, planned = trainer.args, trainer._core(), None
    sharded = trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not args.shards_layers)
    can_offload = not sharded and trainer._run.compilation is None
    if args.memory_budget is not None and trainer.train_dataset is not None:
        batch = batch_to_plan(trainer)
        learn = bool(objective_of(model) or trainer.compute_loss_func) or args.stage_objective == "model"
        planned = plan_for(args, model, batch, learn, can_offload).peak.total
    args.settle(is_pretrained(model), can_offload)
    _place(trainer, args.place_model_on_device is not False and not sharded and not args.shards_layers)
    trainer.accelerator.device_placement &= args.offload == "none" or args.shards_layers
    return planned


def _place(trainer: Any, whole: bool) -> None:
    """Have the host place models on the device, which it has left before it was known whether layers are offloaded."""
    args = trainer.args
    later = trainer.is_model_parallel or args.fp16_full_eval or args.bf16_full_eval
    trainer.place_model_on_device = whole and not later and not trainer.is_distributed_loading_by_transformers
    if trainer.place_model_on_device and getattr(trainer.model, "quantization_method", None) is None:
        trainer._move_model_to_device(trainer.model, args.device)
