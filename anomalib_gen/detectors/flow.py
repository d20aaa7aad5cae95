r"""FlowDetector: exact log-likelihoods of tables and images.

A normalizing flow is an invertible map f from rows to a standard normal, so the density of a row is exact:

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

It is trained by maximum likelihood on rows with Gaussian noise of a random, known level s (objectives.likelihood),

    min  E_{x, s, e} [ -log p(x + s e | s) ],   s log-uniform on [noise, max_noise],

and scored at s = noise: the density of the data smoothed by a kernel of that width, in the units of X. Columns whose
values lie on a grid are smoothed over its cells as well, by noise of 1 / sqrt(12) of the typical gap between distinct
values (dequantisation, _scaling.column_grain). A row is as
abnormal as its log-density is low (anomaly.likelihood), or as far as it is from the entropy (anomaly.typicality).
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import nn

from anomalib_gen._base import GenerativeDetector
from anomalib_gen._component import Component
from anomalib_gen.anomaly import InputComplexity, Likelihood, Typicality
from anomalib_gen.models.flow import FLOW_TRANSFORMS, FlowModel, make_flow_transform
from anomalib_gen.models.glow import FlattenedTransform, Glow
from anomalib_gen.networks import build_network
from anomalib_gen.objectives import MaximumLikelihood

AUTO_LAYERS = {"realnvp": 6, "maf": 5, "nsf-coupling": 4, "nsf-autoregressive": 2, "glow": 8}
"""A coupling layer sees half of the columns and an affine one is stiff, so those need more layers."""
WIDE = 128
"""With more columns than this, splines get fewer bins by default."""
MAX_MIXED_COLUMNS = 256
"""With more columns than this there are no trained linear maps: they would hold most of the weights."""


class _HiddenParameter:
    """A constructor parameter that is no attribute.

    scikit-learn takes whatever has an attribute `transform` for a transformer: a pipeline's `set_output` would fail
    on a detector with a *parameter* of that name. So the value lives in the instance's dictionary, where `get_params`
    finds it, and attribute access says where to look.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{self.name!r} is a parameter here: see get_params()[{self.name!r}].")

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self.name] = value


