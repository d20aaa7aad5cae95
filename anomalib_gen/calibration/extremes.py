r"""Tails of scores beyond the data: peaks over threshold with a generalised Pareto distribution.

To flag one normal row in ten thousand from a thousand normal rows, the tail has to be continued beyond them. Whatever
the distribution of a value A (here an anomaly, higher = more abnormal), within wide conditions its excesses over a high
u tend to a generalised Pareto distribution (Balkema and de Haan 1974; Pickands 1975),

    P(A - u > y | A > u) = (1 + xi y / sigma)^(-1/xi),      y >= 0,  1 + xi y / sigma > 0,

with xi < 0 a tail that ends, xi = 0 an exponential one and xi > 0 a heavy one. With N_u of n values above u, the value
exceeded with probability q is (Siffer et al. 2017, equation 1)

    z_q = u + sigma / xi ((q n / N_u)^(-xi) - 1).

u is a compromise: too low and the limit does not hold, too high and few values are left. Above a good u the estimates
of xi and of the modified scale sigma - xi u stay level and the mean excess is linear in u (`tail_stability`); and the
excesses look like what was fitted to them (`TailFit.goodness_of_fit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats
from sklearn.utils import check_random_state

from anomalib_gen._runtime import check_count, check_share

if TYPE_CHECKING:
    import pandas as pd

MIN_EXCEEDANCES = 10
"""Fewer excesses say nothing about a tail's shape."""


class TailGoodness(NamedTuple):
    """Outcome of `TailFit.goodness_of_fit`.

    Attributes
    ----------
    statistic : float
        Anderson-Darling distance of the excesses from the fitted distribution, which weighs the tails.
    pvalue : float
        Share of samples from the fitted distribution, fitted anew, that are at least as far, the data counted in.
    """

    statistic: float
    pvalue: float


