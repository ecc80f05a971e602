"""`Simulation`: steps of training on fake tensors, which have no data, to find the peak of device memory."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..cut.chosen_tokens import ChosenTokens
from ..cut.example_inputs import SAMPLES, ExampleInputs
from ..cut.layers import find_layers, run_ends
from ..cut.objectives import CLASSES, objective_of
from ..cut.partition import Partition
from ..cut.probe import LayerProfile, profile_layers
from ..memory.slabs import has_streams
from ..method.first_token import token_mixer
from ..method.heads import head_pooling, num_head_layers
from ..method.own_head import is_of_single_tokens
from .fewer_layers import FewerLayers
from .layer_memory import LayerMemory, memory_by_layer
from .operations import Peak
from .steps import Steps
from .ways import PRECISIONS, Way


class Simulation(Steps):
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
        num_processes (`int`): that share the samples out, of which this is one: `inputs` is its batch. Offloaded layers
            are in shards then, as by FSDP2, and gradients are sent.
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
        num_processes: int = 1,
    ):
        self.num_processes = num_processes
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
        self._labels = tensors.get("labels")
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
    def profile(self) -> list[LayerProfile]:  # type: ignore[override]
        """What each layer costs and puts out."""
        return profile_layers(self.given, self.layers, self.example)

    @functools.cached_property
    def head_layers(self) -> int:  # type: ignore[override]
        """Number of layers of the auxiliary heads."""
        widths, blocks = [layer.width for layer in self.profile], len(self.ends) == len(self.layers)
        return num_head_layers(self._head_layers, self.given, widths, blocks)

    @functools.cached_property
    def heads_like(self) -> tuple[str, str | None]:  # type: ignore[override]
        """What the auxiliary heads pool, and their mixer, see [`StageHeads`]."""
        last = self.layers[-1], self._samples
        pooling = head_pooling(self._head_pooling, self.objective.head, self.given, *last)
        return pooling, token_mixer(self.given, *last) if pooling == "cls" else None

    @functools.cached_property
    def tokens(self) -> ChosenTokens | None:  # type: ignore[override]
        """Those of the batch whose logits the model's own head makes, if it has data to tell them from others."""
        found = None if self._samples is None else self.objective.tokens(self._labels)
        if found is None or not is_of_single_tokens(self.given, self.layers, cast(ExampleInputs, self._samples)):
            return None
        with self._mode:
            return replace(found, numbers=self._fake(found.numbers))

    def partition(self, num_stages: int) -> Partition:
        """The cut into stages of about equal cost."""
        costs = [layer.flops for layer in self.profile] if num_stages < len(self.ends) else None
        return Partition.by_cost(self.layers, num_stages, costs, self.ends)

    def peak(self, way: Way) -> Peak:
        """
        Peak memory of a training step; if stages learn one at a time, the highest over the stages.

        Of many layers that are alike, a few are simulated, see [`FewerLayers`]; [`simulated_peak`] simulates all.
        """
        turns = self.turns(way)
        return max((self._fewer.peak(way, turn) or self.step(way, turn) for turn in turns), key=lambda peak: peak.total)

    def simulated_peak(self, way: Way) -> Peak:
        """The same, of a simulation of all layers."""
        return max((self.step(way, turn) for turn in self.turns(way)), key=lambda peak: peak.total)

    def turns(self, way: Way) -> list[list[int]]:
        """Stages that learn in the same step; of those that learn in turn, the ones that may take most."""
        if way.num_stages == 1 or way.stage_order == "simultaneous":
            return [[*range(way.num_stages)]]
        layer = self.model.get_submodule
        stages = self.partition(way.num_stages).stages
        weights = [sum(p.nbytes for name in one for p in layer(name).parameters()) for one in stages]
        some = {0, weights.index(max(weights)), way.num_stages - 1}  # the others are alike
        return [[k] for k in sorted(some)]

    @functools.cached_property
    def _fewer(self) -> FewerLayers:
        return FewerLayers(self)

    @functools.cached_property
    def by_layer(self) -> list[LayerMemory]:  # type: ignore[override]
        """What each layer takes, and its activations in end-to-end training."""
        with self._mode:
            return memory_by_layer(self.model, self.layers, self._forward, self.device)

    def _forward(self) -> None:
        with self._autocast():
            self.model(**self.inputs)
