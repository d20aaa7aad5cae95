"""Has a batch of rows drifted from the training reference, and should somebody look?

Every statistic is in `statistics`. A day of data is large enough to make any p-value small, and small enough batches
differ by chance; so something is an alert only if it is both

- large: one of its effect sizes reaches a threshold, and
- sure: its p-value is at most alpha; for the columns after Benjamini and Hochberg's correction over all their tests, so
  that of the columns named at most a share alpha is named by chance, on average.

The default thresholds are one size in several units: what half a standard deviation of a normal column does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from anomalib_gen.calibration import adjust_p_values
from anomalib_gen.monitoring.distribution import Distribution
from anomalib_gen.monitoring.reference import Reference
from anomalib_gen.monitoring.statistics import (
    categories_test,
    energy_test,
    ks_test,
    psi_of,
    shares_test,
    unseen_test,
    wasserstein,
)
from anomalib_gen.monitoring.summaries import Column


@dataclass(frozen=True)
class Thresholds:
    """What makes a difference an alert.

    Attributes
    ----------
    alpha : float, default=0.01
        Largest p-value, of the columns after correction.
    distance : float, default=0.2
        Largest difference of distribution functions, or of the shares of any set of categories. 0.2 is what half a
        standard deviation makes.
    psi : float, default=0.2
        Population stability index; 0.1 is commonly called moderate and 0.2 to 0.25 large.
    wasserstein : float, default=0.5
        Mean distance of quantiles in standard deviations.
    missing : float, default=0.05
        Change of the share of missing values, either way.
    unseen : float, default=0.01
        Share of rows with categories that training did not have: a model has nothing to say about them.
    alert_rate : float, default=2.0
        The share of outliers is so many times that of normal rows in training, or more.
    volume : float, default=2.0
        Rows are so many times the median of recent runs, or one by so many, or beyond.
    min_runs : int, default=5
        Recent runs that tell a usual volume.
    """

    alpha: float = 0.01
    distance: float = 0.2
    psi: float = 0.2
    wasserstein: float = 0.5
    missing: float = 0.05
    unseen: float = 0.01
    alert_rate: float = 2.0
    volume: float = 2.0
    min_runs: int = 5


@dataclass(frozen=True)
class Batch:
    """What a batch looks like.

    Attributes
    ----------
    n_rows : int
        Rows that were scored.
    n_flagged : int
        Those below the threshold.
    scores : Distribution or None
        Of a sample of the rows.
    columns : tuple of Column
        Of the input; empty if it was not read.
    n_bad_rows, n_bad_files : int
        What could not be scored.
    """

    n_rows: int
    n_flagged: int
    scores: Distribution | None
    columns: tuple[Column, ...] = ()
    n_bad_rows: int = 0
    n_bad_files: int = 0


@dataclass(frozen=True)
class Alert:
    """Something that somebody should look at.

    Attributes
    ----------
    kind : {"scores", "alert-rate", "volume", "distribution", "missing", "unseen"}
    column : str or None
    message : str
    """

    kind: str
    column: str | None
    message: str


@dataclass(frozen=True)
class ScoreDrift:
    """Scores of a batch against those of the reference.

    Attributes
    ----------
    distance, psi : float
        Largest difference of distribution functions; population stability index.
    wasserstein : float or None
        In spreads of the reference's scores.
    energy : float
        Energy distance as a share of ``2 E|X - Y|``.
    p_value : float
        Of the energy distance, by permutation.
    ks_p_value : float
    rate_reference, rate_batch : float
        Shares of outliers.
    p_rate : float
        Fisher's exact test of the two.
    n_reference, n_batch : int
        Scores that were compared.
    """

    distance: float
    psi: float
    wasserstein: float | None
    energy: float
    p_value: float
    ks_p_value: float
    rate_reference: float
    rate_batch: float
    p_rate: float
    n_reference: int
    n_batch: int


@dataclass(frozen=True)
class ColumnDrift:
    """A column of a batch against that of the reference.

    Attributes
    ----------
    name : str
    kind : {"number", "category"}
    distance : float
        Kolmogorov-Smirnov distance of numbers, total variation of categories.
    psi : float
    wasserstein : float or None
        None for categories, and where the reference has no spread.
    p_value, p_missing, p_unseen : float
        Of the distribution, the share of missing values, and categories that are new; not corrected.
    p_adjusted : float
        The smallest of them, corrected for all tests of all columns.
    missing_reference, missing_batch : float
        Shares of missing values.
    unseen : float or None
        Share of values of new categories; None for numbers, and where the reference has more than it keeps.
    unseen_values : tuple of str
        Some of them.
    drifted : bool
        Whether it raised an alert.
    """

    name: str
    kind: str
    distance: float
    psi: float
    wasserstein: float | None
    p_value: float
    p_missing: float
    p_unseen: float
    p_adjusted: float
    missing_reference: float
    missing_batch: float
    unseen: float | None
    unseen_values: tuple[str, ...]
    drifted: bool


@dataclass(frozen=True)
class DriftReport:
    """Outcome of `compare`.

    Attributes
    ----------
    n_rows, n_flagged, n_bad_rows, n_bad_files : int
        Of the batch.
    n_reference : int
        Rows that the reference is made from.
    held_out : bool
        Whether the reference's scores are those of rows kept from training; if not, scores raise no alert.
    usual_rows : float or None
        Median of recent runs, if there are enough.
    scores : ScoreDrift or None
    columns : tuple of ColumnDrift
        In the model's order.
    alerts : tuple of Alert
    thresholds : Thresholds
    """

    n_rows: int
    n_flagged: int
    n_bad_rows: int
    n_bad_files: int
    n_reference: int
    held_out: bool
    usual_rows: float | None
    scores: ScoreDrift | None
    columns: tuple[ColumnDrift, ...]
    alerts: tuple[Alert, ...]
    thresholds: Thresholds = field(default_factory=Thresholds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without NaN or infinity.

        Returns
        -------
        dict
        """
        return asdict(self)


