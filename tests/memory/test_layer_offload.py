"""End-to-end training with one layer in memory: the numbers of plain Trainer."""

from dataclasses import replace

import pytest
import torch
from elsewhere import PLACES, play
from runs import StopAt, arguments, assert_same, losses, trainer, weights
from runs import run_end_to_end as run
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from zoo import Samples, batch, make

from hf_mmst import MMSTTrainer
from hf_mmst.planning import costs
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way

SETTINGS = [{"max_grad_norm": 0.1, "weight_decay": 0.01}, {"gradient_accumulation_steps": 2, "bf16": True}]
OFFLOADED = Way(offload="layers")
SGD = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9})}


def moments(trained):
    names = {id(p): n for n, p in trained.model.named_parameters()}
    return {
        f"{names[id(p)]}.{kind}": value.clone()
        for p, state in trained.optimizer.state.items()
        for kind, value in state.items()
    }


def assert_same_steps(offloaded, plain):
    """Weights, optimizer states and norms of gradients to the last bit; returns the norms."""
    assert_same(weights(offloaded.model), weights(plain.model))
    assert_same(moments(offloaded), moments(plain))
    norms = [[entry["grad_norm"] for entry in one.state.log_history if "loss" in entry] for one in (offloaded, plain)]
    assert norms[0] == norms[1]
    return norms[0]


class Sentences(Samples):
    """Texts of 17 tokens, so that as many labels as a power of two count in a batch: means of means are the mean."""

    def __init__(self, size):
        ids = torch.randint(3, 99, (size, 17), generator=torch.Generator().manual_seed(0))
        self.columns = {"input_ids": ids, "labels": ids}


LIMITS = {"vit": (2, 1), "bert": (0.5, 0.3), "llama": (0.85, 0.5)}  # with one micro-batch a step, and with three


@pytest.mark.parametrize(
    ("name", "place", "accumulation", "extra", "kept"),
    [
        ("vit", "in place", 1, {}, {}),
        ("vit", "late", 3, {}, {"offloaded_step": "device"}),
        ("vit", "in place", 3, SGD, {"resident_layers": 2}),
        ("bert", "late", 3, {}, {}),
        ("bert", "early", 1, SGD, {"resident_layers": 1, "offloaded_step": "device"}),
        ("llama", "late", 3, {}, {"offloaded_step": "device"}),
        ("llama", "early", 1, SGD, {"resident_layers": 1}),
        ("llama", "in place", 3, SGD, {"resident_layers": 2}),
    ],
)
def test_twenty_steps_are_those_of_plain_trainer(name, place, accumulation, extra, kept, tmp_path, monkeypatch):
    play(place, monkeypatch)
    limit = LIMITS[name][accumulation > 1]
    settings = {"max_steps": 20, "max_grad_norm": limit, "gradient_accumulation_steps": accumulation}
    if name == "llama":
        extra = {**extra, "train_dataset": Sentences(48)}
    offloaded = run(tmp_path / "offloaded", name, extra=extra, **kept, **settings)
    offloaded.train()
    plain = run(tmp_path / "plain", name, Trainer, extra=extra, **settings)
    if name == "bert":  # which is not told how many labels there are, although Trainer believes so
        plain.model_accepts_loss_kwargs = False
    plain.train()
    norms = assert_same_steps(offloaded, plain)
    assert min(norms) < limit < max(norms)
    assert losses(offloaded) == pytest.approx(losses(plain), rel=1e-5)


def test_a_step_on_the_device_is_refused_for_what_does_not_step_layer_by_layer(tmp_path):
    class Unknown(torch.optim.SGD):
        pass

    extra = {"optimizer_cls_and_kwargs": (Unknown, {"lr": 1e-2})}
    with pytest.raises(ValueError, match='Unknown it is not known.*Set offloaded_step="host"'):
        run(tmp_path, extra=extra, max_steps=1, offloaded_step="device").train()


