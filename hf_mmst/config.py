"""`MMSTConfig`: transformers' `TrainingArguments` with the fields of stage-wise training, checked when it is made."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, cast

from accelerate.utils import patch_environment
from transformers import TrainingArguments

from .field_checks import check_fields, layer_names, number, parse_bytes, positive, whole
from .field_choices import Offload, StageOrder, order_for, place_for
from .field_conflicts import refuse_conflicts
from .host_arguments import HostArguments

StageObjective = Literal["local", "model"]
HeadPooling = Literal["auto", "mean", "cls"]
TransportNorm = Literal["relative", "mean", "sum"]
TransportSchedule = Literal["auto", "constant", "paper", "multipliers", "adaptive"]
StepPlace = Literal["host", "device"]
FeatureCache = Literal["none", "disk", "memory"]
DEFAULT_STAGES = 4  # or as many as the model has layers


@dataclass
class MMSTConfig(HostArguments):
    r"""
    [`~transformers.TrainingArguments`] with the settings of stage-wise training by the minimizing movement scheme.

    Some fields of `TrainingArguments` differ in effect. `num_train_epochs` is what *every stage* gets (with laps:
    `N / num_laps` epochs per lap), and `max_steps`, when set, is the total over all stages and laps, shared out evenly,
    remainder to the last. In the `"simultaneous"` order all stages learn on each batch, so both mean what they mean in
    `Trainer`; with `stage_objective="model"` they do, too, shared out over the turns. With several processes the
    gradients of each stage are averaged as soon as it has learned, so that DistributedDataParallel's settings of
    buckets and unused parameters have an effect with one stage only.

    Below, a *pretrained* model is one that was loaded with `from_pretrained`, a *stage* is a run of consecutive layers,
    and stages are numbered from 1 to K.

    Args:
        num_stages (`int`, *optional*):
            Number of stages K. The layers are cut into K runs of about equal compute. With 1, training is that of
            `Trainer`, end to end, for any model. Unset: 4, or the number of layers if that is less; the number that
            was chosen is written here when the model is cut.
        stage_boundaries (`list[str]`, *optional*):
            Qualified names of each stage's last layer, in order, e.g. `["vit.layers.5", "vit.layers.11"]`, in the place
            of a cut by compute; overrides `num_stages`. The model's last layer may be left out.
        stage_order (`str`, *optional*):
            Which stages learn when. Unset: `"end_to_end"` for a pretrained model, for which no setting with local
            losses has the accuracy of exact gradients at their memory; `"simultaneous"` for any other model, and
            where another field of stages is set, such as `num_stages`. What was chosen is written here when the model
            is cut.

            - `"simultaneous"`: all stages learn on each batch.
            - `"sequential"`: stage 1 learns to its end, then stage 2 on its output, and so on.
            - `"multi_lap"`: the stages learn in turn, from the first to the last, in each of `num_laps` laps.
            - `"end_to_end"`: all layers learn from the model's loss, as with `Trainer`, for when local losses are not
              enough; one layer is in device memory, unless `offload` says otherwise.

            In `"sequential"` and `"multi_lap"` an `EarlyStoppingCallback` judges the stage that learns, by that stage's
            metric, and ends its turn; the best model is chosen among those whose last stage has begun to learn.
        num_laps (`int`, *optional*, defaults to 1):
            Number of laps R of the `"multi_lap"` order.
        end_to_end_laps (`int`, *optional*, defaults to 0):
            Number n of laps of end-to-end training after the laps with local losses, to make up for what local losses
            missed. With R laps before, each lap has N / (R + n) epochs. The auxiliary heads do not learn in these laps.
            If anything is offloaded, layers are in these laps.
        stage_objective (`str`, *optional*, defaults to `"local"`):
            What a stage minimizes beside its transport, in the orders where one learns at a time.

            - `"local"`: a loss of its own, of its auxiliary head. Layers after the stage do not run.
            - `"model"`: the model's loss, through the layers after the stage, which are frozen in its turn: block
              coordinate descent (BAdam, HiFT), here with the transport term. There are no auxiliary heads, so that any
              model whose layers each run once will do. Gradients and optimizer states are those of one stage, whose
              states begin anew with its turn; the rates' schedule is one for all. What comes before the layers
              (embeddings) learns with the first stage, what comes after them (last norm, classifier) in every turn. An
              `EarlyStoppingCallback` and the best model go by the model's own metric. For a single process or DDP.
        head_pooling (`str`, *optional*, defaults to `"auto"`):
            How an auxiliary head pools the tokens: `"mean"`, the mean over tokens without padding, or `"cls"`, the
            first token. `"auto"`: the first token if the own head of a pretrained model reads nothing else, a
            convolution of the feature maps of a convolutional network, and else the mean. Must be `"auto"` where each
            token has a label, for nothing is pooled then.
        head_layers (`int`, *optional*):
            Number of the model's last layers that the auxiliary heads begin with: all heads share one trained copy of
            them. It costs the memory of these layers once, and their compute in each stage but the last. Unset: 1 for
            a pretrained model whose layers are all of one width and not quantized, else 0.
        head_learning_rate (`float`, *optional*):
            Learning rate of the auxiliary heads' norms and classifiers, and of all that the model itself has after its
            last layer (norm, pooler, classifier). Unset: ten times `learning_rate` for stages of a pretrained model,
            else `learning_rate`. Where the layers need a low rate, such as 1e-5, 0.01 is worth a try, in the
            `"end_to_end"` order, too. Not with an optimizer of your own, whose groups have rates already.
        stage_learning_rate_decay (`float`, *optional*):
            Layer-wise learning rate decay, by stages: stage k of K learns at `learning_rate` times this to the power of
            K - k. Unset: 0.7 a layer for a pretrained model, which is 0.7 to the power of L / K for L layers, else 1.
        transport_weight (`float`, *optional*, defaults to 0.3):
            Weight w of the transport term in each stage's loss, 1 / (2 tau) in the paper's notation. 0 is greedy
            training, by the task loss alone. With `transport_norm="relative"` it has no unit, and a value that is good
            for one model is a good start for another.
        transport_norm (`str`, *optional*, defaults to `"relative"`):
            Norm of a layer's residue r, its output minus its input x, for each sample, averaged over the batch:
            `"relative"`, ||r||^2 / ||x||^2 with x not differentiated, at most 1,000; `"mean"`, the mean of r^2 over
            tokens and features (the paper's released code); `"sum"`, ||r||^2 (the paper's equation 5).
        transport_schedule (`str`, *optional*, defaults to `"auto"`):
            How the weight of the transport term changes.

            - `"constant"`: it does not.
            - `"paper"`: half the weight (twice tau) in the second half of the stages.
            - `"multipliers"`: it is divided by a multiplier that grows with the task loss (Uzawa's algorithm, appendix
              D of the paper).
            - `"adaptive"`: it changes for each stage, so that the transport term stays at `transport_weight` times 10 %
              of the task loss.
            - `"auto"`: `"adaptive"` for a pretrained model, whose layers may move far already, else `"constant"`.
        stage_clipping (`bool`, *optional*, defaults to `False`):
            Whether the gradients of each stage are clipped to `max_grad_norm` by their own norm, not that of all. In
            the `"simultaneous"` order each stage's optimizer step then follows its backward pass at once (also with
            `max_grad_norm=0`), so that the gradients of one stage are in memory, not of all; with several processes
            those of two, one of which are being averaged. With gradient accumulation, offloaded layers, a gradient
            scaler (fp16), or side inputs that layers share, all stages step at the end of the batch, to the same
            effect.
        memory_budget (`str`, *optional*):
            Device memory in bytes, as in `"4GiB"`, that the trainer plans for (see [`plan`]). The fastest way that fits
            sets `num_stages` and `stage_order` (if unset), `stage_clipping`, `resident_layers`, `offload` (in several
            processes only beside a set order), `activation_checkpointing`. An error if none fits. Unset: no plan.
        offload (`str`, *optional*):
            What is not in device memory, but rests in pinned host memory (CUDA, XPU) or in memory-mapped files in
            `output_dir` (CPU), until it is used. In several processes only `"layers"`, where `stage_order="end_to_end"`
            is set: by FSDP2, each with a shard of every layer. Unset: `"layers"` in the `"end_to_end"` order, unless
            there are DeepSpeed, an FSDP configuration, fp16, compilation or evaluation in half precision, with which it
            cannot be, or several processes and that order was unset; else `"none"`. What was chosen is written here.

            - `"none"`: everything is in device memory.
            - `"stages"`: weights, gradients and optimizer states of all stages but the one that learns, in the orders
              where one learns at a time. Frozen layers come one by one where they run.
            - `"layers"`: those of all layers, which come one by one, and are recomputed in the backward pass. The
              optimizer steps in host memory. With `activation_checkpointing_kwargs={"offload": True}` so do the layers'
              inputs, which are kept for that.
        resident_layers (`int`, *optional*, defaults to 0):
            Number of layers that stay in device memory for good, with their gradients and optimizer states, evenly
            spread over the model, while the others are offloaded, with `stage_order="end_to_end"` and
            `offload="layers"`. They are recomputed in the backward pass with `activation_checkpointing` only, and step
            on the device.
        layer_batch_size (`int`, *optional*):
            Number of samples that are in an offloaded layer at once. The batch passes each layer in parts of that size
            while its weights are there, so that activations are those of a part, and weights move once for all parts:
            in the place of `gradient_accumulation_steps`, set `per_device_train_batch_size` to the whole. Unset: all.
        offloaded_step (`str`, *optional*):
            Where the optimizer steps offloaded layers: on the `"host"`, where they rest, or on the `"device"`, to which
            weights, gradients and states come for that, for a host with a slow CPU. Unset: on the host, or where that
            is predicted to take less time, with `memory_budget` on a GPU that is known.
        feature_cache (`str`, *optional*, defaults to `"none"`):
            Where the inputs of the stage that learns are cached, so that the frozen stages before it run once per
            sample and turn, not in each epoch: `"none"`, `"disk"` (in `output_dir`, deleted after training) or
            `"memory"`. For the orders where one stage learns at a time. Each process caches those of its own samples.
        cache_views (`int`, *optional*):
            Number of augmented views of each sample: in epoch e a sample is view e mod `cache_views` of it. A feature
            cache needs it where samples are augmented at random. Unset: augmentation is as the dataset makes it.
        stage_parallel (`bool`, *optional*, defaults to `False`):
            Stage parallelism (pipeline parallelism without a pipeline's backward pass): the processes of `torchrun` or
            `accelerate launch` share out the stages, not the samples. Each of P processes holds the weights, gradients
            and optimizer states of its own stages, learns on every batch, and sends the output of its last stage to the
            next process. The result is that of the `"simultaneous"` order in one process.
            `per_device_train_batch_size` is the whole batch, and `world_size` is 1. It needs `stage_clipping=True` or
            `max_grad_norm=0`, and heads without layers.
        model_card (`bool`, *optional*, defaults to `True`):
            Whether [`MMSTTrainer.push_to_hub`] and [`MMSTTrainer.create_model_card`] write a model card, `README.md`
            and `stages.png`, in `output_dir`. With `False` one that you wrote is left alone.

    Raises:
        `ValueError`: for a value that is out of range, or fields that exclude each other, saying which field to set to
            what.
    """

    num_stages: Annotated[int, whole(1, "1 trains end to end")] | None = field(
        default=None,
        metadata={
            "help": "Number of stages the encoder is cut into; 1 is end-to-end training; if unset, 4, or as many as "
            "there are layers if those are fewer."
        },
    )
    stage_boundaries: Annotated[list[str], layer_names] | None = field(
        default=None, metadata={"help": "Qualified names of each stage's last layer, in order; overrides num_stages."}
    )
    stage_order: StageOrder | None = field(
        default=None,
        metadata={
            "help": "simultaneous: all stages on each batch; sequential: one after the other; multi_lap: first to "
            "last stage in each of num_laps laps; end_to_end: from the model's own loss; if unset, end_to_end for a "
            "pretrained model without settings of stages, else simultaneous."
        },
    )
    num_laps: Annotated[int, whole(1, "1 is a single lap")] = field(
        default=1, metadata={"help": "Laps of the multi_lap order."}
    )
    end_to_end_laps: Annotated[int, whole(0, "0 leaves all learning to local losses")] = field(
        default=0, metadata={"help": "Laps at the end in which all stages learn end to end."}
    )
    stage_objective: StageObjective = field(
        default="local",
        metadata={
            "help": "local: each stage has a loss of its own; model: the stage whose turn it is learns from the "
            "model's loss, through the frozen layers after it."
        },
    )
    head_pooling: HeadPooling = field(
        default="auto",
        metadata={
            "help": "Pooling of the auxiliary heads: mean over tokens, first token (cls), auto: as the model's own."
        },
    )
    head_layers: Annotated[int, whole(0, "0 is a head without layers")] | None = field(
        default=None,
        metadata={
            "help": "Number of the model's last layers of which the heads share a copy; if unset, 1 for a "
            "pretrained model, else 0."
        },
    )
    head_learning_rate: Annotated[float, positive] | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the heads and of what the model has after its last layer; if unset, ten times "
            "learning_rate for stages of a pretrained model."
        },
    )
    stage_learning_rate_decay: Annotated[float, positive] | None = field(
        default=None,
        metadata={
            "help": "Stage k of K learns at learning_rate times this to the power of K - k; if unset, 0.7 a layer "
            "for a pretrained model, else 1."
        },
    )
    transport_weight: Annotated[float, number(0, "0 is greedy training, 0.3 the default")] = field(
        default=0.3, metadata={"help": "Weight of the transport term in each stage's loss; 0 is greedy training."}
    )
    transport_norm: TransportNorm = field(
        default="relative",
        metadata={"help": "relative: squared residue over squared input; mean: mean square; sum: squared norm."},
    )
    transport_schedule: TransportSchedule = field(
        default="auto",
        metadata={
            "help": "constant; paper: half the weight in the second half of the stages; multipliers: divided by a "
            "multiplier that grows with the loss; adaptive: per stage, a fixed share of the task loss; auto: adaptive "
            "for a pretrained model, else constant."
        },
    )
    stage_clipping: bool = field(
        default=False,
        metadata={"help": "Clip each stage's gradients to max_grad_norm by itself, so that it can step at once."},
    )
    memory_budget: Annotated[str, parse_bytes] | None = field(
        default=None, metadata={"help": "Device memory to plan for, such as 4GiB: number of stages, order, offloading."}
    )
    offload: Offload | None = field(
        default=None,
        metadata={
            "help": "What is not in device memory: none; stages: all but the one that learns; layers: all but the one "
            "that computes; if unset, layers in the end_to_end order, else none."
        },
    )
    resident_layers: Annotated[int, whole(0, "0 offloads all layers")] = field(
        default=0, metadata={"help": "Layers that stay in device memory while the others are offloaded."}
    )
    layer_batch_size: Annotated[int, whole(1, "1 has one sample in a layer at once")] | None = field(
        default=None, metadata={"help": "Samples that are in an offloaded layer at once; if unset, all of the batch."}
    )
    offloaded_step: StepPlace | None = field(
        default=None, metadata={"help": "Where the optimizer steps offloaded layers: host, as if unset, or device."}
    )
    feature_cache: FeatureCache = field(
        default="none",
        metadata={"help": "Where the features that a stage gets of each sample are kept: none, disk or memory."},
    )
    cache_views: Annotated[int, whole(1, "1 keeps one view of each sample")] | None = field(
        default=None, metadata={"help": "Number of views that random augmentation makes of a sample, if it is limited."}
    )
    stage_parallel: bool = field(
        default=False, metadata={"help": "Share out the stages over the processes, in the place of the samples."}
    )
    model_card: bool = field(
        default=True, metadata={"help": "Write a model card, README.md and stages.png, when pushing to the Hub."}
    )

    _is_pretrained = cast(bool | None, None)  # the model; not known before there is one
    _is_movable = True  # whether its layers can be offloaded
    _found_stages = cast(int | None, None)  # what write_stages has put into num_stages
    _found_order = cast(StageOrder | None, None)  # what check_stages has put into stage_order
    _found_offload = cast(Offload | None, None)  # what it has put into offload

    def __post_init__(self):
        # By these, processes that offload layers can exchange tensors in host memory, too.
        offloads = self.stage_order == "end_to_end" and self.offload in (None, "layers")
        known = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"} if offloads else {}
        with patch_environment(**known):
            super().__post_init__()
        self.check_stages()

    @property
    def chooses_stages(self) -> bool:
        """Whether `num_stages` is unset, or was so until a model was cut."""
        return self.num_stages is None or self.num_stages == self._found_stages

    def stages_of(self, num_layers: int) -> int:
        """Number of stages K for a model with `num_layers` layers after which a stage may end."""
        if self.num_stages is None or self.chooses_stages:
            return min(DEFAULT_STAGES, num_layers)
        return self.num_stages

    def write_stages(self, number: int) -> None:
        """Set `num_stages` to the number of a model that was cut, unless the user has set it."""
        if self.chooses_stages:
            self.num_stages = self._found_stages = number

    @property
    def chooses_order(self) -> bool:
        """Whether `stage_order` was unset by the user."""
        return self.stage_order in (None, self._found_order)

    @property
    def chooses_offload(self) -> bool:
        """Whether `offload` was unset by the user."""
        return self.offload in (None, self._found_offload)

    @property
    def order(self) -> StageOrder:
        """`stage_order`, once a model is there."""
        assert self.stage_order is not None
        return self.stage_order

    def settle(self, is_pretrained: bool, can_offload: bool | None = None) -> None:
        """
        Fill in `stage_order` and `offload`, if they are unset, for a model, and check the fields.

        Args:
            is_pretrained (`bool`): whether the model is.
            can_offload (`bool`, *optional*): whether no wrapper or compilation is there with which layers cannot be
                offloaded; unset: as before.
        """
        self._is_pretrained = is_pretrained
        self._is_movable = self._is_movable if can_offload is None else can_offload
        self.check_stages()

    def check_stages(self) -> None:
        """Check the fields of stage-wise training; called again when a hyper-parameter search has set one."""
        check_fields(self, OWN_FIELDS)
        if self.chooses_order:
            self.stage_order = self._found_order = order_for(self, self._is_pretrained, OWN_FIELDS)
        if self.chooses_offload:
            self.offload = self._found_offload = place_for(self, self._is_movable)
        refuse_conflicts(self)


OWN_FIELDS = [f.name for f in fields(MMSTConfig)[len(fields(TrainingArguments)) :]]
