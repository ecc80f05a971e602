"""Processes that train tiny models end to end, layers offloaded or not, and what one gets."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from runs import accuracy
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers import set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer

ACCUMULATION = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
RESUMED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
RUNS = {  # name of the model, settings
    "vit": ("vit", ACCUMULATION),
    "bert": ("bert", {**ACCUMULATION, **BEST, **RESUMED}),
    "gpt2": ("gpt2", {**ACCUMULATION, "max_steps": 4, "save_strategy": "epoch"}),  # tied embeddings
    "lora": ("lora", {**ACCUMULATION, "save_strategy": "epoch"}),
    "bf16": ("vit", {"bf16": True}),
    "dropout": ("bert with dropout", ACCUMULATION),
    "vit none": ("vit", {**ACCUMULATION, "offload": "none"}),
    "bert none": ("bert", {**ACCUMULATION, "offload": "none"}),
    "dropout none": ("bert with dropout", {**ACCUMULATION, "offload": "none"}),
}


def made(name: str) -> nn.Module:
    if name == "lora":
        return get_peft_model(make("bert"), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    return make(name.removesuffix(" with dropout"), dropout="dropout" in name)


def trainer(folder: Path, run: str, **settings) -> MMSTTrainer:
    """A trainer with a total batch of 16 in an optimizer step at most, whatever the number of processes."""
    name, own = RUNS[run]
    args = MMSTConfig(
        str(folder / run),
        **{"stage_order": "end_to_end", "max_steps": 2, "save_strategy": "no", **own, **settings},
        learning_rate=0.01,
        adam_epsilon=0.01,  # so that rounding of gradients that are zero stays small
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **dict.fromkeys(
            ("per_device_train_batch_size", "per_device_eval_batch_size"), 8 // int(os.environ.get("WORLD_SIZE", 1))
        ),
    )
    set_seed(0)
    data = {"lora": "bert"}.get(name, name.removesuffix(" with dropout"))
    model = made(name)
    set_seed(args.process_index)  # masks of dropout are each process's own
    return MMSTTrainer(
        model,
        args,
        train_dataset=Samples(data, 64),
        eval_dataset=Samples(data, 16, seed=1),
        compute_metrics=None if name == "gpt2" else accuracy,
    )


def found(trained: MMSTTrainer) -> dict[str, torch.Tensor]:
    """Weights, metrics and logs of a run, whole; to be called in each process."""
    tensors = dict(trained._run.wrapper.state_dict(trained.model))
    metrics = {**trained.evaluate(), **trained.predict(trained.eval_dataset).metrics}
    metrics |= {f"step_{entry['step']}_{key}": entry[key] for entry in trained.state.log_history for key in entry}
    numbers = {k: v for k, v in metrics.items() if k.endswith(("loss", "accuracy", "grad_norm")) and "train" not in k}
    return tensors | {key: torch.tensor(float(value)) for key, value in numbers.items()}


def train(folder: Path, run: str, resume: str | None = None, **settings) -> dict[str, torch.Tensor]:
    trained = trainer(folder, run, **settings)
    before = trained.evaluate() if run == "vit" else {}
    trained.train(resume_from_checkpoint=resume)
    result = found(trained) | {f"before.{key}": torch.tensor(before[key]) for key in before if "loss" in key}
    trained.save_model()
    (folder / f"{run}.json").write_text(json.dumps(seen(trained)))
    return result


def seen(trained: MMSTTrainer) -> dict:
    """How the model is wrapped."""
    plugin = getattr(trained.accelerator.state, "fsdp_plugin", None)
    layers = [trained.model.get_submodule(name) for name in trained.partition.layers]
    return {
        "kind": str(trained.accelerator.distributed_type),
        "environment": [key for key in os.environ if "FSDP" in key],
        "layers": [isinstance(layer, FSDPModule) for layer in layers],
        "plugin": plugin
        and {
            "fsdp_version": plugin.fsdp_version,
            "cpu_offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "reshard_after_forward": plugin.reshard_after_forward,
            "classes": plugin.transformer_cls_names_to_wrap,
        },
    }


def main(folder: Path, *runs: str) -> None:
    torch.set_num_threads(1)
    for run in runs:
        rank = int(os.environ["RANK"])
        save_file(train(folder, run), folder / f"{run}.{rank}")
        if run == "bert":
            resumed = train(folder, run, resume=str(folder / run / "checkpoint-2"))
            save_file(resumed, folder / f"resumed.{rank}")
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of the process group now and then abort an interpreter that ends
