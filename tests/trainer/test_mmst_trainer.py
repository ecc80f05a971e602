"""MMSTTrainer against plain Trainer, and all of Trainer that must keep working."""

import inspect
import random
import time
from types import SimpleNamespace

import killed
import numpy as np
import pytest
import torch
from processes import event, start
from runs import ORDERS, StopAt, accuracy, arguments, assert_same, losses, own_loss, trainer, weights
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from zoo import MODELS, Samples, batch, make

from hf_mmst import MMSTConfig, MMSTTrainer, load_stages


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_one_stage_is_plain_trainer(name, tmp_path):
    trained = {}
    for kind, config in (("plain", TrainingArguments), ("stages", MMSTConfig)):
        extra = {"num_stages": 1} if config is MMSTConfig else {}
        args = arguments(tmp_path / kind, config, max_steps=8, weight_decay=0.01, **extra)
        cls = MMSTTrainer if config is MMSTConfig else Trainer
        set_seed(0)
        trained[kind] = cls(make(name, dropout=True), args, train_dataset=Samples(name, 48))
        trained[kind].train()
    assert losses(trained["stages"]) == losses(trained["plain"])
    assert_same(weights(trained["stages"].model), weights(trained["plain"].model))


def test_checkpointing_across_the_end_of_a_stage_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"runs swin.* twice as a whole.*gradient_checkpointing=False"):
        trainer(tmp_path, "swin", activation_checkpointing=True).train()


def test_the_signature_is_trainers():
    assert inspect.signature(MMSTTrainer.__init__) == inspect.signature(Trainer.__init__)
    assert inspect.signature(MMSTTrainer.train) == inspect.signature(Trainer.train)


@pytest.mark.parametrize(
    ("name", "order"),
    [*((name, order) for name in MODELS for order in ("simultaneous", "multi_lap")), ("vit", "sequential")],
)
def test_every_parameter_learns_and_the_model_is_as_it_came(name, order, tmp_path):
    model = make(name)
    before, forward = weights(model), type(model).forward
    trained = trainer(tmp_path, name, model, **ORDERS[order])
    heads = weights(trained.heads)
    trained.train()
    unchanged = [n for n, tensor in model.state_dict().items() if torch.equal(tensor, before[n])]
    assert all("relative_position_index" in n or "mask_token" in n for n in unchanged), unchanged
    assert not any(torch.equal(tensor, heads[n]) for n, tensor in trained.heads.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert "forward" not in vars(model)
    assert type(model).forward is forward
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("order", "schedule"),
    [
        *((order, "adaptive") for order in ORDERS),
        *(("simultaneous", "multipliers"), ("multi_lap", "multipliers"), ("sequential", "constant")),
    ],
)
def test_resume_is_bitwise_the_uninterrupted_run(order, schedule, tmp_path):
    settings = {**ORDERS[order], "transport_schedule": schedule, "dropout": True, "name": "bert"}
    settings |= {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 5, "data": Samples("bert", 16)}
    set_seed(0)
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    set_seed(0)
    stopped = trainer(tmp_path / "stopped", extra={"callbacks": [StopAt(7)]}, **settings)
    stopped.train()
    resumed = trainer(tmp_path / "stopped", model=make("bert", seed=9, dropout=True), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == straight.state.global_step
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(weights(resumed.heads), weights(straight.heads))


@pytest.mark.parametrize("name", ["vit", "swin", "bert"])
def test_load_best_model_restores_weights_and_heads(name, tmp_path):
    """Where module and Hub names differ (ViT, Swin), the host's own loader restores nothing."""
    trained = trainer(
        tmp_path,
        name,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_earliness",
        greater_is_better=True,
        num_train_epochs=3,
        save_total_limit=1,
    )
    trained.compute_metrics = lambda found: {"earliness": -trained.state.global_step}
    trained.train()
    entries = [entry for entry in trained.state.log_history if "eval_loss" in entry]
    best = entries[0]
    assert trained.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best['step']}")
    assert best["eval_loss"] != entries[-1]["eval_loss"]
    again = trained.evaluate()
    for key in ("eval_loss", "eval_stage_1_loss", "eval_stage_2_loss", "eval_stage_3_loss"):
        assert again[key] == pytest.approx(best[key], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "order"),
    [("vit", "simultaneous"), ("bert", "simultaneous"), ("bert", "sequential"), ("vit", "multi_lap")],
)
def test_accumulation_equals_the_large_batch(name, order, tmp_path):
    """16 samples at once, or as 5 + 5 + 5 + 1; BERT's own loss is scaled wrongly by the host."""
    runs = []
    for size, steps in ((16, 1), (5, 4)):
        run = trainer(
            tmp_path / str(size),
            name,
            data=Samples(name, 16),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            num_train_epochs=4,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.5,
            **ORDERS[order],
        )
        run.train()
        runs.append(run)
    whole, parts = runs
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for name_, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name_], tensor, rtol=1e-4, atol=1e-5)
    logged = [[e[k] for e in run.state.log_history for k in sorted(e) if k.startswith("stage_")] for run in runs]
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_gradient_checkpointing_changes_no_number(order, tmp_path):
    runs = []
    for on in (False, True):
        run = trainer(tmp_path / str(on), "bert", activation_checkpointing=on, max_steps=6, **ORDERS[order])
        run.train()
        runs.append(weights(run.model))
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_train_every_stage(optim, tmp_path):
    trained = trainer(tmp_path, optim=optim, max_steps=3)
    before = weights(trained.model)
    trained.train()
    for stage in trained.partition.stages:
        name = f"{stage[0]}.mlp.fc1.weight"
        assert not torch.equal(trained.model.state_dict()[name], before[name])


