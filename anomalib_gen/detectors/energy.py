r"""EnergyDetector: unnormalised densities of tables and images.

An energy-based model gives a row the density

    p(x) = exp(-E(x)) / Z,   E(x) = f(x) + E_base(x),

with f any network. To rank rows the constant Z is not needed, and there are several ways to fit E without it:

- score matching fits the gradient of log p, in which Z does not appear (objectives.score_matching and its sliced and
  denoising forms);
- contrastive divergence follows the likelihood's gradient, with Markov chains for the model's side;
- noise-contrastive estimation learns to tell data from noise of a known density.

All see rows with Gaussian noise of deviation `noise`, so E is the energy of the smoothed density. `sample` runs Markov
chains; `normalize` estimates log Z by annealed importance sampling, after which `log_prob` gives densities.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import nn

from anomalib_gen import _runtime
from anomalib_gen._base import GenerativeDetector
from anomalib_gen._component import Component
from anomalib_gen.anomaly import Energy, InputComplexity, ScoreNorm
from anomalib_gen.models.energy import EnergyModel
from anomalib_gen.networks import NETWORKS, build_network, make_network
from anomalib_gen.objectives import OBJECTIVES
from anomalib_gen.samplers import annealed_importance_sampling

DEFAULT_OBJECTIVE = "denoising-score-matching"
ENERGY_OBJECTIVES = (
    "contrastive-divergence",
    "denoising-score-matching",
    "noise-contrastive",
    "persistent-contrastive-divergence",
    "score-matching",
    "sliced-score-matching",
    "telescoping",
)


class EnergyDetector(GenerativeDetector):
    """Outlier detection by the energy of an energy-based model.

    Parameters
    ----------
    network : {"auto", "residual", "mlp", "convolutional"} or callable, default="auto"
        The network f. "convolutional", for images only, is a residual network of convolutions with an eighth of
        `hidden_features` as channels at its finest level; "auto" takes it for images, and "residual" for tables. A
        callable ``factory(n_inputs, n_outputs, context_features)`` returns a `torch.nn.Module` with
        ``forward(x, context) -> (B, n_outputs)``; x is ``(B, n_inputs)``, and context ``(B, context_features)``, or
        None if `context_features` is 0. For images `n_inputs` is their shape ``(channels, height, width)``. The network
        should be smooth: score matching takes second derivatives.
    hidden_features : int, default=128
        Width of the network. Ignored, as are the next two, where `network` is a callable.
    n_layers : int, default=2
        Hidden layers of the "mlp", or residual blocks (of two layers each).
    spectral_norm : float or None, default=None
        Bound on the spectral norm of every weight matrix, which bounds how steep f can be; None for no bound.
    n_heads : int, default=4
        Outputs of the network for the objectives that learn several density ratios ("telescoping"); others have one.
    objective : str or component, default="denoising-score-matching"
        How the energy is fitted.

        - ``"denoising-score-matching"``: at all noise levels from `noise` to `max_noise`; cheap, and needs no chains.
        - ``"score-matching"``, ``"sliced-score-matching"``: the same goal by second derivatives.
        - ``"contrastive-divergence"``, ``"persistent-contrastive-divergence"``: approximate maximum likelihood, with
          Markov chains from the rows or kept from step to step.
        - ``"noise-contrastive"``, ``"telescoping"``: telling rows from noise, at once or over `n_heads` steps.

        A name takes its noise on the rows from `noise`; an object brings its own.
    anomaly : {"energy", "score_norm"}, component or None, default=None
        The number per row; `score_samples` is minus that. "energy" is -log p up to a constant. "score_norm" is the norm
        of its gradient over the noise levels. None takes "score_norm" for an objective that trains at many noise
        levels, and "energy" for the others. On 29 tables (`benchmarks/results`) that was the best choice with each
        objective that was measured; of these, the default has the best average precision, and an AUROC within .004 of
        the best. The defaults are frozen at that. "input_complexity" is for images only.
    noise : float, default=0.1
        Standard deviation of the noise at which rows are scored, in standard deviations of each column. On top of it
        each column has noise of 1 / sqrt(12) of the median gap between its distinct values.
    max_noise : float or None, default=2.0
        Largest noise level in training, for the objectives that train a model which is conditional on the level (the
        score-matching ones). None trains at the level `noise` alone.
    learning_rate : float, default=2e-3
        Peak step size of AdamW, after a short warm-up and before a cosine decay.
    weight_decay : float, default=1e-4
        AdamW's decoupled weight decay, on weight matrices only.
    batch_size : int or "auto", default="auto"
        Rows a gradient step. "auto" takes 256 of a table, and 64 images, fewer of more than 64 x 64 pixels.
    max_iter : int or "auto", default="auto"
        Gradient steps at most. "auto" takes 300 passes over the rows, within 300 to 2,000 steps. Where two passes
        over the rows are more steps than that, it takes two passes, within 5,000 steps.
        For images it takes 20 passes, within 200 to 400 steps, and no fewer than two passes, within 10,000 steps.
    validation_fraction : float, default=0.1
        Share of the rows held out to choose the best weights and to stop early; at most 2,048 rows. Fewer than
        5 rows say nothing, and then none are held out.
    n_iter_no_change : int, default=20
        Stop after this many evaluations without a better held-out loss.
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
        model (`network`, its sizes, `noise`, `max_noise`) then keep the values of the first call.
    random_state : int, RandomState instance or None, default=None
        Seeds weights, row order and noise. An int gives the same detector at every call on the same machine.
    device : str or torch.device, default="auto"
        ``"auto"`` takes CUDA, else MPS, else the CPU.
    verbose : int, default=0
        1 shows a progress bar with training and validation loss, rows a second and the remaining time.

    Attributes
    ----------
    model_ : torch.nn.Module
        The fitted `anomalib_gen.models.EnergyModel`, in the units of standardised rows.
    anomaly_ : Component
        The anomaly in use, with what it learned.
    log_normalizer_ : float
        Estimate of log Z: learned by `fit` where the objective compares with noise of a known density
        ("noise-contrastive", "telescoping"); else, and in its place, set by `normalize`.
    log_normalizer_interval_ : tuple of float
        95 % interval of that estimate, set by `normalize`.
    offset_ : float
        Threshold on `score_samples`, see `contamination`. Where there are more than 200,000 rows, it is taken over a
        random 200,000 of them.
    n_iter_ : int
        Gradient steps taken.
    best_iter_ : int
        The step whose weights were kept.
    loss_curve_ : list of float
        Mean training loss between evaluations, of standardised rows.
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
    FlowDetector : Densities that are normalised by construction.

    Notes
    -----
    Rows are standardised column by column and the log-Jacobian is added back, so energies, like minus log-densities,
    are in nats and in the units of X. The energy is finite for every finite row and rises along every ray far outside
    the data.

    Training that diverges (energies or Markov chains that run away, where the objective has chains) ends with a
    warning that says what happened, and the detector keeps the best weights before that.

    References
    ----------
    .. [1] LeCun, Y., Chopra, S., Hadsell, R., Ranzato, M., Huang, F. (2006). A tutorial on energy-based learning.
       In: Predicting Structured Data. MIT Press.
    .. [2] Song, Y., Kingma, D. P. (2021). How to train your energy-based models. arXiv:2101.03288.
    .. [3] Zhai, S., Cheng, Y., Lu, W., Zhang, Z. (2016). Deep structured energy based models for anomaly detection.
       ICML. arXiv:1605.07717.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen import EnergyDetector
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 2)) @ [[1.0, 0.9], [0.0, 0.4]]
    >>> detector = EnergyDetector(max_iter=100, random_state=0).fit(X)
    >>> detector.predict([[0.0, 0.0], [2.0, -2.0]])
    array([ 1, -1])
    >>> detector.normalize(n_chains=64, n_levels=20, random_state=0).log_prob([[0.0, 0.0]]).shape
    (1,)
    """

    _objectives: ClassVar[Any] = {name: OBJECTIVES[name] for name in ENERGY_OBJECTIVES}
    _anomalies: ClassVar[Any] = {"energy": Energy, "score_norm": ScoreNorm}
    _image_anomalies: ClassVar[Any] = {"input_complexity": InputComplexity}
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **GenerativeDetector._parameter_constraints,
        "network": [StrOptions(set(NETWORKS)), callable],
        "hidden_features": [Interval(Integral, 1, None, closed="left")],
        "n_layers": [Interval(Integral, 0, None, closed="left")],
        "spectral_norm": [Interval(Real, 0, None, closed="neither"), None],
        "n_heads": [Interval(Integral, 1, None, closed="left")],
        "objective": [str, Component, None],
        "noise": [Interval(Real, 0, None, closed="left")],
        "max_noise": [Interval(Real, 0, None, closed="neither"), None],
    }

    def __init__(
        self,
        *,
        network: Any = "auto",
        hidden_features: int = 128,
        n_layers: int = 2,
        spectral_norm: float | None = None,
        n_heads: int = 4,
        objective: Any = DEFAULT_OBJECTIVE,
        anomaly: Any = None,
        noise: float = 0.1,
        max_noise: float | None = 2.0,
        learning_rate: float = 2e-3,
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
        self.network = network
        self.hidden_features = hidden_features
        self.n_layers = n_layers
        self.spectral_norm = spectral_norm
        self.n_heads = n_heads
        self.objective = objective
        self.anomaly = anomaly
        self.noise = noise
        self.max_noise = max_noise
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

    @_runtime.within_quota()
    @torch.inference_mode(False)  # chains follow gradients, also within a caller's inference_mode
    def normalize(self, *, n_chains: int = 256, n_levels: int = 200, random_state: Any = None) -> Self:
        """Estimate log Z by annealed importance sampling, so that `log_prob`, and a mixture, have its constant.

        Parameters
        ----------
        n_chains : int, default=256
            Independent weighted Markov chains.
        n_levels : int, default=200
            Densities between the standard normal where they start and the model.
        random_state : int, RandomState instance or None, default=None
            None draws afresh at each call.

        Returns
        -------
        self
            With `log_normalizer_` and its 95 % interval `log_normalizer_interval_`. The next `fit` removes both.

        Notes
        -----
        Where the objective learned a log Z by itself, that stays in ``model_.log_z``, to be compared.

        The units of the columns do not change log Z: what they add to every energy cancels in the integral over X.
        A warning says when too few chains carry the weight; the estimate is then likely too low. More levels help most.
        """
        check_is_fitted(self)
        device = self._scoring_device()
        model: Any = self._model_on(device)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        result = annealed_importance_sampling(
            model.energy,
            base=model.reference(),
            n_chains=n_chains,
            n_levels=n_levels,
            generator=_runtime.make_generator(seed, device),
        )
        self.log_normalizer_, self.log_normalizer_interval_ = result.log_z, result.interval
        return self

    def log_prob(self, X: Any) -> npt.NDArray[np.float64]:
        """Log-density of rows, -E(x) - log Z, with the log Z that the objective learned or `normalize` found.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X.

        Raises
        ------
        NotFittedError
            If the objective learns no log Z and `normalize` was not called since the last `fit`.
        """
        check_is_fitted(self)
        if not hasattr(self, "log_normalizer_"):
            raise NotFittedError("The energy has no constant yet: call normalize() before log_prob().")
        return -self.energy(X) - self.log_normalizer_

    def _fit(self, X: Any, sample_weight: Any, *, continued: bool, one_pass: bool) -> Self:
        super()._fit(X, sample_weight, continued=continued, one_pass=one_pass)
        self._forget_normalizer()
        if getattr(self._resolve_objective(), "learns_log_z", False):
            model: Any = self.model_
            self.log_normalizer_ = model.log_z.item()
        return self

    def _resolve_objective(self) -> Component:
        objective = super()._resolve_objective()
        if isinstance(self.objective, str):
            # A name is shorthand for that objective at this detector's noise.
            objective.set_params(data_noise=self.noise)
        return objective

    def _default_objective(self) -> Component:
        component: Component = self._objectives[DEFAULT_OBJECTIVE](data_noise=self.noise)
        return component

    def _default_anomaly(self, model: nn.Module | None) -> Component:
        conditional = getattr(self._resolve_objective(), "uses_noise_levels", False)
        return ScoreNorm() if conditional and self.max_noise is not None else Energy()

    def _make_model(self, event_shape: tuple[int, ...], grain: npt.NDArray[np.float64]) -> nn.Module:
        shape = event_shape if len(event_shape) > 1 else event_shape[0]
        objective = self._resolve_objective()
        levels = None
        if self.max_noise is not None and getattr(objective, "uses_noise_levels", False):
            if not 0 < self.noise < self.max_noise:
                raise ValueError(
                    f"noise={self.noise!r} must be positive and below max_noise={self.max_noise!r}. "
                    "For a single noise level, or none, set max_noise=None."
                )
            levels = (float(self.noise), float(self.max_noise))
        n_heads = self.n_heads if getattr(objective, "uses_heads", False) else 1
        context_features = 0 if levels is None else 1
        if callable(self.network):
            network = build_network(self.network, shape, n_heads, context_features)
        else:
            network = make_network(
                shape,
                n_heads,
                kind=self.network,
                hidden_features=self.hidden_features,
                n_blocks=self.n_layers,
                context_features=context_features,
                spectral_norm=self.spectral_norm,
            )
        return EnergyModel(
            network, shape, noise_levels=levels, grain=torch.from_numpy(grain), n_heads=n_heads
        )

    def _auto_max_iter(self, steps_per_pass: int) -> int:
        return min(max(min(300 * steps_per_pass, 2000), 2 * steps_per_pass, 300), 5000)
