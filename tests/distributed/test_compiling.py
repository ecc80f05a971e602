"""Layers that are compiled one by one: the numbers of eager layers, few graphs, and nothing left behind."""

import os
import shutil

import pytest
import torch
from runs import trainer, weights
from torch._dynamo.utils import counters
from transformers import TrainerCallback, set_seed

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # few graphs, for which starting processes takes longer
RESIDENT = {"stage_order": "sequential", "max_steps": 9, "offload": "stages"}


class Graphs(TrainerCallback):
    """Notes after each step how many graphs have been compiled so far."""

    def __init__(self):
        self.numbers = []

    def on_step_end(self, args, state, control, **kwargs):
        self.numbers.append(counters["stats"]["unique_graphs"])


def run(folder, name, watch=None, **settings):
    set_seed(0)
    settings = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.05, **settings}
    trained = trainer(folder, name, extra={"callbacks": [watch] if watch else []}, **settings)
    trained.train()
    return trained


@pytest.mark.parametrize(
    ("name", "backend", "settings", "kinds"),
    [
        ("bert", "aot_eager", {"head_layers": 1}, 1),
        ("vit", "aot_eager", {"activation_checkpointing": True, "bf16": True}, 1),
        ("bert", "eager", {"gradient_accumulation_steps": 2, "stage_clipping": True}, 1),
        ("vit", "aot_eager", RESIDENT, 2),  # layers that learn, and those that rest
        pytest.param(
            *("vit", "inductor", {"num_stages": 2}, 1),
            marks=pytest.mark.skipif(
                shutil.which("g++") is None, reason="inductor needs a C++ compiler; aot_eager runs without it"
            ),
        ),
    ],
)
def test_the_numbers_are_those_of_eager_layers(name, backend, settings, kinds, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    watch = Graphs()
    found = run(tmp_path / "compiled", name, watch, torch_compile_backend=backend, **settings)
    assert watch.numbers[0] > 0
    assert watch.numbers[-1] <= 2 * kinds  # the first batch's, and one for sizes that vary
    assert watch.numbers[-1] == watch.numbers[len(watch.numbers) * (kinds + 1) // 4]  # none in later steps
    assert not counters["graph_break"]
    expected = run(tmp_path / "eager", name, **settings)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if "bf16" in settings else {"rtol": 1e-4, "atol": 1e-6}
    for module in ("model", "heads"):
        states = [weights(getattr(one, module)) for one in (found, expected)]
        assert states[0].keys() == states[1].keys()
        for key, tensor in states[1].items():
            torch.testing.assert_close(states[0][key], tensor, **tolerance, msg=lambda m, k=key: f"{k}: {m}")
    for layer in [*map(found.model.get_submodule, found.partition.layers), *found.heads.layers]:
        assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "layers"}, 'offload="layers" brings layers.*torch_compile=False'),
        ({**RESIDENT, "end_to_end_laps": 1}, 'offload="stages" brings layers.*torch_compile=False'),
        ({**RESIDENT, "torch_compile_mode": "reduce-overhead"}, "reduce-overhead.*weights that stay where they are"),
    ],
)
def test_what_cannot_be_compiled_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, torch_compile=True, **settings)
