"""What the tests of several folders share: rows, and detectors small enough to be fitted in a fraction of a second."""

import os

# `pytest -n` runs a process for each core, so the libraries under torch, and whatever processes a test starts, must
# leave the other cores alone. They read this when they are imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

from anomalib_gen import FlowDetector

# These networks are so small that handing work to a second thread costs more than doing it; and on a busy machine
# threads that wait for each other are many times slower. Set here, for the tests alone: the library sets no threads.
torch.set_num_threads(1)


def make_tiny(**parameters):
    """Return an unfitted detector that trains in a fraction of a second."""
    settings = {
        "transform": "realnvp",
        "n_layers": 2,
        "hidden_features": 8,
        "max_iter": 20,
        "contamination": 0.1,
        "random_state": 0,
        "device": "cpu",
    }
    return FlowDetector(**{**settings, **parameters})


@pytest.fixture(scope="session")
def tiny():
    """Factory of small unfitted detectors; its arguments override their parameters."""
    return make_tiny


@pytest.fixture(scope="session")
def X():
    """200 rows of three dependent columns of unlike scales; read-only, because every test shares them."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 3)) @ [[1.0, 0.9, 0.0], [0.0, 0.4, 5.0], [0.0, 0.0, 3.0]] + [0.0, 10.0, -3.0]
    rows.setflags(write=False)
    return rows


@pytest.fixture(scope="session")
def fitted(X):
    """A fitted detector that no test may change."""
    return make_tiny().fit(X)
