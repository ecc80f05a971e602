"""What users bring along: models with a `train` of their own, trainers that run the model again, callbacks."""

import copy

import peft
import pytest
import torch
from runs import ORDERS, arguments, assert_same, losses, own_loss, run_end_to_end, trainer, weights
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback
from zoo import Samples, make

from hf_mmst import MMSTTrainer


def keeps_eval(model, how):
    """The model with a `train` of its own: embeddings that learn nothing stay in eval mode, or all of the model."""
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
        ways = {"returns the model": returns_model, "returns nothing": returns_nothing}
        model.train = ways.get(how, lambda mode=True: whole(False))
    return model


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("returns the model", {}),
        ("returns the model", {"stage_order": "end_to_end"}),
        ("returns nothing", ORDERS["sequential"]),
        ("of a part", ORDERS["sequential"]),
        ("no dropout", {}),
        ("no dropout", ORDERS["sequential"]),
    ],
)
def test_a_train_of_the_models_own_is_called_and_nothing_else_changes(how, settings, tmp_path):
    runs = []
    for kind in (how, "none"):
        model = make("bert", dropout=how != "no dropout" or kind == how)
        model.bert.embeddings.dropout.p = 0.0 if kind == "none" else 0.9
        frozen = {id(p) for p in model.bert.embeddings.parameters()}
        if kind == "none":
            model.bert.embeddings.requires_grad_(False)
        else:
            keeps_eval(model, how)
        before = weights(model.bert.embeddings)
        torch.manual_seed(0)
        layers = 0 if how == "no dropout" else 1
        run = trainer(tmp_path, "bert", model, max_steps=3, head_layers=layers, **settings)
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


def again(how):
    """A trainer that runs the model once more in each step."""

    class Again(MMSTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if how == "R-Drop":
                loss = (loss + super().compute_loss(model, inputs)) / 2
            elif how == "a second pass":
                loss = loss + model(**inputs).loss
            elif how == "a pass of its encoder":
                loss = loss + self.model.vit(inputs["pixel_values"]).last_hidden_state.mean()
            elif how == "a teacher":
                with torch.no_grad():
                    other = model(**inputs).loss
                loss = loss + other
            return (loss, outputs) if return_outputs else loss

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
            if how == "FGM":
                model(**self._prepare_inputs(inputs)).loss.backward()
            elif how == "FGM in eval mode":
                model.eval()
                self.compute_loss(model, dict(inputs)).backward()
            elif how == "a step again":
                super().training_step(model, dict(inputs), num_items_in_batch)
            elif how == "a loss again":
                self.accelerator.backward(self.compute_loss(model, dict(inputs)))
            return loss

    return Again


@pytest.mark.parametrize(
    ("how", "settings", "message"),
    [
        ("R-Drop", {}, "calls compute_loss of MMSTTrainer again before the first loss is stepped back"),
        ("a second pass", {}, "Again runs the model by itself in a training step.*past its stages"),
        ("a second pass", {**ORDERS["sequential"], "offload": "stages"}, "runs the model by itself"),
        ("a pass of its encoder", {}, "runs the model by itself"),
        ("FGM", {}, "runs the model by itself"),
        ("FGM", {"end_to_end_laps": 1}, "runs the model by itself"),
        ("a step again", {"stage_clipping": True}, "stages have stepped.*Set stage_clipping=False"),
        ("a loss again", {"max_grad_norm": 0.0}, "stages have stepped.*max_grad_norm above 0"),
    ],
)
def test_no_stage_learns_otherwise_than_from_its_own_loss(how, settings, message, tmp_path):
    run = again(how)(make("vit"), arguments(tmp_path, **settings), train_dataset=Samples("vit"))
    with pytest.raises(ValueError, match=message):
        run.train()
    assert not any(module._forward_pre_hooks for module in run.model.modules())


@pytest.mark.parametrize(
    ("how", "rate", "order"),
    [
        ("a teacher", 1, "sequential"),
        ("a step again", 2, "simultaneous"),
        ("a loss again", 2, "sequential"),
        ("FGM in eval mode", 2, "sequential"),
    ],
)
def test_what_learns_stage_by_stage_may_run_again(how, rate, order, tmp_path):
    """Without dropout a gradient that is taken twice is twice as long."""
    settings = {"optim": "sgd", "max_steps": 3, "max_grad_norm": 1e6, **ORDERS[order]}
    once = trainer(tmp_path / "once", learning_rate=0.01 * rate, **settings)
    once.train()
    args = arguments(tmp_path / "again", learning_rate=0.01, **settings)
    run = again(how)(make("vit"), args, train_dataset=Samples("vit"))
    run.train()
    for name, tensor in once.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"num_stages": 1}, {"stage_order": "end_to_end"}], ids=str)