def compare(
    reference: Reference,
    batch: Batch,
    *,
    thresholds: Thresholds | None = None,
    recent_rows: Sequence[int] = (),
    ignore: Sequence[str] = (),
) -> DriftReport:
    """Compare a batch with the training reference.

    Parameters
    ----------
    reference : Reference
    batch : Batch
    thresholds : Thresholds or None, default=None
        None takes the defaults.
    recent_rows : sequence of int, default=()
        Rows of recent runs, for the usual volume.
    ignore : sequence of str, default=()
        Columns that are compared but raise no alert, and count for no correction: those of the calendar, say.

    Returns
    -------
    DriftReport

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from anomalib_gen.monitoring import Batch, Distribution, Summariser, compare, reference_of
    >>> rng = np.random.default_rng(0)
    >>> normal = Summariser()
    >>> normal.add(pd.DataFrame({"amount": rng.normal(10, 2, 2000), "kind": "card"}))
    >>> reference = reference_of(normal.columns(), rng.normal(size=500), threshold=-1.6, held_out=True)
    >>> today = Summariser(reference.columns)
    >>> today.add(pd.DataFrame({"amount": rng.normal(14, 2, 300), "kind": ["card"] * 280 + ["cash"] * 20}))
    >>> batch = Batch(300, 12, Distribution.of(rng.normal(size=300)), today.columns())
    >>> [(alert.kind, alert.column) for alert in compare(reference, batch).alerts]
    [('distribution', 'amount'), ('unseen', 'kind')]
    """
    limits = thresholds or Thresholds()
    alerts: list[Alert] = []
    usual = float(np.median(recent_rows)) if len(recent_rows) >= max(1, limits.min_runs) else None
    alerts += _volume(batch, usual, limits)
    scores = None
    if batch.scores is not None and batch.n_rows:
        scores = _score_drift(reference, batch)
        # (Scores of training rows differ from those of any later rows: what is sure of them is not drift.)
        alerts += _score_alerts(scores, limits) if reference.held_out else []
    columns = [_column_drift(reference.column(column.name), column) for column in batch.columns]
    if batch.n_rows:
        columns = _corrected(columns, limits, set(ignore), alerts)
    return DriftReport(
        n_rows=batch.n_rows,
        n_flagged=batch.n_flagged,
        n_bad_rows=batch.n_bad_rows,
        n_bad_files=batch.n_bad_files,
        n_reference=reference.n_rows,
        held_out=reference.held_out,
        usual_rows=usual,
        scores=scores,
        columns=tuple(columns),
        alerts=tuple(alerts),
        thresholds=limits,
    )


def _volume(batch: Batch, usual: float | None, limits: Thresholds) -> list[Alert]:
    if not batch.n_rows:
        return [Alert("volume", None, "there are no rows")]
    if usual and not usual / limits.volume < batch.n_rows < usual * limits.volume:
        return [Alert("volume", None, f"{batch.n_rows} rows, and {usual:g} are usual")]
    return []


def _score_drift(reference: Reference, batch: Batch) -> ScoreDrift:
    assert batch.scores is not None
    distance, ks_p = ks_test(reference.scores, batch.scores)
    energy, p = energy_test(reference.scores.sample(), batch.scores.sample())
    counts = reference.n_flagged, reference.n_scored, batch.n_flagged, batch.n_rows
    return ScoreDrift(
        distance=distance,
        psi=psi_of(reference.scores, batch.scores),
        wasserstein=wasserstein(reference.scores, batch.scores),
        energy=energy,
        p_value=p,
        ks_p_value=ks_p,
        rate_reference=reference.flagged_rate,
        rate_batch=batch.n_flagged / batch.n_rows,
        p_rate=shares_test(*counts),
        n_reference=reference.scores.n,
        n_batch=batch.scores.n,
    )