@pytest.mark.parametrize(("name", "accumulation", "place"), [("vit", 1, "late"), ("bert", 3, "early")])
def test_in_mixed_precision_half_of_the_bytes_move_for_the_same_numbers(
    name, accumulation, place, tmp_path, monkeypatch
):
    play(place, monkeypatch)
    settings = {"max_steps": 6, "max_grad_norm": 0.5, "gradient_accumulation_steps": accumulation, "bf16": True}
    offloaded = run(tmp_path / "offloaded", name, **settings)
    offloaded.train()
    plain = run(tmp_path / "plain", name, Trainer, **settings)
    if name == "bert":
        plain.model_accepts_loss_kwargs = False
    plain.train()
    assert_same_steps(offloaded, plain)
    assert {p.dtype for p in offloaded.model.parameters()} == {torch.float32}
    layers = [offloaded.model.get_submodule(layer) for layer in offloaded.partition.layers]
    sent = [
        sum(
            p.nbytes // (2 if type(m) is nn.Linear else 1) for m in layer.modules() for p in m.parameters(recurse=False)
        )
        for layer in layers
    ]
    moved = offloaded._run.moved
    assert moved["moved_out_bytes"] == accumulation * sum(sent)
    assert moved["moved_in_bytes"] == accumulation * (2 * sum(sent) - sum(sent[-2:]))
    planned = Simulation(make(name), batch(name, 8), "bf16", for_gpu=True)
    assert costs.moved_bytes(planned, OFFLOADED).total == 3 * sum(sent) - sum(sent[-2:])
    assert planned.peak(OFFLOADED).total < Simulation(make(name), batch(name, 8), for_gpu=True).peak(OFFLOADED).total


def test_a_step_on_the_device_moves_what_is_planned(tmp_path, monkeypatch):
    play("late", monkeypatch)
    trained = run(tmp_path, "vit", max_steps=2, offloaded_step="device")
    trained.train()
    way = replace(OFFLOADED, offloaded_step="device")
    planned = costs.moved_bytes(Simulation(make("vit"), batch("vit", 8), for_gpu=True), way)
    assert planned.step_in == 4 * planned.backward_out  # weights, gradients and two states
    assert sum(trained._run.moved.values()) == planned.total


@pytest.mark.parametrize(("name", "settings"), zip(["distilbert", "dinov2"], SETTINGS, strict=True))
def test_the_numbers_are_those_of_plain_trainer(name, settings, tmp_path):
    offloaded = run(tmp_path / "offloaded", name, **settings)
    offloaded.train()
    plain = run(tmp_path / "plain", name, Trainer, **settings)
    plain.model_accepts_loss_kwargs = False  # a mean of means, all batches are full
    plain.train()
    found, expected = weights(offloaded.model), weights(plain.model)
    if "bf16" not in settings:  # in which gradients are rounded where layers are recomputed
        assert_same(found, expected)
        assert losses(offloaded) == losses(plain)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(offloaded.state.log_history, plain.state.log_history, strict=True):
        assert ours.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=1e-4)


def test_weights_in_half_precision_are_clipped_as_by_plain_trainer(tmp_path):
    runs = []
    for cls in (MMSTTrainer, Trainer):
        model = make("bert", dropout=True).to(torch.bfloat16)
        runs.append(run(tmp_path / cls.__name__, cls=cls, model=model, max_grad_norm=0.3, max_steps=5))
        runs[-1].train()
    assert min(assert_same_steps(*runs)) > 0.3


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
        slabs = self.trainer._run.staged.offload._slabs

        def look(*_):
            layers = {name: list(model.get_submodule(name).parameters()) for name in slabs}
            self.looks += 1
            away = [n for n, s in slabs.items() if layers[n][0].data_ptr() != s.tensors[0].data_ptr()]
            at_rest = {
                t.data_ptr() for _, slab in self.trainer._run.staged.offload._gradients.values() for t in slab.tensors
            }
            gradients = [
                n for n, found in layers.items() if {p.grad.data_ptr() for p in found if p.grad is not None} - at_rest
            ]
            self.most = max(self.most, len({*away, *gradients}))

        for name in slabs:  # within the layer, where it is when the backward pass recomputes it
            next(model.get_submodule(name).children()).register_forward_pre_hook(look)


def test_one_layer_at_a_time_is_in_memory(tmp_path, monkeypatch):
    play("late", monkeypatch)
    watch = Watch()
    watch.trainer = trained = run(tmp_path, callbacks=[watch])
    trained.train()
    assert watch.most == 1
    assert watch.looks == 2 * 4 * trained.state.global_step  # forward, and again in the backward pass
    resting = {slab.tensors[0].data_ptr() for slab in trained._run.staged.offload._slabs.values()}
    assert {next(trained.model.get_submodule(n).parameters()).data_ptr() for n in trained.partition.layers} == resting
    assert "eval_loss" in trained.evaluate()
    trained.save_model()
    assert_same(weights(type(trained.model).from_pretrained(tmp_path)), weights(trained.model))