@dataclass(frozen=True)
class TailFit:
    """A generalised Pareto distribution fitted to the values above a threshold, see `fit_tail`.

    Attributes
    ----------
    threshold : float
        u, above which the tail begins.
    shape : float
        xi: negative for a tail that ends, positive for a heavy one.
    scale : float
        sigma, in the units of the values.
    covariance : ndarray of shape (2, 2)
        Of (shape, scale), asymptotic; NaN for a shape of -1/2 or less, where the theory does not hold.
    excesses : ndarray of shape (n_excesses,)
        Values above u less u, sorted.
    n_values : int
        Number of all values.
    """

    threshold: float
    shape: float
    scale: float
    covariance: npt.NDArray[np.float64]
    excesses: npt.NDArray[np.float64]
    n_values: int

    @property
    def tail_fraction(self) -> float:
        """Share of the values above the threshold, N_u / n."""
        return len(self.excesses) / self.n_values

    def sf(self, values: Any) -> npt.NDArray[np.float64]:
        """Probability of exceeding each value.

        Parameters
        ----------
        values : array-like of float
            At or above the threshold; below it the tail says nothing, and the result is NaN.

        Returns
        -------
        ndarray of float
        """
        values = np.asarray(values, dtype=np.float64)
        tail = self.tail_fraction * stats.genpareto.sf(values - self.threshold, self.shape, scale=self.scale)
        return np.where(values >= self.threshold, tail, np.nan)

    def quantile(self, rate: float) -> float:
        """Value exceeded with a small probability, z_q of the module.

        Parameters
        ----------
        rate : float
            The probability, in (0, `tail_fraction`].

        Returns
        -------
        float
        """
        return self.threshold + self._excess(rate, self.shape, self.scale)

    def interval(self, rate: float, *, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of `quantile`, by profile likelihood.

        The interval holds the values that a likelihood-ratio test does not reject (Coles 2001, chapter 4). It
        reaches farther up than down, as the uncertainty does.

        Parameters
        ----------
        rate : float
            In (0, `tail_fraction`].
        confidence : float, default=0.95

        Returns
        -------
        low, high : float
            For the uncertainty of shape and scale. Left out are that of `tail_fraction`, which is small beside it, and
            the bias of a tail that is only nearly generalised Pareto, which grows with `tail_fraction`: of 150
            intervals of 95 % for the 1/10,000 quantile from 1,000 normal values 93 % held it for 0.1, 88 % for 0.2.

        Raises
        ------
        ValueError
            If `rate` lies beyond the tail, or `confidence` is no number between 0 and 1.
        """
        check_share(confidence, "confidence")
        excess = self._excess(rate, self.shape, self.scale)
        if not excess > 0:
            return self.threshold, self.threshold
        share = rate / self.tail_fraction
        best = max(
            _log_likelihood(self.excesses, self.shape, self.scale), _profile(self.excesses, excess, share)
        )
        drop = stats.chi2.ppf(confidence, 1) / 2

        def beyond(log_factor: float) -> float:
            return best - _profile(self.excesses, excess * np.exp(log_factor), share) - drop

        ends = []
        for direction in (-1.0, 1.0):
            step = 0.1 * direction
            while beyond(step) < 0 and abs(step) < 50:
                step *= 2
            found = optimize.brentq(beyond, 0.0, step, xtol=1e-6) if abs(step) < 50 else step
            ends.append(float(self.threshold + excess * np.exp(found)))
        return ends[0], ends[1]

    def _excess(self, rate: Any, shape: float, scale: float) -> float:
        if not isinstance(rate, Real) or not 0 < float(rate) <= self.tail_fraction:
            raise ValueError(
                f"rate={rate!r} must be positive and at most {self.tail_fraction:.3g}, the share of values in the tail."
            )
        return float(stats.genpareto.isf(rate / self.tail_fraction, shape, scale=scale))

    def goodness_of_fit(self, *, n_resamples: int = 199, random_state: Any = None) -> TailGoodness:
        """Test whether the excesses come from a generalised Pareto distribution.

        Parameters
        ----------
        n_resamples : int, default=199
            Samples drawn from the fit and fitted anew (parametric bootstrap): the parameters were estimated from the
            data they are judged on, so tables of the distance do not apply.
        random_state : int, RandomState instance or None, default=None

        Returns
        -------
        TailGoodness
            A small p-value says that the threshold is too low, or that the values are rounded or mixed.
        """
        check_count(n_resamples, "n_resamples")
        random = check_random_state(random_state)
        statistic = _anderson_darling(self.excesses, self.shape, self.scale)
        at_least = 0
        for _ in range(int(n_resamples)):
            drawn = np.sort(
                stats.genpareto.rvs(
                    self.shape, scale=self.scale, size=len(self.excesses), random_state=random
                )
            )
            at_least += _anderson_darling(drawn, *_fit(drawn)) >= statistic
        return TailGoodness(statistic, (1 + at_least) / (1 + int(n_resamples)))


def fit_tail(values: Any, *, tail_fraction: float = 0.1) -> TailFit:
    """Fit a generalised Pareto distribution to the largest values, by maximum likelihood.

    Parameters
    ----------
    values : array-like of shape (n_values,)
        Of normal rows, higher = more abnormal: minus the scores.
    tail_fraction : float, default=0.1
        Share of the values that make the tail, at most all but the smallest; `tail_stability` and
        `TailFit.goodness_of_fit` judge the choice.

    Returns
    -------
    TailFit

    Raises
    ------
    ValueError
        If fewer than 10 values exceed the threshold, or one is not finite.

    References
    ----------
    .. [1] Pickands, J. (1975). Statistical inference using extreme order statistics. Annals of Statistics, 3(1).
    .. [2] Coles, S. (2001). An introduction to statistical modeling of extreme values. Springer. Chapter 4.
    .. [3] Siffer, A., Fouque, P.-A., Termier, A., Largouët, C. (2017). Anomaly detection in streams with extreme value
       theory. KDD. doi:10.1145/3097983.3098144.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen.calibration import fit_tail
    >>> values = np.random.default_rng(0).exponential(size=5000)
    >>> fit = fit_tail(values)
    >>> low, high = fit.interval(1e-5)
    >>> bool(low < -np.log(1e-5) < high)  # the truth, far beyond the largest of the values
    True
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"values must be finite and one-dimensional, got shape {values.shape}.")
    check_share(tail_fraction, "tail_fraction", with_one=True)
    values = np.sort(values)
    n_tail = max(0, min(round(tail_fraction * len(values)), len(values) - 1))
    # The largest value that is not in the tail, so that excesses are positive.
    threshold = values[-n_tail - 1] if len(values) else 0.0
    excesses = values[values > threshold] - threshold
    if n_tail < MIN_EXCEEDANCES or len(excesses) < MIN_EXCEEDANCES:
        raise ValueError(
            f"{min(n_tail, len(excesses))} of {len(values)} values make the tail; at least {MIN_EXCEEDANCES} are "
            "needed, and a hundred are better. Raise tail_fraction or give more rows."
        )
    shape, scale = _fit(excesses)
    return TailFit(
        threshold=float(threshold),
        shape=shape,
        scale=scale,
        covariance=_covariance(shape, scale, len(excesses)),
        excesses=excesses,
        n_values=len(values),
    )


