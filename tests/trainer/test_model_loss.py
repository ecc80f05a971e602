"""Stages that learn from the model's own loss, one at a time, while all else is frozen."""

import pytest
from elsewhere import play
from runs import StopAt, arguments, assert_same, losses, moments, own_loss, trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from zoo import Samples, make

from hf_mmst import EarlyExit, MMSTTrainer, load_stages, truncate

BLOCKS = {"stage_order": "sequential", "num_laps": 1, "stage_objective": "model"}
AFTER = ("bert.pooler.", "classifier.")
LAPS = {"stage_order": "multi_lap", "num_laps": 2, "stage_objective": "model"}


def run(folder, name="bert", model=None, callbacks=(), **settings):
    set_seed(0)
    settings = {"dropout": True, "num_train_epochs": 6, **LAPS, **settings}
    return trainer(folder, name, model, extra={"callbacks": list(callbacks)}, **settings)


class Watch(TrainerCallback):
    """Before each step, the parameters that have gradients, and those that have optimizer states after it."""

    def __init__(self):
        self.gradients, self.states = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        state = optimizer.state
        self.states.append({n: int(state[p]["step"]) for n, p in model.named_parameters() if p in state})


@pytest.mark.parametrize("settings", [{}, {"offload": "stages"}])
def test_gradients_and_states_are_those_of_the_stage_that_learns(settings, tmp_path):
    watch = Watch()
    trained = run(tmp_path, callbacks=[watch], **settings)
    trained.train()
    assert len(watch.gradients) == trained.state.max_steps == 24  # 6 epochs of 4 steps, shared out over 6 turns
    names = {n for n, _ in trained.model.named_parameters()}
    for step, (gradients, states) in enumerate(zip(watch.gradients, watch.states, strict=True)):
        stage = step // 4 % 3
        own = tuple(f"{layer}." for layer in trained.partition.stages[stage])
        others = tuple(f"{layer}." for layer in trained.partition.layers if f"{layer}." not in own)
        before = {n for n in names if "embeddings" in n}
        assert gradients == {n for n in names if not n.startswith(others)} - (before if stage > 0 else set())
        # Those of a stage begin anew with its turn; what comes after the layers learns in all turns.
        assert states == {n: (step if n.startswith(AFTER) else step % 4) + 1 for n in gradients}
    assert all(parameter.requires_grad for parameter in trained.model.parameters())
    assert len(trained.heads) == 0


@pytest.mark.parametrize(("name", "place"), [("vit", "in place"), ("bert", "late")])
def test_the_numbers_do_not_depend_on_where_layers_are(name, place, tmp_path, monkeypatch):
    play(place, monkeypatch)
    ways = {
        "all": {},
        "stage": {"offload": "stages"},
        "checkpointing": {"activation_checkpointing": True},
        "cached": {"feature_cache": "disk"},
        "both": {"offload": "stages", "feature_cache": "memory"},
    }
    found = {}
    for kind, settings in ways.items():
        found[kind] = run(tmp_path / kind, name, gradient_accumulation_steps=2, max_grad_norm=0.1, **settings)
        found[kind].train()
    for kind in ways:
        assert_same(weights(found[kind].model), weights(found["all"].model))
        assert_same(moments(found[kind]), moments(found["all"]))
        assert losses(found[kind]) == losses(found["all"])


AT_REST = {"offload": "stages", "feature_cache": "disk"}


@pytest.mark.parametrize(("stop", "settings"), [(6, {}), (6, AT_REST), (8, AT_REST)])  # 8: where the next turn begins
def test_resume_is_bitwise_the_uninterrupted_run(stop, settings, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": stop, **settings}
    straight = run(tmp_path / "straight", **settings)
    straight.train()
    run(tmp_path / "stopped", callbacks=[StopAt(stop)], **settings).train()
    resumed = run(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(moments(resumed), moments(straight))
    with pytest.raises(ValueError, match="Set stage_objective='model', or start anew"):
        run(tmp_path / "stopped", stage_objective="local").train(resume_from_checkpoint=True)


def test_what_is_logged_and_evaluated(tmp_path):
    trained = run(tmp_path, num_train_epochs=3, **BLOCKS)
    trained.train()
    metrics = trained.evaluate()
    assert not any("stage" in name or "ensemble" in name for name in metrics)
    assert {"eval_loss", "eval_accuracy"} <= metrics.keys()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [{n for n in one if "transport" in n} for one in entries[::4]] == [
        {f"stage_{k}_transport"} for k in (1, 2, 3)
    ]
    assert all(one["stage_1_loss"] <= one["loss"] for one in entries[:4])
    trained.save_model()
    trained.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "has learned from the model's loss while the others were frozen" in card
    assert "EarlyExit" not in card
    stages = load_stages(tmp_path)
    assert_same(weights(type(trained.model).from_pretrained(tmp_path)), weights(trained.model))
    for use in (lambda: EarlyExit(trained.model, stages), lambda: truncate(trained.model, stages, 2)):
        with pytest.raises(ValueError, match='no auxiliary heads.*or train with stage_objective="local"'):
            use()


def test_one_schedule_is_for_all_turns_as_they_share_a_loss(tmp_path):
    trained = run(tmp_path, num_train_epochs=3, learning_rate=0.12, lr_scheduler_type="linear", **BLOCKS)
    trained.train()
    rates = [entry["learning_rate"] for entry in trained.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.12 - 0.01 * step for step in range(12)])  # three turns of four steps


def test_early_stopping_ends_a_turn_by_the_models_metric(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"metric_for_best_model": "accuracy", "load_best_model_at_end": True, "num_train_epochs": 3, **BLOCKS}
    stopped = run(tmp_path, callbacks=[EarlyStoppingCallback(1)], **settings)
    scores = iter([0.9, 0.8, *[0.1 * k for k in range(8)], 0.0])
    stopped.compute_metrics = lambda found: {"accuracy": next(scores)}
    stopped.train()
    assert stopped.state.global_step == 2 + 4 + 4
    assert (stopped.state.best_metric, stopped.state.best_global_step) == (0.9, 1)


def test_a_loss_of_ones_own_is_still_refused(tmp_path):
    """It would be without transport."""
    args = arguments(tmp_path, **BLOCKS)
    with pytest.raises(ValueError, match="Pass the loss as compute_loss_func"):
        own_loss(MMSTTrainer)(make("vit"), args, train_dataset=Samples("vit")).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_order": "simultaneous"}, 'Set stage_order to "sequential" or "multi_lap", or stage_objective="local"'),
        ({"stage_order": "end_to_end"}, 'stage_order="end_to_end" all of them learn'),
        ({**BLOCKS, "head_layers": 1}, "head_layers=1 has no effect.*Leave head_layers unset"),
        ({**BLOCKS, "head_pooling": "cls"}, "head_pooling='cls' has no effect"),
        ({**BLOCKS, "stage_objective": "global"}, "stage_objective='global' is not known.*local, model"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{"stage_objective": "model", **settings})
