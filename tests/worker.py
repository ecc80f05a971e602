"""One process of a run on several: trains a tiny model and writes its weights. Arguments: name, order, mode, file."""

import os
import sys

import torch
from safetensors.torch import save_file
from transformers import set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer

MODES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "head_layers": {"head_layers": 1, "max_grad_norm": 0.5},
    "checkpointing": {"activation_checkpointing": True},
    "adaptive": {"transport_schedule": "adaptive", "save_steps": 15, "save_strategy": "steps", "max_steps": 33},
}


def train(name: str, order: str, mode: str, path: str) -> MMSTTrainer:
    """Total batch of 8, whatever the number of processes."""
    torch.set_num_threads(1)
    settings = {"max_steps": 12, "save_strategy": "no", **MODES[mode]}
    args = MMSTConfig(
        f"{path}.output",
        num_stages=3,
        stage_order=order,
        optim="sgd",
        learning_rate=0.05,
        logging_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        transport_weight=1.0,
        **settings,
    )
    args.per_device_train_batch_size = args.per_device_eval_batch_size = 8 // args.world_size
    set_seed(0)
    data = Samples(name, 32)
    trainer = MMSTTrainer(
        make(name),
        args,
        train_dataset=data,
        eval_dataset=Samples(name, 16, seed=1),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    metrics = trainer.evaluate()
    found = {**trainer.model.state_dict(), **{f"heads.{k}": v for k, v in trainer.heads.state_dict().items()}}
    found |= {key: torch.tensor(value) for key, value in metrics.items() if "stage" in key}
    logged = next(entry for entry in trainer.state.log_history if "stage_1_loss" in entry)
    found |= {f"logged.{key}": torch.tensor(logged[key]) for key in ("loss", "stage_1_loss", "stage_1_transport")}
    save_file({key: tensor.detach().clone() for key, tensor in found.items()}, f"{path}.{args.process_index}")
    return trainer


def main(names: str, orders: str, mode: str, path: str) -> None:
    """Train each of `names` in its order; commas separate them."""
    for name, order in zip(names.split(","), orders.split(","), strict=True):
        trainer = train(name, order, mode, f"{path}-{name}" if "," in names else path)
    trainer.end()
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of the process group now and then abort an interpreter that ends


if __name__ == "__main__":
    main(*sys.argv[1:])
