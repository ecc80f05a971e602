"""`MMSTConfig`: transformers' `TrainingArguments` with the fields of stage-wise training, checked when it is made."""

import contextlib
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from transformers import TrainingArguments

from .field_checks import check_fields, number, parse_bytes, positive, whole
from .field_conflicts import refuse_conflicts

StageOrder = Literal["simultaneous", "sequential", "multi_lap", "coupled"]
HeadPooling = Literal["auto", "mean", "cls"]
TransportNorm = Literal["relative", "mean", "sum"]
TransportSchedule = Literal["auto", "constant", "paper", "multipliers", "adaptive"]
StageResidency = Literal["all", "stage"]
FeatureCache = Literal["none", "disk", "memory"]
DEFAULT_STAGES = 4  # or as many as the model has layers


def _layer_names(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(
            f"{name}={value!r} is not a list of layer names. Set it to the qualified name of each "
            'stage\'s last layer, e.g. ["vit.layers.5", "vit.layers.11"], or to None to cut by num_stages.'
        )


@dataclass
class MMSTConfig(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with the settings of stage-wise training by the minimizing movement scheme.

    Some fields of the host differ in effect. `num_train_epochs` is what *every stage* gets (with laps: `N / num_laps`
    epochs per lap), and `max_steps`, when set, is the total over all stages and laps, shared out evenly, remainder to
    the last; in the `"simultaneous"` order all stages learn on each batch, so both mean what they mean in `Trainer`.
    With several processes the gradients of each stage are averaged when it has learned, so that what is set of
    DistributedDataParallel's buckets and unused parameters counts with one stage only.

    Args:
        num_stages (`int`, *optional*):
            Number of stages K. The layers are cut into K runs of about equal cost; 1 is end-to-end training. Unset: 4,
            or as many as the model has layers if those are fewer; when the model is cut, K is written here.
        stage_boundaries (`list[str]`, *optional*):
            Qualified names of each stage's last layer, in order, e.g. `["vit.layers.5", "vit.layers.11"]`. Overrides
            `num_stages`. The model's last layer may be left out.
        stage_order (`str`, *optional*, defaults to `"simultaneous"`):
            `"simultaneous"`: every stage learns on each batch. `"sequential"`: stage 1 to its end, then stage 2 on
            its output, ... `"multi_lap"`: first to last stage in each of `num_laps` laps. In these two an
            `EarlyStoppingCallback` judges the stage that learns, by that stage's metric, and ends its turn, and the
            best model is one whose last stage has begun to learn. `"coupled"`: not in stages, but end to end with one
            layer in device memory, which is recomputed in the backward pass, for when local losses are not enough;
            this sets `stage_residency` to `"stage"`.
        num_laps (`int`, *optional*, defaults to 1):
            Laps R of the `"multi_lap"` order.
        coupled_laps (`int`, *optional*, defaults to 0):
            Laps after those, in which all stages learn together from the model's own loss, end to end, so that what
            local losses missed is made up for: with R laps before and n of these, each lap has N / (R + n) epochs.
            With `stage_residency="stage"` one layer is in device memory, as in the `"coupled"` order.
        head_pooling (`str`, *optional*, defaults to `"auto"`):
            How an auxiliary head pools the tokens: `"mean"` over the tokens (padding left out), `"cls"` the first
            token, `"auto"`: the first token where the own head of a model that was loaded with `from_pretrained` reads
            nothing else, a convolution of the feature maps of a convolutional network, or else the mean.
            Where each token has a label nothing is pooled, and it must be `"auto"`.
        head_layers (`int`, *optional*):
            Number of the model's last layers of which the auxiliary heads share a copy, so that a stage is judged by
            what they make of its output. It costs the memory of that many more layers, once, and their time in each
            stage but the last. Unset: 1 for a model that was loaded with `from_pretrained`, if all its layers are of
            one width and not quantized; else 0.
        head_learning_rate (`float`, *optional*):
            Learning rate of the auxiliary heads' norms and classifiers, and of all that the model itself has after its
            last layer (norm, pooler, classifier). Unset: ten times `learning_rate` for stages of a model that was
            loaded with `from_pretrained`, else `learning_rate`. Where the layers need a low rate, 1e-5 or so, 0.01 is
            worth a try, in the coupled order, too. Not with an optimizer of your own, whose groups have rates already.
        stage_learning_rate_decay (`float`, *optional*):
            Stage k of K learns at `learning_rate` times this to the power of K - k. Unset: for a model of L layers that
            was loaded with `from_pretrained` 0.7 to the power of L / K, so 0.7 a layer, else 1.
        transport_weight (`float`, *optional*, defaults to 0.3):
            Weight of the transport term in each stage's loss, 1 / (2 tau) in the paper's notation; 0 is greedy
            training. With `transport_norm="relative"` it has no unit and travels between models.
        transport_norm (`str`, *optional*, defaults to `"relative"`):
            What is measured of a layer's residue r, per sample, averaged over the batch: `"relative"` is
            ||r||^2 / ||x||^2 with x the layer's input (not differentiated), 1,000 at most; `"mean"` is the mean square
            over tokens and features (the paper's released code), `"sum"` the squared norm (the paper's equation 5).
        transport_schedule (`str`, *optional*, defaults to `"auto"`):
            `"auto"`: adaptive for a model that was loaded with `from_pretrained`, whose layers may move far already,
            else constant. `"constant"`; `"paper"`: half the weight (doubled tau) in the second half of the stages;
            `"multipliers"`: the weight is divided by a multiplier that grows with the task loss (Uzawa, appendix D of
            the paper); `"adaptive"`: per stage, the transport term is held at `transport_weight` times 10 % of the task
            loss.
        stage_clipping (`bool`, *optional*, defaults to `False`):
            Clips the gradients of each stage to `max_grad_norm` by itself. In the simultaneous order a stage's
            optimizer step then follows its backward at once (also where `max_grad_norm` is 0), so that the gradients
            of one stage are in memory, not of all; with several processes those of two, of which one's are on their
            way. With gradient accumulation, a gradient scaler (fp16) or side inputs that layers share, all step at the
            end, as in `Trainer`, to the same effect.
        memory_budget (`str`, *optional*):
            Bytes of device memory, as in `"4GiB"`, to plan for when the trainer is made (see [`plan`]): `num_stages`,
            `stage_order`, `stage_clipping`, `stage_residency` and `activation_checkpointing` are set to the ways of
            stage-wise training with the least compute that fits. A `num_stages` that is set is kept: then ways with
            that many stages are planned, or it is an error that none fits.
        stage_residency (`str`, *optional*, defaults to `"all"`):
            What is in device memory: `"all"` stages, or, in the orders where one stage learns at a time, only that
            `"stage"`: its weights, gradients and optimizer states. The others rest in pinned host memory (CUDA) or in
            memory-mapped files in `output_dir` (CPU) and pass through layer by layer. For a single process.
        feature_cache (`str`, *optional*, defaults to `"none"`):
            Where the features that a stage gets of each sample are kept, so that the stages before it run once per
            sample and turn, not in each epoch: `"disk"` (in `output_dir`, deleted after training) or
            `"memory"`. For the orders where one stage learns at a time. Each process keeps those of its own samples.
        cache_views (`int`, *optional*):
            Fixes random augmentation: in epoch e a sample is view e mod `cache_views` of it. A feature cache needs
            that where the dataset is random.
        stage_parallel (`bool`, *optional*, defaults to `False`):
            Shares out the stages, not the samples, over the processes of `torchrun` or `accelerate launch`: each of P
            holds the weights, gradients and optimizer states of its stages alone, learns on every batch, and hands the
            output of its last stage on to the next process. It computes what the simultaneous order computes in one
            process. `per_device_train_batch_size` is the whole batch, and `world_size` is 1, as the samples are not
            shared out. It needs `stage_clipping=True` or `max_grad_norm=0`, and heads without layers.
        model_card (`bool`, *optional*, defaults to `True`):
            Whether [`MMSTTrainer.push_to_hub`] and [`MMSTTrainer.create_model_card`] write a model card,
            `README.md` and `stages.png` in `output_dir`; `False` leaves one that you wrote alone.

    Raises:
        `ValueError`: for a value that cannot be, saying which field to set to what.
    """

    num_stages: Annotated[int, whole(1, "1 trains end to end")] | None = field(
        default=None,
        metadata={
            "help": "Number of stages the encoder is cut into; 1 is end-to-end training; if unset, 4, or as many as "
            "there are layers if those are fewer."
        },
    )
    stage_boundaries: Annotated[list[str], _layer_names] | None = field(
        default=None,
        metadata={"help": "Qualified names of each stage's last layer, in order; overrides num_stages."},
    )
    stage_order: StageOrder = field(
        default="simultaneous",
        metadata={
            "help": "simultaneous: all stages on each batch; sequential: one after the other; multi_lap: first to "
            "last stage in each of num_laps laps; coupled: end to end, with one layer in device memory."
        },
    )
    num_laps: Annotated[int, whole(1, "1 is a single lap")] = field(
        default=1, metadata={"help": "Laps of the multi_lap order."}
    )
    coupled_laps: Annotated[int, whole(0, "0 leaves all learning to local losses")] = field(
        default=0, metadata={"help": "Laps at the end in which all stages learn end to end."}
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
        default=None, metadata={"help": "Device memory to plan for, such as 4GiB: number of stages, order, residency."}
    )
    stage_residency: StageResidency = field(
        default="all",
        metadata={"help": "What is in device memory: all stages, or only the stage that learns."},
    )
    feature_cache: FeatureCache = field(
        default="none",
        metadata={"help": "Where the features that a stage gets of each sample are kept: none, disk or memory."},
    )
    cache_views: Annotated[int, whole(1, "1 keeps one view of each sample")] | None = field(
        default=None,
        metadata={
            "help": "Number of different views that random augmentation makes of a sample; not limited if unset."
        },
    )
    stage_parallel: bool = field(
        default=False,
        metadata={"help": "Share out the stages over the processes, in the place of the samples."},
    )
    model_card: bool = field(
        default=True, metadata={"help": "Write a model card, README.md and stages.png, when pushing to the Hub."}
    )

    _found_stages = None  # what write_stages has put into num_stages

    def __post_init__(self):
        super().__post_init__()
        self.check_stages()

    def __getstate__(self):
        """What is pickled, as in `training_args.bin`: everything but the token."""
        return {**vars(self), "hub_token": None}

    @property
    def place_model_on_device(self):
        """As the host's; layers at rest do not go to the device, nor does what is not planned or not shared out yet."""
        whole = self.stage_residency == "all" and self.memory_budget is None and not self.stage_parallel
        return super().place_model_on_device and whole

    @property
    def world_size(self):
        """As the host's: the number of processes that share out the samples; 1 where they share out the stages."""
        return 1 if self.stage_parallel else super().world_size

    @contextlib.contextmanager
    def main_process_first(self, local=True, desc="work"):
        """As the host's, also where the processes share out the stages."""
        if not self.stage_parallel:
            with super().main_process_first(local, desc):
                yield
        else:
            state = self.distributed_state
            with state.local_main_process_first() if local else state.main_process_first():
                yield

    @property
    def chooses_stages(self) -> bool:
        """Whether `num_stages` is unset, or was so until a model was cut."""
        return self.num_stages is None or self.num_stages == self._found_stages

    def stages_of(self, num_layers: int) -> int:
        """K for a model of that many layers after which a stage may end."""
        if self.num_stages is None or self.chooses_stages:
            return min(DEFAULT_STAGES, num_layers)
        return self.num_stages

    def write_stages(self, number: int) -> None:
        """Write down K of the model that was cut, unless the user has set it."""
        if self.chooses_stages:
            self.num_stages = self._found_stages = number

    def check_stages(self) -> None:
        """Check the fields of stage-wise training; called again when a hyper-parameter search has set one."""
        check_fields(self, OWN_FIELDS)
        if self.stage_order == "coupled":
            self.stage_residency = "stage"
        refuse_conflicts(self)


OWN_FIELDS = [f.name for f in fields(MMSTConfig)[len(fields(TrainingArguments)) :]]
