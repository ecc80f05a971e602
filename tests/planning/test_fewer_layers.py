"""Steps of many like layers are found with a few of them, to the byte and the operation."""

from dataclasses import replace

import pytest
from torch import nn
from transformers import BertConfig, LlamaConfig, T5Config, ViTConfig

from hf_mmst.planning.model_and_batch import batch_of, model_of
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
LAYERS = 10
MODELS = {
    "vit": (ViTConfig(**SMALL, num_hidden_layers=LAYERS, image_size=32, patch_size=8, num_labels=5), None),
    "bert": (BertConfig(**SMALL, num_hidden_layers=LAYERS, vocab_size=100, num_labels=5), None),
    "llama": (LlamaConfig(**SMALL, num_hidden_layers=LAYERS, vocab_size=100), "causal-lm"),
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
FP32, BF16, GPU = ("fp32", False), ("bf16", False), ("bf16", True)
COMBINATIONS = [
    *(("vit", *FP32, way) for way in WAYS),
    *(("bert", *BF16, way) for way in WAYS if way != "resident"),
    *(("llama", *GPU, way) for way in ("offloaded", "end to end", "in turn, offloaded")),
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
    assert max(layers_run) < LAYERS
    expected = simulation.simulated_peak(WAYS[way])
    assert layers_run[-1] == LAYERS
    assert found == expected
    assert vars(found.operations) == vars(expected.operations)


@pytest.mark.parametrize("resident", range(1, 24, 2))
def test_any_number_of_layers_is_resident(resident, layers_run):
    model = ViTConfig(**SMALL, num_hidden_layers=24, image_size=16, patch_size=8, num_labels=5)
    simulation = Simulation(model_of(model), batch_of(model_of(model), 2, None, None))
    way = replace(OFFLOADED, resident_layers=resident)
    found = simulation.peak(way)
    assert max(layers_run) < 24
    assert found == simulation.simulated_peak(way)


def freeze_one(model: nn.Module) -> None:
    model.vit.layers[4].requires_grad_(False)


def count_on_all(model: nn.Module) -> None:
    model.vit.register_forward_pre_hook(lambda vit, _: vit.layers[LAYERS - 1])


@pytest.mark.parametrize("change", [freeze_one, count_on_all])
def test_all_layers_are_simulated_where_few_are_not_enough(change, layers_run):
    model = model_of(*MODELS["vit"])
    change(model)
    simulation = Simulation(model, batch_of(model, 4, None, None))
    assert simulation.peak(Way()) == simulation.simulated_peak(Way())
    assert layers_run[-2:] == [LAYERS, LAYERS]


def test_unlike_layers_are_all_simulated(layers_run):
    model = model_of(T5Config(d_model=32, d_kv=16, d_ff=64, num_heads=2, num_layers=LAYERS, vocab_size=100), "texts")
    simulation = Simulation(model, batch_of(model, 2, 8, None))
    assert simulation.peak(Way()) == simulation.simulated_peak(Way())
    assert len({*layers_run}) == 1
