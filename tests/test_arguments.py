"""Flags, YAML file, and what is not known."""

from dataclasses import dataclass, field

import pytest

from hf_mmst.arguments import parse_arguments


@dataclass
class Job:
    """Fields of every kind."""

    learning_rate: float = field(default=0.5, metadata={"help": "A number."})
    names: list[str] | None = field(default=None, metadata={"help": "A list."})
    use_cpu: bool = field(default=False, metadata={"help": "A switch."})
    title: str | None = field(default="none", metadata={"help": "A text."})


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "job.yaml"
        path.write_text(text)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 0.1\n", "unknown key learning_rat. Did you mean learning_rate?"),
        ("config: other.yaml\n", "unknown key config"),
        ("- learning_rate\n", "the file holds no mapping"),
        ("learning_rate: fast\n", "invalid float value: 'fast'"),
    ],
)
def test_a_wrong_file_ends_the_program(text, message, yaml, capsys):
    with pytest.raises(SystemExit) as end:
        parse(yaml(text))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learning-rat", "3"], "unknown argument --learning-rat. Did you mean learning_rate?"),
        (["--config", "missing.yaml"], "missing.yaml: there is no such file"),
        (["stray"], "unknown argument stray"),
    ],
)
def test_wrong_flags_end_the_program(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(args)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    found = capsys.readouterr().out
    assert all(f"--{name}" in found for name in ("learning_rate", "names", "use_cpu", "title", "config"))
