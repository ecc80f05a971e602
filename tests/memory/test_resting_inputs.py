"""Inputs of layers that rest between forward and backward pass: the same numbers, less memory."""

import gc
import weakref

import pytest
import torch
from elsewhere import PLACES, play
from runs import arguments, assert_same, losses, trainer, weights
from runs import run_end_to_end as run
from transformers import set_seed
from zoo import batch, make

from hf_mmst.memory.resting_inputs import RestingInputs
from hf_mmst.memory.ring import Link
from hf_mmst.memory.slabs import Slab
from hf_mmst.planning import costs
from hf_mmst.planning.budget import ways_of
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way

RESTING = {"activation_checkpointing_kwargs": {"offload": True}}
CPU = torch.device("cpu")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_the_numbers_are_the_same(name, place, tmp_path, monkeypatch):
    play(place, monkeypatch)
    found = run(tmp_path / "resting", name, gradient_accumulation_steps=2, **RESTING)
    expected = run(tmp_path / "kept", name, gradient_accumulation_steps=2)
    for one in (found, expected):
        set_seed(0)
        one.train()
    assert_same(weights(found.model), weights(expected.model))
    assert losses(found) == losses(expected)


def test_an_input_that_nobody_else_keeps_is_not_in_memory(tmp_path):
    trained = run(tmp_path, "vit", max_steps=1, **RESTING)
    layers, inputs, alive = trained.model.vit.layers, [], []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    trained.model.vit.layernorm.register_forward_pre_hook(
        lambda *_: alive.append([one() is not None for one in inputs])
    )
    trained.train()
    gc.collect()
    assert len(alive[0]) == 4
    assert sum(alive[0]) <= 1  # that of the layer which has just run


def test_memory_at_rest_is_used_again(tmp_path):
    made, numbers = [], []

    class Counted(Slab):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    inputs = RestingInputs(CPU, str(tmp_path), Counted, Link(CPU), None)
    for step in range(3):
        stream, mask = torch.randn(4, 5, requires_grad=True), torch.ones(4, 5)
        with inputs.saving():
            outputs = [(stream * (k + step)) * mask * stream for k in range(2)]
        expected = torch.autograd.grad(sum((stream * (k + step) * mask * stream).sum() for k in range(2)), stream)
        found = torch.autograd.grad(sum(out.sum() for out in outputs), stream)
        assert torch.equal(found[0], expected[0])
        del outputs, found
        numbers.append(len(made))
    assert len({*numbers}) == 1
    with inputs.saving():
        (torch.randn(2, 3, requires_grad=True) ** 2).sum().backward()
    assert len(made) == numbers[0] + 1


@pytest.mark.parametrize("place", ["in place", "late"])
def test_the_plan_has_them_at_rest(place, tmp_path, monkeypatch):
    play(place, monkeypatch)
    simulation = Simulation(make("vit", num_hidden_layers=3), batch("vit", 64), for_gpu=place == "late")
    kept, resting = (Way(stage_order="end_to_end", offload="layers", rests_inputs=rests) for rests in (False, True))
    inputs = sum(layer.output for layer in simulation.by_layer)
    assert simulation.peak(resting).total < simulation.peak(kept).total
    moved = [costs.moved_bytes(simulation, way).total for way in (resting, kept)]
    assert moved[0] == moved[1] + 2 * inputs
    assert costs.resting_bytes(simulation, resting) == costs.resting_bytes(simulation, kept) + inputs
    found = []
    for settings in (RESTING, {}):
        model = make("vit", num_hidden_layers=3)
        trained = run(tmp_path, "vit", model=model, max_steps=1, per_device_train_batch_size=16, **settings)
        trained.train()
        found.append(trained.results({})["moved_in_bytes"] + trained.results({})["moved_out_bytes"])
    assert found[0] == found[1] + 2 * inputs // 4
    (planned,) = ways_of(arguments(tmp_path, num_stages=None, stage_order="end_to_end", **RESTING), 4)
    assert planned.rests_inputs
    assert arguments(tmp_path, **{"num_stages": None, **planned.settings}).rests_inputs


def test_layers_left_out_of_checkpointing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"every_n_layers=2 has no effect.* resident_layers"):
        arguments(tmp_path, stage_order="end_to_end", activation_checkpointing_kwargs={"every_n_layers": 2})


@pytest.mark.parametrize("settings", [{"num_stages": 2}, {"stage_order": "end_to_end", "resident_layers": 1}])
def test_inputs_that_the_host_would_put_in_pinned_memory_are_refused_on_a_cpu(settings, tmp_path):
    made = trainer(
        tmp_path, "bert", activation_checkpointing=True, activation_checkpointing_kwargs={"offload": True}, **settings
    )
    with pytest.raises(ValueError, match=r"training is on a CPU\. Leave offload out"):
        made.train()
