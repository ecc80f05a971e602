"""Checkpoints that are whole or not there, at whichever call to the file system a process ends."""

import itertools
import os
import shutil

import pytest

from hf_mmst.records.run_folder import RunFolder

FILES = {"model", "optimizer", "state"}


def write(folder, run):
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(run)


def found(path):
    """The run that wrote each checkpoint, which must be whole."""
    runs = {}
    for folder in path.glob("checkpoint-*"):
        contents = {one.name: one.read_text() for one in folder.iterdir()}
        assert contents.keys() == FILES, folder
        (runs[folder.name],) = set(contents.values())
    return runs


class Killed(BaseException):
    pass


def save(folder, best):
    folder.put("checkpoint-3")
    folder.rotate(2, best)
    folder.discard()


@pytest.mark.parametrize("best", [None, "checkpoint-1"])
def test_a_kill_at_any_call_leaves_whole_checkpoints(best, tmp_path, monkeypatch):
    kept = {None: {"checkpoint-2", "checkpoint-3"}, "checkpoint-1": {"checkpoint-1", "checkpoint-3"}}[best]
    for calls in itertools.count():
        path, left = tmp_path / str(calls), iter(range(calls))
        for step in (1, 2, 3):
            write(path / f"checkpoint-{step}", "old")
        folder = RunFolder(str(path))
        write(folder.beside / "checkpoint-3", "new")
        with monkeypatch.context() as patched:
            for name in ("replace", "unlink", "rmdir"):
                real = getattr(os, name)

                def counted(*args, real=real, left=left, **kwargs):
                    if next(left, None) is None:
                        raise Killed
                    return real(*args, **kwargs)

                patched.setattr(os, name, counted)
            try:
                save(folder, best and str(path / best))
                break
            except Killed:
                found(path)
        RunFolder(str(path)).tidy()
        assert found(path).keys() >= {"checkpoint-3", *kept}
        assert {one.name for one in path.iterdir()} == found(path).keys()
    assert calls > 10
    assert found(path) == dict.fromkeys(kept, "old") | {"checkpoint-3": "new"}
    assert {one.name for one in path.iterdir()} == kept


def test_all_is_flushed_before_it_is_in_its_place(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path))
    write(folder.beside / "checkpoint-3", "new")
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("renamed"), replace(*paths)))
    folder.put("checkpoint-3")
    final = tmp_path / "checkpoint-3"
    before = calls[: calls.index("renamed")]
    assert {*before} == {one.stat().st_ino for one in (final, *final.iterdir())}
    assert calls[-1] == tmp_path.stat().st_ino


def test_what_is_left_of_an_earlier_deletion_is_in_nobodys_way(tmp_path):
    folder = RunFolder(str(tmp_path))
    write(tmp_path / "_deleting" / "checkpoint-1", "old")
    write(folder.beside / "checkpoint-3", "new")
    folder.discard()
    assert not list(tmp_path.iterdir())
    shutil.rmtree(tmp_path)
    folder.tidy()  # a run whose folder is not there yet
