"""Image classification: its arguments, datasets, and a ready trainer."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ..config import MMSTConfig
from ..field_checks import a_dataset, a_model, check_fields, whole
from ..trainer.mmst_trainer import MMSTTrainer
from .dataset_loading import load_splits, with_class_labels
from .pixels import channels_of, decoded, to_tensors
from .pretrained import pretrained_classifier
from .splits import SplitArguments, accuracy_metric, choose_splits, labels_of

DEFAULTS = {
    "num_train_epochs": 24,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 250,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "eval_strategy": "epoch",
    "logging_steps": 50,
    "save_strategy": "no",
    "remove_unused_columns": False,
}


@dataclass
class ImageArguments(SplitArguments):
    """Arguments of a dataset of images."""

    dataset_name: Annotated[str, a_dataset] | None = field(
        default=None,
        metadata={"help": "Hub name, or a folder with {train,test}.parquet or train/<class>/*.jpg and test/..."},
    )
    image_size: Annotated[int, whole(1, "unset: the images' own")] | None = field(
        default=None, metadata={"help": "Side in pixels; by default the images' own, in fours for a ViT from scratch."}
    )


@dataclass
class ImageModelArguments:
    """A pretrained model, or one from scratch: an architecture of timm, or the size of a ViT."""

    model_name_or_path: Annotated[str, a_model] | None = field(
        default=None, metadata={"help": "Pretrained model; from scratch if unset."}
    )
    architecture: str | None = field(
        default=None, metadata={"help": "Model from scratch by its name in timm, such as vgg11_bn; a ViT if unset."}
    )
    architecture_args: str = field(
        default="{}", metadata={"help": "What timm is to make it with, as JSON, such as '{\"mlp_ratio\": 0.25}'."}
    )
    hidden_size: Annotated[int, whole(1, "96 by default")] = field(
        default=96, metadata={"help": "Width of the ViT from scratch."}
    )
    num_hidden_layers: Annotated[int, whole(1, "8 by default")] = field(
        default=8, metadata={"help": "Layers of the ViT from scratch."}
    )
    num_attention_heads: Annotated[int, whole(1, "3 by default")] = field(
        default=3, metadata={"help": "Attention heads of the ViT from scratch."}
    )
    patch_size: Annotated[int, whole(1, "unset: a quarter of the image's side")] | None = field(
        default=None, metadata={"help": "Patch side in pixels of the ViT from scratch; a quarter of the image's side."}
    )

    def __post_init__(self):
        check_fields(self)
        if not isinstance(json.loads(self.architecture_args), dict):
            raise ValueError(
                f"architecture_args={self.architecture_args!r} is no JSON object. Set it to one, as in "
                "'{\"mlp_ratio\": 0.25}'."
            )
        if self.model_name_or_path is not None and self.architecture is not None:
            raise ValueError(
                f"architecture={self.architecture!r} is for a model from scratch, but model_name_or_path is set, too. "
                "Leave one of them unset."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} cannot be shared out over num_attention_heads="
                f"{self.num_attention_heads}. Set num_attention_heads to one of {_divisors(self.hidden_size)}."
            )


def load_images(name: str) -> datasets.DatasetDict:
    """
    Train and test split with columns `image` and `label`, of a folder or from the Hub, see [`with_class_labels`].

    Raises:
        `ValueError`: if there are no images, or no labels of two classes.
    """
    splits = load_splits(name, "imagefolder")
    features = splits["train"].features
    image = next((n for n, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel) or n == "label"), None)
    if image is None or label is None:
        raise ValueError(
            f"{name} has no {'images' if image is None else 'labels of two classes'}; its columns are "
            f"{', '.join(features)}. Put the images of each class in a folder of its own, as in train/cat/1.png and "
            "train/dog/1.png, or make parquet files with a column of images and a column label."
        )
    return with_class_labels(splits, name, (image, "image"), label)


def image_trainer(
    model_args: ImageModelArguments, data: ImageArguments, args: MMSTConfig, splits: datasets.DatasetDict
) -> MMSTTrainer:
    """
    The trainer: a pretrained model or a ViT from scratch, on crops (and flips) of the images in `splits`.

    Raises:
        `ValueError`: for an image that cannot be read, or a model of other sizes.
    """
    splits = splits.cast_column("image", datasets.Image(decode=False))  # so that files that cannot be read are named
    train, test = choose_splits(splits, data, args.data_seed or 0)
    args.dataloader_pin_memory &= args.device.type != "cpu"
    torch.manual_seed(args.seed)
    model, processor = _build(model_args, splits, data.image_size)
    return MMSTTrainer(
        model,
        args,
        train_dataset=train.with_transform(to_tensors(processor, model.config, augment=True)),
        eval_dataset=test.with_transform(to_tensors(processor, model.config, augment=False)),
        processing_class=processor,
        compute_metrics=accuracy_metric(args.process_index),
    )


def _build(model_args: ImageModelArguments, splits: datasets.DatasetDict, image_size: int | None) -> tuple[Any, Any]:
    """The model, and its image processor if it has one."""
    name, labels = model_args.model_name_or_path, labels_of(splits)
    if name is not None:
        for field_name, value in (("image_size", image_size), ("patch_size", model_args.patch_size)):
            if value is not None:
                raise ValueError(
                    f"{field_name}={value} is for a model from scratch, but {name} has its own size. Leave "
                    f"{field_name} or model_name_or_path unset."
                )
        model = pretrained_classifier(AutoModelForImageClassification, name, splits)
        if Path(name).is_dir() and not Path(name, "preprocessor_config.json").is_file():
            if not isinstance(getattr(model.config, "image_size", None), int):
                raise ValueError(
                    f"{name} has neither a preprocessor_config.json nor an image_size in its config.json, so that the "
                    "size of its images is not known. Save its image processor in this folder."
                )
            return model, None
        return model, AutoImageProcessor.from_pretrained(name, backend="pil")
    cells = splits["train"]["image"]
    channels, side = channels_of(cells), decoded(cells[0]).size[0]
    if model_args.architecture is not None:
        config = TimmWrapperConfig(
            architecture=model_args.architecture,
            model_args={"in_chans": channels, **json.loads(model_args.architecture_args)},
            image_size=image_size or side,
            num_channels=channels,
            **labels,
        )
        return TimmWrapperForImageClassification(config), None
    side = image_size or max(4, 4 * round(side / 4))
    patch = model_args.patch_size or max(1, side // 4)
    if side % patch:
        raise ValueError(
            f"Patches of patch_size={patch} do not fill images of image_size={side}. Set patch_size to one of "
            f"{_divisors(side)}, or image_size to a multiple of {patch}."
        )
    config = ViTConfig(
        hidden_size=model_args.hidden_size,
        num_hidden_layers=model_args.num_hidden_layers,
        num_attention_heads=model_args.num_attention_heads,
        intermediate_size=4 * model_args.hidden_size,
        image_size=side,
        patch_size=patch,
        num_channels=channels,
        **labels,
    )
    return ViTForImageClassification(config), None


def _divisors(number: int) -> str:
    return ", ".join(str(one) for one in range(1, number + 1) if number % one == 0)
