"""The same detector on a CUDA device; run with ``pytest -m gpu``."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from anomalib_gen import (
    DiffusionDetector,
    EnergyDetector,
    FlowDetector,
    VAEDetector,
    _runtime,
    _scaling,
    _training,
)
from anomalib_gen.anomaly import Typicality

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

TRANSFORMS = ["nsf-autoregressive", "nsf-coupling", "maf", "realnvp"]


def on_cuda(tiny, **parameters):
    return tiny(device="cuda", **parameters)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_fit_score_and_sample(tiny, X, transform):
    detector = on_cuda(tiny, transform=transform, max_iter=60).fit(X)
    assert next(detector.model_.parameters()).is_cuda
    scores = detector.score_samples(X)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert (detector.predict(X) == -1).mean() == pytest.approx(0.1, abs=0.01)
    drawn = detector.sample(50, random_state=0)
    assert drawn.shape == (50, 3)
    np.testing.assert_array_equal(drawn, detector.sample(50, random_state=0))
    assert detector.validation_curve_[-1] < detector.validation_curve_[0]


def test_auto_takes_the_gpu(tiny, X):
    detector = tiny(device="auto").fit(X)
    assert next(detector.model_.parameters()).is_cuda


@pytest.mark.parametrize("anomaly", ["likelihood", "typicality"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_scores_agree_with_the_cpu(tiny, X, transform, anomaly):
    detector = on_cuda(tiny, transform=transform, anomaly=anomaly, max_iter=60).fit(X)
    far = np.concatenate([X, 1e3 * X, 1e300 * np.sign(X)])
    on_gpu = detector.score_samples(far)
    detector.set_params(device="cpu")
    on_cpu = detector.score_samples(far)
    assert not next(detector.model_.parameters()).is_cuda
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-6, atol=1e-9)
    detector.set_params(device="cuda")
    np.testing.assert_array_equal(detector.score_samples(far), on_gpu)


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        *((VAEDetector, {"anomaly": name}) for name in VAEDetector._anomalies),
        *((EnergyDetector, {"anomaly": name}) for name in EnergyDetector._anomalies),
        *((EnergyDetector, {"objective": name}) for name in EnergyDetector._objectives),
        *((DiffusionDetector, {"anomaly": name}) for name in DiffusionDetector._anomalies),
        *((DiffusionDetector, {"objective": name}) for name in DiffusionDetector._objectives),
    ],
)
def test_every_family_objective_and_anomaly(X, family, parts):
    small = {"hidden_features": 8, "max_iter": 30, "random_state": 0, "contamination": 0.1}
    detector = family(**small, **parts, device="cuda").fit(X)
    assert next(detector.model_.parameters()).is_cuda
    on_gpu = detector.score_samples(X)
    if parts.get("objective") != "diffusion-time":  # which leaves nothing to draw from
        assert np.isfinite(detector.sample(20, random_state=0)).all()
    copied = pickle.loads(pickle.dumps(detector)).set_params(device="cpu")
    # Refitting each row's posterior repeats rounding errors through a hundred steps.
    tolerance = 1e-3 if parts.get("anomaly") == "likelihood_regret" else 1e-6
    np.testing.assert_allclose(on_gpu, copied.score_samples(X), rtol=tolerance, atol=tolerance)


def test_training_is_repeatable_to_rounding(tiny, X):
    # Sums on a GPU are taken in no fixed order.
    first, second = (on_cuda(tiny).fit(X).score_samples(X) for _ in range(2))
    np.testing.assert_allclose(first, second, rtol=1e-2)


@pytest.fixture
def recordings(monkeypatch):
    """The steps that were recorded, and replayed."""
    made = []

    class Recorded(_training.RecordedStep):
        def __init__(self, *arguments):
            self.replays = 0
            super().__init__(*arguments)
            made.append(self)

        def __call__(self, *batch):
            self.replays += 1
            return super().__call__(*batch)

    monkeypatch.setattr(_training, "RecordedStep", Recorded)
    return made


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        *((FlowDetector, {"transform": name}) for name in TRANSFORMS),
        (VAEDetector, {}),
        (EnergyDetector, {}),
        (DiffusionDetector, {"denoiser": "network"}),
    ],
)
@pytest.mark.parametrize("kind", ["rows", "images"])
def test_recorded_steps_are_those_of_the_loop(X, family, parts, kind, recordings, monkeypatch):
    rows = X
    if kind == "images":
        rows = np.random.default_rng(0).integers(0, 256, (100, 1, 12, 12), dtype=np.uint8)
        parts = {} if "transform" in parts else parts
    weights = np.random.default_rng(1).uniform(0.5, 1.5, len(rows))
    # The last batch of a pass is shorter, and is not replayed.
    options = {"hidden_features": 16, "max_iter": 60, "batch_size": 32, "random_state": 0, "device": "cuda"}
    detector = family(**options, **parts).fit(rows, sample_weight=weights)
    assert len(recordings) == 1
    assert 20 < recordings[0].replays < 50
    monkeypatch.setattr(_training, "RECORD_AFTER", 60)
    plain = family(**options, **parts).fit(rows, sample_weight=weights)
    assert len(recordings) == 1
    np.testing.assert_allclose(detector.loss_curve_, plain.loss_curve_, rtol=1e-2)
    np.testing.assert_allclose(detector.validation_curve_, plain.validation_curve_, rtol=1e-2)


def test_what_cannot_be_recorded_goes_on_step_by_step(tiny, X, recordings, monkeypatch):
    from anomalib_gen.objectives import MaximumLikelihood

    loss = MaximumLikelihood.__call__

    def looking(self, model, x, generator):
        return loss(self, model, x, generator) + (0.0 if float(x.sum()) > 0 else 1e-9)

    plain = on_cuda(tiny, max_iter=40).fit(X)
    assert len(recordings) == 1
    monkeypatch.setattr(MaximumLikelihood, "__call__", looking)
    stream = torch.cuda.current_stream()
    detector = on_cuda(tiny, max_iter=40).fit(X)
    assert len(recordings) == 1
    assert torch.cuda.current_stream() == stream
    assert torch.isfinite(torch.rand(3, device="cuda")).all()
    np.testing.assert_allclose(detector.loss_curve_, plain.loss_curve_, rtol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_are_recorded_on_a_device_that_is_not_the_current_one(tiny, X, recordings):
    first, second = (tiny(device=device, max_iter=60).fit(X) for device in ("cuda:0", "cuda:1"))
    assert len(recordings) == 2
    assert torch.cuda.current_device() == 0
    np.testing.assert_allclose(first.loss_curve_, second.loss_curve_, rtol=1e-2)


def test_scores_are_independent_of_the_rows_beside_them(tiny, X):
    detector = on_cuda(tiny).fit(X)
    scores = detector.score_samples(X)
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_allclose(detector.score_samples(X[order[:57]]), scores[order[:57]], rtol=1e-10)


def test_a_pickle_from_a_gpu_opens_without_one(tiny, X, tmp_path):
    detector = on_cuda(tiny, anomaly=Typicality()).fit(X)
    path = tmp_path / "detector.pickle"
    path.write_bytes(pickle.dumps((detector, np.array(X))))
    assert next(detector.model_.parameters()).is_cuda  # pickling did not move it
    code = (
        "import pickle, sys, torch, warnings\n"
        "assert not torch.cuda.is_available()\n"
        f"detector, X = pickle.load(open({str(path)!r}, 'rb'))\n"
        "state = detector.model_.state_dict()\n"
        "assert {v.device.type for v in state.values()} == {'cpu'}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    scores = detector.score_samples(X)\n"
        "assert 'scoring on the CPU' in str(caught[0].message)\n"
        "print(scores.tobytes().hex())\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert printed.returncode == 0, printed.stderr
    scores = np.frombuffer(bytes.fromhex(printed.stdout.strip()))
    np.testing.assert_allclose(scores, detector.score_samples(X), rtol=1e-6, atol=1e-9)


def test_a_detector_from_a_cpu_scores_on_a_gpu(tiny, X):
    detector = tiny().fit(X)
    expected = detector.score_samples(X)
    moved = pickle.loads(pickle.dumps(detector)).set_params(device="cuda")
    np.testing.assert_allclose(moved.score_samples(X), expected, rtol=1e-6)
    np.testing.assert_allclose(moved.sample(3, random_state=0).shape, (3, 3))


def test_continuing_on_another_device(tiny, X):
    detector = tiny(warm_start=True).fit(X)
    detector.set_params(device="cuda").fit(X)
    assert detector.n_iter_ == 40
    detector.set_params(device="cpu").partial_fit(X)
    assert np.isfinite(detector.score_samples(X)).all()


def peak_of(call):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_scoring_does_not_grow_with_the_rows(X):
    detector = FlowDetector(max_iter=20, random_state=0, device="cuda").fit(X)
    rows = np.random.default_rng(0).normal(size=(1_000_000, 3))
    one_block = _runtime.scoring_block_rows(3, torch.device("cuda"))
    small = peak_of(lambda: detector.score_samples(rows[:one_block]))
    large = peak_of(lambda: detector.score_samples(rows))
    assert large < 1.1 * small
    assert small < 4e9
    assert peak_of(lambda: detector.sample(300_000, random_state=0)) < 4e9


def test_rows_that_do_not_fit_on_the_gpu_are_streamed(tiny, X, monkeypatch):
    resident = on_cuda(tiny).fit(X)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
    streamed = on_cuda(tiny).fit(X)
    np.testing.assert_allclose(streamed.score_samples(X), resident.score_samples(X), rtol=1e-2)
    assert _scaling.RESIDENT_BYTES > 0


def test_no_global_generator_is_touched(tiny, X):
    torch.cuda.manual_seed_all(7)
    cuda, cpu = torch.cuda.get_rng_state(), torch.get_rng_state()
    flags = (
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.cuda.current_device(),
    )
    detector = on_cuda(tiny).fit(X)
    detector.score_samples(X)
    detector.sample(5, random_state=0)
    assert torch.equal(torch.cuda.get_rng_state(), cuda)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert flags == (
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.cuda.current_device(),
    )


def test_memory_that_runs_out_halves_the_batch(tiny, X, monkeypatch):
    from anomalib_gen.objectives import MaximumLikelihood

    loss = MaximumLikelihood.__call__

    def hungry(self, model, x, generator):
        if len(x) > 20:
            torch.empty(2**50, device=x.device)  # a petabyte
        return loss(self, model, x, generator)

    monkeypatch.setattr(MaximumLikelihood, "__call__", hungry)
    with pytest.warns(UserWarning, match="halved to 16 rows"):
        detector = on_cuda(tiny, batch_size=32).fit(X)
    assert detector.n_iter_ == 20


def test_a_non_finite_loss_names_its_step(tiny, X, monkeypatch):
    from anomalib_gen.objectives import MaximumLikelihood

    loss = MaximumLikelihood.__call__
    calls = iter(range(1000))

    def broken(self, model, x, generator):
        values = loss(self, model, x, generator)
        return values * torch.nan if torch.is_grad_enabled() and next(calls) == 7 else values

    monkeypatch.setattr(MaximumLikelihood, "__call__", broken)
    with pytest.raises(FloatingPointError, match="not finite at step 7 "):
        on_cuda(tiny, max_iter=60).fit(X)


@pytest.mark.parametrize("family", [DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector])
def test_images(family):
    images = np.random.default_rng(0).integers(0, 256, (100, 1, 12, 12), dtype=np.uint8)
    options = {"denoiser": "network"} if family is DiffusionDetector else {}
    detector = family(max_iter=20, hidden_features=32, random_state=0, device="cuda", **options).fit(images)
    assert next(detector.model_.parameters()).is_cuda
    on_gpu = detector.score_samples(images)
    np.testing.assert_allclose(detector.score_samples(images[40:41]), on_gpu[40:41], rtol=1e-5)
    detector.set_params(device="cpu")
    # Convolutions in float32, with the device's own order of sums (and TF32 where it is allowed).
    np.testing.assert_allclose(on_gpu, detector.score_samples(images), rtol=1e-2)
    assert detector.sample(2, random_state=0).shape == (2, 1, 12, 12)


def test_stored_images_give_the_scores_of_the_cpu():
    from sklearn.datasets import load_digits

    images = load_digits().images[:, None]
    detector = DiffusionDetector(denoiser="closed-form", device="cuda").fit(images[:600])
    assert detector.model_.memory.rows.is_cuda
    on_gpu = detector.score_samples(images[600:800])
    detector.set_params(device="cpu")
    np.testing.assert_allclose(on_gpu, detector.score_samples(images[600:800]), rtol=1e-4, atol=1e-4)
