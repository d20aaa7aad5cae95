"""Every family, and stored images, on digits of MNIST as `load_images` gives them."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.datasets import load_images

SMALL = {"max_iter": 5, "hidden_features": 8, "random_state": 0, "device": "cpu"}
DETECTORS = {
    "stored images": DiffusionDetector(random_state=0, device="cpu"),
    "diffusion network": DiffusionDetector(denoiser="network", n_blocks=1, **SMALL),
    "energy": EnergyDetector(**SMALL),
    "flow": FlowDetector(n_layers=1, **SMALL),
    "autoencoder": VAEDetector(**SMALL),
}


@pytest.fixture(scope="module")
def digits():
    """200 images to train on and 50 to test, of all digits but 0, 30 zeros, and as many images of noise; all uint8."""
    try:
        X, y = load_images("mnist", normal=range(1, 10), return_X_y=True)
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])
    rng = np.random.default_rng(0)
    normal = rng.permutation(np.flatnonzero(y == 1))
    noise = rng.integers(0, 256, (30, 1, 28, 28), dtype=np.uint8)
    return X[normal[:200]], X[normal[200:250]], X[np.flatnonzero(y == -1)[:30]], noise


@pytest.mark.parametrize("name", DETECTORS)
def test_real_digits_are_scored_and_noise_is_told_from_them(digits, name):
    train, normal, zeros, noise = digits
    assert train.dtype == np.uint8
    detector = DETECTORS[name].fit(train)
    assert detector.event_shape_ == (1, 28, 28)
    of_normal, of_zeros, of_noise = map(detector.score_samples, (normal, zeros, noise))
    assert np.isfinite(np.concatenate([of_normal, of_zeros, of_noise])).all()
    assert of_noise.max() < of_normal.min()
    if name == "stored images":
        odd = np.repeat([False, True], [len(normal), len(zeros)])
        assert roc_auc_score(odd, -np.concatenate([of_normal, of_zeros])) > 0.9
