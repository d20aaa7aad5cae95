r"""Detectors with conformal p-values: every outlier detector, calibrated by rows that it has not seen.

The plain way holds rows out: calibration.p_values compares the score of a row with theirs. To hold rows out costs some
of them. Where every row should both train and calibrate, each is scored by a model that has not seen it, and compared
with the same model's score of x:

    p(x) = (1 + #{i : s_{-i}(x_i) <= s_{-i}(x)}) / (n + 1)                    (cross-conformal, CV+, jackknife+)

where s_{-i} comes from a model fitted without row i: without its fold (cross-conformal, Vovk 2015; the CV+ of Barber et
al. 2021), without it alone (jackknife+), or from the average of those bootstrap models that missed it
(jackknife+-after-bootstrap, Kim et al. 2020). The ranks now come from different models, and what is certain for
jackknife+ is P(p(x) <= t) <= 2 t, with a little more for few folds; in practice it is close to t unless the models
are unstable.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import _fit_context
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _num_samples, check_is_fitted

from anomalib_gen._outlier import subtract_scores
from anomalib_gen._runtime import row_blocks
from anomalib_gen._warnings import warn_user
from anomalib_gen.calibration._wrapped import (
    WrappedDetector,
    fit_and_hold_out,
    require_unfitted,
    seeded_clone,
    splittable,
)
from anomalib_gen.calibration.p_values import conformal_p_values, flagged_ranks

COMPARED_VALUES = 2**22
"""Comparisons of rows with calibration rows held in memory at once."""


class ConformalDetector(WrappedDetector):
    """Base of the conformal detectors: `predict` is ``p_values(X) <= alpha``, decided on the scale of scores."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **WrappedDetector._parameter_constraints,
        "alpha": [Interval(Real, 0, 1, closed="neither")],
    }

    alpha: float
    calibration_scores_: npt.NDArray[np.float64]
    n_calibration_: int

    @abstractmethod
    def p_values(self, X: Any) -> npt.NDArray[np.float64]:
        """Conformal p-values of rows.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """

    def _set_offset(self, calibration_scores: npt.NDArray[np.float64]) -> None:
        n = len(calibration_scores)
        k = flagged_ranks(self.alpha, n)
        if k == 0:
            warn_user(
                f"alpha={self.alpha:g} is below 1 / (n + 1) = {1 / (n + 1):.3g}, the smallest p-value from n = {n} "
                "calibration rows, so no row will be flagged. Raise alpha or give more rows.",
            )
        self.calibration_scores_, self.n_calibration_, self._k = calibration_scores, n, max(k, 1)
        self.offset_ = float(np.partition(calibration_scores, k - 1)[k - 1]) if k else -np.inf


