"""The turns in which stages learn: their steps, what ends one early, and which model counts as the best."""

import contextlib
import copy
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from ..config import MMSTConfig
from ..method.order import Order, Segment

STOPPED = "stopped_early"  # ends the names under which it is logged, whence it is known when a run is resumed


class Turns:
    """
    The turns of a run.

    The model's own metric says nothing of a stage that learns before the last one. So an
    [`~transformers.EarlyStoppingCallback`] judges the stage that learns, by that stage's metric and since its turn has
    begun; it ends that turn, and the next one begins. Other callbacks that stop the training do so. The best model is
    that of the best evaluation, by the model's own metric, since the last stage has begun to learn. Where stages learn
    from the model's loss, its own metric counts from the beginning, for both.

    Args:
        args ([`MMSTConfig`]): the settings of the run.
        num_stages (`int`): K.

    Attributes:
        order ([`Order`]): which stages learn at which optimizer step; all at once until a run begins.
        now ([`Segment`]): the turn that is under way in this process.
    """

    def __init__(self, args: MMSTConfig, num_stages: int):
        self._args, self._num_stages = args, num_stages
        self.order = Order.build("simultaneous", num_stages, 1, 1)
        self.now = self.order.at(0)
        self._full_steps = 1  # of a run in which no turn ends early
        self._stoppers: tuple[EarlyStoppingCallback, ...] = ()

    @property
    def are_several(self) -> bool:
        """Whether there is more than one turn."""
        return len(self.order.segments) > 1

    def plan(self, epochs: int, steps_per_epoch: int, samples: int, max_steps: int) -> tuple[int, int, int]:
        """
        Fix the order of training for a run of that length: `num_train_epochs` is what every stage gets, or, where they
        learn from the model's loss, all of them together.

        Returns:
            `tuple[int, int, int]`: epochs, samples and optimizer steps over all stages and laps.
        """
        args = self._args
        order = args.order, self._num_stages, args.num_laps
        if args.max_steps <= 0 and args.stage_objective == "local":
            laps = args.num_laps + args.end_to_end_laps
            turns = len(Order.turns(*order, args.end_to_end_laps))
            max_steps, samples = max_steps * turns // laps, samples * turns // laps
            epochs = -(-max_steps // steps_per_epoch)
        self.order = Order.build(*order, max_steps, args.end_to_end_laps)
        return epochs, samples, max_steps

    def restore(self, state: TrainerState, max_steps: int) -> None:
        """Take up the turns that had ended early, which the log of a resumed run says."""
        self._full_steps = max_steps
        if self.are_several:
            for entry in state.log_history:
                if any(name.endswith(STOPPED) for name in entry):
                    self.order = self.order.ended(entry["step"])
            state.max_steps = self.order.total_steps

    def samples_taken(self, planned: int, state: TrainerState) -> float:
        """The number of samples that are trained on, where turns end early, of those that were planned."""
        return planned * state.max_steps / self._full_steps

    def model_counts(self, step: int) -> bool:
        """Whether the model's own metric counts after `step` optimizer steps: once the last stage has begun."""
        if self._args.stage_objective == "model":
            return True
        begun = self.order.segments[: self.order.index(step - 1) + 1]
        return any(self._num_stages - 1 in turn.stages for turn in begun)

    @contextlib.contextmanager
    def without_stoppers(self, callbacks: list[Any], is_in_train: bool) -> Iterator[None]:
        """Within this context early stopping is not among `callbacks`; [`judge`] asks it."""
        found = [(i, one) for i, one in enumerate(callbacks) if isinstance(one, EarlyStoppingCallback)]
        if not is_in_train or not self.are_several or not found:
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

    def judge(
        self,
        control: TrainerControl,
        state: TrainerState,
        metrics: Mapping[str, float],
        of_stages: Collection[str],
        **others: Any,
    ) -> Segment | None:
        """
        Ask early stopping as if the stage that learns were the model, and its turn the training.

        Args:
            control, state, metrics, others: as callbacks get them after an evaluation.
            of_stages (`Collection[str]`): names of metrics that are those of stages.

        Returns:
            [`Segment`], *optional*: the turn, if it is to end.
        """
        if not self._stoppers:
            return None
        turn = self.order.at(state.global_step - 1)
        name = self._args.metric_for_best_model or ""
        name = name if name.startswith("eval_") else f"eval_{name}"
        judged, seen = self._metric_of(turn, name, metrics, of_stages), copy.copy(state)
        seen.best_metric = self._best_before(turn, judged, state)
        found = {name: metrics[judged]} if judged in metrics else {}
        stops, control.should_training_stop = control.should_training_stop, False
        for one in self._stoppers:
            one.on_evaluate(self._args, seen, control, metrics=found, **others)
        ends, control.should_training_stop = control.should_training_stop, stops
        return turn if ends else None

    def _metric_of(self, turn: Segment, name: str, metrics: Mapping[str, float], of_stages: Collection[str]) -> str:
        """The name of the stage's metric, or the given one, if that is of a stage, or the model's own counts."""
        stage = turn.stages[-1] + 1
        if stage == self._num_stages or name in of_stages or self._args.stage_objective == "model":
            return name
        mark = f"_stage_{stage}_"
        return next((one for one in metrics if mark in one and one.replace(mark, "_", 1) == name), "")

    def _best_before(self, turn: Segment, name: str, state: TrainerState) -> float | None:
        """The best of the turn's evaluations before the one that was logged last."""
        end = turn.start + turn.steps
        logged = [one[name] for one in state.log_history if name in one and turn.start < one["step"] <= end][:-1]
        best, worst = (max, -math.inf) if self._args.greater_is_better else (min, math.inf)
        return best((value for value in logged if not math.isnan(value)), default=worst) if logged else None

    def end(self, turn: Segment, state: TrainerState) -> int:
        """End `turn` with the step that was taken last; returns the number of steps that are spared."""
        spared = turn.start + turn.steps - state.global_step
        if spared > 0:
            self.order = self.order.ended(state.global_step)
            state.max_steps = self.order.total_steps
        return spared


def turn_name(turn: Segment) -> str:
    """What the names of numbers of one turn begin with, as in `stage_1_peak_bytes`."""
    return "end_to_end_" if turn.end_to_end else "" if len(turn.stages) > 1 else f"stage_{turn.stages[0] + 1}_"
