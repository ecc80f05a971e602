"""Models that train end to end alone, and their samples."""

import torch
import transformers as tf
from encoders import FOUR, T5, TOWER, Vgg
from torch import nn
from zoo import SWIN, TEXT, VISION, WIDTH

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
