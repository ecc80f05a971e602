"""The store of features: what is whole is found again, and what is not is computed anew."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from hf_mmst.memory.feature_store import FeatureStore

IDENTITY = {"model": "of a test"}


def store(folder, capacity=8, identity=IDENTITY):
    return FeatureStore(identity, capacity, folder)


def filled(folder):
    found = store(folder)
    for begin in (0, 3):
        found.add(range(begin, begin + 3), None, torch.arange(begin * 8.0, begin * 8 + 24).view(3, 2, 4))
        found.flush()
    return found


def test_what_is_on_disk_is_found_again(tmp_path):
    filled(tmp_path / "a")
    again = store(tmp_path / "a")
    assert len(again) == 6
    assert torch.equal(again.get([4, 0], None), torch.arange(48.0).view(6, 2, 4)[[4, 0]])
    assert again.get([0, 7], None) is None
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["model"] == IDENTITY["model"]
    assert [shard["samples"] for shard in manifest["shards"]] == [3, 3]


def test_a_mask_says_which_tokens_are_kept(tmp_path):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    features = torch.randn(2, 3, 4).bfloat16()
    found = store(tmp_path)
    found.add([1, 2], mask, features)
    found.flush()
    again = found.get([2, 1], torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]]))
    assert torch.equal(again[0, :3], features[1])
    assert torch.equal(again[1, 1:3], features[0, :2])
    assert not again[1, [0, 3]].any()


def truncate(folder):
    with open(folder / "features-00001.safetensors", "rb+") as file:
        file.truncate(100)


def flip(folder):
    """One bit of the last feature."""
    path = folder / "features-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def rewrite(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncate, "features-00001.safetensors is not as it was written"),
        (flip, "features-00001.safetensors is not as it was written"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "it is [1], not an object"),
        (lambda folder: rewrite(folder, shards={}), "shards is {}, not a list"),
        (lambda folder: rewrite(folder, shards=[{"file": 1}]), "shards[0].samples is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "Expecting property name"),
        (lambda folder: (folder / "manifest.json").unlink(), "No such file"),
        (lambda folder: (folder / "features-00000.safetensors").unlink(), "No such file"),
    ],
)
def test_what_is_spoilt_is_computed_anew(spoil, said, tmp_path, capsys):
    filled(tmp_path / "a")
    spoil(tmp_path / "a")
    assert len(store(tmp_path / "a")) == 0
    assert said in capsys.readouterr().out
    assert len(filled(tmp_path / "a")) == 6


def test_features_of_other_weights_are_not_used(tmp_path, capsys):
    filled(tmp_path / "a")
    assert len(store(tmp_path / "a", identity={"model": "another"})) == 0
    assert "other weights" in capsys.readouterr().out


def test_what_a_crash_left_beside_is_not_used(tmp_path):
    filled(tmp_path / "a")
    tensors = {"features": torch.ones(2, 4), "keys": torch.tensor([7]), "lengths": torch.tensor([2])}
    save_file(tensors, tmp_path / "a" / "features-00002.safetensors")
    again = store(tmp_path / "a")
    assert again.get([7], None) is None
    again.add([7], None, torch.zeros(1, 2, 4))
    again.flush()
    assert torch.equal(store(tmp_path / "a").get([7], None), torch.zeros(1, 2, 4))


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, monkeypatch):
    found = filled(tmp_path / "a")
    found.add([6], None, torch.ones(1, 2, 4))

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"features of 1 more samples.*No space left.*Set output_dir"):
            found.flush()
    assert {path.name[0] for path in (tmp_path / "a").iterdir()} == {"f", "m"}
    assert len(store(tmp_path / "a")) == 6
