"""One process of a run on several: trains tiny models and writes their weights."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer
from hf_mmst.distributed.reduction import Reduction

ACCUMULATION = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
SEQUENTIAL = {"stage_order": "sequential", "max_steps": 12, "weight_decay": 0.1}
UNEVEN = {"split_batches": True, "even_batches": False}
CASES = {  # name of the model, settings
    "vit": ("vit", {}),
    "vit sequential accumulation": ("vit", {**SEQUENTIAL, **ACCUMULATION}),
    "vit adaptive": (
        "vit",
        {"transport_schedule": "adaptive", "save_steps": 15, "save_strategy": "steps", "max_steps": 22},
    ),
    "vit sequential head_layers": ("vit", {**SEQUENTIAL, "head_layers": 1}),
    "vit end_to_end_laps": ("vit", {"end_to_end_laps": 1}),
    "vit frozen": ("vit", {}),
    "vit uneven": ("vit", {"accelerator_config": UNEVEN, "max_steps": 9}),
    "bert model loss": ("bert", {**SEQUENTIAL, **ACCUMULATION, "stage_objective": "model"}),
    "bert accumulation": ("bert", ACCUMULATION),
    "bert sequential": ("bert", {**SEQUENTIAL, "optim_args": "momentum=0.9"}),
    "bert checkpointing": ("bert", {"activation_checkpointing": True}),
    "bert head_layers": ("bert", {"head_layers": 1, "max_grad_norm": 0.5}),
    "bert stage_clipping": ("bert", {"num_stages": 4, "stage_clipping": True, "max_grad_norm": 0.5}),
    "beit side inputs": ("beit", {}),
    "bert-tokens accumulation": ("bert-tokens", ACCUMULATION),
    "bert-mlm sequential accumulation": ("bert-mlm", {**SEQUENTIAL, **ACCUMULATION}),  # tied embeddings
    "gpt2 accumulation": ("gpt2", ACCUMULATION),
    "llama sequential accumulation": ("llama", {**SEQUENTIAL, **ACCUMULATION}),
}

IN_THREE = [  # where thirds matter: of batches and their ends, of gradients sent early or late
    *("vit", "vit sequential accumulation", "vit uneven", "bert accumulation", "bert stage_clipping"),
    *("beit side inputs", "bert-mlm sequential accumulation", "gpt2 accumulation"),
]


class Watch(TrainerCallback):
    """Counts the stages whose gradients are sent before a step ends, and the layers that have gradients then."""

    def __init__(self):
        self.starts = self.layers = 0

    def on_train_begin(self, args, state, control, **kwargs):
        reduction = self.trainer._run.learning.reduction
        if reduction is not None:
            self.start, reduction.start = reduction.start, self.count

    def count(self, stage):
        self.starts += 1
        self.start(stage)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        layers = [self.trainer.model.get_submodule(name) for name in self.trainer.partition.layers]
        self.layers += sum(any(p.grad is not None for p in layer.parameters()) for layer in layers)


def train(case: str, folder: Path) -> dict[str, torch.Tensor]:
    """Train with a total batch of 12, whatever the number of processes; returns weights and numbers."""
    name, settings = CASES[case]
    args = MMSTConfig(
        str(folder / case),
        **{"num_stages": 3, "max_steps": 6, "save_strategy": "no", "optim": "sgd", **settings},
        learning_rate=0.05,
        logging_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        transport_weight=1.0,
    )
    whole = args.accelerator_config.split_batches
    args.per_device_train_batch_size = args.per_device_eval_batch_size = 12 // (1 if whole else args.world_size)
    set_seed(0)
    model = make(name, seed=args.process_index)  # the first process's weights count
    if "frozen" in case:
        for layer in model.vit.layers[1:3]:
            layer.requires_grad_(False)
    watch = Watch()
    watch.trainer = trainer = MMSTTrainer(
        model,
        args,
        train_dataset=Samples(name, 34 if whole else 48),  # 34: the last batch of an epoch is smaller
        eval_dataset=Samples(name, 24, seed=1),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[watch],
    )
    trainer.train()
    metrics = trainer.evaluate()
    found = {**trainer.model.state_dict(), **{f"heads.{k}": v for k, v in trainer.heads.state_dict().items()}}
    found |= {key: torch.tensor(value) for key, value in metrics.items() if "stage" in key}
    logged = next(entry for entry in trainer.state.log_history if "stage_1_loss" in entry)
    found |= {"watched.starts": torch.tensor(watch.starts), "watched.layers": torch.tensor(watch.layers)}
    return found | {f"logged.{key}": torch.tensor(logged[key]) for key in ("loss", "stage_1_loss", "stage_1_transport")}


def reduce_unlike() -> dict[str, torch.Tensor]:
    """What is made of gradients that come late, in one process only, or not at all."""
    rank = torch.distributed.get_rank()
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("late", "one", "none")})
    late, one, none = model.values()
    reduction = Reduction(model, [[late.weight], [one.weight, none.weight]])
    found = {f"weights of {name}": layer.weight.clone() for name, layer in model.items()}
    late.weight.grad = torch.full((1, 2), float(rank))
    reduction.start(0)
    one.weight.grad = torch.ones(1, 2) if rank == 0 else None
    reduction.start(1)
    late.weight.grad = torch.ones(1, 2) if rank == 1 else None
    reduction.finish()
    return found | {name: layer.weight.grad for name, layer in model.items() if layer.weight.grad is not None}


def main(folder: Path, cases: list[str]) -> None:
    """Train each case, and write what it gives beside those of the other processes."""
    torch.set_num_threads(1)
    for case in [*cases, "unlike"]:
        found = train(case, folder) if case in CASES else reduce_unlike()
        rank = torch.distributed.get_rank()
        save_file({key: tensor.detach().clone() for key, tensor in found.items()}, folder / f"{case}.{rank}")
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of the process group now and then abort an interpreter that ends
