"""MMSTTrainer: the host's Trainer, with each training step run stage by stage. Glue only."""

import contextlib
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging

from .compiling import compiled, refuse_compilation, take_compilation
from .config import MMSTConfig
from .coupled import CoupledResidency
from .evaluation import StageEvaluation
from .feature_cache import KEYS, FeatureCache, FixedViews, KeyedCollator, check_fixed, upstream_hash
from .heads import HEADS, StageHeads, is_pretrained, num_head_layers
from .learning_rates import PRETRAINED_FACTOR, rate_factors, split_groups
from .memory import TurnPeaks
from .objectives import CLASSES, objective_of
from .order import Order, Segment
from .partition import (
    Partition,
    checkpoints_across,
    find_layers,
    last_norm,
    run_ends,
    tail_parameters,
    tied_parameters,
)
from .planner import plan_for
from .probe import LayerProfile, check_cut, own_pooling, profile_layers
from .publishing import StageCards
from .reduction import Reduction
from .residency import Residency
from .stage_parallel import StageParallel
from .stagewise import StageStep, Stagewise
from .stepping import clip_by_stage, parameters_by_stage, step_stage, steps_elementwise
from .transport import TransportWeights
from .wrappers import numel

logger = logging.get_logger(__name__)
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what the host sets on a layer


