# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Peak memory and time of stage-wise training beside its rivals: the same model, batches and optimizer, one run.

    python recipes/benchmark_memory.py --model vit-base --batch_size 8 --num_stages 12 --device cpu
    python recipes/benchmark_memory.py --model bert-large --batch_size 32 --num_stages 12 --precision bf16 --device cuda
    python recipes/benchmark_memory.py --quick

Each method trains for a few steps on random data in a process of its own, with AdamW, or, as "8-bit", with that of
bitsandbytes where it is installed. The peak is above what was held before the model was made: bytes in tensors (CUDA),
resident bytes of a process that gives freed memory back at once (CPU, with glibc). The reserve is what the allocator
holds at most: that of CUDA, or of the C library in a second process, which is timed. Beside them is what the planner
says of the tensors alone. The first step of each stage, which makes its optimizer states, is not timed; the time of an
epoch is that of all stages in turn, which blocks share out, and where features are cached, of one after the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    default_data_collator,
    set_seed,
)
from transformers.initialization import no_init_weights

from hf_mmst import MMSTConfig, MMSTTrainer, find_layers
from hf_mmst.memory.layer_offload import LayerOffload
from hf_mmst.memory.peaks import PeakMemory
from hf_mmst.planning.costs import step_of
from hf_mmst.planning.devices import Device, measured_cpu
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way
from hf_mmst.records.results import provenance
from hf_mmst.tasks.report import write_json

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
QUICK = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
BILLION = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5632}
CONFIGS = {
    "vit-base": lambda: ViTConfig(),
    "vit-large": lambda: ViTConfig(**LARGE),
    "bert-base": lambda: BertConfig(),
    "bert-large": lambda: BertConfig(**LARGE),
    "bert-base-masked-lm": lambda: BertConfig(),
    "decoder-1b": lambda: LlamaConfig(**BILLION, vocab_size=32000, pad_token_id=0),
    "quick": lambda: ViTConfig(**QUICK, image_size=64, patch_size=8),
}
HALF = "half"  # of the layers
MASKED = "masked-lm"  # 15 % of the tokens have a label
CHECKPOINTING = {"activation_checkpointing": True}
SEQUENTIAL = {"stage_order": "sequential"}
BLOCKS = {**SEQUENTIAL, "stage_objective": "model"}
OFFLOADED = {"stage_order": "end_to_end", "offload": "layers"}
EIGHT_BIT = {"optim": "adamw_8bit"}  # needs bitsandbytes
METHODS = {
    "end-to-end": {},
    "end-to-end+checkpointing": CHECKPOINTING,
    "end-to-end+checkpointing+offload": {**CHECKPOINTING, "activation_checkpointing_kwargs": {"offload": True}},
    "end-to-end+8-bit": EIGHT_BIT,
    "end-to-end+checkpointing+8-bit": {**CHECKPOINTING, **EIGHT_BIT},
    "lora": {},
    "freeze": {},
    "simultaneous": {"stage_order": "simultaneous"},
    "simultaneous+logits of all": {"stage_order": "simultaneous"},  # of tokens without a label, too
    # As for a pretrained model whose own head reads the first token.
    "simultaneous+head_layers": {"stage_order": "simultaneous", "head_layers": 1, "head_pooling": "cls"},
    "simultaneous+stage_clipping": {"stage_order": "simultaneous", "stage_clipping": True},
    "sequential": SEQUENTIAL,
    "resident": {**SEQUENTIAL, "offload": "stages"},
    "resident+cache": {**SEQUENTIAL, "offload": "stages", "feature_cache": "disk"},
    "blocks": BLOCKS,
    "blocks+checkpointing": {**BLOCKS, **CHECKPOINTING},
    "blocks+resident": {**BLOCKS, "offload": "stages"},
    "blocks+resident+checkpointing": {**BLOCKS, "offload": "stages", **CHECKPOINTING},
    "offloaded": OFFLOADED,
    "offloaded+inputs": {**OFFLOADED, "activation_checkpointing_kwargs": {"offload": True}},
    "offloaded+half resident": {**OFFLOADED, "resident_layers": HALF},
    "offloaded+half resident+checkpointing": {**OFFLOADED, "resident_layers": HALF, **CHECKPOINTING},
    "offloaded+step on device": {**OFFLOADED, "offloaded_step": "device"},
    "offloaded+no overlap": OFFLOADED,
    "offloaded+8-bit": {**OFFLOADED, **EIGHT_BIT},
    "resident+checkpointing": {**SEQUENTIAL, "offload": "stages", **CHECKPOINTING},
}
STAGEWISE = [name for name, settings in METHODS.items() if "stage_order" in settings]
EPOCH = 1000  # samples that the time of an epoch is given for
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # of glibc: tensors from 256 KiB on


