# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Time of a step and peak memory of a process, by number of processes: end to end and in stages, one total batch.

    python recipes/benchmark_scaling.py --model vit-base --batch_size 16 --num_stages 4 --num_processes 1 2 4
    python recipes/benchmark_scaling.py --quick --num_processes 1 2
    python recipes/benchmark_scaling.py --on_paper

Each method trains for a few steps on random data, with AdamW, in processes of its own: a GPU or one thread each. All
methods are run in turn, `--rounds` times. The time is the median over the steps of all rounds but the first of each;
the peak is that of the process that has most, above what it held before the model was made.

`--on_paper` measures nothing: it prints what a device sends in a step, by formula, for 8, 64 and 512 devices.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmark_memory import CONFIGS, LARGE, RandomSamples, StepTimes
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_mmst import MMSTConfig, MMSTTrainer, Partition, StageHeads, find_layers
from hf_mmst.distributed.reduction import Reduction
from hf_mmst.memory.peaks import PeakMemory
from hf_mmst.records.results import provenance
from hf_mmst.tasks.report import write_json


class WrapperReduces(MMSTTrainer):
    """Leaves averaging to DistributedDataParallel, which begins when the last stage's loss is stepped back through."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        Reduction.forget(self.model)
        self._run.learning.reduction = None
        return optimizer


METHODS = {  # the trainer, and its settings
    "end-to-end": (Trainer, {}),
    "simultaneous": (MMSTTrainer, {}),
    "simultaneous, averaged by DDP": (WrapperReduces, {}),
    "simultaneous+stage_clipping": (MMSTTrainer, {"stage_clipping": True}),
    "sequential": (MMSTTrainer, {"stage_order": "sequential"}),
    "stage-parallel": (MMSTTrainer, {"stage_parallel": True, "stage_clipping": True}),
}

SEVERAL = ("simultaneous, averaged by DDP", "stage-parallel")  # not in one process


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-base", choices=CONFIGS)
    parser.add_argument("--batch_size", type=int, default=16, help="of all processes together")
    parser.add_argument("--num_stages", type=int, default=4)
    parser.add_argument("--num_processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of a text")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="autocast, if not fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4, help="of each stage, where one learns at a time")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_scaling"))
    parser.add_argument("--quick", action="store_true", help="a small ViT in 3 stages")
    parser.add_argument("--on_paper", action="store_true", help="print the table of bytes, and measure nothing")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.model, args.num_stages = "quick", 3
    for number in args.num_processes:
        if number < 1 or args.batch_size % number:
            parser.error(f"--batch_size {args.batch_size} cannot be shared out over {number} processes evenly")
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: the first step has no optimizer states yet. Set it to 2 or more.")
    return args


# ---- Measured ----


def measure(args: argparse.Namespace) -> None:
    """Train by one method in this process, one of several, and write what it took."""
    kind, settings = METHODS[args.one]
    number = int(os.environ.get("WORLD_SIZE", "1"))
    turns = args.num_stages if "stage_order" in settings else 1
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        config = (TrainingArguments if kind is Trainer else MMSTConfig)(
            folder,
            max_steps=args.steps * turns,
            per_device_train_batch_size=args.batch_size // (1 if "stage_parallel" in settings else number),
            bf16=args.precision == "bf16",
            use_cpu=args.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=args.device == "cuda",
            **({} if kind is Trainer else {"num_stages": args.num_stages}),
            **settings,
        )
        with PeakMemory(config.device) as peak:
            set_seed(config.seed)
            model_config = CONFIGS[args.model]()
            model_config.num_labels = 10
            is_image = hasattr(model_config, "image_size")
            auto = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
            data = RandomSamples(model_config, args.seq_len, args.batch_size)
            kind(auto.from_config(model_config), config, train_dataset=data, callbacks=[times]).train()
    seconds = [second for i, second in enumerate(times.seconds) if i % args.steps > 0]
    rank = os.environ.get("RANK", "0")
    (args.into / rank).write_text(json.dumps({"seconds": seconds, "peak_bytes": peak.peak_bytes}))
    sys.stdout.flush()
    os._exit(0)  # all is written; the process group need not be taken down in order


def in_processes(args: argparse.Namespace, method: str, number: int) -> list[dict]:
    """What each of `number` new processes took."""
    launcher = [sys.executable]
    if number > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "TOKENIZERS_PARALLELISM": "false"}
    if args.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, *sys.argv[1:], "--one", method, "--into", folder]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            raise SystemExit(f"{method} in {number} processes ended with exit code {done.returncode}: see above")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(number)]


def benchmark(args: argparse.Namespace) -> list[dict]:
    """A row for each number of processes and method, all run in turn."""
    cells = [(number, method) for number in args.num_processes for method in args.methods]
    cells = [(number, method) for number, method in cells if number > 1 or method not in SEVERAL]
    found: dict[tuple[int, str], list[list[dict]]] = {cell: [] for cell in cells}
    for _ in range(args.rounds):
        for number, method in cells:
            found[number, method].append(in_processes(args, method, number))
            last = found[number, method][-1]
            print(f"{number} x {method}: {statistics.median(last[0]['seconds']):.2f} s a step", flush=True)
    return [
        {
            "num_processes": number,
            "method": method,
            "step_seconds": statistics.median(second for launch in launches for second in launch[0]["seconds"]),
            "peak_bytes": max(one["peak_bytes"] for launch in launches for one in launch),
        }
        for (number, method), launches in found.items()
    ]


def ratios(rows: list[dict]) -> list[dict]:
    """Of each row: step and peak as ratios to the first method in as many processes, step to its own in the fewest."""
    found = []
    for row in rows:
        first = next(one for one in rows if one["num_processes"] == row["num_processes"])
        fewest = next(one for one in rows if one["method"] == row["method"])
        found.append(
            {
                "step": row["step_seconds"] / first["step_seconds"],
                "peak": row["peak_bytes"] / first["peak_bytes"],
                "scaling": fewest["step_seconds"] / row["step_seconds"],
            }
        )
    return found


def show(rows: list[dict], path: Path) -> None:
    """A table, and the plots in the file `path`."""
    from matplotlib.figure import Figure

    table = Table("processes", "method", "step s", "step", "peak MiB", "peak", "times as fast as with fewest")
    for row, ratio in zip(rows, ratios(rows), strict=True):
        numbers = [f"{row['step_seconds']:.2f}", f"{ratio['step']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"]
        table.add_row(
            str(row["num_processes"]), row["method"], *numbers, f"{ratio['peak']:.2f}", f"{ratio['scaling']:.2f}"
        )
    Console().print(table)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        numbers = [str(row["num_processes"]) for row in own]
        left.plot(numbers, [row["step_seconds"] for row in own], marker="o", label=method)
        right.plot(numbers, [row["peak_bytes"] / 2**20 for row in own], marker="o", label=method)
    for axes, name in ((left, "seconds of a step"), (right, "peak of a process in MiB")):
        axes.set_xlabel("processes")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)


# ---- On paper ----


@dataclass(frozen=True)
class Job:
    """
    What is trained, for the formulas below.

    Attributes:
        parameters (`int`): P, of the model.
        head_parameters (`int`): H, of the auxiliary heads of `stages` stages.
        stages (`int`): K, and the number of devices that one copy of a pipeline or of stage-parallel training takes.
        features (`int`): A, elements of one sample's hidden state where the model is cut.
        samples (`int`): B, samples per device and step.
        micro_batches (`int`): M, into which a pipeline cuts a step.
        gradient_bytes, weight_bytes, feature_bytes (`int`): of an element that is sent.
    """

    parameters: int
    head_parameters: int
    stages: int
    features: int
    samples: int
    micro_batches: int
    gradient_bytes: int = 4
    weight_bytes: int = 2
    feature_bytes: int = 2


def vit_large(stages: int = 8, samples: int = 32, micro_batches: int = 32) -> Job:
    """ViT-L/16 with 1,000 labels at 224 pixels."""
    config = ViTConfig(**LARGE, num_labels=1000)
    with torch.device("meta"):
        model = ViTForImageClassification(config)
        heads = StageHeads([config.hidden_size] * (stages - 1), config.num_labels)
    layers = find_layers(model)
    assert Partition.by_cost(layers, stages, [1.0] * len(layers)).num_stages == stages
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    count = [sum(p.numel() for p in module.parameters()) for module in (model, heads)]
    return Job(*count, stages, tokens * config.hidden_size, samples, micro_batches)


def around_the_ring(devices: int) -> float:
    """The share of a tensor that each device sends in a ring's all-gather or reduce-scatter; an all-reduce is both."""
    return (devices - 1) / devices


