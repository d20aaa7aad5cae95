"""The suites of images, on tiny collections."""

import numpy as np
import pytest

pytest.importorskip("pyod", reason="the benchmark extra is not installed")

from anomalib_gen.benchmark import IMAGE_SUITES, SplitError, images, run_benchmark
from anomalib_gen.benchmark.report import to_html, to_markdown
from anomalib_gen.benchmark.sources import DataError
from anomalib_gen.benchmark.summary import summarise


def collection(n_train=60, n_test=40):
    rng = np.random.default_rng(0)
    parts = []
    for n in (n_train, n_test):
        y = np.where(np.arange(n) % 4 == 0, -1, 1)
        parts.append((rng.integers(0, 256, (n, 1, 28, 28), dtype=np.uint8), y))
    return parts


def test_normal_images_train_and_the_test_part_tests():
    train, test = collection()
    split = images(train, test, 0)
    np.testing.assert_array_equal(split.X_train, train[0][train[1] == 1])
    np.testing.assert_array_equal(split.X_test, test[0])
    np.testing.assert_array_equal(split.y_test, test[1])
    small = images(train, test, 0, caps=(10, 20))
    assert small.X_train.shape == (10, 1, 28, 28)
    assert small.X_test.shape == (20, 1, 28, 28)
    assert small.X_train.dtype == np.uint8
    np.testing.assert_array_equal(images(train, test, 0, caps=(10, 20)).X_train, small.X_train)
    assert (images(train, test, 1, caps=(10, 20)).X_train != small.X_train).any()
    table = small.as_table()
    assert table.X_train.shape == (10, 784)
    assert table.X_test.max() <= 1
    assert table.as_table() is table


def test_a_collection_of_one_kind_is_refused():
    train, test = collection()
    with pytest.raises(SplitError, match="0 test anomalies"):
        images(train, (test[0], np.ones_like(test[1])), 0)


def test_detectors_of_images_and_of_tables_run_side_by_side(images_home):
    detectors = [
        "anomalib_gen.VAEDetector(max_iter=2, hidden_features=8)",
        "anomalib_gen.benchmark.OnPrincipalComponents(n_components=5)",
    ]
    results = run_benchmark(
        detectors,
        suite="images",
        output=images_home / "out",
        datasets=["mnist:not-1"],
        seeds=[0],
        jobs=2,  # of one thread each
        data_home=images_home,
        progress=False,
    )
    assert results["status"].tolist() == ["ok"] * 2
    assert set(results["n_features"]) == {784}
    assert set(results["n_train"]) == {90}
    # Noise takes eight bits, and a model that has learned nothing takes more.
    bits = results.set_index("detector")["bits_per_dimension"]
    assert bits.notna().tolist() == [True, False]
    assert 7.9 < bits.iloc[0] < 12
    summary = summarise(results)
    assert summary.bits.to_numpy().tolist() == [[bits.iloc[0]]]
    assert f"| mnist:not-1 | {bits.iloc[0]:.2f} |" in to_markdown(summary)
    assert "<h2>Bits per dimension</h2>" in to_html(results)


def test_unknown_tasks_are_named(images_home):
    with pytest.raises(DataError, match="Unknown image task 'mnist:but-3'"):
        run_benchmark(
            ["anomalib_gen.VAEDetector"], suite="images", output=images_home / "o", datasets=["mnist:but-3"]
        )
    with pytest.raises(ValueError, match="'images', 'images-full'"):
        run_benchmark(["anomalib_gen.VAEDetector"], suite="pictures", output=images_home / "o")
    assert set(IMAGE_SUITES) == {"images", "images-full"}
