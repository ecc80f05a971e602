"""A step that has been simulated for one plan is not simulated again for another."""

import pytest
import torch

from hf_mmst.planning.simulation import Simulation

KNOWN = {}


@pytest.fixture
def remembered(monkeypatch):
    """Within such a test, plans have the peaks of those before."""
    peak = Simulation.peak

    def once(self, way):
        shapes = [(name, value.shape) for name, value in self.inputs.items() if torch.is_tensor(value)]
        given = (repr(self.config), type(self.given), repr(shapes), self.tokens and self.tokens.numbers.shape)
        key = (*given, self.device, self.has_ring, self.dtype, self._head_layers, way)
        if key not in KNOWN:
            KNOWN[key] = peak(self, way)
        return KNOWN[key]

    monkeypatch.setattr(Simulation, "peak", once)
