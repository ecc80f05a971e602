"""`Recorder`, `composed`: a step of a model of few layers, operator by operator, and what it is with more of them."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .operations import CountingTracker, Operations, Peak, Values

Unit = int | None  # a layer, or where there are stages a stage; None is what is around them


@dataclass
class Call:
    """
    An operator that has run.

    Attributes:
        func: the operator; `None` if none did, but memory was freed.
        held (`dict`): by how many bytes more is held than before, by the unit in which they were allocated.
    """

    func: Any
    held: dict[Unit, int]

    @property
    def total(self) -> int:
        """Of all units."""
        return sum(self.held.values())


@dataclass
class Group:
    """
    What runs of a unit in one go.

    Attributes:
        operations (`list[int]`): what that computes, as counted by [`Operations`].
    """

    unit: Unit
    calls: list[Call] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)

    def does_as(self, other: "Group") -> bool:
        """Whether it is the same, wherever what is freed comes from."""
        one, two = ([(call.func, call.total) for call in group.calls] for group in (self, other))
        return one == two and self.operations == other.operations


class Recorder(CountingTracker):
    """
    A tracker that records what is held after each operator, and of which unit that is.

    Args:
        device (`str`): where tensors are counted.

    Attributes:
        groups (`list[Group]`): of the step, until its end begins.
        ends (`list[list[Group]]`): of its end with all gradients, and of one without those of one unit: what runs over
            all parameters at once, as clipping does, takes bytes for each.
        start (`dict`): bytes at the beginning, by unit.
        weights (`dict`), states (`dict`): bytes of them, by unit.
    """

    def __init__(self, device: str):
        super().__init__()
        self._device = torch.device(device)
        self._units: dict[int, int] = {}  # of tensors, by their ids
        self._unit: Unit = None  # that runs
        self._before: Group | None = None  # the one that another has just followed
        self._more: dict[Unit, int] = {}  # bytes that are held since the last call, by the unit that allocated them
        self.groups: list[Group] = []
        self.ends: list[list[Group]] = []
        self.start: dict[Unit, int] = {}
        self.weights: dict[Unit, int] = {}
        self.states: dict[Unit, int] = {}

    def __enter__(self):
        self.start, self._more, self._unit = self._more, {}, None
        self._into = self.groups
        self._begin(None)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._end()

    def note(self, func: Any) -> None:
        more = {unit: size for unit, size in self._more.items() if size}
        into, self._more = self._into[-1], {}
        if not into.calls and self._before is not None:  # what those before held until now
            late = {unit: more.pop(unit) for unit in [*more] if unit != into.unit and more[unit] < 0}
            if late:
                self._before.calls.append(Call(None, late))
        into.calls.append(Call(func, more))

    def mark(self, unit: Unit) -> None:
        if self._into[-1].unit != unit:
            self._end()
            before = self._into[-1]
            self._begin(unit)
            self._before = before

    def marking(self, by_unit: Iterable[Values]) -> Iterator[Values]:
        for unit, values in enumerate(by_unit):
            self.mark(unit)
            yield values
        self.mark(None)

    def tails(self, one: Iterable[torch.Tensor]) -> Iterator[None]:
        """The end of the step, and another one without the gradients of one unit; they are held nevertheless."""
        self._begin_end()
        yield
        gradients = {parameter: parameter.grad for parameter in one}
        for parameter in gradients:
            parameter.grad = None
        self._begin_end()
        if gradients:
            yield
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def track_units(self, units: Iterable[Iterable[torch.Tensor]], optimizer: torch.optim.Optimizer) -> None:
        for unit, tensors in enumerate(units):
            self._unit = unit
            for tensor in tensors:
                self._units[id(tensor)] = unit
                self.track_external(tensor, *optimizer.state.get(tensor, {}).values())
        self._unit = None

    def count_held(self, weights: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        weights = [*weights]
        for weight in weights:
            unit = self._units.get(id(weight))
            self.weights[unit] = self.weights.get(unit, 0) + weight.untyped_storage().nbytes()
        for weight, values in optimizer.state.items():
            unit = self._units.get(id(weight))
            of = sum(value.untyped_storage().nbytes() for value in values.values())
            self.states[unit] = self.states.get(unit, 0) + of
        return super().count_held(weights, optimizer)

    def _update_snap(self, u_type: Any, winfo: Any, *args: Any, **kwargs: Any) -> None:
        """PyTorch's tracker has seen a storage that is new, another one's end, or that it has another size."""
        before = self._curr_mem_snap.get(self._device, {}).get("Total", 0)
        super()._update_snap(u_type, winfo, *args, **kwargs)
        after = self._curr_mem_snap.get(self._device, {}).get("Total", 0)
        unit = vars(winfo).setdefault("unit", self._unit)
        self._more[unit] = self._more.get(unit, 0) + after - before

    def _begin(self, unit: Unit) -> None:
        self._into.append(Group(unit))
        self._unit, self._before, self._counted = unit, None, self._counts()

    def _end(self) -> None:
        group = self._into[-1]
        group.operations = [now - before for now, before in zip(self._counts(), self._counted, strict=True)]
        if self._more:
            group.calls.append(Call(None, self._more))
            self._more = {}

    def _begin_end(self) -> None:
        self._end()
        self.ends.append([])
        self._into = self.ends[-1]
        self._begin(None)

    def _counts(self) -> list[int]:
        of = self.operations
        return [*of.flops.values(), *of.nbytes.values(), *of.made.values()]


def composed(found: Recorder, roles: Sequence[Hashable], wanted: Sequence[Hashable]) -> Peak | None:
    """
    The peak of a step of other units than those that were recorded, in which units of the same role do the same.

    Args:
        found ([`Recorder`]): of the step that was simulated.
        roles (`Sequence`): of its units.
        wanted (`Sequence`): those of the units of the other step.

    Returns:
        `Peak`: `None` if units of the same role did not do the same.
    """
    try:
        return _Composition(found, roles, wanted).peak()
    except _NotTheSameError:
        return None


class _NotTheSameError(Exception):
    """Units of the same role do other things."""


class _Composition:
    def __init__(self, found: Recorder, roles: Sequence[Hashable], wanted: Sequence[Hashable]):
        self._found = found
        self._of_role: dict[Hashable, list[int]] = {}
        for unit, role in enumerate(roles):
            self._of_role.setdefault(role, []).append(unit)
        self._first = [self._of_role[role][0] for role in roles]
        self._units = [self._of_role[role][0] for role in wanted]
        self._more = len(wanted) - len(roles)
        numbers = Counter(wanted)
        self._several = [(units, numbers[role] - len(units)) for role, units in self._of_role.items() if len(units) > 1]

    def peak(self) -> Peak:
        groups = self._grouped(self._found.groups)
        if self._found.ends:
            end, without = map(self._grouped, self._found.ends)
            groups += self._lengthened(end, without) if without[-1].calls else end
        held = most = self._total(self._found.start)
        for group in groups:
            for call in group.calls:
                held += call.total
                most = max(most, held)
        operations = Operations()
        counts = [sum(of) for of in zip(*(group.operations for group in groups), strict=True)]
        operations.flops = dict(zip(operations.flops, counts[:2], strict=True))
        operations.nbytes = dict(zip(operations.nbytes, counts[2:4], strict=True))
        operations.made = dict(zip(operations.made, counts[4:], strict=True))
        return Peak(self._total(self._found.weights), self._total(self._found.states), most, operations)

    def _total(self, by_unit: dict[Unit, int]) -> int:
        return by_unit.get(None, 0) + sum(by_unit.get(unit, 0) for unit in self._units)

    def _grouped(self, groups: Sequence[Group]) -> list[Group]:
        """Groups of all units, in their order."""
        made: list[Group] = []
        for run in _runs(groups):
            if None in run:
                made.append(self._of_all(run[None]))
                continue
            for unit, group in run.items():
                first = self._first[unit]  # type: ignore[index]
                if first not in run or not group.does_as(run[first]):
                    raise _NotTheSameError
            ascending = [*run] == sorted(run)  # type: ignore[type-var]
            once = {unit for unit in run if [unit] in self._of_role.values()}
            run = {unit: self._of_all(group) if unit in once else group for unit, group in run.items()}
            made += [run[unit] for unit in (self._units if ascending else reversed(self._units)) if unit in run]
        return made

    def _of_all(self, group: Group) -> Group:
        """A group in which what all units of a role have left is freed: it is more where there are more of them."""
        calls = []
        for call in group.calls:
            held = {**call.held}
            for units, more in self._several:
                sizes = {call.held.get(unit, 0) for unit in units}
                if len(sizes) == 1:
                    held[units[0]] = held.get(units[0], 0) + more * sizes.pop()
            calls.append(Call(call.func, held))
        return Group(group.unit, calls, group.operations)

    def _lengthened(self, end: Sequence[Group], without: Sequence[Group]) -> list[Group]:
        """The end of a step with the gradients of more units than there were, by what one of them takes."""
        others = iter([group for group in without if group.unit is None])
        return [self._longer(group, next(others)) if group.unit is None else group for group in end]

    def _longer(self, group: Group, other: Group) -> Group:
        if [call.func for call in group.calls] != [call.func for call in other.calls]:
            raise _NotTheSameError
        calls = [
            Call(one.func, {None: one.total + self._more * (one.total - two.total)})
            for one, two in zip(group.calls, other.calls, strict=True)
        ]
        counts = zip(group.operations, other.operations, strict=True)
        return Group(None, calls, [one + self._more * (one - two) for one, two in counts])


def _runs(groups: Iterable[Group]) -> Iterator[dict[Unit, Group]]:
    """Groups as they follow one another: upwards through the units, downwards, or around them."""
    run: list[Group] = []
    for group in groups:
        units = [one.unit for one in run] + [group.unit]
        if run and (None in units or units not in (sorted(units), sorted(units, reverse=True))):  # type: ignore[type-var]
            yield {one.unit: one for one in run}
            run = []
        run.append(group)
    yield {one.unit: one for one in run}
