"""`FeatureStore`: features of samples by key, in memory-mapped files of a folder, or in memory."""

import hashlib
import json
import math
import mmap
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..records.atomic_writes import write_atomically
from ..records.reading import read_json
from .sample_keys import FIX

FORMAT_VERSION = 2  # 2: shards have a digest
SHARD_BYTES = 64 * 2**20


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}


class _Shard(TypedDict):
    file: str
    samples: int
    sha256: str


class _Manifest(TypedDict):
    shards: list[_Shard]


class FeatureStore:
    """
    Features of samples, `[N, ...]` each, by key: in files of a folder, or, without one, in memory.

    Files are read by mapping; each is written beside and renamed, then `manifest.json`, which says what is there, with
    checksums. What is not in the manifest, after a crash, or was changed, is computed again.

    Args:
        identity (`dict[str, Any]`): what the features depend on; those of another identity are deleted.
        capacity (`int`): number of different samples that there can be.
        folder (`Path`, *optional*): where the files lie.
    """

    def __init__(self, identity: dict[str, Any], capacity: int, folder: Path | None = None):
        self.identity, self.capacity, self.folder = identity, capacity, folder
        self._found: dict[int, torch.Tensor] = {}
        self._maps: list[mmap.mmap] = []
        self._shards: list[dict[str, Any]] = []
        self._pending: list[int] = []
        self._pending_bytes = 0
        if folder is not None and not self._open(folder):
            shutil.rmtree(folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._found)

    def get(self, keys: Sequence[int], mask: torch.Tensor | None) -> torch.Tensor | None:
        """
        The features of a batch, on the CPU, or `None` unless they are all there.

        Args:
            keys: of the B samples.
            mask: `[B, N]`, 1 for tokens that count; the features of others are zero. Without it, samples of one shape.
        """
        if not all(key in self._found for key in keys):
            return None
        rows = [self._found[key] for key in keys]
        if mask is None:
            features = torch.stack(rows)
        else:
            features = rows[0].new_zeros(*mask.shape, *rows[0].shape[1:])
            features[mask.bool().cpu()] = torch.cat(rows)
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)  # the pages leave this process's memory
        return features

    def add(self, keys: Sequence[int], mask: torch.Tensor | None, features: torch.Tensor) -> None:
        """
        Add the features of a batch, `[B, N, ...]`; arguments as in [`get`].

        Raises:
            `ValueError`: if there are more different samples than there can be, or no room for them.
            `OSError`: if the disk is full.
        """
        features = features.detach().cpu()
        rows = [row if mask is None else row[kept] for row, kept in zip(features, _rows(mask), strict=False)]
        if not self._found:
            self._say_need(sum(row.nbytes for row in rows) / len(rows))
        for key, row in zip(keys, rows, strict=True):
            if key in self._found:
                continue
            if len(self._found) >= self.capacity:
                raise ValueError(
                    f"More than {self.capacity:,} different samples came out of the dataset and the collator, so they "
                    "are random, or padded to other lengths than before, which makes a difference to this model (pad "
                    f"all to one length). {FIX}"
                )
            self._found[key] = row.clone()
            self._pending.append(key)
            self._pending_bytes += row.nbytes
        if self.folder is not None and self._pending_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory to the folder."""
        if self.folder is None or not self._pending:
            return
        name = f"features-{len(self._shards):05d}.safetensors"
        rows = [self._found[key] for key in self._pending]
        tensors = {
            "features": torch.cat(rows),
            "keys": torch.tensor(self._pending),
            "lengths": torch.tensor([len(row) for row in rows]),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, lambda path: save_file(tensors, path))
            shards = [*self._shards, {"file": name, "samples": len(rows), "sha256": _digest(self.folder / name)}]
            manifest = {"format_version": FORMAT_VERSION, **self.identity, "shards": shards}
            text = json.dumps(manifest, indent=2) + "\n"
            write_atomically(self.folder / "manifest.json", lambda path: path.write_text(text))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{self.folder} cannot take the features of {len(rows):,} more samples ({error}). Set output_dir to a "
                'folder on a disk with room, or feature_cache="none"; the run resumes from its last checkpoint.'
            ) from error
        self._shards = shards
        self._map(self.folder / name)
        self._pending, self._pending_bytes = [], 0

    def delete(self) -> None:
        """Forget everything, on disk as well."""
        self._found.clear()
        self._maps.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, folder: Path) -> bool:
        """Whether the folder holds features of this identity, all of them whole; if so, they are mapped."""
        try:
            manifest = read_json(folder / "manifest.json", _Manifest)
            self._shards = manifest.pop("shards")
            if manifest != {"format_version": FORMAT_VERSION, **json.loads(json.dumps(self.identity))}:
                raise ValueError("they are of other weights, another cut or precision")
            for shard in self._shards:
                path = folder / shard["file"]
                if _digest(path) != shard["sha256"]:
                    raise ValueError(f"{path.name} is not as it was written")
                self._map(path)
        except (OSError, ValueError) as error:
            if folder.exists():
                print(f"hf_mmst: features in {folder} are computed anew: {error}")
            self._shards, self._maps = [], []
            self._found.clear()
            return False
        print(f"hf_mmst: features of {len(self):,} samples are in {folder} already")
        return True

    def _map(self, path: Path) -> None:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = _tensors(mapped)
        keys, lengths = tensors["keys"].tolist(), tensors["lengths"].tolist()
        self._found |= zip(keys, tensors["features"].split(lengths), strict=True)
        self._maps.append(mapped)

    def _say_need(self, sample_bytes: float) -> None:
        need = math.ceil(sample_bytes * self.capacity)
        where = "memory" if self.folder is None else str(self.folder)
        if self.folder is None:
            free = psutil.virtual_memory().available
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        said = f"{need / 2**20:,.0f} MiB for the features of {self.capacity:,} samples"
        if need > free:
            raise ValueError(
                f"{said} are more than the {free / 2**20:,.0f} MiB that are free in {where}. Set output_dir to a "
                'folder on a larger disk, cache_views to fewer views, or feature_cache="none".'
            )
        print(f"hf_mmst: {where} will take {said}")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(mask: torch.Tensor | None) -> Iterable:
    return mask.bool().cpu() if mask is not None else iter(int, None)


def _tensors(mapped: mmap.mmap) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, without a copy."""
    begin = 8 + int.from_bytes(mapped[:8], "little")
    tensors = {}
    for name, entry in json.loads(mapped[8:begin]).items():
        dtype, count = _DTYPES[entry["dtype"]], math.prod(entry["shape"])
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin + entry["data_offsets"][0])
        tensors[name] = flat.view(entry["shape"])
    return tensors
