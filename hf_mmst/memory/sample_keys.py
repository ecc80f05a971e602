"""Keys of samples: hashes of their inputs, by which cached features are found. Also augmentation that repeats."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..cut.example_inputs import restored_random_states

KEYS = "feature_keys"
FIX = (
    "Cached features would be those of other samples. Set cache_views to the number of augmented views to keep of each "
    "sample (what draws from a generator of its own, or mixes samples, cannot be repeated), or "
    'feature_cache="none".'
)


class KeyedCollator:
    """
    A data collator that adds to each batch, as `feature_keys`, a 64-bit hash of each sample's inputs.

    Args:
        collate: the user's data collator.
        label_names (`Iterable[str]`): entries of a batch that are not inputs of the model.
        without_padding (`bool`): whether what the `attention_mask` of a batch leaves out is left out, so that a
            sample's key does not depend on its batch.
    """

    def __init__(self, collate: Callable, label_names: Iterable[str], without_padding: bool):
        self.collate, self.label_names = collate, {*label_names, "label", "labels"}
        self.without_padding = without_padding

    def __call__(self, samples: list) -> Any:
        batch = self.collate(samples)
        inputs = sorted((name, value) for name, value in batch.items() if torch.is_tensor(value))
        inputs = [(name, value) for name, value in inputs if name not in self.label_names]
        mask = batch.get("attention_mask") if self.without_padding else None
        batch[KEYS] = torch.tensor([_key(inputs, mask, row) for row in range(len(inputs[0][1]))])
        return batch


class FixedViews(torch.utils.data.Dataset):
    """
    A dataset whose random augmentation repeats itself: in epoch e, sample i is view e mod `views` of it.

    The global generators of Python, NumPy and PyTorch are set from (seed, i, view) around each access.
    """

    def __init__(self, dataset: Any, views: int, seed: int):
        self.dataset, self.views, self.seed, self.epoch = dataset, views, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        words = (self.seed, int(index), self.epoch % self.views)
        seed = int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=4).digest(), "little")
        with restored_random_states(seed):
            return self.dataset[index]


def check_fixed(dataset: Any, collate: KeyedCollator) -> None:
    """
    Raises:
        `ValueError`: if the first samples are not the same each time.
    """
    samples = range(min(4, len(dataset)))
    keys = [collate([dataset[i] for i in samples])[KEYS].tolist() for _ in range(4)]
    if any(found != keys[0] for found in keys):
        raise ValueError(f"The dataset or the collator gives the same samples differently each time. {FIX}")


def _key(inputs: list[tuple[str, torch.Tensor]], mask: torch.Tensor | None, row: int) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in inputs:
        one = value[row]
        if mask is not None and value.shape[:2] == mask.shape:
            one = one[mask[row].bool()]
        digest.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        digest.update(bytes_of(one))
    return int.from_bytes(digest.digest(), "little", signed=True)


def bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
