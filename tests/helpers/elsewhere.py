"""A device with memory of its own, played by a CPU."""

from hf_mmst.memory.slabs import Slab


class Elsewhere(Slab):
    """What is taken are copies, as beside a GPU, in the place of the tensors at rest themselves."""

    def take(self, device):
        return [tensor.clone() for tensor in self.tensors]


PLACES = {"in place": Slab, "elsewhere": Elsewhere}
