"""Peaks of blocks within blocks, and of turns."""

import gc

import pytest
import torch

from hf_mmst.memory import peaks
from hf_mmst.memory.peaks import PeakMemory, TurnPeaks

MIB = 2**20


def can_reset():
    try:
        peaks._CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return peaks._highest_bytes() > 0


needs_reset = pytest.mark.skipif(
    not can_reset(), reason="the system does not let a process reset its recorded peak; the others measure without it"
)


def held(mib):
    return torch.ones(mib * MIB // 4)


@needs_reset
def test_a_peak_within_another_does_not_hide_it():
    gc.collect()
    with PeakMemory() as outer:
        tensor = held(200)
        del tensor
        with PeakMemory() as inner:
            tensor = held(50)
            del tensor
    assert 190 * MIB < outer.peak_bytes < 260 * MIB
    assert 40 * MIB < inner.peak_bytes < 100 * MIB


@pytest.mark.parametrize("status", ["VmRSS only", "missing"])
def test_a_system_that_cannot_reset_the_peak(status, monkeypatch, tmp_path):
    """What lasts to a read is seen."""
    monkeypatch.setattr(peaks, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    monkeypatch.setattr(peaks, "_highest_bytes", lambda: 0)
    if status == "missing":
        monkeypatch.setattr(peaks, "_STATUS", tmp_path / "missing" / "status")
    gc.collect()
    with PeakMemory() as peak:
        tensor = held(200)
        peak.read()
        del tensor
    assert 190 * MIB < peak.peak_bytes < 260 * MIB


@needs_reset
def test_turns_are_told_apart():
    gc.collect()
    turns = TurnPeaks("cpu")
    assert turns.read() == {}
    before = set()
    for name, mib in (("a", 20), ("b", 220), ("b", 20), ("a", 120)):
        turns.begin(name)
        tensor = held(mib)
        del tensor
        assert turns.read().keys() == {name} | before
        before = {name}
    turns.end()
    found = turns.by_name
    assert 80 * MIB < found["b"] - found["a"] < 120 * MIB


def test_the_last_word_on_a_turn_is_read_after_it():
    """However rarely it is read: as logs are, every so many steps."""
    turns = TurnPeaks("cpu")
    for name in ("a", "b", "c"):
        turns.begin(name)
    assert turns.read().keys() == {"a", "b", "c"}
    assert turns.read().keys() == {"c"}
    turns.end()
    assert turns.read().keys() == {"c"}
    assert turns.read() == {}


def test_reserved_bytes_are_kept_by_turn():
    turns = TurnPeaks("cpu")
    turns.begin("stage_1_peak_bytes")
    turns._turn[1].reserved_bytes = 7  # as on CUDA
    assert turns.read()["stage_1_reserved_bytes"] == 7
    assert turns.by_name.keys() == {"stage_1_peak_bytes"}
    assert turns.reserved_by_name == {"stage_1_reserved_bytes": 7}
