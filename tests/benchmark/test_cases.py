"""Pictures of best and worst cases: which images, what they look like, and where they stand in the report."""

import base64
import io

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("pyod", reason="the benchmark extra is not installed")

from PIL import Image

from anomalib_gen.benchmark import run_benchmark
from anomalib_gen.benchmark.cases import KINDS, describe_cases, pick_cases, ranks_in_words, strip_png
from anomalib_gen.benchmark.report import write_report
from anomalib_gen.benchmark.store import load_cases

Y = np.array([1, 1, 1, -1, -1, -1])
SCORES = np.array([5.0, 0.5, 4.0, 1.0, 6.0, 0.0])


def test_the_most_extreme_cases_come_first():
    cases = pick_cases(Y, SCORES, n=2)
    assert tuple(cases) == KINDS
    assert {kind: chosen.tolist() for kind, chosen in cases.items()} == {
        "found": [5, 3],
        "missed": [4, 3],
        "false alarms": [1, 2],
    }
    assert pick_cases(Y, SCORES, n=9)["missed"].tolist() == [4, 3, 5]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_holds_its_images(channels):
    images = np.random.default_rng(0).integers(0, 256, (3, channels, 5, 4), dtype=np.uint8)
    strip = np.asarray(Image.open(io.BytesIO(strip_png(images))))
    assert strip.shape == (5, 3 * 4 + 2, channels + 1)
    for k, image in enumerate(images):
        part = strip[:, 5 * k : 5 * k + 4]
        np.testing.assert_array_equal(np.moveaxis(part[..., :channels], 2, 0), image)
        assert (part[..., channels] == 255).all()
    assert (strip[:, [4, 9], channels] == 0).all()


def test_what_is_no_picture_is_refused():
    for images in (np.zeros((2, 2, 4, 4), dtype=np.uint8), np.zeros((2, 1, 4, 4))):
        with pytest.raises(ValueError, match="Pictures need images"):
            strip_png(images)


def test_ranks_are_shares_of_the_normal_images():
    X = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((6, 1, 2, 2), dtype=np.uint8)
    cases = describe_cases(X, Y, SCORES)
    assert cases["found"]["ranks"] == pytest.approx([0, 1 / 3, 1])
    assert cases["missed"]["ranks"] == pytest.approx([1, 1 / 3, 0])
    assert cases["false alarms"]["ranks"] == pytest.approx([0, 1 / 3, 2 / 3])
    assert ranks_in_words(cases["found"]) == "0 % to 100 %"
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(cases["missed"]["png"]))))
    assert [strip[0, 3 * k, 0] for k in range(3)] == cases["missed"]["positions"] == [4, 3, 5]


def test_the_report_shows_the_cases_of_a_run(tmp_path, images_home):
    run_benchmark(
        ["kNN=anomalib_gen.benchmark.KNNDistance()", "sklearn.ensemble.IsolationForest"],
        suite="images",
        output=tmp_path / "out",
        datasets=["mnist:not-1"],
        seeds=[0, 1],
        data_home=images_home,
        progress=False,
    )
    cases = load_cases(tmp_path / "out")
    assert list(cases["mnist:not-1"]) == ["kNN", "IsolationForest"]
    found = cases["mnist:not-1"]["kNN"]["found"]
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["png"]))))
    # The whole test part fits into the suite, in its order; the five ones are the anomalies.
    assert all(position % 10 == 1 for position in found["positions"])
    np.testing.assert_array_equal(
        strip[:, :28, 0], np.load(images_home / "mnist.npz")["X_test"][found["positions"][0]]
    )
    page = write_report(tmp_path / "out").read_text()
    assert page.count("<img src=") == 2 * len(KINDS)
    assert page.count(found["png"]) == 1
