"""A model's layers -> the same, compiled one by one, so that stages can still end between them."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn


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
            own = vars(layer).get("forward")
            layer.forward = torch.compile(layer.forward, **kwargs)
            stack.callback(_restore, layer, own)
        yield


def _restore(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward
