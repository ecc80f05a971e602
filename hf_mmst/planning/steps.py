"""`Steps`: training steps of a model of fake tensors, each way of training as it runs."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..cut.chosen_tokens import ChosenTokens
from ..cut.copies import copied, tensors_of
from ..cut.hidden_states import hidden_states_of
from ..cut.layers import resting_parameters, tied_parameters
from ..cut.objectives import CLASSES
from ..cut.partition import Partition
from ..cut.probe import LayerProfile
from ..memory.layer_offload import resident_layers
from ..method.engine import Stagewise
from ..method.heads import StageHeads
from ..method.stepping import clip_by_stage, parameters_by_stage, shared_parameters, step_stage
from .fake_memory import FakeLayerOffload, FakeRingStageOffload, FakeStageOffload, fake_layer_offload
from .layer_memory import LayerMemory
from .model_and_batch import with_adapters
from .operations import CountingTracker, Peak
from .traces import Recorder
from .ways import LORA_RANK, Way


class Steps:
    """
    Steps of the model of a [`Simulation`], which makes what is declared here.

    Attributes:
        records (`bool`): whether trackers are [`Recorder`]s.
        tracker ([`CountingTracker`]): of the last step.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    device: str
    dtype: torch.dtype | None
    has_ring: bool
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

    def partition(self, num_stages: int) -> Partition:
        """The cut into stages."""
        raise NotImplementedError

    def step(self, way: Way, stages: Sequence[int]) -> Peak:
        """Peak memory of a step in which these stages learn."""
        if way.lora:
            return self._end_to_end(self._without_data(with_adapters(self.model, LORA_RANK)), way)
        if way.offload == "layers":
            return self._layers_offloaded(way)
        if way.num_stages == 1:
            return self._end_to_end(self.model, way)
        run = self._block if way.stage_objective == "model" else self._stagewise
        return run(self.partition(way.num_stages), stages, way)

    def _end_to_end(self, model: nn.Module, way: Way) -> Peak:
        with self._mode, self._checkpointing(model, way):
            parameters = list(model.parameters())
            optimizer = self._with_states([p for p in parameters if p.requires_grad])
            tracker = self._tracker(model, parameters, optimizer)
            with tracker, self._marked(tracker, model):
                with self._autocast():
                    loss = self._loss(model)
                loss.backward()
                for _ in tracker.tails(model.get_submodule(self.layers[0]).parameters()):
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
                    optimizer.step()
            return self._read(tracker, parameters, optimizer)

    def _stagewise(self, partition: Partition, stages: Sequence[int], way: Way) -> Peak:
        layers = {layer.name: layer for layer in self.profile}
        pooling, mixer = self.heads_like if self.head_layers > 0 else ("mean", None)
        with self._mode, self._checkpointing(self.model, way), contextlib.ExitStack() as stack:
            with torch.device(self.device), _default_dtype(self.model):
                ends = [layers[name] for name in partition.boundaries[:-1]]
                heads = StageHeads(
                    [end.width for end in ends],
                    self.config.num_labels,
                    pooling,
                    maps=[end.is_map for end in ends],
                    kind=self.objective.head,
                )
            last = self.layers[len(self.layers) - self.head_layers :]
            heads.layers = nn.ModuleList(self._without_data(self.model.get_submodule(name)) for name in last)
            heads.mixer = mixer
            engine = Stagewise(self.model, partition, heads)
            shared = parameters_by_stage(self.model, partition, heads)
            common = shared_parameters(self.model, partition, heads)
            everything = [p for own in shared for p in own]
            learned = everything
            if way.offload == "none" and stages[-1] < way.num_stages - 1:
                learned = [*(p for own in shared[: stages[-1] + 1] for p in own), *common]
            optimizer = self._with_states([p for p in learned if p.requires_grad])
            if self.objective.head == "own" and stages[0] > 0:
                for parameter in tied_parameters(self.model, partition.layers):
                    stack.callback(parameter.requires_grad_, parameter.requires_grad)
                    parameter.requires_grad_(False)
            given = self._input_of(engine, stages[0]) if way.feature_cache != "none" and stages[0] > 0 else None
            buffers: list[torch.Tensor] = []
            if way.offload == "stages":
                offload = stack.enter_context(
                    self._offload(FakeRingStageOffload if self.has_ring else FakeStageOffload, partition, optimizer)
                )
                offload.activate(stages)
                buffers = offload.link.buffers
                learning = [*shared[stages[0]]]
                if stages[0] < way.num_stages - 1:
                    learning += common
                learning = [parameter for parameter in learning if parameter.requires_grad]
                for parameter in learning:  # its states have come with an earlier step
                    parameter.grad = torch.empty_like(parameter)
                offload.states.take()
                for parameter in learning:
                    parameter.grad = None
            others = [*buffers, *([] if given is None else given[1:])]
            tracker = self._tracker(self.model, everything, optimizer, others, partition, heads)
            early = way.stage_clipping and len(stages) > 1
            with tracker, self._marked(tracker, self.model, partition):
                with (
                    self._autocast(),
                    engine.step(
                        criterion=self._criterion,
                        weights=[0.3] * partition.num_stages,
                        stages=stages,
                        mask=self.inputs.get("attention_mask"),
                        learned=lambda k, sides: step_stage(optimizer, shared, k, 1.0) if early and not sides else None,
                        given=given,
                        tokens=self.tokens,
                    ) as step,
                ):
                    loss = self._loss(self.model)
                (loss + 0.3 * step.transport).backward()
                del loss, step
                for _ in tracker.tails(shared[0] if len(stages) > 1 and not early else ()):
                    clip_by_stage(tracker.marking(shared), 1.0)
                    optimizer.step()
            return self._read(tracker, everything, optimizer)

    def _block(self, partition: Partition, stages: Sequence[int], way: Way) -> Peak:
        with self._mode, self._checkpointing(self.model, way), contextlib.ExitStack() as stack:
            for parameter in resting_parameters(self.model, partition, stages[0]):
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            parameters = list(self.model.parameters())
            optimizer = self._with_states([p for p in parameters if p.requires_grad])
            engine = Stagewise(self.model, partition, StageHeads([], 0))
            given = self._input_of(engine, stages[0], True) if way.feature_cache != "none" and stages[0] > 0 else None
            if way.offload == "stages":
                stack.enter_context(self._offload(FakeLayerOffload, partition, optimizer)).activate(stages)
            tracker = self._tracker(self.model, parameters, optimizer, () if given is None else given[1:], partition)
            step = engine.step(self._criterion, [0.3] * way.num_stages, stages, given=given, to_the_end=True)
            with tracker, self._marked(tracker, self.model, partition):
                with self._autocast(), step as found:
                    loss = self._loss(self.model)
                (loss + 0.3 * found.transport).backward()
                del loss, found, step
                tracker.mark(None)
                optimizer.step()
            return self._read(tracker, parameters, optimizer)

    def _layers_offloaded(self, way: Way) -> Peak:
        partition, resident = Partition((tuple(self.layers),)), resident_layers(self.layers, way.resident_layers)
        with self._mode, self._checkpointing(self.model, way), contextlib.ExitStack() as stack:
            parameters = list(self.model.parameters())
            optimizer = self._with_states([p for p in parameters if p.requires_grad])
            made = fake_layer_offload(way, self.has_ring, self.dtype)
            offload = stack.enter_context(self._offload(made, partition, optimizer, resident))
            tracker = self._tracker(self.model, parameters, optimizer, offload.link.buffers)
            offload.on_step = lambda name: tracker.mark(self.layers.index(name))
            with tracker, self._marked(tracker, self.model):
                with self._autocast():
                    loss = self._loss(self.model)
                loss.backward()
                del loss
                tracker.mark(None)
                offload.settle()
                if not self.has_ring or way.offloaded_step == "device":  # otherwise the step is in other memory
                    offload.step(optimizer)
                    tracker.mark(None)
                    optimizer.step()
            return self._read(tracker, parameters, optimizer)

    @contextlib.contextmanager
    def _offload(
        self, kind: Any, partition: Partition, optimizer: torch.optim.Optimizer, resident: Sequence[str] = ()
    ) -> Iterator[Any]:
        """Offloading of the simulated model, with all layers and optimizer states at rest to begin with."""
        before = {parameter: parameter.data for parameter in self.model.parameters()}
        offload = kind(self.model, partition, torch.device(self.device), "", resident)
        offload.watch(optimizer)
        offload.rest()
        try:
            with offload.streaming():
                yield offload
        finally:
            for parameter, data in before.items():
                parameter.data = data

    def _tracker(
        self,
        model: nn.Module,
        weights: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        others: Iterable[torch.Tensor] = (),
        partition: Partition | None = None,
        heads: Iterable[nn.Module] = (),
    ) -> CountingTracker:
        """A tracker that knows what is in memory when a step begins."""
        inputs = [value for value in self.inputs.values() if torch.is_tensor(value)]
        tracker = self.tracker = Recorder(self.device) if self.records else CountingTracker()
        stages = [[name] for name in self.layers] if partition is None else partition.stages
        modules = [[model.get_submodule(name) for name in names] for names in stages]
        for own, head in zip(modules, heads, strict=False):
            own.append(head)
        tracker.track_units([[t for m in own for t in tensors_of(m)] for own in modules], optimizer)
        states = [value for state in optimizer.state.values() for value in state.values()]
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
        try:
            outputs = model(**self.inputs)
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


@contextlib.contextmanager
def _default_dtype(model: nn.Module) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
