"""Short trials that choose settings: what is tried, what does not fit, and what nothing is left of."""

import pytest
from datasets import Dataset
from runs import accuracy, arguments
from transformers import ViTForImageClassification
from zoo import Samples, make

from hf_mmst import pilot
from hf_mmst.trials import _samples

SPACE = {"num_stages": [1, 2, 4], "transport_weight": [0.0, 1.0]}


def run(folder, **settings):
    settings = {"num_trials": 4, "max_steps": 2, "space": SPACE, "compute_metrics": accuracy, **settings}
    data = settings.pop("data", None) or Samples("vit", 40)
    return pilot(lambda: make("vit"), arguments(folder), data, **settings)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Trials without a budget."""
    return run(tmp_path_factory.mktemp("trials"))


def test_the_best_trial_is_the_config_to_paste(found, tmp_path):
    assert 1 < len(found.trials) <= 4
    assert len({str(trial.settings) for trial in found.trials}) == len(found.trials)
    assert [t.metric for t in found.trials] == sorted((t.metric for t in found.trials), reverse=True)
    best = found.chosen.settings
    expected = f"num_stages={best['num_stages']}, transport_weight={best['transport_weight']}"
    assert found.config() == f'MMSTConfig("output", {expected})'
    assert all(trial.epoch_seconds > 0 for trial in found.trials)
    assert found.table().row_count == len(found.trials)
    again = run(tmp_path)
    assert [(t.settings, t.metric) for t in again.trials] == [(t.settings, t.metric) for t in found.trials]
    assert not list(tmp_path.iterdir())


def test_what_needs_more_than_the_budget_is_not_run(found, tmp_path):
    least = min(trial.planned_bytes for trial in found.trials)
    fits = run(tmp_path, budget=least)
    assert {trial.planned_bytes for trial in fits.trials if trial.metric is not None} == {least}
    assert any(trial.metric is None and trial.epoch_seconds is None for trial in fits.trials)
    none = run(tmp_path, budget="1KiB")
    assert none.chosen is None
    assert none.config() == ""


def test_the_default_space_is_of_the_model(tmp_path):
    found = run(tmp_path, space=None, num_trials=3, metric="eval_loss", greater_is_better=False, compute_metrics=None)
    for trial in found.trials:
        names = {"num_stages", "head_layers", "head_learning_rate", "transport_weight", "end_to_end_laps"}
        assert trial.settings.keys() == names
        assert trial.settings["head_learning_rate"] in (None, 0.01)
        assert trial.settings["num_stages"] in (2, 4)
    assert [t.metric for t in found.trials] == sorted(t.metric for t in found.trials)


def test_a_pretrained_model_is_tried_end_to_end_first(tmp_path):
    make("vit").save_pretrained(tmp_path / "checkpoint")
    args = arguments(tmp_path / "out", num_stages=None)
    settings = {"num_trials": 3, "max_steps": 2, "compute_metrics": accuracy}
    found = pilot(
        lambda: ViTForImageClassification.from_pretrained(tmp_path / "checkpoint"), args, Samples("vit", 40), **settings
    )
    exact = [trial for trial in found.trials if trial.settings.get("stage_order") == "end_to_end"]
    assert [trial.settings["head_learning_rate"] for trial in exact] in ([None, 0.01], [0.01, None])
    assert len(found.trials) == 3
    assert {trial.planned_bytes for trial in exact} == {min(trial.planned_bytes for trial in found.trials)}


def test_a_small_model_is_tried_with_the_stages_that_it_has(tmp_path):
    args = arguments(tmp_path, num_stages=None)
    space = {"transport_weight": [0.0]}
    settings = {"num_trials": 1, "max_steps": 2, "space": space, "compute_metrics": accuracy, "budget": "1GiB"}
    found = pilot(lambda: make("vit", num_hidden_layers=2), args, Samples("vit", 40), **settings)
    assert found.chosen.settings == {"transport_weight": 0.0}


def test_samples_to_rank_on_are_held_out():
    data = Dataset.from_dict({"index": list(range(40))})
    train, held_out = _samples(data, None, 20, seed=0)
    assert (len(train), len(held_out)) == (16, 4)
    assert not {*train["index"]} & {*held_out["index"]}
    train, own = _samples(data, held_out, 20, seed=0)
    assert own is held_out
    assert len(train) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_trials": 0}, "num_trials=0 is not a whole number of at least 1"),
        ({"max_steps": 0}, "max_steps=0 is not a whole number of at least 1"),
        ({"max_steps": 1.5}, "max_steps=1.5 is not a whole number of at least 1"),
        ({"max_samples": 1}, "max_samples=1 is not a whole number of at least 2"),
        ({"max_samples": 0, "eval_dataset": Samples("vit", 4)}, "max_samples=0 is not a whole number of at least 1"),
        ({"data": Samples("vit", 1)}, "train_dataset has fewer than 2 samples, or no length. Set train_dataset to"),
        ({"data": iter([])}, "train_dataset has fewer than 2 samples, or no length"),
        ({"eval_dataset": []}, "eval_dataset has fewer than 1 samples"),
        ({"space": {}}, "space={} has no fields to try. Set space to fields and values, or leave it out"),
        ({"space": {"stages": [1]}}, "space names 'stages', which is no field of MMSTConfig"),
        ({"space": {"num_stages": []}}, r"space has \[\] for num_stages, not a list of values. Set it to one"),
        ({"space": {"transport_norm": "mean"}}, "space has 'mean' for transport_norm, not a list"),
        ({"metric": "eval_f1"}, "There is no metric 'eval_f1'. Set metric to one of eval_accuracy"),
        ({"budget": "much"}, 'Set budget to one with a unit, as in "4GiB"'),
    ],
)
def test_what_cannot_be_is_refused(settings, message, tmp_path, caplog):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **settings)
    assert not caplog.records  # no traceback beside the error


def test_a_trial_that_diverges_comes_last_and_is_not_chosen(tmp_path):
    made = []

    def build():
        made.append(1)
        return make("vit")

    def share(_):
        return {"share": float("nan") if len(made) == 2 else 0.5}  # the first is looked at, the second is tried first

    settings = {"max_steps": 4, "metric": "eval_share", "space": SPACE}
    found = pilot(build, arguments(tmp_path), Samples("vit", 40), share, num_trials=2, **settings)
    assert [str(trial.metric) for trial in found.trials] == ["0.5", "nan"]
    assert found.chosen is found.trials[0]
    made.clear()
    found = pilot(build, arguments(tmp_path), Samples("vit", 40), share, num_trials=1, **settings)
    assert (found.chosen, found.config()) == (None, "")


def test_the_budget_is_the_one_of_the_arguments(tmp_path):
    args = arguments(tmp_path, memory_budget="1KiB")
    found = pilot(lambda: make("vit"), args, Samples("vit", 40), accuracy, num_trials=1, max_steps=4, space=SPACE)
    assert found.chosen is None
