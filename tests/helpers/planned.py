"""Processes that train small models, and measure what their tensors take; what a budget makes of their settings."""

import json
import os
import sys
from pathlib import Path

import torch
from benchmark_planner import BATCH, SIZE, Zeros
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_mmst import MMSTConfig, MMSTTrainer
from hf_mmst.cut.copies import tensors_of
from hf_mmst.memory.tensor_peaks import TensorPeak
from hf_mmst.planning.ways import Way

OFFLOADED = Way(stage_order="end_to_end", offload="layers")
MEASURED = {
    "vit shards": ("vit", "fp32", OFFLOADED),
    "bert shards": ("bert", "bf16", OFFLOADED),
    "vit stages": ("vit", "fp32", Way(num_stages=2)),
    "vit stages stepping": ("vit", "fp32", Way(num_stages=3, stage_clipping=True)),
}


def make(name: str, num_layers: int = 3):
    """A model whose weights depend on its arguments alone."""
    set_seed(0)
    size = {**SIZE, "num_hidden_layers": num_layers, "num_labels": 5}
    if name == "vit":
        return ViTForImageClassification(ViTConfig(**size, image_size=96))
    return BertForSequenceClassification(BertConfig(**size, vocab_size=2000))


class Tracked(TrainerCallback):
    """Tracks tensors from the first step, when the model is wrapped, to the end."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.peak = TensorPeak([*tensors_of(model)])
        self.peak.__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        self.peak.__exit__(None, None, None)


def trainer(folder: Path, name: str, **settings) -> MMSTTrainer:
    args = MMSTConfig(
        str(folder / "out"),
        **{"num_stages": None, "max_steps": 2, **settings},
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = make(name)
    return MMSTTrainer(model, args, train_dataset=Zeros(model))


def measured(folder: Path, name: str, precision: str, way: Way) -> int:
    settings = {**way.settings, "head_layers": None if way.num_stages == 1 else 0}
    run = trainer(folder, name, bf16=precision == "bf16", **settings)
    tracked = Tracked()
    run.add_callback(tracked)
    run.train()
    return tracked.peak.peak_bytes


def budgeted(folder: Path, **settings) -> dict:
    """What a budget chooses, or the error."""
    try:
        run = trainer(folder, "vit", **settings)
    except ValueError as error:
        return {"error": str(error)}
    run.train()
    args = run.args
    seen = {"order": args.stage_order, "offload": args.offload, "stages": args.num_stages, "planned": run.planned_bytes}
    return seen | {"kind": str(run.accelerator.distributed_type)}


def main(folder: Path, budgets: dict) -> None:
    torch.set_num_threads(1)
    found = {name: measured(folder, *case) for name, case in MEASURED.items()}
    found |= {name: budgeted(folder, **settings) for name, settings in budgets.items()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of the process group now and then abort an interpreter that ends
