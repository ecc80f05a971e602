"""`Steps`: training steps of a model of fake tensors, each way of training as it runs."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..cut.layers import resting_parameters, tied_parameters
from ..cut.partition import Partition
from ..memory.layer_offload import resident_layers
from ..memory.recomputing import recomputing
from ..method.engine import Stagewise
from ..method.heads import StageHeads
from ..method.stepping import clip_by_stage, parameters_by_stage, shared_parameters, step_stage
from .fake_memory import FakeLayerOffload, FakeRingStageOffload, FakeStageOffload, fake_layer_offload
from .fake_model import FakeModel
from .fake_processes import FakeReduction, one_of_processes, put_in_shards, shard_of
from .model_and_batch import with_adapters
from .operations import Peak
from .ways import LORA_RANK, Way


class Steps(FakeModel):
    """Steps of the model of a [`Simulation`], each way of training as it runs."""

    def partition(self, num_stages: int) -> Partition:
        """The cut into stages."""
        raise NotImplementedError

    def step(self, way: Way, stages: Sequence[int]) -> Peak:
        """Peak memory of a step in which these stages learn."""
        if way.lora:
            return self._end_to_end(self._without_data(with_adapters(self.model, LORA_RANK)), way)
        if way.offload == "layers":
            return self._layers_offloaded(way) if self.num_processes == 1 else self._layers_in_shards()
        if way.num_stages == 1:
            return self._end_to_end(self.model, way)
        run = self._block if way.stage_objective == "model" else self._stagewise
        with one_of_processes(self.num_processes):
            return run(self.partition(way.num_stages), stages, way)

    def _end_to_end(self, model: nn.Module, way: Way) -> Peak:
        with self._mode, self._checkpointing(model, way):
            parameters = list(model.parameters())
            learned = [p for p in parameters if p.requires_grad]
            optimizer = self._with_states(learned)
            # DistributedDataParallel has a copy of all gradients, of which it sends parts.
            sent = {p: torch.empty_like(p) for p in learned} if self.num_processes > 1 else {}
            tracker = self._tracker(model, parameters, optimizer, sent.values(), beside=sent)
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
            reduction = FakeReduction(shared) if self.num_processes > 1 else None

            def learned_by(k: int, sides: bool) -> None:
                if sides:  # what comes late is averaged at the end
                    if self.records and reduction is not None:
                        raise NotImplementedError("gradients of all stages at once")  # all layers are simulated then
                    return
                if reduction is not None:  # the means of a stage are back when the next one has learned
                    reduction.start(k)
                    k -= 1
                if early and k >= 0:
                    if reduction is not None:
                        reduction.wait(k)
                    step_stage(optimizer, shared, k, 1.0)

            with tracker, self._marked(tracker, self.model, partition):
                with (
                    self._autocast(),
                    engine.step(
                        criterion=self._criterion,
                        weights=[0.3] * partition.num_stages,
                        stages=stages,
                        mask=self.inputs.get("attention_mask"),
                        learned=learned_by,
                        given=given,
                        tokens=self.tokens,
                    ) as step,
                ):
                    loss = self._loss(self.model)
                (loss + 0.3 * step.transport).backward()
                del loss, step
                if reduction is not None:
                    reduction.finish()
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
                if self.num_processes > 1:
                    FakeReduction([parameters]).finish()
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

    def _layers_in_shards(self) -> Peak:
        with one_of_processes(self.num_processes), self._mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the run are not the plan's
            model = self._without_data(self.model)
            shards = put_in_shards(model, self.layers, self.device, self.dtype)
            optimizer = self._with_states([shard for shard in shards.values() if shard.requires_grad])
            in_host = self.has_ring  # shards and their gradients are in other memory, where they are stepped
            weights = [] if in_host else [*shards.values()]
            tracker = self._tracker(model, weights, optimizer, beside=shards, in_host=in_host)
            for parameter in shards if in_host else ():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: tracker.leave_out(shard_of(p.grad)))
            with tracker, recomputing(model, self.layers), self._marked(tracker, model):
                with self._autocast():
                    loss = self._loss(model)
                loss.backward()
                del loss
                tracker.mark(None)
                for parameter, shard in shards.items() if not in_host else ():
                    shard.grad = None if parameter.grad is None else shard_of(parameter.grad)
                one = [shards[p] for p in model.get_submodule(self.layers[0]).parameters()]
                for _ in tracker.tails(one) if not in_host else ():
                    torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
                    optimizer.step()
            if in_host:
                optimizer.state.clear()
            return self._read(tracker, weights, optimizer)

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


@contextlib.contextmanager
def _default_dtype(model: nn.Module) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
