"""What many tests train with: arguments, trainers, callbacks that stop a run, and comparisons of runs."""

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer

ORDERS = {
    "simultaneous": {},
    "sequential": {"stage_order": "sequential"},
    "multi_lap": {"stage_order": "multi_lap", "num_laps": 2},
}


def accuracy(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def arguments(folder, cls=MMSTConfig, **kwargs):
    kwargs = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **({"num_stages": 3} if cls is MMSTConfig else {}),
        **kwargs,
    }
    return cls(str(folder), **kwargs)


def trainer(folder, name="vit", model=None, dropout=False, data=None, extra=None, **kwargs):
    return MMSTTrainer(
        make(name, dropout=dropout) if model is None else model,
        arguments(folder, **kwargs),
        train_dataset=data or Samples(name),
        eval_dataset=Samples(name, 16, seed=1),
        compute_metrics=accuracy,
        **(extra or {}),
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class InterruptAt(StopAt):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        pass


def own_loss(cls):
    """The class with a loss of its own, as custom trainers have it, a mean over each micro-batch."""

    class Own(cls):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = nn.functional.multi_margin_loss(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    return Own


def run_end_to_end(folder, name="bert", cls=MMSTTrainer, callbacks=None, model=None, extra=None, **settings):
    """Plain Trainer checkpoints, too: in bf16 that is not without rounding."""
    ours = issubclass(cls, MMSTTrainer)
    config = MMSTConfig if ours else TrainingArguments
    order = {"stage_order": "end_to_end"} if ours else {"activation_checkpointing": True}
    args = arguments(folder, config, **order, **settings)
    set_seed(0)
    model = make(name, dropout=True) if model is None else model
    data = {"train_dataset": Samples(name, 48), "eval_dataset": Samples(name, 16, seed=1)}
    return cls(model, args, callbacks=callbacks, **data | (extra or {}))


def run_resting(folder, name="bert", model=None, order="multi_lap", offload="stages", extra=None, **kwargs):
    set_seed(0)
    settings = {"dropout": True, "num_train_epochs": 2, **ORDERS[order], **kwargs}
    return trainer(folder, name, model, offload=offload, extra=extra, **settings)


def moments(trained):
    """Optimizer states by the parameters' names."""
    names = {id(p): n for n, p in [*trained.model.named_parameters(), *trained.heads.named_parameters("heads")]}
    return {
        f"{names[id(p)]}.{kind}": value.clone()
        for p, state in trained.optimizer.state.items()
        for kind, value in state.items()
        if torch.is_tensor(value)
    }
