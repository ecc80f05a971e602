"""Read files that others may have written: what they hold is checked, and errors name the file and what is wrong."""

import dataclasses
import json
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints, is_typeddict

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def damaged(path: Path, what: object) -> ValueError:
    """The error of a file that does not hold what it should."""
    return ValueError(
        f"{path} is damaged, or was not written by hf_mmst: {what}. Copy it again from where it is whole, or pass "
        "another one."
    )


def read_json(path: Path, kind: Any) -> Any:
    """
    Read a JSON file and check its content against a type.

    Args:
        path (`Path`): the file.
        kind: a `TypedDict`, in which more keys than its own do no harm, or a dataclass, which is made of what the file
            says. Their fields are of these kinds, numbers, strings, `list`, `tuple`, `dict`, `Literal`, `X | None` or
            `Annotated`, with a container that the value must be in.

    Raises:
        `OSError`: if it cannot be read.
        `ValueError`: if it is damaged, saying where.
    """
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")), kind, "")
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def read_tensors(path: Path, like: Mapping[str, torch.Tensor], whose: str) -> dict[str, torch.Tensor]:
    """
    Read a safetensors file, after checking that the names and shapes in its header are those of `like`.

    Args:
        path (`Path`): the file.
        like (`Mapping[str, torch.Tensor]`): such tensors, which need no data.
        whose (`str`): what has tensors like these, for a message.

    Raises:
        `OSError`: if it cannot be read.
        `ValueError`: if it is damaged, or a value is not finite.
    """
    if not path.is_file():
        raise damaged(path, "there is no such file")
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            needed = {name: [*tensor.shape] for name, tensor in like.items()}
            differing = sorted(name for name in found | needed if found.get(name) != needed.get(name))
            if differing:
                has, needs = (of.get(differing[0], "missing") for of in (found, needed))
                more = f", and so on: {listed(differing[1:])}" if differing[1:] else ""
                raise damaged(path, f"{differing[0]} is {has}, in {whose} {needs}{more}")
            tensors = {name: file.get_tensor(name) for name in like}
    except SafetensorError as error:
        raise damaged(path, error) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != like[name].is_floating_point():
            raise damaged(path, f"{name} is {tensor.dtype}")
        if not tensor.float().isfinite().all():
            raise damaged(path, f"{name} has values that are not finite")
    return tensors


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors of a safetensors file. Errors: those of [`read_tensors`]."""
    try:
        with safe_open(path, "pt") as file:
            return {*file.keys()}
    except SafetensorError as error:
        raise damaged(path, error) from error


def load_whole(kind: Any, name: str | os.PathLike, **kwargs: Any) -> Any:
    """
    Load a model with `kind.from_pretrained`; it is an error if weights are missing, which would be random.

    Args:
        kind: a class of transformers.
        name (`str` or `os.PathLike`): a folder, or the name of a model on the Hub.
        kwargs: for `from_pretrained`.

    Raises:
        `ValueError`: if the checkpoint cannot be read, lacks tensors of the model, or has others, or of other shapes.
    """
    kwargs = {"output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
    try:
        model, found = kind.from_pretrained(name, **kwargs)
    except SafetensorError as error:
        raise damaged(Path(name), error) from error
    refuse_others(name, model, found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
    return model


def refuse_others(
    name: str | os.PathLike,
    model: nn.Module,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple] = (),
) -> None:
    """
    Raises:
        `ValueError`: if the tensors of the checkpoint `name` are not those of the model that they were loaded into.
    """
    kinds = {
        "lacks": {*missing} - {*(getattr(model, "_keys_to_ignore_on_save", None) or ())},
        "has, unlike the model,": {*unexpected},
        "has in other shapes": {key for key, *_ in mismatched},
    }
    said = [f"it {what} {listed(sorted(names))}" for what, names in kinds.items() if names]
    if said:
        raise ValueError(
            f"{name} does not hold this model: {'; '.join(said)}. Copy it again from where it is whole, or make the "
            "model as it was made for that run."
        )


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names for a message, the first of them if there are many."""
    names = [*names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _checked(value: Any, kind: Any, where: str) -> Any:
    """`value`, with dataclasses and tuples in the place of objects and lists, if it is of `kind`."""
    origin, members = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:  # X | None
        return None if value is None else _checked(value, members[0], where)
    if origin is Annotated:
        within, value = members[1], _checked(value, members[0], where)
        return value if value in within else _refuse(value, f"from {within[0]} to {within[-1]}", where)
    if origin is Literal:
        return value if value in members else _refuse(value, f"one of {', '.join(members)}", where)
    if origin in (list, tuple):
        return origin(_checked(one, members[0], f"{where}[{i}]") for i, one in enumerate(_plain(value, list, where)))
    if origin is dict:
        return {key: _checked(one, members[1], _at(where, key)) for key, one in _plain(value, dict, where).items()}
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _fields(_plain(value, dict, where), kind, where)
    return _plain(value, kind, where)


def _fields(value: dict[str, Any], kind: Any, where: str) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        needed = kind.__required_keys__
    else:
        needed = {one.name for one in dataclasses.fields(kind) if one.default is dataclasses.MISSING}
        for key in sorted(value.keys() - hints.keys()):
            raise ValueError(f"{_at(where, key)} is not known")
    for key in sorted(needed - value.keys()):
        raise ValueError(f"{_at(where, key)} is missing")
    known = {key: _checked(value[key], hint, _at(where, key)) for key, hint in hints.items() if key in value}
    return value | known if is_typeddict(kind) else kind(**known)


def _plain(value: Any, kind: type, where: str) -> Any:
    if kind is float and type(value) is int and abs(value) < sys.float_info.max:
        return float(value)
    return value if type(value) is kind else _refuse(value, _WORDS[kind], where)


def _refuse(value: Any, expected: str, where: str) -> NoReturn:
    raise ValueError(f"{where or 'it'} is {reprlib.repr(value)}, not {expected}")


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
