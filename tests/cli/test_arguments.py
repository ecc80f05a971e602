"""Flags, YAML file, and what is not known."""

import json
from dataclasses import dataclass, field

import pytest

from hf_mmst.cli.arguments import parse_arguments


@dataclass
class Job:
    """Fields of every kind."""

    learning_rate: float = field(default=0.5, metadata={"help": "A number."})
    names: list[str] | None = field(default=None, metadata={"help": "A list."})
    use_cpu: bool = field(default=False, metadata={"help": "A switch."})
    title: str | None = field(default="none", metadata={"help": "A text."})
    settings: str = field(default="{}", metadata={"help": "A mapping."})

    def __post_init__(self):
        json.loads(self.settings)


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(path)]

    return write


def parse(args, **kwargs):
    return parse_arguments(Job, args=args, **kwargs)[0]


def test_the_file_gives_values_as_flags_would(yaml):
    job = parse(yaml("learning_rate: 1e-4\nnames: [a, b]\nuse_cpu: true\ntitle: null\n"))
    assert job == Job(1e-4, ["a", "b"], True, "none")


def test_flags_override_the_file_and_the_file_the_recipes_defaults(yaml):
    config = yaml("learning_rate: 0.1\n")
    assert parse([*config, "--learning_rate", "0.2"], defaults={"learning_rate": 0.3}).learning_rate == 0.2
    assert parse(config, defaults={"learning_rate": 0.3}).learning_rate == 0.1
    assert parse([], defaults={"learning_rate": 0.3}).learning_rate == 0.3


def test_the_text_of_a_value_counts_not_what_yaml_makes_of_it(yaml):
    assert parse(yaml("title: no\n")).title == "no"
    assert parse(yaml("title: 1:30\n")).title == "1:30"
    assert parse(yaml("title: --names\n")).title == "--names"
    assert parse(yaml("title: ''\n")).title == ""
    assert parse(yaml("title: {a: 1}\n")).title == '{"a": 1}'


def ended(capsys, args):
    """What is said, in a single line, where the program ends."""
    with pytest.raises(SystemExit) as end:
        parse(args, program="job")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("job: ")
    return line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 0.1\n", "unknown key learning_rat. Did you mean learning_rate?"),
        ("config: other.yaml\n", "unknown key config"),
        ("1: 2\n", "unknown key 1"),
        ("- learning_rate\n", "the file holds no mapping"),
        ("", "the file holds no mapping"),
        ("learning_rate: fast\n", "invalid float value: 'fast'"),
        ("use_cpu: maybe\n", "--use_cpu/--use-cpu: Truthy value expected: got maybe"),
        ("learning_rate: 0.1\n\tuse_cpu: true\n", "line 2, column 1: found character '\\t'"),
        ("learning_rate: 0.1\nlearning_rate: 0.2\n", "line 2, column 1: learning_rate is there twice"),
        ("title: {a: 1, a: 2}\n", "line 1, column 15: a is there twice"),
        ("title: [a, b]\n", "title is a list, ['a', 'b'], but takes one value"),
        ("use_cpu: []\n", "use_cpu is a list, [], but takes one value"),
        ("names: []\n", "names is [], but takes a list of plain values"),
        ("names: [[a]]\n", "names is [['a']], but takes a list of plain values"),
        ("names: [a, --use_cpu]\n", "names is ['a', '--use_cpu'], but takes a list of plain values"),
        ("title: !!set {a}\n", "title is a list, {'a'}, but takes one value"),
        ("title: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        ("names: [a\n", "expected ',' or ']'"),
        ("title: a\n---\ntitle: b\n", "another document"),
        ("? [a]\n: b\n", "unhashable key"),
        (b"title: caf\xe9\n", "this is no text in UTF-8"),
        (b"PK\x03\x04\x00", "this is no text in UTF-8"),
    ],
)
def test_a_wrong_file_ends_the_program(text, message, yaml, capsys):
    assert message in ended(capsys, yaml(text))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learning-rat", "3"], "unknown argument --learning-rat. Did you mean learning_rate?"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--learning_rate"], "expected one argument"),
        (["--config", "missing.yaml"], "missing.yaml: there is no such file"),
        (["--config"], "argument --config: expected one argument"),
        (["--settings", "{a"], "argument --settings: '{a' is not JSON"),
        (["stray"], "unknown argument stray"),
    ],
)
def test_wrong_flags_end_the_program(args, message, capsys):
    assert message in ended(capsys, args)


def test_a_list_of_the_file_ends_with_the_file(yaml, capsys):
    assert "unknown argument stray" in ended(capsys, ["stray", *yaml("names: [a]\n")])


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    found = capsys.readouterr().out
    assert all(f"--{name}" in found for name in ("learning_rate", "names", "use_cpu", "title", "config"))