def tail_stability(values: Any, *, tail_fractions: Any = None) -> pd.DataFrame:
    """Estimates of the tail over a range of thresholds, to choose one from.

    Parameters
    ----------
    values : array-like of shape (n_values,)
        Of normal rows, higher = more abnormal: minus the scores.
    tail_fractions : array-like of float or None, default=None
        Shares of the values that make the tail. None takes 12 from 0.4 down to where 30 values are left, evenly
        spaced in their logarithm.

    Returns
    -------
    DataFrame
        A row for each share, with `tail_fraction`, `threshold`, `n_excesses`, `shape` and `modified_scale`
        (scale less shape times threshold), their standard errors `shape_error` and `modified_scale_error`, and
        `mean_excess`. Take the largest tail from which on shape and modified scale stay level within their errors.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen.calibration import tail_stability
    >>> table = tail_stability(np.random.default_rng(0).exponential(size=5000), tail_fractions=[0.4, 0.1])
    >>> table[["n_excesses", "shape", "shape_error"]].round(2)
       n_excesses  shape  shape_error
    0        2000   0.01         0.02
    1         500  -0.05         0.04
    """
    import pandas as pd

    n = len(values)
    if tail_fractions is None:
        low = min(30 / max(n, 1), 0.4)
        tail_fractions = np.geomspace(0.4, low, 12)
    lines = []
    for fraction in tail_fractions:
        fit = fit_tail(values, tail_fraction=float(fraction))
        along = np.array([-fit.threshold, 1.0])
        lines.append(
            {
                "tail_fraction": fit.tail_fraction,
                "threshold": fit.threshold,
                "n_excesses": len(fit.excesses),
                "shape": fit.shape,
                "shape_error": float(np.sqrt(fit.covariance[0, 0])),
                "modified_scale": fit.scale - fit.shape * fit.threshold,
                "modified_scale_error": float(np.sqrt(along @ fit.covariance @ along)),
                "mean_excess": float(fit.excesses.mean()),
            }
        )
    return pd.DataFrame(lines)


def _fit(excesses: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Shape and scale by maximum likelihood, with the shape above -1, below which the likelihood has no maximum."""
    unit = float(excesses.mean())
    y = excesses / unit
    # Moments first: they exist for light tails, and are a good enough start for heavy ones.
    start = min(max(0.5 * (1 - 1 / max(float(y.var()), 1e-3)), -0.5), 0.5)
    largest = float(y.max())
    scale = max(1 - start, 1.01 * -start * largest)
    shape, _, scale = stats.genpareto.fit(y, start, floc=0, scale=scale, optimizer=_minimize)
    if not (shape > -1 and 0 < scale < np.inf):
        # Along shape = -1 the likelihood ends in a uniform distribution up to the largest value.
        shape, scale = -1.0, largest
    return float(shape), float(scale) * unit


def _minimize(function: Any, start: Any, args: Any = (), disp: int = 0) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = optimize.fmin(
        function, start, args=args, disp=0, xtol=1e-6, ftol=1e-8, maxiter=2000
    )
    return found


def _covariance(shape: float, scale: float, n: int) -> npt.NDArray[np.float64]:
    """Asymptotic covariance of the maximum-likelihood estimates (Smith 1984)."""
    if shape <= -0.5:
        return np.full((2, 2), np.nan)
    return (
        np.array(
            [[(1 + shape) ** 2, -scale * (1 + shape)], [-scale * (1 + shape), 2 * scale**2 * (1 + shape)]]
        )
        / n
    )


def _log_likelihood(excesses: npt.NDArray[np.float64], shape: float, scale: float) -> float:
    return float(stats.genpareto.logpdf(excesses, shape, scale=scale).sum())


def _profile(excesses: npt.NDArray[np.float64], z: float, share: float) -> float:
    """Largest log-likelihood of a shape under which `z` is exceeded with probability `share`."""
    decay = -np.log(share)
    lowest = -1.0
    if z < excesses[-1]:
        # The tail must not end before the largest excess: z / (1 - share^-shape) > largest.
        lowest = max(lowest, np.log1p(-z / excesses[-1]) / decay)

    def loss(shape: float) -> float:
        scale = z / decay if abs(shape) < 1e-9 else shape * z / np.expm1(shape * decay)
        value = -_log_likelihood(excesses, shape, scale)
        return value if np.isfinite(value) else 1e300

    return -float(optimize.minimize_scalar(loss, bounds=(lowest, 5.0), method="bounded").fun)


def _anderson_darling(excesses: npt.NDArray[np.float64], shape: float, scale: float) -> float:
    """Anderson-Darling distance of sorted excesses from a generalised Pareto distribution."""
    n = len(excesses)
    tiny = np.finfo(float).tiny
    log_cdf = np.log(np.maximum(stats.genpareto.cdf(excesses, shape, scale=scale), tiny))
    log_sf = np.log(np.maximum(stats.genpareto.sf(excesses, shape, scale=scale), tiny))
    i = np.arange(1, n + 1)
    return float(-n - ((2 * i - 1) * (log_cdf + log_sf[::-1])).mean())
