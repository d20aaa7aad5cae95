r"""DiffusionDetector: denoising at all noise levels.

A diffusion model learns one thing, the mean of the clean rows behind noisy ones,

    D(x, s) = E[x_0 | x_0 + s e = x],     e ~ N(0, I),                                               (1)

at all noise levels s. By Tweedie's formula it has the score of the data at every level, grad log p_s = (D - x) / s^2.
So it is an energy model trained by denoising score matching at many levels, without its energy; a path (paths) says how
fast noise comes, and turns (1) into the predictions that DDPM, score-based models and flow matching are known by. From
(1) follow

- samples and reconstructions: step by step from noise, or from a row, to less noise (samplers);
- a density: exactly, by the probability-flow equation, or from below, by the variational bound;
- anomalies: how far D moves a row, how steep the density is where it lies, what is left after a way to noise and back.

On a finite sample (1) has a solution in closed form, a weighted mean of the stored rows. It is a model without
training, and what it leaves of a row is an anomaly (models.memory, anomaly.closed_form): the default for images. That
for tables trains a network on what it leaves (models.hybrid), and averages two views of a row, each on the scale of
normal rows (anomaly.combined):

- how far the row is from what its nearest stored rows make of it, by two closed forms in three coordinates each;
- how much noise the model finds in it, over a ladder of noise levels.

The second counts N / (N + 2000) times as much as the first, for N stored rows: what few rows cannot teach, they can
still show.

Rows are standardised, and compressed beyond five deviations, so that all of this is finite for every finite row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import clone
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import nn

from anomalib_gen import _runtime
from anomalib_gen._base import GenerativeDetector
from anomalib_gen._component import Component
from anomalib_gen._runtime import check_count, expand_as_rows
from anomalib_gen._scaling import ArrayRows, Standardizer, TailedStandardizer
from anomalib_gen._warnings import warn_user
from anomalib_gen.anomaly import (
    ClosedFormResidual,
    CombinedAnomaly,
    DenoisingError,
    DiffusionELBO,
    DiffusionPath,
    DiffusionReconstruction,
    DiffusionTime,
    ODELikelihood,
    ScoreNorm,
)
from anomalib_gen.models import (
    ClosedFormDenoiser,
    EnergyModel,
    HybridDenoiser,
    NetworkDenoiser,
    ScoreDenoiser,
    ode_log_prob,
)
from anomalib_gen.models._stored import even_choice
from anomalib_gen.models.denoiser import LEVEL_FEATURES, PARAMETRIZATIONS, Denoiser
from anomalib_gen.networks import build_network, make_network
from anomalib_gen.objectives import Denoising, DiffusionTimeEstimation, FlowMatching, ImprovedDDPM
from anomalib_gen.paths import EDM, PATHS, CosineBetas, Linear, Path
from anomalib_gen.samplers import SAMPLERS, solve_ode
from anomalib_gen.samplers.sde import sampler_options

DENOISERS = ("closed-form", "hybrid", "network")
NETWORKS = ("auto", "convolutional", "energy", "mlp", "residual")
ENERGY_STEPS = 32
"""Steps of the bound that `energy` is; with more it is tighter, by about the same for rows of one cluster."""
LOG_PROB_STEPS = 100
"""Steps of the solver of `log_prob`."""
OF_NETWORKS = (
    "parametrization",
    "hidden_features",
    "n_blocks",
    "learning_rate",
    "weight_decay",
    "batch_size",
    "max_iter",
    "n_iter_no_change",
    "max_grad_norm",
    "ema_decay",
)
"""Parameters that nothing uses where there is no network."""
WIDTHS = (16, 128)
"""Widths of a network that ``hidden_features="auto"`` chooses between."""
TABLE_LEVELS = {"sigma_min": 0.01, "sigma_max": 20.0}
"""Noise levels of the default path: those of images (0.002 to 80) reach far beyond what tables need at both ends."""


class DiffusionDetector(GenerativeDetector):
    """Outlier detection by a diffusion model.

    Parameters
    ----------
    path : str, Path or None, default=None
        The process: how much of a row is left, and how much noise is in it, at each time.

        - ``"ddpm"``, ``"cosine"``: discrete steps, with linear or cosine schedule;
        - ``"ncsn"``: a geometric ladder of noise levels;
        - ``"ve"``, ``"vp"``, ``"sub-vp"``: the variance-exploding and -preserving processes in continuous time;
        - ``"edm"``: time is the noise level;
        - ``"linear"``: straight lines, the path of flow matching.

        A name takes that path's published defaults, where there are any: the ends of "linear" and the steps of "ncsn",
        which has the levels of "ve", are ours. None takes a path that suits the objective: discrete cosine steps for
        "improved-ddpm", "linear" for "flow-matching", and otherwise ``EDM(sigma_min=0.01, sigma_max=20)``. For images
        the last is ``EDM()``: their many pixels hang together, and it takes more noise to hide them.
    denoiser : {"hybrid", "network", "closed-form"} or None, default=None
        What takes noise away.

        - ``"network"``: a network that learns to;
        - ``"closed-form"``: the stored training rows, as a kernel density estimate has its denoiser in closed form;
          nothing is trained, and parameters of network, objective and training are not used;
        - ``"hybrid"``: a network that learns what the closed form leaves; the closed form rules where rows are few.

        None takes "hybrid"; with ``network="energy"``, whose score has to be the gradient of one network, "network".
        For images it takes "closed-form", which tells abnormal ones much better than networks do so far, as it compares
        gradients and lets parts of images move (`anomalib_gen.models.ImageMemory`); and "network" where `network` or
        `objective` asks for one, or `objective` is a component, whose settings need one. Name the denoiser if you set
        another anomaly, sizes or training alone: these ask for nothing. A warning names those that go
        unused.
    network : {"auto", "residual", "mlp", "convolutional", "energy"} or callable, default="auto"
        The network. "convolutional", for images only, is a residual U-Net with attention, with an eighth of
        `hidden_features` as channels at its finest level; "auto" takes it for images, and "residual" for tables.
        "energy" is the same with a scalar output (`ConvNet` for images) whose gradient is the score: the model is then
        an energy, too, ``model_.model.energy(x, level)`` at every noise level, for standardised rows. A callable
        ``factory(n_inputs, n_outputs, context_features)`` returns a `torch.nn.Module` with
        ``forward(x, context) -> (B, n_outputs)``; for images both numbers are shapes. A hybrid's has two inputs a
        column.
    parametrization : {"edm", "v", "eps", "x0"}, default="edm"
        What the network predicts; see `anomalib_gen.models.NetworkDenoiser`. For ``denoiser="network"`` alone, and not
        for ``network="energy"``. "x0" errs alike at all levels, and "eps" nearly so at large ones: a bound, which
        divides by the level, is then loose where the path's smallest level is small.
    hidden_features : int or "auto", default="auto"
        Width of the network. "auto" takes 128. For a hybrid it takes ``rows * sqrt(columns) / 4`` of the rows that it
        is trained on, rounded down to a power of two, if that is less, and no less than 16: a network that only
        corrects the closed form learns few rows by heart if it is wide, and one that has to learn all by itself needs
        the width. With `partial_fit`, which does not know how many rows there will be, and for images "auto" is 128.
        Ignored, as is the next, where `network` is a callable.
    n_blocks : int, default=2
        Residual blocks of two layers each, or hidden layers of the "mlp".
    objective : {"denoising", "flow-matching", "improved-ddpm", "diffusion-time"} or component, default="denoising"
        How the network is fitted. "improved-ddpm" also learns the variances of the reverse steps. With
        "diffusion-time" the network does not take noise away but tells how much there is: the model then is no
        denoiser, `denoiser` and `path` are not used, and of the anomalies only "diffusion_time" works.
    anomaly : str or component, default=None
        The number per row; `score_samples` is minus that. None takes what suits the denoiser: "combined" for a hybrid,
        "closed_form" for the closed form, for a network ``ScoreNorm(weighting="noise")``, and for the objective
        "diffusion-time" ``DiffusionTime(estimator="learned")``.

        - ``"combined"``: the weighted mean of "closed_form" and of the noise that the model finds, on one scale;
        - ``"closed_form"``: distance from what the nearest stored rows make of a row, in three coordinates; of images,
          these are pixels, histograms of gradients, and those without contrast, and half of the weight has how well
          the nearest stored ones match, when their parts may move;
        - ``"score_norm"``: norms of the score over a ladder of noise levels;
        - ``"reconstruction"``: distance to the row after a way to noise and back;
        - ``"denoising_error"``: error of one step of denoising over a ladder of noise levels;
        - ``"likelihood"``, ``"elbo"``: minus the log-density, exact or bounded;
        - ``"path"``: statistics of the way to noise;
        - ``"diffusion_time"``: the noise level of the row itself;
        - ``"input_complexity"``, ``"multiscale_reconstruction"``: for images only, see `anomalib_gen.anomaly`.
    learning_rate : float, default=2e-3
        Peak step size of AdamW, after a short warm-up and before a cosine decay.
    weight_decay : float, default=1e-4
        AdamW's decoupled weight decay, on weight matrices only.
    batch_size : int or "auto", default="auto"
        Rows a gradient step. "auto" takes 256 of a table, and 64 images, fewer of more than 64 x 64 pixels.
    max_iter : int or "auto", default="auto"
        Gradient steps at most. "auto" takes 400 passes over the rows, within 500 to 4,000 steps. Where two passes
        over the rows are more steps than that, it takes two passes, within 10,000 steps.
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
        model (`path`, `denoiser`, `network`, its sizes, `parametrization`) then keep the values of the first call, and
        ``anomaly=None`` takes what suits the model that there is. A model that tells the time cannot go on as a
        denoiser, nor the other way round: such an `objective` is refused.
    random_state : int, RandomState instance or None, default=None
        Seeds weights, row order and noise. An int gives the same detector at every call on the same machine.
    device : str or torch.device, default="auto"
        ``"auto"`` takes CUDA, else MPS, else the CPU. Networks of images train in bfloat16 where a CUDA device has
        units for it, with weights in single precision.
    verbose : int, default=0
        1 shows a progress bar with training and validation loss, rows a second and the remaining time.

    Attributes
    ----------
    model_ : torch.nn.Module
        The fitted `anomalib_gen.models.Denoiser`, in the units of standardised rows with compressed tails.
    anomaly_ : Component
        The anomaly in use, with what it learned.
    log_normalizer_ : float
        Logarithm of the integral of exp(-`energy`), set by `normalize`.
    log_normalizer_interval_ : tuple of float
        95 % interval of that estimate.
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
    EnergyDetector : The energy itself, by the same and other objectives.
    FlowDetector : Densities that cost one pass.

    Notes
    -----
    How the default for tables adapts to the data: gradient steps grow with the number of rows (`max_iter`), training
    ends when held-out rows say so, the network is narrower where rows and columns are few (`hidden_features`), starts
    at zero on top of the closed form and has a share in the anomaly that grows with the number of rows,
    N / (2 (N + 1000)) of N, and the closed form's bandwidths are the spacing of the rows, as far as columns let them be
    apart.

    A detector with stored rows keeps three copies of the training rows (images, and two histograms of each) in single
    precision, of a million rows and two gigabytes at most, an even choice of more; so does its model folder. Its kernel
    denoiser sums over 2,048 of them at most, and samples of a detector without a network lie close to these. Stored
    rows count alike, whatever their `sample_weight`, which is for the scaling and the network; only a weight of zero
    leaves a row out.

    Densities are those of rows with noise of the path's smallest level, or, where they are bounded, of sqrt(2) times
    that, in nats and in the units of X: a model cannot tell finer.

    `energy` is minus `elbo` in 32 steps with one pair of noise, 64 evaluations of the denoiser, because what composes
    with other detectors is evaluated and differentiated hundreds of times. It is a loose bound, of whatever network
    (that of ``network="energy"``, too): several nats, and more with more columns and a wider range of levels ("sub-vp"
    begins at a millionth). The guide shows how much; `normalize` makes up for it in a mixture. To compare normal rows
    with one another take `log_prob`, or `elbo` with more steps.

    References
    ----------
    .. [1] Ho, J., Jain, A., Abbeel, P. (2020). Denoising diffusion probabilistic models. NeurIPS. arXiv:2006.11239.
    .. [2] Song, Y. et al. (2021). Score-based generative modeling through stochastic differential equations. ICLR.
       arXiv:2011.13456.
    .. [3] Karras, T., Aittala, M., Aila, T., Laine, S. (2022). Elucidating the design space of diffusion-based
       generative models. NeurIPS. arXiv:2206.00364.
    .. [4] Livernoche, V., Jain, V., Hezaveh, Y., Ravanbakhsh, S. (2024). On diffusion modeling for anomaly detection.
       ICLR. arXiv:2305.18593.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_gen import DiffusionDetector
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 2)) @ [[1.0, 0.9], [0.0, 0.4]]
    >>> detector = DiffusionDetector(max_iter=200, hidden_features=64, random_state=0).fit(X)
    >>> detector.predict([[0.0, 0.0], [2.0, -2.0]])
    array([ 1, -1])
    >>> detector.reconstruct([[2.0, -2.0]]).shape
    (1, 2)
    """

    _objectives: ClassVar[Any] = {
        "denoising": Denoising,
        "diffusion-time": DiffusionTimeEstimation,
        "flow-matching": FlowMatching,
        "improved-ddpm": ImprovedDDPM,
    }
    _anomalies: ClassVar[Any] = {
        "closed_form": ClosedFormResidual,
        "combined": CombinedAnomaly,
        "denoising_error": DenoisingError,
        "diffusion_time": DiffusionTime,
        "elbo": DiffusionELBO,
        "likelihood": ODELikelihood,
        "path": DiffusionPath,
        "reconstruction": DiffusionReconstruction,
        "score_norm": ScoreNorm,
    }
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **GenerativeDetector._parameter_constraints,
        "path": [str, Path, None],
        "denoiser": [StrOptions(set(DENOISERS)), None],
        "network": [StrOptions(set(NETWORKS)), callable],
        "parametrization": [StrOptions(set(PARAMETRIZATIONS))],
        "hidden_features": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "n_blocks": [Interval(Integral, 0, None, closed="left")],
        "objective": [str, Component, None],
    }

    def __init__(
        self,
        *,
        path: Any = None,
        denoiser: str | None = None,
        network: Any = "auto",
        parametrization: str = "edm",
        hidden_features: int | str = "auto",
        n_blocks: int = 2,
        objective: Any = "denoising",
        anomaly: Any = None,
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
        self.path = path
        self.denoiser = denoiser
        self.network = network
        self.parametrization = parametrization
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

    # The model as a denoiser ------------------------------------------------------------------------------

    def denoise(self, X: Any, noise: float = 0.5) -> npt.NDArray[np.float64]:
        """Mean of the clean rows that rows with noise may stand for (equation 1 of the module).

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        noise : float, default=0.5
            Deviation of the noise that the rows are taken to have, in standard deviations of each column.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            In the units of X.

        Raises
        ------
        ValueError
            If the model has not learned that noise level.
        """
        level = self._check_level(noise)

        def clean(model: Any, x: torch.Tensor) -> torch.Tensor:
            return model.denoise(x, x.new_full((len(x),), level))

        return self._rows_to_rows(clean, self._validate(X, reset=False))

    def reconstruct(self, X: Any, *, noise: float = 1.0, n_steps: int = 20) -> npt.NDArray[np.float64]:
        """What rows should have looked like: the normal row that is reached from each by taking noise away.

        The row as it is, without noise added, is taken for one with noise, and followed along the probability-flow
        equation to the smallest noise level. So the result is determined by the row.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        noise : float, default=1.0
            Where the way starts, in standard deviations of each column: how much of a row may be replaced. The default
            leaves little of a row that fits nowhere.
        n_steps : int, default=20
            Steps of the way, in equal ratios of the noise.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            In the units of X.

        Raises
        ------
        ValueError
            If the model has not learned that noise level.
        """
        level = self._check_level(noise)
        return self._reconstruct(self._validate(X, reset=False), level, check_count(n_steps, "n_steps"))

    def _reconstruct(
        self, rows: npt.NDArray[Any], level: float = 1.0, n_steps: int = 20
    ) -> npt.NDArray[np.float64]:
        """Reconstruct validated rows."""

        def way(model: Any, x: torch.Tensor) -> torch.Tensor:
            low = model.noise_levels[0]
            if level <= low:
                return model.denoise(x, x.new_full((len(x),), low))
            levels = torch.logspace(np.log10(level), np.log10(low), n_steps + 1, dtype=torch.float64)

            def field(y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
                return -expand_as_rows(s, y) * model.score(y, s)

            y, _ = solve_ode(field, x, levels, method="heun")
            return model.denoise(y, y.new_full((len(y),), float(levels[-1])))

        return self._rows_to_rows(way, rows)

    def log_prob(self, X: Any, *, n_steps: int = LOG_PROB_STEPS) -> npt.NDArray[np.float64]:
        """Log-density of rows by the probability-flow equation, whatever the detector's anomaly.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        n_steps : int, default=100
            Runge-Kutta steps from the row to noise. Each has four evaluations of the model, with a backward pass for
            each column (beyond 32 columns for each of a few random directions).

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X; of rows with noise of the path's smallest level.
        """
        self._check_denoiser()
        part = ODELikelihood(n_steps=check_count(n_steps, "n_steps"))
        return -self._apply(part, self._validate(X, reset=False))

    def log_prob_error(self, X: Any, *, n_steps: int = LOG_PROB_STEPS) -> npt.NDArray[np.float64]:
        """Estimate how far the solver of `log_prob` is off, row by row.

        It is the difference from half as many steps, which is about the error of these: that of `log_prob` is a
        fraction of it, if the steps are short enough to converge. Beyond 32 columns the standard error of the random
        directions is added. What the model itself has not learned is no part of it.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        n_steps : int, default=100
            Those of `log_prob`; an even number. It takes half as long again.

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats; infinite where the solution is not finite.
        """
        self._check_denoiser()
        n_steps, seed = check_count(n_steps, "n_steps"), self._scoring_seed

        def error(model: Any, x: torch.Tensor) -> torch.Tensor:
            # The random directions of `log_prob`.
            probes = _runtime.scoring_generator(seed)
            found = ode_log_prob(model.denoise, x, model.noise_levels, n_steps=n_steps, generator=probes)
            return found.error.unsqueeze(1)

        return self._map(error, self._validate(X, reset=False), (1,), self._scaler)[:, 0]

    def normalize(self, *, n_samples: int = 256, random_state: Any = None) -> Self:
        """Estimate the integral Z of exp(-`energy`), so that a mixture has its constant.

        With p the density of `log_prob`, Z is the mean of exp(-E(x)) / p(x) over rows that are drawn from p.

        Parameters
        ----------
        n_samples : int, default=256
            Rows drawn, and given to `log_prob`; at least 2.
        random_state : int, RandomState instance or None, default=None
            None draws afresh at each call.

        Returns
        -------
        self
            With `log_normalizer_` and its 95 % interval `log_normalizer_interval_`. The next `fit` removes both.

        Notes
        -----
        The interval is that of the mean over rows. Where a few of them carry it, both are too low. Beyond 32 columns
        `log_prob` estimates a divergence from random directions, whose error makes Z too large.
        """
        self._check_denoiser()
        n_samples = check_count(n_samples, "n_samples", least=2)
        # The noise of the smallest level, which p has, stays on.
        rows = self.sample(n_samples, sampler_params={"final_denoise": False}, random_state=random_state)
        # The rows are the detector's own and have no names, of which `energy` and `log_prob` would warn.
        ratios = -self._energy(rows) + self._apply(ODELikelihood(n_steps=LOG_PROB_STEPS), rows)
        top = ratios.max()
        values = np.exp(ratios - top)
        error = float(1.96 * values.std() / values.mean() / np.sqrt(n_samples))
        log_z = float(top + np.log(values.mean()))
        self.log_normalizer_interval_ = (log_z - error, log_z + error)
        self.log_normalizer_ = log_z
        return self

    def elbo(self, X: Any, *, n_steps: int = 100, n_draws: int = 1) -> npt.NDArray[np.float64]:
        """Variational bound on the log-density of rows, whatever the detector's anomaly.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        n_steps : int, default=100
            Steps of the bound; more make it tighter.
        n_draws : int, default=1
            Pairs of noise e and -e at each step, the same for all rows. It is the mean over noise that is a bound: with
            one pair all values are off alike, and may lie above `log_prob`. In 100 steps of the default path that is
            next to nothing for independent normal columns, and .8 nats for a direction in which rows hardly vary;
            for k of them sqrt(k) times as much. Longer steps make it more, and n pairs less by sqrt(n).

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X; of rows with noise of sqrt(2) times the path's smallest level, so that between
            clusters narrower than that it may lie above `log_prob`.
        """
        self._check_denoiser()
        part = DiffusionELBO(n_steps=check_count(n_steps, "n_steps"), n_draws=check_count(n_draws, "n_draws"))
        return -self._apply(part, self._validate(X, reset=False))

    def sample(
        self,
        n_samples: int = 1,
        *,
        sampler: str = "auto",
        n_steps: int = 100,
        sampler_params: Mapping[str, Any] | None = None,
        random_state: Any = None,
    ) -> npt.NDArray[np.float64]:
        """Draw new rows from the model.

        Parameters
        ----------
        n_samples : int, default=1
        sampler : str, default="auto"
            A name in `anomalib_gen.samplers.SAMPLERS`: solvers of the probability-flow equation ("heun", "euler",
            ...), of the reverse diffusion, DDPM's and DDIM's steps, or Langevin dynamics. "ancestral" takes the
            variances that "improved-ddpm" has learned. "auto" takes "heun", but "ddim" on the "cosine" path: "heun" and
            "rk4" go wrong where levels far above the data are far apart, unless there are several hundred steps.
        n_steps : int, default=100
            Steps from noise to rows; a discrete path has at most its own.
        sampler_params : dict or None, default=None
            Further options of the sampler, by the names that its function in `anomalib_gen.samplers` has for them: for
            example ``{"eta": 0.5}`` of "ddim", or ``{"n_corrections": 2, "signal_to_noise": 0.1}`` of
            "predictor-corrector".
        random_state : int, RandomState instance or None, default=None
            None draws afresh at each call.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            In the units and the order of X's columns.

        Raises
        ------
        ValueError
            If `n_samples` or `n_steps` is not a positive integer, or the sampler, or an option of it, is unknown.
        """
        n_steps = check_count(n_steps, "n_steps")
        if sampler not in ("auto", *SAMPLERS):
            known = ", ".join(map(repr, ("auto", *SAMPLERS)))
            raise ValueError(f"sampler={sampler!r} is unknown. Known: {known}.")
        self._check_denoiser()
        if sampler == "auto":
            sampler = "ddim" if isinstance(self.model_.path, CosineBetas) else "heun"
        options = dict(sampler_params or {})
        known_options = sampler_options(sampler)
        for name in options:
            if name not in known_options:
                raise ValueError(
                    f"sampler_params has {name!r}, which sampler={sampler!r} does not take. "
                    f"It takes: {', '.join(map(repr, known_options))}."
                )
        if sampler == "ancestral" and getattr(self.model_, "learned_variance", False):
            options.setdefault("variance", "learned")
        return self._draw(n_samples, random_state, sampler=sampler, n_steps=n_steps, **options)

    def _check_denoiser(self) -> None:
        check_is_fitted(self)
        if not isinstance(self.model_, Denoiser):
            raise TypeError(
                f"This detector has learned to tell how much noise is in a row, not to take it away: it has a "
                f"{type(self.model_).__name__} and no denoiser. Fit it with another objective than 'diffusion-time'."
            )

    def _check_level(self, noise: float) -> float:
        self._check_denoiser()
        model: Any = self.model_
        low, high = model.noise_levels
        if not isinstance(noise, Real) or not low <= noise <= high:
            raise ValueError(
                f"noise must lie between {low:g} and {high:g}, the path's levels, got {noise!r}."
            )
        return float(noise)

    def _rows_to_rows(self, function: Any, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return self._scaler.inverse_transform(self._map(function, rows, self.event_shape_, self._scaler))

    # What a family provides -------------------------------------------------------------------------------

    def _fit(self, X: Any, sample_weight: Any, *, continued: bool, one_pass: bool) -> Self:
        objective = self._resolve_objective()
        if (
            isinstance(objective, FlowMatching)
            and objective.pairing != "independent"
            and self.anomaly is None
        ):
            warn_user(
                f"{objective!r} matches rows with noise: the flow along the differential equation is right, but the "
                "default anomaly asks what lies behind noise that has nothing to do with the row. Choose "
                "anomaly='reconstruction' or 'likelihood', or pairing='independent'."
            )
        super()._fit(X, sample_weight, continued=continued, one_pass=one_pass)
        self._forget_normalizer()
        return self

    def _make_scaler(
        self,
        X: npt.NDArray[Any],
        rows: npt.NDArray[np.integer] | None,
        weights: npt.NDArray[np.float64] | None,
    ) -> Standardizer:
        return TailedStandardizer.fit(X, rows, weights)

    def _resolve_path(self, objective: Component) -> Path:
        def default() -> Path:
            if isinstance(objective, ImprovedDDPM):
                return CosineBetas()
            if isinstance(objective, FlowMatching):
                return Linear()
            return EDM(**TABLE_LEVELS) if len(self.event_shape_) == 1 else EDM()

        if self.path is None:
            return default()
        if isinstance(self.path, Path):
            return clone(self.path)
        if self.path not in PATHS:
            known = ", ".join(map(repr, PATHS))
            raise ValueError(f"path={self.path!r} is unknown. Known names: {known}; or pass a Path.")
        return PATHS[self.path]()

    def _resolve_denoiser(self) -> str:
        energy, images = self.network == "energy", len(getattr(self, "event_shape_", ())) > 1
        if self.denoiser is None and images:
            # Settings of a component would go unused without a network.
            plain = self.network == "auto" and self.objective in (None, "denoising")
            return "closed-form" if plain else "network"
        if self.denoiser is None:
            return "network" if energy else "hybrid"
        if self.denoiser == "hybrid" and energy:
            raise ValueError(
                "denoiser='hybrid' does not work with network='energy': what it adds to the closed form is no "
                "gradient. Choose another network, or denoiser='network'."
            )
        return self.denoiser

    def _meet_rows(
        self, model: nn.Module, rows: ArrayRows, generator: torch.Generator, *, more: bool
    ) -> None:
        if isinstance(model, ClosedFormDenoiser):
            block = _runtime.scoring_block_rows(math.prod(rows.take(torch.arange(1)).shape), rows.device)
            # What is not kept is left out here: all rows together may not fit into memory.
            kept = even_choice(len(rows), model.memory.capacity)
            parts = kept.split(torch.bincount(kept // block, minlength=-(-len(rows) // block)).tolist())
            blocks = enumerate(zip(rows.blocks(block), parts, strict=True))
            model.remember((x[part - k * block] for k, (x, part) in blocks), generator, keep=more)

    def _exact_in_bfloat16(self, model: nn.Module) -> bool:
        # Noise of the level itself hides the network's rounding, and the denoiser weighs its output by the level.
        # Tables have networks too small to gain; what the closed form leaves over is too small to round.
        return isinstance(model, NetworkDenoiser) and len(self.event_shape_) > 1

    def _make_model(self, event_shape: tuple[int, ...], grain: npt.NDArray[np.float64]) -> nn.Module:
        return self._make_model_for(None, event_shape, grain)

    def _make_model_for(
        self, n_rows: int | None, event_shape: tuple[int, ...], grain: npt.NDArray[np.float64]
    ) -> nn.Module:
        objective = self._resolve_objective()
        if isinstance(objective, DiffusionTimeEstimation):
            return objective.make_model(
                lambda n_outputs: self._make_network(event_shape, (n_outputs,), 0, self._width())
            )
        path = self._resolve_path(objective)
        denoiser = self._resolve_denoiser()
        learned_variance = getattr(objective, "learns_variance", False)
        if denoiser == "closed-form":
            if learned_variance:
                raise ValueError(
                    f"denoiser='closed-form' has no network that could learn variances, as {objective!r} wants to. "
                    "Choose another denoiser or objective."
                )
            if self.denoiser is None:
                self._warn_of_unused()
            return ClosedFormDenoiser(path, event_shape, torch.from_numpy(grain))
        if self.network == "energy":
            if learned_variance:
                raise ValueError(
                    f"network='energy' has one output and cannot learn variances, as {objective!r} wants to. "
                    "Choose another network or objective."
                )
            model = EnergyModel(
                self._make_network(event_shape, (1,), 1, self._width()),
                event_shape if len(event_shape) > 1 else event_shape[0],
                noise_levels=path.noise_levels,
                grain=torch.from_numpy(grain),
                tail_start=math.inf,  # the scaling of the rows has compressed them
            )
            return ScoreDenoiser(model, path, event_shape=event_shape)
        first, *rest = event_shape
        predicted = (2 * first, *rest) if learned_variance else event_shape
        seen = (2 * first, *rest) if denoiser == "hybrid" else event_shape
        adapts = denoiser == "hybrid" and not rest
        width = self._width((n_rows, first) if adapts and n_rows is not None else None)
        network = self._make_network(seen, predicted, LEVEL_FEATURES, width)
        if denoiser == "hybrid":
            return HybridDenoiser(
                network, path, event_shape, torch.from_numpy(grain), learned_variance=learned_variance
            )
        return NetworkDenoiser(
            network,
            path,
            event_shape=event_shape,
            parametrization=self.parametrization,
            grain=torch.from_numpy(grain),
            learned_variance=learned_variance,
        )

    def _warn_of_unused(self) -> None:
        """Warn of sizes and training that were asked for where the default for images has no network."""
        defaults = inspect.signature(DiffusionDetector).parameters
        unused = [name for name in OF_NETWORKS if getattr(self, name) != defaults[name].default]
        if unused:
            warn_user(
                f"DiffusionDetector stores images by default and trains no network, so {', '.join(unused)} "
                f"{'are' if len(unused) > 1 else 'is'} not used. Set denoiser='network' to train one, or "
                "denoiser='closed-form' to silence this."
            )

    def _width(self, shape: tuple[int, int] | None = None) -> int:
        """What `hidden_features` stands for; `shape` is that of the rows that a hybrid is trained on, if any is."""
        least, most = WIDTHS
        if self.hidden_features != "auto":
            return int(self.hidden_features)
        if shape is None:
            return most
        # Found by the loss of other rows, without labels of anomalies: benchmarks/network_width.py.
        enough = max(shape[0] * math.sqrt(shape[1]) / 4, 1)
        return min(max(2 ** int(math.log2(enough)), least), most)

    def _make_network(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], context_features: int, width: int
    ) -> nn.Module:
        """Build a network between shapes; those of rows are plain numbers for a factory."""
        images = len(inputs) > 1
        sizes = [shape if len(shape) > 1 else shape[0] for shape in (inputs, outputs)]
        if callable(self.network):
            return build_network(self.network, *sizes, context_features)
        return make_network(
            *sizes,
            kind="auto" if self.network == "energy" else self.network,
            context_features=context_features,
            # A sixteenth and an eighth of this as channels are too few for what images need more of than tables.
            hidden_features=(2 if images else 1) * width,
            n_blocks=self.n_blocks,
        )

    def _default_objective(self) -> Component:
        return Denoising()

    def _default_anomaly(self, model: nn.Module | None) -> Component:
        if model is None:
            tells_time = isinstance(self._resolve_objective(), DiffusionTimeEstimation)
            denoiser = self._resolve_denoiser()
        else:
            tells_time = not isinstance(model, Denoiser)
            kinds = {HybridDenoiser: "hybrid", ClosedFormDenoiser: "closed-form"}
            denoiser = next((name for kind, name in kinds.items() if isinstance(model, kind)), "network")
        if tells_time:
            return DiffusionTime(estimator="learned")
        anomalies = {"closed-form": ClosedFormResidual(), "hybrid": CombinedAnomaly()}
        return anomalies.get(denoiser, ScoreNorm(weighting="noise"))

    def _energy_anomaly(self) -> Any:
        self._check_denoiser()
        # Few steps: what composes with others is differentiated, hundreds of times.
        return DiffusionELBO(n_steps=ENERGY_STEPS)

    def _auto_max_iter(self, steps_per_pass: int) -> int:
        return min(max(min(400 * steps_per_pass, 4000), 2 * steps_per_pass, 500), 10_000)
