"""p-values of a classifier that sees the batch are valid, and see directions that one class does not show."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from anomalib_gen.calibration import SplitConformalDetector, adaptive_p_values, adjust_p_values


def batch_of(seed, n_normal=60, n_abnormal=40, features=10):
    random = np.random.default_rng(seed)
    batch = random.normal(size=(n_normal + n_abnormal, features))
    batch[n_normal:, 0] += 3.5
    return batch, random.normal(size=(600, features))


def test_normal_rows_have_valid_p_values():
    """Not though, but because the classifier was fitted to the rows that it judges: both sets of them."""
    p = np.concatenate(
        [
            adaptive_p_values(*batch_of(seed), classifier=LogisticRegression(), random_state=seed)[:60]
            for seed in range(60)
        ]
    )
    for t in (0.05, 0.2, 0.5):
        # Rows of a batch share a classifier, so the 60 batches count rather than the 3,600 rows.
        assert (p <= t).mean() <= t + 3 * np.sqrt(t * (1 - t) / 600)
    assert (p <= 0.5).mean() > 0.4


def test_discoveries_are_controlled_and_more_than_without_a_look_at_the_batch():
    proportions, found, blind = [], [], []
    for seed in range(60):
        batch, normal = batch_of(seed)
        p = adaptive_p_values(batch, normal, classifier=LogisticRegression(), random_state=seed)
        flagged = adjust_p_values(p) <= 0.1
        proportions.append(flagged[:60].sum() / max(flagged.sum(), 1))
        found.append(flagged[60:].mean())
        split = SplitConformalDetector(KernelDensity(), random_state=seed).fit(normal)
        blind.append((adjust_p_values(split.p_values(batch)) <= 0.1)[60:].mean())
    assert np.mean(proportions) <= 0.1 + 3 * np.std(proportions) / np.sqrt(60)
    assert np.mean(found) > np.mean(blind) + 0.2


def test_any_classifier_frames_and_seeds():
    batch, normal = batch_of(0)
    a = adaptive_p_values(batch, normal, random_state=3)
    np.testing.assert_array_equal(a, adaptive_p_values(batch, normal, random_state=3))
    np.testing.assert_allclose(np.rint(a * 301), a * 301)
    by_margin = adaptive_p_values(
        batch, normal, classifier=make_pipeline(StandardScaler(), LinearSVC()), random_state=3
    )
    assert np.median(by_margin[60:]) < 0.05 < np.median(by_margin[:60])
    names = [f"c{j}" for j in range(10)]
    frames = pd.DataFrame(batch, columns=names), pd.DataFrame(normal, columns=names)
    classifier = LogisticRegression()
    np.testing.assert_array_equal(
        adaptive_p_values(*frames, classifier=classifier, random_state=3),
        adaptive_p_values(batch, normal, classifier=classifier, random_state=3),
    )
    assert not hasattr(classifier, "coef_")


def test_columns_are_matched_by_name():
    batch, normal = batch_of(0)
    names = [f"c{j}" for j in range(10)]
    known = pd.DataFrame(normal, columns=names)
    turned = pd.DataFrame(batch, columns=names)[names[::-1]]
    classifier = LogisticRegression()

    def p_values(X, X_normal):
        return adaptive_p_values(X, X_normal, classifier=classifier, random_state=3)

    p = p_values(batch, normal)
    np.testing.assert_array_equal(p_values(turned, known), p)
    np.testing.assert_array_equal(p_values(pl.from_pandas(turned), known), p)
    np.testing.assert_array_equal(p_values(turned, pa.Table.from_pandas(known)), p)
    with pytest.raises(ValueError, match="X is a data frame and X_normal is none"):
        p_values(turned, normal)
    with pytest.raises(ValueError, match="X_normal is a data frame and X is none"):
        p_values(batch, known)
    with pytest.raises(ValueError, match="X alone has column 'other' and X_normal alone has column 'c0'"):
        p_values(turned.rename(columns={"c0": "other"}), known)
    with pytest.raises(ValueError, match="X_normal alone has columns 'c8', 'c9'"):
        p_values(turned[names[:8]], known)


def test_errors():
    batch, normal = batch_of(0)
    with pytest.raises(ValueError, match=r"arrays of the same columns, got shapes \(5, 2\) and \(9, 3\)"):
        adaptive_p_values(np.zeros((5, 2)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match=r"arrays of the same columns, got shapes \(\) and \(\)"):
        adaptive_p_values(sparse.csr_array(np.eye(5)), sparse.csr_array(np.eye(9)))
    for wrong in (1, "x"):
        with pytest.raises(ValueError, match=f"calibration_fraction must lie between 0 and 1, got {wrong!r}"):
            adaptive_p_values(batch, normal, calibration_fraction=wrong)
    with pytest.raises(ValueError, match="X_normal has 1 rows; at least 2"):
        adaptive_p_values(batch, normal[:1])