@dataclass(frozen=True)
class Kind:
    """A way to train on n devices: what each sends in a step, how long it waits, what it keeps."""

    name: str
    formula: str
    sent: Callable[[Job, int], float]
    idle: Callable[[Job], float] = lambda job: 0.0
    kept: Callable[[Job, int], float] = lambda job, n: 16 * job.parameters


def _features(job: Job, times: int) -> float:
    return times * job.features * job.feature_bytes * job.samples * job.stages


def _replicas(job: Job, n: int, parameters: float) -> float:
    return 2 * around_the_ring(n // job.stages) * job.gradient_bytes * parameters


KINDS = (
    Kind(
        "end-to-end, DDP",
        "2 r(n) g P",
        lambda job, n: 2 * around_the_ring(n) * job.gradient_bytes * job.parameters,
    ),
    Kind(
        "end-to-end, FSDP or ZeRO-3",
        "r(n) (2 w + g) P",
        lambda job, n: around_the_ring(n) * (2 * job.weight_bytes + job.gradient_bytes) * job.parameters,
        kept=lambda job, n: 16 * job.parameters / n,
    ),
    Kind(
        "pipeline (GPipe, 1F1B) of K devices, n/K copies",
        "2 a A B K + 2 r(n/K) g P/K",
        lambda job, n: _features(job, 2) + _replicas(job, n, job.parameters / job.stages),
        idle=lambda job: (job.stages - 1) / (job.micro_batches + job.stages - 1),
        kept=lambda job, n: 16 * job.parameters / job.stages,
    ),
    Kind(
        "all stages at once, several processes",
        "2 r(n) g (P + H)",
        lambda job, n: 2 * around_the_ring(n) * job.gradient_bytes * (job.parameters + job.head_parameters),
        kept=lambda job, n: 16 * (job.parameters + job.head_parameters),
    ),
    Kind(
        "sequential, stages offloaded",
        "2 r(n) g (P + H)/K",
        lambda job, n: (
            2 * around_the_ring(n) * job.gradient_bytes * (job.parameters + job.head_parameters) / job.stages
        ),
        kept=lambda job, n: 16 * (job.parameters + job.head_parameters) / job.stages,
    ),
    Kind(
        "stage-parallel: K devices, n/K copies",
        "a A B K + 2 r(n/K) g (P + H)/K",
        lambda job, n: _features(job, 1) + _replicas(job, n, (job.parameters + job.head_parameters) / job.stages),
        kept=lambda job, n: 16 * (job.parameters + job.head_parameters) / job.stages,
    ),
)


def on_paper(job: Job, devices: tuple[int, ...] = (8, 64, 512)) -> str:
    """The table, in Markdown."""
    lines = [
        "| way | a device sends in a step | " + " | ".join(f"n = {n}: MiB" for n in devices) + " | idle | states MiB |",
        "|---|---|" + "---|" * (len(devices) + 2),
    ]
    for kind in KINDS:
        sent = [f"{kind.sent(job, n) / 2**20:,.0f}" for n in devices]
        kept = dict.fromkeys(f"{kind.kept(job, n) / 2**20:,.0f}" for n in devices)
        lines.append(
            f"| {kind.name} | {kind.formula} | {' | '.join(sent)} | {kind.idle(job):.0%} | {', '.join(kept)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, write and show; or compute."""
    args = parse()
    if args.on_paper:
        print(on_paper(vit_large()))
        return
    if args.one is not None:
        measure(args)
    rows = benchmark(args)
    settings = ("model", "batch_size", "num_stages", "seq_len", "precision", "steps", "rounds")
    write_json(
        args.output_dir / "results.json",
        {
            **provenance(args.device),
            "seed": 42,
            **{key: getattr(args, key) for key in settings},
            "rows": rows,
        },
    )
    show(rows, args.output_dir / "scaling.png")
    print(f"written to {args.output_dir / 'results.json'}")


if __name__ == "__main__":
    main()
