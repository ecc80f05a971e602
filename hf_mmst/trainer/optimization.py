"""Stages and heads -> what makes them learn: an optimizer with rates of their own, and a schedule of each turn."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from ..cut.partition import tail_parameters, tied_parameters
from ..distributed.reduction import Reduction
from ..method.heads import HEADS, heads_beside, is_pretrained
from ..method.learning_rates import PRETRAINED_DECAY, PRETRAINED_FACTOR, join_groups, rate_factors, split_groups
from ..method.order import Segment
from ..method.stepping import parameters_by_stage
from .staging import StageCut

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what the host sets on a layer


class StageOptimization(StageCut):
    """The optimizer and the schedule of [`MMSTTrainer`], which sets the attributes below."""

    lr_scheduler: Any
    _keep_own_states: Any
    _with_heads: contextlib.ExitStack  # holds the heads in the model
    _sets_rates = False  # which is for who makes the optimizer to do
    _reduction: Reduction | None = None

    def _prepare_for_training(self, *args, **kwargs):
        """As the host's, with the auxiliary heads in the model."""
        self._prepare_stages()
        return super()._prepare_for_training(*args, **kwargs)

    def _prepare_stages(self) -> None:
        """Put the auxiliary heads into the model, unless they are there, and get ready what depends on parameters."""
        self._cut()
        core = self._core()
        if core._modules.get(HEADS) is self.heads:
            return
        self._with_heads.close()  # of another model
        self.heads.apart = not self._wrapper.own_files  # files that are read before training begins
        self._with_heads.enter_context(heads_beside(core, self.heads))
        self._refuse_half(core)
        self._share_out()
        self._wrapper.prepare(core, self.partition, self.heads)
        if self.args.world_size > 1 and self.partition.num_stages > 1 and not self._wrapper.reduces:
            self._reduction = Reduction(core, self._stage_parameters)
        for layer in self.heads.layers:  # checkpointed as the model's own
            own = vars(core.get_submodule(self.partition.layers[-1]))
            vars(layer).update({name: own[name] for name in CHECKPOINTING if name in own})

    def create_optimizer(self, model=None):
        """As the host's, with the auxiliary heads among the parameters, and the rates of stages and heads."""
        self._prepare_stages()
        own = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if own:
            self._set_learning_rates(optimizer)
            self._sets_rates = True
        return optimizer

    def _wrap_model(self, model, training=True, dataloader=None):
        """As the host's; what is to be trained has an optimizer by now, which gets the heads, whoever has made it."""
        if training:
            if not self._sets_rates:
                self._refuse_rates()
            known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            heads = {f"{HEADS}.{name}": p for name, p in self.heads.named_parameters() if p.requires_grad}
            missing = {name: p for name, p in heads.items() if id(p) not in known}
            join_groups(self.optimizer, missing, list(self._core().parameters()))
            if self._residency is not None:
                self._residency.watch(self.optimizer)
            self._keep_own_states(self.optimizer)
        return super()._wrap_model(model, training, dataloader)

    def _save_optimizer_and_scheduler(self, output_dir):
        """As the host's; a wrapper's own files hold the heads with the model."""
        with self._one_with_heads():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_best_model(self):
        """As the host's, also of a wrapper's own files."""
        with self._one_with_heads():
            super()._load_best_model()

    @contextlib.contextmanager
    def _one_with_heads(self) -> Iterator[None]:
        apart, self.heads.apart = self.heads.apart, self.heads.apart and not self._wrapper.own_files
        try:
            yield
        finally:
            self.heads.apart = apart

    def _share_out(self) -> None:
        """Share the parameters out over the stages; sharding puts others in their place."""
        core = self._core()
        self._stage_parameters = parameters_by_stage(core, self.partition, self.heads)
        tied = tied_parameters(core, self.partition.layers) if len(self.heads) and self.heads.kind == "own" else []
        self._tied = [parameter for parameter in tied if parameter.requires_grad]

    def _set_learning_rates(self, optimizer: torch.optim.Optimizer) -> None:
        args, core = self.args, self._core()
        factor, decay = 1.0, 1.0
        if len(self.heads) > 0 and is_pretrained(core):
            layers_per_stage = len(self.partition.layers) / self.partition.num_stages
            factor, decay = PRETRAINED_FACTOR, PRETRAINED_DECAY**layers_per_stage
        if args.stage_learning_rate_decay is not None:
            decay = args.stage_learning_rate_decay
        if args.head_learning_rate is not None and args.learning_rate > 0:
            factor = args.head_learning_rate / args.learning_rate
        if (factor, decay) != (1, 1):
            split_groups(optimizer, rate_factors(self._stage_parameters, self._head_parameters(core), decay, factor))

    def _head_parameters(self, core: nn.Module) -> list[nn.Parameter]:
        """Those of the auxiliary heads, but for their layers, and of what the model itself has after its last layer."""
        heads = [p for head in self.heads for p in head.parameters()]
        if self.heads.kind == "own" or not self.partition.layers:
            return heads
        others = {*self.heads.layers.parameters()}
        return [*heads, *(p for p in tail_parameters(core, self.partition.layers) if p not in others)]

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As the host's; in sequential orders each segment has its own warm-up and decay over its own steps."""
        if self.lr_scheduler is not None or len(self._order.segments) == 1:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        multipliers = [self._lr_multiplier(segment) for segment in self._order.segments]

        def multiplier(step: int) -> float:  # turns may end early
            return multipliers[self._order.index(step)](step - self._order.at(step).start)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _renew_rates(self) -> None:
        """Set the rates of a turn that has begun after the scheduler's step."""
        if self._created_lr_scheduler:
            self.lr_scheduler.last_epoch -= 1
            self.lr_scheduler.step()

    def _lr_multiplier(self, segment: Segment):
        args = self.args
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(segment.steps),
            num_training_steps=segment.steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            kind = SchedulerType(args.lr_scheduler_type).value
            raise ValueError(
                f"lr_scheduler_type={kind} cannot start anew with each stage. Set it to one that "
                'depends on the step alone (linear, cosine, constant_with_warmup, ...), or stage_order="simultaneous".'
            )
        return scheduler.lr_lambdas[0]

    def _refuse_rates(self) -> None:
        for name in ("head_learning_rate", "stage_learning_rate_decay"):
            if self.optimizer is not None and getattr(self.args, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self.args, name)} has no effect on an optimizer of your own. Give its groups the "
                    f"rates you want and leave {name} unset, or leave the optimizer to the trainer."
                )
