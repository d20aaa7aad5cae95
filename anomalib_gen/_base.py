"""The scikit-learn border: what every detector shares.

A detector is a generative model plus one number per row. Below this file everything is torch; above it, numpy and
data frames. Scores are computed in float64 (float32 on MPS), block by block, so that a row's score depends neither
on the rows beside it nor on how many there are.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import nn

from anomalib_gen import _runtime
from anomalib_gen._component import Component, resolve_component
from anomalib_gen._inputs import validate_rows
from anomalib_gen._outlier import OutlierScores
from anomalib_gen._recording import is_recordable
from anomalib_gen._scaling import ArrayRows, Standardizer, column_grain, rows_per_block
from anomalib_gen._scoring import dry_run, map_in_blocks, naming_what_lacks, score_in_blocks
from anomalib_gen._training import TrainingOptions, TrainingResult, train
from anomalib_gen._warnings import warn_user
from anomalib_gen.anomaly import IMAGE_ANOMALIES, Energy

MAX_THRESHOLD_ROWS = 200_000
"""Training rows scored for `offset_`; beyond this a random subset is taken, whose quantile is as good."""
AUTO_FALSE_POSITIVES = 0.05
"""Share of new normal rows below the threshold that ``contamination="auto"`` sets."""
TABLE_BATCH, IMAGE_BATCH, IMAGE_BATCH_PIXELS = 256, 64, 2**18
"""Rows a gradient step by default; fewer images where there are more pixels, 4 of 256 x 256."""
COMPONENTS = {
    "anomaly": "anomalib_gen.anomaly",
    "objective": "anomalib_gen.objectives",
    "path": "anomalib_gen.paths",
}
"""Parameters that are components, or names of them, and where those are found."""
MIN_HELD_OUT, MAX_HELD_OUT = 5, 2048
"""Fewer held-out rows say nothing about when to stop; more cost time and say nothing new."""


def rows_in_use(
    X: npt.NDArray[Any], sample_weight: Any
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64] | None]:
    """Positions of the rows with a positive weight, and their weights, of mean 1; None where there are none."""
    if sample_weight is None:
        return np.arange(len(X)), None
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    # Only ratios count. In units of the largest, by a power of two so that no digit changes, their sum is finite, and a
    # weight that is nothing beside the others is zero for all who use it.
    weights = np.ldexp(weights, -int(np.frexp(weights.max())[1]))
    index = np.flatnonzero(weights)
    if len(index) < 2:
        raise ValueError(
            f"sample_weight leaves {len(index)} rows with a positive weight; at least 2 are needed."
        )
    return index, weights[index] * (len(index) / weights.sum())


def outlier_threshold(scores: npt.NDArray[np.float64], contamination: float | str) -> float:
    """Score below which rows are outliers, from the scores of rows that tell what is usual.

    A number is the share of these rows that lie below. "auto" is about rows to come: of n scores, a new one of the same
    kind falls below the k-th smallest with probability k / (n + 1), which Weibull's rule interpolates. Where n is less
    than 19 the smallest score is taken, and the probability is 1 / (n + 1).
    """
    if contamination == "auto":
        return float(np.quantile(scores, AUTO_FALSE_POSITIVES, method="weibull"))
    return float(np.quantile(scores, float(contamination)))


class GenerativeDetector(OutlierScores, BaseEstimator, metaclass=ABCMeta):
    """Base class of all detectors.

    A subclass declares its parameters and gives `_make_model`, `_default_objective`, `_default_anomaly` and
    `_auto_max_iter`; it names the strings its `objective` and `anomaly` accept in `_objectives` and
    `_anomalies`.
    """

    _objectives: ClassVar[Any]
    _anomalies: ClassVar[Any]
    _image_anomalies: ClassVar[Any] = IMAGE_ANOMALIES
    """Further ones that `anomaly` takes by name for images, of a family whose models have what they need."""
    _image_steps: ClassVar[tuple[int, int]] = (20, 400)
    """Passes over images that ``max_iter="auto"`` stands for, and the gradient steps that they are cut to."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "anomaly": [str, Component, None],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "max_iter": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "max_grad_norm": [Interval(Real, 0, None, closed="neither")],
        "ema_decay": [Interval(Real, 0, 1, closed="left")],
        "contamination": [Interval(Real, 0, 0.5, closed="right"), StrOptions({"auto"})],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "device": [str, torch.device],
        "verbose": ["verbose"],
    }

    anomaly: Any
    batch_size: int | str
    contamination: float | str
    device: Any
    ema_decay: float
    learning_rate: float | str
    max_grad_norm: float
    max_iter: int | str
    n_iter_no_change: int
    random_state: Any
    validation_fraction: float
    verbose: int
    warm_start: bool
    weight_decay: float

    model_: nn.Module
    anomaly_: Component
    best_iter_: int
    event_shape_: tuple[int, ...]
    _eight_bit: bool = False
    n_iter_: int
    loss_curve_: list[float]
    validation_curve_: list[float]
    # Detectors that were saved before they were kept have none.
    loss_steps_: list[int] | None = None
    validation_steps_: list[int] | None = None
    _scaler: Standardizer
    _seeds: list[int]

    def set_params(self, **params: Any) -> Self:
        """Set parameters of this detector, or of its components as ``<component>__<parameter>``.

        Parameters
        ----------
        **params : dict

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If there is no such parameter, as where a component is given by its name, which stands for its defaults.
        """
        own = self.get_params(deep=False)
        for name in params:
            argument, nested, _ = name.partition("__")
            value = params.get(argument, own.get(argument))
            if (
                nested
                and argument in COMPONENTS.keys() & own.keys()
                and (value is None or isinstance(value, str))
            ):
                raise ValueError(
                    f"{name} cannot be set while {argument}={value!r}: a name, or None, stands for a component with "
                    f"its defaults. Set {argument} to an object of {COMPONENTS[argument]} first."
                )
        super().set_params(**params)
        return self

    # What a family provides -------------------------------------------------------------------------------

    @abstractmethod
    def _make_model(self, event_shape: tuple[int, ...], grain: npt.NDArray[np.float64]) -> nn.Module:
        """Build the model on the CPU, in float32; `grain` is what `_scaling.column_grain` found."""

    def _make_model_for(
        self, n_rows: int | None, event_shape: tuple[int, ...], grain: npt.NDArray[np.float64]
    ) -> nn.Module:
        """`_make_model` for so many rows to train on: None where more may follow, as in a stream."""
        return self._make_model(event_shape, grain)

    @abstractmethod
    def _default_objective(self) -> Component:
        """Return the objective that ``objective=None`` stands for."""

    @abstractmethod
    def _default_anomaly(self, model: nn.Module | None) -> Component:
        """Return the anomaly that ``anomaly=None`` stands for: with a model, which may be older than the parameters."""

    @abstractmethod
    def _auto_max_iter(self, steps_per_pass: int) -> int:
        """Gradient steps that ``max_iter="auto"`` stands for, where one pass over the rows takes `steps_per_pass`."""

    def _resolve_objective(self) -> Component:
        """Return the objective of a fit, a component of its own."""
        component: Component = resolve_component(
            getattr(self, "objective", None),
            known=self._objectives,
            argument="objective",
            default=self._default_objective,
        )
        return component

    def _make_scaler(
        self,
        X: npt.NDArray[Any],
        rows: npt.NDArray[np.integer] | None,
        weights: npt.NDArray[np.float64] | None,
    ) -> Standardizer:
        """Scaling between the units of X and those of the model; a family of discrete rows may take none."""
        return Standardizer.fit(X, rows, weights)

    def _meet_rows(
        self, model: nn.Module, rows: ArrayRows, generator: torch.Generator, *, more: bool
    ) -> None:
        """Show a model the rows that it will be trained on, if it keeps any; `more` if earlier ones stay."""

    def _cell(self, scaler: Standardizer) -> float:
        """Width of the cells over which discrete rows are spread, in the model's units; 0 for none."""
        return scaler.cell / float(np.max(scaler.scale)) if scaler.cell else 0.0

    def _note_rows(self, X: npt.NDArray[Any], index: npt.NDArray[np.integer]) -> None:
        """Set what else a family tells of the rows at `index` that it was just fitted to."""

    def _exact_in_bfloat16(self, model: nn.Module) -> bool:
        """Whether the loss and its gradient are exact enough if the network computes in bfloat16."""
        return False

    def _resolve_learning_rate(self) -> float:
        return float(self.learning_rate)

    def _training_options(self, n_rows: int, *, one_pass: bool) -> TrainingOptions:
        """How to train on `n_rows` rows; once over them if `one_pass`."""
        images = len(self.event_shape_) > 1
        if self.batch_size != "auto":
            batch_size = int(self.batch_size)
        elif images:
            batch_size = max(1, min(IMAGE_BATCH, IMAGE_BATCH_PIXELS // int(np.prod(self.event_shape_[1:]))))
        else:
            batch_size = TABLE_BATCH
        steps_per_pass = -(-n_rows // batch_size)
        if one_pass:
            max_iter = steps_per_pass
        elif self.max_iter == "auto" and images:
            passes, most = self._image_steps
            max_iter = min(max(min(passes * steps_per_pass, most), 2 * steps_per_pass, 200), 10_000)
        elif self.max_iter == "auto":
            max_iter = self._auto_max_iter(steps_per_pass)
        else:
            max_iter = int(self.max_iter)
        return TrainingOptions(
            max_iter=max_iter,
            batch_size=batch_size,
            rows_per_evaluation=batch_size if images else 1024,
            learning_rate=self._resolve_learning_rate(),
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            ema_decay=self.ema_decay,
            eval_every=max(25, max_iter // 40),
            n_iter_no_change=self.n_iter_no_change,
            # A stream of passes has no end towards which the step size could fall; but each pass starts with an
            # optimiser that knows no gradient scales yet, hence a short warm-up.
            warmup=10 if one_pass else 50,
            schedule=not one_pass,
            verbose=int(self.verbose),
        )

    # Fitting ----------------------------------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the model to rows that are mostly normal.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features), or (n_samples, channels, height, width)
            At least two rows. Memory-mapped arrays are read in blocks. Images of uint8 are taken for whole numbers
            from 0 to 255 and dequantised; images of any other type, whole numbers included, for real ones, with a
            warning if these are whole numbers from 0 to 255.
        y : ignored
            For scikit-learn's conventions.
        sample_weight : array-like of shape (n_samples,), optional
            Non-negative weight of each row in the loss and in the scaling; a weight of zero leaves a row out.

        Returns
        -------
        self
        """
        continued = self.warm_start and hasattr(self, "model_")
        with self._restored_on_failure(), _runtime.within_quota():
            return self._fit(X, sample_weight, continued=continued, one_pass=False)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Continue training with one pass over new rows, in the scaling of the first call.

        The threshold `offset_`, and what the anomaly learns from rows (the entropy of typicality), are set anew from
        these rows, so a call with few rows leaves a rough threshold. The first call on an unfitted detector fixes the
        scaling and builds the model; a first call to `fit` trains it to the end instead, and is the better start.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)
        y : ignored
        sample_weight : array-like of shape (n_samples,), optional

        Returns
        -------
        self
        """
        with self._restored_on_failure(), _runtime.within_quota():
            return self._fit(X, sample_weight, continued=hasattr(self, "model_"), one_pass=True)

    # Training needs gradients, also within a caller's no_grad or inference_mode.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def _fit(self, X: Any, sample_weight: Any, *, continued: bool, one_pass: bool) -> Self:
        X = self._validate(X, reset=not continued, min_rows=2)
        self.event_shape_, self._eight_bit = X.shape[1:], X.dtype == np.uint8
        device = _runtime.resolve_device(self.device)
        objective = self._resolve_objective()
        random = check_random_state(self.random_state)
        seeds = [int(seed) for seed in random.randint(np.iinfo(np.int32).max, size=4)]

        index, weights = rows_in_use(X, sample_weight)
        train_index, held_out_index = self._split(len(index), np.random.RandomState(seeds[0]))

        if continued:
            scaler, model = self._scaler, copy.deepcopy(self.model_).float()
        else:
            scaler = self._make_scaler(X, None if len(index) == len(X) else index, weights)
            # The first weights of a seed are those drawn in float32.
            with _runtime.forked_rng(seeds[1]), _runtime.SinglePrecision():
                grain = column_grain(X, index[train_index], scaler)
                n_rows = None if one_pass else len(train_index)
                model = self._make_model_for(n_rows, X.shape[1:], grain).float()
            for part in (model, getattr(model, "model", model)):
                part.cell = self._cell(scaler)
        anomaly = self._resolve_anomaly(model)
        model = model.to(device)

        def pick(positions: npt.NDArray[np.integer]) -> torch.Tensor | None:
            return None if weights is None else torch.from_numpy(weights[positions])

        rows = ArrayRows(X, index[train_index], scaler, device, weights=pick(train_index))
        held_out = ArrayRows(X, index[held_out_index], scaler, device) if len(held_out_index) else None
        self._meet_rows(model, rows, _runtime.make_generator(seeds[1], device), more=continued and one_pass)
        if hasattr(objective, "prepare"):
            naming = naming_what_lacks("objective", objective, model, continued=continued)
            with _runtime.forked_rng(seeds[2], device), naming:
                objective.prepare(model, rows, _runtime.make_generator(seeds[2], device))
        two = rows.take(torch.arange(2))
        dry_run(model, two, device, continued=continued, objective=objective, anomaly=anomaly)
        result = TrainingResult()
        options = self._training_options(len(rows), one_pass=one_pass)
        if self._exact_in_bfloat16(model) and _runtime.is_fast_in_bfloat16(device):
            options = replace(options, mixed_precision=True)
        # A user's own network may do one thing in one step and another in the next.
        own = any(callable(v) and not isinstance(v, Component) for v in self.get_params(deep=False).values())
        alike = is_recordable(objective) and getattr(model, "recordable", True)
        options = replace(options, recorded=alike and not own)
        if any(parameter.requires_grad for parameter in model.parameters()):
            with _runtime.forked_rng(seeds[2], device):
                result = train(
                    model,
                    objective,
                    rows,
                    options=options,
                    seed=seeds[2],
                    device=device,
                    weights=rows.weights,
                    validation=held_out,
                    validation_weights=pick(held_out_index),
                    label=type(self).__name__,
                )
        if hasattr(objective, "conclude"):
            objective.conclude(model, rows, _runtime.make_generator(seeds[2], device))
        model = model.to(_runtime.event_dtype(self.event_shape_, device))
        self._note_training(result, more=continued and hasattr(self, "n_iter_"))
        self.model_, self._scaler, self._seeds = model, scaler, seeds
        self._note_rows(X, index)
        # Held-out rows are what scoring will meet; training rows look a little too normal.
        self._set_anomaly(anomaly, X, index, held_out_index, rows if held_out is None else held_out)
        return self

    def _note_training(self, result: TrainingResult, *, more: bool) -> None:
        """Set what is told of the training; `more` if it went on from an earlier one."""
        if not more:
            self.n_iter_, self.loss_curve_, self.validation_curve_ = 0, [], []
            self.loss_steps_, self.validation_steps_ = [], []
        before = self.n_iter_
        self.loss_curve_ = self.loss_curve_ + result.loss_curve
        self.validation_curve_ = self.validation_curve_ + result.validation_curve
        # Where those of the first points are not known, later ones would belong to the wrong points.
        if self.loss_steps_ is not None and self.validation_steps_ is not None:
            self.loss_steps_ = self.loss_steps_ + [before + step for step in result.loss_steps]
            self.validation_steps_ = self.validation_steps_ + [
                before + step for step in result.validation_steps
            ]
        self.best_iter_, self.n_iter_ = before + result.best_iter, before + result.n_iter

    @_runtime.within_quota()
    def with_anomaly(self, anomaly: Any, X: Any, sample_weight: Any = None) -> Self:
        """Return a detector with the same model and another anomaly, without training again.

        It is what `fit` would have given with that anomaly and the same seed, at the cost of scoring.

        Parameters
        ----------
        anomaly : str, component or None
            As the parameter of that name.
        X : array-like or data frame of shape (n_samples, n_features)
            The rows that `fit` saw: what the anomaly learns and the threshold `offset_` come from them.
        sample_weight : array-like of shape (n_samples,), optional
            The weights that `fit` saw.

        Returns
        -------
        detector of the same class
            A fitted one, with a copy of the model.
        """
        check_is_fitted(self)
        X = self._validate(X, reset=False, min_rows=2)
        other = copy.copy(self).set_params(anomaly=anomaly)
        other._validate_params()
        part, device = other._resolve_anomaly(self.model_), self._scoring_device()
        index, _ = rows_in_use(X, sample_weight)
        train_index, held_out_index = self._split(len(index), np.random.RandomState(self._seeds[0]))
        reference = held_out_index if len(held_out_index) else train_index
        rows = ArrayRows(X, index[reference], self._scaler, device)
        dtype = _runtime.event_dtype(self.event_shape_, device)
        dry_run(self._model_on(device), rows.take(torch.arange(2)).to(dtype), device, anomaly=part)
        other._set_anomaly(part, X, index, held_out_index, rows)
        return other

    def _resolve_anomaly(self, model: nn.Module | None = None) -> Component:
        component: Component = resolve_component(
            self.anomaly,
            known=self._known_anomalies(),
            argument="anomaly",
            default=lambda: self._default_anomaly(model),
        )
        return component

    def _known_anomalies(self) -> dict[str, Any]:
        """Names that `anomaly` takes, and their components: for tables, or for images once `event_shape_` is one's."""
        images = len(getattr(self, "event_shape_", ())) > 1
        return {**self._anomalies, **(self._image_anomalies if images else {})}

    def _set_anomaly(
        self,
        anomaly: Component,
        X: npt.NDArray[Any],
        index: npt.NDArray[np.integer],
        held_out_index: npt.NDArray[np.integer],
        reference: ArrayRows,
    ) -> None:
        """Let the anomaly learn from the rows of `reference`, and set the threshold."""
        if hasattr(anomaly, "prepare"):
            device = reference.device
            dtype = _runtime.event_dtype(self.event_shape_, device)
            block = _runtime.scoring_block_rows(int(np.prod(X.shape[1:])), device)
            with torch.no_grad():
                anomaly.prepare(
                    self._model_on(device),
                    (x.to(dtype) for x in reference.blocks(block)),
                    _runtime.scoring_generator(self._scoring_seed),
                )
        self.anomaly_ = anomaly
        automatic = self.contamination == "auto"
        judged = index[held_out_index] if automatic and len(held_out_index) else index
        scores = self._score_some(X, judged, np.random.RandomState(self._seeds[0]))
        self.offset_ = outlier_threshold(scores, self.contamination)

    @property
    def _scoring_seed(self) -> int:
        return self._seeds[3]

    def _split(
        self, n: int, random: np.random.RandomState
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Positions to train on and positions held out; none are held out where too few rows would be left."""
        order = random.permutation(n)
        n_held_out = min(round(self.validation_fraction * n), MAX_HELD_OUT)
        if n_held_out < MIN_HELD_OUT or n - n_held_out < 2:
            n_held_out = 0
        # In the array's order, so that a file on disk is read from front to back.
        return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])

    def _score_some(
        self, X: npt.NDArray[Any], index: npt.NDArray[np.integer], random: np.random.RandomState
    ) -> npt.NDArray[np.float64]:
        """Scores of the rows at `index`, or of a random `MAX_THRESHOLD_ROWS` of them."""
        if len(index) > MAX_THRESHOLD_ROWS:
            index = np.sort(random.choice(index, MAX_THRESHOLD_ROWS, replace=False))
        elif len(index) == len(X):
            return self._score(X)
        block = min(2**16, rows_per_block(int(np.prod(X.shape[1:]))))
        return np.concatenate(
            [self._score(X[index[rows]]) for rows in _runtime.row_blocks(len(index), block)]
        )

    # Scoring ----------------------------------------------------------------------------------------------

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:
        """Score rows; lower is more abnormal.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            Minus the anomaly of each row. For a likelihood: the log-density in nats, in the units of X.
        """
        check_is_fitted(self)
        return self._score(self._validate(X, reset=False))

    def energy(self, X: Any) -> npt.NDArray[np.float64]:
        """Energy of rows, E(x) = -log p(x) up to a constant, whatever the detector's anomaly.

        For a flow it is minus the exact log-likelihood, for a variational autoencoder minus the evidence lower bound,
        and for a diffusion model minus its variational bound in a few steps, which is the roughest of them. The
        energies of different families are on one scale and compose, see `ComposedDetector`.

        Parameters
        ----------
        X : array-like or data frame of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats, in the units of X.
        """
        check_is_fitted(self)
        return self._energy(self._validate(X, reset=False))

    def _energy_anomaly(self) -> Any:
        """The anomaly that is the family's energy."""
        return Energy()

    def _forget_normalizer(self) -> None:
        """Remove the constant of earlier weights."""
        for name in ("log_normalizer_", "log_normalizer_interval_"):
            if hasattr(self, name):
                delattr(self, name)

    def _energy(self, X: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return self._apply(self._energy_anomaly(), X)

    def _torch_energy(
        self, device: torch.device, *, scaled: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return `energy` as a differentiable function of rows ``(n, D)`` on `device`, in the units of X.

        If `scaled`, of rows from which the scaler's shift and scale were taken: in the units of X a column of subnormal
        numbers has a gradient beyond the floating-point range.
        """
        model, anomaly = self._model_on(device), self._energy_anomaly()
        dtype, seed = _runtime.event_dtype(self.event_shape_, device), self._scoring_seed

        def energy(x: torch.Tensor) -> torch.Tensor:
            enter = self._scaler.finish_tensor if scaled else self._scaler.transform_tensor
            z, log_det = enter(x.to(dtype))
            values: torch.Tensor = anomaly(model, z, _runtime.scoring_generator(seed))
            return values - log_det

        return energy

    def sample(self, n_samples: int = 1, *, random_state: Any = None) -> npt.NDArray[Any]:
        """Draw new rows from the model.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            None draws afresh at each call.

        Returns
        -------
        ndarray of shape (n_samples, n_features) or (n_samples, channels, height, width)
            In the units and the order of X's columns; uint8 for a detector of such images.

        Raises
        ------
        ValueError
            If `n_samples` is not a positive integer.
        """
        return self._draw(n_samples, random_state)

    def _draw(self, n_samples: int, random_state: Any, **options: Any) -> npt.NDArray[Any]:
        """Draw rows in the units of X; `options` are the model's."""
        check_is_fitted(self)
        _runtime.check_count(n_samples, "n_samples")
        device = self._scoring_device()
        model: Any = self._model_on(device)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        generator = _runtime.make_generator(seed, device)
        block = _runtime.scoring_block_rows(int(np.prod(self.event_shape_)), device)
        drawn = np.empty((n_samples, *self.event_shape_))
        with torch.no_grad(), _runtime.within_quota():
            for rows in _runtime.row_blocks(int(n_samples), block):
                z = model.sample(rows.stop - rows.start, generator, **options)
                drawn[rows] = self._scaler.inverse_transform(z.cpu().double().numpy())
        if self._eight_bit:
            return np.clip(np.rint(drawn), 0, 255).astype(np.uint8)
        return drawn

    def _score(self, X: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Score validated rows with the detector's anomaly."""
        return -self._apply(self.anomaly_, X)

    def _apply(self, anomaly: Any, X: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Anomaly of validated rows, ``(n,)``; a density is turned into one in the units of X."""
        device = self._scoring_device()
        return score_in_blocks(
            self._model_on(device), anomaly, X, scaler=self._scaler, seed=self._scoring_seed, device=device
        )

    def _map(
        self,
        function: Callable[[Any, torch.Tensor], torch.Tensor],
        X: npt.NDArray[Any],
        shape: tuple[int, ...],
        scaler: Standardizer | None,
    ) -> npt.NDArray[np.float64]:
        """``function(model, x)`` of rows, scaled first if there is a scaler; ``(n, *shape)``."""
        device = self._scoring_device()
        return map_in_blocks(self._model_on(device), function, X, shape=shape, scaler=scaler, device=device)

    # Some anomalies take gradients, also within a caller's inference_mode: no weight may be one of that mode.
    @torch.inference_mode(False)
    def _model_on(self, device: torch.device) -> nn.Module:
        """Return the model on `device` in the precision of scores there, whatever machine it was fitted on."""
        dtype = _runtime.event_dtype(self.event_shape_, device)
        tensors = list(itertools.chain(self.model_.parameters(), self.model_.buffers()))
        if any(t.is_inference() for t in tensors):
            _runtime.leave_inference_mode(self.model_)
        # A look takes less time than `to`, which sets every weight anew.
        if any(t.device != device or (t.is_floating_point() and t.dtype != dtype) for t in tensors):
            self.model_.to(device=device, dtype=dtype)
        return self.model_

    def _scoring_device(self) -> torch.device:
        """Where to score: where asked, or on the CPU for a detector that comes from a machine with more."""
        try:
            return _runtime.resolve_device(self.device)
        except ValueError:
            warn_user(
                f"device={self.device!r} is not available here; scoring on the CPU. "
                "Silence this with set_params(device='auto').",
            )
            return torch.device("cpu")

    # Input ------------------------------------------------------------------------------------------------

    def _validate(self, X: Any, *, reset: bool, min_rows: int = 1) -> npt.NDArray[Any]:
        """Check rows and return them as float32 or float64, without a copy where they are so already."""
        return validate_rows(self, X, reset=reset, min_rows=min_rows)

    # Pickling ---------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the model on the CPU, so that a pickle opens on any machine."""
        state = dict(super().__getstate__())
        if "model_" in state:
            state["model_"] = copy.deepcopy(state["model_"]).to("cpu")
        return state
