"""Several processes over gloo give the weights of one process on the joined batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worker import CASES, train

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module", params=[2, 3])
def launched(request, tmp_path_factory):
    """All cases, trained in turn by so many processes, in one launch."""
    folder = tmp_path_factory.mktemp(f"{request.param}_processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    done = subprocess.run([*launcher, str(WORKER), str(folder), *CASES], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, request.param


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives, case by case."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    return lambda case: found[case] if case in found else found.setdefault(case, train(case, folder))


@pytest.mark.parametrize("case", CASES)
def test_processes_equal_one(case, launched, alone):
    folder, number = launched
    first, *others = (load_file(folder / f"{case}.{rank}") for rank in range(number))
    for key, tensor in alone(case).items():
        assert all(torch.equal(first[key], other[key]) for other in others), key
        if "transport" in key or "loss" in key or "accuracy" in key:
            torch.testing.assert_close(first[key], tensor, rtol=2e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
        else:
            torch.testing.assert_close(first[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
