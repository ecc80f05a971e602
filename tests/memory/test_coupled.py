"""End-to-end training with one layer in memory: the numbers of plain Trainer."""

import pytest
import torch
from runs import StopAt, arguments, assert_same, losses, trainer, weights
from runs import run_coupled as run
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from zoo import Samples, make

SETTINGS = [
    {"max_grad_norm": 0.0},
    {"max_grad_norm": 0.1, "weight_decay": 0.01},
    {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "bf16": True},
]


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
        shelves = self.trainer._run.staged.residency._shelves

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
    resting = {shelf.tensors[0].data_ptr() for shelf in trained._run.staged.residency._shelves.values()}
    assert {next(trained.model.get_submodule(n).parameters()).data_ptr() for n in trained.partition.layers} == resting
    assert "eval_loss" in trained.evaluate()
    trained.save_model()
    assert_same(weights(type(trained.model).from_pretrained(tmp_path)), weights(trained.model))


LAPS = [
    {"stage_order": "simultaneous", "coupled_laps": 1},
    {"stage_order": "sequential", "coupled_laps": 1, "feature_cache": "disk", "dropout": False},
    {"stage_order": "multi_lap", "num_laps": 2, "coupled_laps": 2},
]


@pytest.mark.parametrize("settings", LAPS)
def test_coupled_laps_are_end_to_end_from_where_the_stages_are(settings, tmp_path):
    """One batch, plain SGD: the last turn's steps are those of plain Trainer that begins with its weights."""
    data = {"data": Samples("bert", 8), "max_steps": 16, "optim": "sgd", "lr_scheduler_type": "constant"}
    settings = {**settings, "dropout": False, "learning_rate": 0.05}
    whole = trainer(tmp_path / "whole", "bert", **data, **settings)
    whole.train()
    steps = sum(segment.steps for segment in whole._run.turns.order.segments if segment.coupled)
    local = trainer(tmp_path / "local", "bert", extra={"callbacks": [StopAt(16 - steps)]}, **data, **settings)
    local.train()
    args = arguments(tmp_path / "plain", TrainingArguments, **{k: v for k, v in data.items() if k != "data"})
    args.max_steps, args.learning_rate = steps, 0.05
    plain = Trainer(local.model, args, train_dataset=data["data"])
    plain.train()
    for key, tensor in weights(plain.model).items():
        torch.testing.assert_close(weights(whole.model)[key], tensor, rtol=1e-5, atol=1e-7)
    assert [segment.coupled for segment in whole._run.turns.order.segments][-settings["coupled_laps"] :] == [
        True
    ] * settings["coupled_laps"]
    assert "coupled_peak_bytes" in whole.peaks.by_name


@pytest.mark.parametrize("settings", LAPS[1:])
def test_coupled_laps_resume_and_take_one_layer_at_a_time(settings, tmp_path):
    settings = {"dropout": True, **settings, "num_train_epochs": 6, "save_strategy": "steps", "save_steps": 1}
    settings |= {"max_grad_norm": 0.0}
    runs = {}
    for kind, residency, stop in (("all", "all", 99), ("stage", "stage", 99), ("resumed", "stage", 50)):
        own = {**settings, "stage_residency": residency, "activation_checkpointing": True}
        own["save_steps"] = 50 if kind == "resumed" else 1000
        set_seed(0)
        runs[kind] = trainer(tmp_path / kind, "bert", extra={"callbacks": [StopAt(stop)]}, **own)
        runs[kind].train()
        if kind == "resumed":
            assert runs[kind]._run.turns.order.at(50).coupled
            runs[kind] = trainer(tmp_path / kind, "bert", **own)
            runs[kind].train(resume_from_checkpoint=True)
    assert_same(weights(runs["stage"].model), weights(runs["all"].model))
    assert_same(weights(runs["resumed"].model), weights(runs["stage"].model))


def test_epochs_of_coupled_laps(tmp_path):
    """Each of R + n laps has N / (R + n) epochs of 4 steps, for every stage."""
    for settings, steps in (
        ({"coupled_laps": 1}, 16),
        ({"coupled_laps": 1, "stage_order": "sequential"}, 8 * 3 + 8),
        ({"coupled_laps": 2, "stage_order": "multi_lap", "num_laps": 2}, 2 * 4 * 3 + 2 * 4),
    ):
        run = trainer(tmp_path, num_train_epochs=4, **settings)
        run.train()
        assert run.state.global_step == run.state.max_steps == steps


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
    with pytest.raises(ValueError, match="coupled_laps=1 steps each layer by itself.* Set bf16=True"):
        arguments(tmp_path, stage_order="sequential", stage_residency="stage", coupled_laps=1, fp16=True)
    with pytest.raises(ValueError, match='coupled_laps=1 has no effect with stage_order="coupled".*coupled_laps=0'):
        arguments(tmp_path, stage_order="coupled", coupled_laps=1)
    with pytest.raises(ValueError, match='feature_cache="disk".*stage_order="coupled" all of them learn'):
        arguments(tmp_path, stage_order="coupled", feature_cache="disk")
