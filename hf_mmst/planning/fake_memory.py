"""Stand-ins for memory in a simulation: layers at rest that take no memory."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..memory.layer_offload import LayerOffload
from ..memory.micro_batches import MicroBatches
from ..memory.ring import Streams
from ..memory.slabs import Slab
from ..memory.stage_offload import StageOffload
from .ways import Way


def fake_layer_offload(way: Way, has_ring: bool, dtype: torch.dtype | None) -> Callable[..., LayerOffload]:
    """What offloads layers in a simulation as it does in a run by `way`, under autocast to `dtype`."""
    return functools.partial(
        FakeRingLayerOffload if has_ring else FakeLayerOffload,
        rests_inputs=way.rests_inputs,
        samples=way.layer_batch_size,
        steps_on_device=way.offloaded_step == "device",
        half=dtype if dtype == torch.bfloat16 else None,
    )


class _FakeSlab(Slab):
    """A slab whose tensors take no memory; those that are taken do, also on a CPU, where they are mapped in."""

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device, folder: str):
        alike = {(tensor.shape, tensor.dtype): tensor for tensor in tensors}
        made = {kind: tensor.new_empty(()).expand(tensor.shape) for kind, tensor in alike.items()}
        self.tensors = [made[tensor.shape, tensor.dtype] for tensor in tensors]
        self.memory = torch.empty((), dtype=torch.uint8, device=device).expand(self._lay_out(tensors))

    def take(self, device: torch.device) -> list[torch.Tensor]:
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in self.tensors]

    def put(self, tensors: Sequence[torch.Tensor]) -> None: ...

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        return True

    def let_go(self) -> None: ...


class _Untried(MicroBatches):
    """Samples pass a layer a few at a time, without a trial, which needs data."""

    def _try(self, on: Any) -> None: ...


class _NoStreams(Streams):
    """Streams that copy nothing."""

    def __init__(self): ...

    def copy(self, way: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Any:
        return _Ended()

    def mark(self) -> Any: ...

    def wait(self, event: Any) -> None: ...


class _Ended:
    def synchronize(self): ...


class FakeStageOffload(StageOffload):
    """Offloading without a ring, as on a CPU."""

    slab = _FakeSlab
    streams_of: Any = staticmethod(lambda _: None)


class FakeRingStageOffload(FakeStageOffload):
    """Offloading with a ring, as on a GPU, wherever it is simulated."""

    streams_of: Any = staticmethod(lambda _: _NoStreams())


class FakeLayerOffload(LayerOffload):
    """As [`FakeStageOffload`]."""

    slab = _FakeSlab
    micro_batches = _Untried
    streams_of: Any = staticmethod(lambda _: None)
    on_step: Callable[[str], None] = staticmethod(lambda _: None)  # is told which layer steps

    def _step(self, name: str, optimizer: Any, gradients: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        self.on_step(name)
        super()._step(name, optimizer, gradients)


class FakeRingLayerOffload(FakeLayerOffload):
    """As [`FakeRingStageOffload`]."""

    streams_of: Any = staticmethod(lambda _: _NoStreams())
