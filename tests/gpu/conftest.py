"""All tests of this folder are marked `gpu`, and skipped where there is none."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(NEEDS_GPU)
