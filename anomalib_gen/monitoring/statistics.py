r"""How far two samples are apart, and whether that could be chance.

Let F and G be the distribution functions of a reference of n values and a batch of m, p_k and q_k their shares in
bins.

*Kolmogorov and Smirnov*: D = sup |F - G|, the largest difference of the shares below any value. Where nothing has
changed, P(D >= d) is a count of the ways to part n + m values, up to 65,536 pairs of them. Of more it is about that of
one sample of n m / (n + m) values (scipy's `kstwo`), and the exact one up to 1.1 times as large at .01, and 1.2 times
at .0001; for ten values on either side it would be 2 and 11 times. Ties, and references of which only some order
statistics are kept, make it smaller. Of categories the like is the total variation sum_k |p_k - q_k| / 2, the largest
difference of the shares of any set of categories.

*Population stability index* (Siddiqi 2006): sum_k (q_k - p_k) log(q_k / p_k), the symmetrised Kullback-Leibler
divergence, over the reference's deciles; half a row is added to each bin. Where nothing has changed, n m / (n + m)
times it is about chi-squared with a degree of freedom fewer than bins (Yurdakul and Naranjo 2020).

*Wasserstein*: int |F^-1(u) - G^-1(u)| du, the mean distance by which values have moved, here over u from 0.01 to 0.99
(the mean of a heavy tail is noise) and in standard deviations, by the interquartile range of a normal distribution. A
shift of d standard deviations gives d.

For a normal column that moves by half a standard deviation these are 0.20, 0.24 and 0.50; of one whose standard
deviation grows by half they are 0.10, 0.19 and 0.38.

*Energy distance* (Szekely and Rizzo 2013): 2 E|X - Y| - E|X - X'| - E|Y - Y'| = 2 int (F - G)^2, of a detector's
scores. With the score as the one direction to look in, it sees every change that matters to the model, changes of
the relation between columns included, and none that leave the distribution of scores alone. Log-densities of anomalies
know no bounds, and one of them would outweigh all other rows; so values are cut at five interquartile ranges of both
samples together. Its p-value comes from permuting rows between the samples, and is exact for every n and m.

*Chi-squared* tests of categories pool those with fewer than five expected rows.

*Categories never seen*: of the next row the probability to have a new one is about f_1 / n, where f_1 categories were
seen once (Good 1953). As f_1 is itself a count, the p-value is beta-binomial: the probability is taken to be
Beta(f_1 + 1, n - f_1) distributed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from anomalib_gen.monitoring.distribution import Distribution

TRIM = 0.01
"""Share of either end that the Wasserstein distance leaves out."""
LEVELS = TRIM + (1 - 2 * TRIM) * (np.arange(512) + 0.5) / 512
IQR_OF_NORMAL = 1.3489795
"""Interquartile range of a standard normal distribution."""
CUT = 5
"""Interquartile ranges at which values of the energy test are cut."""
PERMUTED_VALUES = 2**22
EXACT_PAIRS = 2**16
"""Pairs of values of reference and batch up to which the p-value of Kolmogorov and Smirnov's test is exact."""


def ks_test(reference: Distribution, batch: Distribution) -> tuple[float, float]:
    """Largest difference of two distribution functions, and its p-value, approximate where there are many values.

    Parameters
    ----------
    reference, batch : Distribution

    Returns
    -------
    distance : float
        0 if either is empty.
    p_value : float
        1 if either is empty.
    """
    if not reference.n or not batch.n:
        return 0.0, 1.0
    x = np.union1d(reference.values, batch.values)
    distance = float(np.abs(reference.cdf(x) - batch.cdf(x)).max())
    pairs = int(reference.counts.sum()) * int(batch.counts.sum())
    if reference.resolution == batch.resolution == 0 and pairs <= EXACT_PAIRS:
        return distance, float(stats.ks_2samp(reference.sample(), batch.sample(), method="exact").pvalue)
    sure = max(0.0, distance - reference.resolution - batch.resolution)
    n = reference.n * batch.n / (reference.n + batch.n)
    p = float(stats.kstwo.sf(sure, max(1, round(n)))) if sure > 0 else 1.0
    return distance, min(1.0, max(p, np.finfo(np.float64).tiny))