def test_bf16_is_close_to_fp32_and_leaves_no_autocast_cache(tmp_path):
    runs = [trainer(tmp_path / str(on), "bert", bf16=on, max_steps=4) for on in (False, True)]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=2e-2)
    assert losses(runs[1]) != losses(runs[0])


def test_label_smoothing_reaches_every_stage(tmp_path):
    logs = []
    for factor in (0.0, 0.5):
        run = trainer(tmp_path / str(factor), label_smoothing_factor=factor, max_steps=1)
        run.train()
        logs.append(run.state.log_history[0])
    for stage in (1, 2, 3):
        assert logs[0][f"stage_{stage}_loss"] != logs[1][f"stage_{stage}_loss"]


class Task(Samples):
    """Samples whose labels are for another task."""

    def __init__(self, name, labels):
        super().__init__(name)
        self.columns["labels"] = labels


DRAWN = torch.Generator().manual_seed(0)
ONE, THREE = torch.rand(32, generator=DRAWN), torch.rand(32, 3, generator=DRAWN)
MANY = (torch.rand(32, 4, generator=DRAWN) > 0.5).float()


@pytest.mark.parametrize(
    ("name", "order", "problem", "num_labels", "labels"),
    [
        ("vit", "simultaneous", "regression", 1, ONE),
        ("bert", "sequential", "regression", 1, ONE),
        ("vit", "sequential", "regression", 3, THREE),
        ("bert", "simultaneous", "regression", 3, THREE),
        ("vit", "sequential", "multi_label_classification", 4, MANY),
        ("bert", "simultaneous", "multi_label_classification", 4, MANY),
    ],
)
def test_other_tasks(name, order, problem, num_labels, labels, tmp_path):
    model = make(name, num_labels=num_labels, problem_type=problem)
    run = trainer(tmp_path, name, model, data=Task(name, labels), num_train_epochs=5, **ORDERS[order])
    run.compute_metrics = None
    run.train()
    for stage in (1, 2, 3):
        found = [e[f"stage_{stage}_loss"] for e in run.state.log_history if f"stage_{stage}_loss" in e]
        assert np.mean(found[-4:]) < np.mean(found[:4])


