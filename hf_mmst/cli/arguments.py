"""Parse a command line and a YAML file into dataclasses: flags override the file, unknown names are errors."""

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from .exit_codes import OneLineParser

NOT_IN_FILES = ("help", "config")  # flags of the command line alone


class _Parser(HfArgumentParser):
    error = OneLineParser.error


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def parse_arguments(
    *types: type,
    args: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    program: str | None = None,
) -> tuple:
    """
    Parse `--field value` flags and `--config FILE.yaml` into one instance of each dataclass.

    A value of the file is read as the flag with that value would be, so `learning_rate: 1e-4` is a number and
    `save_strategy: no` a word; `null` leaves the default, a mapping is passed as JSON. Unknown keys and flags, and
    values of another type, end the program with one line and exit code 2.

    Args:
        types (`type`): dataclasses, such as [`MMSTConfig`].
        args (`Sequence[str]`, *optional*): the command line; `sys.argv[1:]` by default.
        description (`str`, *optional*): what `--help` begins with.
        defaults (`Mapping[str, Any]`, *optional*): defaults of fields that go before those of the dataclasses.
        program (`str`, *optional*): what errors and `--help` call the program; its file's name by default.

    Returns:
        `tuple`: an instance of each of `types`.
    """
    parser = _Parser(types, prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with values of these flags; flags override it.")
    parser.set_defaults(**defaults or {})
    given = list(sys.argv[1:] if args is None else args)
    config = _config_of(given, parser.prog)
    flags = given if config is None else [*_flags(parser, config), f"--config={config}", *given]
    found, unknown = parser.parse_known_args(flags)
    for flag in unknown:
        parser.error(f"unknown argument {flag}{_nearest(parser, flag)}")
    try:
        *parsed, _ = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)  # the last one has --config
    except json.JSONDecodeError as error:
        name = next((name for name, value in vars(found).items() if value == error.doc), "?")
        parser.error(f"argument --{name}: {error.doc!r} is not JSON ({error})")
    return tuple(parsed)


def _config_of(args: Sequence[str], program: str) -> str | None:
    """The value of `--config`, which has to be known before the rest can be parsed."""
    only = OneLineParser(program, add_help=False, allow_abbrev=False)
    only.add_argument("--config")
    return only.parse_known_args(args)[0].config


def _flags(parser: _Parser, config: str) -> list[str]:
    """The YAML file as flags."""

    def refuse(what: object) -> NoReturn:
        parser.error(f"--config {config}: {what}")

    path = Path(config)
    if not path.is_file():
        refuse("there is no such file. Pass the path of a YAML file, or leave it out.")
    try:
        loader = _Loader(path.read_bytes())
        root = loader.get_single_node()
        content = loader.construct_document(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        refuse(f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}. Write one `field: value` a line.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        refuse(f"this is no text in UTF-8 ({error}). Pass a YAML file.")
    if not isinstance(content, dict):
        refuse("the file holds no mapping. Write one `field: value` a line.")
    # What counts of a scalar is its text, as in a flag: YAML reads `no` as false and 1:30 as 90.
    texts = {key.value: value.value for key, value in root.value if isinstance(value, yaml.ScalarNode)}
    actions = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_FILES}
    flags: list[str] = []
    for key, value in content.items():
        if key not in actions:
            refuse(f"unknown key {key}{_nearest(parser, str(key))}")
        if value is None:
            continue
        if isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value, default=str)}")
        elif key in texts:
            flags.append(f"--{key}={texts[key]}")
        elif actions[key].nargs != "+":
            refuse(f"{key} is a list, {value}, but takes one value. Write it without brackets or dashes.")
        elif not value or not all(isinstance(one, str | int | float) and str(one)[:2] != "--" for one in value):
            refuse(f"{key} is {value}, but takes a list of plain values, one at least. Write it as in [a, b].")
        else:
            flags += [f"--{key}", *map(str, value)]
    return flags


def _nearest(parser: _Parser, name: str) -> str:
    known = [action.dest for action in parser._actions if action.dest not in NOT_IN_FILES]
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f". Did you mean {near[0]}?" if near else ""
