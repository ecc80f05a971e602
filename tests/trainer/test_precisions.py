"""The trainer against the equations: precision, accumulation, clipping, checkpointing and optimizers together."""

import pytest
import torch
from equations import assert_follows
from runs import assert_same, trainer, weights


@pytest.mark.parametrize(
    ("name", "precision", "optim", "settings"),
    [
        ("vit", "fp32", "adamw_torch_fused", {"gradient_accumulation_steps": 2}),
        ("bert", "fp32", "sgd", {"stage_clipping": True, "gradient_accumulation_steps": 2}),
        ("vit", "fp32", "adafactor", {"stage_clipping": True}),
        ("bert", "fp32", "rmsprop", {"activation_checkpointing": True, "max_grad_norm": 0.0}),
        ("bert", "fp32", "adagrad", {"head_layers": 1, "gradient_accumulation_steps": 2}),
        ("vit", "bf16", "adamw_torch", {"gradient_accumulation_steps": 2, "activation_checkpointing": True}),
        ("bert", "bf16", "sgd", {"stage_clipping": True}),
        ("vit", "scaled", "adamw_torch_fused", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}),
    ],
)
def test_the_steps_are_those_of_the_equations(name, precision, optim, settings, tmp_path):
    assert_follows(tmp_path, name, precision, optim, settings)


def test_a_step_with_gradients_that_overflow_is_left_out_for_all_stages(tmp_path):
    trained = trainer(tmp_path, "vit", max_steps=2, max_grad_norm=0.0, optim="sgd")
    trained.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    before, seen = weights(trained.model), []
    step = trained.create_optimizer().register_step_pre_hook(lambda *_: seen.append(weights(trained.model)))
    trained.train()
    step.remove()
    assert len(seen) == 1  # the first one overflowed, the second did not
    assert_same({name: seen[0][name] for name in before}, before)