class SplitConformalDetector(ConformalDetector):
    """Any outlier detector with p-values from normal rows held out of its training.

    Parameters
    ----------
    estimator : estimator or None, default=None
        An outlier detector of this package, of scikit-learn or of pyod, or a pipeline that ends in one; it is cloned.
        None takes `sklearn.ensemble.IsolationForest`. A fitted one in a `sklearn.frozen.FrozenEstimator` is not
        fitted again, and all rows given to `fit` calibrate it; they must not be those it was fitted to.
    alpha : float, default=0.05
        `predict` labels rows with p-values of at most `alpha` as outliers: at most that share of normal rows,
        on average over calibration rows.
    calibration_fraction : float, default=0.5
        Share of the rows given to `fit` that calibrate; the others train. The smallest possible p-value is one by the
        number of calibration rows plus one, so false-discovery control over many rows needs many of them.
    score_direction : {"auto", "normal", "abnormal"}, default="auto"
        What a high score of the estimator means. "auto" knows `score_samples` and scikit-learn's outlier detectors
        (normal) and pyod's (abnormal), also at the end of a pipeline, and refuses to guess elsewhere.
    random_state : int, RandomState instance or None, default=None
        Chooses the calibration rows, and seeds the estimator where its own random state is None.

    Attributes
    ----------
    estimator_ : estimator
        The fitted detector.
    calibration_scores_ : ndarray of shape (n_calibration_,)
        Sorted scores of the calibration rows.
    n_calibration_ : int
        Number of calibration rows.
    offset_ : float
        Threshold on `score_samples`: rows below it have p-values of at most `alpha`.
    n_features_in_ : int
        Number of columns, where the estimator knows.
    feature_names_in_ : ndarray of str
        Names of the columns, where the estimator knows.

    See Also
    --------
    CrossConformalDetector : Every row trains and calibrates.
    anomalib_gen.calibration.adjust_p_values : False-discovery control over a batch of rows.

    Notes
    -----
    The promise needs rows that are exchangeable with those to come, and normal. Anomalies among the calibration rows
    make p-values larger, hence decisions more cautious; drift may break the promise.

    References
    ----------
    .. [1] Laxhammar, R., Falkman, G. (2010). Conformal prediction for distribution-independent anomaly detection in
       streaming vessel data. StreamKDD. doi:10.1145/1833280.1833287.
    .. [2] Bates, S., Candès, E., Lei, L., Romano, Y., Sesia, M. (2023). Testing for outliers with conformal p-values.
       Annals of Statistics, 51(1). arXiv:2104.08279.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.neighbors import LocalOutlierFactor
    >>> from anomalib_gen.calibration import SplitConformalDetector
    >>> X = np.random.default_rng(0).normal(size=(398, 2))
    >>> detector = SplitConformalDetector(LocalOutlierFactor(novelty=True), random_state=0).fit(X)
    >>> detector.p_values([[0.0, 0.0], [6.0, 6.0]])
    array([0.905, 0.005])
    >>> detector.predict([[0.0, 0.0], [6.0, 6.0]])
    array([ 1, -1])
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **ConformalDetector._parameter_constraints,
        "calibration_fraction": [Interval(Real, 0, 1, closed="neither")],
    }

    def __init__(
        self,
        estimator: Any = None,
        *,
        alpha: float = 0.05,
        calibration_fraction: float = 0.5,
        score_direction: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.alpha = alpha
        self.calibration_fraction = calibration_fraction
        self.score_direction = score_direction
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the detector to some of the rows and calibrate it on the others.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
            Normal rows.
        y : ignored
            For scikit-learn's conventions.

        Returns
        -------
        self
        """
        fitted, held_out = fit_and_hold_out(self, X, self.calibration_fraction)
        self._calibrate(fitted, self._scores_of(fitted, held_out))
        return self

    def _calibrate(self, fitted: Any, scores: npt.NDArray[np.float64]) -> None:
        """Take over a fitted detector, with the scores of rows that it was not fitted to."""
        with self._restored_on_failure():
            self.estimator_ = fitted
            self._note_columns(fitted)
            self._set_offset(np.sort(scores))

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

    def p_values(self, X: Any) -> npt.NDArray[np.float64]:
        """Conformal p-values of rows: of a normal row at most t with probability at most t.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            Multiples of ``1 / (n_calibration_ + 1)`` in (0, 1].
        """
        return conformal_p_values(self.score_samples(X), self.calibration_scores_)


