"""The optimizer and the scheduler of a run in stages: rates of stages and heads, and a schedule for each turn."""

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from ..config import MMSTConfig
from ..cut.layers import tail_parameters
from ..method.heads import HEADS, is_pretrained
from ..method.learning_rates import PRETRAINED_DECAY, PRETRAINED_FACTOR, join_groups, rate_factors, split_groups
from ..method.order import Segment
from .staging import StagedModel
from .turns import Turns


def set_learning_rates(optimizer: torch.optim.Optimizer, args: MMSTConfig, staged: StagedModel) -> None:
    """Give stages and heads the rates of `head_learning_rate` and `stage_learning_rate_decay`, or their defaults."""
    factor, decay = 1.0, 1.0
    if len(staged.heads) > 0 and is_pretrained(staged.model):
        layers_per_stage = len(staged.partition.layers) / staged.num_stages
        factor, decay = PRETRAINED_FACTOR, PRETRAINED_DECAY**layers_per_stage
    if args.stage_learning_rate_decay is not None:
        decay = args.stage_learning_rate_decay
    if args.head_learning_rate is not None and args.learning_rate > 0:
        factor = args.head_learning_rate / args.learning_rate
    if (factor, decay) != (1, 1):
        split_groups(optimizer, rate_factors(staged.parameters, _head_parameters(staged), decay, factor))


def _head_parameters(staged: StagedModel) -> list[nn.Parameter]:
    """Those of the auxiliary heads, but for their layers, and of what the model itself has after its last layer."""
    heads = [p for head in staged.heads for p in head.parameters()]
    if staged.heads.kind == "own" or not staged.partition.layers:
        return heads
    others = {*staged.heads.layers.parameters()}
    return [*heads, *(p for p in tail_parameters(staged.model, staged.partition.layers) if p not in others)]


def add_heads(optimizer: torch.optim.Optimizer, staged: StagedModel) -> None:
    """Add the auxiliary heads to the groups of an optimizer, whoever has made it, unless they are there."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    heads = {f"{HEADS}.{name}": p for name, p in staged.heads.named_parameters() if p.requires_grad}
    missing = {name: p for name, p in heads.items() if id(p) not in known}
    join_groups(optimizer, missing, list(staged.model.parameters()))


def scheduler_of_turns(
    optimizer: torch.optim.Optimizer, args: MMSTConfig, turns: Turns
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler that begins anew with each turn, whose warm-up and decay are over the steps of that turn."""
    multipliers = [_lr_multiplier(args, segment) for segment in turns.order.segments]

    def multiplier(step: int) -> float:  # turns may end early
        return multipliers[turns.order.index(step)](step - turns.order.at(step).start)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)


def renew_rates(scheduler: Any) -> None:
    """Set the rates of a turn that has begun after the scheduler's step."""
    scheduler.last_epoch -= 1
    scheduler.step()


def _lr_multiplier(args: MMSTConfig, segment: Segment) -> Any:
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
