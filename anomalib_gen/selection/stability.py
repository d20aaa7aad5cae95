r"""Agreement of rankings: of a detector with itself on other rows, and of candidates with one another.

Ranks are compared where decisions are made, among the most abnormal rows. With rank 1 for the most abnormal of n, the
Savage score

    S_i = sum_{j >= r_i} 1 / j                                                                                  (1)

weighs the first ranks most (its mean is 1), and the correlation of the Savage scores of two rankings is their top-down
correlation (Iman and Conover 1987): 1 for the same ranking, 0 on average for unrelated ones.

*Stability* is this correlation between a detector and one fitted to other rows, over rows that neither has seen
(Perini, Galvin and Vercruyssen 2020 measure the spread of ranks over such fits instead). An unstable ranking cannot be
trusted; a stable one may be stably wrong, and a detector that learns nothing is perfectly stable.

*Centrality* of a candidate is its mean correlation with the others (ModelCentrality, Lin et al. 2020; for detectors Ma
et al. 2023): where most candidates are right in their own ways, the one in the middle has least of any one's mistakes.
Where most are wrong alike, it is wrong with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.utils import _safe_indexing, check_random_state, indexable
from sklearn.utils.validation import _num_samples

from anomalib_gen._runtime import check_count
from anomalib_gen.selection._scorer import Scorer, refit


class RankStability(Scorer):
    """Top-down correlation of a detector's ranking with that of detectors fitted to other rows.

    Parameters
    ----------
    n_fits : int, default=5
        Random halves of the rows given: a clone is fitted to the one half, and the other is ranked by both.
    score_direction : {"auto", "normal", "abnormal"}, default="auto"
        What a high score of the estimator means, as in `anomalib_gen.calibration.SplitConformalDetector`.
    random_state : int, RandomState instance or None, default=0
        Draws the halves, and seeds the clones where their own random states are None.

    See Also
    --------
    model_centrality : Agreement with other candidates instead.

    Notes
    -----
    This is about variance alone: a detector that learns nothing has the best score. Use it to reject candidates,
    not to choose among them: on 25 tables the most stable of twelve was worse than one taken at random
    (``benchmarks/results/label-free-selection.md``). Clones are fitted to fewer rows than the estimator, so the score
    falls short of the stability at full size.

    References
    ----------
    .. [1] Iman, R. L., Conover, W. J. (1987). A measure of top-down correlation. Technometrics, 29(3).
    .. [2] Perini, L., Galvin, C., Vercruyssen, V. (2020). A ranking stability measure for quantifying the robustness of
       anomaly detection methods. Workshop on evaluation and experimental design, ECML PKDD.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.ensemble import IsolationForest
    >>> from sklearn.model_selection import cross_val_score
    >>> from anomalib_gen.selection import RankStability
    >>> X = np.random.default_rng(0).normal(size=(400, 5))
    >>> for n in (5, 200):
    ...     forest = IsolationForest(n_estimators=n, random_state=0)
    ...     print(cross_val_score(forest, X, scoring=RankStability(), cv=2).mean().round(2))
    0.57
    0.92
    """

    def __init__(self, *, n_fits: int = 5, score_direction: str = "auto", random_state: Any = 0) -> None:
        self.n_fits = n_fits
        self.score_direction = score_direction
        self.random_state = random_state

    def __call__(self, estimator: Any, X: Any, y: Any = None) -> float:
        """Judge a fitted detector.

        Parameters
        ----------
        estimator : fitted detector
            Of this package, of scikit-learn or of pyod, or a pipeline that ends in one.
        X : array-like or data frame of shape (n_samples, n_features)
            Rows that it was not fitted to.
        y : ignored
            For scikit-learn's conventions.

        Returns
        -------
        float
            At most 1, higher = better.

        Raises
        ------
        ValueError
            If there are fewer than four rows, or the estimator is frozen.
        """
        check_count(self.n_fits, "n_fits")
        (X,) = indexable(X)
        n = _num_samples(X)
        if n < 4:
            raise ValueError(f"n_samples={n}, but at least 4 rows are needed: some to fit, some to rank.")
        random = check_random_state(self.random_state)
        own = self._scores(estimator, X)
        found = []
        for _ in range(self.n_fits):
            order = random.permutation(n)
            train, judged = order[: n // 2], order[n // 2 :]
            fitted = refit(estimator, _safe_indexing(X, np.sort(train)), random)
            found.append(_agreement(own[judged], self._scores(fitted, _safe_indexing(X, judged))))
        return float(np.mean(found))


def model_centrality(scores: Any) -> npt.NDArray[np.float64]:
    """Mean agreement of each candidate's ranking with those of the others.

    Parameters
    ----------
    scores : array-like of shape (n_candidates, n_rows)
        Scores of the same rows by each candidate, lower = more abnormal; of rows that none was fitted to, for instance
        from `sklearn.model_selection.cross_val_predict` with ``method="decision_function"``.

    Returns
    -------
    ndarray of shape (n_candidates,)
        Mean top-down correlations, at most 1; the candidate with the largest is the most central.

    Raises
    ------
    ValueError
        If there are fewer than two candidates or rows, or a score is NaN.

    References
    ----------
    .. [1] Lin, Z., Thekumparampil, K., Fanti, G., Oh, S. (2020). InfoGAN-CR and ModelCentrality: self-supervised model
       training and selection for disentangling GANs. ICML. arXiv:1906.06034.
    .. [2] Ma, M. Q., Zhao, Y., Zhang, X., Akoglu, L. (2023). The need for unsupervised outlier model selection: a
       review and evaluation of internal evaluation strategies. SIGKDD Explorations, 25(1). arXiv:2104.01422.

    Examples
    --------
    >>> from anomalib_gen.selection import model_centrality
    >>> model_centrality([[1, 2, 3, 4], [1, 2, 4, 3], [4, 3, 2, 1]]).round(2)
    array([ 0.03,  0.12, -0.8 ])
    """
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim != 2 or min(s.shape) < 2:
        raise ValueError(
            f"scores must have the shape (n_candidates, n_rows) with at least two of each, got {s.shape}."
        )
    if np.isnan(s).any():
        raise ValueError(
            f"scores must not be NaN, and candidate {int(np.isnan(s).any(axis=1).argmax())} has some."
        )
    savage = np.array([_savage(row) for row in s])
    agreement = savage @ savage.T
    result: npt.NDArray[np.float64] = (agreement.sum(axis=1) - agreement.diagonal()) / (len(s) - 1)
    return result


def _agreement(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Top-down correlation of two rankings; 0 where one of them ranks nothing."""
    return float(_savage(a) @ _savage(b))


def _savage(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Savage scores (equation 1), centred and of length one; rows with equal scores share their mean."""
    n = len(scores)
    tails = np.cumsum(1 / np.arange(n, 0, -1))[::-1]  # of the ranks 1 ... n
    mean_up_to = np.concatenate([[0.0], np.cumsum(tails)])
    first = rankdata(scores, method="min").astype(np.int64) - 1
    last = rankdata(scores, method="max").astype(np.int64)
    values = (mean_up_to[last] - mean_up_to[first]) / (last - first)
    centred: npt.NDArray[np.float64] = values - values.mean()
    length = float(np.linalg.norm(centred))
    return centred / length if length > 1e-9 * np.sqrt(n) else np.zeros(n)
