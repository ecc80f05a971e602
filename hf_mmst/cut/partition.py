"""`Partition`: which layers form which stage."""

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Partition:
    """
    A cut of an encoder into stages, as names of layers: it stays valid when the model is saved, wrapped or moved.

    Args:
        stages (`tuple[tuple[str, ...], ...]`):
            For each of the K stages, the qualified names of its layers in the order in which they run.
    """

    stages: tuple[tuple[str, ...], ...]

    @property
    def num_stages(self) -> int:
        """Number of stages K."""
        return len(self.stages)

    @property
    def layers(self) -> tuple[str, ...]:
        """Qualified names of all layers, in order."""
        return tuple(name for stage in self.stages for name in stage)

    @property
    def boundaries(self) -> tuple[str, ...]:
        """Qualified name of each stage's last layer (K names)."""
        return tuple(stage[-1] for stage in self.stages if stage)

    @functools.cached_property
    def stage_of(self) -> dict[str, int]:
        """Number, from 0, of the stage of each layer, by the layer's qualified name."""
        return {name: k for k, stage in enumerate(self.stages) for name in stage}

    @classmethod
    def by_cost(
        cls,
        layers: Sequence[str],
        num_stages: int,
        costs: Sequence[float] | None = None,
        ends: Sequence[str] | None = None,
    ) -> "Partition":
        """
        Cut `layers` into `num_stages` runs of about equal cost: the cut of least sum of squared stage costs.

        Args:
            layers (`Sequence[str]`): names of the layers, in order.
            num_stages (`int`): number of stages K, at most the number of layers.
            costs (`Sequence[float]`, *optional*): positive cost of each layer in any unit; equal by default.
            ends (`Sequence[str]`, *optional*): layers after which a stage may end, see [`run_ends`]; all by default.

        Raises:
            `ValueError`: if there are more stages than layers after which one may end.
        """
        stops = [layers.index(name) + 1 for name in layers if ends is None or name in ends]
        if num_stages > len(stops):
            raise ValueError(
                f"num_stages={num_stages}, but the model has {len(stops)} layers ({layers[0]} .. {layers[-1]}). "
                f"Set num_stages to {len(stops)} or less."
            )
        costs = [1.0] * len(layers) if costs is None else costs
        runs = [float(sum(costs[i:j])) for i, j in zip([0, *stops[:-1]], stops, strict=True)]
        cuts = [stops[number - 1] for number in _balanced_ends(runs, num_stages)]
        return cls(tuple(tuple(layers[i:j]) for i, j in zip([0, *cuts[:-1]], cuts, strict=True)))

    @classmethod
    def by_names(cls, layers: Sequence[str], boundaries: Sequence[str]) -> "Partition":
        """
        Cut `layers` after each of the named ones. The last layer may be left out of `boundaries`.

        Raises:
            `ValueError`: for a name that is no layer (with the nearest one that is), or names out of order.
        """
        for name in boundaries:
            if name not in layers:
                near = difflib.get_close_matches(name, layers, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"stage_boundaries names {name!r}, which is not a layer of the model. Did you mean {near!r}? "
                    f"The layers are {layers[0]} .. {layers[-1]} ({len(layers)})."
                )
        ends = [layers.index(name) + 1 for name in boundaries]
        if ends != sorted(set(ends)):
            raise ValueError(
                f"stage_boundaries={list(boundaries)} are not in the order of the layers. Set each stage's last layer "
                "once, from the input to the output."
            )
        if ends[-1] != len(layers):
            ends.append(len(layers))
        return cls(tuple(tuple(layers[i:j]) for i, j in zip([0, *ends[:-1]], ends, strict=True)))


def _balanced_ends(costs: Sequence[float], num_stages: int) -> list[int]:
    """End index of each stage in the cut of least sum of squared stage costs (dynamic programming)."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(num_stages):
        best = {
            end: min(
                (total + sum(costs[start:end]) ** 2, [*ends, end])
                for start, (total, ends) in best.items()
                if start < end
            )
            for end in range(1, len(costs) + 1)
            if any(start < end for start in best)
        }
    return best[len(costs)][1]
