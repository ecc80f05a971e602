"""One stage in device memory: the same numbers, and everything else at rest."""

import errno
import os

import pytest
from elsewhere import play
from runs import StopAt, arguments, assert_same, losses, moments, weights
from runs import run_resting as run
from torch import nn
from transformers import TrainerCallback, set_seed
from zoo import Samples, make

MIXED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "bf16": True}


@pytest.mark.parametrize(
    ("name", "order", "settings", "place"),
    [
        ("vit", "sequential", {}, "in place"),
        ("bert", "sequential", MIXED, "late"),
        ("swin", "sequential", {}, "in place"),
        ("vit", "multi_lap", MIXED, "late"),
        ("bert", "multi_lap", {}, "in place"),
        ("swin", "multi_lap", MIXED, "late"),
    ],
)
def test_the_numbers_are_those_of_all_stages_in_memory(name, order, settings, place, tmp_path, monkeypatch):
    play(place, monkeypatch)
    trained = {}
    for offload in ("none", "stages"):
        folder = tmp_path / offload
        trained[offload] = run(folder, name, None, order, offload, eval_strategy="epoch", **settings)
        trained[offload].train()
    assert_same(weights(trained["stages"].model), weights(trained["none"].model))
    assert_same(weights(trained["stages"].heads), weights(trained["none"].heads))
    assert_same(moments(trained["stages"]), moments(trained["none"]))
    assert losses(trained["stages"]) == losses(trained["none"])
    found, expected = (trained[offload].evaluate() for offload in ("stages", "none"))
    assert [found[k] for k in found if "stage" in k] == [expected[k] for k in found if "stage" in k]
    model = trained["stages"].model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (3, {}),
        (15, {"activation_checkpointing": True}),
        (6, {"optim": "adafactor"}),
        *(
            (stop, {**MIXED, "lr_scheduler_type": "cosine", "warmup_steps": 2, "num_train_epochs": 8})
            for stop in (3, 15)
        ),
    ],
)
def test_resume_is_bitwise_the_uninterrupted_run(stop, settings, tmp_path):
    """Four steps a turn: in the first of six, at the end of the fourth, and between."""
    settings = {
        "data": Samples("bert", 16),
        "num_train_epochs": 4,
        "save_strategy": "steps",
        "save_steps": stop,
        **settings,
    }
    straight = run(tmp_path / "straight", **settings)
    straight.train()
    stopped = run(tmp_path / "stopped", extra={"callbacks": [StopAt(stop)]}, **settings)
    stopped.train()
    assert stopped.state.global_step == stop < straight.state.global_step
    resumed = run(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(moments(resumed), moments(straight))


class Watch(TrainerCallback):
    """Notes before each optimizer step which layers are on the device, and whose optimizer states are."""

    def __init__(self):
        self.layers, self.states = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        slabs = self.trainer._run.staged.offload._slabs
        self.layers.append(
            [
                name
                for name, slab in slabs.items()
                if next(model.get_submodule(name).parameters()).data_ptr() != slab.tensors[0].data_ptr()
            ]
        )

    def on_step_end(self, args, state, control, **kwargs):
        offload = self.trainer._run.staged.offload
        at_rest = {t.data_ptr() for slab in offload.states._slabs.values() for t in slab.tensors}
        owner = {id(p): name for name, parameters in offload._parameters.items() for p in parameters}
        found = self.trainer.optimizer.state.items()
        self.states.append(
            {
                owner.get(id(p))
                for p, values in found
                for value in values.values()
                if value.numel() > 1 and value.data_ptr() not in at_rest
            }
            - {None}
        )


def test_only_the_stage_that_learns_is_in_memory(tmp_path, monkeypatch):
    play("late", monkeypatch)
    watch = Watch()
    watch.trainer = trained = run(tmp_path, extra={"callbacks": [watch]})
    trained.train()
    for step, (layers, states) in enumerate(zip(watch.layers, watch.states, strict=True)):
        (stage,) = trained._run.turns.order.at(step).stages
        assert layers == list(trained.partition.stages[stage])
        assert states <= set(layers)
    assert any(watch.states)
    resting = {slab.tensors[0].data_ptr() for slab in trained._run.staged.offload._slabs.values()}
    assert {next(trained.model.get_submodule(n).parameters()).data_ptr() for n in trained.partition.layers} == resting


def test_after_resume_only_the_stage_that_learns_is_in_memory(tmp_path, monkeypatch):
    play("late", monkeypatch)
    settings = {"data": Samples("bert", 16), "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 15}
    run(tmp_path, extra={"callbacks": [StopAt(15)]}, **settings).train()
    watch = Watch()
    watch.trainer = resumed = run(tmp_path, extra={"callbacks": [watch]}, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert any(watch.states)
    for step, states in enumerate(watch.states, start=15):
        assert states <= {*resumed.partition.stages[resumed._run.turns.order.at(step).stages[0]]}


@pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"),
    reason="this system does not list a process's mapped files; the numbers are compared without it",
)
def test_the_checkpoint_that_a_model_was_loaded_from_is_not_kept_mapped(tmp_path):
    make("bert").save_pretrained(tmp_path / "model")
    model = type(make("bert")).from_pretrained(tmp_path / "model")

    def is_mapped():
        return any(str(tmp_path / "model") in line for line in open("/proc/self/maps"))

    assert is_mapped()
    run(tmp_path / "run", model=model, order="sequential", num_train_epochs=1).train()
    assert not is_mapped()


def test_the_file_has_no_name_and_the_checkpoint_is_complete(tmp_path):
    trained = run(tmp_path)
    assert list(tmp_path.iterdir()) == []
    trained.train()
    trained.save_model()
    model = type(trained.model).from_pretrained(tmp_path)
    assert_same(weights(model), weights(trained.model))


def test_training_twice_goes_on(tmp_path):
    trained = {offload: run(tmp_path / offload, offload=offload) for offload in ("none", "stages")}
    for one in trained.values():
        set_seed(0)
        one.train()
        one.train()
    assert_same(weights(trained["stages"].model), weights(trained["none"].model))


def test_a_full_disk_is_said_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"bytes for layers at rest cannot be had in .*No space left.*Set output_dir"):
        run(tmp_path)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match='Set stage_order to "sequential" or "multi_lap"'):
        arguments(tmp_path, offload="stages")
    with pytest.raises(ValueError, match="Set offload to one of none, stages, layers"):
        arguments(tmp_path, offload="disk")
    with pytest.raises(ValueError, match="Set bf16_full_eval=False"):
        arguments(tmp_path, offload="layers", bf16_full_eval=True)


def test_a_frozen_layer_stays_as_it_was(tmp_path):
    model: nn.Module = make("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    before = weights(model.bert.encoder.layer[0])
    run(tmp_path, model=model).train()
    assert_same(weights(model.bert.encoder.layer[0]), before)
