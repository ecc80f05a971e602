"""What a run goes on with: from a checkpoint, with other settings, and by a trainer that has trained before."""

import os
import shutil
from unittest.mock import patch

import pytest
import torch
from runs import StopAt, arguments, assert_same, trainer, weights
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from zoo import Samples, make

from hf_mmst import MMSTTrainer
from hf_mmst.memory.feature_store import FeatureStore

RESIDENT = {"stage_order": "sequential", "offload": "stages"}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "num_stages": 2}


def run(folder, callbacks=(), name="bert", **settings):
    set_seed(0)
    return trainer(folder, name, dropout=True, extra={"callbacks": list(callbacks)}, **{**SAVING, **settings})


# ---- The best checkpoint ----

BEST = [
    {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "epoch", "save_total_limit": 1},
    {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1},
    {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1},
]


@pytest.mark.parametrize("settings", BEST)
def test_the_best_checkpoint_is_that_of_plain_trainer(settings, tmp_path):
    results = []
    for cls in (Trainer, MMSTTrainer):
        folder = tmp_path / cls.__name__
        config = {"cls": TrainingArguments} if cls is Trainer else {}
        args = arguments(folder, metric_for_best_model="accuracy", max_steps=6, **config, **settings)
        one = cls(make("bert"), args, train_dataset=Samples("bert", 16), eval_dataset=Samples("bert", 8))
        scores = [{"eval_accuracy": score} for score in (0.6, 0.9, 0.8, 0.7, *[0.5] * 9)]
        with patch.object(one, "_evaluate", side_effect=scores):
            one.train()
        state, best = one.state, one.state.best_model_checkpoint
        path = best and os.path.relpath(best, folder)
        results.append((state.best_metric, state.best_global_step, path, sorted(os.listdir(folder))))
    assert results[1] == results[0]


def test_the_best_weights_are_loaded_after_the_folder_has_moved(tmp_path):
    """Nothing is saved there any more, which would find them."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "accuracy", "max_steps": 6}
    scores = {2: 0.9, 4: 0.5, 6: 0.4}

    def make_run(folder, callbacks=(), **more):
        one = run(folder, callbacks, **{**settings, **more})
        one.compute_metrics = lambda found: {"accuracy": scores[one.state.global_step]}
        return one

    make_run(tmp_path / "before", [StopAt(4)]).train()
    shutil.move(tmp_path / "before", tmp_path / "after")
    moved = make_run(tmp_path / "after", load_best_model_at_end=True, save_steps=100)
    moved.train(resume_from_checkpoint=str(tmp_path / "after" / "checkpoint-4"))
    assert moved.state.best_model_checkpoint == str(tmp_path / "after" / "checkpoint-2")
    saved = type(moved.model).from_pretrained(tmp_path / "after" / "checkpoint-2")
    assert_same(weights(moved.model), weights(saved))


# ---- Other settings ----


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    for order in ("simultaneous", "sequential", "multi_lap"):
        laps = {"num_laps": 2} if order == "multi_lap" else {}
        run(folder / order, [StopAt(2)], stage_order=order, transport_schedule="constant", **laps).train()
    return folder


def resume(stopped, tmp_path, order="simultaneous", **settings):
    shutil.copytree(stopped / order, tmp_path / order)
    again = run(tmp_path / order, [StopAt(3)], **{"transport_schedule": "constant", **settings})
    again.train(resume_from_checkpoint=True)
    return again


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"transport_weight": 5.0}, [5.0, 5.0]),
        ({"transport_schedule": "paper"}, [0.3, 0.15]),
        ({"stage_clipping": True}, [0.3, 0.3]),
    ],
)
def test_other_settings_count_from_the_checkpoint_on_and_it_is_said(settings, expected, stopped, tmp_path, capsys):
    again = resume(stopped, tmp_path, **settings)
    ((name, value),) = settings.items()
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint-2 on" in line]
    assert len(said) == 1
    assert f"{name}={value!r} (before: " in said[0]
    assert [again._run.staged.weights[0], again._run.staged.weights[1]] == expected


def test_nothing_is_said_of_the_same_settings(stopped, tmp_path, capsys):
    resume(stopped, tmp_path, transport_schedule="auto", feature_cache="none", model_card=False)
    assert "before:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("order", "settings", "message"),
    [
        ("simultaneous", {"stage_order": "sequential"}, "Set stage_order='simultaneous', or start anew"),
        ("simultaneous", {"stage_order": "end_to_end"}, "Set stage_order='simultaneous', or start anew"),
        ("multi_lap", {"num_laps": 3}, "Set num_laps=2, or start anew"),
        ("sequential", {"max_steps": 24}, "8 optimizer steps in 2 turns, this run has 24.*Set max_steps or num_train"),
        ("sequential", {"per_device_train_batch_size": 4, "max_steps": -1}, "this run has 32"),
        ("simultaneous", {"head_learning_rate": 0.5}, "Set head_learning_rate=None"),
    ],
)
def test_settings_that_would_be_mixed_are_refused(order, settings, message, stopped, tmp_path):
    laps = {"num_laps": 2} if order == "multi_lap" else {}
    with pytest.raises(ValueError, match=message):
        resume(stopped, tmp_path, order, **{"stage_order": order, **laps, **settings})


def test_more_steps_go_on_where_all_stages_learn_at_once(stopped, tmp_path):
    assert resume(stopped, tmp_path, max_steps=16).state.global_step == 3


def test_a_folder_that_is_not_there_is_what_the_host_says(tmp_path):
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at .*nowhere"):
        run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        run(tmp_path).train(resume_from_checkpoint="true")


@pytest.mark.parametrize(("flag", "first"), [("True", 3), ("false", 1)])
def test_a_flag_resumes_from_the_last_checkpoint(flag, first, stopped, tmp_path):
    shutil.copytree(stopped / "simultaneous", tmp_path / "run")
    again = run(tmp_path / "run", [StopAt(3)], transport_schedule="constant", resume_from_checkpoint=flag)
    steps = []
    again.add_callback(
        type("Steps", (TrainerCallback,), {"on_step_end": lambda *a, **k: steps.append(a[2].global_step)})
    )
    again.train(resume_from_checkpoint=again.args.resume_from_checkpoint)
    assert steps[0] == first


# ---- The same trainer again ----


class Interrupts(TrainerCallback):
    """At step 5, a KeyboardInterrupt between steps, or an error within a layer's forward or backward pass."""

    def __init__(self, where, at=5):
        self.where, self.at = where, at

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.at:
            return
        self.at = None
        if self.where == "between":
            raise KeyboardInterrupt
        layer = model.bert.encoder.layer[-1 if self.where == "forward" else 0]
        self.hook = layer.register_forward_hook(self.fail)

    def fail(self, layer, args, output):
        if self.where == "forward":
            self.hook.remove()
            self.boom()
        elif output.requires_grad:
            self.hook.remove()
            output.register_hook(self.boom)

    def boom(self, *_):
        raise RuntimeError("CUDA out of memory. (not really)")


