r"""Thresholds that mean something: rules from scores to the number below which a row is flagged.

A rule looks at scores (lower = more abnormal) and answers "flag what scores below t". What it promises depends on whose
scores it sees:

    Contamination       t = quantile of the *training* scores: flags that share of the training rows, and says nothing
                        about new ones, which score lower because the detector has not seen them.
    FalsePositiveRate   t = s_(k) of n *held-out normal* scores, k = floor(rate (n + 1)). A new normal row falls below
                        with probability k / (n + 1) <= rate, whatever the distribution. Given these n rows that
                        probability is itself Beta(k, n + 1 - k) distributed (Wilks 1941), so a smaller k keeps it
                        below the rate with a stated confidence.
    TailProbability     for rates below 1 / n: the tail of the held-out scores, continued (calibration.extremes).
    ExpectedCost        with labels: t that minimises
                        (1 - pi) c_false P(s < t | normal) + pi c_miss P(s >= t | anomaly)
                        at a prevalence pi of anomalies, over held-out rows.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.base import _fit_context
from sklearn.frozen import FrozenEstimator
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _num_samples, check_is_fitted

from anomalib_gen._component import Component, resolve_component
from anomalib_gen._runtime import check_share
from anomalib_gen.calibration._wrapped import (
    WrappedDetector,
    check_labels,
    fit_and_hold_out,
    seeded_clone,
    splittable,
)
from anomalib_gen.calibration.extremes import TailFit, fit_tail
from anomalib_gen.calibration.p_values import flagged_ranks


class ThresholdRule(Component):
    """Base of the rules: ``rule(scores, y) -> threshold``; what it learned has a trailing underscore."""

    held_out: ClassVar[bool] = True
    """Whether the rule wants scores of rows that the detector was not fitted to."""
    labelled: ClassVar[bool] = False
    """Whether the rule needs labels."""

    @abstractmethod
    def __call__(self, scores: npt.NDArray[np.float64], y: Any = None) -> float:
        """Threshold below which rows are flagged.

        Parameters
        ----------
        scores : ndarray of shape (n_rows,)
            Lower = more abnormal.
        y : ndarray of shape (n_rows,), optional
            +1 for normal rows and -1 for anomalies; only for rules with `labelled`.

        Returns
        -------
        float
        """


class Contamination(ThresholdRule):
    """Flag a share of the training rows, as scikit-learn's detectors do.

    Parameters
    ----------
    rate : float, default=0.1
        The share. It is the share of anomalies expected among the training rows; a false-positive rate it is not.
    """

    held_out = False

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate

    def __call__(self, scores: npt.NDArray[np.float64], y: Any = None) -> float:
        """Quantile of the training scores."""
        rate = check_share(self.rate, "rate")
        lower, upper = (float(np.quantile(scores, rate, method=method)) for method in ("lower", "higher"))
        # There is no way from -inf, as outside the support of a density, to the next score.
        return upper if np.isinf(lower) else float(np.quantile(scores, rate))


class FalsePositiveRate(ThresholdRule):
    """Flag at most a share of new normal rows, judged by held-out normal rows.

    Parameters
    ----------
    rate : float, default=0.05
        The share.
    confidence : float or None, default=None
        None keeps the rate on average over held-out sets. A number in (0, 1) keeps it for the held-out rows at hand
        with that probability, at the price of a lower threshold.

    Attributes
    ----------
    rank_ : int
        The threshold is this many held-out scores from the lowest; 0 flags nothing.

    References
    ----------
    .. [1] Wilks, S. S. (1941). Determination of sample sizes for setting tolerance limits. Annals of Mathematical
       Statistics, 12(1).
    """

    def __init__(self, rate: float = 0.05, confidence: float | None = None) -> None:
        self.rate = rate
        self.confidence = confidence

    def __call__(self, scores: npt.NDArray[np.float64], y: Any = None) -> float:
        """Order statistic of the held-out scores."""
        rate, n = check_share(self.rate, "rate"), len(scores)
        if self.confidence is None:
            k = flagged_ranks(rate, n)
            needed = int(np.ceil(1 / rate - 1))
        else:
            confidence = check_share(self.confidence, "confidence")
            # The rate is Beta(k, n + 1 - k): P(Beta <= rate) falls with k.
            kept = stats.beta.cdf(rate, np.arange(1, n + 1), n - np.arange(n)) >= confidence
            k = int(kept.sum())
            needed = int(np.ceil(np.log1p(-confidence) / np.log1p(-rate)))
        if k == 0:
            raise ValueError(
                f"A false-positive rate of {rate:g} cannot be judged by {n} held-out rows: at least {needed} are "
                "needed. Give more rows, raise the rate, or continue the tail with TailProbability."
            )
        self.rank_ = k
        return float(np.partition(scores, k - 1)[k - 1])


class TailProbability(ThresholdRule):
    """Flag normal rows with a small probability, by a generalised Pareto tail of the held-out scores.

    Parameters
    ----------
    rate : float, default=0.001
        The probability; it may be far below one by the number of held-out rows, at the risk of extrapolation.
    tail_fraction : float, default=0.1
        Share of the held-out rows that make the tail. Judge it by
        ``anomalib_gen.calibration.tail_stability(-scores)`` and ``tail_.goodness_of_fit()``.

    Attributes
    ----------
    tail_ : TailFit
        Of minus the scores. ``tail_.interval(rate)`` says how certain the threshold is.
    """

    def __init__(self, rate: float = 0.001, tail_fraction: float = 0.1) -> None:
        self.rate = rate
        self.tail_fraction = tail_fraction

    def __call__(self, scores: npt.NDArray[np.float64], y: Any = None) -> float:
        """Minus the value that anomalies of normal rows exceed with probability `rate`."""
        rate = check_share(self.rate, "rate")
        self.tail_: TailFit = fit_tail(-scores, tail_fraction=self.tail_fraction)
        return -self.tail_.quantile(rate)


class ExpectedCost(ThresholdRule):
    """Flag so that false alarms and misses cost least, judged by labelled held-out rows.

    Parameters
    ----------
    false_alarm : float, default=1.0
        Cost of flagging a normal row.
    miss : float, default=10.0
        Cost of not flagging an anomaly, in the same unit.
    prevalence : float or None, default=None
        Share of anomalies where the detector will work; None takes that of the labelled rows, which is rarely it.

    Attributes
    ----------
    cost_ : float
        Expected cost a row at the threshold, on the held-out rows it was chosen on; so a little too low.
    """

    labelled = True

    def __init__(self, false_alarm: float = 1.0, miss: float = 10.0, prevalence: float | None = None) -> None:
        self.false_alarm = false_alarm
        self.miss = miss
        self.prevalence = prevalence

    def __call__(self, scores: npt.NDArray[np.float64], y: Any = None) -> float:
        """Threshold of least cost; of several, the one that flags fewest rows."""
        for name in ("false_alarm", "miss"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise ValueError(f"{name} must be a positive and finite cost, got {value!r}.")
        y = np.asarray(y)
        n_normal, n_abnormal = int((y == 1).sum()), int((y == -1).sum())
        if not n_normal or not n_abnormal:
            raise ValueError(
                f"Both labels are needed among the held-out rows, got {n_normal} normal (+1) and {n_abnormal} "
                "abnormal (-1) ones."
            )
        share = n_abnormal / len(y) if self.prevalence is None else check_share(self.prevalence, "prevalence")
        order = np.argsort(scores, kind="stable")
        sorted_scores, labels = scores[order], y[order]
        # The j lowest are flagged, j = 0 ... n.
        false_alarms = np.concatenate([[0], np.cumsum(labels == 1)]) / n_normal
        misses = 1 - np.concatenate([[0], np.cumsum(labels == -1)]) / n_abnormal
        cost = (1 - share) * self.false_alarm * false_alarms + share * self.miss * misses
        possible = np.concatenate([[True], np.diff(sorted_scores) > 0, [True]])
        j = int(np.where(possible, cost, np.inf).argmin())
        self.cost_ = float(cost[j])
        if j == len(scores):
            return float(np.nextafter(sorted_scores[-1], np.inf))
        if j == 0:
            return float(sorted_scores[0])
        middle = sorted_scores[j - 1] / 2 + sorted_scores[j] / 2
        return float(middle if middle > sorted_scores[j - 1] else sorted_scores[j])


RULES: dict[str, type[ThresholdRule]] = {
    "contamination": Contamination,
    "false-positive-rate": FalsePositiveRate,
    "tail": TailProbability,
    "cost": ExpectedCost,
}


class ThresholdDetector(WrappedDetector):
    """Any outlier detector with a threshold that a rule chooses.

    Parameters
    ----------
    estimator : estimator or None, default=None
        An outlier detector of this package, of scikit-learn or of pyod, or a pipeline that ends in one; it is cloned.
        None takes `sklearn.ensemble.IsolationForest`. A fitted one in a `sklearn.frozen.FrozenEstimator` is not
        fitted again, and the rule sees all rows given to `fit`; they must not be those it was fitted to, except
        for `Contamination`.
    threshold : str or ThresholdRule, default="false-positive-rate"
        ``"contamination"``, ``"false-positive-rate"``, ``"tail"`` or ``"cost"``, or an object with parameters:
        `Contamination`, `FalsePositiveRate`, `TailProbability`, `ExpectedCost`.
    calibration_fraction : float, default=0.5
        Share of the rows given to `fit` that are held out for the rule; the others train. `Contamination` holds none
        out.
    score_direction : {"auto", "normal", "abnormal"}, default="auto"
        What a high score of the estimator means, as in `SplitConformalDetector`.
    random_state : int, RandomState instance or None, default=None
        Chooses the held-out rows, and seeds the estimator where its own random state is None.

    Attributes
    ----------
    estimator_ : estimator
        The fitted detector.
    threshold_ : ThresholdRule
        The rule, with what it learned.
    offset_ : float
        The threshold on `score_samples`.
    n_features_in_ : int
        Number of columns, where the estimator knows.
    feature_names_in_ : ndarray of str
        Names of the columns, where the estimator knows.

    See Also
    --------
    SplitConformalDetector : p-values rather than one threshold.
    sklearn.model_selection.TunedThresholdClassifierCV : The same idea for classifiers.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.covariance import EllipticEnvelope
    >>> from anomalib_gen.calibration import TailProbability, ThresholdDetector
    >>> X = np.random.default_rng(0).normal(size=(10_000, 2))
    >>> detector = ThresholdDetector(
    ...     EllipticEnvelope(random_state=0), threshold=TailProbability(rate=1e-4), random_state=0
    ... ).fit(X)
    >>> detector.predict([[3.0, 0.0], [6.0, 0.0]])
    array([ 1, -1])
    >>> low, high = detector.threshold_.tail_.interval(1e-4)
    >>> bool(low < -2 * np.log(1e-4) < high)  # the exact quantile of these squared distances
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **WrappedDetector._parameter_constraints,
        "threshold": [str, Component],
        "calibration_fraction": [Interval(Real, 0, 1, closed="neither")],
    }

    def __init__(
        self,
        estimator: Any = None,
        *,
        threshold: Any = "false-positive-rate",
        calibration_fraction: float = 0.5,
        score_direction: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.threshold = threshold
        self.calibration_fraction = calibration_fraction
        self.score_direction = score_direction
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the detector and choose the threshold.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
            Normal rows; for `ExpectedCost` normal rows and anomalies, of which the former train.
        y : array-like of shape (n_samples,), optional
            +1 for normal rows and -1 for anomalies. Used by `ExpectedCost`, ignored by the other rules.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If the rule cannot keep its promise with the rows at hand; the message says how many it needs.
        """
        rule: Any = resolve_component(
            self.threshold, known=RULES, argument="threshold", default=FalsePositiveRate
        )
        if not isinstance(rule, ThresholdRule):
            raise TypeError(
                f"threshold must be a name or a rule of anomalib_gen.calibration, got {rule!r}. "
                f"Known names: {', '.join(map(repr, RULES))}."
            )
        labels = None
        if rule.labelled:
            fitted, held_out, labels = self._fit_labelled(X, y)
        elif rule.held_out:
            fitted, held_out = fit_and_hold_out(self, X, self.calibration_fraction)
        else:
            held_out = splittable(X)
            fitted = seeded_clone(self._inner(), check_random_state(self.random_state))
            fitted = fitted if isinstance(fitted, FrozenEstimator) else fitted.fit(held_out)
        self._calibrate(fitted, rule, self._scores_of(fitted, held_out), labels)
        return self

    def _calibrate(
        self, fitted: Any, rule: ThresholdRule, scores: npt.NDArray[np.float64], labels: Any = None
    ) -> None:
        """Take over a fitted detector, with the threshold that a rule finds for scores of rows."""
        offset = rule(scores, labels)
        self._note_columns(fitted)
        self.estimator_, self.threshold_, self.offset_ = fitted, rule, offset

    def _fit_labelled(self, X: Any, y: Any) -> tuple[Any, Any, npt.NDArray[Any]]:
        """Fit to normal rows of one part; return the other part with its labels."""
        if y is None:
            raise ValueError(
                "This threshold rule needs labels: give y, +1 for normal rows and -1 for anomalies."
            )
        X = splittable(X)
        labels = check_labels(y, _num_samples(X))
        from sklearn.model_selection import train_test_split

        inner = self._inner()
        if isinstance(inner, FrozenEstimator):
            check_is_fitted(inner)
            return inner, X, labels
        random = check_random_state(self.random_state)
        train, held_out = train_test_split(
            np.arange(_num_samples(X)),
            test_size=self.calibration_fraction,
            stratify=labels,
            random_state=random,
        )
        train = np.sort(train[labels[train] == 1])
        return (
            seeded_clone(inner, random).fit(_safe_indexing(X, train)),
            _safe_indexing(X, held_out),
            labels[held_out],
        )

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:
        """Scores of the detector inside; lower is more abnormal.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            Those of a pyod detector with the sign turned around.
        """
        check_is_fitted(self)
        return self._scores_of(self.estimator_, X)