@pytest.mark.parametrize(
    ("place", "accumulation", "some_frozen"),
    [("in place", 3, False), ("in place", 3, True), ("late", 1, True), ("late", 3, False)],
)
def test_bytes_moved_are_those_of_the_formula_and_of_the_plan(place, accumulation, some_frozen, tmp_path, monkeypatch):
    """In a ring of two, the backward pass finds what the forward pass has left."""
    play(place, monkeypatch)
    model = make("bert")
    layers = model.bert.encoder.layer
    if some_frozen:
        layers.requires_grad_(False)
        for layer in layers:
            layer.attention.requires_grad_(True)
    planned = costs.moved_bytes(Simulation(model, batch("bert", 8), for_gpu=place == "late"), OFFLOADED).total
    trained = run(tmp_path, model=model, max_steps=2, gradient_accumulation_steps=accumulation)
    trained.train()
    passes_bytes = sum(p.nbytes for p in [*layers.parameters(), *layers[: 2 if place == "late" else 4].parameters()])
    gradient_bytes = sum(p.nbytes for p in layers.parameters() if p.requires_grad)
    moved = {
        "moved_in_bytes": accumulation * passes_bytes + (accumulation - 1) * gradient_bytes,
        "moved_out_bytes": accumulation * gradient_bytes,
    }
    steps = [entry for entry in trained.state.log_history if "loss" in entry]
    assert len(steps) == 2
    assert all(entry | moved == entry for entry in [*steps, trained.results({})])
    assert planned == passes_bytes + gradient_bytes  # of a micro-batch