@pytest.mark.parametrize("order", ORDERS)
def test_a_users_loss_function_is_every_stages(order, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return 2 * nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    own = trainer(
        tmp_path / "own", extra={"compute_loss_func": loss}, transport_weight=0.0, optim="sgd", **ORDERS[order]
    )
    stock = trainer(tmp_path / "stock", transport_weight=0.0, optim="sgd", **ORDERS[order])
    for run in (own, stock):
        run.train()
    first, second = (run.state.log_history[0] for run in (own, stock))
    assert first["stage_1_loss"] == pytest.approx(2 * second["stage_1_loss"], rel=1e-5)
    assert first["loss"] == pytest.approx(2 * second["loss"], rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_budget_counts_all_stages_and_laps(order, tmp_path):
    by_epochs = trainer(tmp_path, num_train_epochs=2, **ORDERS[order])
    by_epochs.train()
    assert by_epochs.state.global_step == 8 * (1 if order == "simultaneous" else 3)
    by_steps = trainer(tmp_path, max_steps=20, **ORDERS[order])
    by_steps.train()
    assert by_steps.state.global_step == by_steps.state.max_steps == 20


@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_each_segment_has_its_own_warm_up_and_decay(order, tmp_path):
    run = trainer(tmp_path, num_train_epochs=4, warmup_steps=2, lr_scheduler_type="cosine", **ORDERS[order])
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    segments = [rates[s.start : s.start + s.steps] for s in run._run.turns.order.segments]
    assert len(segments) == 3 * run.args.num_laps
    for segment in segments:
        assert segment == segments[0]
        assert segment[2] == max(segment) == run.args.learning_rate
        assert segment[0] < segment[1]
        assert segment[-1] < segment[3]


def test_a_scheduler_that_cannot_start_anew_is_refused(tmp_path):
    run = trainer(tmp_path, stage_order="sequential", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    with pytest.raises(ValueError, match="cannot start anew with each stage.*simultaneous"):
        run.train()


@pytest.mark.parametrize("name", MODELS)
def test_the_checkpoint_is_a_plain_one_with_the_stages_beside(name, tmp_path):
    run = trainer(tmp_path, name, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model()
    auto = AutoModelForImageClassification if "pixel_values" in batch(name) else AutoModelForSequenceClassification
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        loaded, report = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_same(weights(loaded), weights(run.model))
        stages = load_stages(folder)
        assert stages.partition == run.partition
        assert stages.config["num_stages"] == 3
        assert_same(weights(stages.heads), weights(run.heads))


def test_evaluation_and_prediction_show_every_stage(tmp_path):
    run = trainer(tmp_path, "bert", extra={"preprocess_logits_for_metrics": lambda logits, labels: 2 * logits})
    run.train()
    metrics = run.evaluate()
    found = run.predict(Samples("bert", 16, seed=1))
    assert found.predictions.shape == (16, 5)
    assert found.metrics["test_stage_3_accuracy"] == metrics["eval_stage_3_accuracy"] == metrics["eval_accuracy"]
    assert metrics["eval_stage_3_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    with torch.no_grad():
        inputs = batch("bert", 16, seed=1)
        hidden = []
        run.model.get_submodule(run.partition.boundaries[0]).register_forward_hook(lambda *a: hidden.append(a[2]))
        logits = run.model.eval()(**inputs).logits
        head = run.heads(0, hidden[0], inputs["attention_mask"])
    np.testing.assert_allclose(found.predictions, 2 * logits.numpy(), rtol=1e-4, atol=1e-5)
    right = (head.argmax(-1) == inputs["labels"]).float().mean().item()
    assert metrics["eval_stage_1_accuracy"] == pytest.approx(right)
    assert run.compute_metrics is accuracy


def test_evaluation_shows_all_heads_together(tmp_path):
    run = trainer(tmp_path, "bert")
    run.train()
    metrics = run.evaluate()
    inputs = batch("bert", 16, seed=1)
    with torch.no_grad(), run._run.staged.engine.observe(inputs["attention_mask"]) as view:
        logits = [run.model.eval()(**inputs).logits, *view.logits]
    right = (torch.stack(logits).mean(0).argmax(-1) == inputs["labels"]).float().mean().item()
    assert metrics["eval_ensemble_accuracy"] == pytest.approx(right)
    run.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1, keepdim=True)
    assert "eval_ensemble_accuracy" not in run.evaluate()


def test_metrics_of_batches_that_are_not_joined_are_those_of_all(tmp_path):
    def accuracy_of_batches(found):
        right = [x.argmax(-1) == y for x, y in zip(found.predictions, found.label_ids, strict=True)]
        return {"accuracy": float(np.concatenate(right).mean())}

    run = trainer(tmp_path, per_device_eval_batch_size=8)
    joined = run.evaluate()
    run.args.eval_do_concat_batches = False
    run.compute_metrics = accuracy_of_batches
    found = run.predict(run.eval_dataset)
    assert [one.shape for one in found.predictions] == [(8, 5), (8, 5)]
    metrics = run.evaluate()
    for name in ("eval_accuracy", *(f"eval_stage_{k}_accuracy" for k in (1, 2, 3))):
        assert metrics[name] == joined[name], name


def test_prediction_without_labels(tmp_path):
    data = Samples("vit", 6)
    del data.columns["labels"]
    data.__class__ = type("Unlabelled", (Samples,), {"__len__": lambda self: len(self.columns["pixel_values"])})
    assert trainer(tmp_path).predict(data).predictions.shape == (6, 5)


@pytest.mark.parametrize("settings", [{"num_stages": 1}, {"stage_order": "end_to_end"}])
def test_a_custom_trainer_trains_end_to_end_as_on_plain_trainer(settings, tmp_path):
    shared = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    trained = []
    for cls, own in ((MMSTTrainer, settings), (Trainer, {"activation_checkpointing": "stage_order" in settings})):
        args = arguments(tmp_path / cls.__name__, MMSTConfig if own is settings else TrainingArguments, **shared, **own)
        trained.append(own_loss(cls)(make("vit"), args, train_dataset=Samples("vit")))
        trained[-1].model_accepts_loss_kwargs = False
        trained[-1].train()
    assert_same(weights(trained[0].model), weights(trained[1].model))


@pytest.mark.parametrize(
    ("whole", "settings"),
    [(True, {}), (False, {}), (False, {"stage_order": "sequential", "offload": "stages"})],
)
def test_a_custom_trainer_makes_its_optimizer(whole, settings, tmp_path):
    class Own(MMSTTrainer):
        def create_optimizer(self):
            model = self.model if whole else nn.ModuleList([self.model.vit, self.model.classifier])
            self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0, fused=True)
            return self.optimizer

    plain = trainer(tmp_path / "plain", **settings)
    plain.train()
    own = Own(make("vit"), arguments(tmp_path / "own", **settings), train_dataset=Samples("vit"))
    own.train()
    assert_same(weights(own.heads), weights(plain.heads))
    assert_same(weights(own.model), weights(plain.model))
    args = arguments(tmp_path / "rate", head_learning_rate=0.1, **settings)
    with pytest.raises(ValueError, match="head_learning_rate=0.1 has no effect on an optimizer of your own"):
        Own(make("vit"), args, train_dataset=Samples("vit")).train()


def test_a_custom_trainer_that_averages_no_gradients_is_refused(tmp_path):
    class Own(MMSTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model.train(), self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    own = Own(make("vit"), arguments(tmp_path), train_dataset=Samples("vit"))
    own._run.learning.reduction = SimpleNamespace(start=lambda stage: None, wait=lambda stage: None, finished=False)
    with pytest.raises(ValueError, match="training_step of Own does not call that of MMSTTrainer"):
        own.train()


@pytest.mark.parametrize("through", [True, False])
def test_a_custom_trainer_makes_its_predictions(through, tmp_path):
    class Own(MMSTTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            if through:
                loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
                return loss, -logits, labels
            with torch.no_grad():
                outputs = model(**inputs)
            return outputs.loss, -outputs.logits, inputs["labels"]

    plain, own = (
        cls(make("vit"), arguments(tmp_path), eval_dataset=Samples("vit", 16), compute_metrics=accuracy)
        for cls in (MMSTTrainer, Own)
    )
    expected, found = plain.predict(plain.eval_dataset), own.predict(own.eval_dataset)
    np.testing.assert_array_equal(found.predictions, -expected.predictions)
    own_accuracy = float((found.predictions.argmax(-1) == found.label_ids).mean())
    assert found.metrics["test_accuracy"] == own_accuracy
    stages = {name for name in expected.metrics if name.startswith("test_stage_")}
    assert stages
    assert stages & found.metrics.keys() == (stages if through else set())


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_a_custom_trainer_adds_to_the_loss_of_the_last_stage(order, tmp_path):
    class Own(MMSTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (loss + 1000, outputs) if return_outputs else loss + 1000

    plain = trainer(tmp_path / "plain", **ORDERS[order])
    plain.train()
    args = arguments(tmp_path / "own", **ORDERS[order])
    own = Own(make("vit"), args, train_dataset=Samples("vit"))
    own.train()
    assert_same(weights(own.model), weights(plain.model))
    assert min(losses(own)) > 1000 > max(losses(plain))


def test_callbacks_and_early_stopping(tmp_path):
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_stage_2_loss",
        learning_rate=0.0,
        extra={"callbacks": [EarlyStoppingCallback(2)]},
    )
    run.train()
    assert run.state.global_step == 3


def test_hyperparameter_search_cuts_anew_for_each_trial(tmp_path):
    run = MMSTTrainer(
        args=arguments(tmp_path, max_steps=2),
        model_init=lambda trial: make("vit"),
        train_dataset=Samples("vit"),
        eval_dataset=Samples("vit", 16, seed=1),
        compute_metrics=accuracy,
    )
    seen = []

    def space(trial):
        seen.append(trial.suggest_categorical("num_stages", [2, 4]))
        return {"num_stages": seen[-1], "transport_weight": trial.suggest_float("transport_weight", 0.1, 1.0)}

    class Cut(TrainerCallback):
        cuts: list[int] = []

        def on_train_begin(self, *args, **kwargs):
            self.cuts.append(run.partition.num_stages)

    run.add_callback(Cut())
    best = run.hyperparameter_search(
        space, n_trials=4, direction="minimize", compute_objective=lambda m: m["eval_loss"]
    )
    assert best.hyperparameters["num_stages"] in (2, 4)
    assert Cut.cuts == seen
    assert run._run.staged.weights.weight == pytest.approx(run.args.transport_weight)


def test_a_users_optimizer_gets_the_heads(tmp_path):
    model = make("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = trainer(tmp_path, model=model, extra={"optimizers": (optimizer, None)}, max_steps=2)
    before = weights(run.heads)
    run.train()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in run.heads.state_dict().items())


def test_training_twice_goes_on(tmp_path):
    run = trainer(tmp_path, max_steps=2, transport_schedule="adaptive")
    run.train()
    first, steps = weights(run.model), run._run.staged.weights.state_dict()["steps"]
    run.train()
    assert run._run.staged.weights.state_dict()["steps"] == steps == [2, 2, 2]  # as the learning rate begins anew
    assert not torch.equal(run.model.state_dict()["classifier.weight"], first["classifier.weight"])


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    save = MMSTTrainer._save_rng_state

    def full_disk(self, folder):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(MMSTTrainer, "_save_rng_state", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(MMSTTrainer, "_save_rng_state", save)
    resumed = trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    straight = trainer(tmp_path / "straight", max_steps=6)
    straight.train()
    assert_same(weights(resumed.model), weights(straight.model))


def test_the_summary_is_one_line(tmp_path, capsys):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hf_mmst:")]
    assert len(lines) == 1
    assert "3 stages of 1+1+2 layers, simultaneous" in lines[0]
    assert "8,544+8,544+17,088" in lines[0]


@pytest.mark.parametrize("schedule", ["paper", "multipliers", "adaptive"])
def test_schedules_move_the_weights(schedule, tmp_path):
    run = trainer(tmp_path, transport_schedule=schedule, max_steps=51, data=Samples("vit", 16))
    run.train()
    found = [run._run.staged.weights[k] for k in range(3)]
    if schedule == "paper":
        assert found == [0.3, 0.3, 0.15]
    else:
        assert len(set(found)) == 3


@pytest.mark.parametrize(("seed", "kind"), enumerate(killed.KINDS))
def test_kills_at_any_moment_leave_a_checkpoint_that_resumes(seed, kind, tmp_path):
    """The process saves at each step and writes each batch of features, so that most kills hit a write."""
    folder, chance = tmp_path / "killed", random.Random(seed)
    for _ in range(3):
        begun = event()
        child = start(killed.main, folder, kind, begun)
        assert begun.wait(120), "the process has not begun to train"
        time.sleep(chance.uniform(0.02, 0.5))
        child.kill()
        child.join()
    resumed = killed.run(folder, kind)
    assert_same(weights(resumed.model), weights(killed.run(tmp_path / "straight", kind).model))
