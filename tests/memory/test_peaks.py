"""Peaks of blocks within blocks, and of turns."""

import gc

import pytest
import runs
import torch

from hf_mmst.memory import peaks
from hf_mmst.memory.peaks import PeakMemory, TurnPeaks
from hf_mmst.memory.tensor_peaks import TensorPeak

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
    for turn, mib in (("a_", 20), ("b_", 220), ("b_", 20), ("a_", 120)):
        turns.begin(turn)
        tensor = held(mib)
        del tensor
        name = f"{turn}process_bytes"
        assert turns.read().keys() == {name} | before
        before = {name}
    turns.end()
    found = turns.by_name
    assert 80 * MIB < found["b_process_bytes"] - found["a_process_bytes"] < 120 * MIB
    assert turns.most("process_bytes") == found["b_process_bytes"] > 220 * MIB
    assert turns.most("peak_bytes") is None  # tensors were not tracked


def test_the_last_word_on_a_turn_is_read_after_it():
    """However rarely it is read: as logs are, every so many steps."""
    turns = TurnPeaks("cpu")
    for turn in ("a_", "b_", "c_"):
        turns.begin(turn)
    assert turns.read().keys() == {"a_process_bytes", "b_process_bytes", "c_process_bytes"}
    assert turns.read().keys() == {"c_process_bytes"}
    turns.end()
    assert turns.read().keys() == {"c_process_bytes"}
    assert turns.read() == {}


def test_reserved_bytes_are_kept_by_turn():
    turns = TurnPeaks("cpu")
    turns.begin("stage_1_")
    turns._turn[1].reserved_bytes = 7  # as on CUDA
    assert turns.read()["stage_1_reserved_bytes"] == 7
    assert turns.by_name.keys() == {"stage_1_process_bytes", "stage_1_reserved_bytes"}


def test_tensors_are_tracked_for_two_steps_of_a_turn():
    turns, there = TurnPeaks("cpu"), held(4)
    turns.tracks_tensors = True
    turns.begin("", lambda: [there])
    for mib in (2, 3, 8):  # the last of them after the tracked ones
        tensor = held(mib)
        del tensor
        turns.begin("")
    turns.end()
    assert turns.by_name["peak_bytes"] == 7 * MIB


def test_what_was_there_before_is_not_counted():
    before = held(4)
    with TensorPeak() as peak:
        before.view(2, -1).mul_(2.0)
        made = torch.tensor([1.0] * (MIB // 4))
        del made
    assert peak.peak_bytes == MIB


def test_a_pause_is_not_counted():
    turns = TurnPeaks("cpu")
    turns.tracks_tensors = True
    turns.begin("", list)
    first = held(2)
    with turns.paused():
        large = held(9)
        del large
    second = held(3)
    del first, second
    turns.end()
    assert turns.by_name["peak_bytes"] == 5 * MIB


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_stages": 1},
        {"stage_order": "sequential", "stage_clipping": True},
    ],
)
def test_planned_tensors_are_those_measured_and_training_is_the_same(settings, tmp_path):
    plain = runs.trainer(tmp_path, dropout=True, **settings)
    run = runs.trainer(tmp_path, dropout=True, eval_strategy="epoch", **settings)
    run.peaks.tracks_tensors = True
    for one in (plain, run):
        torch.manual_seed(0)
        one.train()
    runs.assert_same(runs.weights(run.model), runs.weights(plain.model))
    results = run.results({})
    assert results["peak_bytes"] == pytest.approx(results["planned_bytes"], rel=0.03)
    assert results["process_bytes"] > results["peak_bytes"]
    assert plain.results({})["peak_bytes"] is None


def test_layers_in_files_are_not_tracked(tmp_path):
    run = runs.trainer(tmp_path, max_steps=1, stage_order="end_to_end")
    run.peaks.tracks_tensors = True
    run.train()
    assert run.peaks.by_name.keys() == {"process_bytes"}
