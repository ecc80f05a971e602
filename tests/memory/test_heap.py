"""What is freed in the C allocator's heap goes back to the system."""

import platform
import subprocess
import sys

import pytest

# Freeing 30 MiB has glibc put whatever is smaller into its heap from then on. There the last small tensor holds all.
PROGRAM = """
import re, sys, torch
from hf_mmst.memory.heap import give_back_freed
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
if sys.argv[1] == "True":
    give_back_freed()
del_soon = torch.ones(30 * 2**18)
del del_soon
before = held()
large, small = [], []
for _ in range(50):
    large.append(torch.ones(2**20))
    small.append(torch.ones(2**10))
del large
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is known to keep gaps")
def test_large_tensors_leave_no_gaps():
    def left(gives_back):
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(gives_back)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert left(False) > 100
    assert left(True) < 10
