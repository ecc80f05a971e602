"""`Order`: which stages learn at which optimizer step. Pure integers."""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import accumulate


@dataclass(frozen=True)
class Segment:
    """
    A run of optimizer steps in which the same stages learn: `steps` steps from step `start` on, in lap `lap`.

    Where they are `end_to_end`, they learn from the model's loss alone, end to end.
    """

    lap: int
    stages: tuple[int, ...]
    start: int
    steps: int
    end_to_end: bool = False


@dataclass(frozen=True)
class Order:
    """
    Which stages learn at each optimizer step.

    Args:
        segments (`tuple[Segment, ...]`): in the order of time, without gaps.
    """

    segments: tuple[Segment, ...]
    _ends: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_ends", list(accumulate(segment.steps for segment in self.segments)))

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all stages and laps."""
        return self._ends[-1]

    def index(self, step: int) -> int:
        """Index of the segment that holds optimizer step `step` (from 0); steps after the end are in the last."""
        return min(bisect_right(self._ends, step), len(self.segments) - 1)

    def at(self, step: int) -> Segment:
        """The segment that holds optimizer step `step` (from 0)."""
        return self.segments[self.index(step)]

    def ended(self, step: int) -> "Order":
        """The order in which the turn of optimizer step `step - 1` has ended with it, and the next follow at once."""
        i = self.index(step - 1)
        spared = self._ends[i] - step
        now, later = replace(self.segments[i], steps=self.segments[i].steps - spared), self.segments[i + 1 :]
        return Order((*self.segments[:i], now, *(replace(turn, start=turn.start - spared) for turn in later)))

    @classmethod
    def build(
        cls, stage_order: str, num_stages: int, num_laps: int, total_steps: int, end_to_end_laps: int = 0
    ) -> "Order":
        """
        Share `total_steps` optimizer steps out evenly over the turns of [`turns`]; the last gets the remainder.

        Args:
            stage_order (`str`): `"simultaneous"`, `"sequential"`, `"multi_lap"` or `"end_to_end"`.
            num_stages (`int`): K.
            num_laps (`int`): R; 1 unless the order is `"multi_lap"`.
            total_steps (`int`): optimizer steps over all stages and laps.
            end_to_end_laps (`int`): laps at the end in which all stages learn end to end.

        Raises:
            `ValueError`: if there are fewer steps than turns.
        """
        turns = cls.turns(stage_order, num_stages, num_laps, end_to_end_laps)
        steps, rest = divmod(total_steps, len(turns))
        if steps == 0:
            raise ValueError(
                f"{total_steps} optimizer steps cannot be shared out over {len(turns)} turns of {num_stages} stages in "
                f"{num_laps + end_to_end_laps} laps. Set max_steps to at least {len(turns)}, raise num_train_epochs, "
                "or lower num_laps, end_to_end_laps or num_stages."
            )
        segments = [
            Segment(lap, stages, i * steps, steps, end_to_end) for i, (lap, stages, end_to_end) in enumerate(turns)
        ]
        return cls((*segments[:-1], replace(segments[-1], steps=steps + rest)))

    @staticmethod
    def turns(
        stage_order: str, num_stages: int, num_laps: int, end_to_end_laps: int = 0
    ) -> list[tuple[int, tuple[int, ...], bool]]:
        """The lap, stages and whether they are end_to_end, of each turn; arguments as in [`build`]."""
        everything = tuple(range(num_stages))
        if stage_order == "end_to_end":
            return [(0, everything, True)]
        at_once = stage_order == "simultaneous" or num_stages == 1
        stages = [everything] if at_once else [(stage,) for stage in everything]
        local = [(lap, some, False) for lap in range(num_laps) for some in stages]
        return [*local, *((num_laps + lap, everything, True) for lap in range(end_to_end_laps))]
