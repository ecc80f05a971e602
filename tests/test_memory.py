"""Peaks of blocks within blocks, and of turns."""

import torch

from hf_mmst.memory import PeakMemory, TurnPeaks

MIB = 2**20


def held(mib):
    return torch.ones(mib * MIB // 4)


def test_a_peak_within_another_does_not_hide_it():
    with PeakMemory() as outer:
        tensor = held(200)
        del tensor
        with PeakMemory() as inner:
            tensor = held(50)
            del tensor
    assert 190 * MIB < outer.peak_bytes < 260 * MIB
    assert 40 * MIB < inner.peak_bytes < 100 * MIB


def test_turns_are_told_apart():
    turns = TurnPeaks("cpu")
    assert turns.read() == {}
    for name, mib in (("a", 20), ("b", 220), ("b", 20), ("a", 120)):
        turns.begin(name)
        tensor = held(mib)
        del tensor
        assert turns.read().keys() == {name}
    turns.end()
    found = turns.by_name
    assert 80 * MIB < found["b"] - found["a"] < 120 * MIB
