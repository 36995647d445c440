"""What all tests share: one thread, a fixed seed, no network, and where tensors lie.

ZOO_TEST_DEVICE=cuda puts the tensors of tests, and the models that they make, on a GPU (see `on_device`).
"""

from __future__ import annotations

import os

# Before torch and huggingface_hub are imported: a test that needs the network is a test that fails elsewhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from on_device import OnDevice

DEVICE = os.environ.get("ZOO_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def _same_every_time():
    """Each test starts from the same seed, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_room():
    """`torch.empty` and its kin give NaN (whole numbers: the largest) instead of whatever stands in memory.

    A place that an op forgets to write, or a parameter that nothing initialises, then shows.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config):
    torch.set_num_threads(1)
    if DEVICE != "cpu":
        OnDevice(DEVICE).begin()
