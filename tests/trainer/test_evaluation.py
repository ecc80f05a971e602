"""What evaluations say of each stage, and what the host makes of that: its objective of a search, its metrics."""

import math

import numpy as np
import pytest
import torch
from runs import accuracy, arguments, trainer
from zoo import Samples, make

from hf_mmst import MMSTTrainer


@pytest.mark.parametrize("metrics", [accuracy, None])
def test_the_default_objective_of_a_search_is_trainers(metrics, tmp_path):
    """Of the model's own metrics, one of which is named as those of stages are."""

    def own(found):
        return {**metrics(found), "stage_1_loss": 0.25}

    run = MMSTTrainer(
        args=arguments(tmp_path, max_steps=2, eval_strategy="epoch"),
        model_init=lambda trial: make("vit"),
        train_dataset=Samples("vit"),
        eval_dataset=Samples("vit", 16, seed=1),
        compute_metrics=metrics and own,
    )
    best = run.hyperparameter_search(lambda trial: {"seed": trial.suggest_int("seed", 1, 2)}, n_trials=1)
    (found,) = (entry for entry in run.state.log_history if "eval_loss" in entry)
    assert "eval_stage_2_loss" in found
    assert best.objective == (found["eval_loss"] if metrics is None else found["eval_accuracy"] + 0.25)


@pytest.mark.parametrize("joined", [True, False])
def test_metrics_of_a_stage_get_its_losses(joined, tmp_path):
    def mean_loss(found):
        losses = found.losses if joined else np.concatenate(found.losses)
        assert len(losses) == 12
        return {"own": float(losses.mean())}

    run = trainer(tmp_path, include_for_metrics=["loss"], eval_do_concat_batches=joined, per_device_eval_batch_size=8)
    run.compute_metrics = mean_loss
    found = run.evaluate(Samples("vit", 12))
    for name in ("eval", "eval_stage_1", "eval_stage_2", "eval_stage_3"):
        assert found[f"{name}_own"] == pytest.approx(found[f"{name}_loss"], rel=1e-5)
    assert found["eval_stage_1_own"] != found["eval_stage_3_own"]


def test_stages_are_those_of_the_first_of_several_passes(tmp_path):
    class Twice(MMSTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            inputs = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
            loss = (loss + super().compute_loss(model, inputs)) / 2
            return (loss, outputs) if return_outputs else loss

    once, twice = (
        kind(make("vit"), arguments(tmp_path), eval_dataset=Samples("vit", 16), compute_metrics=accuracy).evaluate()
        for kind in (MMSTTrainer, Twice)
    )
    assert twice.keys() == once.keys()
    for name in once:
        if "stage" in name and name != "eval_stage_3_loss":  # which is what compute_loss says
            assert twice[name] == once[name], name
    assert not math.isclose(twice["eval_loss"], once["eval_loss"])
