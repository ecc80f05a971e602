"""A run that saves at each step, resumes from what is there, and is killed."""

import os
import signal
import sys
import threading
import time

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
    settings["per_device_train_batch_size"] = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    trained = trainer(folder, extra={"callbacks": [*callbacks]}, **settings)
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    trained.train(resume_from_checkpoint=last)
    return trained


def main(folder, kind, begun=None):
    from hf_mmst.memory import feature_store

    feature_store.SHARD_BYTES = 1  # each batch of features is written at once
    torch.set_num_threads(1)
    run(folder, kind, *([] if begun is None else [Begins(begun)]))


def rank(folder, kind):
    """One process of several."""
    main(folder, kind)
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of the process group now and then abort an interpreter that ends


def killed_rank(folder, kind, number):
    """One process of several, of which the second is killed, wherever it is, when a checkpoint is there."""

    def kill():
        while not (folder / f"checkpoint-{number}").is_dir():
            time.sleep(0.02)
        (folder / "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    (folder.parent / f"pid.{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        threading.Thread(target=kill, daemon=True).start()
    main(folder, kind)