class _LeftOutConformalDetector(ConformalDetector):
    """Several models, and for each calibration row the average of those that have not seen it."""

    estimators_: list[Any]
    _mixing: npt.NDArray[
        np.float64
    ]  # (n_models, n_calibration): weights of the models for each calibration row

    def _fit_models(self, X: Any, trained_on: list[npt.NDArray[np.integer]]) -> Self:
        n = _num_samples(X)
        random = check_random_state(self.random_state)
        unseen = np.ones((len(trained_on), n))
        scores = np.zeros((len(trained_on), n))
        estimators = []
        for b, rows in enumerate(trained_on):
            fitted = seeded_clone(self._inner(), random).fit(_safe_indexing(X, np.sort(rows)))
            unseen[b, rows] = 0
            held_out = np.flatnonzero(unseen[b])
            if len(held_out):
                scores[b, held_out] = self._scores_of(fitted, _safe_indexing(X, held_out))
            estimators.append(fitted)
        used = unseen.any(axis=0)
        if not used.any():
            raise ValueError(
                "No row was left out of any model, so none can calibrate. Raise the number of models."
            )
        mixing = unseen[:, used]
        mixing /= mixing.sum(axis=0)
        with self._restored_on_failure():
            self.estimators_, self._mixing = estimators, mixing
            self._note_columns(estimators[0])
            self._set_offset((mixing * scores[:, used]).sum(axis=0))
        return self

    def _differences(self, X: Any) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """Blocks of ``s_{-i}(x_i) - s_{-i}(x)``, (rows, n_calibration)."""
        check_is_fitted(self)
        scores = np.column_stack([self._scores_of(estimator, X) for estimator in self.estimators_])
        for rows in row_blocks(len(scores), max(1, COMPARED_VALUES // self.n_calibration_)):
            # Elementwise rather than a matrix product, whose rounding depends on the rows beside.
            without = np.zeros((rows.stop - rows.start, self.n_calibration_))
            for b, weights in enumerate(self._mixing):
                missed = weights > 0  # the other rows have nothing of these scores, which may be infinite
                without[:, missed] += scores[rows, b, None] * weights[missed]
            yield rows, subtract_scores(self.calibration_scores_, without)

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:
        """Scores on which `offset_` decides; lower is more abnormal.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            `offset_` plus the margin by which a row's p-value is beyond `alpha`: what would have to be taken from its
            scores, under all models alike, to bring it to `alpha`. With one model for all it is that model's score.
        """
        parts = [
            (rows, np.partition(d, self._k - 1, axis=1)[:, self._k - 1]) for rows, d in self._differences(X)
        ]
        at = np.partition(self.calibration_scores_, self._k - 1)[self._k - 1]
        margins = np.concatenate([values for _, values in parts])
        # (Of two that are infinite alike the margin decides.)
        return np.where(np.isinf(at) & (margins == at), -margins, subtract_scores(at, margins))

    def p_values(self, X: Any) -> npt.NDArray[np.float64]:
        """Conformal p-values of rows.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            Multiples of ``1 / (n_calibration_ + 1)`` in (0, 1]. Close to valid in practice; twice them is valid up to
            the terms given under Notes.
        """
        counts = np.concatenate([(d <= 0).sum(axis=1) for _, d in self._differences(X)])
        return (1 + counts) / (1 + self.n_calibration_)


class CrossConformalDetector(_LeftOutConformalDetector):
    """Any outlier detector with p-values from cross-validation: CV+, and jackknife+ where each row is its own fold.

    Parameters
    ----------
    estimator : estimator or None, default=None
        An outlier detector of this package, of scikit-learn or of pyod, or a pipeline that ends in one; each fold
        gets a clone. None takes `sklearn.ensemble.IsolationForest`.
    alpha : float, default=0.05
        `predict` labels rows with p-values of at most `alpha` as outliers.
    cv : int, cross-validation splitter or iterable, default=5
        Folds; an int shuffles the rows first. ``LeaveOneOut()`` makes it jackknife+, at one fit a row.
    score_direction : {"auto", "normal", "abnormal"}, default="auto"
        What a high score of the estimator means, as in `SplitConformalDetector`.
    random_state : int, RandomState instance or None, default=None
        Shuffles the rows, and seeds the estimators where their own random state is None.

    Attributes
    ----------
    estimators_ : list of estimator
        The detectors, one for each fold.
    calibration_scores_ : ndarray of shape (n_calibration_,)
        Each row's score under the model of its fold, in the order of the rows.
    n_calibration_ : int
        Number of rows.
    offset_ : float
        Threshold on `score_samples`: rows below it have p-values of at most `alpha`.
    n_features_in_ : int
        Number of columns, where the estimator knows.
    feature_names_in_ : ndarray of str
        Names of the columns, where the estimator knows.

    See Also
    --------
    SplitConformalDetector : One fit, an exact guarantee, fewer rows for either purpose.
    BootstrapConformalDetector : Bagged models.

    Notes
    -----
    With n rows in K folds, a normal row has P(p <= t) <= 2 t + min(2 (1 - 1/K) / (n/K + 1), (1 - K/n) / (K + 1))
    ([2]_, theorem 4), which is 2 t for jackknife+ (K = n).

    References
    ----------
    .. [1] Vovk, V. (2015). Cross-conformal predictors. Annals of Mathematics and Artificial Intelligence, 74.
       arXiv:1208.0806.
    .. [2] Barber, R. F., Candès, E. J., Ramdas, A., Tibshirani, R. J. (2021). Predictive inference with the jackknife+.
       Annals of Statistics, 49(1). arXiv:1905.02928.
    .. [3] Hennhöfer, O., Preisach, C. (2024). Leave-one-out-, bootstrap- and cross-conformal anomaly detectors.
       arXiv:2402.16388.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.covariance import EllipticEnvelope
    >>> from anomalib_gen.calibration import CrossConformalDetector
    >>> X = np.random.default_rng(0).normal(size=(199, 2))
    >>> detector = CrossConformalDetector(EllipticEnvelope(), random_state=0).fit(X)
    >>> detector.p_values([[0.0, 0.0], [6.0, 6.0]])
    array([1.   , 0.005])
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **ConformalDetector._parameter_constraints,
        "cv": ["cv_object"],
    }

    def __init__(
        self,
        estimator: Any = None,
        *,
        alpha: float = 0.05,
        cv: Any = 5,
        score_direction: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.alpha = alpha
        self.cv = cv
        self.score_direction = score_direction
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit one detector for each fold and score the fold with it.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
            Normal rows.
        y : ignored
            For scikit-learn's conventions.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If there are fewer rows than folds, there are no folds, or they overlap.
        """
        X = splittable(X)
        n = _num_samples(X)
        require_unfitted(self)
        if isinstance(self.cv, Integral):
            if n < self.cv:
                raise ValueError(f"cv={self.cv} folds need as many rows, got n_samples={n}.")
            order = check_random_state(self.random_state).permutation(n)
            held_out = [np.sort(fold) for fold in np.array_split(order, int(self.cv))]
        else:
            from sklearn.model_selection import check_cv

            # As in scikit-learn's searches, folds may be masks.
            held_out = [np.arange(n)[test] for _, test in check_cv(self.cv).split(X)]
            if not held_out:
                raise ValueError(
                    f"cv={self.cv!r} has no folds, as an iterator that was used before has none."
                )
        if len(np.unique(np.concatenate(held_out))) != sum(map(len, held_out)):
            raise ValueError("cv holds a row out more than once; folds that do not overlap are needed.")
        return self._fit_models(X, [np.setdiff1d(np.arange(n), fold) for fold in held_out])


class BootstrapConformalDetector(_LeftOutConformalDetector):
    """Any outlier detector, bagged, with p-values from the models that missed each row: jackknife+-after-bootstrap.

    Parameters
    ----------
    estimator : estimator or None, default=None
        An outlier detector of this package, of scikit-learn or of pyod, or a pipeline that ends in one; each bootstrap
        sample gets a clone. None takes `sklearn.ensemble.IsolationForest`.
    n_estimators : int, default=20
        Number of bootstrap samples. A row is missed by about 37 % of them; the few rows missed by none do not
        calibrate.
    alpha : float, default=0.05
        `predict` labels rows with p-values of at most `alpha` as outliers.
    score_direction : {"auto", "normal", "abnormal"}, default="auto"
        What a high score of the estimator means, as in `SplitConformalDetector`.
    random_state : int, RandomState instance or None, default=None
        Draws the bootstrap samples, and seeds the estimators where their own random state is None.

    Attributes
    ----------
    estimators_ : list of estimator
        The detectors, one for each bootstrap sample.
    calibration_scores_ : ndarray of shape (n_calibration_,)
        Mean score of each row under the models that missed it, in the order of the rows.
    n_calibration_ : int
        Number of rows that some model missed.
    offset_ : float
        Threshold on `score_samples`: rows below it have p-values of at most `alpha`.
    n_features_in_ : int
        Number of columns, where the estimator knows.
    feature_names_in_ : ndarray of str
        Names of the columns, where the estimator knows.

    See Also
    --------
    CrossConformalDetector : Fewer fits, each on more distinct rows.

    Notes
    -----
    Scores are averaged over models, so they have to be on one scale; likelihoods, energies and distances are. The
    bound P(p <= t) <= 2 t is proved for a random number of bootstrap samples ([1]_, theorem 1); it is fixed here, as
    the authors do in practice.

    References
    ----------
    .. [1] Kim, B., Xu, C., Barber, R. F. (2020). Predictive inference is free with the jackknife+-after-bootstrap.
       NeurIPS. arXiv:2002.09025.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.covariance import EllipticEnvelope
    >>> from anomalib_gen.calibration import BootstrapConformalDetector
    >>> X = np.random.default_rng(0).normal(size=(199, 2))
    >>> detector = BootstrapConformalDetector(EllipticEnvelope(), random_state=0).fit(X)
    >>> detector.p_values([[6.0, 6.0]])
    array([0.005])
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **ConformalDetector._parameter_constraints,
        "n_estimators": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(
        self,
        estimator: Any = None,
        *,
        n_estimators: int = 20,
        alpha: float = 0.05,
        score_direction: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.n_estimators = n_estimators
        self.alpha = alpha
        self.score_direction = score_direction
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit one detector to each bootstrap sample of the rows.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
            Normal rows.
        y : ignored
            For scikit-learn's conventions.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If there are fewer than two rows, the estimator is frozen, or no row was left out of any model.
        """
        X = splittable(X)
        n = _num_samples(X)
        require_unfitted(self)
        if n < 2:
            raise ValueError(
                f"n_samples={n}, but at least 2 rows are needed: a lone row is in every bootstrap sample."
            )
        random = check_random_state(self.random_state)
        return self._fit_models(X, [random.randint(n, size=n) for _ in range(self.n_estimators)])
