"""One stage, and one layer at a time: the numbers of plain Trainer, for whatever it trains."""

import pytest
import torch
import transformers as tf
from encoders import FOUR, T5, TOWER, Vgg
from test_trainer import arguments, assert_same, losses, weights
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from zoo import SWIN, TEXT, VISION, WIDTH

from hf_mmst import MMSTConfig, MMSTTrainer

IDS = torch.arange(3, 19)
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


class TextAndNumbers(nn.Module):
    """A module of the user's own, without a config, with a second input and another name for the labels."""

    def __init__(self):
        super().__init__()
        self.encoder = tf.BertModel(tf.BertConfig(**TEXT))
        self.classifier = nn.Linear(33, 3)

    def forward(self, input_ids, numbers, target):
        hidden = self.encoder(input_ids).last_hidden_state[:, 0]
        logits = self.classifier(torch.cat([hidden, numbers], -1))
        return {"loss": nn.functional.cross_entropy(logits, target), "logits": logits}


class Slope(nn.Module):
    """A module without layers."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": (x * self.slope - labels).square().mean(), "logits": x * self.slope}


def text(i, **more):
    return {"input_ids": IDS + i, "attention_mask": torch.ones_like(IDS), "labels": i % 2, **more}


def image(i, *shape, **more):
    return {"pixel_values": torch.randn(*shape, generator=torch.Generator().manual_seed(i)), **more}


def boxes(i):
    return {"class_labels": torch.tensor([i % 3]), "boxes": torch.full((1, 4), 0.3 + 0.02 * i)}


# How a model is made, its sample number i, and whether it has layers that can rest.
MODELS = {
    "a decoder": (lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**TEXT)), text, True),
    "BLOOM": (
        lambda: tf.BloomForSequenceClassification(
            tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
        ),
        text,
        True,
    ),
    "one shared layer": (
        lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=16)),
        text,
        False,
    ),
    "encoder and decoder": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, num_layers=2)),
        lambda i: text(i, labels=IDS),
        True,
    ),
    "questions": (
        lambda: tf.BertForQuestionAnswering(tf.BertConfig(**TEXT | {"num_labels": 2})),
        lambda i: {"input_ids": IDS, "start_positions": i, "end_positions": i + 1},
        True,
    ),
    "choices": (
        lambda: tf.BertForMultipleChoice(tf.BertConfig(**TEXT)),
        lambda i: {"input_ids": (IDS + i).view(2, 8), "labels": i % 2},
        True,
    ),
    "boxes of words": (
        lambda: tf.BrosForTokenClassification(tf.BrosConfig(**{**TEXT, "hidden_size": 128})),
        lambda i: text(i, bbox=torch.rand(16, 4, generator=torch.Generator().manual_seed(i)), labels=IDS % 2),
        True,
    ),
    "no labels": (
        lambda: tf.ViTMAEForPreTraining(
            tf.ViTMAEConfig(
                **TINY,
                image_size=32,
                patch_size=16,
                decoder_hidden_size=16,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=16,
            )
        ),
        lambda i: image(i, 3, 32, 32),
        True,
    ),
    "images and texts": (
        lambda: tf.CLIPModel(
            tf.CLIPConfig(
                vision_config=TOWER,
                text_config={**WIDTH, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
                projection_dim=16,
            )
        ),
        lambda i: image(i, 3, 32, 32, input_ids=IDS + i),
        True,
    ),
    "detection": (
        lambda: tf.YolosForObjectDetection(
            tf.YolosConfig(**TINY, image_size=[32, 32], patch_size=16, num_detection_tokens=4, num_labels=3)
        ),
        lambda i: image(i, 3, 32, 32, labels=boxes(i)),
        True,
    ),
    "video": (
        lambda: tf.VideoMAEForVideoClassification(tf.VideoMAEConfig(**VISION, num_frames=4)),
        lambda i: image(i, 4, 3, 32, 32, labels=i % 2),
        True,
    ),
    "groups of layers": (
        lambda: tf.SwinForImageClassification(tf.SwinConfig(**SWIN, window_size=4)),
        lambda i: image(i, 3, 32, 32, labels=i % 2),
        True,
    ),
    "running statistics": (
        lambda: tf.ResNetForImageClassification(tf.ResNetConfig(embedding_size=8, layer_type="basic", **FOUR)),
        lambda i: image(i, 3, 32, 32, labels=i % 2),
        True,
    ),
    "single modules": (
        lambda: Vgg(tf.PreTrainedConfig(num_labels=5, image_size=32)),
        lambda i: image(i, 3, 32, 32, labels=i % 2),
        False,
    ),
    "a module": (TextAndNumbers, lambda i: {"input_ids": IDS + i, "numbers": [1.0 * i], "target": i % 3}, True),
    "no layers": (Slope, lambda i: {"x": 1.0 * i, "labels": 2.0 * i}, False),
}


def collate(samples):
    labels = [sample.get("labels") for sample in samples]
    if isinstance(labels[0], dict):
        return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": labels}
    batch = tf.default_data_collator(samples)
    return {**batch, "return_loss": True} if "pixel_values" in batch and "input_ids" in batch else batch


def run(folder, name, cls=MMSTTrainer, resume=None, **settings):
    build, sample, _ = MODELS[name]
    labels = {"label_names": ["target"]} if build is TextAndNumbers else {}
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "remove_unused_columns": False, **labels, **settings}
    args = arguments(folder, MMSTConfig if cls is MMSTTrainer else TrainingArguments, **settings)
    set_seed(0)
    data = [sample(i) for i in range(8)]
    trained = cls(build(), args, train_dataset=data, eval_dataset=data, data_collator=collate)
    trained.train(resume_from_checkpoint=resume)
    return trained


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_plain_trainer(name, tmp_path):
    """Those of one stage in every setting; a layer at a time weighs micro-batches by what is known of their labels."""
    plain = run(tmp_path / "plain", name, Trainer, gradient_accumulation_steps=2)
    one = run(tmp_path / "one", name, num_stages=1, gradient_accumulation_steps=2)
    assert losses(one) == losses(plain)
    assert_same(weights(one.model), weights(plain.model))
    assert one.evaluate().keys() == plain.evaluate().keys()
    if not MODELS[name][2]:
        return
    means = name in ("no labels", "images and texts", "detection", "a module")  # of which Trainer takes the mean
    settings = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2 if means else 1}
    plain = run(tmp_path / "plain", name, Trainer, **settings)
    coupled = run(tmp_path / "coupled", name, stage_order="coupled", **settings)
    exact = name != "encoder and decoder"  # whose layers share a bias, to which they add in another order
    assert losses(coupled) == (losses(plain) if exact else pytest.approx(losses(plain), rel=1e-6))
    for key, tensor in weights(plain.model).items():
        torch.testing.assert_close(weights(coupled.model)[key], tensor, rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("name", ["video", "a module"])
def test_one_stage_goes_on_from_a_checkpoint_of_plain_trainer(name, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    plain = run(tmp_path, name, Trainer, **settings)
    resumed = run(tmp_path, name, num_stages=1, resume=str(tmp_path / "checkpoint-1"), **settings)
    assert_same(weights(resumed.model), weights(plain.model))


@pytest.mark.parametrize("name", ["a decoder", "images and texts", "a module"])
def test_a_budget_for_what_has_no_stages_is_one_for_a_layer_at_a_time(name, tmp_path):
    assert run(tmp_path, name, memory_budget="1GiB", num_stages=None, max_steps=1).args.stage_order == "coupled"


def test_a_budget_for_what_cannot_be_planned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels is a list, not a tensor.* leave memory_budget unset"):
        run(tmp_path, "detection", memory_budget="1GiB", num_stages=None)


def test_a_budget_without_samples_is_refused(tmp_path):
    args = arguments(tmp_path, memory_budget="1GiB", num_stages=None)
    with pytest.raises(ValueError, match="memory_budget.* planned with the first samples .* leave memory_budget unset"):
        MMSTTrainer(MODELS["questions"][0](), args, train_dataset=[])


def test_layers_that_share_weights_do_not_rest_apart(tmp_path):
    build, sample, _ = MODELS["questions"]
    model = build()
    layers = model.bert.encoder.layer
    layers[1].attention = layers[0].attention
    args = arguments(tmp_path, stage_order="coupled")
    with pytest.raises(
        ValueError, match=r"layer.1 of BertFor.* shares weights with bert.encoder.layer.0.*coupled_laps=0"
    ):
        MMSTTrainer(model, args, train_dataset=[sample(0)])


def test_single_modules_are_not_recomputed_one_by_one(tmp_path):
    with pytest.raises(ValueError, match="Vgg is a sequence of single modules.*cannot be recomputed one by one"):
        MMSTTrainer(MODELS["single modules"][0](), arguments(tmp_path, stage_order="coupled"))


def test_without_layers_there_is_nothing_that_could_rest(tmp_path):
    with pytest.raises(ValueError, match=r"No list of layers.*Leave stage_order unset"):
        MMSTTrainer(Slope(), arguments(tmp_path, stage_order="coupled"))
