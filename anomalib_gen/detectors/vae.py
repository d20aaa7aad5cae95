r"""Variational autoencoders as anomaly detectors.

The model (models.vae) explains a row x by a few unseen numbers z,

    z ~ N(0, I),   x ~ p(x | z),   log p(x) >= E_q[log p(x | z)] - KL(q(z | x) || N(0, I)) = ELBO(x),

with a decoder behind p(x | z) and an encoder behind q(z | x). Both are trained to raise the bound (objectives.elbo),
and a row is as abnormal as its bound is low (anomaly.elbo), or by one of the other numbers in `anomaly`. The posterior
mean is also a summary of the row in fewer columns, so the detector is a scikit-learn transformer as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_is_fitted
from torch import nn

from anomalib_gen._base import MAX_THRESHOLD_ROWS, GenerativeDetector
from anomalib_gen._component import Component
from anomalib_gen._inputs import require_binary
from anomalib_gen._scaling import Standardizer
from anomalib_gen.anomaly import (
    ImportanceWeighted,
    KLDivergence,
    LikelihoodRegret,
    NegativeELBO,
    ReconstructionError,
    ReconstructionProbability,
    Typicality,
)
from anomalib_gen.models.observation import OBSERVATIONS, BernoulliObservation
from anomalib_gen.models.vae import VAEModel
from anomalib_gen.networks import Shape, build_network, make_network
from anomalib_gen.objectives import EvidenceLowerBound

ACTIVE_VARIANCE = 0.01
"""A latent dimension is active where the variance of its posterior mean over rows is above this (Burda et al. 2016)."""
MAX_AUTO_COMPONENTS = 32
"""``n_components="auto"`` stops here."""

LEARNING_RATE, IMAGE_LEARNING_RATE, DEFAULT_WIDTH = 1e-2, 3e-3, 128
"""Step sizes, of tables and of images, of networks up to a width."""


class VAEDetector(ClassNamePrefixFeaturesOutMixin, TransformerMixin, GenerativeDetector):
    """Outlier detection by the evidence lower bound of a variational autoencoder.

    Parameters
    ----------
    n_components : int or "auto", default="auto"
        Latent dimensions. "auto" takes half of the columns, rounded up, within 2 to 32. More than needed
        do little harm: the ones without use are switched off in training, see `n_active_`.
    observation : {"gaussian", "student-t", "discretised-logistic", "bernoulli"}, default="gaussian"
        The distribution of a row around what the decoder gives.

        - ``"gaussian"``: normal, for measurements.
        - ``"student-t"``: with heavy tails, so that single odd values count less.
        - ``"discretised-logistic"``: the mass of a value's cell on the column's grid, divided by the cell's width; for
          counts and rounded readings.
        - ``"bernoulli"``: for columns of zeros and ones, and no others; scores are then log-probabilities.
    variance : {"auto", "per-feature", "shared"} or float, default="auto"
        The observation's variance: learned for each column, learned once for all, or this number, in squared standard
        deviations of each column. "auto" learns it for each column of a table, and once for all pixels of images, which
        have one scale as well: in aligned images the pixels near the border hardly vary, and with variances of their
        own these few would decide about every image. For a better density of such images (fewer bits per dimension)
        choose "per-feature". Ignored by ``"bernoulli"``.
    degrees_of_freedom : float or "learned", default="learned"
        Of ``"student-t"``: learned for each column, above 1, or this number.
    noise : float, default=0.02
        Smallest standard deviation of the observation where it is learned, in standard deviations of each column. It
        bounds the density where the decoder reconstructs a column exactly. On top of it comes 1 / sqrt(12) of the
        median gap between the distinct values of each column: next to nothing for measurements, and for flags and
        counts what spreads each value over its cell.
    encoder, decoder : {"auto", "mlp", "convolutional"}, None or callable, default="auto"
        The networks. ``"mlp"`` is a residual multilayer perceptron of the two sizes below; ``"convolutional"``, for
        images only, a pyramid of convolutions with an eighth of `hidden_features` as channels at its finest level.
        ``"auto"``, or None, takes the first for tables and the second for images. A callable
        ``factory(n_inputs, n_outputs)`` returns a `torch.nn.Module` from ``(B, n_inputs)`` to ``(B, n_outputs)``:
        from the columns to two numbers for each latent dimension (mean and log standard deviation), and from the
        latent dimensions to the columns; for images columns are their shape, ``(channels, height, width)``. With
        ``torch.nn.Linear`` for both and ``variance="shared"`` the model is probabilistic PCA.
    hidden_features : int, default=128
        Width of each perceptron.
    n_blocks : int, default=1
        Residual blocks of each perceptron.
    objective : "elbo", component or None, default=None
        The training loss; None is ``"elbo"``. Pass an `anomalib_gen.objectives.EvidenceLowerBound` for a weight beta,
        warm-up, free bits, or importance-weighted training.
    anomaly : str or component, default="elbo"
        The number per row; `score_samples` is minus that.

        - ``"elbo"``: the evidence lower bound, a bound on the log-density.
        - ``"iwae"``: the importance-weighted bound, which is tighter and takes more draws.
        - ``"reconstruction_probability"``: the part of the bound that the decoder answers for.
        - ``"kl"``: the other part, the divergence of the posterior from the prior.
        - ``"reconstruction_error"``: mean squared error of the reconstruction, in standardised columns.
        - ``"likelihood_regret"``: what the bound gains if each row's posterior is refitted; slow.
        - ``"typicality"``: how far the bound is from its mean over normal rows, on either side; for anomalies that are
          simpler than normal images, to which the bound gives the highest densities of all.
        - ``"input_complexity"``, ``"multiscale_reconstruction"``: for images only, see `anomalib_gen.anomaly`.
    learning_rate : float or "auto", default="auto"
        Peak step size of AdamW, after a short warm-up and before a cosine decay. "auto" takes 0.01 for tables and
        0.003 for images, and for networks wider than 128 so much less as they are wider: with the same step, a sum of
        more weights moves farther (Yang et al. 2022, arXiv:2203.03466), and the loss of a decoder of images runs away.
    weight_decay : float, default=1e-4
        AdamW's decoupled weight decay, on weight matrices only.
    batch_size : int or "auto", default="auto"
        Rows a gradient step. "auto" takes 256 of a table, and 64 images, fewer of more than 64 x 64 pixels.
    max_iter : int or "auto", default="auto"
        Gradient steps at most. "auto" takes 200 passes over the rows, within 500 to 2,000 steps; where two passes
        are more steps than that, two passes, within 10,000 steps.
        For images it takes 50 passes, within 200 to 1,000 steps, and no fewer than two passes, within 10,000 steps.
    validation_fraction : float, default=0.1
        Share of the rows held out to choose the best weights and to stop early; at most 2,048 rows. Fewer than
        5 rows say nothing, and then none are held out.
    n_iter_no_change : int, default=20
        Stop after this many evaluations without a better held-out bound.
    max_grad_norm : float, default=10.0
        Larger gradients are scaled down to this norm.
    ema_decay : float, default=0.995
        Decay of the exponential moving average of the weights, which is what is kept.
    contamination : "auto" or float, default="auto"
        Sets `offset_`, below which `predict` labels rows as outliers. A number in (0, 0.5] is the share of the
        training rows that fall below it. "auto" looks at the held-out rows instead (at the training rows, where none
        were held out) and takes the score that a new row of their kind falls below with a probability of .05: one
        normal row in twenty is flagged, or one in n + 1 where n < 19 were held out.
    warm_start : bool, default=False
        Whether `fit` continues from the weights, and in the scaling, of the previous call. Parameters that shape the
        model (its sizes, networks and observation) then keep the values of the first call.
    random_state : int, RandomState instance or None, default=None
        Seeds weights, row order and noise. An int gives the same detector at every call on the same machine.
    device : str or torch.device, default="auto"
        ``"auto"`` takes CUDA, else MPS, else the CPU.
    verbose : int, default=0
        1 shows a progress bar with training and validation loss, rows a second and the remaining time.

    Attributes
    ----------
    model_ : torch.nn.Module
        The fitted `anomalib_gen.models.VAEModel`, in the units of standardised rows.
    anomaly_ : Component
        The anomaly in use.
    n_components_ : int
        Latent dimensions L.
    n_active_ : int
        Latent dimensions in use: those whose posterior mean has a variance above 0.01 over the fitted rows [3]_. None
        in use means that the decoder ignores the latent variables (posterior collapse).
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
    FlowDetector : Exact densities.
    sklearn.decomposition.PCA : The linear case.

    Notes
    -----
    Rows are standardised column by column and the log-Jacobian is added back, so the bounds are on the log-density in
    the units of X. Columns of zeros and ones under ``"bernoulli"`` stay as they are. Scores are finite for every finite
    row.

    References
    ----------
    .. [1] Kingma, D. P., Welling, M. (2014). Auto-encoding variational Bayes. ICLR. arXiv:1312.6114.
    .. [2] Rezende, D. J., Mohamed, S., Wierstra, D. (2014). Stochastic backpropagation and approximate inference in
       deep generative models. ICML. arXiv:1401.4082.
    .. [3] Burda, Y., Grosse, R., Salakhutdinov, R. (2016). Importance weighted autoencoders. ICLR. arXiv:1509.00519.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen import VAEDetector
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 1)) * [1.0, 2.0, -1.0] + 0.1 * rng.normal(size=(200, 3))
    >>> detector = VAEDetector(n_components=1, max_iter=300, random_state=0).fit(X)
    >>> detector.predict([[1.0, 2.0, -1.0], [1.0, -2.0, -1.0]])
    array([ 1, -1])
    >>> detector.transform(X).shape
    (200, 1)
    """

    _objectives: ClassVar[Any] = {"elbo": EvidenceLowerBound}
    _anomalies: ClassVar[Any] = {
        "elbo": NegativeELBO,
        "iwae": ImportanceWeighted,
        "kl": KLDivergence,
        "likelihood_regret": LikelihoodRegret,
        "reconstruction_error": ReconstructionError,
        "reconstruction_probability": ReconstructionProbability,
        "typicality": Typicality,
    }
    _image_steps: ClassVar[tuple[int, int]] = (50, 1000)
    # Latent vectors are no metadata, as scikit-learn's routing would have it of an argument that is not called X.
    __metadata_request__inverse_transform: ClassVar[Any] = {"Z": UNUSED}
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **GenerativeDetector._parameter_constraints,
        "n_components": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "observation": [StrOptions(set(OBSERVATIONS))],
        "variance": [
            StrOptions({"auto", "per-feature", "shared"}),
            Interval(Real, 0, None, closed="neither"),
        ],
        "degrees_of_freedom": [StrOptions({"learned"}), Interval(Real, 0, None, closed="neither")],
        "noise": [Interval(Real, 0, None, closed="left")],
        "encoder": [StrOptions({"auto", "convolutional", "mlp"}), callable, None],
        "decoder": [StrOptions({"auto", "convolutional", "mlp"}), callable, None],
        "hidden_features": [Interval(Integral, 1, None, closed="left")],
        "n_blocks": [Interval(Integral, 0, None, closed="left")],
        "objective": [str, Component, None],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    }

    def __init__(
        self,
        *,
        n_components: int | str = "auto",
        observation: str = "gaussian",
        variance: str | float = "auto",
        degrees_of_freedom: str | float = "learned",
        noise: float = 0.02,
        encoder: Any = "auto",
        decoder: Any = "auto",
        hidden_features: int = DEFAULT_WIDTH,
        n_blocks: int = 1,
        objective: Any = None,
        anomaly: Any = "elbo",
        learning_rate: float | str = "auto",
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
        self.n_components = n_components
        self.observation = observation
        self.variance = variance
        self.degrees_of_freedom = degrees_of_freedom
        self.noise = noise
        self.encoder = encoder
        self.decoder = decoder
        self.hidden_features = hidden_features
        self.n_blocks = n_blocks
        self.objective = objective
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

    # The model as a density -------------------------------------------------------------------------------

    def elbo(self, X: Any, *, n_draws: int | str = "auto") -> npt.NDArray[np.float64]:
        """Evidence lower bound of rows, whatever the detector's anomaly.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        n_draws : int or "auto", default="auto"
            Draws of the latent variables, see `anomalib_gen.anomaly.NegativeELBO`.

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X.
        """
        check_is_fitted(self)
        return -self._apply(NegativeELBO(n_draws=n_draws), self._validate(X, reset=False))

    def log_prob(self, X: Any, *, n_draws: int = 256) -> npt.NDArray[np.float64]:
        """Estimate the log-density of rows by importance weighting, whatever the detector's anomaly.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        n_draws : int, default=256
            Draws of the latent variables. On average the estimate is too low, and less so the more there are.

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X.
        """
        check_is_fitted(self)
        return -self._apply(ImportanceWeighted(n_draws=n_draws), self._validate(X, reset=False))

    def _energy_anomaly(self) -> Any:
        return NegativeELBO()

    # The model as a transformer ---------------------------------------------------------------------------

    def transform(self, X: Any) -> npt.NDArray[np.float64]:
        """Summarise rows by the means of their posteriors.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components_)
        """
        check_is_fitted(self)
        return self._encode(self._validate(X, reset=False))

    def inverse_transform(self, Z: Any) -> npt.NDArray[np.float64]:
        """Decode latent vectors to the middle of their rows' distribution.

        Parameters
        ----------
        Z : array-like of shape (n_samples, n_components_)

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            In the units of X; under ``"bernoulli"`` the probability of a one.

        Raises
        ------
        ValueError
            If `Z` has another number of columns.
        """
        check_is_fitted(self)
        Z = check_array(Z, dtype=np.float64, input_name="Z")
        if Z.shape[1] != self.n_components_:
            raise ValueError(
                f"Z has {Z.shape[1]} columns, but there are {self.n_components_} latent dimensions."
            )
        decoded = self._map(
            lambda model, z: model.observation.centre(model.decode(z)), Z, self.event_shape_, None
        )
        return self._scaler.inverse_transform(decoded)

    def reconstruct(self, X: Any) -> npt.NDArray[np.float64]:
        """Send rows through the encoder and back.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            In the units of X; under ``"bernoulli"`` the probability of a one.
        """
        check_is_fitted(self)
        return self.inverse_transform(self._encode(self._validate(X, reset=False)))

    def interpolate(self, X_a: Any, X_b: Any, n_steps: int = 10) -> npt.NDArray[np.float64]:
        """Decode the straight lines between the posterior means of two sets of rows.

        Parameters
        ----------
        X_a, X_b : array-like or data frame of shape (n_samples, n_features)
            Where the lines start and end, row by row.
        n_steps : int, default=10
            Points on each line, both ends (the reconstructions of the rows) included.

        Returns
        -------
        ndarray of shape (n_samples, n_steps, n_features)
            In the units of X.

        Raises
        ------
        ValueError
            If the two have different numbers of rows, or `n_steps` is below 2.
        """
        check_is_fitted(self)
        if not isinstance(n_steps, Integral) or n_steps < 2:
            raise ValueError(f"n_steps must be an integer of at least 2, got {n_steps!r}.")
        start, end = (self._encode(self._validate(X, reset=False)) for X in (X_a, X_b))
        if len(start) != len(end):
            raise ValueError(f"X_a has {len(start)} rows and X_b {len(end)}; lines need as many of both.")
        share = np.linspace(0, 1, int(n_steps))[:, None]
        Z = (1 - share) * start[:, None] + share * end[:, None]
        decoded = self.inverse_transform(Z.reshape(-1, self.n_components_))
        return decoded.reshape(len(start), int(n_steps), *self.event_shape_)

    @property
    def n_components_(self) -> int:
        """Latent dimensions of the fitted model."""
        model: Any = self.model_
        return model.n_components

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def _encode(self, X: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Posterior means ``(n, L)`` of validated rows."""

        def means(model: Any, x: torch.Tensor) -> torch.Tensor:
            return model.encode(x).mean

        return self._map(means, X, (self.n_components_,), self._scaler)

    # What a family provides -------------------------------------------------------------------------------

    def _validate(self, X: Any, *, reset: bool, min_rows: int = 1) -> npt.NDArray[Any]:
        X = super()._validate(X, reset=reset, min_rows=min_rows)
        if self.observation == "bernoulli" if reset else self._binary:
            require_binary(self, X)
        return X

    @property
    def _binary(self) -> bool:
        """Whether rows are of zeros and ones: a fitted model knows, whatever the parameter says by now."""
        return isinstance(getattr(self.model_, "observation", None), BernoulliObservation)

    def _energy(self, X: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        if self._binary:  # a composition gives rows that it has checked itself, and not for this
            require_binary(self, X)
        return super()._energy(X)

    def _make_scaler(
        self,
        X: npt.NDArray[Any],
        rows: npt.NDArray[np.integer] | None,
        weights: npt.NDArray[np.float64] | None,
    ) -> Standardizer:
        if self.observation != "bernoulli":
            return super()._make_scaler(X, rows, weights)
        return Standardizer(shift=np.zeros(X.shape[1:]), scale=np.ones(X.shape[1:]), log_det=0.0)

    def _default_objective(self) -> Component:
        return EvidenceLowerBound()

    def _default_anomaly(self, model: nn.Module | None) -> Component:
        return NegativeELBO()

    def _make_model(self, event_shape: tuple[int, ...], grain: npt.NDArray[np.float64]) -> nn.Module:
        shape = event_shape if len(event_shape) > 1 else event_shape[0]
        settings: dict[str, Any] = {}
        if self.observation != "bernoulli":
            auto = "per-feature" if len(event_shape) == 1 else "shared"
            settings = {
                "grain": torch.from_numpy(grain),
                "noise": float(self.noise),
                "variance": auto if self.variance == "auto" else self.variance,
            }
        if self.observation == "student-t":
            settings["degrees_of_freedom"] = self.degrees_of_freedom
        if self.n_components == "auto":
            n_components = min(max(math.ceil(math.prod(event_shape) / 2), 2), MAX_AUTO_COMPONENTS)
        else:
            n_components = int(self.n_components)
        return VAEModel(
            self._factory("encoder"),
            self._factory("decoder"),
            OBSERVATIONS[self.observation](shape, **settings),
            features=shape,
            n_components=n_components,
        )

    def _factory(self, argument: str) -> Callable[[Shape, Shape], nn.Module]:
        """Return what makes the network of that name from its sizes."""
        given = getattr(self, argument)
        if callable(given):
            return partial(build_network, given, argument=argument)
        return partial(self._make_network, given)

    def _make_network(self, kind: str | None, inputs: Shape, outputs: Shape) -> nn.Module:
        # Not zero at the start: a decoder that ignores z gives the encoder no gradient.
        return make_network(
            inputs,
            outputs,
            kind={None: "auto", "mlp": "residual"}.get(kind, str(kind)),
            hidden_features=self.hidden_features,
            n_blocks=self.n_blocks,
            zero_output=False,
        )

    def _cell(self, scaler: Standardizer) -> float:
        # A discretised observation gives the mass of a cell by itself, spread evenly over the cell.
        return 0.0 if self.observation == "discretised-logistic" else super()._cell(scaler)

    def _resolve_learning_rate(self) -> float:
        if self.learning_rate != "auto":
            return float(self.learning_rate)
        rate = LEARNING_RATE if len(self.event_shape_) == 1 else IMAGE_LEARNING_RATE
        return rate * min(1.0, DEFAULT_WIDTH / self.hidden_features)

    def _auto_max_iter(self, steps_per_pass: int) -> int:
        return min(max(min(200 * steps_per_pass, 2000), 2 * steps_per_pass, 500), 10_000)

    def _note_rows(self, X: npt.NDArray[Any], index: npt.NDArray[np.integer]) -> None:
        if len(index) > MAX_THRESHOLD_ROWS:
            index = index[:: -(-len(index) // MAX_THRESHOLD_ROWS)]
        means = self._encode(X[index] if len(index) < len(X) else X)
        self.n_active_ = int((means.var(axis=0) > ACTIVE_VARIANCE).sum())