class FlowDetector(GenerativeDetector):
    """Outlier detection by the exact log-likelihood of a normalizing flow.

    Parameters
    ----------
    transform : str or callable, default="auto"
        The invertible map.

        - ``"auto"``: "realnvp" for tables, "glow" for images;
        - ``"realnvp"``: affine in each column, conditioned on half of the columns; samples in one pass. On average
          over the benchmark's tables the best detector of the four for tables. Beyond 256 columns, where there are
          no linear maps between the layers, it learns less well that columns nearly determine each other.
        - ``"maf"``: affine, conditioned on all previous columns; sampling takes one network evaluation a column.
        - ``"nsf-coupling"``: rational-quadratic splines in place of affine functions, conditioned on half of the
          columns; where densities were measured, it had the best.
        - ``"nsf-autoregressive"``: the same splines conditioned on all previous columns.
        - ``"glow"``: multi-scale and convolutional, for images only [5]_. Under the others images are rows of pixels.
        - a callable ``factory(features, context_features)`` returns a `torch.nn.Module` with ``forward(x, context)
          -> (u, logabsdet)`` and ``inverse(u, context) -> (x, logabsdet)``; x and u are ``(B, features)``,
          logabsdet ``(B,)``, and context is ``(B, context_features)``, or None if `context_features` is None.
          Any nflows transform qualifies. For images `features` is their shape ``(channels, height, width)``.
    n_layers : int or "auto", default="auto"
        Layers of the map. "auto" takes 6, 5, 4 and 2 for the transforms of tables in the order above, and 8 at each of
        at most three levels of "glow". Ignored, as are the next three, where `transform` is a callable.
    hidden_features : int, default=128
        Width of each conditioner network; those of "glow" have a quarter of it as channels.
    n_blocks : int, default=1
        Residual blocks of each conditioner. Not used by "glow".
    n_bins : int or "auto", default="auto"
        Bins of each spline: 8, or 4 with more than 128 columns.
    noise : float, default=0.02
        Standard deviation of the noise at which rows are scored, in standard deviations of each column. It bounds
        the density where columns depend on each other exactly. On top of it, each column has noise of 1 / sqrt(12) of
        the median gap between its distinct values: next to nothing for measurements, and for flags and counts what
        spreads each value over its cell. Images of uint8 have uniform noise over the cells instead, and no other:
        their densities are, on average over a cell, below the probabilities of the whole numbers.
    max_noise : float or None, default=1.0
        Largest noise level in training. The flow is conditional on the level and learns all of them from `noise` up;
        the larger ones regularise. None trains at the level `noise` alone, which is what images always do.
    anomaly : {"likelihood", "typicality", "input_complexity"} or component, default="likelihood"
        The number per row; `score_samples` is minus that. "input_complexity" is for images only.
    learning_rate : float, default=5e-3
        Peak step size of AdamW, after a short warm-up and before a cosine decay.
    weight_decay : float, default=1e-4
        AdamW's decoupled weight decay, on weight matrices only.
    batch_size : int or "auto", default="auto"
        Rows a gradient step. "auto" takes 256 of a table, and 64 images, fewer of more than 64 x 64 pixels.
    max_iter : int or "auto", default="auto"
        Gradient steps at most. "auto" takes 200 passes over the rows, within 200 to 600 steps; beyond 256 columns
        the upper end falls as 153,600 divided by the columns, to 200. Where two passes over the rows are more steps
        than that, it takes two passes, within 5,000 steps.
        For images it takes 20 passes, within 200 to 400 steps, and no fewer than two passes, within 10,000 steps.
    validation_fraction : float, default=0.1
        Share of the rows held out to choose the best weights and to stop early; at most 2,048 rows. Fewer than
        5 rows say nothing, and then none are held out.
    n_iter_no_change : int, default=20
        Stop after this many evaluations without a better held-out log-likelihood.
    max_grad_norm : float, default=10.0
        Larger gradients are scaled down to this norm.
    ema_decay : float, default=0.995
        Decay of the exponential moving average of the weights, which is what is kept.
    contamination : "auto" or float, default="auto"
        Sets `offset_`, below which `predict` labels rows as outliers. A number in (0, 0.5] is the share of the
        training rows that fall below it, as elsewhere in scikit-learn; but a flow has seen those rows, and new
        normal rows score lower, so more of them will fall below. "auto" looks at the held-out rows instead (at the
        training rows, where none were held out) and takes the score that a new row of their kind falls below with a
        probability of .05: one normal row in twenty is flagged, or one in n + 1 where n < 19 were held out.
    warm_start : bool, default=False
        Whether `fit` continues from the weights, and in the scaling, of the previous call. Parameters that shape the
        model (`transform`, its sizes, `noise`, `max_noise`) then keep the values of the first call.
    random_state : int, RandomState instance or None, default=None
        Seeds weights, row order and noise. An int gives the same detector at every call on the same machine.
    device : str or torch.device, default="auto"
        ``"auto"`` takes CUDA, else MPS, else the CPU.
    verbose : int, default=0
        1 shows a progress bar with training and validation loss, rows a second and the remaining time.

    Attributes
    ----------
    model_ : torch.nn.Module
        The fitted `anomalib_gen.models.FlowModel`, in the units of standardised rows.
    anomaly_ : Component
        The anomaly in use, with what it learned.
    offset_ : float
        Threshold on `score_samples`, see `contamination`. Where there are more than 200,000 rows, it is taken over a
        random 200,000 of them.
    n_iter_ : int
        Gradient steps taken.
    best_iter_ : int
        The step whose weights were kept.
    loss_curve_ : list of float
        Mean training loss between evaluations, in nats of standardised rows.
    validation_curve_ : list of float
        Held-out loss at each evaluation; empty if no rows were held out.
    loss_steps_, validation_steps_ : list of int
        Steps of the points of `loss_curve_` and of `validation_curve_`, counted from the first fit on. None of a
        detector whose fit, or first fit, was saved by a version that did not keep them.
    event_shape_ : tuple of int
        Shape of one row: ``(n_features_in_,)``, or ``(channels, height, width)`` of an image.
    n_features_in_ : int
        Number of columns, or of channels.
    feature_names_in_ : ndarray of str
        Names of the columns, where X had names.

    See Also
    --------
    sklearn.mixture.GaussianMixture : Densities with few parameters.
    anomalib_gen.calibration.typicality_test : Test whether a batch of rows is typical.

    Notes
    -----
    Rows are standardised column by column and the log-Jacobian is added back, so `score_samples` is a log-density
    in the units of X: multiplying a column by c > 0 lowers all scores by log c and changes nothing else (a constant
    column has no scale of its own and keeps its units). The density is that of X plus the noise described under
    `noise`. Scores are finite for every finite row.

    References
    ----------
    .. [1] Durkan, C., Bekasov, A., Murray, I., Papamakarios, G. (2019). Neural spline flows. NeurIPS.
       arXiv:1906.04032.
    .. [2] Papamakarios, G., Pavlakou, T., Murray, I. (2017). Masked autoregressive flow for density estimation.
       NeurIPS. arXiv:1705.07057.
    .. [3] Dinh, L., Sohl-Dickstein, J., Bengio, S. (2017). Density estimation using Real NVP. ICLR.
       arXiv:1605.08803.
    .. [4] Kim, H., Lee, H., Kang, W. H., Lee, J. Y., Kim, N. S. (2020). SoftFlow: Probabilistic framework for
       normalizing flow on manifolds. NeurIPS. arXiv:2006.04604.
    .. [5] Kingma, D. P., Dhariwal, P. (2018). Glow: Generative flow with invertible 1x1 convolutions. NeurIPS.
       arXiv:1807.03039.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen import FlowDetector
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 2)) @ [[1.0, 0.9], [0.0, 0.4]]
    >>> detector = FlowDetector(max_iter=50, random_state=0).fit(X)
    >>> detector.predict([[0.0, 0.0], [2.0, -2.0]])
    array([ 1, -1])
    >>> detector.sample(3, random_state=0).shape
    (3, 2)
    """

    _objectives: ClassVar[Any] = {"likelihood": MaximumLikelihood}
    _anomalies: ClassVar[Any] = {"likelihood": Likelihood, "typicality": Typicality}
    _image_anomalies: ClassVar[Any] = {"input_complexity": InputComplexity}
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **GenerativeDetector._parameter_constraints,
        "transform": [StrOptions({"auto", "glow", *FLOW_TRANSFORMS}), callable],
        "n_layers": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "hidden_features": [Interval(Integral, 1, None, closed="left")],
        "n_blocks": [Interval(Integral, 0, None, closed="left")],
        "n_bins": [Interval(Integral, 2, None, closed="left"), StrOptions({"auto"})],
        "noise": [Interval(Real, 0, None, closed="left")],
        "max_noise": [Interval(Real, 0, None, closed="neither"), None],
    }

    transform = _HiddenParameter()

    def __init__(
        self,
        *,
        transform: Any = "auto",
        n_layers: int | str = "auto",
        hidden_features: int = 128,
        n_blocks: int = 1,
        n_bins: int | str = "auto",
        noise: float = 0.02,
        max_noise: float | None = 1.0,
        anomaly: Any = "likelihood",
        learning_rate: float = 5e-3,
        weight_decay: float = 1e-4,
        batch_size: int | str = "auto",
        max_iter: int | str = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
        max_grad_norm: float = 10.0,
        ema_decay: float = 0.995,
        contamination: float | str = "auto",
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = "auto",
        verbose: int = 0,
    ) -> None:
        self.transform = transform
        self.n_layers = n_layers
        self.hidden_features = hidden_features
        self.n_blocks = n_blocks
        self.n_bins = n_bins
        self.noise = noise
        self.max_noise = max_noise
        self.anomaly = anomaly
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.contamination = contamination
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Get the parameters of this detector.

        Parameters
        ----------
        deep : bool, default=True
            Whether to add those of its components, as ``anomaly__<name>``.

        Returns
        -------
        dict of str to value
        """
        params = {name: vars(self)[name] for name in self._get_param_names()}
        if deep and isinstance(self.anomaly, Component):
            params.update({f"anomaly__{name}": value for name, value in self.anomaly.get_params().items()})
        return params

    def log_prob(self, X: Any) -> npt.NDArray[np.float64]:
        """Exact log-density of rows, whatever the detector's anomaly.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X.
        """
        check_is_fitted(self)
        return -self._apply(Likelihood(), self._validate(X, reset=False))

    def _default_objective(self) -> Component:
        return MaximumLikelihood(noise=self.noise)

    def _default_anomaly(self, model: nn.Module | None) -> Component:
        return Likelihood()

    def _resolve_transform(self) -> Any:
        """Transform in use for tables, or for images once `event_shape_` is one's."""
        choice = self.get_params()["transform"]
        if choice == "auto":
            return "glow" if len(getattr(self, "event_shape_", ())) > 1 else "realnvp"
        return choice

    def _make_model(self, event_shape: tuple[int, ...], grain: npt.NDArray[np.float64]) -> nn.Module:
        images, features = len(event_shape) > 1, math.prod(event_shape)
        levels = None
        if self.max_noise is not None and not images:
            if not 0 < self.noise < self.max_noise:
                raise ValueError(
                    f"noise={self.noise!r} must be positive and below max_noise={self.max_noise!r}. "
                    "For a single noise level, or none, set max_noise=None."
                )
            levels = (float(self.noise), float(self.max_noise))
        context_features = None if levels is None else 1
        choice = self._resolve_transform()
        if callable(choice):
            transform = build_network(
                choice, event_shape if images else features, context_features, argument="transform"
            )
        elif choice == "glow":
            if not images:
                raise ValueError("transform='glow' is for images of shape (n, channels, height, width).")
            transform = Glow(
                event_shape,
                n_steps=AUTO_LAYERS[choice] if self.n_layers == "auto" else int(self.n_layers),
                hidden_channels=max(8, self.hidden_features // 4),
            )
        else:
            auto_bins = 8 if features <= WIDE else 4
            transform = make_flow_transform(
                choice,
                features,
                context_features=context_features,
                n_layers=AUTO_LAYERS[choice] if self.n_layers == "auto" else int(self.n_layers),
                hidden_features=self.hidden_features,
                n_blocks=self.n_blocks,
                n_bins=auto_bins if self.n_bins == "auto" else int(self.n_bins),
                mix=features <= MAX_MIXED_COLUMNS,
            )
            if images:
                transform = FlattenedTransform(transform, event_shape)
        return FlowModel(transform, event_shape, noise_levels=levels, grain=torch.from_numpy(grain))

    def _auto_max_iter(self, steps_per_pass: int) -> int:
        # Wide rows make steps dear and weights many; what they lack is rows, not steps.
        enough = min(max(153_600 // self.n_features_in_, 200), 600)
        return min(max(min(200 * steps_per_pass, enough), 2 * steps_per_pass, 200), 5000)
