"""Training on a GPU: every order in low precision, the numbers of plain Trainer, and the memory of one stage."""

import gc

import pytest
import torch
from runs import ORDERS, losses, run_end_to_end, trainer, weights
from transformers import Trainer, set_seed
from zoo import make

from hf_mmst import MMSTTrainer
from hf_mmst.memory.peaks import PeakMemory

WAYS = {
    **ORDERS,
    "end_to_end": {"stage_order": "end_to_end"},
    "stages offloaded": {"stage_order": "multi_lap", "num_laps": 2, "offload": "stages"},
    "the model's loss": {"stage_order": "sequential", "stage_objective": "model", "offload": "stages"},
}
CASES = [
    (way, precision) for way in WAYS for precision in ("bf16", "fp16") if (way, precision) != ("end_to_end", "fp16")
]
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
@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"resident_layers": 1},
        {"offloaded_step": "device"},
        {"layer_batch_size": 3},
        {"activation_checkpointing_kwargs": {"offload": True}},
    ],
)
def test_one_layer_at_a_time_has_the_numbers_of_plain_trainer(name, own, settings, tmp_path):
    tolerance = 1e-3 if settings else 1e-5
    settings = {"use_cpu": False, "max_grad_norm": 0.1, "adam_epsilon": 1e-3, **settings}
    trained = []
    for cls in (MMSTTrainer, Trainer):
        trained.append(
            run_end_to_end(tmp_path / cls.__name__, name, cls, **settings, **(own if cls is MMSTTrainer else {}))
        )
        trained[-1].train()
    offloaded, plain = trained
    assert losses(offloaded) == pytest.approx(losses(plain), abs=100 * tolerance)
    found = weights(offloaded.model)
    for key, tensor in weights(plain.model).items():
        torch.testing.assert_close(found[key].cpu(), tensor.cpu(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("order", ["sequential", "multi_lap"])
def test_one_stage_in_device_memory_takes_less_than_all(order, tmp_path):
    peaks = {}
    for offload in ("none", "stages"):
        trained = trainer(
            tmp_path / offload,
            "bert",
            make("bert", **WIDE),
            use_cpu=False,
            offload=offload,
            max_steps=6,
            **ORDERS[order],
        )
        with PeakMemory(trained.args.device) as peak:
            trained.train()
        peaks[offload] = peak.peak_bytes
        del trained
        gc.collect()
    assert peaks["stages"] < 0.8 * peaks["none"]
