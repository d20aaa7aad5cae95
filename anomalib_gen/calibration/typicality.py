r"""Does a batch of rows look normal as a whole?

The typicality test (Nalisnick et al. 2019, arXiv:1906.02994, section 3 and algorithm 1) asks of a *batch* of M rows
whether it could come from the model's data. In many dimensions the mean of -log p over rows of the data is close to
the entropy H, so the statistic is

    e = | 1/M sum_m -log p(x_m) - H |,

and its distribution under the null is estimated from batches of M rows drawn, with replacement, from N normal rows
that the model has not been trained on. H is itself an estimate from those rows; so each resampled batch is compared
with an H of its own, drawn from the normal distribution of that estimate. The deviation of -log p over the rows is an
estimate too, as in Student's test; so the difference is multiplied by sqrt((N - 1) / chi2), with a chi2 of N - 1
degrees of freedom, and in it the part of the resampled batch by sqrt(N / (N - 1)), by which resampling falls short.
(The paper compares with one H, and takes the rows for all there is; with few normal rows that test rejects too often.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.utils import check_random_state

from anomalib_gen._runtime import check_count, row_blocks

RESAMPLED_VALUES = 2**22
"""Values drawn at once by the bootstrap."""


class TypicalityResult(NamedTuple):
    """Outcome of `typicality_test`.

    Attributes
    ----------
    statistic : float
        Distance, in nats a row, of the batch's mean log-density from the entropy.
    pvalue : float
        Share of the resampled normal batches at least as far away, the batch itself counted in.
    entropy : float
        Mean of minus the log-density over the reference rows, in nats.
    """

    statistic: float
    pvalue: float
    entropy: float


def typicality_test(
    detector: Any, X: Any, X_reference: Any, *, n_resamples: int = 9999, random_state: Any = None
) -> TypicalityResult:
    """Test whether a batch of rows is typical for a detector's density.

    Parameters
    ----------
    detector : fitted detector with `log_prob`
        A `FlowDetector`, for one.
    X : array-like of shape (n_batch, n_features)
        The batch; the test is about it as a whole.
    X_reference : array-like of shape (n_reference, n_features)
        Normal rows that the detector was not fitted to. The p-value is only as good as these are representative. With
        few of them the test finds little.
    n_resamples : int, default=9999
        Batches drawn for the null distribution; the smallest possible p-value is ``1 / (n_resamples + 1)``.
    random_state : int, RandomState instance or None, default=None

    Returns
    -------
    TypicalityResult

    Raises
    ------
    TypeError
        If the detector has no `log_prob`.
    ValueError
        If there are fewer than two reference rows, or `n_resamples` is not a positive integer.

    References
    ----------
    Nalisnick, E., Matsukawa, A., Teh, Y. W., Lakshminarayanan, B. (2019). Detecting out-of-distribution inputs to
    deep generative models using typicality. arXiv:1906.02994.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen import FlowDetector, typicality_test
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(400, 3))
    >>> detector = FlowDetector(max_iter=50, random_state=0).fit(X[:200])
    >>> at_the_mode = 0.01 * rng.normal(size=(50, 3))
    >>> typicality_test(detector, at_the_mode, X[200:], n_resamples=999, random_state=0).pvalue
    0.001
    """
    if not hasattr(detector, "log_prob"):
        raise TypeError(
            f"typicality_test needs a detector with log_prob, and {type(detector).__name__} has none. "
            "Use one that gives exact densities, such as FlowDetector."
        )
    check_count(n_resamples, "n_resamples")
    reference = -detector.log_prob(X_reference)
    if len(reference) < 2:
        raise ValueError(
            f"X_reference has {len(reference)} row; at least 2 are needed, and hundreds are better."
        )
    batch = -detector.log_prob(X)
    entropy = float(reference.mean())
    statistic = abs(float(batch.mean()) - entropy)
    random = check_random_state(random_state)
    at_least = 0
    N = len(reference)
    standard_error = float(reference.std(ddof=1)) / np.sqrt(N)
    errors = standard_error * random.normal(size=int(n_resamples))
    scales = np.sqrt((N - 1) / random.chisquare(N - 1, size=int(n_resamples)))
    for rows in row_blocks(int(n_resamples), max(1, RESAMPLED_VALUES // len(batch))):
        n = rows.stop - rows.start
        means = reference[random.randint(N, size=(n, len(batch)))].mean(axis=1)
        distances = np.abs((means - entropy) * np.sqrt(N / (N - 1)) - errors[rows]) * scales[rows]
        at_least += int((distances >= statistic).sum())
    return TypicalityResult(statistic, (1 + at_least) / (1 + int(n_resamples)), entropy)
