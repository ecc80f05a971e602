"""The ring by which layers come to a device: what waits for what, on streams that only say so."""

import pytest
import torch

from hf_mmst.memory.ring import Ring
from hf_mmst.memory.slabs import Slab

CPU = torch.device("cpu")


class Saying:
    """Streams that write down what they are told; events are numbers of marks, or names of copies."""

    def __init__(self):
        self.said, self.marks, self.names = [], 0, {}

    def copy(self, way, pairs, after):
        (to, tensor), *_ = pairs
        name = self.names[(tensor if way == "in" else to).data_ptr()]
        self.said.append(f"{name} {way} after {after}")
        return Said(name, self.said)

    def mark(self):
        self.marks += 1
        return self.marks

    def wait(self, event):
        self.said.append(f"compute waits for {event.name}")


class Said:
    def __init__(self, name, said):
        self.name, self._said = name, said

    def synchronize(self):
        self._said.append(f"the host waits for {self.name}")


@pytest.fixture
def ring(tmp_path):
    streams = Saying()
    ring = Ring(CPU, 64, streams)
    ring.slabs = {name: Slab([torch.zeros(3)], CPU, str(tmp_path)) for name in "abcde"}
    streams.names = {slab.memory.data_ptr(): name for name, slab in ring.slabs.items()}
    ring.said = streams.said
    return ring


def call(ring, *calls):
    """What is said at `("take", "a")` and so on."""
    ring.said.clear()
    for method, name in calls:
        getattr(ring, method)(ring.slabs[name])
    return [*ring.said]


def test_the_next_one_comes_after_what_was_computed_with_its_buffer(ring):
    """Marks 1 and 2 are of the buffers' beginning, the others of releases."""
    forward = call(ring, ("take", "a"), ("expect", "b"), ("release", "a"), ("take", "b"), ("expect", "c"))
    assert forward == [
        "a in after 1",
        "compute waits for a",
        "b in after 2",
        "compute waits for b",
        "c in after 3",
    ]
    assert call(ring, ("release", "b"), ("take", "c"), ("expect", "d")) == ["compute waits for c", "d in after 4"]


def test_what_is_still_there_is_not_copied_again_before_the_next_pass(ring):
    call(ring, ("take", "a"), ("expect", "b"), ("release", "a"), ("take", "b"), ("release", "b"))
    assert call(ring, ("take", "b"), ("expect", "a")) == ["compute waits for b"]
    call(ring, ("release", "b"))
    ring.begin()
    assert call(ring, ("take", "b"))[0] == "b in after 3"  # the buffer of a, which was released at 3


def test_a_buffer_in_use_is_not_written_to(ring):
    call(ring, ("take", "a"), ("expect", "b"), ("expect", "c"))
    held = [buffer.slab for buffer in ring._buffers]
    assert ring.slabs["a"] in held
    assert ring.slabs["c"] in held


def test_a_pass_that_was_broken_off_does_not_keep_its_buffers(ring):
    call(ring, ("take", "a"), ("take", "b"))
    ring.begin()
    assert call(ring, ("take", "c"), ("take", "d"))[::2] == ["c in after 3", "d in after 4"]


def test_gradients_go_after_they_are_computed_and_stay_until_they_are_gone(ring, tmp_path):
    ring._streams.names |= {slab.tensors[0].data_ptr(): name for name, slab in ring.slabs.items()}
    ring.said.clear()
    gradients = {name: torch.zeros(3) for name in "abc"}
    for name, gradient in gradients.items():
        ring.put(ring.slabs[name], [gradient])
    assert ring.said == ["a out after 3", "b out after 4", "c out after 5", "compute waits for a"]
    assert [tensors[0] is gradients[name] for name, (_, tensors) in zip("bc", ring._leaving, strict=True)] == [True] * 2
    ring.said.clear()
    ring.wait()
    assert ring.said == ["the host waits for b", "the host waits for c"]
    assert not ring._leaving


def test_bytes_are_those_that_came(ring):
    call(ring, ("take", "a"), ("expect", "b"), ("release", "a"), ("take", "b"), ("expect", "a"))
    assert ring.moved == {"moved_in_bytes": 24, "moved_out_bytes": 0}
    ring.count()
    assert ring.moved == {"moved_in_bytes": 0, "moved_out_bytes": 0}
