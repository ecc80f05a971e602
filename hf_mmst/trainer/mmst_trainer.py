"""MMSTTrainer: the host's Trainer, with each training step run stage by stage. Glue only."""

import contextlib
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from ..config import MMSTConfig
from ..cut.objectives import objective_of
from ..distributed.compiling import compiled, take_compilation
from ..distributed.reduction import Reduction
from ..memory.coupled import CoupledResidency
from ..memory.feature_cache import FeatureCache, upstream_hash
from ..memory.peaks import TurnPeaks
from ..memory.sample_keys import KEYS, FixedViews, KeyedCollator, check_fixed
from ..method.stepping import clip_by_stage, step_stage, steps_elementwise
from ..method.training_pass import StageStep
from .evaluation import StageEvaluation
from .optimization import StageOptimization
from .publishing import StageCards
from .stage_parallel import StageParallel
from .turns import StageTurns, turn_name
from .watch import Watch


class MMSTTrainer(StageTurns, StageOptimization, StageEvaluation, StageParallel, StageCards):
    """
    A [`~transformers.Trainer`] that trains an encoder stage by stage by the minimizing movement scheme.

    It takes what `Trainer` takes, with [`MMSTConfig`] in the place of `TrainingArguments`. During [`train`] the
    auxiliary heads are part of the model, as `model.mmst_heads`, so that optimizers, DistributedDataParallel and
    clipping see them, but not of its state dict; afterwards the model is as it came, and the heads are `trainer.heads`.

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
    _learned = False  # whether this micro-batch has come to compute_loss

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
        self._host_accepts_loss_kwargs = self.model_accepts_loss_kwargs
        self._refuse_wrappers()
        self._planned = self._plan()
        self.peaks = TurnPeaks(self.args.device)
        self._with_heads = contextlib.ExitStack()
        self._watch = Watch(type(self).__name__)
        self._streams = contextlib.ExitStack()  # holds what streams layers through the device in a training run
        self._cache: FeatureCache | None = None
        self._views: FixedViews | None = None
        self._step_labels, self._step_samples = 0.0, 0.0
        self._early_norms: list[torch.Tensor] = []  # of the gradients of stages that have stepped already
        self._shares_gradients = False
        self._cut()
        self.add_callback(_StageCallback(self))
        self.add_callback(self.picture_callback())

    def _core(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- Training ----

    @functools.wraps(Trainer.train)
    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        flags = {"true": True, "false": False}  # what a command line says
        resume_from_checkpoint = flags.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        self._tidy(self._get_output_dir(trial))
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.is_in_train = False  # also after an error

    def _inner_training_loop(self, *args, **kwargs):
        """As the host's, which may begin it anew with smaller batches; however it ends, nothing stays behind."""
        with contextlib.ExitStack() as stack:  # what one of them raises keeps none of the others from it
            stack.callback(self._clean_up)
            stack.callback(self._flush_cache)
            stack.callback(self.peaks.end)
            stack.callback(self._streams.close)
            stack.callback(self._watch.end)
            return super()._inner_training_loop(*args, **kwargs)

    def _flush_cache(self) -> None:
        """Keep the features on the disk, for a run that resumes, and let go of them here."""
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.flush()

    def _clean_up(self) -> None:
        """Leave the model as it came, and nothing of a step that was not taken."""
        for parameter in self._tied:
            parameter.requires_grad_(True)
        self._with_heads.close()
        Reduction.forget(self._core())
        if self._residency is not None:
            self._residency.rest()
        self._early_norms.clear()
        self._log_sums.zero_()

    def create_accelerator_and_postprocess(self):
        """As the host's; layers at rest are not moved to the device, and compiled layer by layer."""
        super().create_accelerator_and_postprocess()
        self._compilation = take_compilation(self.accelerator)
        if self.args.stage_residency == "stage":
            self.accelerator.device_placement = False

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
                self.data_collator = KeyedCollator(collate, self.label_names, self._ignores_padding)
            loader = load(dataset, description, *args)
        finally:
            self.data_collator = collate
        if caching:
            check_fixed(loader.dataset, loader.collate_fn)
            folder = Path(self.args.output_dir) / f"_feature_cache_{self.args.process_index}"
            capacity = len(dataset) * (self.args.cache_views or 1)
            self._cache = FeatureCache(self.args.feature_cache, folder, capacity, self._upstream)
        return loader

    def _refuse_loader(self) -> None:
        args = self.args
        if (args.feature_cache != "none" and self._cache is None) or (args.cache_views and self._views is None):
            raise ValueError(
                f"get_train_dataloader of {type(self).__name__} does not call that of MMSTTrainer, which marks samples "
                'so that their features are found again. Set feature_cache="none" and leave cache_views unset, or call '
                "super().get_train_dataloader()."
            )

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
        self.peaks.begin(f"{turn_name(segment)}peak_bytes" if len(self._order.segments) > 1 else "peak_bytes")
        if self._residency is not None:
            self._residency.activate(() if segment.coupled else segment.stages)
        if self._cache is not None and not segment.coupled:
            self._cache.begin(segment.stages[0])

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the host's; remembers the step's number of labels and of samples, on average over the processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._is_plain:
            return batches, num_items
        labels = [self._labels_of(batch) for batch in batches if isinstance(batch, Mapping)]
        numbers = [self._objective.count(some) for some in labels], [len(x) for x in labels if torch.is_tensor(x)]
        counts = torch.tensor([float(sum(found)) for found in numbers])
        if self.args.average_tokens_across_devices:
            counts = self._mean(counts)
        self._step_labels, self._step_samples = counts.tolist()
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In training in stages: run all that learn at this step; the loss returned is the last one's."""
        if self.partition.num_stages > 1 and self.compute_loss_func is not None:
            inputs = {**inputs, "labels": self._labels_of(inputs)}  # the host passes on no others
        learns = self.is_in_train and torch.is_grad_enabled()  # also a model that stays in eval mode
        if self._is_plain or not (model.training or learns):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._learned = True
        keys = inputs.pop(KEYS).tolist() if KEYS in inputs else []
        labels, stages = self._labels_of(inputs), self._segment.stages
        scale = self._share_of_step(labels)
        # The mean of no labels is not a number, and has no gradient.
        weigh = torch.nan_to_num if scale == 0 else lambda loss: loss
        scale = scale or 1.0
        if self._segment.coupled:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (weigh(loss) * scale, outputs) if return_outputs else weigh(loss) * scale
        self._watch.learn(stepped=bool(self._early_norms))
        if labels is None:
            raise ValueError(
                f"The batch has no {self._label_name}, only {', '.join(inputs)}: every stage learns from it. Give the "
                "dataset such a column, or set label_names to the one that it has; remove_unused_columns=False keeps "
                "columns that the model does not know."
            )
        # Transport is a mean over samples, whatever number of labels they have.
        samples = len(labels) / (self._step_samples or len(labels))
        weights = [self._weights[stage] * samples / scale for stage in range(self.partition.num_stages)]
        mask = inputs.get("attention_mask")
        kept = mask if self._ignores_padding else None
        given = self._cache.get(stages[0], keys, kept) if self._cache is not None else self._taken()
        learning = self._engine.step(
            criterion=lambda logits: weigh(self._criterion(logits, labels, num_items_in_batch)),
            weights=weights,
            stages=stages,
            mask=mask,
            backward=lambda loss, **retain: self._wrapper.backward(loss * scale, **retain),
            learned=self._step_early,
            given=given and (given[0], given[1].to(self.args.device)),
        )
        with self._wrapper.forward(self._core(), self.partition), learning as step:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._hand_on(step.output)
        if self._cache is not None and step.features is not None and (given is None or given[0] < stages[0]):
            self._cache.add(stages[0], keys, kept, step.features)
        loss = weigh(loss)
        step.losses[stages[-1]] = loss.detach()
        self._record(step, scale, samples)
        if weights[stages[-1]] > 0:
            loss = loss + weights[stages[-1]] * step.transport
        loss = loss * scale
        self._watch.awaits(loss)
        return (loss, outputs) if return_outputs else loss

    @property
    def _label_name(self) -> str:
        """What the labels of which a stage learns are called in a batch."""
        return "labels" if "labels" in self.label_names or not self.label_names else self.label_names[0]

    def _labels_of(self, batch: Mapping[str, Any]) -> Any:
        return batch.get(self._label_name)

    def _share_of_step(self, labels: Any) -> float:
        """
        The share that a micro-batch has of its optimizer step, by which the mean loss of it is weighed.

        By labels that count, so that the loss is the mean over the step's, if it is known which the model's loss
        counts; else all micro-batches have the same share, as in the host. 1 for `compute_loss_func`, which divides.
        """
        if self.compute_loss_func is not None:
            return 1.0
        if not torch.is_tensor(labels) or objective_of(self._core()) is None:
            return 1 / self.current_gradient_accumulation_steps
        count = self._objective.count(labels)
        return count / (self._step_labels or count) if count else 0.0

    @property
    def loss_is_scaled_for_ga(self):
        """True for [`compute_loss`], which weighs each micro-batch by its share; as the host's for another one."""
        return self._learned or None

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
        if not self.args.stage_clipping or self._segment.coupled or self._is_plain:
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
        self._learned = False
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
        return self._objective.loss(logits, labels, getattr(self._core(), "config", None))

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
        self.trainer._refuse_loader()
        self.trainer._share_out()
        self.trainer.heads.apart = True
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

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._early_norms.clear()  # of a step that was broken off
        if not self.trainer._is_plain and not self.trainer._segment.coupled:
            self.trainer._watch.begin(self.trainer._engine)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._watch.end()
        if self.trainer._reduction is not None and not self.trainer._reduction.finished:
            raise ValueError(
                f"training_step of {type(self.trainer).__name__} does not call that of MMSTTrainer, which averages "
                "gradients over the processes. Call super().training_step(...) there, or start one process."
            )
        if self.trainer._coupled is not None:
            self.trainer._coupled.step(self.trainer.optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer._segment.coupled and not self.trainer._is_plain:
            self.trainer._weights.step(self.trainer._segment.stages, self.trainer._mean)
        self.trainer._begin_step(state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.trainer._judge(control, metrics, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.peaks.end()
        if self.trainer._planned is not None and state.is_world_process_zero:
            measured = max(self.trainer.peaks.by_name.values()) / 2**20
            print(f"hf_mmst: planned {self.trainer._planned / 2**20:,.0f} MiB of tensors, measured {measured:,.0f} MiB")
        if self.trainer._cache is not None:
            self.trainer._cache.delete()
