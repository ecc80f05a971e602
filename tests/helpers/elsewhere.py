"""A device with memory and streams of its own, played by a CPU."""

from hf_mmst.memory import stage_offload
from hf_mmst.memory.ring import Ring
from hf_mmst.memory.slabs import Slab


class Elsewhere(Slab):
    """What is taken are copies, as beside a GPU, in the place of the tensors at rest themselves."""

    def take(self, device):
        return [tensor.clone() for tensor in self.tensors]


class Copying:
    """Streams whose copies are made when they are waited for (late), or at once, beside what is still computing."""

    def __init__(self, late):
        self.late, self.queued = late, {"in": [], "out": []}

    def copy(self, way, pairs, after):
        event = Copied(self.queued[way], list(pairs))
        self.queued[way].append(event)
        if not self.late:
            event.synchronize()
        return event

    def mark(self):
        return None

    def wait(self, event):
        event.synchronize()


class Copied:
    """The end of a copy: waiting for it makes it, and those of its stream before it."""

    def __init__(self, queue, pairs):
        self._queue, self._pairs = queue, pairs

    def synchronize(self):
        while self in self._queue:
            for to, tensor in self._queue.pop(0)._pairs:
                to.copy_(tensor)


class Littered(Ring):
    """A ring in whose buffers no number is right before one has come, nor after the last use."""

    def __init__(self, *args):
        super().__init__(*args)
        for memory in self.buffers:
            memory.fill_(255)

    def begin(self):
        super().begin()
        for memory in self.buffers:
            memory.fill_(255)


PLACES = ("in place", "late", "early")


def play(place, monkeypatch):
    """Have layers rest in place, or beside a device whose copies are late or early."""
    if place != "in place":
        monkeypatch.setattr(stage_offload, "Ring", Littered)
        monkeypatch.setattr(stage_offload.StageOffload, "slab", Elsewhere)
        monkeypatch.setattr(stage_offload.StageOffload, "streams_of", staticmethod(lambda _: Copying(place == "late")))