def test_end_to_end_the_model_may_run_twice(settings, tmp_path):
    runs = []
    for how in ("R-Drop", "none"):
        args = arguments(tmp_path / how, max_steps=3, **settings)
        runs.append(again(how)(make("vit"), args, train_dataset=Samples("vit")))
        runs[-1].train()
    for name, tensor in runs[1].model.state_dict().items():
        torch.testing.assert_close(runs[0].model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def counting(cls):
    """The class with a loss of its own, a sum that is divided by the labels of the step, as the host gives them."""

    class Counting(cls):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    return Counting


def not_scaled(cls):
    """The class as it is told that the loss of its model is a mean over a micro-batch."""
    return type("NotScaled", (cls,), {"loss_is_scaled_for_ga": False})


def not_scaled_later(cls):
    class NotScaled(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_is_scaled_for_ga = False

    return NotScaled


@pytest.mark.parametrize("own", [counting, own_loss, not_scaled, not_scaled_later])
def test_end_to_end_a_loss_is_scaled_for_accumulation_as_by_plain_trainer(own, tmp_path):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    runs = []
    for cls in (MMSTTrainer, Trainer):
        runs.append(run_end_to_end(tmp_path / cls.__name__, "bert", own(cls), **settings))
        runs[-1].train()
    assert losses(runs[0]) == losses(runs[1])
    assert_same(weights(runs[0].model), weights(runs[1].model))
    evaluated = [[entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry] for run in runs]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6)


def averaging(cls):
    """The class as it evaluates other weights: the usual way to do so with averaged ones."""

    class Averaging(cls):
        def evaluate(self, *args, **kwargs):
            backup = {name: parameter.data for name, parameter in self.model.named_parameters()}
            for parameter in self.model.parameters():
                parameter.data = 0.5 * parameter.data
            metrics = super().evaluate(*args, **kwargs)
            for name, parameter in self.model.named_parameters():
                parameter.data = backup[name]
            return metrics

    return Averaging


def test_end_to_end_other_weights_are_evaluated_and_put_back(tmp_path):
    runs = []
    for cls in (MMSTTrainer, Trainer):
        settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
        runs.append(run_end_to_end(tmp_path / cls.__name__, cls=averaging(cls), **settings))
        runs[-1].train()
    logs = [[entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry] for run in runs]
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    assert_same(weights(runs[0].model), weights(runs[1].model))


class Interferes(TrainerCallback):
    """Looks at gradients wherever it may, and changes what a step begins with."""

    def __init__(self, how):
        self.how, self.seen, self.kept = how, [], None

    def _see(self, model):
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._see(model)
        for parameter in model.parameters():
            if self.how == "adds to gradients":
                parameter.grad.add_(1e-3)
            elif self.how == "replaces gradients":
                parameter.grad = 2 * parameter.grad

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._see(model)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._see(model)
        if self.how == "replaces weights":
            for parameter in model.parameters():
                parameter.data = 0.9 * parameter.data
        elif self.how == "goes back" and state.global_step == 2:
            self.kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        elif self.how == "goes back" and state.global_step == 4:
            model.load_state_dict(self.kept[0])
            optimizer.load_state_dict(self.kept[1])
        elif self.how == "forgets moments" and state.global_step == 2:
            optimizer.state.clear()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.how == "replaces weights":
            for parameter in model.parameters():
                parameter.data = 0.9 * parameter.data


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "how",
    ["looks", "adds to gradients", "replaces gradients", "replaces weights", "goes back", "forgets moments"],
)
def test_end_to_end_a_callback_finds_and_changes_what_it_does_in_plain_trainer(how, later, tmp_path):
    runs, found = [], []
    for cls in (MMSTTrainer, Trainer):
        callback = Interferes(how)
        given = None if later else [callback]
        runs.append(run_end_to_end(tmp_path / cls.__name__, cls=cls, callbacks=given, max_steps=6, max_grad_norm=0.1))
        if later:
            runs[-1].add_callback(callback)
        runs[-1].train()
        found.append(callback.seen)
    assert_same(weights(runs[0].model), weights(runs[1].model))
    assert [seen.keys() for seen in found[0]] == [seen.keys() for seen in found[1]]
    for ours, expected in zip(*found, strict=True):
        assert_same(ours, expected)
    assert losses(runs[0]) == losses(runs[1])