def _effects(
    distance: float, psi: float, moved: float | None, limits: Thresholds, *, category: bool = False
) -> list[str]:
    """Effect sizes that reach their thresholds, in words."""
    found = []
    if distance >= limits.distance:
        found.append(f"{'total variation' if category else 'KS distance'} {distance:.3f}")
    if psi >= limits.psi:
        found.append(f"PSI {psi:.3f}")
    if moved is not None and moved >= limits.wasserstein:
        found.append(f"Wasserstein {moved:.2f} sd")
    return found


def _score_alerts(scores: ScoreDrift, limits: Thresholds) -> list[Alert]:
    alerts = []
    large = _effects(scores.distance, scores.psi, scores.wasserstein, limits)
    if large and min(scores.p_value, scores.ks_p_value) <= limits.alpha / 2:
        message = f"scores have drifted: {', '.join(large)} (energy test p = {scores.p_value:.2g})"
        alerts.append(Alert("scores", None, message))
    if (
        scores.rate_batch > scores.rate_reference
        and scores.rate_batch >= limits.alert_rate * scores.rate_reference
        and scores.p_rate <= limits.alpha
    ):
        message = f"{scores.rate_batch:.2%} of the rows are outliers, and {scores.rate_reference:.2%} of normal ones"
        alerts.append(Alert("alert-rate", None, message))
    return alerts


def _column_drift(reference: Column, batch: Column) -> ColumnDrift:
    n, m = reference.n_rows - reference.n_missing, batch.n_rows - batch.n_missing
    unseen, p_unseen, moved = None, 1.0, None
    if reference.distribution is not None:
        assert batch.distribution is not None
        distance, p = ks_test(reference.distribution, batch.distribution)
        index = psi_of(reference.distribution, batch.distribution)
        moved = wasserstein(reference.distribution, batch.distribution)
    else:
        assert reference.categories is not None
        assert batch.categories is not None
        p_counts = list(reference.categories.values())
        q_counts = [batch.categories.get(name, 0) for name in reference.categories]
        if reference.n_other:
            p_counts, q_counts = [*p_counts, reference.n_other], [*q_counts, batch.n_other]
        # (Otherwise others are new, which is a test of its own.)
        distance, index, p = categories_test(p_counts, q_counts)
        if not reference.n_other and m:
            unseen = batch.n_other / m
            p_unseen = unseen_test(reference.n_singletons, n, batch.n_other, m)
    return ColumnDrift(
        name=reference.name,
        kind=reference.kind,
        distance=distance,
        psi=index,
        wasserstein=moved,
        p_value=p,
        p_missing=shares_test(reference.n_missing, reference.n_rows, batch.n_missing, batch.n_rows),
        p_unseen=p_unseen,
        p_adjusted=1.0,
        missing_reference=reference.missing_rate,
        missing_batch=batch.missing_rate,
        unseen=unseen,
        unseen_values=batch.unseen if unseen else (),
        drifted=False,
    )


def _corrected(
    columns: list[ColumnDrift], limits: Thresholds, ignored: set[str], alerts: list[Alert]
) -> list[ColumnDrift]:
    """Columns with their corrected p-values; adds what they alert of."""
    judged = [column for column in columns if column.name not in ignored]
    # (A test that does not apply is none of those to correct for.)
    tests = [(column.p_value, column.p_missing) for column in judged]
    extra = [column.p_unseen for column in judged if column.unseen is not None]
    p = adjust_p_values(np.array([*np.ravel(tests), *extra], dtype=np.float64))
    pairs, rest = p[: 2 * len(judged)].reshape(-1, 2), iter(p[2 * len(judged) :])
    adjusted = {
        column.name: (*pair, next(rest) if column.unseen is not None else 1.0)
        for column, pair in zip(judged, pairs, strict=True)
    }
    found = []
    for column in columns:
        if column.name in ignored:
            found.append(column)
            continue
        p_value, p_missing, p_unseen = adjusted[column.name]
        mine = []
        large = _effects(
            column.distance, column.psi, column.wasserstein, limits, category=column.kind == "category"
        )
        if large and p_value <= limits.alpha:
            mine.append(("distribution", f"has drifted: {', '.join(large)}"))
        if (
            abs(column.missing_batch - column.missing_reference) >= limits.missing
            and p_missing <= limits.alpha
        ):
            mine.append(
                (
                    "missing",
                    f"{column.missing_batch:.2%} are missing, and {column.missing_reference:.2%} in training",
                )
            )
        if column.unseen is not None and column.unseen >= limits.unseen and p_unseen <= limits.alpha:
            shown = ", ".join(repr(value) for value in column.unseen_values[:3])
            mine.append(("unseen", f"{column.unseen:.2%} are of categories not in training, such as {shown}"))
        alerts += [Alert(kind, column.name, f"{column.name}: {message}") for kind, message in mine]
        smallest = float(min(p_value, p_missing, p_unseen))
        found.append(
            ColumnDrift(**{**_fields(column), "p_adjusted": smallest, "drifted": bool(mine)}),
        )
    return found


def _fields(column: ColumnDrift) -> dict[str, Any]:
    return {name: getattr(column, name) for name in column.__dataclass_fields__}
