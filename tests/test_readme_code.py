"""Every block of code in the pages runs, in the order of the page, on small models and data of the names it has."""

import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pushes import TEXTS, tokenizer
from transformers import AutoTokenizer
from zoo import Samples, make

from hf_mmst.cli.command import main

ROOT = Path(__file__).parents[1]
# The README first: its quickstart makes the checkpoint that others read.
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("recipes/*.md")), ROOT / ".github" / "CONTRIBUTING.md"]
BLOCKS = [
    pytest.param(path, *found, id=f"{path.relative_to(ROOT)}-{number}")
    for path in PAGES
    for number, found in enumerate(
        re.findall(r"^```(python|bash)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    )
]
SHORT = ["--max_steps", "4", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu"]
TRIALS = ["--num_trials", "1", "--trial_steps", "4", "--num_stages", "2"]
SMALL = ["--hidden_size", "24", "--num_hidden_layers", "4"]
RECIPE = ["--max_train_samples", "64", "--max_eval_samples", "64", "--num_train_epochs", "1", *SHORT, *SMALL]
# What makes a command short, beside the flags that it has.
MORE = {
    ("train", "images"): [*SHORT, *SMALL],
    ("train", "texts"): [*SHORT, "--max_seq_length", "8"],
    ("pilot", "images"): [*SHORT, *SMALL, *TRIALS],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which names on the Hub, and the reader's own files, are small local ones."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        make("vit", num_labels=10).save_pretrained("google/vit-base-patch16-224-in21k")
        make("vit", num_hidden_layers=2).config.save_pretrained("google/vit-large-patch16-224")
        make("bert", num_labels=2).save_pretrained("google-bert/bert-base-uncased")
        tokenizer(folder).save_pretrained("google-bert/bert-base-uncased")
        make("qwen2", num_hidden_layers=4).save_pretrained("Qwen/Qwen2-0.5B")
        lines = [f'"{TEXTS[i % 5]} {TEXTS[i % 7]}",{("no", "yes")[i % 2]}' for i in range(40)]
        Path("texts.csv").write_text("\n".join(["sentence,label", *lines]))
        rng = np.random.default_rng(0)
        for split in ("train", "test"):
            for name in ("dark", "light"):
                to = Path("path/to/folder", split, name)
                to.mkdir(parents=True)
                for number in range(12):
                    pixels = rng.integers(100, size=(32, 32, 3), dtype=np.uint8) + np.uint8(100 * (name == "light"))
                    (to / f"{number}.png").write_bytes(datasets.Image().encode_example(pixels)["bytes"])
        yield folder


@pytest.fixture(scope="module")
def reader(world):
    """What the reader has by the name that the pages give it."""
    rows = [Samples("vit", 16)[i] for i in range(16)]
    batches = [{key: torch.stack([row[key] for row in rows]) for key in rows[0]}]
    batches[0]["labels"] %= 2  # what the commands have trained knows two labels
    return {
        "train": datasets.Dataset.from_list(rows).with_format("torch"),
        "test": datasets.Dataset.from_list(rows).with_format("torch"),
        "accuracy": lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        "make_model": lambda: make("vit", num_labels=10),
        "model": make("vit", num_hidden_layers=2),
        "validation_batches": batches,
        "images": batches[0]["pixel_values"],
        "tokenizer": AutoTokenizer.from_pretrained("google-bert/bert-base-uncased"),
        "texts": datasets.Dataset.from_list([{"input_ids": list(range(5, 15))}] * 16),
    }


@pytest.fixture(scope="module")
def scopes(reader):
    """The names of each page: what one imports or makes, the others do not have."""
    return {path: dict(reader) for path in PAGES}


@pytest.mark.parametrize(("path", "kind", "code"), BLOCKS)
def test_the_block_runs(path, kind, code, world, scopes, monkeypatch):
    if kind == "python":
        exec(re.sub(r"num_trials=\d+, max_steps=\d+", "num_trials=2, max_steps=4", code), scopes[path])
        return
    for line in code.splitlines():
        for command in line.split(" && "):
            run(shlex.split(command, comments=True), monkeypatch)


def run(words, monkeypatch):
    if words[0] == "hf-mmst":
        assert main([*words[1:], *MORE.get(tuple(words[1:3]), [])]) == 0, words
    elif words[:2] in (["accelerate", "launch"], ["python", "recipes/vit_cifar.py"]):
        recipe, *flags = words[1 + (words[0] == "accelerate") :]
        if "--architecture" in flags:
            pytest.importorskip("timm", reason="timm needs torchvision; the recipe runs without it")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [recipe, *flags, *RECIPE])
            patch.syspath_prepend(ROOT / "recipes")
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / recipe), run_name="__main__")
            assert ended.value.code == 0
    elif words[:2] == ["pip", "install"]:  # that this installs what is needed is what these tests run in
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[2] == "-e"
        assert re.fullmatch(r"\.\[(\w+)\]", words[3])[1] in extras
    elif words[:2] == ["python", "recipes/export_onnx.py"]:  # tests/test_onnx.py does
        assert words[2:] in (
            ["trained", *f"{flags} --output_dir {to}".split()]
            for flags, to in (("--num_stages 2", "small"), ("", "whole"), ("--early_exit", "early"))
        )
    elif words[0] == "torchrun":  # tests/distributed/test_stage_parallel.py does
        assert words[1:] in (["--nproc_per_node", number, "train.py"] for number in ("2", "3"))
    else:
        assert words in (
            ["python", "-m", "venv", "v"],
            [".", "v/bin/activate"],
            ["pytest", "-n", "2", "--dist", "loadfile"],
        ), words


def test_what_they_leave_behind(world):
    """The quickstart's checkpoint has since been trained over by the commands; adapters have a folder of their own."""
    assert (world / "vit-stages" / "exits.json").is_file()
    for name in ("vit-stages", "vit-lora"):
        assert {"stages.json", "stages.safetensors"} <= {path.name for path in (world / name).iterdir()}
    assert (world / "vit-stages" / "results.json").is_file()
    assert (world / "vit-lora" / "adapter_model.safetensors").is_file()