AGAIN = [
    ("between", {**RESIDENT, "feature_cache": "disk"}),
    ("forward", {**RESIDENT, "feature_cache": "memory"}),
    ("forward", {**RESIDENT, "end_to_end_laps": 1}),
]


@pytest.mark.parametrize(("where", "settings"), AGAIN)
def test_the_same_trainer_resumes_bitwise_after_an_error(where, settings, tmp_path):
    straight = run(tmp_path / "straight", save_strategy="no", **settings)
    straight.train()
    again = run(tmp_path / "again", [Interrupts(where)], **settings)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        again.train()
    names = {name for name, _ in again.model.named_children()}
    assert names == {name for name, _ in straight.model.named_children()}
    assert "eval_loss" in again.evaluate()
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    assert_same(weights(again.model), weights(straight.model))
    assert_same(weights(again.heads), weights(straight.heads))


def test_a_batch_that_was_too_large_leaves_nothing(tmp_path):
    """Plain SGD on one batch that holds all samples, however large it may be."""
    settings = {"stage_order": "end_to_end", "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 32, "data": Samples("bert", 8), "max_steps": 2, "dropout": False}
    trained = []
    for callbacks in ([], [Interrupts("backward", at=0)]):
        set_seed(0)
        own = {**settings, "num_stages": 2, "auto_find_batch_size": True}
        trained.append(trainer(tmp_path, "bert", extra={"callbacks": callbacks}, **own))
        trained[-1].train()
    assert [one._train_batch_size for one in trained] == [32, 28]
    for name, tensor in weights(trained[0].model).items():
        torch.testing.assert_close(weights(trained[1].model)[name], tensor, rtol=1e-5, atol=1e-6)
    layers = [trained[1].model.get_submodule(name) for name in trained[1].partition.layers]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_an_error_in_the_last_flush_leaves_the_model_as_it_came(tmp_path, monkeypatch):
    failing = run(tmp_path, [Interrupts("between")], save_strategy="no", **RESIDENT, feature_cache="disk")
    names = [name for name, _ in failing.model.named_children()]

    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "flush", full)
        with pytest.raises(OSError, match="No space left"):
            failing.train()
    assert [name for name, _ in failing.model.named_children()] == names
    assert not failing._run.staged.offload._active


def test_stopping_early_leaves_no_features(tmp_path):
    run(tmp_path, [StopAt(5)], save_strategy="no", stage_order="sequential", feature_cache="disk").train()
    assert not list(tmp_path.iterdir())


def test_what_a_save_left_is_cleared_when_the_next_run_begins(tmp_path):
    (tmp_path / "_saving" / "checkpoint-4").mkdir(parents=True)
    seen = []

    class Sees(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.extend(os.listdir(args.output_dir))

    run(tmp_path, [Sees()], max_steps=1, save_strategy="no").train()
    assert not seen
    assert not list(tmp_path.iterdir())
