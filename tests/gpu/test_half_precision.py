"""fp16, whose gradient scaler needs a GPU, against the equations."""

import pytest
from equations import assert_follows


@pytest.mark.parametrize(
    ("name", "optim", "settings"),
    [
        ("vit", "adamw_torch", {"gradient_accumulation_steps": 2}),
        ("bert", "sgd", {"stage_clipping": True, "activation_checkpointing": True}),
    ],
)
def test_the_steps_are_those_of_the_equations(name, optim, settings, tmp_path):
    assert_follows(tmp_path, name, "fp16", optim, {"use_cpu": False, **settings})
