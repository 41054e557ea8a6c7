"""What every test process needs."""

import os
from pathlib import Path

import pytest
import torch

# The processes that share the tests would otherwise fight for the cores.
torch.set_num_threads(1)


@pytest.fixture
def data_folder() -> Path:
    """The folder of the data sets that IMPLICITOPT_DATA names; without it the test is skipped."""
    folder = Path(os.environ.get("IMPLICITOPT_DATA") or "missing")
    if not folder.is_dir():
        pytest.skip("IMPLICITOPT_DATA must name the folder of the data sets")
    return folder
