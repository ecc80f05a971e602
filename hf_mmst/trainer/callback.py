"""What training in stages does at the events that the host's Trainer tells its callbacks of."""

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from .optimization import renew_rates
from .refusals import refuse_checkpointing
from .stage_run import StageRun
from .turns import STOPPED, turn_name


def sees_gradients(callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether one of the user's callbacks may look at gradients after clipping."""
    mute = TrainerCallback.on_pre_optimizer_step, StageCallback.on_pre_optimizer_step
    return any(type(callback).on_pre_optimizer_step not in mute for callback in callbacks)


class StageCallback(TrainerCallback):
    """
    Says at the beginning how the model was cut; after each step, renews transport weights and what is resident.

    Args:
        trainer ([`MMSTTrainer`]): whose run it is.
        run ([`StageRun`]): its pieces.
    """

    def __init__(self, trainer: Any, run: StageRun):
        self.trainer, self._run = trainer, run

    def on_train_begin(self, args, state, control, **kwargs):
        run, staged = self._run, self._run.staged
        refuse_checkpointing(staged.model, staged.partition, args)
        run.features.refuse_other_loader(type(self.trainer).__name__)
        staged.share_out()
        staged.heads.apart = True
        if state.is_world_process_zero:
            print(f"{staged.summary(args)}{run.stages.summary()}")
        if staged.offload is not None:
            staged.offload.rest()  # optimizer states of a checkpoint are on the device now
        run.begin_streaming()
        run.begin_step(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._run.features.begin_epoch(int(state.epoch))

    def on_step_begin(self, args, state, control, **kwargs):
        run = self._run
        run.learning.begin_step()
        if run.staged.offload is not None:
            run.staged.offload.link.count()
        if not run.is_plain and not run.turns.now.end_to_end:
            run.watch.begin(run.staged.engine)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        run, reduction = self._run, self._run.learning.reduction
        run.watch.end()
        if reduction is not None and not reduction.finished:
            raise ValueError(
                f"training_step of {type(self.trainer).__name__} does not call that of MMSTTrainer, which averages "
                "gradients over the processes. Call super().training_step(...) there, or start one process."
            )
        if run.layer_offload is not None:
            run.layer_offload.step(self.trainer.optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        run, turn = self._run, self._run.turns.now
        if run.staged.offload is not None:
            run.moved = run.staged.offload.link.moved
        if not turn.end_to_end and not run.is_plain:
            run.staged.weights.step(turn.stages, run.mean)
        run.begin_step(state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        turn = self._run.turns.judge(control, state, metrics, self.trainer.metrics_of_stages, **kwargs)
        spared = 0 if turn is None else self._run.turns.end(turn, state)
        if spared > 0:
            self._end_early(turn, spared, state, control)

    def _end_early(self, turn, spared, state, control) -> None:
        """A turn has ended `spared` steps early: the next one begins, or the training ends."""
        name, step, trainer = turn_name(turn), state.global_step, self.trainer
        trainer.log({f"{name}{STOPPED}": spared})
        if state.is_world_process_zero:
            whose = name.rstrip("_").replace("_", " ") or "all stages"
            print(f"hf_mmst: early stopping ends the turn of {whose} after step {step}, {spared} steps early")
        if step >= state.max_steps:
            control.should_training_stop = True
            return
        if trainer._created_lr_scheduler:
            renew_rates(trainer.lr_scheduler)
        self._run.begin_step(step)

    def on_train_end(self, args, state, control, **kwargs):
        run, planned = self._run, self.trainer.planned_bytes
        run.peaks.end()
        if planned is not None and state.is_world_process_zero:
            print(f"hf_mmst: {run.peaks.summary(planned)}")
        run.features.delete()