class RandomSamples(torch.utils.data.Dataset):
    """One batch of the model's input size, labels 0 to 9: each step is an epoch, so that cached features are used."""

    def __init__(self, config, seq_len: int, size: int, of_tokens: bool = False):
        self.config, self.seq_len, self.size, self.of_tokens = config, seq_len, size, of_tokens

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(10, (), generator=generator)
        if hasattr(self.config, "image_size"):
            side = self.config.image_size
            return {"pixel_values": torch.randn(3, side, side, generator=generator), "labels": labels}
        ids = torch.randint(1000, 2000, (self.seq_len,), generator=generator)
        if self.of_tokens:
            labels = torch.where(torch.rand(self.seq_len, generator=generator) < 0.15, ids, -100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = self._now(args)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now(args) - self._begin)

    def _now(self, args):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-base", help=f"{', '.join(CONFIGS)}, or a folder with a config.json")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_stages", type=int, default=12)
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of a text")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="autocast, if not fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="in this order, also twice; all that make sense by default"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps, of each stage where one learns at a time"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_memory"))
    parser.add_argument("--quick", action="store_true", help="a small ViT in 3 stages")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: the first step has no optimizer states yet. Set it to 2 or more.")
    if args.model not in CONFIGS and not Path(args.model, "config.json").is_file():
        parser.error(f"--model {args.model} is neither one of {', '.join(CONFIGS)} nor a folder with a config.json")
    if args.quick:
        args.model, args.num_stages = "quick", 3
    if args.methods is None:  # activations that are offloaded from the CPU to the CPU save nothing
        on_gpus = ["+offload", "step on device", "no overlap"]
        without = on_gpus * (args.device == "cpu") + ["8-bit"] * (find_spec("bitsandbytes") is None)
        without += ["lora", "freeze"] if args.model.endswith(MASKED) else ["logits of all"]
        args.methods = [name for name in METHODS if not any(word in name for word in without)]
    return args


