"""What users bring along: models with a `train` of their own, trainers that run the model again, callbacks."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_trainer import ORDERS, assert_same, trainer, weights
from transformers import TrainerCallback
from zoo import make


def keeps_eval(model, how):
    """The model, whose embeddings learn nothing and stay in eval mode, as one keeps statistics of BatchNorm."""
    model.bert.embeddings.requires_grad_(False)
    whole, part = model.train, model.bert.embeddings.train

    def returns_model(mode=True):
        whole(mode)
        model.bert.embeddings.eval()
        return model

    def returns_nothing(mode=True):
        returns_model(mode)

    if how == "of a part":
        model.bert.embeddings.train = lambda mode=True: part(False)
        model.bert.embeddings.train()
    else:
        model.train = returns_model if how == "returns the model" else returns_nothing
    return model


@pytest.mark.parametrize("settings", [{}, ORDERS["sequential"], {"stage_order": "coupled"}], ids=str)
@pytest.mark.parametrize("how", ["returns the model", "returns nothing", "of a part"])
def test_a_train_of_the_models_own_is_called_and_nothing_else_changes(how, settings, tmp_path):
    runs = []
    for kind in (how, "none"):
        model = make("bert", dropout=True)
        model.bert.embeddings.dropout.p = 0.0 if kind == "none" else 0.9
        frozen = {id(p) for p in model.bert.embeddings.parameters()}
        if kind == "none":
            model.bert.embeddings.requires_grad_(False)
        else:
            keeps_eval(model, how)
        before = weights(model.bert.embeddings)
        torch.manual_seed(0)
        run = trainer(tmp_path, "bert", model, max_steps=3, head_layers=1, **settings)
        run.train()
        run.evaluate()
        assert_same(weights(model.bert.embeddings), before)
        assert {id(p) for p in model.parameters() if not p.requires_grad} == frozen
        runs.append(run)
    assert_same(weights(runs[0].model), weights(runs[1].model))


class Keeper(TrainerCallback):
    """Keeps the weights in the ways in which callbacks do, and puts them back into the model."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = torch.optim.swa_utils.AveragedModel(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.kept = weights(model)
        model.load_state_dict(self.kept)
        self.average.update_parameters(model)
        model.save_pretrained(args.output_dir)


@pytest.mark.parametrize("name", ["vit", "bert", "lora"])
def test_weights_that_a_callback_keeps_are_those_of_the_model(name, tmp_path):
    model, file = make("bert" if name == "bert" else "vit"), "model.safetensors"
    if name == "lora":
        model, file = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), f"adapter_{file}"
    keys, keeper = model.state_dict().keys(), Keeper()
    name = name.replace("lora", "vit")
    trainer(tmp_path, name, model, extra={"callbacks": [keeper]}, max_steps=3, head_layers=1).train()
    assert_same(keeper.kept, weights(model))
    assert keeper.kept.keys() == keys
    model.load_state_dict(keeper.kept)
    model.load_state_dict(keeper.average.module.state_dict())
    assert not model._state_dict_hooks
    assert not model._load_state_dict_post_hooks
    assert not [key for key in load_file(tmp_path / file) if "mmst" in key]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({key: tensor for key, tensor in keeper.kept.items() if "classifier" not in key})
