"""What a model is looked at with: the first samples of the user's data, as the model gets them in training."""

import random

import numpy as np
import pytest
import torch
import transformers as tf
from other_models import MODELS, TextAndNumbers, text
from runs import arguments, weights
from torch.nn.functional import cross_entropy
from zoo import TEXT, WIDTH

from hf_mmst import MMSTTrainer, find_layers
from hf_mmst.cut.example_inputs import ExampleInputs, first_batch
from hf_mmst.cut.token_flow import attends_causally


def siglip2():
    vision = {**WIDTH, "num_patches": 16, "patch_size": 8}
    return tf.Siglip2ForImageClassification(tf.Siglip2Config(vision_config=vision, num_labels=2))


PATCHES = {"pixel_attention_mask": torch.ones(16).long(), "spatial_shapes": torch.tensor([4, 4])}
OWN_LOSS = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: cross_entropy(outputs["logits"], labels)}


@pytest.mark.parametrize(
    ("build", "sample", "more"),
    [
        (*MODELS["video"][:2], {}),
        (*MODELS["boxes of words"][:2], {}),
        (siglip2, lambda i: {"pixel_values": torch.randn(16, 192), "labels": i % 2, **PATCHES}, {}),
        (*MODELS["a module"][:2], OWN_LOSS),
    ],
    ids=["video", "boxes of words", "patches", "a module"],
)
def test_what_cannot_be_made_up_is_taken_from_the_data(build, sample, more, tmp_path):
    names = {"label_names": ["target"]} if build is TextAndNumbers else {}
    settings = {"num_stages": 2, "max_steps": 1, "remove_unused_columns": False, **names}
    data = [sample(i) for i in range(4)]
    run = MMSTTrainer(build(), arguments(tmp_path, **settings), train_dataset=data, eval_dataset=data, **more)
    before = weights(run.model)
    run.train()
    for stage in run.partition.stages:
        layer = f"{stage[0]}."
        assert any(not torch.equal(t, before[n]) for n, t in run.model.state_dict().items() if n.startswith(layer))
    assert "eval_stage_1_loss" in run.evaluate()


def test_without_data_that_is_said(tmp_path):
    with pytest.raises(ValueError, match="What a TextAndNumbers takes cannot be made up.* Pass a train_dataset"):
        MMSTTrainer(TextAndNumbers(), arguments(tmp_path), **OWN_LOSS)


class Masked(tf.BertForSequenceClassification):
    """A forward pass that cannot do without the mask."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        return tf.modeling_outputs.SequenceClassifierOutput(loss=cross_entropy(logits, labels), logits=logits)


def padded(i, side="right"):
    mask = (torch.arange(16) < 10).long()
    return text(i, attention_mask=mask if side == "right" else mask.flip(0))


def test_a_forward_pass_of_ones_own_gets_all_that_it_gets_in_training(tmp_path):
    data = [padded(i) for i in range(4)]
    model = Masked(tf.BertConfig(**TEXT))
    model.loss_type = "ForSequenceClassification"
    MMSTTrainer(model, arguments(tmp_path, num_stages=2, max_steps=1), train_dataset=data).train()


def gpt(cls, config, **names):
    return lambda: cls(config(vocab_size=99, num_labels=2, pad_token_id=0, **names))


CAUSAL = {
    "OpenAI GPT": gpt(tf.OpenAIGPTForSequenceClassification, tf.OpenAIGPTConfig, n_embd=32, n_layer=4, n_head=4),
    "MPT": gpt(tf.MptForSequenceClassification, tf.MptConfig, d_model=32, n_layers=4, n_heads=4),
    "BLOOM": gpt(tf.BloomForSequenceClassification, tf.BloomConfig, hidden_size=32, n_layer=4, n_head=4),
    "OPT": gpt(
        tf.OPTForSequenceClassification,
        tf.OPTConfig,
        hidden_size=32,
        num_hidden_layers=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        num_attention_heads=4,
    ),
    "Qwen3": lambda: tf.Qwen3ForSequenceClassification(tf.Qwen3Config(**TEXT, head_dim=8, num_key_value_heads=2)),
    "ImageGPT": gpt(
        tf.ImageGPTForImageClassification, tf.ImageGPTConfig, n_positions=64, n_embd=32, n_layer=4, n_head=4
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_decoders_as_classifiers_are_told_by_what_a_token_changes(name, tmp_path):
    data = [{"input_ids": list(range(3, 11)), "labels": i % 2} for i in range(4)]
    with pytest.raises(
        ValueError, match=r'attend causally: no token depends on a later one.*"end_to_end" or num_stages=1'
    ):
        MMSTTrainer(CAUSAL[name](), arguments(tmp_path, num_stages=2), train_dataset=data)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("build", "causal"), [(MODELS["a decoder"][0], True), (lambda: Masked(tf.BertConfig(**TEXT)), False)]
)
def test_padding_does_not_count_for_that(side, build, causal):
    model = build()
    batch = tf.default_data_collator([padded(i, side) for i in range(2)])
    values = batch if not causal else {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert attends_causally(model, find_layers(model), ExampleInputs(values, 2)) is causal


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()


class Noisy(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {"x": drawn()}


def test_looking_at_samples_leaves_chance_alone():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = drawn()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert len(first_batch(Noisy(), 2, list)) == 2  # a single sample comes twice
    assert first_batch([], 2, list) is None
    once = iter([1, 2, 3])
    assert first_batch(once, 2, list) is None
    assert [*once] == [1, 2, 3]
    assert drawn() == expected


def test_labels_and_padding_are_left_out_for_models_of_the_host_alone():
    batch = tf.default_data_collator([text(0), text(1)])
    host, own = (cls(tf.BertConfig(**TEXT)) for cls in (tf.BertForSequenceClassification, Masked))
    assert {*ExampleInputs.of_batch(host, batch, 2).values} == {"input_ids"}
    assert {*ExampleInputs.of_batch(own, batch, 2).values} == {*batch}
    assert {*ExampleInputs.of_batch(own, batch, 2, makes_loss=False).values} == {"input_ids", "attention_mask"}
    values = ExampleInputs({"pixel_values": torch.zeros(1, 3, 8, 8)}, 1).on(own.bfloat16())
    assert values["pixel_values"].dtype == torch.bfloat16
