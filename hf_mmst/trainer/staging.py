"""How a model is made ready for training in stages: its cut, its auxiliary heads, and the engine that runs them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import MMSTConfig
from ..cut.example_inputs import SAMPLES, ExampleInputs
from ..cut.layers import find_layers, last_norm, refuse_layerdrop, resting_parameters, run_ends, tied_parameters
from ..cut.objectives import CLASSES, Objective, objective_of
from ..cut.partition import Partition
from ..cut.probe import LayerProfile, check_cut, logits_of, profile_layers, run_example, trace_stages
from ..cut.token_flow import attends_causally, ignores_padding
from ..distributed.layer_shards import refuse_in_shards
from ..distributed.wrappers import Wrapper, numel
from ..memory.layer_offload import LayerOffload, resident_layers
from ..memory.stage_offload import StageOffload
from ..method.engine import Stagewise
from ..method.heads import StageHeads, head_pooling, is_pretrained, num_head_layers
from ..method.own_head import is_of_single_tokens
from ..method.stepping import parameters_by_stage
from ..method.transport import TransportWeights
from .refusals import refuse_task


@dataclass
class StagedModel:
    """
    A model with its stages, and what trains them.

    Attributes:
        model (`nn.Module`): the model, without what is around it in training.
        partition ([`Partition`]): its cut; one stage where it is trained end to end.
        heads ([`StageHeads`]): the auxiliary heads of stages 1 .. K-1.
        engine ([`Stagewise`]): runs its stages.
        objective ([`Objective`]): the task.
        weights ([`TransportWeights`]): of the transport terms, over time.
        offload ([`StageOffload`], *optional*): what keeps layers at rest.
        still (`list[int]`): the stages, from 1, that have no transport term.
        ignores_padding (`bool`): whether the features of tokens do not depend on padding; looked at where features are
            cached.
        parameters (`list[list[nn.Parameter]]`): those of each stage, see [`parameters_by_stage`].
        resting (`list[list[nn.Parameter]]`): of each stage, the weights that its loss has a gradient for, but that do
            not learn in its turn: with the model's loss, those of all other stages; where the model's own head serves
            all stages, those that it shares with what is before the layers.
        uses_model_loss (`bool`): whether stages learn from the model's loss, see [`MMSTConfig`].
        mask_name (`str`): the input that says which of the layers' tokens count.
        packs_tokens (`bool`): whether the heads can have some tokens alone, see [`is_of_single_tokens`].
    """

    model: nn.Module
    partition: Partition
    heads: StageHeads
    engine: Stagewise
    objective: Objective
    weights: TransportWeights
    offload: StageOffload | None = None
    still: list[int] = field(default_factory=list)
    ignores_padding: bool = False
    parameters: list[list[nn.Parameter]] = field(default_factory=list)
    resting: list[list[nn.Parameter]] = field(default_factory=list)
    uses_model_loss: bool = False
    mask_name: str = "attention_mask"
    packs_tokens: bool = False
    _frozen: list[nn.Parameter] = field(default_factory=list)

    @property
    def num_stages(self) -> int:
        """K."""
        return self.partition.num_stages

    @property
    def layers(self) -> list[nn.Module]:
        """The modules of all stages, in order."""
        return [self.model.get_submodule(name) for name in self.partition.layers]

    def share_out(self) -> None:
        """Find the parameters of each stage; to be done again when sharding has put others in their place."""
        self.parameters = parameters_by_stage(self.model, self.partition, self.heads)
        own = len(self.heads) and self.heads.kind == "own"
        tied = tied_parameters(self.model, self.partition.layers) if own else []
        resting = [[], *[tied] * (self.num_stages - 1)]  # else later stages would change what the first begins with
        if self.uses_model_loss:
            resting = [resting_parameters(self.model, self.partition, k) for k in range(self.num_stages)]
        self.resting = [[parameter for parameter in found if parameter.requires_grad] for found in resting]

    def rest(self, stages: Sequence[int]) -> None:
        """Freeze the weights that do not learn while `stages` do, and no others; none, if all stages do."""
        wanted = self.resting[stages[0]] if len(stages) < self.num_stages else []
        if wanted is self._frozen:
            return
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for parameter in wanted:
            parameter.requires_grad_(False)
        self._frozen = wanted

    def summary(self, args: MMSTConfig) -> str:
        """One line on the stages: layers and trainable parameters of each."""
        core = self.model
        if self.num_stages == 1:
            order = "with one layer in device memory" if args.offload == "layers" else "as Trainer does"
            order += f", in shards over {args.world_size} processes" if args.shards_layers else ""
            learning = sum(numel(p) for p in core.parameters() if p.requires_grad)
            return f"hf_mmst: end to end, {order}; trainable parameters {learning:,}"
        layers = [len(self.engine.run_ends.intersection(stage)) for stage in self.partition.stages]
        trainable = [
            sum(numel(p) for name in stage for p in core.get_submodule(name).parameters() if p.requires_grad)
            for stage in self.partition.stages
        ]
        heads = sum(numel(p) for p in self.heads.parameters() if p.requires_grad)
        others = sum(numel(p) for p in core.parameters() if p.requires_grad) - sum(trainable)
        without_transport = ""
        if self.still and args.transport_weight > 0:
            stages = f"stage{'s' * (len(self.still) > 1)} {', '.join(map(str, self.still))}"
            without_transport = f"; no transport term in {stages}, whose layers all change the shape of what they get"
        from_what = "from the model's loss" if self.uses_model_loss else f"{heads:,} in auxiliary heads"
        return (
            f"hf_mmst: {len(layers)} stages of {_joined(layers)} layers, {args.stage_order}; trainable "
            f"parameters {_joined(trainable)} in the layers, {others:,} around them, "
            f"{from_what}{without_transport}"
        )


@dataclass(frozen=True)
class Staging:
    """
    Makes models ready for a run.

    Args:
        args ([`MMSTConfig`]): the settings of the run; `num_stages` is written into them where it is chosen here.
        wrapper ([`Wrapper`]): what will be around the model.
        first_batch (`Callable[[int], Any]`): the first samples of the data as the model gets them, or `None`.
        label_names (`Sequence[str]`): entries of a batch that are labels.
        loss_func (`Callable`, *optional*): the user's `compute_loss_func`.
        smooths_labels (`bool`): whether the trainer makes the loss by itself, of smoothed labels.
    """

    args: MMSTConfig
    wrapper: Wrapper
    first_batch: Callable[[int], Any]
    label_names: Sequence[str]
    loss_func: Callable | None = None
    smooths_labels: bool = False

    def of(self, model: nn.Module) -> StagedModel:
        """
        Cut the model into stages, and make their heads.

        Raises:
            `ValueError`: if the model or its task cannot be trained in stages, or for a setting that does not fit it.
        """
        self.args.settle(is_pretrained(model))
        if self._has_stages:
            refuse_layerdrop(model, "and with them the ends of stages")
        if self._has_local_losses:
            refuse_task(model, self.args, self.label_names, self.loss_func is not None)
        with self.wrapper.whole(model):
            return self._staged(model)

    @property
    def _has_stages(self) -> bool:
        """Whether the settings ask for stages; if not, the model is not looked at, and may be any."""
        args = self.args
        asked_for_one = args.num_stages == 1 and not args.chooses_stages and args.stage_boundaries is None
        return args.stage_order != "end_to_end" and not asked_for_one

    @property
    def _has_local_losses(self) -> bool:
        return self._has_stages and self.args.stage_objective == "local"

    def _staged(self, model: nn.Module) -> StagedModel:
        args = self.args
        objective = objective_of(model) or CLASSES
        example = self._example(model) if self._has_stages else None
        partition, profile = self._partition(model, example)
        found = self._looked_at(model, partition, profile, objective, example) if example is not None else {}
        num_stages, heads = partition.num_stages, StageHeads([], 0)
        args.write_stages(num_stages)
        if self._has_local_losses and example is not None and num_stages > 1:
            heads = self._heads(model, partition, profile, objective, example)
            found["packs_tokens"] = objective.head == "own" and is_of_single_tokens(model, partition.layers, example)
        heads.to(device=args.device, dtype=_dtype(model))
        schedule = args.transport_schedule
        if schedule == "auto":
            schedule = "adaptive" if num_stages > 1 and is_pretrained(model) else "constant"
        weights = TransportWeights(schedule, args.transport_weight, num_stages)
        engine = Stagewise(model, partition, heads, args.transport_norm, self.wrapper.hooks_first)
        offload = None
        if args.shards_layers:
            refuse_in_shards(model, partition.layers)
        elif args.offload != "none":
            layerwise = args.rests_inputs, args.layer_batch_size, args.offloaded_step == "device"
            half = torch.bfloat16 if args.bf16 else None
            given = model, partition, args.device, args.output_dir, self._resident(model, partition.layers)
            offload = LayerOffload(*given, *layerwise, half) if _recomputes(args) else StageOffload(*given)
        found["uses_model_loss"] = args.stage_objective == "model" and num_stages > 1
        if found["uses_model_loss"] and _are_of_decoder(model, partition.layers):
            found["mask_name"] = "decoder_attention_mask"
        staged = StagedModel(model, partition, heads, engine, objective, weights, offload, **found)
        staged.share_out()
        return staged

    def _resident(self, model: nn.Module, layers: Sequence[str]) -> list[str]:
        """The layers that stay on the device."""
        number = self.args.resident_layers
        if number >= len(layers):
            raise ValueError(
                f"resident_layers={number}, but {type(model).__name__} has {len(layers)} layers. Set resident_layers "
                'to fewer, or offload="none", which keeps all of them in device memory.'
            )
        return resident_layers(layers, number)

    def _example(self, model: nn.Module) -> ExampleInputs:
        """What the model is looked at with: the first samples of the user's data, or, without data, made-up inputs."""
        batch = self.first_batch(SAMPLES)
        if not isinstance(batch, Mapping):
            return ExampleInputs.made_up(model)
        makes_loss = self.loss_func is None and not self.smooths_labels
        return ExampleInputs.of_batch(model, batch, SAMPLES, self.label_names, makes_loss)

    def _partition(self, model: nn.Module, example: ExampleInputs | None) -> tuple[Partition, list[LayerProfile]]:
        """The cut, and all layers, if they were looked at."""
        args = self.args
        try:
            layers = find_layers(model)
        except ValueError as error:
            if args.stage_order == "end_to_end" and args.offload == "layers":
                raise ValueError(
                    f'{error} Set offload="none" then, for "layers" keeps one of several on the device.'
                ) from None
            if self._has_stages:
                raise
            return Partition(((),)), []  # nothing is cut, so any model will do
        if args.offload != "none" and _recomputes(args) and len(run_ends(model, layers)) < len(layers):
            raise ValueError(
                f"{type(model).__name__} is a sequence of single modules, {layers[0]} and so on, which may overwrite "
                'what they get and so cannot be recomputed one by one. Set offload="none", or, for one stage in device '
                'memory, offload="stages", end_to_end_laps=0 and stage_objective="local".'
            )
        if example is None:
            return Partition((tuple(layers),)), []
        profile = profile_layers(model, layers, example)
        if args.stage_boundaries is not None:
            return Partition.by_names(layers, args.stage_boundaries), profile
        costs, ends = [layer.flops for layer in profile], run_ends(model, layers)
        return Partition.by_cost(layers, args.stages_of(len(ends)), costs, ends), profile

    def _looked_at(
        self,
        model: nn.Module,
        partition: Partition,
        profile: list[LayerProfile],
        objective: Objective,
        example: ExampleInputs,
    ) -> dict[str, Any]:
        """What a forward pass shows of the cut, as attributes of [`StagedModel`], or why it cannot be."""
        layers = partition.layers
        found: dict[str, Any] = {}
        if self._has_local_losses or self.args.feature_cache != "none":
            trace = (check_cut if self._has_local_losses else trace_stages)(model, partition, example)
        if self.args.feature_cache != "none":
            trace.refuse_beside(model, 'feature_cache="none"')
            found["ignores_padding"] = ignores_padding(model, partition, example)
        if self._has_local_losses and objective.head == "pooled" and attends_causally(model, layers, example):
            raise ValueError(
                f"The layers of {type(model).__name__} ({layers[0]} .. {layers[-1]}) attend causally: no token depends "
                "on a later one, so that a head which pools would judge what most tokens have not seen. Set "
                'stage_order="end_to_end" or num_stages=1, or pass an encoder such as ViT or BERT, or a ...ForCausalLM '
                "model."
            )
        keeping = {layer.name for layer in profile if layer.keeps_shape}
        found["still"] = [k for k, names in enumerate(partition.stages, start=1) if keeping.isdisjoint(names)]
        return found

    def _heads(
        self,
        model: nn.Module,
        partition: Partition,
        profile: list[LayerProfile],
        objective: Objective,
        example: ExampleInputs,
    ) -> StageHeads:
        """The auxiliary heads of all stages but the last."""
        args, by_name = self.args, {layer.name: layer for layer in profile}
        ends, last = [by_name[name] for name in partition.boundaries[:-1]], partition.layers[-1]
        heads = StageHeads(
            [end.width for end in ends],
            self._num_labels(model, example),
            head_pooling(args.head_pooling, objective.head, model, last, example),
            args.seed,
            [end.is_map and args.head_pooling == "auto" for end in ends],
            *self._last_layers(model, partition.layers, [*(end.width for end in ends), profile[-1].width]),
            objective.head,
        )
        heads.read_first_token(model, last, example)
        return heads

    def _last_layers(
        self, model: nn.Module, layers: Sequence[str], widths: list[int]
    ) -> tuple[list[nn.Module], nn.LayerNorm | None]:
        """What of the model the auxiliary heads have a copy of; `widths` of the ends of all stages."""
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


def _recomputes(args: MMSTConfig) -> bool:
    """Whether layers that are offloaded are recomputed in a backward pass."""
    return args.offload == "layers" or args.end_to_end_laps > 0 or args.stage_objective == "model"


def _are_of_decoder(model: Any, layers: Sequence[str]) -> bool:
    """Whether the layers are those of the decoder of an encoder-decoder."""
    is_both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return is_both and model.get_submodule(layers[0]) in {*model.get_decoder().modules()}


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _joined(numbers: list[int]) -> str:
    return "+".join(f"{number:,}" for number in numbers)
