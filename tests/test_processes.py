"""Two processes over gloo give the weights of one process on the joined batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")


def launch(num_processes, *arguments, read=True):
    program = [sys.executable]
    if num_processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    done = subprocess.run([*program, str(WORKER), *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(f"{arguments[-1]}.{rank}") for rank in range(num_processes) if read]


@pytest.mark.parametrize(
    ("name", "order", "mode"),
    [
        ("vit", "simultaneous", "plain"),
        ("vit", "sequential", "accumulation"),
        ("bert", "simultaneous", "accumulation"),
        ("bert", "sequential", "plain"),
        ("bert", "simultaneous", "checkpointing"),
        ("vit", "simultaneous", "adaptive"),
        ("bert", "simultaneous", "head_layers"),
        ("vit", "sequential", "head_layers"),
    ],
)
def test_two_processes_equal_one(name, order, mode, tmp_path):
    (alone,) = launch(1, name, order, mode, str(tmp_path / "alone"))
    first, second = launch(2, name, order, mode, str(tmp_path / "two"))
    for key, tensor in alone.items():
        assert torch.equal(first[key], second[key]), key
        if "transport" in key or "loss" in key or "accuracy" in key:
            torch.testing.assert_close(first[key], tensor, rtol=2e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
        else:
            torch.testing.assert_close(first[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
