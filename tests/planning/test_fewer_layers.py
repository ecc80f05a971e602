"""Steps of many like layers are found with a few of them, to the byte and the operation."""

from dataclasses import replace

import pytest
from torch import nn
from transformers import BertConfig, LlamaConfig, ViTConfig

from hf_mmst.planning.model_and_batch import batch_of, model_of
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
LAYERS = 9
MODELS = {
    "vit": (ViTConfig(**SMALL, num_hidden_layers=LAYERS, image_size=32, patch_size=8, num_labels=5), None),
    "bert": (BertConfig(**SMALL, num_hidden_layers=LAYERS, vocab_size=100, num_labels=5), None),
    "llama": (LlamaConfig(**SMALL, num_hidden_layers=12, vocab_size=100), "causal-lm"),
}
OFFLOADED = Way(offload="layers")
IN_TURN = Way(num_stages=LAYERS, stage_order="sequential")
WAYS = {
    "end to end": Way(),
    "checkpointing": Way(activation_checkpointing=True),
    "LoRA": Way(lora=True),
    "offloaded": OFFLOADED,
    "offloaded, inputs": replace(OFFLOADED, rests_inputs=True),
    "offloaded, step on device": replace(OFFLOADED, offloaded_step="device"),
    "offloaded, parts": replace(OFFLOADED, layer_batch_size=2),
    "resident": replace(OFFLOADED, resident_layers=3),
    "resident, checkpointing": replace(OFFLOADED, resident_layers=2, activation_checkpointing=True),
    "at once": Way(num_stages=LAYERS),
    "at once, clipping": Way(num_stages=LAYERS, stage_clipping=True),
    "at once, checkpointing": Way(num_stages=LAYERS, activation_checkpointing=True),
    "in turn": IN_TURN,
    "in turn, offloaded": replace(IN_TURN, offload="stages"),
    "in turn, cached": replace(IN_TURN, feature_cache="disk"),
    "in turn, model": replace(IN_TURN, stage_objective="model"),
    "in turn, model, offloaded": replace(IN_TURN, stage_objective="model", offload="stages"),
}
COMBINATIONS = [
    *(("vit", "fp32", False, way) for way in WAYS),
    *(
        ("bert", "bf16", False, way)
        for way in ("end to end", "checkpointing", "offloaded", "at once", "in turn, model")
    ),
    *(("llama", "bf16", True, way) for way in ("end to end", "offloaded")),
]


def simulated(name: str, precision: str = "fp32", for_gpu: bool = False) -> Simulation:
    model = model_of(*MODELS[name])
    return Simulation(model, batch_of(model, 4, None if name == "vit" else 16, None), precision, for_gpu=for_gpu)


@pytest.fixture
def layers_run(monkeypatch):
    """Numbers of layers of the steps that are simulated."""
    step, found = Simulation.step, []

    def counting(self, way, stages):
        found.append(len(self.layers))
        return step(self, way, stages)

    monkeypatch.setattr(Simulation, "step", counting)
    return found


@pytest.mark.parametrize(("name", "precision", "for_gpu", "way"), COMBINATIONS)
def test_a_few_layers_are_enough(name, precision, for_gpu, way, layers_run):
    simulation = simulated(name, precision, for_gpu)
    found = simulation.peak(WAYS[way])
    assert max(layers_run) < len(simulation.layers)
    expected = simulation.simulated_peak(WAYS[way])
    assert layers_run[-1] == len(simulation.layers)
    assert found == expected
    assert vars(found.operations) == vars(expected.operations)


@pytest.mark.parametrize(("resident", "precision"), [(1, "fp32"), (5, "fp32"), (12, "fp32"), (17, "fp32"), (4, "bf16")])
def test_any_number_of_layers_is_resident(resident, precision, layers_run):
    model = model_of(ViTConfig(**SMALL, num_hidden_layers=18, image_size=16, patch_size=8, num_labels=5))
    simulation = Simulation(model, batch_of(model, 2, None, None), precision)
    way = replace(OFFLOADED, resident_layers=resident)
    found = simulation.peak(way)
    assert max(layers_run) < 18
    assert found == simulation.simulated_peak(way)


def freeze_one(model: nn.Module) -> None:
    model.vit.layers[4].requires_grad_(False)


def count_on_all(model: nn.Module) -> None:
    def look(vit: nn.Module, _: tuple) -> None:
        assert vit.layers[LAYERS - 1] is not None

    model.vit.register_forward_pre_hook(look)


@pytest.mark.parametrize("change", [freeze_one, count_on_all])
def test_all_layers_are_simulated_where_few_are_not_enough(change, layers_run):
    model = model_of(*MODELS["vit"])
    change(model)
    simulation = Simulation(model, batch_of(model, 4, None, None))
    assert simulation.peak(Way()) == simulation.simulated_peak(Way())
    assert layers_run[-2:] == [LAYERS, LAYERS]


def test_end_to_end_there_is_one_stage():
    assert Way(num_stages=12, stage_order="end_to_end", offload="layers") == Way(offload="layers")
