"""`choose`: of the ways of training that fit in a budget, the one to take."""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

from torch import nn

from ..cut.layers import checkpoints_across
from ..cut.objectives import objective_of
from .costs import cache_bytes, moved_bytes, relative_compute, resting_bytes, sent_bytes, step_of
from .devices import Device
from .operations import Peak
from .plans import HEADROOM, Row
from .simulation import Simulation
from .step_time import predict
from .ways import Way


class Rows:
    """
    The rows of a plan, simulated when they are asked for.

    Args:
        simulation ([`Simulation`]): of the model.
        limit (`int`, *optional*): bytes.
        precision (`str`), speeds ([`Device`], *optional*): what times are predicted for.

    Attributes:
        all (`dict[Way, Row]`): those that were asked for.
    """

    def __init__(self, simulation: Simulation, limit: int | None, precision: str, speeds: Device | None):
        self.simulation, self.limit = simulation, limit
        self._precision, self._speeds = precision, speeds
        self.all: dict[Way, Row] = {}

    def of(self, way: Way, peak: Peak | None = None) -> Row:
        """The row of a way; with the peak of another one, if that is given."""
        if way not in self.all:
            self.all[way] = self._row(way, peak or self.simulation.peak(way))
        return self.all[way]

    def tried(self, way: Way) -> Row:
        """The row of a way, which is not added to the others."""
        return self._row(way, self.simulation.peak(way))

    def fits(self, way: Way) -> bool:
        """Whether a way fits."""
        if self.limit is not None and _held(self.simulation, way) > self.limit:
            return False
        return self.of(way).fits(self.limit)

    def cost(self, way: Way) -> tuple[float, int]:
        """Its time, or else its compute, and what it moves."""
        row = self.of(way)
        return (row.compute if row.prediction is None else row.prediction.seconds), row.moved_bytes

    def _row(self, way: Way, peak: Peak) -> Row:
        simulation, speeds = self.simulation, self._speeds
        whole = peak if way == Way() else self.of(Way()).peak
        step = step_of(simulation, way, peak, whole)
        tokens = simulation.by_layer[0].tokens
        return Row(
            way.name,
            way,
            peak,
            relative_compute(simulation, way, peak, whole),
            resting_bytes=resting_bytes(simulation, way),
            moved_bytes=moved_bytes(simulation, way).total,
            cache_bytes=cache_bytes(simulation, way),
            sent_bytes=sent_bytes(simulation, way, peak).total,
            prediction=None if speeds is None else predict(step, speeds, self._precision, tokens),
        )


def choose(
    rows: Rows,
    numbers: Sequence[int],
    without: Collection[str],
    exact: bool,
    local: bool,
    offloaded: Sequence[Way] = (Way(offload="layers"),),
) -> Way | None:
    """
    The way to take; it and others to compare it with are in `rows` then.

    Args:
        rows ([`Rows`]): to which rows are added.
        numbers (`Sequence[int]`): numbers of stages to try, in ascending order.
        without (`Collection[str]`): settings and orders to leave out.
        exact (`bool`): whether gradients are to be those of end-to-end training; if none of these is chosen, ways with
            stages are in the rows to compare it with.
        local (`bool`): whether stages learn from losses of their own, or from the model's.
        offloaded (`Sequence[Way]`): ways in which all layers are offloaded; the first takes the least.
    """
    simulation, limit = rows.simulation, rows.limit
    for way in _rivals(simulation):
        rows.of(way)
    families = _families(simulation, offloaded[0]) if local else _block_families(simulation)
    able = [family for family in families if not {family.stage_order, *family.settings} & {*without}]
    chosen, least, compared = None, [], []
    if exact and simulation.num_processes > 1 and "offload" in without and "end_to_end" not in without:
        chosen = _offloading(rows, (), without, exact)  # all of the model on each device
    for family in able:
        if chosen is not None or (limit is None and family.activation_checkpointing):
            continue
        if exact and family.num_stages > 1:
            if not family.stage_clipping and not family.activation_checkpointing:
                compared.append(replace(family, num_stages=numbers[-1]))
            continue
        if family.num_stages == 1:
            tight = simulation.num_processes == 1 and exact and limit is not None and not rows.fits(family)
            ways = [replace(family, rests_inputs=True)] if tight else [*offloaded]
            least.append(ways[0])
            chosen = _offloading(rows, ways, without, exact)
            continue
        if limit is not None and _least(family, rows.of(Way()).peak) > limit:
            continue
        ways = [replace(family, num_stages=number) for number in numbers]
        least.append(ways[-1])  # more stages take less
        if rows.fits(ways[-1]) and limit is not None:
            chosen = ways[bisect_left(ways[:-1], True, key=rows.fits)]
    for way in [*compared, *least] if chosen is None else []:  # one of them says what would be needed
        rows.of(way)
    for way in [*rows.all]:
        in_turn = way.stage_order == "sequential"
        if in_turn and (way == chosen or not way.activation_checkpointing):
            rows.of(replace(way, feature_cache="disk"), rows.of(way).peak)  # what is read was computed before
    return chosen


