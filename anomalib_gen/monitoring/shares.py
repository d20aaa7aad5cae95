"""Reference and batch side by side, to be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anomalib_gen.monitoring.distribution import Distribution
from anomalib_gen.monitoring.summaries import Column


@dataclass(frozen=True)
class Shares:
    """Shares of reference and batch side by side, to be drawn.

    Attributes
    ----------
    labels : tuple of str
        Of categories; empty for numbers.
    edges : tuple of float
        Of bins, one more than there are bins; empty for categories. What lies beyond counts to the outer bins.
    reference, batch : tuple of float
        Shares of the values that are not missing.
    """

    labels: tuple[str, ...]
    edges: tuple[float, ...]
    reference: tuple[float, ...]
    batch: tuple[float, ...]


def side_by_side(reference: Column | Distribution, batch: Column | Distribution, n_bins: int = 20) -> Shares:
    """Shares of a column, or of scores, in the same bins or categories.

    Parameters
    ----------
    reference, batch : Column or Distribution
        Both of the same kind.
    n_bins : int, default=20
        Bins of equal width between the outer hundredths of both together; of categories the most frequent ones, and
        the others together.

    Returns
    -------
    Shares
        Without bins if both are empty.
    """
    if isinstance(reference, Column) and reference.distribution is None:
        assert isinstance(batch, Column)
        assert reference.categories is not None
        assert batch.categories is not None
        names = list(reference.categories)[:n_bins]
        pairs = []
        for part in (reference, batch):
            assert part.categories is not None
            total = sum(part.categories.values()) + part.n_other
            shares = [part.categories.get(name, 0) / max(1, total) for name in names]
            pairs.append((*shares, max(0.0, 1.0 - sum(shares)) if total else 0.0))
        return Shares((*names, "(others)"), (), pairs[0], pairs[1])
    p, q = (part.distribution if isinstance(part, Column) else part for part in (reference, batch))
    assert p is not None
    assert q is not None
    ends = [part.quantile([0.01, 0.99]) for part in (p, q) if len(part.values)]
    if not ends:
        return Shares((), (), (), ())
    low, high = float(np.min(ends)), float(np.max(ends))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, n_bins + 1)

    def shares_of(part: Distribution) -> tuple[float, ...]:
        inner = np.concatenate([[0.0], part.cdf(edges[1:-1]), [float(len(part.values) > 0)]])
        return tuple(np.diff(inner).tolist())

    return Shares((), tuple(edges.tolist()), shares_of(p), shares_of(q))
