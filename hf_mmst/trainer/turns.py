"""Evaluations of a run in which stages take turns -> whether a turn ends early, and which model is the best."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerControl

from ..config import MMSTConfig
from ..cut.partition import Partition
from ..method.order import Order, Segment

STOPPED = "stopped_early"  # ends the names under which it is logged, whence it is known when a run is resumed


class StageTurns(Trainer):
    """
    What the turns of [`MMSTTrainer`], which sets the attributes below, mean for callbacks and for the best model.

    The model's own metric says nothing of a stage that learns before the last one. So an
    [`~transformers.EarlyStoppingCallback`] judges the stage that learns, by that stage's metric and since its turn has
    begun; it ends that turn, and the next one begins. Other callbacks that stop the training do so. The best model is
    that of the best evaluation, by the model's own metric, since the last stage has begun to learn.
    """

    args: MMSTConfig
    partition: Partition
    _order: Order
    _cut: Callable[[], None]
    _begin_step: Callable[[int], None]
    _renew_rates: Callable[[], None]
    _names_of_stages: frozenset[str]
    _stoppers: tuple[EarlyStoppingCallback, ...] = ()
    _full_steps: int  # of a run in which no turn ends early

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

    def _init_training_state(self, max_steps, *args, **kwargs):
        """As the host's, with the turns that had ended early."""
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self._full_steps = max_steps
        if len(self._order.segments) > 1:
            for entry in self.state.log_history:
                if any(name.endswith(STOPPED) for name in entry):
                    self._order = self._order.ended(entry["step"])
            self.state.max_steps = self._order.total_steps
        return found

    def _finalize_training(self, trial, num_train_samples, start_time):
        """As the host's, which takes the samples for those of `state.max_steps`."""
        return super()._finalize_training(
            trial, num_train_samples * self.state.max_steps / self._full_steps, start_time
        )

    def _determine_best_metric(self, metrics, trial):
        """As the host's, once the last stage has begun to learn."""
        before = self.state.best_metric, self.state.best_global_step
        found = super()._determine_best_metric(metrics, trial)
        begun = self._order.segments[: self._order.index(self.state.global_step - 1) + 1]
        if any(self.partition.num_stages - 1 in turn.stages for turn in begun):
            return found
        self.state.best_metric, self.state.best_global_step = before
        return False

    def evaluate(self, *args, **kwargs):
        """As the host's; where stages learn in turns, early stopping is asked by itself, see [`StageTurns`]."""
        with self._stoppers_apart():
            return super().evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def _stoppers_apart(self) -> Iterator[None]:
        callbacks = self.callback_handler.callbacks
        found = [(i, one) for i, one in enumerate(callbacks) if isinstance(one, EarlyStoppingCallback)]
        if not self.is_in_train or len(self._order.segments) == 1 or not found:
            yield
            return
        self._stoppers = tuple(one for _, one in found)
        for one in self._stoppers:
            callbacks.remove(one)
        try:
            yield
        finally:
            self._stoppers = ()
            for i, one in found:
                callbacks.insert(i, one)

    def _judge(self, control: TrainerControl, metrics: Mapping[str, float], **others: Any) -> None:
        """Ask early stopping as if the stage that learns were the model, and its turn the training."""
        if not self._stoppers:
            return
        turn = self._order.at(self.state.global_step - 1)
        name = self.args.metric_for_best_model or ""
        name = name if name.startswith("eval_") else f"eval_{name}"
        judged, state = self._metric_of(turn, name, metrics), copy.copy(self.state)
        state.best_metric = self._best_before(turn, judged)
        found = {name: metrics[judged]} if judged in metrics else {}
        stops, control.should_training_stop = control.should_training_stop, False
        for one in self._stoppers:
            one.on_evaluate(self.args, state, control, metrics=found, **others)
        ends, control.should_training_stop = control.should_training_stop, stops
        if ends:
            self._end(turn, control)

    def _metric_of(self, turn: Segment, name: str, metrics: Mapping[str, float]) -> str:
        """The name of the stage's metric; the name that was given, if that is of a stage, or the last one learns."""
        stage = turn.stages[-1] + 1
        if stage == self.partition.num_stages or name in self._names_of_stages:
            return name
        mark = f"_stage_{stage}_"
        return next((one for one in metrics if mark in one and one.replace(mark, "_", 1) == name), "")

    def _best_before(self, turn: Segment, name: str) -> float | None:
        """The best of the turn's evaluations before the one that was logged last."""
        end = turn.start + turn.steps
        logged = [one[name] for one in self.state.log_history if name in one and turn.start < one["step"] <= end][:-1]
        best, worst = (max, -math.inf) if self.args.greater_is_better else (min, math.inf)
        return best((value for value in logged if not math.isnan(value)), default=worst) if logged else None

    def _end(self, turn: Segment, control: TrainerControl) -> None:
        step = self.state.global_step
        spared = turn.start + turn.steps - step
        if spared == 0:
            return
        self._order = self._order.ended(step)
        self.state.max_steps = self._order.total_steps
        name = turn_name(turn)
        self.log({f"{name}{STOPPED}": spared})
        if self.is_world_process_zero():
            whose = name.rstrip("_").replace("_", " ") or "all stages"
            print(f"hf_mmst: early stopping ends the turn of {whose} after step {step}, {spared} steps early")
        if step >= self.state.max_steps:
            control.should_training_stop = True
        else:
            self._renew_rates()
            self._begin_step(step)


def turn_name(turn: Segment) -> str:
    """What the names of numbers of one turn begin with, as in `stage_1_peak_bytes`."""
    return "coupled_" if turn.coupled else "" if len(turn.stages) > 1 else f"stage_{turn.stages[0] + 1}_"
