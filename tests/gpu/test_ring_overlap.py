"""Layers that stream through a GPU, with one of its streams held up: whatever is late, the numbers are the same."""

import pytest
import torch
from runs import losses, run_end_to_end, weights

from hf_mmst.memory.ring import Streams
from hf_mmst.memory.stage_offload import StageOffload

CYCLES = 5_000_000  # some milliseconds


class HeldUp(Streams):
    """Streams of which one waits before all that it does."""

    def __init__(self, device, late):
        super().__init__(device)
        self._late = late

    def copy(self, way, pairs, after):
        if way == self._late:
            with self._ways[way]:
                torch.cuda._sleep(CYCLES)
        return super().copy(way, pairs, after)

    def wait(self, event):
        super().wait(event)
        if self._late == "computation":
            torch.cuda._sleep(CYCLES)


def run(folder, name, **settings):
    trained = run_end_to_end(folder, name, use_cpu=False, max_steps=6, gradient_accumulation_steps=2, **settings)
    trained.train()
    return trained


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("late", ["in", "out", "computation", None])
def test_the_numbers_are_those_of_copies_one_after_the_other(name, late, tmp_path, monkeypatch):
    """`None`: with streams that are not held up."""
    monkeypatch.setattr(StageOffload, "streams_of", staticmethod(lambda device: None))
    plain = run(tmp_path / "plain", name, adam_epsilon=1e-3)
    monkeypatch.setattr(StageOffload, "streams_of", staticmethod(lambda device: HeldUp(device, late)))
    ring = run(tmp_path / "ring", name, adam_epsilon=1e-3)
    assert losses(ring) == pytest.approx(losses(plain), abs=1e-4)
    found = weights(ring.model)
    for key, tensor in weights(plain.model).items():
        torch.testing.assert_close(found[key].cpu(), tensor.cpu(), rtol=0, atol=1e-5)
