r"""Which columns make a row anomalous: one number for each row and column.

Four ways, by what a detector knows; each says what its numbers add up to.

*Path-integrated gradients* (Sundararajan et al. 2017), for any differentiable energy E and a path x(t) from a baseline
row x' to the row x,

    phi_j = int_0^1 dE/dx_j (x(t)) x_j'(t) dt,          sum_j phi_j = E(x) - E(x').                          (1)

The path is straight in standardised units whose tails beyond five deviations are compressed (networks.tails): a row at
1e6 deviations would else spend its whole path where nothing happens. With several baseline rows their contributions
are averaged. The integral is taken by Gauss-Legendre panels, made finer until (1) holds within a hundredth; what is
left is shared out in proportion to the contributions' sizes, so that (1) holds.

*Score components*, where the anomaly is the mean norm of scores g(x, s_k) over noise levels,

    phi_j = 1/K sum_k g_j(x, s_k)^2 / |g(x, s_k)|,      sum_j phi_j = a(x) = 1/K sum_k |g(x, s_k)|.           (2)

*Reconstruction residuals*, where the anomaly is the distance to a reconstruction r(x) in standardised units,

    phi_j = (x_j - r_j(x))^2 / D,                       sum_j phi_j = mean squared residual.                  (3)

*Conditional surprise*, for an autoregressive flow u = f(x) with a triangular Jacobian (one layer),

    phi_j = -log p(x_j | x_1 ... x_{j-1}) = u_j^2 / 2 + log(2 pi) / 2 - log |du_j / dx_j|,
                                                        sum_j phi_j = -log p(x).                              (4)

(1) asks what moved the energy away from a normal row, and is shared out fairly between columns that interact; (4) is
exact and needs no baseline, but surprise falls on whichever of two contradicting columns comes later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted

from anomalib_gen import _runtime
from anomalib_gen._warnings import warn_user
from anomalib_gen.anomaly import (
    ClosedFormResidual,
    CombinedAnomaly,
    DenoisingError,
    DiffusionReconstruction,
    ReconstructionError,
    ScoreNorm,
)
from anomalib_gen.anomaly._levels import level_ladder
from anomalib_gen.explain._columns import gather, names_of, sources, split_pipeline
from anomalib_gen.networks import TAIL_START, compress_tails, expand_tails

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("integrated-gradients", "score", "reconstruction", "conditional")
RESIDUALS = (
    ClosedFormResidual,
    CombinedAnomaly,
    DenoisingError,
    DiffusionReconstruction,
    ReconstructionError,
)
"""Anomalies that are distances to what a model makes of a row, or are led by such distances."""
NODES = 8
"""Gauss-Legendre nodes of a panel of the path."""
MAX_PANELS = 128
TOLERANCE = 1e-2
"""Share of the difference of energies (or of a nat, if that is more) that the integral may miss."""


@dataclass(frozen=True)
class FeatureContributions:
    """Contributions of columns to the anomaly of rows, see `feature_contributions`.

    Attributes
    ----------
    values : ndarray of shape (n_rows, n_columns)
        Positive where a column makes its row more anomalous.
    anomaly : ndarray of shape (n_rows,)
        What is explained, higher = more anomalous: the energy, or minus `score_samples`.
    baseline : ndarray of shape (n_rows,)
        What the contributions start from: ``baseline + values.sum(axis=1)`` is `anomaly`.
    feature_names : list of str
        Names of the columns.
    method : str
        How they were found.
    data : ndarray of shape (n_rows, n_columns)
        The rows themselves, in their own units.
    index : pandas.Index or None
        That of the rows, if they came in a data frame of pandas.
    """

    values: npt.NDArray[np.float64]
    anomaly: npt.NDArray[np.float64]
    baseline: npt.NDArray[np.float64]
    feature_names: list[str]
    method: str
    data: npt.NDArray[Any]
    index: pd.Index | None = None

    def to_frame(self) -> pd.DataFrame:
        """Contributions as a data frame.

        Returns
        -------
        DataFrame
            A row for each row, a column for each column; with the index of the rows, where they had one.
        """
        import pandas as pd

        return pd.DataFrame(self.values, index=self.index, columns=self.feature_names)

    def top(self, n: int = 3) -> list[list[tuple[str, Any, float]]]:
        """Columns that contribute most.

        Parameters
        ----------
        n : int, default=3
            Columns for each row.

        Returns
        -------
        list of list of (name, value, contribution)
            For each row, largest contribution first.
        """
        _runtime.check_count(n, "n")
        order = np.argsort(-self.values, axis=1, kind="stable")[:, :n]
        return [
            [(self.feature_names[j], self.data[i, j], float(self.values[i, j])) for j in columns]
            for i, columns in enumerate(order)
        ]


@_runtime.within_quota()
@torch.inference_mode(False)  # paths have gradients, also within a caller's inference_mode
def feature_contributions(
    detector: Any,
    X: Any,
    *,
    method: str = "auto",
    background: Any = None,
    n_baselines: int = 10,
) -> FeatureContributions:
    """Explain the anomaly of rows by contributions of their columns.

    Parameters
    ----------
    detector : fitted detector
        A detector of this package, or a pipeline that ends in one. Through its scalers, imputers and encoders
        contributions return to its input columns; meta-estimators of `calibration` with one detector are seen through.
    X : array-like or data frame of shape (n_rows, n_columns)
        Rows, seen in training or not.
    method : {"auto", "integrated-gradients", "score", "reconstruction", "conditional"}, default="auto"
        Equations 1 to 4 of the module. "auto" takes what is nearest to the detector's own anomaly: ``"score"`` for
        norms of the score, ``"reconstruction"`` for what is led by residuals (the default of `DiffusionDetector`
        among them, whose energy is rough and takes hundreds of times as long), and ``"integrated-gradients"`` of the
        energy for everything else. Where it is the relation between columns that is broken, integrated gradients with
        a background have ranked the changed column higher than the other methods.
    background : array-like or data frame of shape (n_background, n_columns) or None, default=None
        Normal rows, for integrated gradients: the baselines are taken from them. None takes the mean of the rows that
        the detector was fitted to, which is a poor baseline where there are several kinds of normal rows.
    n_baselines : int, default=10
        For each row so many of the nearest background rows are its baselines: rows that differ from it in as little as
        possible, which is what tells the columns apart.

    Returns
    -------
    FeatureContributions

    Raises
    ------
    TypeError
        If the detector has nothing to explain by that method.
    ValueError
        If a column seen by the detector was made from several input columns, or the detector is one of images.

    Warns
    -----
    UserWarning
        If the integral of integrated gradients misses the difference of energies of some row by more than a hundredth.

    References
    ----------
    .. [1] Sundararajan, M., Taly, A., Yan, Q. (2017). Axiomatic attribution for deep networks. ICML. arXiv:1703.01365.

    Examples
    --------
    >>> import pandas as pd
    >>> import numpy as np
    >>> from anomalib_gen import FlowDetector
    >>> from anomalib_gen.explain import feature_contributions
    >>> random = np.random.default_rng(0)
    >>> speed = random.normal(50, 10, size=300)
    >>> trips = pd.DataFrame({"speed": speed, "fuel": speed / 10 + random.normal(0, 0.2, size=300)})
    >>> detector = FlowDetector(max_iter=150, random_state=0).fit(trips)
    >>> odd = pd.DataFrame({"speed": [50.0], "fuel": [9.0]})
    >>> feature_contributions(detector, odd, background=trips).top(1)[0][0][:2]
    ('fuel', np.float64(9.0))
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f"method must be 'auto' or one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    _runtime.check_count(n_baselines, "n_baselines")
    check_is_fitted(detector)
    front, inner = split_pipeline(detector)
    if not hasattr(inner, "_torch_energy"):
        raise TypeError(
            f"{type(inner).__name__} has no energy to explain. Use a detector of anomalib_gen; for trees there is the "
            "shap package."
        )
    if len(getattr(inner, "event_shape_", ())) > 1:
        raise ValueError(
            f"Contributions are for tables; this {type(inner).__name__} was fitted on images of shape "
            f"{tuple(inner.event_shape_)}. Use anomalib_gen.heatmaps.explain_images."
        )
    names = names_of(X, detector)
    Z = X if front is None else front.transform(X)
    B = background if front is None or background is None else front.transform(background)
    made_from = list(range(len(names))) if front is None else sources(front, range(len(names)), names)
    rows = inner._validate(Z, reset=False) if hasattr(inner, "_validate") else np.asarray(Z, dtype=np.float64)
    if method == "auto":
        method = _method_of(inner)
    if method == "integrated-gradients":
        reference = None
        if B is not None:
            reference = (
                inner._validate(B, reset=False) if hasattr(inner, "_validate") else np.asarray(B, float)
            )
        values, anomaly, baseline = _integrated_gradients(inner, rows, reference, int(n_baselines))
    else:
        find = {"score": _score, "reconstruction": _reconstruction, "conditional": _conditional}[method]
        values, anomaly = find(inner, rows)
        baseline = np.zeros(len(rows))
    return FeatureContributions(
        values=gather(values, made_from, len(names)),
        anomaly=anomaly,
        baseline=baseline,
        feature_names=names,
        method=method,
        data=np.asarray(X),
        index=X.index if hasattr(X, "iloc") else None,
    )


