"""Noise paths: how rows turn into noise, ``t -> (alpha, sigma)``."""

from collections.abc import Mapping

from anomalib_gen.paths._path import Path, Prediction
from anomalib_gen.paths.discrete import CosineBetas, LinearBetas
from anomalib_gen.paths.linear import Linear
from anomalib_gen.paths.variance_exploding import EDM, GeometricLadder, VarianceExploding
from anomalib_gen.paths.variance_preserving import SubVariancePreserving, VariancePreserving

PATHS: Mapping[str, type[Path]] = {
    "cosine": CosineBetas,
    "ddpm": LinearBetas,
    "edm": EDM,
    "linear": Linear,
    "ncsn": GeometricLadder,
    "sub-vp": SubVariancePreserving,
    "ve": VarianceExploding,
    "vp": VariancePreserving,
}

__all__ = [
    "EDM",
    "PATHS",
    "CosineBetas",
    "GeometricLadder",
    "Linear",
    "LinearBetas",
    "Path",
    "Prediction",
    "SubVariancePreserving",
    "VarianceExploding",
    "VariancePreserving",
]
