"""Auxiliary heads made of the model's last layers: trained, saved, read back, and refused where they cannot be."""

import pytest
import torch
from runs import ORDERS, StopAt, assert_same, trainer, weights
from torch import nn
from transformers import BertForSequenceClassification, set_seed
from zoo import make

from hf_mmst import load_stages
from hf_mmst.cut.layers import find_layers, last_norm
from hf_mmst.cut.token_flow import own_pooling


def pretrained(folder, name="vit"):
    model = make(name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize(("name", "number"), [("vit", 1), ("bert", 1), ("swin", 0)])
def test_a_pretrained_model_of_one_width_gives_its_last_layer(name, number, tmp_path):
    assert len(trainer(tmp_path, name).heads.layers) == 0
    model = pretrained(tmp_path / "model", name)
    run = trainer(tmp_path, name, model)
    assert len(run.heads.layers) == number
    for layer in run.heads.layers:
        assert_same(weights(layer), weights(model.get_submodule(find_layers(model)[-1])))
    assert len(trainer(tmp_path, name, model, head_layers=0).heads.layers) == 0
    assert (trainer(tmp_path, name).heads.pooling, run.heads.pooling) == ("mean", "mean" if name == "swin" else "cls")


def test_the_heads_norms_begin_as_the_models_last(tmp_path):
    model = make("vit")
    torch.nn.init.uniform_(model.vit.layernorm.weight)
    assert last_norm(model, "vit.layers.3", 32) is model.vit.layernorm
    assert last_norm(make("bert"), "bert.encoder.layer.3", 32) is None
    run = trainer(tmp_path, model=model, head_layers=1)
    for head in run.heads:
        assert torch.equal(head.norm.weight, model.vit.layernorm.weight)
    assert torch.equal(trainer(tmp_path, model=model).heads.heads[0].norm.weight, torch.ones(32))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_they_are_trained_saved_and_resumed(name, order, tmp_path):
    def run(folder, callbacks=()):
        set_seed(0)
        settings = {"head_layers": 2, "max_steps": 12, "save_strategy": "steps", "save_steps": 7, **ORDERS[order]}
        return trainer(tmp_path / folder, name, dropout=True, extra={"callbacks": [*callbacks]}, **settings)

    straight = run("straight")
    before = weights(straight.heads)
    straight.train()
    after = weights(straight.heads)
    assert any(n.startswith("layers.1.") for n in after)
    assert not any(torch.equal(after[n], before[n]) for n in after)
    assert "_ddp_params_and_buffers_to_ignore" not in vars(straight.model)
    assert not any("mmst" in n for n in straight.model.state_dict())
    run("stopped", [StopAt(7)]).train()
    resumed = run("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(weights(resumed.heads), after)
    straight.save_model()
    assert_same(weights(load_stages(tmp_path / "straight").heads), after)


def test_checkpointing_and_offload_change_no_number(tmp_path):
    found = []
    for settings in ({}, {"activation_checkpointing": True}, {"offload": "stages"}):
        run = trainer(
            tmp_path / str(len(found)), "bert", head_layers=1, max_steps=6, stage_order="sequential", **settings
        )
        run.train()
        assert all(layer.gradient_checkpointing == ("activation" in str(settings)) for layer in run.heads.layers)
        found.append(weights(run.model))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def test_adapters_are_trained_beside_copies_of_them(tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"])
    run = trainer(tmp_path, "bert", peft.get_peft_model(make("bert"), config), head_layers=1, max_steps=4)
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {n for n, p in run.model.named_parameters() if p.requires_grad}
    run.save_model()
    with pytest.raises(ValueError, match="holds no config.json.*Pass the model that it belongs to"):
        load_stages(tmp_path)
    assert_same(weights(load_stages(tmp_path, run.model).heads), weights(run.heads))


def test_heads_with_layers_of_a_class_of_ones_own_are_read_with_the_model(tmp_path):
    mine = type("Mine", (BertForSequenceClassification,), {})(make("bert").config)
    run = trainer(tmp_path, "bert", mine, head_layers=1)
    run.save_model()
    with pytest.raises(ValueError, match="holds a Mine, which transformers does not have.*Pass the model"):
        load_stages(tmp_path)
    assert_same(weights(load_stages(tmp_path, run.model).heads), weights(run.heads))


def test_learning_rates_of_stages_and_heads(tmp_path):
    settings = {"learning_rate": 0.1, "head_learning_rate": 0.5, "stage_learning_rate_decay": 0.5}
    run = trainer(tmp_path, max_steps=1, weight_decay=0.1, head_layers=1, **settings)
    run.train()
    rate = {p: group["initial_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    decay = {p: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    for k, stage in enumerate(run.partition.stages):
        for name in stage:
            assert {rate[p] for p in run.model.get_submodule(name).parameters()} == {0.1 * 0.5 ** (2 - k)}
    assert rate[run.model.classifier.weight] == 0.5
    assert rate[run.model.vit.layernorm.weight] == 0.5
    assert rate[run.model.vit.embeddings.cls_token] == 0.025
    assert {rate[p] for head in run.heads for p in head.parameters()} == {0.5}
    assert {rate[p] for p in run.heads.layers.parameters()} == {0.1}
    assert decay[run.heads.heads[0].classifier.weight] == 0.1
    assert decay[run.heads.heads[0].norm.weight] == 0.0
    assert len(rate) == len(list(run.model.parameters())) + len(list(run.heads.parameters()))
    pre = trainer(tmp_path, model=pretrained(tmp_path / "model"), max_steps=1, learning_rate=0.01)
    pre.train()
    rate = {p: group["initial_lr"] for group in pre.optimizer.param_groups for p in group["params"]}
    assert {rate[p] for head in pre.heads for p in head.parameters()} == {0.1}
    own = [*pre.model.vit.layernorm.parameters(), *pre.model.classifier.parameters()]
    assert {rate[p] for p in own} == {0.1}
    found = {n: rate[p] for n, p in pre.model.named_parameters() if p not in {*own}}
    assert len(pre.partition.layers) == 4
    assert sorted({*found.values()}) == pytest.approx([0.01 * 0.7 ** (k * 4 / 3) for k in (2, 1, 0)])  # 0.7 a layer
    assert pre.state.log_history[0]["learning_rate"] == 0.01
    assert (
        found["vit.embeddings.cls_token"]
        == found["vit.layers.0.mlp.fc1.weight"]
        == pytest.approx(0.01 * 0.7 ** (8 / 3))
    )
    whole = trainer(tmp_path, model=pretrained(tmp_path / "model"), max_steps=1, num_stages=1)
    whole.train()
    assert {group["initial_lr"] for group in whole.optimizer.param_groups} == {1e-3}


def test_the_schedule_that_a_pretrained_model_gets(tmp_path):
    assert trainer(tmp_path)._run.staged.weights.schedule == "constant"
    model = pretrained(tmp_path / "model")
    assert trainer(tmp_path, model=model)._run.staged.weights.schedule == "adaptive"
    assert trainer(tmp_path, model=model, transport_schedule="paper")._run.staged.weights.schedule == "paper"


@pytest.mark.parametrize(
    ("name", "settings", "own"),
    [
        ("bert", {}, ("bert.pooler", "classifier")),
        ("bert", {"head_layers": 1}, ("bert.pooler", "classifier")),
        ("bert", {"num_stages": 1}, ("bert.pooler", "classifier")),
        ("roberta", {}, ("classifier.dense", "classifier.out_proj")),
        ("distilbert", {}, ("pre_classifier", "classifier")),
    ],
)
def test_all_after_the_last_layer_learns_at_the_rate_of_the_heads(name, settings, own, tmp_path):
    run = trainer(tmp_path, name, max_steps=1, learning_rate=0.01, head_learning_rate=0.1, **settings)
    run.train()
    rate = {p: group["initial_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    found = {n for n, p in run.model.named_parameters() if rate[p] == 0.1}
    assert found == {n for n, _ in run.model.named_parameters() if n.startswith(tuple(f"{one}." for one in own))}
    assert {rate[p] for p in run.heads.layers.parameters()} <= {0.01}
    assert {rate[p] for head in run.heads for p in head.parameters()} <= {0.1}


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"head_layers=1, but the last layers of Swin.*16, 32, 64 wide.*to 0"):
        trainer(tmp_path, "swin", head_layers=1)
    with pytest.raises(ValueError, match="head_layers=5, but the model has 4 layers. Set head_layers to that or less"):
        trainer(tmp_path, head_layers=5)
    with pytest.raises(ValueError, match="head_layers=-1 is not a whole number of at least 0"):
        trainer(tmp_path, head_layers=-1)
    with pytest.raises(ValueError, match="head_learning_rate=0 is not a positive number"):
        trainer(tmp_path, head_learning_rate=0)
    with pytest.raises(ValueError, match="stage_learning_rate_decay=nan is not a positive number"):
        trainer(tmp_path, stage_learning_rate_decay=float("nan"))
    own = {"optimizers": (torch.optim.SGD([torch.zeros(1)], lr=0.1), None)}
    for name in ("head_learning_rate", "stage_learning_rate_decay"):
        with pytest.raises(ValueError, match=f"{name}=0.5 has no effect on an optimizer of your own"):
            trainer(tmp_path, extra=own, **{name: 0.5})
    trainer(tmp_path, head_layers=1, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="has stage heads with 1 layers, this run with 0. Set head_layers to 1"):
        trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match='those of this run pool "cls". Set head_pooling to "mean"'):
        trainer(tmp_path, head_layers=1, head_pooling="cls", max_steps=1).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("name", "pooling"), [("vit", "cls"), ("bert", "cls"), ("dinov2", "mean"), ("swin", "mean")])
def test_pooling_as_the_models_own_head_pools(name, pooling):
    model = make(name)
    nn.init.zeros_(next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight)  # tells nothing
    assert own_pooling(model, find_layers(model)[-1]) == pooling
