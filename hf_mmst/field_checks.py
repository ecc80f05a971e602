"""Checks of a dataclass's fields: each value is of its annotated type and within its limits, or an error names it."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

Rule = Callable[[str, Any], object]


def check_fields(given: Any, names: Iterable[str] | None = None) -> None:
    """
    Check fields against their types: `bool`, `str`, a `Literal`, each of them or `None`, or `Annotated[type, rule]`.

    Numbers and lists need a rule: a function of name and value that raises for what cannot be.

    Args:
        given: an instance of a dataclass.
        names (`Iterable[str]`, *optional*): all of its fields by default.

    Raises:
        `ValueError`: naming the field, its value, and what to set it to.
    """
    types = get_type_hints(type(given), include_extras=True)
    for name in names if names is not None else [field.name for field in dataclasses.fields(given)]:
        _check(name, getattr(given, name), types[name])


def _check(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) in (Union, UnionType):
        if value is not None:
            (kind,) = (one for one in get_args(kind) if one is not NoneType)
            _check(name, value, kind)
    elif get_origin(kind) is Annotated:
        for rule in kind.__metadata__:
            rule(name, value)
    elif get_origin(kind) is Literal:
        one_of(name, value, get_args(kind))
    elif not isinstance(value, kind):
        choices = "True or False" if kind is bool else "a text"
        raise ValueError(f"{name}={value!r} is not {choices}. Set {name} to {choices}.")


def whole(least: int, hint: str) -> Rule:
    """A whole number of at least `least`."""

    def rule(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name}={value!r} is not a whole number of at least {least}. Set {name} to {least} or more ({hint})."
            )

    return rule


def number(least: float, hint: str) -> Rule:
    """A finite number of at least `least`."""

    def rule(name: str, value: Any) -> None:
        if not _is_number(value) or not least <= value < math.inf:
            raise ValueError(
                f"{name}={value!r} is not a finite number of at least {least}. Set {name} to {least} or more ({hint})."
            )

    return rule


def positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a positive number. Set it to one, or leave it unset.")


def fraction(name: str, value: Any) -> None:
    """A part of a whole, 0 included and 1 not."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is no part of a whole. Set {name} to 0 or more and less than 1, as in 0.2.")


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """One of some words."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known. Set {name} to one of {', '.join(known)}.")


def a_model(name: str, value: Any) -> None:
    """A folder, or what may be a name on the Hub."""
    if not value or not Path(value).is_dir():
        _hub_name(name, value, "a folder")


def a_dataset(name: str, value: Any) -> None:
    """A folder, a file, or what may be a name on the Hub."""
    if not value or not Path(value).exists():
        _hub_name(name, value, "a folder or file")


def _hub_name(name: str, value: Any, other: str) -> None:
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(
            f"{name}={value!r} is neither {other} nor a name on the Hub. Set {name} to one that is there."
        ) from error


def parse_bytes(name: str, value: int | str) -> int:
    """
    A number of bytes, from `4294967296`, `"4GiB"`, `"500 MB"` and the like.

    Raises:
        `ValueError`: if it is none, or not positive, naming the field `name`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", str(value).strip().lower())
    found = int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "kmgt".find(match[2] or "-"))) if match else 0
    if found < 1:
        raise ValueError(f'{name}={value!r} is not a number of bytes. Set {name} to one with a unit, as in "4GiB".')
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def layer_names(name: str, value: Any) -> None:
    """Raise unless a value is a list of names."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(
            f"{name}={value!r} is not a list of layer names. Set it to the qualified name of each "
            'stage\'s last layer, e.g. ["vit.layers.5", "vit.layers.11"], or to None to cut by num_stages.'
        )
