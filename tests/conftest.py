"""Every test starts in float64, seeded, with an empty parameter store and strict warnings."""

import os

import pyro
import pytest
import torch

DEVICE = os.environ.get("PYRONAT_DEVICE", "cpu")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_slate():
    threads = torch.get_num_threads()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(DEVICE)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")
    torch.set_num_threads(threads)


@pytest.fixture
def single_precision(clean_slate):
    """Torch's own default type, in which examples train."""
    torch.set_default_dtype(torch.float32)
