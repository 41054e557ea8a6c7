"""What every test process needs."""

import os
from pathlib import Path

import pytest
import torch

# The processes that share the tests would otherwise fight for the cores.
torch.set_num_threads(1)
# So would the examples that they start, whose threads otherwise wait by spinning: three of them on
# two cores take two and a half times as long, or more.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def data_folder() -> Path:
    """The folder of the data sets that IMPLICITOPT_DATA names; without it the test is skipped."""
    folder = Path(os.environ.get("IMPLICITOPT_DATA") or "missing")
    if not folder.is_dir():
        pytest.skip("IMPLICITOPT_DATA must name the folder of the data sets")
    return folder
