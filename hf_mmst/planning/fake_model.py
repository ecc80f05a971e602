"""`FakeModel`: a model and a batch of fake tensors, the loss, and what tracks the memory of a step."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..cut.chosen_tokens import ChosenTokens
from ..cut.copies import copied, tensors_of
from ..cut.hidden_states import hidden_states_of
from ..cut.objectives import CLASSES
from ..cut.partition import Partition
from ..cut.probe import LayerProfile
from ..method.engine import Stagewise
from .layer_memory import LayerMemory
from .operations import CountingTracker, Peak
from .traces import Recorder
from .ways import Way


class FakeModel:
    """
    The model of a [`Simulation`], which makes what is declared here: a batch, its loss, and what tracks a step.

    Attributes:
        records (`bool`): whether trackers are [`Recorder`]s.
        tracker ([`CountingTracker`]): of the last step.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    device: str
    dtype: torch.dtype | None
    has_ring: bool
    num_processes: int = 1
    config: Any
    objective: Any = CLASSES
    layers: list[str]
    ends: list[str]
    by_layer: list[LayerMemory]
    profile: list[LayerProfile]
    head_layers: int
    heads_like: tuple[str, str | None]
    tokens: ChosenTokens | None = None
    records = False
    tracker: CountingTracker
    _mode: FakeTensorMode
    _ready: list[torch.Tensor]
    _states: WeakTensorKeyDictionary

    def _tracker(
        self,
        model: nn.Module,
        weights: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        others: Iterable[torch.Tensor] = (),
        partition: Partition | None = None,
        heads: Iterable[nn.Module] = (),
        beside: Mapping[Any, torch.Tensor] = MappingProxyType({}),
        in_host: bool = False,
    ) -> CountingTracker:
        """
        A tracker that knows what is in memory when a step begins.

        Args:
            beside (`Mapping`): what there is of some parameters beside themselves.
            in_host (`bool`): whether that and the optimizer's states are in other memory.
        """
        inputs = [value for value in self.inputs.values() if torch.is_tensor(value)]
        tracker = self.tracker = Recorder(self.device) if self.records else CountingTracker()
        stages = [[name] for name in self.layers] if partition is None else partition.stages
        modules = [[model.get_submodule(name) for name in names] for names in stages]
        for own, head in zip(modules, heads, strict=False):
            own.append(head)
        states = [value for state in optimizer.state.values() for value in state.values()]
        if in_host:
            tracker.leave_out(*beside.values(), *states)
        own_tensors = [[t for m in own for t in tensors_of(m)] for own in modules]
        own_tensors = [[*own, *(beside[t] for t in own if t in beside)] for own in own_tensors]
        tracker.track_units(own_tensors, optimizer)
        tracker.track_external(*weights, *tensors_of(model), *states, *inputs, *self._ready, *others)
        return tracker

    @contextlib.contextmanager
    def _marked(self, tracker: CountingTracker, model: nn.Module, partition: Partition | None = None) -> Iterator[None]:
        """Within this context a recorder learns whose forward or backward pass begins: that of a layer, or a stage."""
        if not isinstance(tracker, Recorder):
            yield
            return
        units = {name: i for i, name in enumerate(self.layers)} if partition is None else partition.stage_of

        def before(unit: int, *_: Any) -> None:
            tracker.mark(unit)

        def after(unit: int, _module: nn.Module, _args: Any, output: Any) -> None:
            hidden = hidden_states_of(output)
            if hidden.requires_grad:
                hidden.register_hook(functools.partial(before, unit))

        with contextlib.ExitStack() as stack:
            for name, unit in units.items():
                layer = model.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(functools.partial(before, unit), prepend=True).remove)
                stack.callback(layer.register_forward_hook(functools.partial(after, unit)).remove)
            yield

    def _input_of(self, engine: Stagewise, stage: int, end: bool = False) -> tuple[int, torch.Tensor]:
        """The input of a stage, after a step that shows the engine what the layers before it return."""
        with self._autocast(), engine.step(self._criterion, [0.0] * (stage + 1), [stage], to_the_end=end) as step:
            self.model(**self.inputs)
        assert step.features is not None
        return stage, step.features

    def _loss(self, model: nn.Module) -> torch.Tensor:
        inputs = self.inputs
        if (
            self.num_processes > 1 and self.device == "cpu" and not self.has_ring
        ):  # the host copies it from cpu:0 to cpu
            inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
        try:
            outputs = model(**inputs)
            del inputs
        except RuntimeError as error:
            raise ValueError(
                f"The forward pass of {type(model).__name__} depends on data, so that it cannot be followed on tensors "
                f"without data ({error}). It can be trained in stages, but not planned."
            ) from error
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
        if not torch.is_tensor(loss) or loss.dim() > 0:
            raise ValueError(
                f"{type(model).__name__} makes no loss of {', '.join(self.inputs)}, so that it cannot be planned. "
                "Pass a batch with labels, or choose num_stages and stage_order yourself."
            )
        return loss

    def _criterion(self, logits: torch.Tensor) -> torch.Tensor:
        if self.tokens is not None:
            return self.objective.loss_of(self.tokens, logits, self.inputs["labels"])
        return self.objective.loss(logits, self.inputs["labels"], self.config)

    def _read(self, tracker: CountingTracker, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Peak:
        total = tracker.get_tracker_snapshot("peak")[torch.device(self.device)]["Total"]
        for parameter in weights:
            parameter.grad = None
        held = tracker.count_held(weights, optimizer)
        return Peak(held[0], held[1], total, tracker.operations)

    def _with_states(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for parameter in parameters:
            if parameter not in self._states:  # those of the model serve all ways: no step changes them
                first, second = torch.empty_like(parameter), torch.empty_like(parameter)
                self._states[parameter] = {"step": first.new_zeros(()), "exp_avg": first, "exp_avg_sq": second}
            optimizer.state[parameter] = {**self._states[parameter]}
        return optimizer

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def _without_data(self, model: nn.Module) -> nn.Module:
        with self._mode:
            return copied(model, training=True, like=self._fake)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device, dtype=self.dtype)

    @contextlib.contextmanager
    def _checkpointing(self, model: Any, way: Way) -> Iterator[None]:
        if way.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            if way.activation_checkpointing:
                model.activation_checkpointing_disable()
