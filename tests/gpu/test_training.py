"""Training on a GPU: every order in low precision, the numbers of plain Trainer, and the memory of one stage."""

import gc

import pytest
import torch
from runs import ORDERS, losses, run_coupled, trainer, weights
from transformers import Trainer, set_seed
from zoo import make

from hf_mmst import MMSTTrainer
from hf_mmst.memory.peaks import PeakMemory

WAYS = {
    **ORDERS,
    "coupled": {"stage_order": "coupled"},
    "one stage resident": {"stage_order": "multi_lap", "num_laps": 2, "stage_residency": "stage"},
    "the model's loss": {"stage_order": "sequential", "stage_objective": "model", "stage_residency": "stage"},
}
CASES = [(way, precision) for way in WAYS for precision in ("bf16", "fp16") if (way, precision) != ("coupled", "fp16")]
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}


def run(folder, name, way, **settings):
    set_seed(0)
    trained = trainer(folder, name, **{"use_cpu": False, "max_steps": 24, **WAYS[way], **settings})
    before = weights(trained.model)
    trained.train()
    for layer in trained.partition.layers:
        found = weights(trained.model.get_submodule(layer))
        assert any(not torch.equal(found[key].cpu(), before[f"{layer}.{key}"].cpu()) for key in found), layer
    return trained


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize(("way", "precision"), CASES)
def test_losses_in_low_precision_are_close_to_those_of_fp32(name, way, precision, tmp_path):
    low = losses(run(tmp_path / precision, name, way, **{precision: True}))
    assert low == pytest.approx(losses(run(tmp_path / "fp32", name, way)), abs=0.05)


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize(("settings", "tolerance"), [({}, 1e-5), ({"bf16": True}, 1e-3)])
def test_one_layer_at_a_time_has_the_numbers_of_plain_trainer(name, settings, tolerance, tmp_path):
    settings = {"use_cpu": False, "max_grad_norm": 0.1, "adam_epsilon": 1e-3, **settings}
    trained = []
    for cls in (MMSTTrainer, Trainer):
        trained.append(run_coupled(tmp_path / cls.__name__, name, cls, **settings))
        trained[-1].train()
    coupled, plain = trained
    assert losses(coupled) == pytest.approx(losses(plain), abs=100 * tolerance)
    found = weights(coupled.model)
    for key, tensor in weights(plain.model).items():
        torch.testing.assert_close(found[key].cpu(), tensor.cpu(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_one_stage_in_device_memory_takes_less_than_all(order, tmp_path):
    peaks = {}
    for residency in ("all", "stage"):
        trained = trainer(
            tmp_path / residency,
            "bert",
            make("bert", **WIDE),
            use_cpu=False,
            stage_residency=residency,
            max_steps=6,
            **ORDERS[order],
        )
        with PeakMemory(trained.args.device) as peak:
            trained.train()
        peaks[residency] = peak.peak_bytes
        del trained
        gc.collect()
    assert peaks["stage"] < 0.8 * peaks["all"]
