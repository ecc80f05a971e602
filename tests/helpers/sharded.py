"""Processes that train tiny models in shards, and what one process gets for the same."""

import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer
from hf_mmst.method.heads import HEADS

SAVED = {"save_strategy": "steps", "save_steps": 2}
RUNS = {
    "bert": {
        **SAVED,
        "head_layers": 1,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "adam_epsilon": 0.01,  # so that rounding of gradients that are zero stays small
    },
    "vit": {
        **SAVED,
        "stage_order": "sequential",
        "stage_clipping": True,
        "end_to_end_laps": 1,
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,  # for another one than the last to be loaded
    },
    "swin": {"stage_boundaries": ["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.1"]},
    "beit": {"max_grad_norm": 0.5},
    "distilbert": {"bf16": True},
    "gpt2": {"max_grad_norm": 0.5, "save_strategy": "epoch"},  # its own head for all stages, tied
    "llama": {"max_grad_norm": 0.5},
    "roberta": {
        **SAVED,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "adam_epsilon": 0.01,
    },
}
COMPILED = {"activation_checkpointing": True, "torch_compile_backend": "eager"}
IN_SHARDS = {  # what makes no difference to the numbers
    "fsdp": {"vit": COMPILED, "swin": {"fsdp_config": {"transformer_layer_cls_to_wrap": ["SwinStage"]}}},
    "zero2": {"bert": COMPILED},
}
RESUMED = {"fsdp": "bert", "zero2": "bert", "zero3": "roberta"}
DEEPSPEED = {
    "zero_optimization": {"stage": 2, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": "auto"},
}


class OnCPU(MMSTTrainer):
    """The host shards on devices only: here the processes' kind is set by hand, after it was made out."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if self.args.bf16:
            plugin.set_mixed_precision("bf16")
        state = self.accelerator.state
        state.fsdp_plugin = plugin
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


class Sees(TrainerCallback):
    """Sees the model alone in its state dict, although the files of a checkpoint hold the heads with it."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert not [name for name in model.state_dict() if HEADS in name]


def trainer(kind: str, folder: str, name: str, **settings) -> MMSTTrainer:
    """A trainer with a total batch of 8, whatever the number of processes."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    settings = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.05, **settings}
    args = MMSTConfig(
        folder,
        num_stages=3,
        transport_weight=1.0,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **settings,
        **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 8 // size),
    )
    set_seed(0)
    return (OnCPU if kind == "fsdp" else MMSTTrainer)(
        loaded_in_shards(folder, name) if kind == "zero3" else make(name),
        args,
        train_dataset=Samples(name, 32),
        eval_dataset=Samples(name, 16, seed=1),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[Sees()],
    )


def loaded_in_shards(folder: str, name: str) -> torch.nn.Module:
    """The model, as `from_pretrained` makes it where ZeRO stage 3 is switched on: each process has a part."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = make(name)
    model.save_pretrained(f"{folder}.init")  # in the main process
    PartialState().wait_for_everyone()
    rates = {key: 0.0 for key, value in vars(model.config).items() if "drop" in key and isinstance(value, float)}
    model = type(model).from_pretrained(f"{folder}.init", **rates)
    assert any(p.numel() < p.ds_numel for p in model.parameters())
    model.config.name_or_path = ""  # its settings are those of a model from scratch
    return model.train()


def settings_of(kind: str, name: str) -> dict:
    """What a run is set to: alone, in two processes, or in shards."""
    settings = {"save_strategy": "no", "use_cpu": True, **RUNS[name], **IN_SHARDS.get(kind, {}).get(name, {})}
    if kind == "alone":
        return settings
    if kind == "fsdp":
        return settings | {"fsdp": True}
    zero = DEEPSPEED["zero_optimization"] | {"stage": int(kind[-1])}
    return settings | {"deepspeed": DEEPSPEED | {"zero_optimization": zero}}


def found(trained: MMSTTrainer) -> dict[str, torch.Tensor]:
    """Weights, heads, metrics and logs of a run, whole; to be called in each process."""
    tensors = trained._run.wrapper.state_dict(trained.model)
    tensors |= {f"{HEADS}.{key}": value for key, value in trained._run.wrapper.state_dict(trained.heads).items()}
    tensors |= {
        key: torch.tensor(value) for key, value in trained.evaluate().items() if "loss" in key or "accuracy" in key
    }
    logged = [entry for entry in trained.state.log_history if "stage_1_loss" in entry]
    names = [key for key in logged[-1] if "loss" in key or "transport" in key or key == "grad_norm"]
    tensors["best"] = torch.tensor(int((trained.state.best_model_checkpoint or "-0").rpartition("-")[2]))
    return tensors | {f"logged.{key}": torch.tensor(float(logged[-1][key])) for key in names}


def train(kind: str, folder: str, name: str, resume: str | None = None, **settings) -> dict[str, torch.Tensor]:
    trained = trainer(kind, folder, name, **{**settings_of(kind, name), **settings})
    trained.train(resume_from_checkpoint=resume)
    return found(trained)


def main(kind: str, folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    if kind.startswith("zero"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, which takes a minute
    for name in names:
        done = train(kind, f"{folder}/{name}", name)
        rank = PartialState().process_index
        save_file(done, f"{folder}/{kind}.{name}.{rank}")
        if name == RESUMED.get(kind):
            resumed = train(kind, f"{folder}/{name}", name, resume=f"{folder}/{name}/checkpoint-2")
            save_file(resumed, f"{folder}/{kind}.resumed.{rank}")
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of the process group now and then abort an interpreter that ends
