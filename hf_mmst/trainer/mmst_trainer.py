"""`MMSTTrainer`: every method of the host's `Trainer` that training in stages overrides, and why."""

import functools
import os
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..config import MMSTConfig
from ..distributed.layer_shards import keeping_parameters, sharding_layers
from ..method.heads import HEADS
from ..records.pictures import PictureCallback
from ..records.reading import refuse_others
from . import checkpoints, optimization, publishing
from .callback import StageCallback, sees_gradients
from .evaluation import StageEvaluation, evaluated, objective_of_model
from .learning import weighed
from .mean_losses import MeanLosses
from .refusals import refuse_other_arguments, refuse_placement, refuse_rates
from .stage_parallel import AllStages, StageParallel, whole_batches
from .stage_run import StageRun, first_batch_of, settle
from .staging import Staging
from .task_loss import TaskLoss
from .whole_checkpoints import WholeCheckpoints


class MMSTTrainer(publishing.Reports, MeanLosses, WholeCheckpoints):
    """
    A [`~transformers.Trainer`] that trains an encoder stage by stage by the minimizing movement scheme.

    It takes what `Trainer` takes, with [`MMSTConfig`] in the place of `TrainingArguments`. During [`train`] the
    auxiliary heads are part of the model, as `model.mmst_heads`, so that optimizers, DistributedDataParallel and
    clipping see them, but not of its state dict; afterwards the model is as it came. Losses are means over the samples
    (of tokens: over the labels that count) of an optimizer step, however it is split into micro-batches and processes.

    Attributes:
        partition ([`Partition`]), heads ([`StageHeads`]): how the model was cut; the heads of stages 1 .. K-1.
        peaks ([`TurnPeaks`]): the most memory in training, of each stage where one learns at a time.
        planned_bytes (`int`, *optional*): what the way that was planned for `memory_budget` takes.
        metrics_of_stages (`frozenset[str]`): names of metrics that are not the model's own, so far.

    Raises:
        `TypeError`: if `args` is not an [`MMSTConfig`].
        `ValueError`: if the model or its task cannot be trained in stages, or for a setting that would do so wrongly.
    """

    args: MMSTConfig
    accelerator: Any
    lr_scheduler: Any
    metrics_of_stages: frozenset[str] = frozenset()
    _evaluation: StageEvaluation | None = None  # the one that is under way
    _sets_rates = False  # of stages and heads, which is for who makes the optimizer to do

    @functools.wraps(Trainer.__init__)  # type: ignore[misc]
    def __init__(self, model=None, args=None, *others, **kwargs):
        args = MMSTConfig("tmp_trainer") if args is None else args
        refuse_other_arguments(args)
        self._run = StageRun(args, type(self).__name__)
        super().__init__(model, args, *others, **kwargs)
        refuse_rates(self.args, self.optimizer)
        self._run.refuse_wrapper()
        refuse_placement(self)
        self.peaks, self.planned_bytes = self._run.peaks, settle(self)
        self._cut()
        self.add_callback(StageCallback(self, self._run))
        handler, planned = self.callback_handler, lambda: self.results({})["planned_bytes"]
        self.add_callback(PictureCallback(lambda: handler.callbacks, self.peaks.by_name, planned))

    def _core(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _cut(self) -> None:
        """Cut the model into stages and make their heads, unless that was done for this very model."""
        args, model, smooths = self.args, self._core(), self.label_smoother is not None
        if self._run.is_cut(model):
            return
        loss_func, batches = self.compute_loss_func, functools.partial(first_batch_of, self)
        self._run.cut(model, Staging(args, self._run.wrapper, batches, self.label_names, loss_func, smooths))
        self.partition, self.heads = self._run.staged.partition, self._run.staged.heads

    # ---- A training run ----

    def create_accelerator_and_postprocess(self):
        """Processes that share out stages read whole batches; layers are compiled and moved one by one."""
        with sharding_layers(self):
            super().create_accelerator_and_postprocess()
        stages = AllStages()
        if self.args.stage_parallel:
            self.accelerator = whole_batches(self.accelerator, self._build_accelerator_args)
            self.gather_function = self.accelerator.gather_for_metrics
            stages = StageParallel(self.args)
        self._run.use(self.accelerator, stages)

    @functools.wraps(Trainer.train)
    def train(self, *args, **kwargs):
        with self._run.stages.flowing():
            return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args, **kwargs):
        """The host may begin it anew with smaller batches; however it ends, nothing stays behind."""
        with self._run.ending():
            return super()._inner_training_loop(*args, **kwargs)

    def set_initial_training_values(self, args, dataloader):
        """The epochs and steps are those of all turns; the order of training is fixed here."""
        epochs, steps, examples, samples, *sizes, max_steps = super().set_initial_training_values(args, dataloader)
        self._cut()
        epochs, samples, max_steps = self._run.turns.plan(epochs, steps, samples, max_steps)
        return epochs, steps, examples, samples, *sizes, max_steps

    def _init_training_state(self, max_steps, *args, **kwargs):
        """A run that resumes takes up the turns that had ended early."""
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self._run.turns.restore(self.state, max_steps)
        return found

    def _prepare_for_training(self, max_steps, train_dataloader, checkpoint):
        """The heads are in the model while it trains; transport weights begin anew, or go on from the checkpoint."""
        self._cut()
        self._run.prepare(keeps_half=self.is_deepspeed_enabled)
        self._run.staged.weights.reset()
        self.callback_handler.callbacks.sort(key=lambda callback: isinstance(callback, StageCallback))  # the last one
        if checkpoint is not None:
            checkpoints.go_on(checkpoint, self._run.staged, self.args, self._run.turns.order)
        with keeping_parameters(self.accelerator, self._core()):
            return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)

    def create_optimizer(self, model=None):
        """The heads are among the parameters, and stages and heads have rates of their own."""
        self._cut()
        self._run.prepare(keeps_half=self.is_deepspeed_enabled)
        own = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if own:
            optimization.set_learning_rates(optimizer, self.args, self._run.staged)
            self._sets_rates = True
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """In turns of local losses, each has its own warm-up and decay over its own steps."""
        one_loss = not self._run.turns.are_several or self.args.stage_objective == "model"
        if self.lr_scheduler is not None or one_loss:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = optimization.scheduler_of_turns(optimizer or self.optimizer, self.args, self._run.turns)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _wrap_model(self, model, training=True, dataloader=None):
        """What is to be trained has an optimizer by now, which gets the heads, whoever has made it."""
        if training:
            if not self._sets_rates:
                refuse_rates(self.args, self.optimizer)
            optimization.add_heads(self.optimizer, self._run.staged)
            self._run.watch_states(self.optimizer)
        return super()._wrap_model(model, training, dataloader)

    def _get_dataloader(self, dataset, description, *args, is_training=False, **kwargs):
        """With a feature cache, training batches have the keys of their samples."""
        host = functools.partial(super()._get_dataloader, is_training=is_training, **kwargs)
        if not is_training:
            return host(dataset, description, *args)
        return self._run.features.loader(self, lambda found: host(found, description, *args), dataset, self._run.staged)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Turns may have ended early; the loss is that of the last stage."""
        self._tr_loss.fill_(self._run.stages.from_last(self._tr_loss.item()))
        samples = self._run.turns.samples_taken(num_train_samples, self.state)
        return super()._finalize_training(trial, samples, start_time)

    # ---- An optimizer step ----

    @property
    def _task(self) -> TaskLoss:
        processes, smoother = self.accelerator.num_processes, self.label_smoother
        return TaskLoss(self.args, self._run.staged, self.label_names, self.compute_loss_func, smoother, processes)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The step's labels and samples are counted, of which the losses are means."""
        self._run.stages.begin_step()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._run.is_plain:
            self._run.learning.begin_micro_batches(batches, self._task.labels_of, self._run.mean)
        return batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Gradients are averaged over the processes by stages; end to end, the last layer is put to rest."""
        self._learned = False
        with self._run.micro_batch(model, inputs, (self.args.seed, self.state.global_step)):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In the host's forward pass, all stages that learn at this step do so; the loss is the last one's."""
        run, task = self._run, self._task
        if run.staged.num_stages > 1 and self.compute_loss_func is not None:
            inputs = {**inputs, "labels": task.labels_of(inputs)}  # the host passes on no others
        learns = self.is_in_train and torch.is_grad_enabled()  # also a model that stays in eval mode
        if run.is_plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.compute_loss_func is None:
            num_items_in_batch = None  # models divide by it, or ignore it: means are taken here
        if not (model.training or learns):
            return self._mean_loss(model, inputs, return_outputs, num_items_in_batch)
        run.features.take_keys(inputs, run.staged.ignores_padding)
        labels = task.labels_of(inputs)
        share = task.share_of_step(labels, run.learning, self.current_gradient_accumulation_steps)
        forward = functools.partial(self._mean_loss, model, inputs, True, num_items_in_batch)
        if run.turns.now.end_to_end:
            loss, outputs = forward()
            loss = weighed(loss, share)
        else:
            task.refuse_no_labels(inputs)
            tokens = task.tokens(labels)
            criterion = functools.partial(task.of, labels=labels, num_items=num_items_in_batch, tokens=tokens)
            given = forward, run.turns.now, labels, inputs.get(run.staged.mask_name), share, criterion, tokens
            loss, outputs = run.learning.loss(*given, self.optimizer, run.wrapper)
        loss = self._as_the_host_divides(loss)
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model):
        """Gradients at rest, and those of stages that are clipped by themselves, are not the host's to clip."""
        found = self._run.clip(self.args.max_grad_norm, sees_gradients(self.callback_handler.callbacks))
        return super()._clip_grad_norm(model) if found is None else found

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm is that of all stages, those that have stepped already among them."""
        grad_norm = self._run.norm_at_rest() if grad_norm is None else grad_norm
        return self._run.learning.norm_with_early(super()._get_grad_norm(model, grad_norm))

    def floating_point_ops(self, inputs):
        """Processes that share out the stages count a batch once."""
        return super().floating_point_ops(inputs) if self._run.stages.is_first else 0

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        """What is logged is brought together, where processes share out the stages."""
        if self.control.should_log and grad_norm is not None:
            grad_norm = self._run.learning.bring_together(tr_loss, grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs, start_time=None):
        """The log has loss and transport of each stage since the last one, memory peaks and moved bytes."""
        if "loss" in logs and self.is_in_train:
            logs |= self._run.learning.read_log(self._run.mean) | self.peaks.read() | self._run.moved
        super().log(logs, start_time)

    # ---- Evaluation ----

    def evaluate(self, *args, **kwargs):
        """In turns, early stopping judges the stage that learns, not the model, see [`Turns`]."""
        with self._run.turns.without_stoppers(self.callback_handler.callbacks, self.is_in_train):
            return super().evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics, trial):
        """The model's own metric says nothing before the last stage has begun to learn."""
        before = self.state.best_metric, self.state.best_global_step
        found = super()._determine_best_metric(metrics, trial)
        if self._run.turns.model_counts(self.state.global_step):
            return found
        self.state.best_metric, self.state.best_global_step = before
        return False

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """There are metrics of each stage, `eval_stage_1_loss` and so on, and of all heads together."""
        host = functools.partial(
            super().evaluation_loop, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        with self._run.evaluating(self.is_in_train):
            if self.partition.num_stages == 1 or self.args.stage_objective == "model":
                return host()
            output, names = evaluated(self, self._run, host, metric_key_prefix)
        self.metrics_of_stages |= names
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """While metrics of stages are collected, the logits of every stage go along with the model's."""
        if self._evaluation is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs, host = self._prepare_inputs(inputs), super().prediction_step
        with self._evaluation.batch(self._task, inputs, prediction_loss_only, self.gather_function) as found:
            found += host(model, inputs, prediction_loss_only, ignore_keys)
        return tuple(found)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """The default objective is that of the model's own metrics, without those of its stages."""
        self._run.stages.refuse_search()
        compute_objective = compute_objective or (lambda metrics: objective_of_model(metrics, self.metrics_of_stages))
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    # ---- Checkpoints ----

    def _save(self, output_dir=None, state_dict=None):
        """The stages are saved beside the plain model; of a model in shards, to be called in each process."""
        output_dir, staged = output_dir if output_dir is not None else self.args.output_dir, self._run.staged
        own, heads = checkpoints.states_of(staged, self._run.wrapper, self._run.stages, state_dict)
        super()._save(output_dir, own)
        if self.args.should_save:
            checkpoints.write_stages(output_dir, staged, self.args, heads)

    def _save_checkpoint(self, model, trial):
        """Transport weights are brought in line over the processes first."""
        self._run.staged.weights.sync(self._run.mean)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        """Where processes share out stages, the random state that orders the samples is the same in all of them."""
        if not self.args.stage_parallel or self.args.should_save:
            super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        """A wrapper's own files hold the heads with the model; shares of stages are saved as one process would."""
        with self._run.one_with_heads():
            super()._save_optimizer_and_scheduler(output_dir)
            self._run.stages.save_optimizer(self.optimizer, output_dir, self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The heads are loaded, too, and models whose key names of the Hub are not their own."""
        self._cut()
        there = os.path.isdir(resume_from_checkpoint)  # if not, the host says so
        if not there or not checkpoints.load(resume_from_checkpoint, self._run.staged, self.args, self._run.wrapper):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        """As [`_load_from_checkpoint`]; a wrapper's own files hold the heads with the model."""
        with self._run.one_with_heads():
            best = self.state.best_model_checkpoint
            if not checkpoints.load(best, self._run.staged, self.args, self._run.wrapper):
                super()._load_best_model()

    def _issue_warnings_after_load(self, load_result):
        """An error in the place of the host's warnings: what a checkpoint lacks would be left to chance."""
        missing = [name for name in load_result.missing_keys if not name.startswith(f"{HEADS}.")]
        refuse_others("The checkpoint", self._core(), missing, load_result.unexpected_keys)

    def _put_into_push(self, checkpoint_folder):
        """The files of the stages go along."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            checkpoints.copy_stages(checkpoint_folder, self.args.output_dir)

    @functools.wraps(Trainer.create_model_card)
    def create_model_card(self, *args, **kwargs):
        if self.args.model_card and self.is_world_process_zero():
            publishing.publish_card(self, *args, **kwargs)
