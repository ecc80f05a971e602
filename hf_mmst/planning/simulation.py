"""`Simulation`: steps of training on fake tensors, which have no data, to find the peak of device memory."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..cut.copies import copied
from ..cut.example_inputs import SAMPLES, ExampleInputs
from ..cut.layers import find_layers, resting_parameters, run_ends, tied_parameters
from ..cut.objectives import CLASSES, objective_of
from ..cut.partition import Partition
from ..cut.probe import LayerProfile, profile_layers
from ..memory.layer_offload import resident_layers
from ..memory.slabs import has_streams
from ..method.engine import Stagewise
from ..method.first_token import token_mixer
from ..method.heads import StageHeads, head_pooling, num_head_layers
from ..method.stepping import clip_by_stage, parameters_by_stage, shared_parameters, step_stage
from .fake_memory import FakeLayerOffload, FakeRingStageOffload, FakeStageOffload, fake_layer_offload
from .layer_memory import LayerMemory, memory_by_layer
from .model_and_batch import with_adapters
from .operations import CountingTracker, Peak
from .ways import LORA_RANK, PRECISIONS, Way


class Simulation:
    """
    A copy of a model on fake tensors, whose training steps are run to measure the memory that they would take.

    What runs is the model's own forward and backward and this package's own engine, on PyTorch's fake tensors; the
    optimizer is fused AdamW. Kernels' workspaces, the caching allocator's reserve and the device's context come on top.

    Args:
        model (`nn.Module`): the model; on the meta device or any other.
        inputs (`Mapping[str, Any]`): a batch, with labels if the model learns from them; of tensors only shapes count.
        precision (`str`): `"fp32"`, or autocast to `"bf16"` or `"fp16"`.
        device (`str`): where tensors are counted; `"cuda"` only where there is one.
        head_layers (`int`, *optional*), head_pooling (`str`): see [`MMSTConfig`].
        for_gpu (`bool`): whether layers come through a [`Ring`] and step in host memory, as on a GPU, wherever tensors
            are counted.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        precision: str = "fp32",
        device: str = "cpu",
        head_layers: int | None = None,
        head_pooling: str = "auto",
        for_gpu: bool = False,
    ):
        self.device, self.dtype = device, PRECISIONS[precision]
        self.has_ring = for_gpu or has_streams(torch.device(device))
        self.config: Any = getattr(model, "config", None)
        self.objective = objective_of(model) or CLASSES
        self.layers = find_layers(model)
        self.ends = run_ends(model, self.layers)
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        self.num_samples = len(tensors.get("labels", next(iter(tensors.values()))))
        self.given, self.example = model, ExampleInputs.of_batch(model, inputs, self.num_samples)
        self._head_layers, self._head_pooling = head_layers, head_pooling
        has_data = not any(value.is_meta for value in tensors.values())
        few = {name: tensors[name][:SAMPLES] if name in tensors else value for name, value in inputs.items()}
        self._samples = ExampleInputs.of_batch(model, few, SAMPLES) if has_data else None
        self._mode = FakeTensorMode()
        self._states = WeakTensorKeyDictionary()
        self.model = self._without_data(model)
        if getattr(self.config, "use_cache", False):
            cast(Any, self.model.config).use_cache = False  # as in training
        with self._mode:
            self.inputs = {**inputs, **{name: self._fake(value) for name, value in tensors.items()}}
            # On the CPU the batch that the data loader has ready is in the same memory.
            self._ready = [self._fake(value) for value in tensors.values()] if device == "cpu" else []

    @functools.cached_property
    def profile(self) -> list[LayerProfile]:
        """What each layer costs and puts out."""
        return profile_layers(self.given, self.layers, self.example)

    @functools.cached_property
    def head_layers(self) -> int:
        """Number of layers of the auxiliary heads."""
        widths, blocks = [layer.width for layer in self.profile], len(self.ends) == len(self.layers)
        return num_head_layers(self._head_layers, self.given, widths, blocks)

    @functools.cached_property
    def _pooling(self) -> str:
        return head_pooling(self._head_pooling, self.objective.head, self.given, self.layers[-1], self._samples)

    @functools.cached_property
    def _mixer(self) -> str | None:
        """See [`StageHeads`]."""
        return token_mixer(self.given, self.layers[-1], self._samples) if self._pooling == "cls" else None

    def partition(self, num_stages: int) -> Partition:
        """The cut into stages of about equal cost."""
        costs = [layer.flops for layer in self.profile] if num_stages < len(self.ends) else None
        return Partition.by_cost(self.layers, num_stages, costs, self.ends)

    def peak(self, way: Way) -> Peak:
        """Peak memory of a training step; if stages learn one at a time, the highest over the stages."""
        if way.lora:
            return self._end_to_end(self._without_data(with_adapters(self.model, LORA_RANK)), way)
        if way.offload == "layers":
            return self._layers_offloaded(way)
        if way.num_stages == 1:
            return self._end_to_end(self.model, way)
        partition = self.partition(way.num_stages)
        if way.stage_order == "simultaneous":
            return self._stagewise(partition, range(way.num_stages), way)
        layer = self.model.get_submodule
        weights = [sum(p.nbytes for name in one for p in layer(name).parameters()) for one in partition.stages]
        some = {0, weights.index(max(weights)), way.num_stages - 1}  # the others are alike
        turn = self._block if way.stage_objective == "model" else self._stagewise
        return max((turn(partition, [k], way) for k in some), key=lambda peak: peak.total)

    @functools.cached_property
    def by_layer(self) -> list[LayerMemory]:
        """What each layer takes, and its activations in end-to-end training."""
        with self._mode:
            return memory_by_layer(self.model, self.layers, self._forward, self.device)

    def _forward(self) -> None:
        with self._autocast():
            self.model(**self.inputs)

    def _end_to_end(self, model: nn.Module, way: Way) -> Peak:
        with self._mode, self._checkpointing(model, way):
            parameters = list(model.parameters())
            optimizer = self._with_states([p for p in parameters if p.requires_grad])
            tracker = self._tracker(parameters, optimizer)
            with tracker:
                with self._autocast():
                    loss = self._loss(model)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
                optimizer.step()
            return self._read(tracker, parameters, optimizer)

    def _stagewise(self, partition: Partition, stages: Sequence[int], way: Way) -> Peak:
        layers = {layer.name: layer for layer in self.profile}
        pooling, mixer = (self._pooling, self._mixer) if self.head_layers > 0 else ("mean", None)
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
            tracker = self._tracker(everything, optimizer, *buffers, *([] if given is None else given[1:]))
            early = way.stage_clipping and len(stages) > 1
            with tracker:
                with (
                    self._autocast(),
                    engine.step(
                        criterion=self._criterion,
                        weights=[0.3] * partition.num_stages,
                        stages=stages,
                        mask=self.inputs.get("attention_mask"),
                        learned=lambda k, sides: step_stage(optimizer, shared, k, 1.0) if early and not sides else None,
                        given=given,
                    ) as step,
                ):
                    loss = self._loss(self.model)
                (loss + 0.3 * step.transport).backward()
                del loss, step
                clip_by_stage(shared, 1.0)
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
            tracker = self._tracker(parameters, optimizer, *([] if given is None else given[1:]))
            step = engine.step(self._criterion, [0.3] * way.num_stages, stages, given=given, to_the_end=True)
            with tracker:
                with self._autocast(), step as found:
                    loss = self._loss(self.model)
                (loss + 0.3 * found.transport).backward()
                del loss, found, step
                optimizer.step()
            return self._read(tracker, parameters, optimizer)

    def _layers_offloaded(self, way: Way) -> Peak:
        partition, resident = Partition((tuple(self.layers),)), resident_layers(self.layers, way.resident_layers)
        with self._mode, self._checkpointing(self.model, way), contextlib.ExitStack() as stack:
            parameters = list(self.model.parameters())
            optimizer = self._with_states([p for p in parameters if p.requires_grad])
            made = fake_layer_offload(way, self.has_ring, self.dtype)
            offload = stack.enter_context(self._offload(made, partition, optimizer, resident))
            tracker = self._tracker(parameters, optimizer, *offload.link.buffers)
            with tracker:
                with self._autocast():
                    loss = self._loss(self.model)
                loss.backward()
                del loss
                offload.settle()
                if not self.has_ring or way.offloaded_step == "device":  # otherwise the step is in other memory
                    offload.step(optimizer)
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

    def _tracker(self, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, *others: torch.Tensor):
        """A tracker that knows what is in memory when a step begins."""
        states = [value for state in optimizer.state.values() for value in state.values()]
        inputs = [value for value in self.inputs.values() if torch.is_tensor(value)]
        tracker = CountingTracker()
        tracker.track_external(*weights, *self.model.buffers(), *states, *inputs, *self._ready, *others)
        return tracker

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
        return self.objective.loss(logits, self.inputs["labels"], self.config)

    def _read(self, tracker: CountingTracker, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Peak:
        total = tracker.get_tracker_snapshot("peak")[torch.device(self.device)]["Total"]
        for parameter in weights:
            parameter.grad = None
        states = [value for state in optimizer.state.values() for value in state.values()]
        held = [sum(t.untyped_storage().nbytes() for t in group) for group in (weights, states)]
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
