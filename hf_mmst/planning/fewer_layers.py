"""`FewerLayers`: steps of a model of many layers that are alike, found with a few of them."""

import contextlib
import copy
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..cut.temporary_attributes import replaced
from ..memory.layer_offload import resident_layers
from ..memory.ring import BUFFERS
from .operations import Peak
from .steps import Steps
from .traces import Recorder, composed
from .ways import Way

IN_SHARDS = 2  # layers after one whose backward pass has begun that are being gathered or let go
WORTH = 0.7  # of the layers, at most, so that it pays to simulate fewer


class FewerLayers:
    """
    Peaks of the steps of a simulation, which are those with all of its layers to the byte.

    Layers that are alike (of one class, with the same weights, input, output and saved activations) do the same
    whenever they are in the same place. So a step of few layers is recorded, in which each place is there twice if it
    is there more than once, and what the layers in a place do is repeated. Where layers are not alike, or do not do the
    same in what was recorded, there is no peak, and all have to be simulated.

    Args:
        simulation ([`Steps`]): of all layers.
    """

    def __init__(self, simulation: Steps):
        self._all = simulation
        self._alike: bool | None = None
        self._found: dict[Hashable, Recorder | None] = {}

    def peak(self, way: Way, turn: Sequence[int]) -> Peak | None:
        """The peak of a step in which the stages of this turn learn."""
        if self._all.ends != self._all.layers or (way.offload == "layers" and way.num_stages > 1):
            return None
        together = len(turn) == way.num_stages
        if not together and turn[0] not in (0, way.num_stages - 1):
            return None
        wanted = _roles(self._all, way)
        able = ((some, like) for some, like in self._candidates(way) if _covers(_roles(some, like), wanted))
        some, like = next(able, (None, None))
        if some is None or like is None:
            return None
        last = like.num_stages - 1
        found = self._recorded(some, like, [*range(last + 1)] if together else [last if turn[0] else 0])
        return None if found is None else composed(found, _roles(some, like), wanted)

    def _candidates(self, way: Way) -> Iterator[tuple[Steps, Way]]:
        """Fewer layers, from few to many, with as many stages or resident layers as there may be."""
        for number in range(2, int(WORTH * len(self._all.layers)) + 1):
            some = _first(self._all, number)
            if way.num_stages > 1:
                if way.stage_objective == "local" and some.head_layers > 0:
                    some.heads_like = self._all.heads_like
                yield from ((some, replace(way, num_stages=stages)) for stages in range(2, number + 1))
            elif way.resident_layers:
                yield from ((some, replace(way, resident_layers=resident)) for resident in range(1, number))
            else:
                yield some, way

    def _recorded(self, some: Steps, way: Way, turn: list[int]) -> Recorder | None:
        key = len(some.layers), way, tuple(turn), some.head_layers if way.num_stages > 1 else 0
        if key not in self._found:
            self._found[key] = self._record(some, way, turn)
        return self._found[key]

    def _record(self, some: Steps, way: Way, turn: list[int]) -> Recorder | None:
        if self._alike is None:
            self._alike = _are_alike(self._all)
        if not self._alike:
            return None
        try:
            with _shortened(some.model, self._all.layers, len(some.layers)):
                some.step(way, turn)
        except Exception:  # a model may count on all of its layers
            some.model.zero_grad()
            return None
        return some.tracker if isinstance(some.tracker, Recorder) else None


def _first(simulation: Steps, number: int) -> Steps:
    """The simulation of the first layers, within [`_shortened`]."""
    some = copy.copy(simulation)
    some.layers, some.ends = simulation.layers[:number], simulation.ends[:number]
    some.profile, some.records, some.tokens = simulation.profile[:number], True, simulation.tokens
    return some


def _roles(simulation: Steps, way: Way) -> list[Hashable]:
    """What each unit is: how near it is to an end, and how large it is, or whether it is resident."""
    if way.num_stages > 1:
        near = 2 if way.stage_objective == "model" else 1  # a stage's transport is in the backward pass of the next one
        stages = simulation.partition(way.num_stages).stages
        return [(min(k, near), min(len(stages) - 1 - k, near), len(stage)) for k, stage in enumerate(stages)]
    layers = simulation.layers
    resident = {*resident_layers(layers, way.resident_layers)} if way.offload == "layers" else {*()}
    near = 1
    if way.offload == "layers" and (simulation.has_ring or simulation.num_processes > 1):
        near = BUFFERS + 1 if simulation.num_processes == 1 else IN_SHARDS
    away = [name not in resident for name in layers]
    roles: list[Hashable] = []
    since = 0  # resident layers, whose weights in low precision are freed with the layer after them
    for i, moves in enumerate(away):
        place = (min(sum(away[:i]), near), min(sum(away[i + 1 :]), near)) if moves else ()
        roles.append((i == 0, i == len(layers) - 1, since, place))
        since = 0 if moves or simulation.dtype is None else since + 1
    return roles


def _covers(roles: Sequence[Hashable], wanted: Sequence[Hashable]) -> bool:
    found = Counter(roles)
    return all(found[role] >= min(number, 2) for role, number in Counter(wanted).items())


def _are_alike(simulation: Steps) -> bool:
    """Whether all layers are, and are the whole of a list that can be made shorter."""
    model, names = simulation.model, simulation.layers
    parent = model.get_submodule(names[0].rpartition(".")[0])
    listed = [*parent.children()] == [model.get_submodule(name) for name in names]
    if not isinstance(parent, nn.ModuleList) or not listed or simulation.ends != names:
        return False
    kinds = {_kind(layer) for layer in parent}
    takes = {tuple(value for key, value in vars(layer).items() if key != "name") for layer in simulation.by_layer}
    costs = {tuple(value for key, value in vars(layer).items() if key != "name") for layer in simulation.profile}
    return len(kinds) == len(takes) == len(costs) == 1


def _kind(layer: nn.Module) -> Hashable:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return repr(layer), tuple((name, t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in tensors)


@contextlib.contextmanager
def _shortened(model: nn.Module, layers: Sequence[str], number: int) -> Iterator[None]:
    """Within this context a model has the first of its layers only."""
    parent: Any = model.get_submodule(layers[0].rpartition(".")[0])
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(parent, "_modules", dict([*parent._modules.items()][:number])))
        for config in {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}.values():
            if getattr(config, "num_hidden_layers", None) == len(layers):
                stack.callback(setattr, config, "num_hidden_layers", len(layers))
                config.num_hidden_layers = number
        yield
