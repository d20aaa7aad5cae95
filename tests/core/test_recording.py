"""Which training steps are recorded, and where; with stand-ins for a GPU. On a real one: test_gpu.py."""

import contextlib

import pytest
import torch

from anomalib_gen import EnergyDetector, VAEDetector, _base, _recording
from anomalib_gen._training import train
from anomalib_gen.objectives import DenoisingScoreMatching, EvidenceLowerBound, GradientPenalty


class Gpus:
    """As much of torch.cuda, of two devices, as recording a step uses."""

    class Recording:
        def register_generator_state(self, generator):
            pass

    def __init__(self, *, fail):
        self.fail = fail
        self.index = 0
        self.streams = {0: "default of 0", 1: "default of 1"}
        self.CUDAGraph = self.Recording

    def Stream(self, device):
        return f"new of {device.index}"

    def current_stream(self, device):
        return self.streams[device.index]

    @contextlib.contextmanager
    def device(self, device):
        before, self.index = self.index, device.index
        try:
            yield
        finally:
            self.index = before

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.streams[self.index] = self.streams[self.index], stream
        try:
            yield
        finally:
            self.streams[self.index] = before

    @contextlib.contextmanager
    def graph(self, graph, *, stream="new of 0", capture_error_mode="global"):
        before, self.streams[self.index] = self.streams[self.index], stream
        yield
        if self.fail:  # torch does no better
            raise RuntimeError("operation failed due to a previous error during capture")
        self.streams[self.index] = before


class Generator:
    """A device's global generator; one that a failed recording has met is unusable."""

    state = "usable"

    def clone_state(self):
        other = Generator()
        other.state = self.state
        return other

    def graphsafe_set_state(self, other):
        self.state = other.state


class Batch:
    device = torch.device("cuda:1")

    def clone(self):
        return self


@pytest.mark.parametrize("fail", [False, True])
def test_a_step_is_recorded_where_its_rows_are_and_leaves_the_stream(monkeypatch, fail):
    gpus, seen = Gpus(fail=fail), []
    for name in ("CUDAGraph", "Stream", "current_stream", "device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpus, name))
    generators = (Generator(), Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)

    def gradient(x, weights):
        seen.append((gpus.index, gpus.streams[1]))
        generators[1].state = "unusable" if fail else "usable"

    _recording._recording_stream.cache_clear()
    with pytest.raises(RuntimeError, match="capture") if fail else contextlib.nullcontext():
        _recording.RecordedStep(gradient, Batch(), None, None)
    _recording._recording_stream.cache_clear()
    assert seen == [(1, "new of 1")]
    assert gpus.streams == {0: "default of 0", 1: "default of 1"}
    assert [one.state for one in generators] == ["usable", "usable"]


@pytest.mark.parametrize(
    ("device", "version", "possible"),
    [
        ("cuda", "2.11.0+cu130", True),
        ("cuda:1", "2.14.1", True),
        ("cuda", "2.10.1", False),
        ("cpu", "2.13.0", False),
    ],
)
def test_steps_are_recorded_by_versions_that_were_tried(monkeypatch, device, version, possible):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    assert _recording.can_record(torch.device(device)) is possible


class Annealed(DenoisingScoreMatching):
    """Noise that falls: another step each time."""

    def set_progress(self, fraction):
        self.data_noise = 0.2 - 0.1 * fraction


class Patient(DenoisingScoreMatching):
    recordable = True


@pytest.mark.parametrize(
    ("family", "objective", "recorded"),
    [
        (EnergyDetector, DenoisingScoreMatching(), True),
        (EnergyDetector, Annealed(), False),
        (EnergyDetector, Patient(), True),
        (EnergyDetector, GradientPenalty(DenoisingScoreMatching()), True),
        (EnergyDetector, GradientPenalty(Annealed()), False),
        (VAEDetector, EvidenceLowerBound(), True),
        (VAEDetector, EvidenceLowerBound(warmup=0.2), False),
    ],
)
def test_steps_are_recorded_where_the_objective_itself_allows_it(X, monkeypatch, family, objective, recorded):
    seen = []

    def look(*arguments, options, **others):
        seen.append(options.recorded)
        return train(*arguments, options=options, **others)

    monkeypatch.setattr(_base, "train", look)
    family(objective=objective, max_iter=2, hidden_features=8, random_state=0, device="cpu").fit(X)
    assert seen == [recorded]
