"""Context managers in which an attribute of an object has another value."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_NOT_ITS_OWN = object()


@contextlib.contextmanager
def replaced(instance: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context the instance has `value` as its own attribute `name`; afterwards all is as before."""
    before = vars(instance).get(name, _NOT_ITS_OWN)
    setattr(instance, name, value)
    try:
        yield
    finally:
        if before is _NOT_ITS_OWN:
            delattr(instance, name)
        else:
            setattr(instance, name, before)


@contextlib.contextmanager
def not_caching(model: nn.Module) -> Iterator[None]:
    """Within this context a model keeps no keys and values, which a layer that is run again would find."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", False):
                stack.enter_context(replaced(config, "use_cache", False))
        yield
