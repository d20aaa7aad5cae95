"""What is an alert, and what is chance."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from anomalib_gen.monitoring import (
    Batch,
    Distribution,
    Summariser,
    Thresholds,
    compare,
    reference_of,
    side_by_side,
)


def make_rows(n, rng, shift=0.0):
    return pd.DataFrame(
        {
            "x": rng.normal(shift, 1, n),
            "n": rng.poisson(4, n),
            "kind": rng.choice(["a", "b", "c"], n, p=[0.5, 0.3, 0.2]),
            "gaps": np.where(rng.random(n) < 0.1, np.nan, rng.normal(size=n)),
        }
    )


@pytest.fixture(scope="module")
def reference():
    rng = np.random.default_rng(0)
    made = Summariser()
    made.add(make_rows(4000, rng))
    return reference_of(made.columns(), rng.normal(size=2000), threshold=-1.645, held_out=True)


def make_batch(reference, rows, scores=None):
    made = Summariser(reference.columns)
    made.add(rows)
    s = np.random.default_rng(9).normal(size=len(rows)) if scores is None else scores
    return Batch(
        n_rows=len(s),
        n_flagged=int((s < reference.threshold).sum()),
        scores=Distribution.of(s, len(s) + 1),
        columns=made.columns(),
    )


def kinds(report):
    return [(alert.kind, alert.column) for alert in report.alerts]


@pytest.mark.parametrize("n", [1, 30, 1000, 20_000])
def test_rows_like_those_of_training_raise_no_alert(reference, n):
    found = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        batch = make_batch(reference, make_rows(n, rng), rng.normal(size=n))
        found += len(compare(reference, batch).alerts)
    assert found == 0


def test_a_change_without_size_is_no_alert_however_sure(reference):
    """A tenth of a standard deviation over 20,000 rows is certain, and nothing to wake somebody for."""
    rng = np.random.default_rng(1)
    batch = make_batch(reference, make_rows(20_000, rng, shift=0.15), rng.normal(0.15, 1, size=20_000))
    report = compare(reference, batch)
    assert report.columns[0].p_adjusted < 1e-6
    assert report.scores.p_value < 0.01
    assert not report.alerts
    assert not report.columns[0].drifted
    sensitive = compare(reference, batch, thresholds=Thresholds(wasserstein=0.1))
    assert kinds(sensitive) == [("scores", None), ("distribution", "x")]


def test_a_change_without_certainty_is_no_alert_however_large(reference):
    rng = np.random.default_rng(1)
    report = compare(reference, make_batch(reference, make_rows(4, rng, shift=0.8)))
    assert report.columns[0].distance > 0.2
    assert not report.alerts


def test_every_kind_of_drift_is_named(reference):
    rng = np.random.default_rng(1)
    rows = make_rows(2000, rng, shift=1.0)
    rows["n"] = rows["n"] * 2
    rows.loc[:100, "kind"] = "new"
    rows.loc[:1000, "gaps"] = np.nan
    report = compare(reference, make_batch(reference, rows, rng.normal(-1, 1, 2000)))
    assert kinds(report) == [
        ("scores", None),
        ("alert-rate", None),
        ("distribution", "x"),
        ("distribution", "n"),
        ("unseen", "kind"),
        ("missing", "gaps"),
    ]
    messages = {alert.kind: alert.message for alert in report.alerts}
    assert messages["unseen"] == "kind: 5.05% are of categories not in training, such as 'new'"
    assert messages["missing"].startswith("gaps: 5")
    assert [column.drifted for column in report.columns] == [True] * 4
    assert report.columns[0].wasserstein == pytest.approx(1, abs=0.1)
    assert report.columns[2].unseen == pytest.approx(0.0505)
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_categories_that_change_places(reference):
    rng = np.random.default_rng(1)
    rows = make_rows(1000, rng)
    rows["kind"] = rng.choice(["a", "b", "c"], 1000, p=[0.2, 0.3, 0.5])
    report = compare(reference, make_batch(reference, rows))
    assert kinds(report) == [("distribution", "kind")]
    assert report.columns[2].distance == pytest.approx(0.3, abs=0.05)
    assert report.columns[2].wasserstein is None


def test_ignored_columns_raise_no_alert(reference):
    rng = np.random.default_rng(1)
    report = compare(reference, make_batch(reference, make_rows(1000, rng, shift=2)), ignore=["x"])
    assert not report.alerts
    assert report.columns[0].distance > 0.5
    assert not report.columns[0].drifted


def test_many_columns_are_corrected_for():
    """Of 300 columns without drift some have p-values below 0.01; after correction hardly any run names one."""
    rng = np.random.default_rng(0)
    limits = Thresholds(distance=0.0, alpha=0.05)
    uncorrected, runs = 0, 0
    for _ in range(4):
        made = Summariser()
        made.add(pd.DataFrame(rng.normal(size=(300, 300))).rename(columns=str))
        reference = reference_of(made.columns(), rng.normal(size=50), threshold=-9, held_out=True)
        batch = make_batch(
            reference, pd.DataFrame(rng.normal(size=(200, 300))).rename(columns=str), rng.normal(size=200)
        )
        report = compare(reference, batch, thresholds=limits)
        uncorrected += sum(column.p_value <= 0.05 for column in report.columns)
        runs += any(alert.kind == "distribution" for alert in report.alerts)
    assert uncorrected > 30
    assert runs <= 1


def test_volume(reference):
    rng = np.random.default_rng(1)
    batch = make_batch(reference, make_rows(100, rng))
    for recent, expected in (
        ([], False),
        ([1000] * 4, False),
        ([1000] * 5, True),
        ([50] * 9, True),
        ([51] * 9, False),
        ([199] * 9, False),
        ([1, 100, 100, 100, 9999], False),
    ):
        report = compare(reference, batch, recent_rows=recent)
        assert (kinds(report) == [("volume", None)]) == expected
    empty = Batch(n_rows=0, n_flagged=0, scores=Distribution.of([]))
    assert kinds(compare(reference, empty)) == [("volume", None)]


def test_without_input_the_scores_alone_are_compared(reference):
    scores = np.random.default_rng(1).normal(-2, 1, 500)
    batch = Batch(n_rows=500, n_flagged=int((scores < -1.645).sum()), scores=Distribution.of(scores))
    report = compare(reference, batch)
    assert report.columns == ()
    assert kinds(report) == [("scores", None), ("alert-rate", None)]


def test_scores_of_training_rows_are_no_ground_for_an_alert(reference):
    scores = np.random.default_rng(1).normal(-2, 1, 500)
    batch = Batch(n_rows=500, n_flagged=int((scores < -1.645).sum()), scores=Distribution.of(scores))
    report = compare(replace(reference, held_out=False), batch)
    assert report.scores.distance > 0.5
    assert not report.held_out
    assert not report.alerts


def test_a_reference_with_more_categories_than_it_keeps_knows_no_new_ones(reference):
    column = reference.column("kind")
    cut = replace(column, categories={"a": 2000}, n_other=2000)
    reference = replace(reference, columns=(cut,))
    rows = pd.DataFrame({"kind": ["a"] * 500 + ["new"] * 500})
    report = compare(reference, make_batch(reference, rows))
    assert report.columns[0].unseen is None
    assert report.columns[0].distance == pytest.approx(0)
    assert not report.alerts


def test_side_by_side(reference):
    rng = np.random.default_rng(1)
    batch = make_batch(reference, make_rows(1000, rng, shift=1))
    shares = side_by_side(reference.columns[0], batch.columns[0], n_bins=10)
    assert len(shares.edges) == 11
    assert sum(shares.reference) == pytest.approx(1)
    assert sum(shares.batch) == pytest.approx(1)
    edges = np.array(shares.edges)
    inner = np.histogram(batch.columns[0].distribution.sample(), edges)[0][1:-1] / 1000
    np.testing.assert_allclose(shares.batch[1:-1], inner, atol=2e-3)
    shares = side_by_side(reference.columns[2], batch.columns[2], n_bins=2)
    assert shares.labels == ("a", "b", "(others)")
    assert sum(shares.batch) == pytest.approx(1)
    same = Distribution.of([3.0] * 5)
    assert sum(side_by_side(same, same).batch) == pytest.approx(1)
    assert side_by_side(Distribution.of([]), Distribution.of([])).edges == ()
    assert sum(side_by_side(same, Distribution.of([])).batch) == 0
