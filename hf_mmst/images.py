"""Names of a dataset and of a model -> a trainer that classifies images."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from .config import MMSTConfig
from .splits import SplitArguments, accuracy_metric, choose_splits, labels_of
from .trainer import MMSTTrainer

DEFAULTS = {
    "num_train_epochs": 40,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 250,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "logging_steps": 50,
    "save_strategy": "no",
    "remove_unused_columns": False,
}


@dataclass
class ImageArguments(SplitArguments):
    """Which images, and what is done to them."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub name, or a folder with {train,test}.parquet or train/<class>/*.jpg and test/..."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels; the images' own by default."})


@dataclass
class ImageModelArguments:
    """A pretrained model, or one from scratch: an architecture of timm, or the size of a ViT."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pretrained model; from scratch if unset."})
    architecture: str | None = field(
        default=None, metadata={"help": "Model from scratch by its name in timm, such as vgg11_bn; a ViT if unset."}
    )
    architecture_args: str = field(
        default="{}", metadata={"help": "What timm is to make it with, as JSON, such as '{\"mlp_ratio\": 0.25}'."}
    )
    hidden_size: int = field(default=96, metadata={"help": "Width of the ViT from scratch."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Layers of the ViT from scratch."})
    num_attention_heads: int = field(default=3, metadata={"help": "Attention heads of the ViT from scratch."})
    patch_size: int | None = field(
        default=None, metadata={"help": "Patch side in pixels of the ViT from scratch; a quarter of the image's side."}
    )


def load_images(name: str) -> datasets.DatasetDict:
    """Train and test split with columns `image` and `label`, of a folder or from the Hub."""
    files = {split: str(path) for split in ("train", "test") if (path := Path(name, f"{split}.parquet")).is_file()}
    if files:
        splits = datasets.load_dataset("parquet", data_files=files)
    elif Path(name).is_dir():
        splits = datasets.load_dataset("imagefolder", data_dir=name)
    else:
        splits = datasets.load_dataset(name)
    if "test" not in splits:
        splits = datasets.DatasetDict(train=splits["train"], test=splits["validation"])
    features = splits["train"].features
    image = next(n for n, kind in features.items() if isinstance(kind, datasets.Image))
    label = next(n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel) or n == "label")
    splits = splits.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
        splits = splits.class_encode_column("label")
    return splits


def image_trainer(
    model_args: ImageModelArguments, data: ImageArguments, args: MMSTConfig, splits: datasets.DatasetDict
) -> MMSTTrainer:
    """The trainer: a pretrained model or a ViT from scratch, on crops (and flips) of the images in `splits`."""
    train, test = choose_splits(splits, data, args.data_seed or 0)
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
        model = AutoModelForImageClassification.from_pretrained(
            name, ignore_mismatched_sizes=True, dtype=torch.float32, **labels
        )
        if Path(name).is_dir() and not Path(name, "preprocessor_config.json").is_file():
            return model, None
        return model, AutoImageProcessor.from_pretrained(name, backend="pil")
    image = splits["train"][0]["image"]
    image_size, channels = image_size or image.size[0], 1 if image.mode == "L" else 3
    if model_args.architecture is not None:
        config = TimmWrapperConfig(
            architecture=model_args.architecture,
            model_args={"in_chans": channels, **json.loads(model_args.architecture_args)},
            image_size=image_size,
            num_channels=channels,
            **labels,
        )
        return TimmWrapperForImageClassification(config), None
    config = ViTConfig(
        hidden_size=model_args.hidden_size,
        num_hidden_layers=model_args.num_hidden_layers,
        num_attention_heads=model_args.num_attention_heads,
        intermediate_size=4 * model_args.hidden_size,
        image_size=image_size,
        patch_size=model_args.patch_size or image_size // 4,
        num_channels=channels,
        **labels,
    )
    return ViTForImageClassification(config), None


def to_tensors(processor: Any, config: Any, augment: bool) -> Callable[[dict], dict]:
    """A transform of a batch of samples: pixel values in the model's scale; crops and flips for training."""
    flips = getattr(config, "num_channels", 3) == 3

    def transform(batch):
        mode = "RGB" if processor is not None or flips else "L"
        images = [image.convert(mode) for image in batch["image"]]
        if processor is not None:
            pixels = torch.as_tensor(np.asarray(processor(images, return_tensors="np")["pixel_values"]))
        else:
            size = (config.image_size, config.image_size)
            arrays = np.stack([np.asarray(image.resize(size)) for image in images]).astype(np.float32)
            pixels = torch.from_numpy(arrays.reshape(len(images), *size, -1)).permute(0, 3, 1, 2) / 127.5 - 1
        if augment:
            pixels = torch.stack([randomly_cropped(image, flips) for image in pixels])
        return {"pixel_values": list(pixels), "labels": batch["label"]}

    return transform


def randomly_cropped(image: torch.Tensor, flips: bool) -> torch.Tensor:
    """`[C, H, W]` moved by up to an eighth of its side, the border repeated; flipped half of the time."""
    side = image.shape[-1]
    pad = side // 8 if flips else side // 14
    top, left = torch.randint(2 * pad + 1, (2,)).tolist()
    padded = torch.nn.functional.pad(image[None], (pad, pad, pad, pad), mode="replicate")[0]
    cropped = padded[:, top : top + side, left : left + side]
    return cropped.flip(-1) if flips and torch.rand(()) < 0.5 else cropped
