"""Load a dataset for classification: train and test split, with a column of inputs and a column of classes."""

import glob
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
TEST_SHARE = 0.2  # of the train split, where a dataset has no other to evaluate on
CLASS_TYPES = {"string", "large_string", "bool"} | {
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}


def load_splits(name: str, folder_builder: str | None = None) -> datasets.DatasetDict:
    """
    The splits of a file, a folder or a dataset on the Hub, in a format that the datasets library knows.

    Args:
        name (`str`): of it.
        folder_builder (`str`, *optional*): what the library is to read folders without parquet files as, whatever most
            of their files are.

    Raises:
        `ValueError`: if it cannot be read, or has no train split.
    """
    path = Path(name).absolute()
    if path.is_file() and path.suffix.lower() not in FORMATS:
        raise ValueError(f"{name} is of no format with inputs and labels. Pass a file in one of {', '.join(FORMATS)}.")
    formats = sorted({file.suffix for file in path.glob("train.*")})
    if len(formats) > 1:
        raise ValueError(f"{name} has a train split in several formats: {', '.join(formats)}. Leave one there.")
    try:
        with _said_once():
            if path.is_file():
                builder, options = FORMATS[path.suffix.lower()]
                splits = datasets.load_dataset(builder, data_files=glob.escape(str(path)), **options)
            elif folder_builder is not None and path.is_dir() and not _has_parquet(path):
                splits = datasets.load_dataset(folder_builder, data_dir=str(path))
            else:
                splits = datasets.load_dataset(str(path) if path.is_dir() else name)
    except (datasets.exceptions.DatasetsError, yaml.YAMLError, OSError, ValueError) as error:
        says_nothing = type(error) is datasets.exceptions.DatasetGenerationError
        reason = str(error.__cause__ if says_nothing else error).rstrip(" .!")
        raise ValueError(
            f"The dataset {name} cannot be read: {textwrap.shorten(reason, 500, placeholder=' ...')}. Set dataset_name "
            "to a name on the Hub, or to a folder or file with data in UTF-8."
        ) from error
    if "train" not in splits:
        raise ValueError(f"{name} has no train split, only {', '.join(splits)}. Name the file or folder of it train.")
    for split in splits.values():
        if split.info.builder_name == "csv" and split.column_names[-1].startswith("__index_level_"):
            raise ValueError(f"{name} has rows with more cells than its header. Put texts with commas in quotes.")
    return splits


def _has_parquet(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.parquet", "data/*.parquet"))


@contextmanager
def _said_once() -> Iterator[None]:
    """Context without the log of the datasets library, which repeats the errors that it raises."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def with_class_labels(
    splits: datasets.DatasetDict, name: str, inputs: tuple[str, str], label: str
) -> datasets.DatasetDict:
    """
    Train and test split with a column of inputs and a column `label` of classes.

    The test split is the one of that name, or the validation split if that has no labels; without both a fifth of each
    class of the train split is it.

    Args:
        splits (`datasets.DatasetDict`): with a train split.
        name (`str`): of the dataset, for errors.
        inputs (`tuple[str, str]`): the column of inputs, and what to call it.
        label (`str`): the column of labels.

    Raises:
        `ValueError`: for rows without input or label, labels that are no classes, and less than two classes.
    """
    splits = splits.select_columns([inputs[0], label]).rename_columns({inputs[0]: inputs[1], label: "label"})
    train = splits["train"]
    others = (splits[split] for split in ("test", "validation") if split in splits)
    test = next((split for split in others if not {*split.unique("label")} <= _unlabelled(split)), None)
    found = [_with_classes(split, train, name) for split in (train, test) if split is not None]
    names = found[0].features["label"].names
    if len(names) < 2:
        raise ValueError(f"{name} has one class only, {names[0]}. A classifier needs samples of two classes or more.")
    return datasets.DatasetDict(train=found[0], test=found[1]) if len(found) == 2 else split_off(found[0], TEST_SHARE)


def _unlabelled(split: datasets.Dataset) -> set[int | None]:
    """What stands for no label."""
    return {None, -1} if isinstance(split.features["label"], datasets.ClassLabel) else {None}


def _with_classes(split: datasets.Dataset, train: datasets.Dataset, name: str) -> datasets.Dataset:
    """The split, its labels encoded as the classes of `train` unless they are so already."""
    for column in split.column_names:
        cells = split.data.column(column)
        if cells.null_count > 0:
            row = cells.is_null().index(True).as_py() + 1
            raise ValueError(
                f"{name}: {cells.null_count} rows of the {split.split} split have no {column}, first of all row {row}. "
                "Fill them in, or leave them out."
            )
    kind = train.features["label"]
    if isinstance(kind, datasets.ClassLabel):
        if -1 in split.unique("label"):
            raise ValueError(
                f"{name}: rows of the {split.split} split have the label -1, which is none. Leave them out."
            )
        return split
    if not isinstance(kind, datasets.Value) or kind.dtype not in CLASS_TYPES:
        raise ValueError(
            f"The labels of {name} are no classes, but of the type {getattr(kind, 'dtype', kind)}. Write them as words "
            "or whole numbers, or name another column."
        )
    ids = {str(value): index for index, value in enumerate(sorted(train.unique("label")))}
    found = [str(value) for value in split["label"]]
    unknown = sorted({*found} - ids.keys())
    if unknown:
        raise ValueError(
            f"{name}: the {split.split} split has labels that the train split lacks: {', '.join(unknown[:5])}. Add "
            "samples of them to the train split, or leave them out."
        )
    classes = datasets.ClassLabel(names=[*ids])
    return split.remove_columns("label").add_column("label", [ids[value] for value in found], feature=classes)


def split_off(train: datasets.Dataset, share: float, seed: int = 0) -> datasets.DatasetDict:
    """
    Split a share of the train split off as the test split, stratified by class.

    Raises:
        `ValueError`: if a class has one sample only.
    """
    classes, counts = np.unique(train["label"][:], return_counts=True)
    if counts.min() < 2:
        name = train.features["label"].int2str(int(classes[counts.argmin()]))
        raise ValueError(
            f"The class {name} has one sample, which cannot be both trained and evaluated on. Add samples of it, leave "
            "it out, or pass a dataset with a test split."
        )
    size = min(max(math.ceil(share * len(train)), len(classes)), len(train) - len(classes))
    return train.train_test_split(size, stratify_by_column="label", seed=seed)
