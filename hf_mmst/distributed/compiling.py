"""`torch.compile` for stages: each layer is compiled by itself, so that a stage can still end between two."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn

from ..config import MMSTConfig
from ..cut.temporary_attributes import replaced


def take_compilation(accelerator: Any) -> dict[str, Any] | None:
    """
    Take the compilation of the model out of the accelerator's hands: compiled as a whole, a model would be traced with
    the hooks of one step, and silently leave stages untrained in the next.

    Returns:
        `dict`, *optional*: arguments of [`~torch.compile`], backend and mode among them, if it is switched on.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return None
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
    return plugin.to_kwargs()


def refuse_compilation(args: MMSTConfig, compilation: dict[str, Any]) -> None:
    """
    Refuse settings that cannot be combined with compiled layers.

    Raises:
        `ValueError`: saying what to set.
    """
    if args.offload in (None, "none"):
        return
    if args.end_to_end_laps or args.offload == "layers" or args.stage_objective == "model":
        raise ValueError(
            f'offload="{args.offload}" brings layers to the device while they are recomputed, which cannot be '
            "compiled. Set torch_compile=False (dynamo_backend to no in the accelerate configuration), or "
            'offload="none".'
        )
    if compilation.get("mode") in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            f"The mode {compilation['mode']} of torch.compile needs weights that stay where they are, but with "
            'offload="stages" they move. Set torch_compile_mode to "default" or '
            '"max-autotune-no-cudagraphs", or offload="none".'
        )


@contextlib.contextmanager
def compiled(layers: Iterable[nn.Module], **kwargs: Any) -> Iterator[None]:
    """
    Within this context, the forward passes of `layers` are compiled, each by itself.

    Hooks on the layers stay outside, and names of parameters stay what they are. Layers of one kind share their code.

    Args:
        layers (`Iterable[nn.Module]`): the layers.
        kwargs: of [`~torch.compile`].
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(layer, "forward", torch.compile(layer.forward, **kwargs)))
        yield