def stage_numbers(num_layers: int) -> list[int]:
    """Numbers of stages that are tried for a model with that many layers."""
    return [number for number in (2, 4, 8, 16, 32, 64) if number < num_layers] + [num_layers]


def _offloading(rows: Rows, families: Sequence[Way], without: Collection[str], plain: bool) -> Way | None:
    """The cheapest way that fits to offload layers, all of them or all but some; if `plain`, or none."""
    simulation, limit = rows.simulation, rows.limit
    ways = [*families]
    if plain:
        ways += [way for way in rows.all if way.num_stages == 1 and way.offload == "none" and not way.lora]
    fitting = [way for way in ways if not {*way.settings} & {*without} - {"offload"} and rows.fits(way)]
    if limit is None or not fitting:
        return None
    recomputes = _checkpoints_layers(simulation) and "activation_checkpointing" not in without
    if simulation.num_processes > 1:  # every layer is in shards
        return min(fitting, key=rows.cost)
    recomputes &= not families[0].rests_inputs  # the host's recomputation would have inputs of resident layers rest
    for recomputed in (False, True) if recomputes else (False,):
        most = _most_resident(rows, replace(min(families, key=rows.cost), activation_checkpointing=recomputed))
        if most is not None:
            fitting.append(most)
    return min(fitting, key=rows.cost)


def _most_resident(rows: Rows, family: Way) -> Way | None:
    """The way with the most resident layers that fits, if there is one with any."""
    layers, limit = rows.simulation.by_layer, rows.limit
    assert limit is not None
    ways = [replace(family, resident_layers=n) for n in range(len(layers))]
    tried: dict[int, Row] = {}  # apart from the others, which are shown

    def fits(n: int) -> bool:
        if n not in tried:
            tried[n] = rows.tried(ways[n])
        return tried[n].fits(limit)

    least = rows.of(replace(family, activation_checkpointing=False)).peak.total

    def number_for(each: float) -> int:
        return max(0, min(len(ways) - 1, int((limit / HEADROOM - least) / each)))

    kept = 0 if family.activation_checkpointing else layers[0].activations
    number = number_for(layers[0].weights + layers[0].gradients + layers[0].states + kept)
    if number > 0 and not fits(number):
        number = number_for((tried[number].peak.total - least) / number)
    while number < len(ways) - 1 and fits(number + 1):
        number += 1
    while number > 0 and not fits(number):
        number -= 1
    if number == 0:
        return None
    rows.all[ways[number]] = tried[number]
    return ways[number]


def _rivals(simulation: Simulation) -> Iterator[Way]:
    yield Way()
    if _checkpoints_layers(simulation):
        yield Way(activation_checkpointing=True)
    layers = [simulation.model.get_submodule(name) for name in simulation.layers]
    linear = any(isinstance(module, nn.Linear) for layer in layers for module in layer.modules())
    # What an adapter is put beside, and what learns as a whole, is known of models with a local loss.
    adapted = any("lora_" in name for name, _ in simulation.model.named_parameters())
    if linear and not adapted and objective_of(simulation.given) is not None and find_spec("peft") is not None:
        yield Way(lora=True)


def _families(simulation: Simulation, offloaded: Way) -> Iterator[Way]:
    """Ways of stage-wise training but for the number of stages, from the least compute to the most."""
    resident = Way(num_stages=2, stage_order="sequential", offload="stages")
    yield Way(num_stages=2)
    yield Way(num_stages=2, stage_clipping=True)
    if len(simulation.ends) == len(simulation.layers):  # single modules are not recomputed one by one
        yield offloaded
    if simulation.num_processes > 1:  # stages are not offloaded then
        return
    yield resident
    if _checkpoints_layers(simulation):
        yield replace(resident, activation_checkpointing=True)


def _block_families(simulation: Simulation) -> Iterator[Way]:
    """The same for stages that learn from the model's loss."""
    in_turn = Way(num_stages=2, stage_order="sequential", stage_objective="model")
    yield in_turn
    if _checkpoints_layers(simulation):
        yield replace(in_turn, activation_checkpointing=True)
    if len(simulation.ends) == len(simulation.layers) and simulation.num_processes == 1:
        yield replace(in_turn, offload="stages")


def _checkpoints_layers(simulation: Simulation) -> bool:
    """Whether activation checkpointing runs each layer by itself."""
    able = getattr(simulation.model, "supports_gradient_checkpointing", False)
    return able and checkpoints_across(simulation.model, simulation.partition(len(simulation.ends))) is None


def _least(way: Way, whole: Peak) -> int:
    """Bytes that a way of training takes whatever the number of stages."""
    if way.offload != "none":
        return 0
    if way.stage_objective == "model":
        return whole.weights
    return whole.weights + whole.states + (0 if way.stage_clipping else whole.states // 2)  # gradients


def _held(simulation: Simulation, way: Way) -> int:
    """Bytes that a resident stage surely takes: what its layers hold when its forward pass ends; 0 for other ways."""
    if way.offload != "stages" or way.activation_checkpointing or way.stage_objective == "model":
        return 0
    held = {layer.name: layer.weights + layer.states + layer.activations for layer in simulation.by_layer}
    return max(sum(held[name] for name in stage) for stage in simulation.partition(way.num_stages).stages)
