"""Runs of several processes that share out stages, or of one."""

import json
import os
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer


class Killed(TrainerCallback):
    """Ends the process of rank 1 from outside after step 3, noting when."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            Path(args.output_dir).mkdir(exist_ok=True)
            Path(args.output_dir, "killed").write_text(str(time.time()))
            os.kill(os.getpid(), 9)


class Drawn(Samples):
    """Samples whose labels are drawn anew each time."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "labels": torch.randint(5, ())}


class Differing(Samples):
    """Samples whose labels are other ones in each process."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "labels": (sample["labels"] + int(os.environ.get("RANK", 0))) % 5}


def held(tensors):
    """Bytes of the storages behind tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run(name, folder, settings, resume=None, dropout=False, killed=False, data="Samples", times=1):
    """A batch of 8 of 30 samples, whatever the number of processes; returns what is known at the end."""
    args = MMSTConfig(
        folder,
        **{
            "num_stages": 4,
            "stage_clipping": True,
            "max_grad_norm": 0.5,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "logging_steps": 3,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            **settings,
        },
    )
    set_seed(0)
    trainer = MMSTTrainer(
        make(name, dropout=dropout),
        args,
        train_dataset={"Samples": Samples, "Drawn": Drawn, "Differing": Differing}[data](name, 30),
        eval_dataset=Samples(name, 21, seed=1),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[Killed()] if killed else [],
    )
    for _ in range(times):
        trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.compute_metrics = None
    predictions = trainer.predict(Samples(name, 21, seed=1)).predictions
    trainer.save_model()
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return {
        "metrics": metrics,
        "log": trainer.state.log_history,
        "predictions": predictions.tolist(),
        "weights": held([*trainer.model.parameters(), *trainer.heads.parameters()]),
        "states": held(states),
    }


def pass_on(folder):
    """Batches that each take 0.1 s, through all processes; returns when this one began and ended each."""
    from datetime import timedelta

    from hf_mmst.distributed.relay import Relay

    relay = Relay(torch.device("cpu"), timedelta(seconds=60))
    relay.gather(None)
    begins, ends = [], []
    with relay.flowing():
        for number in range(15):
            x = torch.full((3, 1 + number), float(number)) if relay.rank == 0 else relay.take(number)
            assert x.shape == (3, 1 + number)
            assert (x == number + relay.rank).all()
            begins.append(time.time())
            time.sleep(0.1)
            ends.append(time.time())
            if relay.rank < relay.num_ranks - 1:
                relay.hand_on(x + 1, number)
    return {"begins": begins, "ends": ends}


def main(runs):
    """All runs, in turn, in one of several processes."""
    torch.set_num_threads(1)
    for one in runs:
        found = run(**one) if "name" in one else pass_on(**one)
        path = Path(one["folder"]) / f"{os.environ['RANK']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found))
