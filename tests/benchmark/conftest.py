from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def tables(tmp_path):
    """Three small tables as npz files: a cloud with a far cluster of anomalies, by seed."""
    paths = []
    for seed, name in enumerate(("alpha", "beta", "gamma")):
        rng = np.random.default_rng(seed)
        X = np.r_[rng.normal(size=(80, 3)), rng.normal(2.0, 1.5, size=(16, 3))]
        y = np.r_[np.ones(80, int), -np.ones(16, int)]
        path = tmp_path / f"{name}.npz"
        np.savez(path, X=X, y=y)
        paths.append(str(path))
    return paths


@pytest.fixture
def helpers(monkeypatch):
    """Make the module of misbehaving detectors importable here and in worker processes."""
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    return folder


@pytest.fixture
def images_home(tmp_path):
    """Folder with a tiny collection in the layout of MNIST."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 100), ("test", 50)):
        arrays[f"X_{part}"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = (np.arange(n) % 10).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path
