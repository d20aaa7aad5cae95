r"""Held-out log-likelihood: which of several densities is nearest to that of the normal rows.

For densities q of the same rows in the same units,

    E log q(X) = E log p(X) - KL(p || q),                                                                       (1)

so the density with the largest mean held-out log-density is the one nearest to the truth p. Nothing else is compared by
it: energies without their constant, distances, and densities in other units are not. Behind a transformer T the model
knows the density of T(x), and

    log q(x) = log q_T(T(x)) + log |det dT/dx|,                                                                 (2)

where the last term is a sum of logarithms of scales for the linear scalers, each column by itself. That a density is
near to the truth does not say that it ranks anomalies well: most of (1) is decided where the rows are, and anomalies
are elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from anomalib_gen._component import Component
from anomalib_gen.calibration._wrapped import innermost


class LogLikelihood(Component):
    """Mean held-out log-density, in nats a row and in the units of X (equations 1 and 2).

    `score` of this package's detectors and of scikit-learn's densities is the same where the anomaly is the
    likelihood and nothing stands in front. This scorer adds what a pipeline's scalers take away, asks for the density
    whatever the anomaly, and refuses what has none.

    Raises
    ------
    TypeError
        When called with an estimator that is no density, or a pipeline with a step other than a linear scaler of
        each column by itself.

    Notes
    -----
    Compare only on the same rows. Rows that repeat, or lie on a grid, have no density: a narrower model is then better
    without end, and what decides is the smallest width that a model allows itself (`FlowDetector` spreads gridded
    columns over their cells, scikit-learn's mixtures have `reg_covar`). `VAEDetector` estimates from below, and
    `EnergyDetector` needs its constant.

    Where all candidates stand behind the same transformer, whatever it is, scores compare without equation 2: leave
    ``scoring=None``.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.mixture import GaussianMixture
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import MinMaxScaler
    >>> from anomalib_gen.selection import LogLikelihood
    >>> X = np.random.default_rng(0).normal(size=(400, 2)) * [1.0, 100.0]
    >>> bare = GaussianMixture(reg_covar=0).fit(X[:200])
    >>> scaled = make_pipeline(MinMaxScaler(), GaussianMixture(reg_covar=0)).fit(X[:200])
    >>> round(bare.score(X[200:]), 2), round(scaled.score(X[200:]), 2)
    (-7.46, 0.84)
    >>> [round(LogLikelihood()(one, X[200:]), 2) for one in (bare, scaled)]
    [-7.46, -7.46]
    """

    def __call__(self, estimator: Any, X: Any, y: Any = None) -> float:
        """Judge a fitted density.

        Parameters
        ----------
        estimator : fitted estimator
            A detector with `log_prob`, scikit-learn's `GaussianMixture`, `BayesianGaussianMixture` or
            `KernelDensity`, or a pipeline of linear scalers that ends in one.
        X : array-like or data frame of shape (n_samples, n_features)
            Normal rows that it was not fitted to.
        y : ignored
            For scikit-learn's conventions.

        Returns
        -------
        float
            In nats a row.

        Raises
        ------
        TypeError
            If it has no density in the units of X.
        """
        check_is_fitted(estimator)
        log_det, inner = 0.0, estimator
        while True:
            if isinstance(inner, Pipeline):
                front, inner = inner[:-1], inner.steps[-1][1]
                if len(front):
                    log_det += _log_det(front)
                    X = front.transform(X)
            elif innermost(inner) is not inner:
                inner = inner.best_estimator_ if hasattr(inner, "best_estimator_") else inner.estimator
            else:
                return float(np.mean(_log_prob(inner, X))) + log_det


def _log_det(scaler: Any) -> float:
    """Logarithm of the volume that a linear scaler gives to a unit of its input (equation 2)."""
    # Not at the top: importing some of these draws from global random generators.
    from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

    if isinstance(scaler, Pipeline):
        return sum(_log_det(step) for _, step in scaler.steps)
    if scaler is None or scaler == "passthrough":
        return 0.0
    clips = getattr(scaler, "clip", False)  # of MaxAbsScaler since scikit-learn 1.8
    if isinstance(scaler, MinMaxScaler) and not clips:
        return float(np.log(scaler.scale_).sum())
    if isinstance(scaler, StandardScaler | RobustScaler | MaxAbsScaler) and not clips:
        return 0.0 if scaler.scale_ is None else -float(np.log(scaler.scale_).sum())
    raise TypeError(
        f"What {type(scaler).__name__} does to a density is not known here, so likelihoods behind it are not in the "
        "units of X. Where it is the same for all candidates leave scoring=None; else compare on transformed rows."
    )


def _log_prob(detector: Any, X: Any) -> npt.NDArray[np.float64]:
    if hasattr(detector, "log_prob"):
        return np.asarray(detector.log_prob(X), dtype=np.float64)
    from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
    from sklearn.neighbors import KernelDensity

    if isinstance(detector, BayesianGaussianMixture | GaussianMixture | KernelDensity):
        return np.asarray(detector.score_samples(X), dtype=np.float64)
    raise TypeError(
        f"{type(detector).__name__} has no density, so likelihoods say nothing about it. Use MassVolume or "
        "ColumnReplacement, which compare scores of any kind."
    )