def bin_edges(reference: Distribution, n_bins: int = 10) -> npt.NDArray[np.float64]:
    """Inner edges of bins that are equally full; values of more than a bin get one of their own.

    Parameters
    ----------
    reference : Distribution
    n_bins : int, default=10

    Returns
    -------
    ndarray
        Bins are closed on the right.
    """
    if not len(reference.values):
        return np.empty(0)
    edges = np.unique(reference.quantile(np.arange(1, n_bins) / n_bins))
    heavy = reference.values[reference.counts > reference.counts.sum() / n_bins]
    return np.unique(np.concatenate([edges, heavy, np.nextafter(heavy, -np.inf)]))


def psi(p: Any, q: Any, n: int, m: int) -> float:
    """Population stability index of two lists of shares.

    Parameters
    ----------
    p, q : array-like of shape (n_bins,)
        Shares of reference and batch.
    n, m : int
        Rows of each.

    Returns
    -------
    float
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if not n or not m:
        return 0.0
    p, q = ((share * size + 0.5) / (size + 0.5 * len(share)) for share, size in ((p, n), (q, m)))
    return float(((q - p) * np.log(q / p)).sum())


def psi_of(reference: Distribution, batch: Distribution, n_bins: int = 10) -> float:
    """Population stability index of two distributions, over bins that hold the same share of the reference.

    Parameters
    ----------
    reference, batch : Distribution
    n_bins : int, default=10

    Returns
    -------
    float
    """
    edges = bin_edges(reference, n_bins)
    p, q = (
        np.diff(np.concatenate([[0.0], part.cdf(edges), [float(part.n > 0)]])) for part in (reference, batch)
    )
    return psi(p, q, reference.n, batch.n)


def spread(distribution: Distribution) -> float | None:
    """Scale of a distribution: its interquartile range, in standard deviations of a normal distribution.

    Parameters
    ----------
    distribution : Distribution

    Returns
    -------
    float or None
        The standard deviation, without the outer hundredths, where half of the values are the same; None where all
        are.
    """
    if not len(distribution.values):
        return None
    low, high = distribution.quantile([0.25, 0.75])
    if high > low:
        return float(high - low) / IQR_OF_NORMAL
    deviation = float(distribution.quantile(LEVELS).std())
    return deviation if deviation > 0 else None


def wasserstein(reference: Distribution, batch: Distribution) -> float | None:
    """Mean distance between the quantiles of two distributions, in spreads of the reference.

    Parameters
    ----------
    reference, batch : Distribution

    Returns
    -------
    float or None
        None where the reference has no spread, or either is empty.
    """
    scale = spread(reference)
    if scale is None or not len(batch.values):
        return None
    return float(np.abs(batch.quantile(LEVELS) - reference.quantile(LEVELS)).mean()) / scale


def energy_test(
    x: Any, y: Any, *, n_permutations: int = 1999, max_rows: int = 1000, random_state: int = 0
) -> tuple[float, float]:
    """Energy distance between two samples, and its permutation p-value.

    Parameters
    ----------
    x, y : array-like of shape (n,), (m,)
        Scores.
    n_permutations : int, default=1999
        The smallest p-value is one by so many and one.
    max_rows : int, default=1000
        Of either sample; of more, so many are drawn.
    random_state : int, default=0

    Returns
    -------
    inhomogeneity : float
        The energy distance divided by ``2 E|X - Y|``: 0 for equal samples, 1 for two that are each in one point.
    p_value : float
        1 if either sample is empty.

    References
    ----------
    .. [1] Szekely, G. J., Rizzo, M. L. (2013). Energy statistics: a class of statistics based on distances. Journal of
       Statistical Planning and Inference, 143(8).
    """
    random = np.random.default_rng(random_state)
    x, y = (_draw(np.asarray(part, dtype=np.float64), max_rows, random) for part in (x, y))
    n, m = len(x), len(y)
    if not n or not m:
        return 0.0, 1.0
    pooled = np.concatenate([x, y])
    low, middle, high = np.quantile(pooled, [0.25, 0.5, 0.75])
    scale = high - low
    if not scale > 0:
        scale = float(np.abs(pooled - middle).mean())
        if not scale > 0:
            return 0.0, 1.0
    z = np.clip((pooled - middle) / scale, -CUT, CUT)
    order = np.argsort(z, kind="stable")
    gaps = np.diff(z[order])
    place = np.arange(1, n + m)

    def distance(is_x: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Energy distances, of rows ``(..., n + m)`` in the order of z."""
        below = np.cumsum(is_x[..., :-1], axis=-1, dtype=np.float64)
        result: npt.NDArray[np.float64] = 2 * (((below / n - (place - below) / m) ** 2) @ gaps)
        return result

    mine = order < n
    found = float(distance(mine))
    if found <= 0:
        return 0.0, 1.0
    beyond, left = 0, n_permutations
    while left:
        count = min(left, max(1, PERMUTED_VALUES // (n + m)))
        shuffled = random.permuted(np.broadcast_to(mine, (count, n + m)), axis=1)
        beyond += int((distance(shuffled) >= found * (1 - 1e-12)).sum())
        left -= count
    # 2 E|X - Y|, from E|X - Y| = int F (1 - G) + G (1 - F).
    F = np.cumsum(mine[:-1]) / n
    G = (place - np.cumsum(mine[:-1])) / m
    between = 2 * float((F * (1 - G) + G * (1 - F)) @ gaps)
    return found / between, (1 + beyond) / (1 + n_permutations)


def _draw(
    values: npt.NDArray[np.float64], count: int, random: np.random.Generator
) -> npt.NDArray[np.float64]:
    values = values[np.isfinite(values)]
    return values if len(values) <= count else random.choice(values, count, replace=False, shuffle=False)


def categories_test(p_counts: Any, q_counts: Any) -> tuple[float, float, float]:
    """Compare the counts of the same categories in reference and batch.

    Parameters
    ----------
    p_counts, q_counts : array-like of shape (n_categories,)

    Returns
    -------
    distance : float
        Total variation.
    index : float
        Population stability index.
    p_value : float
        Chi-squared.
    """
    table = np.array([p_counts, q_counts], dtype=np.float64).reshape(2, -1)
    n, m = table.sum(axis=1)
    if not n or not m:
        return 0.0, 0.0, 1.0
    p, q = table[0] / n, table[1] / m
    distance, index = float(np.abs(p - q).sum() / 2), psi(p, q, int(n), int(m))
    rare = table.sum(axis=0) * min(n, m) / (n + m) < 5
    pooled = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)]) if rare.any() else table
    pooled = pooled[:, pooled.sum(axis=0) > 0]
    if pooled.shape[1] < 2:
        return distance, index, 1.0
    return distance, index, float(stats.chi2_contingency(pooled, correction=False).pvalue)


def shares_test(k: int, n: int, j: int, m: int) -> float:
    """p-value of two shares k / n and j / m being those of one probability, by Fisher's exact test.

    Parameters
    ----------
    k, n : int
        Rows of the reference: those in question, and all.
    j, m : int
        Of the batch.

    Returns
    -------
    float
        Two-sided; a chi-squared p-value where all four counts are above 1000.
    """
    if not n or not m:
        return 1.0
    table = [[k, n - k], [j, m - j]]
    if min(map(min, table)) > 1000:
        return float(stats.chi2_contingency(table, correction=False).pvalue)
    return min(1.0, float(stats.fisher_exact(table).pvalue))


def unseen_test(n_singletons: int, n: int, unseen: int, m: int) -> float:
    """p-value of so many rows with categories that the reference does not have.

    Parameters
    ----------
    n_singletons, n : int
        Categories that were seen once in the reference, and its rows.
    unseen, m : int
        Rows of the batch with new categories, and all.

    Returns
    -------
    float
    """
    if not unseen or not m:
        return 1.0
    return float(stats.betabinom.sf(unseen - 1, m, n_singletons + 1, max(n - n_singletons, 1)))
