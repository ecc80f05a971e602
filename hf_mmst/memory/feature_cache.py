"""`FeatureCache`: the inputs of the stage that learns, computed once for each sample and kept."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cut.partition import Partition
from ..method.heads import HEADS
from .feature_store import FeatureStore
from .sample_keys import bytes_of


class FeatureCache:
    """
    A cache of the inputs of the stage that learns.

    It has a [`FeatureStore`] for that stage and one for the stage before, from whose features the former is filled.

    Args:
        where (`str`): `"disk"` or `"memory"`.
        folder (`Path`): a folder for the files.
        capacity (`int`): number of different samples that there can be.
        identify: from the number of a stage (from 0) to what its input depends on.
    """

    def __init__(self, where: str, folder: Path, capacity: int, identify: Callable[[int], dict[str, Any]]):
        self._folder = folder if where == "disk" else None
        self._capacity, self._identify = capacity, identify
        self._stores: dict[int, FeatureStore] = {}

    def begin(self, stage: int) -> None:
        """Begin the turn of `stage`: open its store and the one before, and delete all others."""
        for one in [one for one in self._stores if one not in (stage - 1, stage)]:
            self._stores.pop(one).delete()
        for one in (stage - 1, stage):
            if one > 0 and one not in self._stores:
                folder = None if self._folder is None else self._folder / f"stage_{one + 1}"
                self._stores[one] = FeatureStore(self._identify(one), self._capacity, folder)

    def get(self, stage: int, keys: Sequence[int], mask: torch.Tensor | None) -> tuple[int, torch.Tensor] | None:
        """The number of a stage and its input: of `stage`, or else of the one before; `None` if neither is cached."""
        for one in (stage, stage - 1):
            found = self._stores[one].get(keys, mask) if one in self._stores else None
            if found is not None:
                return one, found
        return None

    def add(self, stage: int, keys: Sequence[int], mask: torch.Tensor | None, features: torch.Tensor) -> None:
        """Add the input of `stage`; see [`FeatureStore.add`]."""
        self._stores[stage].add(keys, mask, features)

    def flush(self) -> None:
        """Write to the disk what is still in memory."""
        for store in self._stores.values():
            store.flush()

    def delete(self) -> None:
        """Forget everything, on disk as well."""
        for store in self._stores.values():
            store.delete()
        self._stores.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def upstream_hash(model: nn.Module, partition: Partition, stage: int) -> str:
    """SHA-256 of the weights and buffers that the input of `stage` depends on, names included."""
    later = tuple(f"{name}." for names in partition.stages[stage:] for name in names)
    digest = hashlib.sha256()
    names = [name for name, _ in model.named_parameters()]
    tail: set[str] = set()
    if stage == partition.num_stages - 1:  # while it learns, what comes after the layers learns, too
        tail = {*names[max(i for i, name in enumerate(names) if name.startswith(later)) + 1 :]}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith((f"{HEADS}.", *later)) and name not in tail:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor.detach().cpu()))
    return digest.hexdigest()
