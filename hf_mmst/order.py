"""Number of the optimizer step -> which stages learn at it. Pure integers."""

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(frozen=True)
class Segment:
    """A run of optimizer steps in which the same stages learn: `steps` steps from step `start` on, in lap `lap`."""

    lap: int
    stages: tuple[int, ...]
    start: int
    steps: int


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

    @classmethod
    def build(cls, stage_order: str, num_stages: int, num_laps: int, total_steps: int) -> "Order":
        """
        Share `total_steps` optimizer steps out evenly over laps and stages; the last gets the remainder.

        Args:
            stage_order (`str`): `"simultaneous"`, `"sequential"`, `"multi_lap"` or `"coupled"` (one stage).
            num_stages (`int`): K.
            num_laps (`int`): R; 1 unless the order is `"multi_lap"`.
            total_steps (`int`): optimizer steps over all stages and laps.

        Raises:
            `ValueError`: if there are fewer steps than stages times laps.
        """
        if stage_order in ("simultaneous", "coupled") or num_stages == 1:
            return cls((Segment(0, tuple(range(num_stages)), 0, total_steps),))
        turns = [(lap, stage) for lap in range(num_laps) for stage in range(num_stages)]
        steps, rest = divmod(total_steps, len(turns))
        if steps == 0:
            raise ValueError(
                f"{total_steps} optimizer steps cannot be shared out over {num_stages} stages and {num_laps} laps. "
                f"Set max_steps to at least {len(turns)}, raise num_train_epochs, or lower num_laps or num_stages."
            )
        segments = [Segment(lap, (stage,), i * steps, steps) for i, (lap, stage) in enumerate(turns)]
        last = segments[-1]
        return cls((*segments[:-1], Segment(last.lap, last.stages, last.start, steps + rest)))
