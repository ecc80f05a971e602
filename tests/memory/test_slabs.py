"""Host memory in which tensors rest: what was put is there, and used there."""

import os
import re
from pathlib import Path

import pytest
import torch

from hf_mmst.memory import slabs
from hf_mmst.memory.slabs import Slab

CPU = torch.device("cpu")


def test_a_slab_gives_back_what_was_put(tmp_path):
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(2).bfloat16(), torch.zeros(0), torch.tensor(1.0)]
    slab = Slab(tensors, CPU, str(tmp_path))
    slab.put(tensors)
    changed = [tensor + 1 for tensor in tensors]
    assert all(torch.equal(*pair) for pair in zip(slab.tensors, tensors, strict=True))
    slab.put(changed)
    slab.let_go()
    assert all(torch.equal(*pair) for pair in zip(slab.tensors, changed, strict=True))


def test_a_tensor_lies_at_rest_as_it_did(tmp_path):
    """Else other kernels would compute with it, and numbers change."""
    tensors = [torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(3, 5).t()]
    slab = Slab(tensors, CPU, str(tmp_path))
    slab.put(tensors)
    assert [tensor.stride() for tensor in slab.tensors] == [tensor.stride() for tensor in tensors]
    assert all(torch.equal(*pair) for pair in zip(slab.tensors, tensors, strict=True))


def test_what_is_used_where_it_rests_is_not_copied(tmp_path):
    slab = Slab([torch.zeros(3)], CPU, str(tmp_path))
    (taken,) = slab.take(CPU)
    taken += 1
    slab.put([taken])
    assert slab.tensors[0].tolist() == [1, 1, 1]
    assert taken.data_ptr() == slab.tensors[0].data_ptr()


def test_each_tensor_has_a_storage_of_its_own(tmp_path):
    """As files of weights and states, which are made of storages, would else hold the whole slab."""
    slab = Slab([torch.zeros(1000), torch.zeros(3, dtype=torch.uint8)], CPU, str(tmp_path / "rest"))
    torch.save(slab.tensors[1], tmp_path / "saved.pt")
    assert os.path.getsize(tmp_path / "saved.pt") < 2000


@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps"),
    reason="this system does not say what of a mapped file is in memory; that its content stays is tested without it",
)
def test_what_is_let_go_is_not_in_memory(tmp_path):
    slab = Slab([torch.zeros(2**20)], CPU, str(tmp_path))

    def resident():
        text = Path("/proc/self/smaps").read_text()
        return sum(int(kib) for kib in re.findall(rf"{re.escape(str(tmp_path))}.*?\nRss: +(\d+) kB", text, re.DOTALL))

    slab.put([torch.ones(2**20)])
    assert resident() == 0
    assert slab.tensors[0].sum() == 2**20
    assert resident() == 4096
    slab.let_go()
    assert resident() == 0


def test_memory_that_cannot_be_pinned_is_taken_as_it_is(monkeypatch):
    """And said once, however many layers there are."""
    empty, said = torch.empty, []

    def refuse(*size, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(slabs.logger, "warning_once", said.append)
    slab = Slab([torch.zeros(3)], torch.device("cuda"), "")
    slab.put([torch.ones(3)])
    slab.let_go()
    assert slab.tensors[0].tolist() == [1, 1, 1]
    (message,) = said
    assert "Raise its limit (ulimit -l" in message
