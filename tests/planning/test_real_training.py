"""Plans are within 3 % of what real training takes."""

from dataclasses import replace

import benchmark_planner
import pytest
from benchmark_planner import COMBINATIONS, make, measured_bytes, simulation

from hf_mmst.planning.ways import Way


@pytest.fixture
def batch_of_four(monkeypatch, precision):
    """In bfloat16 that takes half the time; many processors have no instructions for it."""
    if precision == "bf16":
        monkeypatch.setattr(benchmark_planner, "BATCH", 4)


@pytest.mark.usefixtures("batch_of_four")
@pytest.mark.parametrize(("name", "precision", "way", "head_layers"), COMBINATIONS[1::2])
def test_within_3_percent_of_real_training(name, precision, way, head_layers, tmp_path):
    """PyTorch's own account of the real tensors of a real run, from the optimizer states to the last gradient."""
    model = make(name)
    planned = simulation(model, precision, head_layers).peak(way).total
    assert planned == pytest.approx(measured_bytes(model, precision, way, head_layers, str(tmp_path)), rel=0.03)


BLOCK = Way(num_stages=3, stage_order="sequential", stage_objective="model")
BLOCKS = [  # by the model's loss
    ("vit", "fp32", BLOCK),
    ("bert", "bf16", replace(BLOCK, offload="stages")),
    ("vit", "fp32", replace(BLOCK, activation_checkpointing=True)),
]


@pytest.mark.parametrize(("name", "precision", "way"), BLOCKS)
def test_blocks_within_3_percent_of_real_training(name, precision, way, tmp_path):
    model = make(name)
    planned = simulation(model, precision).peak(way).total
    assert planned == pytest.approx(measured_bytes(model, precision, way, 0, str(tmp_path)), rel=0.03)
    assert planned < simulation(model, precision).peak(Way(activation_checkpointing=way.activation_checkpointing)).total
