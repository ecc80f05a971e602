"""One process of a run whose stages are shared out: trains a tiny model, says what it holds. Arguments: JSON."""

import json
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer


class Fails(TrainerCallback):
    """Raises, or ends the process, in one rank at step 3."""

    def __init__(self, rank, way):
        self.rank, self.way = rank, way

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == self.rank:
            if self.way == "raise":
                raise FloatingPointError("something broke")
            os.kill(os.getpid(), 9)


def held(tensors):
    """Bytes of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def main(name, folder, settings, resume=None, fails=None, samples=30):
    """Total batch of 8, whatever the number of processes."""
    torch.set_num_threads(1)
    args = MMSTConfig(
        folder,
        **{
            "num_stages": 4,
            "stage_clipping": True,
            "max_grad_norm": 0.5,
            "learning_rate": 1e-3,
            "logging_steps": 3,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "save_strategy": "no",
            "max_steps": 9,
            **settings,
        },
    )
    set_seed(0)
    trainer = MMSTTrainer(
        make(name),
        args,
        train_dataset=Samples(name, samples),
        eval_dataset=Samples(name, 21, seed=1),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[Fails(*fails)] if fails else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    predicted = trainer.predict(Samples(name, 21, seed=1)).predictions
    trainer.save_model()
    parameters = [*trainer.model.parameters(), *trainer.heads.parameters()]
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    found = {
        "metrics": metrics,
        "log": trainer.state.log_history,
        "weights": held(parameters),
        "states": held(states),
        "own": getattr(trainer, "_own", None) and list(trainer._own),
    }
    save_file({"predicted": torch.as_tensor(predicted)}, os.path.join(folder, f"{args.process_index}.safetensors"))
    with open(os.path.join(folder, f"{args.process_index}.json"), "w") as file:
        json.dump(found, file)
    trainer.end()
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of the process group now and then abort an interpreter that ends


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
