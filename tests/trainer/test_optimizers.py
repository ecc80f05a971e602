"""Optimizers whose states are not two tensors of each parameter's shape, or that have schedulers, stage by stage."""

import pytest
import torch
from runs import StopAt, assert_same, moments, trainer, weights
from runs import run_resting as run
from torch.optim import lr_scheduler
from transformers import get_linear_schedule_with_warmup, set_seed
from transformers.optimization import Adafactor, AdafactorSchedule, GreedyLR
from zoo import make

from hf_mmst.method.learning_rates import join_groups
from hf_mmst.trainer.learning import StageLearning

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
        offload: run(tmp_path / offload, "vit", wide(), offload=offload, **settings) for offload in ("none", "stages")
    }
    for one in trained.values():
        one.train()
    assert_same(weights(trained["stages"].model), weights(trained["none"].model))
    assert_same(moments(trained["stages"]), moments(trained["none"]))


def test_the_numbers_of_stepping_early_are_those_of_stepping_at_the_end(settings, tmp_path, monkeypatch):
    trained = {}
    for when in ("early", "late"):
        settings = {**settings, "stage_clipping": True, "max_grad_norm": 0.1}
        trained[when] = run(tmp_path / when, "vit", wide(), "simultaneous", "none", **settings)
        trained[when].train()
        monkeypatch.setattr(StageLearning, "_step_early", lambda self, *given: None)
    assert_same(weights(trained["early"].model), weights(trained["late"].model))


@pytest.mark.parametrize("offload", ["none", "stages"])
def test_resume_is_bitwise_the_uninterrupted_run(offload, settings, tmp_path):
    settings = {"offload": offload, "save_strategy": "steps", "save_steps": 13, **settings}
    straight = run(tmp_path / "straight", "vit", wide(), **settings)
    straight.train()
    run(tmp_path / "stopped", "vit", wide(), extra={"callbacks": [StopAt(13)]}, **settings).train()
    resumed = run(tmp_path / "stopped", "vit", wide(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(moments(resumed), moments(straight))


EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}


def ramp(optimizer):
    return lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3)


SCHEDULERS = {
    "linear": (lambda o: get_linear_schedule_with_warmup(o, 2, 6), {}),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=8), {"stage_clipping": True}),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1, min_lr=[1e-5, 1e-6]), EVALUATING),
    "greedy": (lambda o: GreedyLR(o, patience=0, min_lr=[1e-5, 1e-6]), {"stage_order": "sequential", **EVALUATING}),
    "one after the other": (
        lambda o: lr_scheduler.SequentialLR(o, [ramp(o), lr_scheduler.CyclicLR(o, 1e-4, 1e-3, 2)], [3]),
        {"stage_order": "multi_lap", "offload": "stages"},
    ),
    "adafactor": (AdafactorSchedule, {"stage_order": "sequential"}),
}


def own_groups(model):
    """Groups with and without weight decay, as in the scripts of transformers."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == kind] for kind in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_of_an_optimizer_resumes_bitwise(kind, tmp_path):
    make_scheduler, settings = SCHEDULERS[kind]

    def run():
        set_seed(0)
        model = make("bert", dropout=True)
        groups = own_groups(model)
        optimizer = Adafactor(groups) if kind == "adafactor" else torch.optim.AdamW(groups, lr=1e-3)
        saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "num_stages": 2}
        own = optimizer, make_scheduler(optimizer)
        return trainer(tmp_path, "bert", model, extra={"optimizers": own}, **saving, **settings)

    straight, resumed = run(), run()
    heads = weights(straight.heads)
    straight.train()
    assert not any(torch.equal(tensor, heads[name]) for name, tensor in straight.heads.state_dict().items())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(weights(resumed.heads), weights(straight.heads))


@pytest.mark.parametrize("named", [False, True])
def test_heads_join_the_groups_of_what_is_like_them(named):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    head = dict(torch.nn.Linear(3, 2).named_parameters("head"))
    groups = [
        {"params": [(n, p) if named else p for n, p in model.named_parameters() if of(n, p)], "lr": lr}
        for lr, of in (
            (0.1, lambda n, p: n.startswith("0")),
            (0.2, lambda n, p: n == "1.weight"),
            (0.3, lambda n, p: n == "1.bias"),
        )
    ]
    optimizer = torch.optim.AdamW(groups)
    join_groups(optimizer, head, [*model.parameters(), *head.values()])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]
    assert optimizer.param_groups[1]["params"][1] is head["head.weight"]
    if named:
        assert optimizer.param_groups[2]["param_names"] == ["1.bias", "head.bias"]
