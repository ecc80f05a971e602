"""Command line and YAML file -> dataclasses; flags override the file, and what is not known is an error."""

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(
    *types: type,
    args: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple:
    """
    Parse `--field value` flags and `--config FILE.yaml` into one instance of each dataclass.

    A value of the file is read as the flag with that value would be, so `learning_rate: 1e-4` is a number; `null`
    leaves the default, a mapping is passed as JSON. Unknown keys and flags end the program with exit code 2.

    Args:
        types (`type`): dataclasses, such as [`MMSTConfig`].
        args (`Sequence[str]`, *optional*): the command line; `sys.argv[1:]` by default.
        description (`str`, *optional*): what `--help` begins with.
        defaults (`Mapping[str, Any]`, *optional*): defaults of fields that go before those of the dataclasses.

    Returns:
        `tuple`: an instance of each of `types`.
    """
    parser = HfArgumentParser(types, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with values of these flags; flags override it.")
    parser.set_defaults(**defaults or {})
    given = list(sys.argv[1:] if args is None else args)
    config = _config_of(given)
    flags = [*_flags(parser, config), *given] if config else given
    *parsed, rest, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    del rest  # the value of --config
    for flag in unknown:
        parser.error(f"unknown argument {flag}{_nearest(parser, flag)}")
    return tuple(parsed)


def _config_of(args: Sequence[str]) -> str | None:
    """The value of `--config`, which has to be known before the rest can be parsed."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config")
    return only.parse_known_args(args)[0].config


def _flags(parser: HfArgumentParser, config: str) -> list[str]:
    """The YAML file as flags."""
    path = Path(config)
    if not path.is_file():
        parser.error(f"--config {config}: there is no such file. Pass the path of a YAML file, or leave it out.")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        parser.error(f"--config {config}: the file holds no mapping. Write one `field: value` a line.")
    known = {action.dest for action in parser._actions}
    flags: list[str] = []
    for key, value in content.items():
        if key not in known or key in ("help", "config"):
            parser.error(f"{config}: unknown key {key}{_nearest(parser, str(key))}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{key}", *(str(one) for one in values)]
    return flags


def _nearest(parser: HfArgumentParser, name: str) -> str:
    known = [action.dest for action in parser._actions]
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f". Did you mean {near[0]}?" if near else ""
