"""A stage that steps right after its backward: the numbers of stepping at the end, in less memory."""

import math

import pytest
import torch
from runs import ORDERS, assert_same, losses, trainer, weights
from transformers import TrainerCallback, set_seed
from zoo import MODELS, make

from hf_mmst.method.stepping import clip_by_stage, parameters_by_stage
from hf_mmst.trainer.learning import StageLearning


def run(folder, name="bert", extra=None, **kwargs):
    set_seed(0)
    return trainer(folder, name, dropout=True, extra=extra, **kwargs)


def at_the_end(monkeypatch):
    monkeypatch.setattr(StageLearning, "_step_early", lambda self, *given: None)


class Gradients(TrainerCallback):
    """Notes before each of the host's optimizer steps which parameters have gradients."""

    def __init__(self):
        self.names = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.names.append({name for name, p in model.named_parameters() if p.grad is not None})


CLIPPED = {"stage_clipping": True, "max_grad_norm": 0.1, "weight_decay": 0.01, "max_steps": 4}
NOT_CLIPPED = {"max_grad_norm": 0.0, "bf16": True, "optim": "adafactor", "max_steps": 4}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, CLIPPED) for name in (*MODELS, "beit")),
        *((name, NOT_CLIPPED) for name in ("vit", "swin", "bert", "beit")),
    ],
)
def test_the_numbers_are_those_of_stepping_at_the_end(name, settings, tmp_path, monkeypatch):
    early = run(tmp_path / "early", name, **settings)
    early.train()
    at_the_end(monkeypatch)
    late = run(tmp_path / "late", name, **settings)
    late.train()
    assert_same(weights(early.model), weights(late.model))
    assert_same(weights(early.heads), weights(late.heads))
    assert losses(early) == losses(late)
    for found, expected in zip(early.state.log_history, late.state.log_history, strict=True):
        assert found.get("grad_norm", 0) == pytest.approx(expected.get("grad_norm", 0), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "name", "early"),
    [
        ({"stage_clipping": True}, "bert", True),
        ({"max_grad_norm": 0.0}, "bert", True),
        ({}, "bert", False),
        ({"stage_clipping": True, "gradient_accumulation_steps": 2}, "bert", False),
        ({"stage_clipping": True}, "beit", False),
    ],
)
def test_the_gradients_of_one_stage_are_there(settings, name, early, tmp_path):
    watch = Gradients()
    trained = run(tmp_path, name, extra={"callbacks": [watch]}, **settings)
    trained.train()
    first = trained.partition.stages[0][0]
    for names in watch.names:
        assert any(one.startswith(first) for one in names) == (not early)
        assert any("classifier" in one for one in names)


def test_all_layers_but_the_last_stages_are_free_of_gradients_when_the_last_stage_learns(tmp_path):
    watch = Gradients()
    trained = run(tmp_path, extra={"callbacks": [watch]}, stage_clipping=True)
    trained.train()
    last = (*trained.partition.stages[-1], "bert.pooler", "classifier")
    assert all(name.startswith(last) for names in watch.names for name in names)


@pytest.mark.parametrize("order", ORDERS)
def test_stages_are_clipped_by_themselves_in_all_orders(order, tmp_path):
    settings = {"stage_clipping": True, "max_grad_norm": 0.01, "gradient_accumulation_steps": 2, "optim": "sgd"}
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for stage in self.trainer._run.staged.parameters:
                found = [p.grad.norm() for p in stage if p.grad is not None]
                if found:
                    norms.append(float(torch.stack(found).norm()))

    watch = Norms()
    watch.trainer = run(tmp_path, extra={"callbacks": [watch]}, **settings, **ORDERS[order])
    watch.trainer.train()
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_of_one_stage(name, tmp_path):
    trained = run(tmp_path, name)
    model = trained.model
    found = parameters_by_stage(model, trained.partition, trained.heads)
    everything = [*model.parameters(), *trained.heads.parameters()]
    assert sorted(id(p) for stage in found for p in stage) == sorted(id(p) for p in everything)
    names = {id(p): n for n, p in model.named_parameters()}
    assert any("embed" in names.get(id(p), "") for p in found[0])
    assert any("classifier" in names.get(id(p), "") for p in found[-1])


def test_the_norm_is_of_all_gradients():
    model = make("vit")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parameters = list(model.parameters())
    norm = clip_by_stage([parameters[:5], parameters[5:], []], 1.0)
    assert float(norm) == pytest.approx(math.sqrt(sum(p.numel() for p in parameters)))
