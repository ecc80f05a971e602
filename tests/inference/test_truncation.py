"""A truncated model says what the head of its last stage said."""

import copy

import pytest
import torch
from engines import build
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from zoo import batch

from hf_mmst import StageHeads
from hf_mmst.inference.truncation import truncate
from hf_mmst.records.stages import Stages


def truncated(name, pooling, num_stages, seed=0, head_layers=0):
    model, partition, heads, engine = build(name, 3, seed=seed, head_layers=head_layers)
    heads = engine.heads = StageHeads(heads.widths, heads.num_labels, pooling, layers=heads.layers)
    for parameter in heads.layers.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    for module in (*model.modules(), *heads.modules()):
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    for name_, parameter in model.named_parameters():
        if "embeddings" in name_:
            torch.nn.init.normal_(parameter)
    return model.eval(), engine, truncate(model, Stages(partition, heads, {}, {}), num_stages)


IMAGES = [
    *(("vit", "cls", 0), ("deit", "cls", 0), ("dinov2", "cls", 0), ("dinov2", "mean", 0), ("swin", "mean", 0)),
    *(("vit", "cls", 1), ("dinov2", "mean", 1)),
]
TEXTS = [("bert", "cls", 0), ("bert", "cls", 1), ("roberta", "cls", 0)]


@pytest.mark.parametrize(
    ("name", "pooling", "head_layers", "num_stages"),
    [*((*one, k) for one in IMAGES for k in (1, 2)), *((*one, 1) for one in TEXTS), ("bert", "cls", 0, 2)],
)
def test_the_first_stages_are_a_plain_model(name, pooling, head_layers, num_stages, tmp_path):
    model, engine, small = truncated(name, pooling, num_stages, head_layers=head_layers)
    before = copy.deepcopy(model.state_dict())
    inputs = {key: value for key, value in batch(name, 16).items() if key != "labels"}
    with torch.no_grad(), engine.observe() as view:
        model(**inputs)
    small.save_pretrained(tmp_path)
    auto = (
        AutoModelForImageClassification
        if (name, pooling, head_layers) in IMAGES
        else AutoModelForSequenceClassification
    )
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, view.logits[num_stages - 1], rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "pooling", "num_stages", "message"),
    [
        ("vit", "mean", 1, 'pools "mean", but a ViTForImageClassification pools otherwise.*head_pooling'),
        ("bert", "mean", 1, 'pools "mean", but a BertForSequenceClassification pools otherwise.*head_pooling'),
        ("distilbert", "cls", 1, 'pools "cls", but .* has other functions after its layers'),
        ("swin", "cls", 1, 'pools "cls", but a SwinForImageClassification pools otherwise'),
        ("vit", "cls", 3, "num_stages=3 of 3 cannot be kept: set it to a whole number from 1 to 2"),
        ("vit", "cls", 0, "num_stages=0 of 3 cannot be kept"),
        ("vit", "cls", 1.5, "num_stages=1.5 of 3 cannot be kept"),
    ],
)
def test_what_a_plain_model_cannot_say_is_refused(name, pooling, num_stages, message):
    with pytest.raises(ValueError, match=message):
        truncated(name, pooling, num_stages)


def test_a_model_that_would_not_be_smaller_is_refused():
    with pytest.raises(ValueError, match=r"num_stages=2 would take 4 layers, 2 .* 1 of the head .*has 4\. Set"):
        truncated("bert", "cls", 2, head_layers=1)
