"""End-to-end training with one layer in memory: the numbers of plain Trainer."""

import pytest
import torch
from test_trainer import StopAt, arguments, assert_same, losses, weights
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer

SETTINGS = [
    {"max_grad_norm": 0.0},
    {"max_grad_norm": 0.1, "weight_decay": 0.01},
    {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "bf16": True},
]


def run(folder, name="bert", cls=MMSTTrainer, callbacks=None, model=None, **settings):
    """Plain Trainer checkpoints, too: in bf16 that is not without rounding."""
    config = MMSTConfig if cls is MMSTTrainer else TrainingArguments
    order = {"stage_order": "coupled"} if cls is MMSTTrainer else {"activation_checkpointing": True}
    args = arguments(folder, config, **order, **settings)
    set_seed(0)
    model = make(name, dropout=True) if model is None else model
    return cls(
        model, args, train_dataset=Samples(name, 48), eval_dataset=Samples(name, 16, seed=1), callbacks=callbacks
    )


def moments(trained):
    names = {id(p): n for n, p in trained.model.named_parameters()}
    return {
        f"{names[id(p)]}.{kind}": value.clone()
        for p, state in trained.optimizer.state.items()
        for kind, value in state.items()
    }


@pytest.mark.parametrize("name", ["vit", "bert", "distilbert", "dinov2"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_numbers_are_those_of_plain_trainer(name, settings, tmp_path):
    coupled = run(tmp_path / "coupled", name, **settings)
    coupled.train()
    plain = run(tmp_path / "plain", name, Trainer, **settings)
    if "gradient_accumulation_steps" in settings:  # Trainer's loss is a mean of means there; all batches are full
        plain.model_accepts_loss_kwargs = False
    plain.train()
    found, expected = weights(coupled.model), weights(plain.model)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    if settings["max_grad_norm"] == 0:
        assert_same(found, expected)
        assert_same(moments(coupled), moments(plain))
        assert losses(coupled) == losses(plain)
    for ours, theirs in zip(coupled.state.log_history, plain.state.log_history, strict=True):
        assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_resume_is_bitwise_the_uninterrupted_run(settings, tmp_path):
    settings = {**settings, "save_strategy": "steps", "save_steps": 5, "eval_strategy": "epoch"}
    straight = run(tmp_path / "straight", **settings)
    straight.train()
    run(tmp_path / "stopped", callbacks=[StopAt(5)], **settings).train()
    resumed = run(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(moments(resumed), moments(straight))
    layers = [resumed.model.get_submodule(name) for name in resumed.partition.layers]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


class Watch(TrainerCallback):
    """Which layers are on the device when another one begins its forward pass, and which have gradients."""

    def __init__(self):
        self.most = self.looks = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        shelves = self.trainer._residency._shelves

        def look(*_):
            layers = {name: list(model.get_submodule(name).parameters()) for name in shelves}
            self.looks += 1
            away = [n for n, s in shelves.items() if layers[n][0].data_ptr() != s.tensors[0].data_ptr()]
            gradients = [n for n, parameters in layers.items() if any(p.grad is not None for p in parameters)]
            self.most = max(self.most, len({*away, *gradients}))

        for name in shelves:  # within the layer, where it is when the backward pass recomputes it
            next(model.get_submodule(name).children()).register_forward_pre_hook(look)


def test_one_layer_at_a_time_is_in_memory(tmp_path):
    watch = Watch()
    watch.trainer = trained = run(tmp_path, callbacks=[watch])
    trained.train()
    assert watch.most == 1
    assert watch.looks == 2 * 4 * trained.state.global_step  # forward, and again in the backward pass
    resting = {shelf.tensors[0].data_ptr() for shelf in trained._residency._shelves.values()}
    assert {next(trained.model.get_submodule(n).parameters()).data_ptr() for n in trained.partition.layers} == resting
    assert "eval_loss" in trained.evaluate()
    trained.save_model()
    assert_same(weights(type(trained.model).from_pretrained(tmp_path)), weights(trained.model))


def test_frozen_layers_stay_as_they_were(tmp_path):
    model = make("bert")
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    before = weights(model.bert.encoder.layer[1])
    run(tmp_path, model=model).train()
    assert_same(weights(model.bert.encoder.layer[1]), before)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'stage_order="coupled".* Set bf16=True in the place of fp16'):
        arguments(tmp_path, stage_order="coupled", fp16=True)
    with pytest.raises(ValueError, match="cannot each be checkpointed by itself.*Set another stage_order"):
        run(tmp_path, "swin")
    with pytest.raises(ValueError, match='feature_cache="disk".*stage_order="coupled" all of them learn'):
        arguments(tmp_path, stage_order="coupled", feature_cache="disk")
