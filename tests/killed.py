"""A run that saves at each step and is killed from outside. Argument: the output folder."""

import sys

import torch
from transformers import TrainerCallback


class Says(TrainerCallback):
    """Says on a line of its own that training begins."""

    def on_train_begin(self, args, state, control, **kwargs):
        print("begins", flush=True)


if __name__ == "__main__":
    from test_trainer import trainer

    torch.set_num_threads(1)
    run = trainer(sys.argv[1], max_steps=12, save_strategy="steps", save_steps=1, extra={"callbacks": [Says()]})
    run.train()
