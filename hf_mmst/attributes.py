"""An attribute of an object that is another one for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

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
