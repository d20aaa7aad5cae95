"""What a row should have looked like: the nearest normal row, as a counterfactual.

An autoencoder sends a row to the latent space of normal rows and back; a diffusion model takes from it what noise it
finds. Either answer is a row in the units and categories of the input, to be set beside the original: where they differ
most is what was odd. It is the model's answer, and no promise that a change of those columns would have made the row
normal; so the scores of both are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_is_fitted

from anomalib_gen._inputs import as_kind_of
from anomalib_gen.explain._columns import invert, names_of, split_pipeline


@dataclass(frozen=True)
class NormalRows:
    """Rows beside the normal rows nearest to them, see `nearest_normal_rows`.

    Attributes
    ----------
    rows : array or data frame of shape (n_rows, n_columns)
        The nearest normal rows, of the kind (a data frame of the same library), units and order of X.
    score_before, score_after : ndarray of shape (n_rows,)
        `score_samples` of X and of `rows`, lower = more abnormal.
    feature_names : list of str
        Names of the columns.
    """

    rows: Any
    score_before: npt.NDArray[np.float64]
    score_after: npt.NDArray[np.float64]
    feature_names: list[str]


def nearest_normal_rows(detector: Any, X: Any, **options: Any) -> NormalRows:
    """Ask a model for the normal rows nearest to given ones.

    Parameters
    ----------
    detector : fitted detector
        A `VAEDetector` or `DiffusionDetector`, or a pipeline that ends in one and whose transformers have inverses.
    X : array-like or data frame of shape (n_rows, n_columns), or images (n_rows, channels, height, width)
    **options : dict
        Passed to the detector's `reconstruct`; for a diffusion model ``noise`` says how much of a row may be replaced.

    Returns
    -------
    NormalRows

    Raises
    ------
    TypeError
        If the detector reconstructs no rows.
    ValueError
        If a transformer has no inverse.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen import VAEDetector
    >>> from anomalib_gen.explain import nearest_normal_rows
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(300, 1)) * [1.0, 2.0, -1.0] + 0.1 * rng.normal(size=(300, 3))
    >>> detector = VAEDetector(n_components=1, max_iter=300, random_state=0).fit(X)
    >>> found = nearest_normal_rows(detector, [[1.0, 2.0, 1.0]])
    >>> bool(found.score_after[0] > found.score_before[0])
    True
    """
    check_is_fitted(detector)
    front, inner = split_pipeline(detector)
    if not hasattr(inner, "reconstruct"):
        raise TypeError(
            f"{type(inner).__name__} reconstructs no rows. Use a VAEDetector or a DiffusionDetector."
        )
    Z = X if front is None else front.transform(X)
    reconstructed = inner.reconstruct(Z, **options)
    if getattr(inner, "_eight_bit", False):
        # Whole numbers again, as the images that the detector was fitted on.
        reconstructed = np.clip(np.rint(reconstructed), 0, 255).astype(np.uint8)
    rows = as_kind_of(invert(front, reconstructed, X), X)
    return NormalRows(
        rows=rows,
        score_before=detector.score_samples(X),
        score_after=detector.score_samples(rows),
        feature_names=names_of(X, detector),
    )
