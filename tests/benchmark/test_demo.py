import re

import pytest
from rich.console import Console

pytest.importorskip("jinja2", reason="the benchmark extra is not installed")

from anomalib_gen.benchmark import parse_detectors
from anomalib_gen.benchmark.demo import run_demo


def test_demo_compares_and_draws_without_network(tmp_path, monkeypatch, helpers):
    import socket

    connect = socket.socket.connect

    def refuse(self, address):
        assert self.family == socket.AF_UNIX, f"the demo asked for {address}"  # as worker processes do
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    detectors = parse_detectors(
        [
            "forest=sklearn.ensemble.IsolationForest(n_estimators=10)",
            "mixture=sklearn.mixture.GaussianMixture(weights_init=[1.0], reg_covar=1e-3)",
            "kNN=anomalib_gen.benchmark.KNNDistance()",
            "broken=misbehaving_detectors.Raises",
        ]
    )
    console = Console(width=100, record=True)
    page = run_demo(tmp_path / "demo", detectors=detectors, seeds=(0,), console=console)
    text = console.export_text()
    assert "forest" in text
    assert str(page) in text
    assert "no cell finished: broken" in re.sub(r"\s+", " ", text)
    html = page.read_text(encoding="utf-8")
    assert html.count("Histogram of scores") == 9
    assert "digits: forest" in html
    assert "Below the detector&#39;s threshold" in html
    assert "This detector sets no threshold" in html