def _method_of(detector: Any) -> str:
    anomaly = getattr(detector, "anomaly_", None)
    if isinstance(anomaly, ScoreNorm) and anomaly.summary == "sum":
        return "score"
    if isinstance(anomaly, RESIDUALS) and hasattr(detector, "reconstruct"):
        return "reconstruction"
    return "integrated-gradients"


# Integrated gradients -------------------------------------------------------------------------------------


def _integrated_gradients(
    detector: Any, X: npt.NDArray[Any], background: npt.NDArray[Any] | None, n_baselines: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    shift, scale = _units(detector, background)
    if background is None:
        starts = np.broadcast_to(shift, (len(X), 1, X.shape[1]))
    else:
        starts = _nearest(X, background, shift, scale, n_baselines)
    device = detector._scoring_device() if hasattr(detector, "_scoring_device") else torch.device("cpu")
    dtype = _runtime.scoring_dtype(device)
    # Where the units of the path are the detector's own, it need not see those of X.
    scaled = hasattr(detector, "_scaler")
    energy = detector._torch_energy(device, scaled=True) if scaled else detector._torch_energy(device)
    shift_t, scale_t = (torch.as_tensor(v, dtype=dtype, device=device) for v in (shift, scale))

    def along(y: torch.Tensor) -> torch.Tensor:
        """Energy as a function of compressed standardised rows."""
        z = expand_tails(y)[0]
        value: torch.Tensor = energy(z if scaled else z * scale_t + shift_t)
        return value

    def compressed(rows: npt.NDArray[Any]) -> torch.Tensor:
        z = (np.asarray(rows, dtype=np.float64) - shift) / scale
        return compress_tails(torch.as_tensor(z, dtype=dtype, device=device))[0]

    k = starts.shape[1]
    ends = compressed(np.repeat(X, k, axis=0))
    begins = compressed(starts.reshape(-1, X.shape[1]))
    with torch.no_grad():
        high, low = _in_blocks(along, ends), _in_blocks(along, begins)
    values = torch.zeros_like(ends)
    todo = torch.arange(len(ends), device=device)
    allowed = TOLERANCE * (high - low).abs().clamp(min=1)
    panels = 2
    while True:
        values[todo] = _path_integral(along, begins[todo], ends[todo], panels)
        missed = (high - low - values.sum(1)).abs()
        todo = torch.nonzero(missed > allowed).flatten()
        if not len(todo) or panels >= MAX_PANELS:
            break
        panels *= 4
    if len(todo):
        warn_user(
            f"The path integrals of {len(torch.unique(todo // k))} rows miss the difference of energies by up to "
            f"{float(missed.max()):.2g} nats, which are shared out over the columns: the energy is rough "
            "along the path. Rows of `background` nearer to them may help.",
        )
    size = values.abs()
    even = torch.full_like(size, 1 / size.shape[1])
    total = size.sum(1, keepdim=True)
    shares = torch.where(total > 0, size / total.clamp(min=torch.finfo(dtype).tiny), even)
    values = values + (high - low - values.sum(1)).unsqueeze(1) * shares
    per_row = [v.reshape(len(X), k, *v.shape[1:]).mean(1).cpu().double().numpy() for v in (values, high, low)]
    return per_row[0], per_row[1], per_row[2]


def _units(
    detector: Any, background: npt.NDArray[Any] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Shift and scale of each column."""
    if hasattr(detector, "_scaler"):
        return detector._scaler.shift, detector._scaler.scale
    if background is None:
        raise ValueError(f"{type(detector).__name__} keeps no mean row: give background rows to start from.")
    deviation = background.std(axis=0)
    return background.mean(axis=0), np.where(deviation > 0, deviation, 1.0)


def _nearest(
    X: npt.NDArray[Any],
    background: npt.NDArray[Any],
    shift: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
    n: int,
) -> npt.NDArray[np.float64]:
    """Nearest background rows of each row, ``(rows, n, D)``.

    By the sum of absolute differences, each cut at three deviations: a row with one wild column is near to those that
    agree with it in all others.
    """
    n = min(n, len(background))
    Z, B = ((np.asarray(rows, dtype=np.float64) - shift) / scale for rows in (X, background))
    chosen = np.empty((len(X), n), dtype=np.int64)
    for rows in _runtime.row_blocks(len(X), max(1, 2**22 // max(1, B.size))):
        distance = np.minimum(np.abs(Z[rows, None] - B), 3).sum(-1)
        chosen[rows] = np.argsort(distance, axis=1, kind="stable")[:, :n]
    return np.asarray(background, dtype=np.float64)[chosen]


def _in_blocks(function: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    block = _runtime.scoring_block_rows(y.shape[1], y.device)
    return torch.cat([function(y[rows]) for rows in _runtime.row_blocks(len(y), block)])


def _path_integral(
    function: Callable[[torch.Tensor], torch.Tensor], begin: torch.Tensor, end: torch.Tensor, panels: int
) -> torch.Tensor:
    """Integral of the gradient along straight lines, times their directions, ``(n, D)``."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    t = ((np.arange(panels)[:, None] + (nodes + 1) / 2) / panels).ravel()
    w = np.tile(weights / (2 * panels), panels)
    t_, w_ = (torch.as_tensor(v, dtype=end.dtype, device=end.device) for v in (t, w))
    block = max(1, _runtime.scoring_block_rows(end.shape[1], end.device) // len(t))
    parts = []
    for rows in _runtime.row_blocks(len(end), block):
        way = end[rows] - begin[rows]
        points = (begin[rows, None] + t_[:, None] * way[:, None]).flatten(0, 1).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(function(points).sum(), points)
        parts.append((gradient.reshape(len(way), len(t), -1) * w_[:, None]).sum(1) * way)
    return torch.cat(parts)


# Components of the anomaly itself -------------------------------------------------------------------------


def _score(detector: Any, X: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    anomaly = getattr(detector, "anomaly_", None)
    part = anomaly if isinstance(anomaly, ScoreNorm) else ScoreNorm()
    model = getattr(detector, "model_", None)
    if not hasattr(model, "score"):
        raise TypeError(
            f"{type(detector).__name__} has no score. Use method='integrated-gradients', or a DiffusionDetector or "
            "EnergyDetector."
        )

    def components(model: Any, x: torch.Tensor) -> torch.Tensor:
        # As ScoreNorm.norms, which sees the same scores.
        stretch = 1.0 if hasattr(model, "denoise") else 1 + (x.abs() - TAIL_START).clamp(min=0)
        if getattr(model, "noise_levels", None) is None:
            return _shares(stretch * model.score(x))
        levels = level_ladder(model, part.noise_levels, part.n_levels)
        units = levels if part.weighting == "noise" else [1.0] * len(levels)
        shares = [
            unit * _shares(stretch * model.score(x, x.new_full((len(x),), level)))
            for level, unit in zip(levels, units, strict=True)
        ]
        return torch.stack(shares).mean(0)

    values = detector._map(components, X, X.shape[1:], detector._scaler)
    return values, values.sum(1)


def _shares(score: torch.Tensor) -> torch.Tensor:
    """Components of ``(B, D)`` that add up to its norms."""
    norm = score.norm(dim=1, keepdim=True)
    return score.square() / norm.clamp(min=torch.finfo(score.dtype).tiny)


def _reconstruction(
    detector: Any, X: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if not hasattr(detector, "reconstruct"):
        raise TypeError(
            f"{type(detector).__name__} reconstructs no rows. Use method='integrated-gradients', or a VAEDetector or "
            "DiffusionDetector."
        )
    scaler, D = detector._scaler, X.shape[1]
    observation = getattr(detector.model_, "observation", None)
    if observation is not None:

        def residuals(model: Any, x: torch.Tensor) -> torch.Tensor:
            y = model.observation.coordinates
            return (y(x) - y(model.reconstruct(x))).square() / D

        values = detector._map(residuals, X, X.shape[1:], scaler)
    else:
        # The rows are checked already, and have lost their names.
        reconstructed = getattr(detector, "_reconstruct", detector.reconstruct)(X)
        values = (scaler.transform(X) - scaler.transform(reconstructed)) ** 2 / D
    return values, values.sum(1)


def _conditional(
    detector: Any, X: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    model = getattr(detector, "model_", None)
    if not hasattr(model, "transform") or not hasattr(model, "log_prob"):
        raise TypeError(f"method='conditional' needs a FlowDetector, got {type(detector).__name__}.")
    D = X.shape[1]

    def surprise(model: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y, _ = model.tails(x / model.spread)
            u, _ = model.transform(y, model._context(x, None))
            slopes = []
            for j in range(D):
                (gradient,) = torch.autograd.grad(u[:, j].sum(), x, retain_graph=j + 1 < D)
                if (gradient[:, j + 1 :].abs() > 1e-9 * gradient[:, j, None].abs()).any():
                    raise TypeError(
                        "method='conditional' needs a flow whose column j depends on columns up to j alone. Fit "
                        "FlowDetector(transform='nsf-autoregressive', n_layers=1), or use "
                        "method='integrated-gradients'."
                    )
                slopes.append(gradient[:, j].abs().log())
        return (u.square() / 2 + math.log(2 * math.pi) / 2 - torch.stack(slopes, 1)).detach()

    values = detector._map(surprise, X, (D,), detector._scaler) + np.log(detector._scaler.scale)
    return values, values.sum(1)
