r"""Replaced columns: does a row look more normal than itself with one value exchanged?

Let X' be a row X whose column J, chosen at random, has another value X'_J ~ q_J. A detector orders the pair right with
probability

    C(s) = P(s(X) > s(X')) + P(s(X) = s(X')) / 2.                                                               (1)

Given J and the other columns, the one member of the pair has the density p(x_J | x_{-J}) and the other q_J(x_J), so by
the lemma of Neyman and Pearson (1) is at most what an increasing function of p(x_J | x_{-J}) / q_J(x_J) attains.

- With q_J uniform over the column's range, that is p(x_J | x_{-J}), and p(x) = p(x_J | x_{-J}) p(x_{-J}) is such a
  function for every J at once: no detector does better than one that ranks rows as their density does. As in pseudo-
  likelihood (Besag 1975) and ratio matching (Hyvärinen 2007), which compare a row with its neighbours in one column, no
  constant of the density is needed, and no volume is empty however many the columns.
- With q_J the column's own distribution (the value of another row), it is p(x_J | x_{-J}) / p(x_J): what counts is
  whether the values of a row belong together, and a density is not best where the columns are independent.

For a Gaussian with conditional deviation t_j, and the uniform distribution over [-a, a] far beyond it,

    C(p) = 1 - sqrt(2 / pi) t_j / a.                                                                            (2)

Anomalies of many columns at once, small in each, are not what is asked for here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from anomalib_gen._runtime import check_count
from anomalib_gen.selection._scorer import Scorer, as_table, column_of, draw_uniform, varies, with_columns

REFERENCES = ("uniform", "marginal")


class ColumnReplacement(Scorer):
    """How often a detector finds a row more normal than the same row with one value replaced (equation 1).

    Parameters
    ----------
    reference : {"uniform", "marginal"}, default="uniform"
        Where the new value comes from: uniform over the column's range (or categories), for which the density is the
        best ranking, or from another row of X, for which only the relations between columns count.
    n_repeats : int, default=5
        Replacements of each row.
    score_direction : {"auto", "normal", "abnormal"}, default="auto"
        What a high score of the estimator means, as in `anomalib_gen.calibration.SplitConformalDetector`.
    random_state : int, RandomState instance or None, default=0
        Chooses columns and values. An int judges all candidates on the same ones.

    See Also
    --------
    MassVolume : Compares rows with points that are uniform in all columns, for few columns.

    Notes
    -----
    The score lies between 0 and 1, .5 being chance. Columns with one value are never replaced. Replaced
    rows of ``"marginal"`` are the same in whatever units, or after logarithms, and no far row widens a range; on the 25
    tables of ``benchmarks/results/label-free-selection.md`` it chose better than ``"uniform"``, which is one set of
    tables. What a detector is worth against anomalies of another kind the score does not say.

    References
    ----------
    .. [1] Besag, J. (1975). Statistical analysis of non-lattice data. The Statistician, 24(3).
    .. [2] Hyvärinen, A. (2007). Some extensions of score matching. Computational Statistics and Data Analysis, 51(5).

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.ensemble import IsolationForest
    >>> from sklearn.mixture import GaussianMixture
    >>> from sklearn.model_selection import cross_val_score
    >>> from anomalib_gen.selection import ColumnReplacement
    >>> X = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.95], [0.95, 1]], size=400)
    >>> for detector in (GaussianMixture(), IsolationForest(random_state=0)):
    ...     print(cross_val_score(detector, X, scoring=ColumnReplacement(), cv=2).mean().round(2))
    0.94
    0.9
    """

    def __init__(
        self,
        *,
        reference: str = "uniform",
        n_repeats: int = 5,
        score_direction: str = "auto",
        random_state: Any = 0,
    ) -> None:
        self.reference = reference
        self.n_repeats = n_repeats
        self.score_direction = score_direction
        self.random_state = random_state

    def __call__(self, estimator: Any, X: Any, y: Any = None) -> float:
        """Judge a fitted detector.

        Parameters
        ----------
        estimator : fitted detector
            Of this package, of scikit-learn or of pyod, or a pipeline that ends in one.
        X : array-like or data frame of shape (n_samples, n_features)
            Normal rows that it was not fitted to.
        y : ignored
            For scikit-learn's conventions.

        Returns
        -------
        float
            Between 0 and 1, higher = better.

        Raises
        ------
        ValueError
            If X is no table, or has no column of two values.
        """
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be 'uniform' or 'marginal', got {self.reference!r}.")
        check_count(self.n_repeats, "n_repeats")
        rows = as_table(X, type(self).__name__)
        random = check_random_state(self.random_state)
        n = len(rows)
        columns = [column_of(rows, j) for j in range(rows.shape[1])]
        usable = [j for j, values in enumerate(columns) if varies(values)]
        if not usable:
            raise ValueError(
                f"All of the {len(columns)} columns of X are constant: no value can be replaced."
            )
        own = self._scores(estimator, rows)
        right = 0.0
        for _ in range(self.n_repeats):
            chosen = random.choice(usable, size=n)
            changed = [values.copy() for values in columns]
            for j in usable:
                at = np.flatnonzero(chosen == j)
                if self.reference == "uniform":
                    changed[j][at] = draw_uniform(rows, j, len(at), random)
                else:
                    # Never of the row itself: the next ones, cyclically, by a random distance.
                    changed[j][at] = columns[j][(at + random.randint(1, n, size=len(at))) % n]
            other = self._scores(estimator, with_columns(rows, changed))
            right += float(np.mean((own > other) + 0.5 * (own == other)))
        return right / self.n_repeats
