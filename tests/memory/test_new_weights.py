"""Models on the meta device, whose weights are made where they rest."""

import pytest
import torch
from runs import arguments, assert_same, weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTForImageClassification, set_seed
from transformers.initialization import no_init_weights
from zoo import Samples, make

from hf_mmst import MMSTTrainer

TIED = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}


def without_data(cls, config):
    with torch.device("meta"):
        return cls(config)


@pytest.mark.parametrize("kind", ["vit", "llama"])
@pytest.mark.parametrize("resident", [0, 1])
def test_weights_are_those_that_the_class_makes(kind, resident, tmp_path):
    cls = LlamaForCausalLM if kind == "llama" else ViTForImageClassification
    config = LlamaConfig(**TIED, tie_word_embeddings=True) if kind == "llama" else make("vit").config
    with no_init_weights():
        expected = cls(config)
    expected.tie_weights()
    settings = {"stage_order": "end_to_end", "num_stages": None, "resident_layers": resident, "max_steps": 1}
    args = arguments(tmp_path, **settings)
    trained = MMSTTrainer(without_data(cls, config), args, train_dataset=Samples(kind))
    set_seed(args.seed)
    expected.initialize_weights()
    assert_same(weights(trained.model), weights(expected))
    assert_same(dict(trained.model.named_buffers()), dict(expected.named_buffers()))
    assert [name for name, _ in trained.model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    slabs = trained._run.staged.offload._slabs.values()
    resting = {tensor.data_ptr() for slab in slabs for tensor in slab.tensors}
    assert len(resting.intersection(p.data_ptr() for p in trained.model.parameters())) == len(resting)
    trained.train()
    again = MMSTTrainer(expected, args, train_dataset=Samples(kind))
    again.train()
    assert_same(weights(trained.model), weights(again.model))


def test_what_cannot_be_made_is_refused(tmp_path):
    args = arguments(tmp_path, stage_order="end_to_end", num_stages=None)
    half = make("vit")
    half.classifier.to("meta")
    with pytest.raises(ValueError, match=r"classifier\.weight of ViT.* is on the meta device.* other weights are not"):
        MMSTTrainer(half, args, train_dataset=Samples("vit"))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

        def forward(self, x, labels=None):
            for layer in self.layers:
                x = layer(x)
            return {"loss": x.mean(), "logits": x}

    with pytest.raises(ValueError, match=r"Plain is on the meta device.* no initialize_weights.* on the CPU"):
        MMSTTrainer(Plain().to("meta"), args)


def test_nothing_that_is_offloaded_is_moved_to_the_device_before(tmp_path):
    """The host asks whether to move the model as a whole; None leaves it to decide that by itself."""
    places = [
        arguments(tmp_path, num_stages=None, **settings).place_model_on_device
        for settings in ({"offload": "none"}, {"stage_order": "end_to_end"}, {"memory_budget": "4GiB"})
    ]
    assert places == [None, False, False]