def make_model(args: argparse.Namespace):
    """The model of the chosen method, with random weights, and its config."""
    config = CONFIGS[args.model]() if args.model in CONFIGS else AutoConfig.from_pretrained(args.model)
    config.num_labels = 10
    auto = AutoModelForImageClassification if hasattr(config, "image_size") else AutoModelForSequenceClassification
    model = (AutoModelForMaskedLM if args.model.endswith(MASKED) else auto).from_config(config)
    if args.one == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=16, target_modules="all-linear", exclude_modules=["classifier"], modules_to_save=["classifier"]
        )
        model = get_peft_model(model, lora)
    if args.one == "freeze":
        layers = find_layers(model)
        for name in layers[-(len(layers) // args.num_stages) :]:
            model.get_submodule(name)._learns = True
        model.classifier._learns = True
        learning = {id(p) for module in model.modules() if hasattr(module, "_learns") for p in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in learning)
    return model, config


def measure(args: argparse.Namespace) -> dict:
    """Train by one method in this process."""
    stagewise = args.one in STAGEWISE
    turns = args.num_stages if "sequential" in METHODS[args.one].values() else 1
    times = StepTimes()
    if "no overlap" in args.one:
        LayerOffload.streams_of = staticmethod(lambda _: None)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments if not stagewise else MMSTConfig
        config = settings(
            folder,
            max_steps=args.steps * turns,
            per_device_train_batch_size=args.batch_size,
            bf16=args.precision == "bf16",
            fp16=args.precision == "fp16",
            use_cpu=args.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=args.device == "cuda",
            **settings_of(args),
            **({"num_stages": args.num_stages} if stagewise else {}),
        )
        with PeakMemory(args.device) as peak:
            set_seed(config.seed)
            model, model_config = make_model(args)
            trainer = (MMSTTrainer if stagewise else Trainer)(
                model,
                config,
                train_dataset=RandomSamples(model_config, args.seq_len, args.batch_size, args.model.endswith(MASKED)),
                callbacks=[times],
            )
            if "logits of all" in args.one:
                trainer._run.staged.packs_tokens = False
            trainer.train()
    step = statistics.mean(second for i, second in enumerate(times.seconds) if i % args.steps > 0)
    return {
        "method": args.one,
        "peak_bytes": peak.peak_bytes,
        "reserved_bytes": peak.reserved_bytes,
        "step_seconds": step,
        "epoch_seconds": step * (1 if "blocks" in args.one else turns) * EPOCH / args.batch_size,
    }


def settings_of(args: argparse.Namespace) -> dict:
    """The settings of the chosen method."""
    settings = dict(METHODS[args.one])
    if settings.get("resident_layers") == HALF:
        config = CONFIGS[args.model]() if args.model in CONFIGS else AutoConfig.from_pretrained(args.model)
        settings["resident_layers"] = config.num_hidden_layers // 2
    return settings


def planned(args: argparse.Namespace, method: str, speeds: Device | None) -> dict:
    """
    The planner's word on the method: its peak, in tensors, and the seconds of a step at these speeds.

    There is none for activations offloaded by the host, and states of 8 bits.
    """
    if "+offload" in method or "8-bit" in method or "no overlap" in method:
        return {"planned_bytes": None}
    of_tokens = args.model.endswith(MASKED)
    has_data = of_tokens and "logits of all" not in method  # that of the tokens which are predicted
    with torch.device("cpu" if has_data else "meta"), no_init_weights():
        model, config = make_model(argparse.Namespace(**vars(args) | {"one": method if method == "freeze" else None}))
    data = RandomSamples(config, args.seq_len, args.batch_size, of_tokens)
    batch = default_data_collator([data[i] for i in range(len(data))])
    if not has_data:
        batch = {name: value.to("meta") for name, value in batch.items()}
    number = args.num_stages if method in STAGEWISE else 1
    settings = settings_of(argparse.Namespace(**vars(args) | {"one": method}))
    heads = settings.pop("head_layers", None), settings.pop("head_pooling", "auto")
    if settings.pop("activation_checkpointing_kwargs", None):
        settings["rests_inputs"] = True
    way = Way(num_stages=number, lora=method == "lora", **settings)
    simulation = Simulation(model, batch, args.precision, args.device, *heads)
    peak = simulation.peak(way)
    found: dict = {"planned_bytes": peak.total}
    if speeds is not None:
        step = step_of(simulation, way, peak, simulation.peak(Way()))
        # What takes a step in each stage is measured by the step.
        times = way.num_stages if (way.stage_order, way.stage_objective) == ("sequential", "local") else 1
        found["predicted_seconds"] = step.seconds(speeds, args.precision) / times
        found["speeds"] = {**vars(speeds), "flops": speeds.flops[args.precision]}
    return found


def in_processes(args: argparse.Namespace, method: str) -> dict:
    """The row of one method; on a CPU its peak is that of another process than its time."""
    timed = in_a_process(method)
    if args.device == "cpu":
        timed["reserved_bytes"] = timed["peak_bytes"]
        timed["peak_bytes"] = in_a_process(method, "--steps", "2", **GIVES_BACK)["peak_bytes"]
    return timed


def in_a_process(method: str, *options: str, **environment: str) -> dict:
    """What one method takes, measured in a new process, with more options and settings of its environment."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment}
    command = [sys.executable, __file__, *sys.argv[1:], *options, "--one", method]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{method} ended with exit code {done.returncode}: see above")
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: list[dict], path: Path) -> None:
    """A table, and a bar chart in the file `path`."""
    from matplotlib.figure import Figure

    first = rows[0]
    table = Table(
        *("method", "peak MiB", "reserve", "planned", "peak", "step s", "predicted", "step", "epoch"),
        title=f"Ratios to {first['method']}",
    )
    for row in rows:
        ratios = {key: row[key] / first[key] for key in ("peak_bytes", "step_seconds", "epoch_seconds")}
        table.add_row(
            row["method"],
            *(f"{row[key] / 2**20:.0f}" for key in ("peak_bytes", "reserved_bytes")),
            f"{row['planned_bytes'] / 2**20:.0f}" if row["planned_bytes"] else "-",
            f"{ratios['peak_bytes']:.2f}",
            f"{row['step_seconds']:.2f}",
            f"{row['predicted_seconds']:.2f}" if "predicted_seconds" in row else "-",
            f"{ratios['step_seconds']:.2f}",
            f"{ratios['epoch_seconds']:.2f}",
        )
    Console().print(table)
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(rows)), [row["peak_bytes"] / 2**20 for row in rows])
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])  # by place: a method may be there twice
    axes.bar_label(bars, [f"{row['peak_bytes'] / first['peak_bytes']:.0%}" for row in rows], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("peak memory in MiB")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure each method in a process of its own, write and show."""
    args = parse()
    if args.one is not None:
        print(json.dumps(measure(args)))
        return
    rows = []
    for method in args.methods:
        speeds = measured_cpu(args.precision) if args.device == "cpu" else None  # other work may slow it down
        rows.append({**in_processes(args, method), **planned(args, method, speeds)})
        print(
            f"{method}: {rows[-1]['peak_bytes'] / 2**20:.0f} MiB, {rows[-1]['step_seconds']:.2f} s a step", flush=True
        )
    settings = {
        key: getattr(args, key) for key in ("model", "batch_size", "num_stages", "seq_len", "precision", "steps")
    }
    write_json(
        args.output_dir / "results.json",
        {
            **provenance(args.device),
            "seed": 42,
            **settings,
            "rows": rows,
        },
    )
    show(rows, args.output_dir / "peak_memory.png")
    print(f"written to {args.output_dir / 'results.json'}")


if __name__ == "__main__":
    main()
