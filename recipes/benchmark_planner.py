# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
What the planner says of a way of training beside what the training takes, both in bytes of tensors on a CPU.

    python recipes/benchmark_planner.py

Small models train for two steps of each stage. What is measured is PyTorch's own account of the real tensors, from the
optimizer states to the last gradient; tensors at rest, which lie in files, are not in it.
"""

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_mmst import MMSTConfig, MMSTTrainer, find_layers
from hf_mmst.cut.copies import tensors_of
from hf_mmst.cut.example_inputs import dummy_inputs
from hf_mmst.cut.objectives import objective_of
from hf_mmst.memory.layer_offload import resident_layers
from hf_mmst.memory.slabs import Slab
from hf_mmst.memory.tensor_peaks import TensorPeak
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way
from hf_mmst.records.results import provenance
from hf_mmst.tasks.report import write_json

SIZE = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 768}
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZE, image_size=96, num_labels=5)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZE, vocab_size=2000, num_labels=5)),
    "bert-masked-lm": lambda: BertForMaskedLM(BertConfig(**SIZE, vocab_size=8000)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=128, embed_dim=48, window_size=4, num_labels=5),
    ),
}
RESIDENT = {"stage_order": "sequential", "offload": "stages"}
COMBINATIONS = [  # model, precision, way of training, layers of the auxiliary heads
    ("vit", "fp32", Way(), 0),
    ("vit", "fp32", Way(activation_checkpointing=True), 0),
    ("vit", "bf16", Way(num_stages=3), 0),
    ("vit", "fp32", Way(num_stages=6, stage_clipping=True), 0),
    ("vit", "fp32", Way(num_stages=3, **RESIDENT), 0),
    ("vit", "fp32", Way(offload="layers"), 0),
    ("vit", "fp32", Way(offload="layers", resident_layers=2), 0),
    ("bert", "bf16", Way(), 0),
    ("bert", "fp32", Way(num_stages=2), 0),
    ("bert", "fp32", Way(num_stages=6, stage_clipping=True, activation_checkpointing=True), 0),
    ("bert", "bf16", Way(num_stages=3, **RESIDENT), 0),
    ("bert", "fp32", Way(num_stages=6, **RESIDENT, activation_checkpointing=True), 0),
    ("vit", "bf16", Way(num_stages=6), 1),
    ("bert", "fp32", Way(num_stages=3, **RESIDENT), 1),
    ("swin", "fp32", Way(), 0),
    ("swin", "fp32", Way(num_stages=4), 0),
    ("swin", "bf16", Way(num_stages=6, stage_order="sequential"), 0),
    ("bert-masked-lm", "fp32", Way(num_stages=3), 0),
    ("bert", "fp32", Way(offload="layers", layer_batch_size=2), 0),
]
BATCH = 8
SEQ_LEN = 64


def batch_of(model, size: int) -> dict[str, torch.Tensor]:
    """A batch of zeros; of masked tokens every seventh has a label."""
    labels = torch.zeros(size, dtype=torch.long)
    if objective_of(model).head == "own":
        labels = torch.where(torch.arange(SEQ_LEN) % 7 == 0, 0, -100).expand(size, -1)
    return {**dummy_inputs(model, size, seq_len=SEQ_LEN), "labels": labels}


class Zeros(Dataset):
    """Samples of the model's input size."""

    def __init__(self, model):
        self.sample = batch_of(model, 1)

    def __len__(self):
        return 8 * BATCH

    def __getitem__(self, index):
        return {name: value[0] for name, value in self.sample.items()}


def make(name: str):
    """A model whose weights depend on the name alone."""
    set_seed(0)
    return MODELS[name]()


def simulation(model, precision: str, head_layers: int = 0) -> Simulation:
    """The planner's view of the model and a batch."""
    return Simulation(model, batch_of(model, BATCH), precision, head_layers=head_layers)


def measured_bytes(model, precision: str, way: Way, head_layers: int, folder: str) -> int:
    """The most bytes that tensors take while the model trains."""
    stagewise = way.num_stages > 1 or way.offload != "none"
    settings = {"activation_checkpointing": way.activation_checkpointing}
    if stagewise:
        has_heads = way.num_stages > 1 and way.stage_objective == "local"
        settings = {**way.settings, "head_layers": head_layers if has_heads else None}
    args = (MMSTConfig if stagewise else TrainingArguments)(
        folder,
        max_steps=2 * (way.num_stages if way.stage_order == "sequential" else 1),
        per_device_train_batch_size=BATCH,
        bf16=precision == "bf16",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = (MMSTTrainer if stagewise else Trainer)(model, args, train_dataset=Zeros(model))
    resting = {*trainer.partition.layers} if stagewise and args.offload != "none" else set()
    resting -= {*resident_layers(find_layers(model), way.resident_layers)}
    at_rest = {p.untyped_storage().data_ptr() for name in resting for p in model.get_submodule(name).parameters()}
    held = [one for one in tensors_of(model) if one.untyped_storage().data_ptr() not in at_rest]
    if stagewise:
        held += trainer.heads.parameters()
    # What is taken is in memory; on a CPU it is mapped in, which a tracker does not see.
    with mock.patch.object(Slab, "take", _copies), TensorPeak(held) as tracker:
        trainer.train()
    return tracker.peak_bytes


def main() -> None:
    """Plan, measure, write and show all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_planner"))
    args = parser.parse_args()
    rows = []
    for name, precision, way, head_layers in COMBINATIONS:
        model = make(name)
        planned = simulation(model, precision, head_layers).peak(way).total
        with tempfile.TemporaryDirectory() as folder:
            measured = measured_bytes(model, precision, way, head_layers, folder)
        settings = {field: value for field, value in vars(way).items() if value != getattr(Way(), field)}
        if head_layers:
            settings["head_layers"] = head_layers
        row = {"model": name, "precision": precision, "settings": settings}
        rows.append({**row, "planned_bytes": planned, "measured_bytes": measured})
    write_json(
        args.output_dir / "results.json",
        {
            **provenance("cpu"),
            "seed": 0,
            "batch_size": BATCH,
            "rows": rows,
        },
    )
    table = Table("model", "precision", "way of training", "planned MiB", "measured MiB", "ratio")
    for row in rows:
        planned, measured = row["planned_bytes"], row["measured_bytes"]
        way = ", ".join(f"{name}={value}" for name, value in row["settings"].items()) or "end to end"
        numbers = f"{planned / 2**20:.2f}", f"{measured / 2**20:.2f}", f"{planned / measured:.3f}"
        table.add_row(row["model"], row["precision"], way, *numbers)
    Console(width=160).print(table)
    print(f"written to {args.output_dir / 'results.json'}")


def _copies(slab, device):
    return [tensor.clone() for tensor in slab.tensors]


if __name__ == "__main__":
    main()
