"""Benchmark protocols: how a labelled table becomes training rows, test rows and test labels.

A protocol is a pure function of the table and a seed. Labels are +1 for a normal row and -1 for an anomaly,
before and after the split. Results of different protocols must never share a table:

``clean``
    One-class detection. Equal rows (in all columns and the label) are kept once, before the split: many
    public tables repeat rows, and a test row that also trains flatters whatever memorises. Half of the
    shuffled normals train, the other normals and the anomalies test.
``clean-unsupervised``
    The same table with the rows halved without a look at the labels, so the anomalies contaminate the
    training half.
``published``
    The one-class protocol of DTE (Livernoche et al., ICLR 2024), kept for comparison with published figures
    only.

``images`` and ``images-full``
    Collections of images on their own split: normal images of the training part train, and the test part tests. The
    first draws at most 4,000 images to train and 2,000 to test, for machines without a GPU.

The three for tables standardise the columns with the mean and deviation of the training rows. A column whose computed
deviation is exactly zero gets scale one; a constant such as 0.1 can come out at 1e-17 instead, and is then blown up,
for all detectors alike. That is how the reference splits are defined, so it stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "IMAGE_SUITES",
    "PROTOCOLS",
    "Split",
    "SplitError",
    "clean",
    "clean_unsupervised",
    "images",
    "published",
]

_TRAIN_CAP = 5000
_TEST_CAP = 5000  # of the normals and of the anomalies each


class SplitError(ValueError):
    """A table from which a protocol can make no split on which a detector could be judged."""


@dataclass(frozen=True)
class Split:
    """Rows to train on, rows to judge on, and the labels of the latter.

    Attributes
    ----------
    X_train : ndarray of shape (n_train, n_features)
        Standardised training rows, or images ``(n_train, channels, height, width)``; they carry no labels.
    X_test : ndarray of shape (n_test, n_features)
        Test rows on the scale of the training rows, or images.
    y_test : ndarray of shape (n_test,)
        +1 for a normal row, -1 for an anomaly.
    """

    X_train: NDArray[Any]
    X_test: NDArray[Any]
    y_test: NDArray[np.int64]

    def as_table(self) -> Split:
        """Images as rows of pixels between 0 and 1, for detectors of tables; tables as they are."""
        if self.X_train.ndim == 2:
            return self
        X_train, X_test = (X.reshape(len(X), -1) / 255.0 for X in (self.X_train, self.X_test))
        return Split(X_train, X_test, self.y_test)


def clean(X: ArrayLike, y: ArrayLike, seed: int) -> Split:
    """Split for one-class detection, each distinct row used once.

    The normals are shuffled by the seed; the first half trains (at most 5,000 rows), the rest tests (at most
    5,000) together with at most 5,000 shuffled anomalies.

    Parameters
    ----------
    X : array-like of shape (n_rows, n_features)
        The table.
    y : array-like of shape (n_rows,)
        +1 for a normal row, -1 for an anomaly.
    seed : int
        Seed of the shuffle.

    Returns
    -------
    Split
        Training rows without anomalies; normals first in the test rows.

    Raises
    ------
    SplitError
        If a class is missing on the side where it is needed.

    Notes
    -----
    What this protocol cannot show: training data are free of anomalies, which practice seldom
    grants; a table whose repeated rows are real repetitions loses that information; the caps make large
    tables easier to run and harder to tell apart.
    """
    X, y = _distinct(*_check(X, y))
    rng = np.random.default_rng(seed)
    normal = rng.permutation(np.flatnonzero(y == 1))
    anomaly = rng.permutation(np.flatnonzero(y == -1))
    half = len(normal) // 2
    train = normal[:half][:_TRAIN_CAP]
    return _make(X, y, train, normal[half:][:_TEST_CAP], anomaly[:_TEST_CAP])


def clean_unsupervised(X: ArrayLike, y: ArrayLike, seed: int) -> Split:
    """Split without a look at the labels: anomalies stay among the training rows.

    The distinct rows are shuffled by the seed and halved. The first half trains (at most 5,000 rows); of the
    second half at most 5,000 normals and 5,000 anomalies test.

    Parameters
    ----------
    X : array-like of shape (n_rows, n_features)
        The table.
    y : array-like of shape (n_rows,)
        +1 for a normal row, -1 for an anomaly.
    seed : int
        Seed of the shuffle.

    Returns
    -------
    Split
        Training rows with their contamination; normals first in the test rows.

    Raises
    ------
    SplitError
        If the test half holds no anomaly or no normal row. Tables with few anomalies can fail for some seeds
        only.

    Notes
    -----
    What this protocol cannot show: tables in which anomalies are a third of the rows and more are
    hardly "anomaly detection", and there every density model is asked to call a large part of its own
    training data abnormal.
    """
    X, y = _distinct(*_check(X, y))
    order = np.random.default_rng(seed).permutation(len(y))
    half = len(order) // 2
    train, test = order[:half][:_TRAIN_CAP], order[half:]
    return _make(X, y, train, test[y[test] == 1][:_TEST_CAP], test[y[test] == -1][:_TEST_CAP])


def published(X: ArrayLike, y: ArrayLike, seed: int) -> Split:
    """Split as in the one-class experiments of DTE [1]_.

    Tables of fewer than 1,000 rows are drawn with replacement up to 1,000 rows, tables of more than 50,000
    rows are drawn down to 50,000 without replacement, both before the split. The first half of the normals,
    in the order that results, trains; the other half and every anomaly test. The published figures are means
    over the seeds 0 to 4.

    Parameters
    ----------
    X : array-like of shape (n_rows, n_features)
        The table.
    y : array-like of shape (n_rows,)
        +1 for a normal row, -1 for an anomaly.
    seed : int
        Seed of the draw; a table of 1,000 to 50,000 rows is split alike for every seed.

    Returns
    -------
    Split
        Training rows without anomalies; normals first in the test rows.

    Raises
    ------
    SplitError
        If a class is missing on the side where it is needed.

    Notes
    -----
    Known defects, which are why the clean protocols exist:

    - The draw with replacement comes before the split, so train and test share rows. That flatters whatever
      memorises, nearest neighbours most of all. Affected are breastw, glass, hepatitis, ionosphere,
      lymphography, pima, stamps, vertebral, wbc, wdbc, wine and wpbc.
    - Rows repeated in the files themselves stay on both sides too.
    - Normals are taken in file order: a file with an order in time or by class gives a shifted test half, and
      for mid-sized tables the seeds differ in the detector alone.
    - Some published baselines are broken, so beating them means little: PlanarFlow drops the base density by
      a broadcasting slip, DTE-C applies softmax twice, and the VAE ends in a sigmoid on standardised data.

    References
    ----------
    .. [1] V. Livernoche, V. Jain, Y. Hezaveh, S. Ravanbakhsh. On diffusion modeling for
       anomaly detection. ICLR 2024.
    """
    X, y = _check(X, y)
    # The legacy generator draws the very rows of the published experiments; the newer one would draw others.
    rng = np.random.RandomState(seed)
    if len(y) < 1000:
        rows = rng.choice(len(y), 1000, replace=True)
        X, y = X[rows], y[rows]
    elif len(y) > 50_000:
        rows = rng.choice(len(y), 50_000, replace=False)
        X, y = X[rows], y[rows]
    normal = np.flatnonzero(y == 1)
    half = round(0.5 * len(normal))
    return _make(X, y, normal[:half], normal[half:], np.flatnonzero(y == -1))


PROTOCOLS: dict[str, Callable[[ArrayLike, ArrayLike, int], Split]] = {
    "clean": clean,
    "clean-unsupervised": clean_unsupervised,
    "published": published,
}


IMAGE_SUITES: dict[str, tuple[int, int] | None] = {"images": (4000, 2000), "images-full": None}
"""Suites of images, with the most images that train and that test; None for all."""


def images(
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    seed: int,
    *,
    caps: tuple[int, int] | None = None,
) -> Split:
    """Split a collection of images as it comes: its training part trains without anomalies, its test part tests.

    Parameters
    ----------
    train, test : tuple of ndarray
        Images ``(n, channels, height, width)`` of uint8 and labels, +1 for a normal image and -1 for an anomaly.
    seed : int
        Seed of the draw, where there is one.
    caps : tuple of int, optional
        The most images that train and that test, drawn without replacement; both kinds of test images keep their
        shares. None takes all.

    Returns
    -------
    Split
        Images as they are: what scaling a detector needs is its own.

    Raises
    ------
    SplitError
        If a class is missing on the side where it is needed.
    """
    (X_train, y_train), (X_test, y_test) = train, test
    rng = np.random.default_rng(seed)
    chosen = np.flatnonzero(y_train == 1)
    judged = np.arange(len(y_test))
    if caps is not None:
        chosen = np.sort(rng.permutation(chosen)[: caps[0]])
        judged = np.sort(rng.permutation(judged)[: caps[1]])
    y = y_test[judged]
    if len(chosen) == 0 or set(np.unique(y).tolist()) != {1, -1}:
        raise SplitError(
            f"The split leaves {len(chosen)} training images, {np.sum(y == 1)} normal test images and "
            f"{np.sum(y == -1)} test anomalies. No detector can be judged on it."
        )
    return Split(X_train[chosen], X_test[judged], y)


def _check(X: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y)
    if X.ndim != 2:
        raise ValueError(f"X must be a table of shape (rows, columns), got an array of shape {X.shape}.")
    if y.shape != (len(X),):
        raise ValueError(f"y must hold one label a row ({len(X)} rows), got an array of shape {y.shape}.")
    labels = set(np.unique(y).tolist())
    if not labels <= {1, -1}:
        found = ", ".join(sorted(map(str, labels))[:5])
        raise ValueError(
            f"y must be +1 for a normal row and -1 for an anomaly, found the labels {found}. "
            "If 1 marks an anomaly, pass numpy.where(y == 1, -1, 1)."
        )
    return X, y.astype(np.int64)


def _distinct(X: NDArray[np.float64], y: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Keep the first of all rows that agree in every column and the label, in file order."""
    keep = ~pd.DataFrame(np.c_[X, y]).duplicated().to_numpy()
    return X[keep], y[keep]


def _make(
    X: NDArray[np.float64],
    y: NDArray[np.int64],
    train: NDArray[np.int64],
    normal: NDArray[np.int64],
    anomaly: NDArray[np.int64],
) -> Split:
    for name, rows in (("training rows", train), ("normal test rows", normal), ("test anomalies", anomaly)):
        if len(rows) == 0:
            raise SplitError(
                f"The split leaves no {name}: after the protocol's preparation the table holds "
                f"{np.sum(y == 1)} normal rows and {np.sum(y == -1)} anomalies. No detector can be judged "
                f"on it."
            )
    mean, deviation = X[train].mean(0), X[train].std(0)
    deviation[deviation == 0] = 1.0
    Z = (X - mean) / deviation
    test = np.r_[normal, anomaly]
    return Split(Z[train], Z[test], y[test])
