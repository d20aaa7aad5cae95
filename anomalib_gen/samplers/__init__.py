"""Samplers: pure functions ``(field, x, steps, *, generator) -> (x, info)`` of any callable field."""

from anomalib_gen.samplers._chains import SamplerInfo, score_of
from anomalib_gen.samplers.ais import AISResult, GaussianBase, annealed_importance_sampling
from anomalib_gen.samplers.diagnostics import effective_sample_size, split_rhat
from anomalib_gen.samplers.hmc import hmc
from anomalib_gen.samplers.langevin import annealed_langevin, mala, ula

__all__ = [
    "AISResult",
    "GaussianBase",
    "SamplerInfo",
    "annealed_importance_sampling",
    "annealed_langevin",
    "effective_sample_size",
    "hmc",
    "mala",
    "score_of",
    "split_rhat",
    "ula",
]
