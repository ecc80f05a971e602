"""Early stopping and the best model where stages learn one after the other."""

import pytest
import torch
from runs import ORDERS, StopAt, assert_same, trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

TURNS = {**ORDERS, "simultaneous": {"end_to_end_laps": 1}}
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16}
BEST = {**EACH_STEP, "metric_for_best_model": "score", "greater_is_better": True}


def run(folder, score, *callbacks, patience=1, model=None, **settings):
    """A run whose metric of a stage is what `score` says of trainer and stage; the last one's is the model's."""
    stopper = EarlyStoppingCallback(patience)
    run = trainer(folder, model=model, extra={"callbacks": [stopper, *callbacks]}, **{**BEST, **settings})
    calls = [0, 1, 2, 3]  # all heads together, and the stages

    def compute(_):
        calls.append(calls.pop(0))
        return {"score": score(run, calls[-1])}

    run.compute_metrics = compute
    return run


def worse_and_worse(run, stage):
    return -run.state.global_step


@pytest.mark.parametrize("settings", TURNS.values(), ids=TURNS)
def test_early_stopping_ends_each_turn(settings, tmp_path, capsys):
    trained = run(tmp_path, worse_and_worse, patience=2, max_steps=24, learning_rate=0.1, **settings)
    before = weights(trained.model)
    trained.train()
    turns = len(trained._run.turns.order.segments)
    assert trained.state.global_step == trained.state.max_steps == 3 * turns
    rates = [entry["learning_rate"] for entry in trained.state.log_history if "learning_rate" in entry]
    assert rates == rates[:3] * turns
    assert rates[0] == 0.1
    assert {name for name, tensor in trained.model.state_dict().items() if torch.equal(tensor, before[name])} == set()
    ended = [name for entry in trained.state.log_history for name in entry if "stopped_early" in name]
    expected = ["stopped_early", "end_to_end_stopped_early"]
    if "stage_order" in settings:
        expected = [f"stage_{k}_stopped_early" for k in (1, 2, 3)] * (turns // 3)
    assert ended == expected
    said = [line for line in capsys.readouterr().out.splitlines() if "early stopping ends the turn of" in line]
    assert len(said) == len(expected)
    done = trained.state.log_history[-1]
    assert done["train_samples_per_second"] * done["train_runtime"] == pytest.approx(8 * 3 * turns, rel=0.05)


@pytest.mark.parametrize(("better", "steps"), [("the one that learns", 18), ("the last", 2 + 2 + 6)])
def test_it_judges_the_stage_that_learns(better, steps, tmp_path):
    def score(run, stage):
        (learning,) = run._run.turns.order.at(run.state.global_step - 1).stages
        return run.state.global_step if stage == (3 if better == "the last" else learning + 1) else 0

    trained = run(tmp_path, score, max_steps=18, stage_order="sequential")
    trained.train()
    assert trained.state.global_step == steps


class StopsIfBad(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        control.should_training_stop = metrics["eval_score"] < -1


@pytest.mark.parametrize("other", [StopAt(2), StopsIfBad()])
def test_what_else_stops_the_training_does_so(other, tmp_path):
    trained = run(tmp_path, worse_and_worse, other, max_steps=18, stage_order="sequential")
    trained.train()
    assert trained.state.global_step == 2
    assert [type(one) for one in trained.callback_handler.callbacks].count(EarlyStoppingCallback) == 1


def test_the_best_model_is_one_whose_last_stage_has_learned(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    trained = run(tmp_path, worse_and_worse, max_steps=18, stage_order="sequential", **settings)
    trained.train()
    assert trained.state.global_step == 6
    assert trained.state.best_global_step == 5
    assert trained.state.best_model_checkpoint == str(tmp_path / "checkpoint-5")


RESIDENT = {"stage_order": "sequential", "offload": "stages", "feature_cache": "disk"}


@pytest.mark.parametrize(
    ("settings", "stop"), [(RESIDENT, 5), (TURNS["multi_lap"], 4)], ids=["within a turn", "between turns"]
)
def test_a_run_goes_on_with_the_turns_that_had_ended(settings, stop, tmp_path):
    settings = {**settings, "max_steps": 24, "restore_callback_states_from_checkpoint": True}
    settings |= {"save_strategy": "steps", "save_steps": stop, "lr_scheduler_type": "cosine", "dropout": True}
    set_seed(0)
    straight = run(tmp_path / "straight", worse_and_worse, **settings)
    straight.train()
    set_seed(0)
    run(tmp_path / "stopped", worse_and_worse, StopAt(stop), **settings).train()
    resumed = run(tmp_path / "stopped", worse_and_worse, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._run.turns.order == straight._run.turns.order
    assert resumed.state.global_step == straight.state.global_step == 2 * len(straight._run.turns.order.segments)
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(weights(resumed.heads), weights(straight.heads))
