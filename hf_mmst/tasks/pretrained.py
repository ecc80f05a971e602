"""Load a pretrained model as a classifier of a dataset's labels."""

from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from torch import nn

from .splits import labels_of


def pretrained_classifier(auto: Any, name: str, splits: datasets.DatasetDict) -> nn.Module:
    """
    The model of that name, in float32, with a classifier of the dataset's labels.

    Args:
        auto: a class of transformers, such as `AutoModelForImageClassification`.
        name (`str`): a folder, or a name on the Hub.
        splits (`datasets.DatasetDict`): with labels of classes.

    Raises:
        `ValueError`: if the file of its weights is damaged.
    """
    try:
        return auto.from_pretrained(name, ignore_mismatched_sizes=True, dtype=torch.float32, **labels_of(splits))
    except SafetensorError as error:
        raise ValueError(f"The weights of {name} cannot be read: {error}. Save or download them again.") from error
