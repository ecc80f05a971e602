"""Keeps the tests off the network, quiet and quick."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
if os.path.exists("/sys/class/net/lo"):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # processes find each other whatever the host's name resolves to

import torch

torch.set_num_threads(1)


def pytest_collection_finish():
    """Each training collects garbage, and need not look through all that has been imported, which takes longest."""
    gc.collect()
    gc.freeze()