def test_gradients_that_others_have_changed_are_measured_again(tmp_path):
    class Doubled(MMSTTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for parameter in model.parameters():
                parameter.grad.mul_(2)
            return loss

    def norm(cls):
        trained = run(tmp_path, cls=cls, max_steps=1)
        trained.train()
        return trained.state.log_history[0]["grad_norm"]

    assert norm(Doubled) == 2 * norm(MMSTTrainer)


def test_an_optimizer_that_counts_its_steps_takes_one(tmp_path):
    """Of one that is not known, a step for each layer would be several steps."""

    class Counting(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            for group in self.param_groups:
                group["lr"] = 1e-2 / self.steps
            return super().step(closure)

    extra = {"optimizer_cls_and_kwargs": (Counting, {"lr": 1e-2})}
    settings = {"max_steps": 3, "max_grad_norm": 0.1, "lr_scheduler_type": "constant"}
    found = []
    for cls in (MMSTTrainer, Trainer):
        trained = run(tmp_path, "bert", cls, extra=extra, **settings)
        trained.train()
        found.append(weights(trained.model))
    assert_same(*found)


@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_the_backward_pass_leaves_nothing_stale(place, tmp_path, monkeypatch):
    play(place, monkeypatch)
    whole, broken = run(tmp_path / "whole"), run(tmp_path / "broken", gradient_accumulation_steps=1)
    layer = broken.model.bert.encoder.layer[1]

    def fail(*_):
        raise KeyboardInterrupt

    handle = layer.output.register_full_backward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    handle.remove()
    assert all(parameter.grad is None for layer in broken.model.bert.encoder.layer for parameter in layer.parameters())
    assert_same(weights(broken.model), weights(whole.model))
    for one in (whole, broken):
        set_seed(0)
        one.train()
    assert_same(weights(broken.model), weights(whole.model))
    assert_same(moments(broken), moments(whole))


LAPS = [
    {"stage_order": "simultaneous", "end_to_end_laps": 1},
    {"stage_order": "sequential", "end_to_end_laps": 1, "feature_cache": "disk", "dropout": False},
    {"stage_order": "multi_lap", "num_laps": 2, "end_to_end_laps": 2},
]


@pytest.mark.parametrize("settings", LAPS)
def test_end_to_end_laps_are_end_to_end_from_where_the_stages_are(settings, tmp_path):
    """One batch, plain SGD: the last turn's steps are those of plain Trainer that begins with its weights."""
    data = {"data": Samples("bert", 8), "max_steps": 16, "optim": "sgd", "lr_scheduler_type": "constant"}
    settings = {**settings, "dropout": False, "learning_rate": 0.05}
    whole = trainer(tmp_path / "whole", "bert", **data, **settings)
    whole.train()
    steps = sum(segment.steps for segment in whole._run.turns.order.segments if segment.end_to_end)
    local = trainer(tmp_path / "local", "bert", extra={"callbacks": [StopAt(16 - steps)]}, **data, **settings)
    local.train()
    args = arguments(tmp_path / "plain", TrainingArguments, **{k: v for k, v in data.items() if k != "data"})
    args.max_steps, args.learning_rate = steps, 0.05
    plain = Trainer(local.model, args, train_dataset=data["data"])
    plain.train()
    for key, tensor in weights(plain.model).items():
        torch.testing.assert_close(weights(whole.model)[key], tensor, rtol=1e-5, atol=1e-7)
    assert [segment.end_to_end for segment in whole._run.turns.order.segments][-settings["end_to_end_laps"] :] == [
        True
    ] * settings["end_to_end_laps"]
    assert "end_to_end_process_bytes" in whole.peaks.by_name


@pytest.mark.parametrize("settings", LAPS[1:])
def test_end_to_end_laps_resume_and_take_one_layer_at_a_time(settings, tmp_path):
    settings = {"dropout": True, **settings, "num_train_epochs": 3, "save_strategy": "steps"}
    settings |= {"max_grad_norm": 0.0}
    runs = {}
    for kind, offload, stop in (("none", "none", 99), ("stages", "stages", 99), ("resumed", "stages", 20)):
        own = {**settings, "offload": offload, "activation_checkpointing": True}
        own["save_steps"] = 20 if kind == "resumed" else 1000
        set_seed(0)
        runs[kind] = trainer(tmp_path / kind, "bert", extra={"callbacks": [StopAt(stop)]}, **own)
        runs[kind].train()
        if kind == "resumed":
            assert runs[kind].state.global_step == 20 < runs[kind].state.max_steps
            assert runs[kind]._run.turns.order.at(20).end_to_end
            runs[kind] = trainer(tmp_path / kind, "bert", **own)
            runs[kind].train(resume_from_checkpoint=True)
    assert_same(weights(runs["stages"].model), weights(runs["none"].model))
    assert_same(weights(runs["resumed"].model), weights(runs["stages"].model))


def test_epochs_of_end_to_end_laps(tmp_path):
    """Each of R + n laps has N / (R + n) epochs of 4 steps, for every stage."""
    for settings, steps in (
        ({"end_to_end_laps": 1}, 16),
        ({"end_to_end_laps": 1, "stage_order": "sequential"}, 8 * 3 + 8),
        ({"end_to_end_laps": 2, "stage_order": "multi_lap", "num_laps": 2}, 2 * 4 * 3 + 2 * 4),
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
    with pytest.raises(ValueError, match=r'offload="layers".* Set bf16=True in the place of fp16'):
        arguments(tmp_path, stage_order="end_to_end", offload="layers", fp16=True)
    with pytest.raises(ValueError, match='offload="stages" steps layers one by one.* Set bf16=True'):
        arguments(tmp_path, stage_order="sequential", offload="stages", end_to_end_laps=1, fp16=True)
    with pytest.raises(
        ValueError, match='end_to_end_laps=1 has no effect with stage_order="end_to_end".*end_to_end_laps=0'
    ):
        arguments(tmp_path, stage_order="end_to_end", end_to_end_laps=1)
    with pytest.raises(ValueError, match='feature_cache="disk".*stage_order="end_to_end" all of them learn'):
        arguments(tmp_path, stage_order="end_to_end", feature_cache="disk")


def test_on_a_cpu_each_gradient_rests_as_soon_as_it_is_there(tmp_path):
    trained = run(tmp_path, max_steps=2)
    found = []

    def look(*_):
        offload = trained._run.staged.offload
        at_rest = {t.data_ptr() for _, slab in offload._gradients.values() for t in slab.tensors}
        inside = [p for layer in trained.model.bert.encoder.layer for p in layer.parameters() if p.grad is not None]
        found.append(len([p for p in inside if p.grad.data_ptr() not in at_rest]))

    for parameter in trained.model.bert.parameters():  # a hook of this test may be the first to run
        parameter.register_post_accumulate_grad_hook(look)
    trained.train()
    assert max(found) == 1
