"""A model and the settings of a run -> its stages, their heads and what trains them, or why that cannot be."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import unwrap_peft_model

from ..config import MMSTConfig
from ..cut.example_inputs import SAMPLES, ExampleInputs
from ..cut.objectives import CLASSES, Objective, objective_of
from ..cut.partition import Partition, checkpoints_across, find_layers, last_norm, run_ends
from ..cut.probe import LayerProfile, check_cut, logits_of, profile_layers, run_example
from ..cut.token_flow import attends_causally, ignores_padding, own_pooling
from ..distributed.compiling import refuse_compilation
from ..distributed.wrappers import numel
from ..memory.coupled import CoupledResidency
from ..memory.residency import Residency
from ..method.engine import Stagewise
from ..method.heads import StageHeads, is_pretrained, num_head_layers
from ..method.order import Order, Segment
from ..method.transport import TransportWeights
from ..planning.budget import plan_for


class StageCut(Trainer):
    """How [`MMSTTrainer`], which sets the attributes below, is made ready for a model."""

    args: MMSTConfig
    accelerator: Any
    partition: Partition
    heads: StageHeads
    _compilation: dict[str, Any] | None
    _core: Any
    _wrapper: Any
    _first_batch: Any
    _take_share: Any
    _share_out: Any
    _summary_of_shares: Any
    _objective: Objective
    _engine: Stagewise
    _weights: TransportWeights
    _order: Order
    _segment: Segment
    _log_sums: torch.Tensor
    _residency: Residency | None
    _cut_model: nn.Module | None = None
    _ignores_padding = False  # looked at where features are cached
    _still: list[int]  # the stages, from 1, that have no transport term

    def _plan(self) -> int | None:
        """Plan for `memory_budget`, if one is set; returns the bytes that the chosen way takes."""
        args = self.args
        if args.memory_budget is None or self.train_dataset is None:
            return None
        model, batch = self._core(), self._first_batch(args.per_device_train_batch_size)
        if batch is None:
            raise ValueError(
                f'memory_budget="{args.memory_budget}" is planned with the first samples of train_dataset, but there '
                "are none, or none that could be read again. Pass a dataset with samples, or leave memory_budget unset."
            )
        found = plan_for(args, model, batch, bool(objective_of(model) or self.compute_loss_func))
        if args.place_model_on_device:
            self._move_model_to_device(self.model, args.device)
        self.accelerator.device_placement &= args.stage_residency == "all"
        return found.peak.total

    def _cut(self) -> None:
        """Cut the model into stages and make their heads, unless that was done for this very model."""
        model = self._core()
        if self._cut_model is model:
            return
        self.args.check_stages()
        if self._has_stages:
            self._refuse_task(model)
        self._objective = objective_of(model) or CLASSES
        with self._wrapper.whole(model):
            self._cut_whole(model)

    @property
    def _has_stages(self) -> bool:
        """Whether the settings ask for stages; if not, the model is not looked at, and may be any."""
        args = self.args
        asked_for_one = args.num_stages == 1 and not args.chooses_stages and args.stage_boundaries is None
        return args.stage_order != "coupled" and not asked_for_one

    @property
    def _is_plain(self) -> bool:
        """Whether this step is one of plain Trainer: one stage, whose loss is the model's own."""
        return self.partition.num_stages == 1 and not self._segment.coupled

    def _cut_whole(self, model: nn.Module) -> None:
        example = self._example(model) if self._has_stages else None
        self._still = []
        self.partition, profile = self._partition(model, example)
        num_stages = self.partition.num_stages
        self.args.write_stages(num_stages)
        self.heads = (
            self._heads(model, profile, example) if example is not None and num_stages > 1 else StageHeads([], 0)
        )
        self.heads.to(device=self.args.device, dtype=_dtype(model))
        first = self._wrapper.hooks_first
        self._engine = Stagewise(model, self.partition, self.heads, self.args.transport_norm, first)
        schedule = self.args.transport_schedule
        if schedule == "auto":
            schedule = "adaptive" if num_stages > 1 and is_pretrained(model) else "constant"
        self._weights = TransportWeights(schedule, self.args.transport_weight, num_stages)
        self._order = Order.build("simultaneous", num_stages, 1, 1)
        self._segment = self._order.at(0)
        self._log_sums = torch.zeros(num_stages, 3)
        self._residency = None
        if self.args.stage_residency == "stage":
            kind = CoupledResidency if self._couples() else Residency
            self._residency = kind(model, self.partition, self.args.device, self.args.output_dir)
        # Whether a model divides by num_items_in_batch or ignores it differs between models: means are taken here.
        self.model_accepts_loss_kwargs = self._host_accepts_loss_kwargs and num_stages == 1 and not self._couples()
        self._cut_model = model
        self._share_out()
        self._take_share()

    def _example(self, model: nn.Module) -> ExampleInputs:
        """What the model is looked at with: the first samples of the user's data, or, without data, made-up inputs."""
        batch = self._first_batch(SAMPLES)
        if not isinstance(batch, Mapping):
            return ExampleInputs.made_up(model)
        makes_loss = self.compute_loss_func is None and self.label_smoother is None
        return ExampleInputs.of_batch(model, batch, SAMPLES, self.label_names, makes_loss)

    def _partition(self, model: nn.Module, example: ExampleInputs | None) -> tuple[Partition, list[LayerProfile]]:
        """The cut, and all layers, if they were looked at."""
        args = self.args
        try:
            layers = find_layers(model)
        except ValueError as error:
            if args.stage_order == "coupled":
                raise ValueError(
                    f'{error} Leave stage_order unset then, for "coupled" keeps one layer of several on the device.'
                ) from None
            if self._has_stages:
                raise
            return Partition(((),)), []  # nothing is cut, so any model will do
        if args.stage_residency == "stage" and self._couples() and len(run_ends(model, layers)) < len(layers):
            raise ValueError(
                f"{type(model).__name__} is a sequence of single modules, {layers[0]} and so on, which may overwrite "
                'what they get and so cannot be recomputed one by one. Set stage_order to another than "coupled", and '
                "coupled_laps=0."
            )
        if example is None:
            return Partition((tuple(layers),)), []
        profile = profile_layers(model, layers, example)
        if args.stage_boundaries is not None:
            partition = Partition.by_names(layers, args.stage_boundaries)
        else:
            costs, ends = [layer.flops for layer in profile], run_ends(model, layers)
            partition = Partition.by_cost(layers, args.stages_of(len(ends)), costs, ends)
        trace = check_cut(model, partition, example)
        if args.feature_cache != "none":
            trace.refuse_beside(model, 'feature_cache="none"')
            self._ignores_padding = ignores_padding(model, partition, example)
        if self._objective.head == "pooled" and attends_causally(model, layers, example):
            raise ValueError(
                f"The layers of {type(model).__name__} ({layers[0]} .. {layers[-1]}) attend causally: no token depends "
                "on a later one, so that a head which pools would judge what most tokens have not seen. Set "
                'stage_order="coupled" or num_stages=1, or pass an encoder such as ViT or BERT, or a ...ForCausalLM '
                "model."
            )
        keeping = {layer.name for layer in profile if layer.keeps_shape}
        self._still = [k for k, names in enumerate(partition.stages, start=1) if keeping.isdisjoint(names)]
        return partition, profile

    def _heads(self, model: nn.Module, profile: list[LayerProfile], example: ExampleInputs) -> StageHeads:
        """The auxiliary heads of all stages but the last."""
        by_name = {layer.name: layer for layer in profile}
        ends = [by_name[name] for name in self.partition.boundaries[:-1]]
        return StageHeads(
            [end.width for end in ends],
            self._num_labels(model, example),
            self._pooling(model, example),
            self.args.seed,
            [end.is_map and self.args.head_pooling == "auto" for end in ends],
            *self._last_layers(model, [*(end.width for end in ends), profile[-1].width]),
            self._objective.head,
        )

    def _last_layers(self, model: nn.Module, widths: list[int]) -> tuple[list[nn.Module], nn.LayerNorm | None]:
        """What of the model the auxiliary heads have a copy of; `widths` of the ends of all stages."""
        layers = self.partition.layers
        blocks = len(run_ends(model, layers)) == len(layers)
        number = num_head_layers(self.args.head_layers, model, widths, blocks)
        if number > len(layers):
            raise ValueError(
                f"head_layers={number}, but the model has {len(layers)} layers. Set head_layers to that or less."
            )
        norm = last_norm(model, layers[-1], widths[-1]) if number > 0 else None
        return [model.get_submodule(name) for name in layers[len(layers) - number :]], norm

    def _num_labels(self, model: nn.Module, example: ExampleInputs) -> int:
        """Number of logits of the auxiliary heads: as many as the model's own."""
        if objective_of(model) is not None:
            return getattr(model.config, "num_labels", 0)
        with torch.no_grad():
            shape = logits_of(run_example(model, (), lambda *_: None, example)).shape
        if len(shape) != 2 or shape[0] != example.num_samples:
            raise ValueError(
                f"{type(model).__name__} puts out {list(shape)} for {example.num_samples} samples, but stages have "
                "pooled logits [B, num_labels], which compute_loss_func gets. Set num_stages to 1."
            )
        return shape[1]

    def _pooling(self, model: nn.Module, example: ExampleInputs) -> str:
        """What the auxiliary heads pool."""
        if self._objective.head == "pooled" and self.args.head_pooling == "auto" and is_pretrained(model):
            return own_pooling(model, self.partition.layers[-1], example)
        return self.args.head_pooling

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
        objective, config = objective_of(model), getattr(base, "config", None)
        if objective is None and self.compute_loss_func is None:
            raise ValueError(
                f"{type(base).__name__} has no head of which the stages' local losses could be made: these are known "
                "for classification and regression of sequences, images and audio, for classification of tokens, and "
                "for masked and causal language models with one stack of layers. Pass such a model, a "
                "compute_loss_func for a loss of your own (of pooled logits), or set num_stages to 1."
            )
        if len(self.label_names) > 1 and "labels" not in self.label_names:
            raise ValueError(
                f"label_names={self.label_names} are several, but the loss of a stage is of one. Set label_names to "
                "one name, or num_stages to 1."
            )
        if objective is not None and objective.head != "pooled" and self.args.head_pooling != "auto":
            raise ValueError(
                f'head_pooling="{self.args.head_pooling}", but a {type(base).__name__} has a label for each token, and '
                'nothing is pooled. Set head_pooling="auto".'
            )
        if getattr(config, "output_router_logits", False):
            raise ValueError(
                "config.output_router_logits=True adds a loss of all routers at once, from which the stages of "
                f"{type(base).__name__} before the last would not learn. Set it to False."
            )
        for name, value in vars(config).items() if config is not None else ():
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

    def _summary(self) -> str:
        """One line on the stages: layers and trainable parameters of each."""
        core = self._core()
        if self.partition.num_stages == 1:
            order = "with one layer in device memory" if self.args.stage_order == "coupled" else "as Trainer does"
            learning = sum(numel(p) for p in core.parameters() if p.requires_grad)
            return f"hf_mmst: end to end, {order}; trainable parameters {learning:,}"
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
            f"{heads:,} in auxiliary heads{self._summary_of_transport()}{self._summary_of_shares()}"
        )

    def _summary_of_transport(self) -> str:
        if not self._still or self.args.transport_weight == 0:
            return ""
        stages = f"stage{'s' * (len(self._still) > 1)} {', '.join(map(str, self._still))}"
        return f"; no transport term in {stages}, whose layers all change the shape of what they get"


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _joined(numbers: list[int]) -> str:
    return "+".join(f"{number:,}" for number in numbers)
