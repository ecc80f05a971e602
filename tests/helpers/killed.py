"""A run that saves at each step, resumes from what is there, and is killed from outside. Arguments: folder, kind."""

import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

KINDS = {
    "simultaneous": {"max_steps": 12},
    "resident": {
        "max_steps": 24,
        "stage_order": "sequential",
        "offload": "stages",
        "feature_cache": "disk",
        "dropout": True,
    },
}
PROCESSES = {  # one or two
    "max_steps": 36,
    "stage_order": "sequential",
    "transport_schedule": "adaptive",
    "optim": "sgd",
    "learning_rate": 0.05,
    "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", "1")),
}


class Begins(TrainerCallback):
    """Sets an event when training begins."""

    def __init__(self, begun):
        self.begun = begun

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun.set()


def run(folder, kind, *callbacks):
    from runs import trainer

    settings = {"save_strategy": "steps", "save_steps": 1, **(KINDS | {"processes": PROCESSES})[kind]}
    trained = trainer(folder, extra={"callbacks": [*callbacks]}, **settings)
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    trained.train(resume_from_checkpoint=last)
    return trained


def main(folder, kind, begun=None):
    from hf_mmst.memory import feature_store

    feature_store.SHARD_BYTES = 1  # each batch of features is written at once
    torch.set_num_threads(1)
    run(folder, kind, *([] if begun is None else [Begins(begun)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
