"""Optimizers whose states are not two tensors of each parameter's shape, stage by stage."""

import pytest
import torch
from test_residency import moments, run
from test_trainer import StopAt, assert_same, weights
from zoo import make

from hf_mmst import MMSTTrainer

SETTINGS = {"adafactor": {"optim": "adafactor"}, "8-bit Adam": {"optim": "adamw_8bit"}}


@pytest.fixture(params=SETTINGS)
def settings(request):
    if request.param == "8-bit Adam":
        pytest.importorskip("bitsandbytes", reason="8-bit states need bitsandbytes; Adafactor's run without it")
    return SETTINGS[request.param]


def wide():
    """A model of which some weights are large enough to have states of eight bits."""
    return make("vit", dropout=True, hidden_size=64, intermediate_size=128)


def test_the_states_are_not_the_usual_ones(settings, tmp_path):
    trained = run(tmp_path, "vit", wide(), **settings)
    trained.train()
    kinds = {name.rpartition(".")[2] for name in moments(trained)}
    if settings["optim"] == "adafactor":
        assert kinds >= {"exp_avg_sq_row", "exp_avg_sq_col"}
    else:
        assert torch.uint8 in {value.dtype for value in moments(trained).values()}
    assert "exp_avg" not in kinds


def test_the_numbers_of_one_resident_stage_are_those_of_all(settings, tmp_path):
    trained = {
        residency: run(tmp_path / residency, "vit", wide(), residency=residency, **settings)
        for residency in ("all", "stage")
    }
    for one in trained.values():
        one.train()
    assert_same(weights(trained["stage"].model), weights(trained["all"].model))
    assert_same(moments(trained["stage"]), moments(trained["all"]))


def test_the_numbers_of_stepping_early_are_those_of_stepping_at_the_end(settings, tmp_path, monkeypatch):
    trained = {}
    for when in ("early", "late"):
        settings = {**settings, "stage_clipping": True, "max_grad_norm": 0.1}
        trained[when] = run(tmp_path / when, "vit", wide(), "simultaneous", "all", **settings)
        trained[when].train()
        monkeypatch.setattr(MMSTTrainer, "_step_early", lambda self, stage, shared: None)
    assert_same(weights(trained["early"].model), weights(trained["late"].model))


@pytest.mark.parametrize("residency", ["all", "stage"])
def test_resume_is_bitwise_the_uninterrupted_run(residency, settings, tmp_path):
    settings = {"residency": residency, "save_strategy": "steps", "save_steps": 13, **settings}
    straight = run(tmp_path / "straight", "vit", wide(), **settings)
    straight.train()
    run(tmp_path / "stopped", "vit", wide(), extra={"callbacks": [StopAt(13)]}, **settings).train()
    resumed = run(tmp_path / "stopped", "vit", wide(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(moments(resumed), moments(straight))
