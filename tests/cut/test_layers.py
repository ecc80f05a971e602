"""Finding the layers of a model."""

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
)
from zoo import MODELS, NUM_LAYERS, TEXT, make

from hf_mmst import find_layers
from hf_mmst.cut.probe import profile_layers


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found_in_order(name):
    model = make(name)
    layers = find_layers(model)
    assert len(layers) == NUM_LAYERS[name]
    profile = profile_layers(model, layers)
    assert [layer.name for layer in profile] == layers
    assert all(layer.flops > 0 for layer in profile)
    widths = [layer.width for layer in profile]
    assert widths == ([16, 16, 32, 32, 64, 64] if name == "swin" else [32] * 4)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_model_wrapped_for_lora_is_cut_the_same():
    import peft

    layers = find_layers(make("vit"))
    wrapped = peft.get_peft_model(make("vit"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert find_layers(wrapped) == [f"base_model.model.{name}" for name in layers]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=8)),
            "albert_layer_groups of Albert.* holds one layer only, a AlbertLayerGroup.*Set num_stages to 1.*share no",
        ),
        (lambda: make("vit", num_hidden_layers=1), "vit.layers of ViT.* holds one layer only, a ViTLayer.*num_stages"),
        (lambda: torch.nn.Linear(2, 2), "No list of layers was found in Linear"),
    ],
)
def test_what_has_no_encoder_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        find_layers(build())


def test_layers_that_run_twice_are_refused():
    model = make("vit")
    model.vit.layers[2] = model.vit.layers[1]
    with pytest.raises(ValueError, match=r"ran \d+ times in a forward pass.*Set num_stages to 1"):
        profile_layers(model, find_layers(model))
