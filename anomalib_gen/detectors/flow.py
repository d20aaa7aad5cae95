"""FlowDetector (prototype docstring)."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from anomalib_gen._base import GenerativeDetector
from anomalib_gen._component import Component
from anomalib_gen._training import TrainingOptions
from anomalib_gen.anomaly import ANOMALIES, Likelihood
from anomalib_gen.models.flow import FLOW_TRANSFORMS, FlowModel, make_flow_transform
from anomalib_gen.objectives import MaximumLikelihood


class FlowDetector(GenerativeDetector):
    """Prototype."""

    _objectives: ClassVar[Any] = {}
    _anomalies: ClassVar[Any] = ANOMALIES
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **GenerativeDetector._parameter_constraints,
        "transform": [StrOptions(set(FLOW_TRANSFORMS)), callable],
        "n_layers": [Interval(Integral, 1, None, closed="left")],
        "hidden_features": [Interval(Integral, 1, None, closed="left")],
        "n_blocks": [Interval(Integral, 0, None, closed="left")],
        "n_bins": [Interval(Integral, 2, None, closed="left")],
        "noise": [Interval(Real, 0, None, closed="left")],
        "max_noise": [Interval(Real, 0, None, closed="left"), None],
    }

    def __init__(
        self,
        *,
        transform: Any = "nsf-autoregressive",
        n_layers: int = 3,
        hidden_features: int = 64,
        n_blocks: int = 2,
        n_bins: int = 8,
        mix: bool = True,
        noise: float = 0.02,
        max_noise: float | None = 1.0,
        anomaly: Any = "likelihood",
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-4,
        batch_size: int = 256,
        max_iter: Any = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
        max_grad_norm: float = 10.0,
        ema_decay: float = 0.995,
        contamination: float = 0.1,
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = "auto",
        verbose: Any = 0,
    ) -> None:
        self.transform = transform
        self.n_layers = n_layers
        self.hidden_features = hidden_features
        self.n_blocks = n_blocks
        self.n_bins = n_bins
        self.mix = mix
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

    def _default_objective(self) -> Component:
        return MaximumLikelihood(noise=self.noise)

    def _default_anomaly(self) -> Component:
        return Likelihood()

    def _make_model(self, event_shape: tuple[int, ...], Z: npt.NDArray[np.float64]) -> nn.Module:
        (features,) = event_shape
        conditional = self.max_noise is not None and self.max_noise > self.noise > 0
        transform = make_flow_transform(
            self.transform,
            features,
            context_features=1 if conditional else None,
            n_layers=self.n_layers,
            hidden_features=self.hidden_features,
            n_blocks=self.n_blocks,
            n_bins=self.n_bins,
            mix=self.mix,
        )
        levels = (self.noise, self.max_noise) if conditional else None
        return FlowModel(transform, features, noise_levels=levels)

    def _training_options(self, n_rows: int, *, one_pass: bool) -> TrainingOptions:
        steps = -(-n_rows // self.batch_size)
        max_iter = 1500 if self.max_iter == "auto" else self.max_iter
        if one_pass:
            max_iter = steps
        return TrainingOptions(
            max_iter=max_iter,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            ema_decay=self.ema_decay,
            n_iter_no_change=self.n_iter_no_change,
            warmup=0 if one_pass else 50,
            schedule=not one_pass,
            verbose=int(self.verbose),
        )