class MMSTTrainer(StageEvaluation, StageParallel, StageCards):
    """
    A [`~transformers.Trainer`] that trains an encoder stage by stage by the minimizing movement scheme.

    It takes what `Trainer` takes, with [`MMSTConfig`] in the place of `TrainingArguments`. During [`train`] the
    auxiliary heads are part of the model, as `model.mmst_heads`, so that optimizers, DistributedDataParallel and
    clipping see them; afterwards the model is as it came, and the heads are `trainer.heads`.

    Losses are means over the samples (of tokens: over the labels that count) of an optimizer step, however it is split
    into micro-batches and processes.

    Attributes:
        partition ([`Partition`]): how the model was cut.
        heads ([`StageHeads`]): the auxiliary heads of stages 1 .. K-1.
        peaks ([`TurnPeaks`]): the most memory in training, of each stage where one learns at a time.

    Raises:
        `TypeError`: if `args` is not an [`MMSTConfig`].
        `ValueError`: if the model or its task cannot be trained in stages, or for a setting that would do so wrongly.
    """

    data_collator: Any
    lr_scheduler: Any
    loss_is_scaled_for_ga = True  # compute_loss weighs each micro-batch by its share of the step's samples

    @functools.wraps(Trainer.__init__)  # type: ignore[misc]
    def __init__(self, model=None, args=None, *others, **kwargs):
        args = MMSTConfig("tmp_trainer") if args is None else args
        if not isinstance(args, MMSTConfig):
            raise TypeError(
                f"MMSTTrainer got args of type {type(args).__name__}. Use MMSTConfig in its place: it takes all that "
                "TrainingArguments takes."
            )
        super().__init__(model, args, *others, **kwargs)
        self._refuse_rates()
        # Whether a model divides by num_items_in_batch or ignores it differs between models: means are taken here.
        self.model_accepts_loss_kwargs = False
        self._refuse_wrappers()
        self._cut_model: nn.Module | None = None
        self._planned = self._plan()
        self.peaks = TurnPeaks(self.args.device)
        self._streams = contextlib.ExitStack()  # holds what streams layers through the device in a training run
        self._cache: FeatureCache | None = None
        self._views: FixedViews | None = None
        self._step_labels, self._step_samples = 0.0, 0.0
        self._early_norms: list[torch.Tensor] = []  # of the gradients of stages that have stepped already
        self._shares_gradients = False
        self._reduction: Reduction | None = None
        self._cut()
        self.add_callback(_StageCallback(self))
        self.add_callback(self.picture_callback())

    def _plan(self) -> int | None:
        """Plan for `memory_budget`, if one is set; returns the bytes that the chosen way takes."""
        args = self.args
        if args.memory_budget is None or self.train_dataset is None:
            return None
        found = plan_for(args, self._core(), self._batch_to_plan())
        if args.place_model_on_device:
            self._move_model_to_device(self.model, args.device)
        self.accelerator.device_placement &= args.stage_residency == "all"
        return found.peak.total

    # ---- The cut ----

    def _cut(self) -> None:
        """Cut the model into stages and make their heads, unless that was done for this very model."""
        model = self._core()
        if self._cut_model is model:
            return
        self.args.check_stages()
        if self.args.stage_order != "coupled" and (self.args.num_stages > 1 or self.args.stage_boundaries is not None):
            self._refuse_task(model)
        self._objective = objective_of(model) or CLASSES
        with self._wrapper.whole(model):
            self._cut_whole(model)

    def _cut_whole(self, model: nn.Module) -> None:
        self.partition, ends = self._partition(model)
        num_stages = self.partition.num_stages
        self.heads = StageHeads(
            [end.width for end in ends],
            getattr(model.config, "num_labels", 0),
            self._pooling(model) if ends else self.args.head_pooling,
            self.args.seed,
            [end.is_map and self.args.head_pooling == "auto" for end in ends],
            *self._last_layers(model, [end.width for end in ends]),
            self._objective.head,
        )
        self.heads.to(device=self.args.device, dtype=_dtype(model))
        first = self._wrapper.hooks_first
        self._engine = Stagewise(model, self.partition, self.heads, self.args.transport_norm, first)
        self._weights = TransportWeights(self.args.transport_schedule, self.args.transport_weight, num_stages)
        self._order = Order.build("simultaneous", num_stages, 1, 1)
        self._segment = self._order.at(0)
        self._log_sums = torch.zeros(num_stages, 3)
        self._residency = None
        if self.args.stage_residency == "stage":
            kind = CoupledResidency if self._couples() else Residency
            self._residency = kind(model, self.partition, self.args.device, self.args.output_dir)
        self._cut_model = model
        self._share_out()
        self._take_share()

    def _partition(self, model: nn.Module) -> tuple[Partition, list[LayerProfile]]:
        """The cut, and the layers at the ends of all stages but the last."""
        args = self.args
        if args.num_stages == 1 and args.stage_boundaries is None and args.stage_order != "coupled":
            try:
                return Partition((tuple(find_layers(model)),)), []
            except ValueError:  # nothing is cut, so any model will do; there is no transport to measure either
                return Partition(((),)), []
        layers = find_layers(model)
        profile = profile_layers(model, layers)
        if args.stage_residency == "stage" and self._couples():
            apart = checkpoints_across(model, Partition.by_cost(layers, len(layers), [1] * len(layers))) is None
            if not apart or not isinstance(model.get_submodule(layers[0]), GradientCheckpointingLayer):
                setting, remedy = 'stage_order="coupled"', "another stage_order"
                if args.coupled_laps:
                    setting, remedy = f"coupled_laps={args.coupled_laps}", 'stage_residency="all"'
                raise ValueError(
                    f"The layers of {type(model).__name__}, {layers[0]} and so on, cannot each be checkpointed by "
                    f"itself, as {setting} needs it. Set {remedy}."
                )
        if args.stage_order == "coupled":
            return Partition((tuple(layers),)), []
        if args.stage_boundaries is not None:
            partition = Partition.by_names(layers, args.stage_boundaries)
        else:
            costs = [layer.flops for layer in profile]
            partition = Partition.by_cost(layers, args.num_stages, costs, run_ends(model, layers))
        check_cut(model, partition)
        by_name = {layer.name: layer for layer in profile}
        return partition, [by_name[name] for name in partition.boundaries[:-1]]

    def _last_layers(self, model: nn.Module, widths: list[int]) -> tuple[list[nn.Module], nn.LayerNorm | None]:
        """What of the model the auxiliary heads have a copy of."""
        layers = self.partition.layers
        if not widths:
            return [], None
        blocks = len(run_ends(model, layers)) == len(layers)
        widths = [*widths, profile_layers(model, layers)[-1].width]
        number = num_head_layers(self.args.head_layers, model, widths, blocks)
        if number > len(layers):
            raise ValueError(
                f"head_layers={number}, but the model has {len(layers)} layers. Set head_layers to that or less."
            )
        norm = last_norm(model, layers[-1], widths[-1]) if number > 0 else None
        return [model.get_submodule(name) for name in layers[len(layers) - number :]], norm

    def _pooling(self, model: nn.Module) -> str:
        """What the auxiliary heads pool."""
        if self._objective.head == "pooled" and self.args.head_pooling == "auto" and is_pretrained(model):
            return own_pooling(model, self.partition.layers[-1])
        return self.args.head_pooling

    def _refuse_rates(self) -> None:
        for name, default in (("head_learning_rate", None), ("stage_learning_rate_decay", 1.0)):
            if self.optimizer is not None and getattr(self.args, name) != default:
                raise ValueError(
                    f"{name}={getattr(self.args, name)} has no effect on an optimizer of your own. Give its groups the "
                    f"rates you want and leave {name} unset, or leave the optimizer to the trainer."
                )

    def _refuse_wrappers(self) -> None:
        self._wrapper.refuse(self.args, self._compilation is not None)
        if self._compilation is not None:
            refuse_compilation(self.args, self._compilation)
        if self.is_fsdp_xla_enabled or getattr(self, "is_distributed_loading_by_transformers", False):
            what = "FSDP on XLA" if self.is_fsdp_xla_enabled else "A model that was put in shards when it was loaded"
            raise ValueError(
                f"{what} cannot be trained in stages. Load the model whole, and set fsdp=True without xla."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, which nn.DataParallel cannot train in stages. "
                "Start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
            )

    def _refuse_half(self, core: nn.Module) -> None:
        half = any(p.requires_grad and p.dtype == torch.float16 for p in core.parameters())
        if half and not self.is_deepspeed_enabled:  # whose engine keeps a copy in float32
            raise ValueError(
                f"Weights of {type(core).__name__} that learn are float16, as its checkpoint may be: small steps are "
                "lost and squared gradients overflow. Load the model with dtype=torch.float32, and set bf16=True or "
                "fp16=True for mixed precision."
            )

    def _refuse_task(self, model: nn.Module) -> None:
        base = unwrap_peft_model(model)
        objective = objective_of(model)
        if objective is None and self.compute_loss_func is None:
            raise ValueError(
                f"{type(base).__name__} has no head of which the stages' local losses could be made: these are known "
                "for classification and regression of sequences, images and audio, for classification of tokens, and "
                "for masked and causal language models with one stack of layers. Pass such a model, a "
                "compute_loss_func for a loss of your own (of pooled logits), or set num_stages to 1."
            )
        if objective is not None and objective.head != "pooled" and self.args.head_pooling != "auto":
            raise ValueError(
                f'head_pooling="{self.args.head_pooling}", but a {type(base).__name__} has a label for each token, and '
                'nothing is pooled. Set head_pooling="auto".'
            )
        if self.args.use_cache:
            raise ValueError(
                "use_cache=True keeps the keys and values of all stages in memory, and heads with layers would add to "
                "them. Set use_cache=False; generate has a setting of its own."
            )
        if getattr(base.config, "output_router_logits", False):
            raise ValueError(
                "config.output_router_logits=True adds a loss of all routers at once, from which the stages of "
                f"{type(base).__name__} before the last would not learn. Set it to False."
            )
        for name, value in vars(base.config).items():
            if "layerdrop" in name and value:
                raise ValueError(
                    f"config.{name}={value} skips layers at random, and with them the ends of stages. Set it to 0."
                )

    def _refuse_checkpointing(self) -> None:
        model = self._core()
        name = checkpoints_across(model, self.partition)
        if name is not None and model.get_submodule(name).gradient_checkpointing:
            raise ValueError(
                f"Activation checkpointing runs {name} of {type(model).__name__} twice as a whole, although a stage "
                "ends within it. Set gradient_checkpointing=False; a larger num_stages saves activations, too."
            )

    def _core(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- Training ----

    @functools.wraps(Trainer.train)
    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._streams.close()
            self.peaks.end()
            if self._cache is not None:
                self._cache.flush()
            for parameter in self._tied:
                parameter.requires_grad_(True)
            self._core()._modules.pop(HEADS, None)
            Reduction.forget(self._core())
            if self._residency is not None:
                self._residency.rest()

    def set_initial_training_values(self, args, dataloader):
        """As the host's, with the epochs and steps of all stages and laps; the order of training is fixed here."""
        epochs, steps_per_epoch, examples, samples, batch_size, batches, max_steps = (
            super().set_initial_training_values(args, dataloader)
        )
        self._cut()
        order = args.stage_order, self.partition.num_stages, args.num_laps
        if args.max_steps <= 0:  # num_train_epochs is what every stage gets
            laps = args.num_laps + args.coupled_laps
            turns = len(Order.turns(*order, args.coupled_laps))
            max_steps, samples = max_steps * turns // laps, samples * turns // laps
            epochs = -(-max_steps // steps_per_epoch)
        self._order = Order.build(*order, max_steps, args.coupled_laps)
        return epochs, steps_per_epoch, examples, samples, batch_size, batches, max_steps

    def _summary(self) -> str:
        """One line on the stages: layers and trainable parameters of each."""
        core = self._core()
        layers = [len(self._engine.run_ends.intersection(stage)) for stage in self.partition.stages]
        trainable = [
            sum(numel(p) for name in stage for p in core.get_submodule(name).parameters() if p.requires_grad)
            for stage in self.partition.stages
        ]
        heads = sum(numel(p) for p in self.heads.parameters() if p.requires_grad)
        others = sum(numel(p) for p in core.parameters() if p.requires_grad) - sum(trainable)
        return (
            f"hf_mmst: {len(layers)} stages of {_joined(layers)} layers, {self.args.stage_order}; trainable "
            f"parameters {_joined(trainable)} in the layers, {others:,} around them, "
            f"{heads:,} in auxiliary heads{self._summary_of_shares()}"
        )

    def create_optimizer(self, model=None):
        """As the host's, with the auxiliary heads among the parameters."""
        self._cut()
        core = self._core()
        core.add_module(HEADS, self.heads)
        self._refuse_half(core)
        self._share_out()
        self._wrapper.prepare(core, self.partition, self.heads)
        if self.args.world_size > 1 and self.partition.num_stages > 1 and not self._wrapper.reduces:
            self._reduction = Reduction(core, self._stage_parameters)
        for layer in self.heads.layers:  # checkpointed as the model's own
            own = vars(core.get_submodule(self.partition.layers[-1]))
            vars(layer).update({name: own[name] for name in CHECKPOINTING if name in own})
        given = self.optimizer
        optimizer = super().create_optimizer(model)
        if given is not None and len(self.heads):
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            missing = [p for p in self.heads.parameters() if p.requires_grad and id(p) not in known]
            if missing:
                optimizer.add_param_group({"params": missing})
        if given is None:
            self._set_learning_rates(optimizer)
        if self._residency is not None:
            self._residency.watch(optimizer)
        self._keep_own_states(optimizer)
        return optimizer

    def _share_out(self) -> None:
        """Share the parameters out over the stages; sharding puts others in their place."""
        core = self._core()
        self._stage_parameters = parameters_by_stage(core, self.partition, self.heads)
        tied = tied_parameters(core, self.partition.layers) if len(self.heads) and self.heads.kind == "own" else []
        self._tied = [parameter for parameter in tied if parameter.requires_grad]

    def _set_learning_rates(self, optimizer: torch.optim.Optimizer) -> None:
        args, core = self.args, self._core()
        factor = PRETRAINED_FACTOR if len(self.heads) and is_pretrained(core) else 1.0
        if args.head_learning_rate is not None and args.learning_rate > 0:
            factor = args.head_learning_rate / args.learning_rate
        if (factor, args.stage_learning_rate_decay) != (1, 1):
            heads, decay = self._head_parameters(core), args.stage_learning_rate_decay
            factors = rate_factors(self._stage_parameters, heads, decay, factor)
            split_groups(optimizer, factors)

    def _head_parameters(self, core: nn.Module) -> list[nn.Parameter]:
        """Those of the auxiliary heads, but for their layers, and of what the model itself has after its last layer."""
        heads = [p for head in self.heads for p in head.parameters()]
        if self.heads.kind == "own" or not self.partition.layers:
            return heads
        others = {*self.heads.layers.parameters()}
        return [*heads, *(p for p in tail_parameters(core, self.partition.layers) if p not in others)]

    def create_accelerator_and_postprocess(self):
        """As the host's; layers at rest are not moved to the device, and compiled layer by layer."""
        super().create_accelerator_and_postprocess()
        self._compilation = take_compilation(self.accelerator)
        if self.args.stage_residency == "stage":
            self.accelerator.device_placement = False

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As the host's; in sequential orders each segment has its own warm-up and decay over its own steps."""
        if self.lr_scheduler is not None or len(self._order.segments) == 1:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        multipliers = [self._lr_multiplier(segment) for segment in self._order.segments]
        order = self._order

        def multiplier(step: int) -> float:
            return multipliers[order.index(step)](step - order.at(step).start)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
        self._created_lr_scheduler = True
        return self.lr_scheduler

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
            raise ValueError(
                f"lr_scheduler_type={args.lr_scheduler_type!s} cannot start anew with each stage. Set it to one that "
                'depends on the step alone (linear, cosine, constant_with_warmup, ...), or stage_order="simultaneous".'
            )
        return scheduler.lr_lambdas[0]

    def _get_dataloader(self, dataset, description, *args, is_training=False, **kwargs):
        """As the host's; for training with a feature cache, batches have the keys of their samples."""
        load = functools.partial(super()._get_dataloader, is_training=is_training, **kwargs)
        caching = self.args.feature_cache != "none"
        if not is_training or not (caching or self.args.cache_views):
            return load(dataset, description, *args)
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"A {type(dataset).__name__} has no length, so that features cannot be found again by its samples. Set "
                'feature_cache="none" and leave cache_views unset, or pass a dataset with a length.'
            )
        if self.args.cache_views:
            dataset = self._views = FixedViews(dataset, self.args.cache_views, self.args.seed)
        collate = self.data_collator
        try:
            if caching:
                self.data_collator = KeyedCollator(collate, self.label_names)
            loader = load(dataset, description, *args)
        finally:
            self.data_collator = collate
        if caching:
            check_fixed(loader.dataset, loader.collate_fn)
            folder = Path(self.args.output_dir) / f"_feature_cache_{self.args.process_index}"
            capacity = len(dataset) * (self.args.cache_views or 1)
            self._cache = FeatureCache(self.args.feature_cache, folder, capacity, self._upstream)
        return loader

    def _upstream(self, stage: int) -> dict[str, Any]:
        """What the features that `stage` gets depend on, beside the samples."""
        upstream = {
            "model": upstream_hash(self._core(), self.partition, stage),
            "stages": self.partition.stages[:stage],
            "precision": str(self.accelerator.mixed_precision),
        }
        if self._residency is not None:
            self._residency.let_go()
        return upstream

    def _begin_step(self, step: int) -> None:
        """Make ready for the stages that learn at optimizer step `step`."""
        self._segment = segment = self._own_part(self._order.at(step))
        for parameter in self._tied:  # else later stages would change what the first, at rest, begins with
            parameter.requires_grad_(segment.coupled or 0 in segment.stages)
        name = "coupled_" if segment.coupled else "" if len(segment.stages) > 1 else f"stage_{segment.stages[0] + 1}_"
        self.peaks.begin(f"{name}peak_bytes" if len(self._order.segments) > 1 else "peak_bytes")
        if self._residency is not None:
            self._residency.activate(() if segment.coupled else segment.stages)
        if self._cache is not None and not segment.coupled:
            self._cache.begin(segment.stages[0])

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the host's; remembers the step's number of labels and of samples, on average over the processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        labels = [batch.get("labels") for batch in batches if isinstance(batch, Mapping)]
        numbers = [self._objective.count(some) for some in labels], [len(x) for x in labels if torch.is_tensor(x)]
        counts = torch.tensor([float(sum(found)) for found in numbers])
        if self.args.average_tokens_across_devices:
            counts = self._mean(counts)
        self._step_labels, self._step_samples = counts.tolist()
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In training: run all stages that learn at this step; the loss returned is the last one's."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        keys = inputs.pop(KEYS).tolist() if KEYS in inputs else []
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                f"The batch has no labels, only {', '.join(inputs)}: every stage learns from them. Give the dataset a "
                "column named label or labels, and set remove_unused_columns=False if it needs other names."
            )
        stages = self._segment.stages
        count, samples = self._objective.count(labels), len(labels) / (self._step_samples or len(labels))
        # The user's function has divided by num_items_in_batch.
        scale = count / (self._step_labels or count) if self.compute_loss_func is None and count else 1.0
        # The mean of no labels is not a number, and has no gradient.
        weigh = (lambda loss: loss) if count or self.compute_loss_func is not None else torch.nan_to_num
        if self._segment.coupled:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (weigh(loss) * scale, outputs) if return_outputs else weigh(loss) * scale
        # Transport is a mean over samples, whatever number of labels they have.
        weights = [self._weights[stage] * samples / scale for stage in range(self.partition.num_stages)]
        mask = inputs.get("attention_mask")
        given = self._cache.get(stages[0], keys, mask) if self._cache is not None else self._taken()
        learning = self._engine.step(
            criterion=lambda logits: weigh(self._criterion(logits, labels, num_items_in_batch)),
            weights=weights,
            stages=stages,
            mask=mask,
            backward=lambda loss: self._wrapper.backward(loss * scale),
            learned=self._step_early,
            given=given and (given[0], given[1].to(self.args.device)),
        )
        with self._wrapper.forward(self._core(), self.partition), learning as step:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._hand_on(step.output)
        if self._cache is not None and step.features is not None and (given is None or given[0] < stages[0]):
            self._cache.add(stages[0], keys, mask, step.features)
        loss = weigh(loss)
        step.losses[stages[-1]] = loss.detach()
        self._record(step, scale, samples)
        if weights[stages[-1]] > 0:
            loss = loss + weights[stages[-1]] * step.transport
        loss = loss * scale
        return (loss, outputs) if return_outputs else loss

    def _step_early(self, stage: int, shared: bool) -> None:
        """
        Step a stage right after its backward, where that makes no difference but to memory.

        With several processes its gradients are sent to the others, and the stage before it, whose are back, steps.
        """
        if shared and not self._wrapper.takes_shared:
            raise ValueError(
                f"The layers of {type(self._core()).__name__} share an input that learns, such as a position bias, and "
                "DeepSpeed cannot add up its gradients over the stages. Use FSDP, or set num_stages=1."
            )
        self._shares_gradients |= shared
        if self._reduction is not None and self.accelerator.sync_gradients:
            if not self._shares_gradients:
                self._reduction.start(stage)
            stage -= 1
        if (
            not self._shares_gradients
            and (self.args.stage_clipping or self.args.max_grad_norm == 0)
            and self.args.gradient_accumulation_steps == 1
            and stage >= 0
            and self._wrapper.steps_alone
            and self.accelerator.scaler is None
            and steps_elementwise(self.optimizer)
        ):
            if self._reduction is not None:
                self._reduction.wait(stage)
            norm = step_stage(self.optimizer, self._stage_parameters, stage, self.args.max_grad_norm or math.inf)
            self._early_norms.append(norm)

    def _clip_grad_norm(self, model):
        if self._coupled is not None:
            return self._coupled.clip(self.args.max_grad_norm)
        if not self.args.stage_clipping or self._segment.coupled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_by_stage(self._stage_parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """As the host's, of all stages, those that have stepped already among them."""
        if self._coupled is not None and grad_norm is None:
            grad_norm = self._coupled.clip(math.inf)
        norm = super()._get_grad_norm(model, grad_norm)
        if self._early_norms:
            norm = torch.linalg.vector_norm(torch.stack([norm, *self._early_norms]))
            self._early_norms.clear()
        return norm

    def _couples(self) -> bool:
        return self.args.stage_order == "coupled" or self.args.coupled_laps > 0

    @property
    def _coupled(self) -> CoupledResidency | None:
        """What keeps one layer in device memory, while all of them learn end to end."""
        return self._residency if isinstance(self._residency, CoupledResidency) and self._segment.coupled else None

    def training_step(self, model, *args, **kwargs):
        """As the host's; in the coupled order, the layer that the backward pass ended at is put to rest."""
        reducing: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._reduction is not None:
            reducing = self._reduction.micro_batch(model, last=self.accelerator.sync_gradients)
        with reducing:
            loss = super().training_step(model, *args, **kwargs)
        if self._coupled is not None:
            self._coupled.settle()
        return loss

    def _criterion(self, logits: torch.Tensor, labels: torch.Tensor, num_items: Any = None) -> torch.Tensor:
        """The task's loss of a head's logits, as the host takes it of the model's."""
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(SequenceClassifierOutput(logits=logits), labels, num_items_in_batch=num_items)
            scaled = self.args.average_tokens_across_devices and num_items is not None
            return loss * self.accelerator.num_processes if scaled else loss
        if self.label_smoother is not None:
            return self.label_smoother({"logits": logits}, labels, shift_labels=self._objective.shifts)
        return self._objective.loss(logits, labels, self._core().config)

    # ---- Logging ----

    def _record(self, step: StageStep, scale: float, samples: float) -> None:
        """Add what a micro-batch found, whose shares of its optimizer step are `scale` and, in samples, `samples`."""
        for stage, loss in step.losses.items():
            loss, moved = scale * loss.float(), samples * step.transports[stage]
            self._log_sums = self._log_sums.to(loss.device)
            self._log_sums[stage] += torch.stack([loss, moved, torch.full_like(loss, samples)])
            self._weights.observe(stage, loss, moved)

    def log(self, logs, start_time=None):
        """As the host's, with `stage_<k>_loss` and `stage_<k>_transport` since the last log; k counts from 1."""
        if "loss" in logs and self.is_in_train:
            sums = self._mean(self._log_sums)
            for k, (loss, moved, steps) in enumerate(sums.tolist(), start=1):
                if steps > 0:
                    logs[f"stage_{k}_loss"], logs[f"stage_{k}_transport"] = loss / steps, moved / steps
            self._log_sums.zero_()
            logs |= self.peaks.read()
        super().log(logs, start_time)

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the processes; to be called in each of them."""
        return self.accelerator.reduce(values.to(self.args.device), "mean") if self.args.world_size > 1 else values


class _StageCallback(TrainerCallback):
    """Says at the beginning how the model was cut; after each step, renews transport weights and what is resident."""

    def __init__(self, trainer: MMSTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._refuse_checkpointing()
        self.trainer._share_out()
        if state.is_world_process_zero:
            print(self.trainer._summary())
        if self.trainer._residency is not None:
            self.trainer._residency.rest()  # optimizer states of a checkpoint are on the device now
            self.trainer._streams.enter_context(self.trainer._residency.streaming())
        if self.trainer._compilation is not None:
            layers = [self.trainer._core().get_submodule(name) for name in self.trainer.partition.layers]
            layers += self.trainer.heads.layers
            self.trainer._streams.enter_context(compiled(layers, **self.trainer._compilation))
        self.trainer._begin_step(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._views is not None:
            self.trainer._views.epoch = int(state.epoch)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer._coupled is not None:
            self.trainer._coupled.step(self.trainer.optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer._segment.coupled:
            self.trainer._weights.step(self.trainer._segment.stages, self.trainer._mean)
        self.trainer._begin_step(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.peaks.end()
        if self.trainer._planned is not None and state.is_world_process_zero:
            measured = max(self.trainer.peaks.by_name.values()) / 2**20
            print(f"hf_mmst: planned {self.trainer._planned / 2**20:,.0f} MiB of tensors, measured {measured:,.0f} MiB")
        if self.trainer._cache is not None and state.global_step >= state.max_steps:
            self.trainer._cache.delete()


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _joined(numbers: list[int]) -> str:
    return "+".join(f"{number:,}" for number in numbers)
