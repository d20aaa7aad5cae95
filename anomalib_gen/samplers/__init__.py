"""Samplers: pure functions ``(field, x, steps, *, generator) -> (x, info)`` of any callable field."""

from anomalib_gen.samplers._chains import SamplerInfo, score_of
from anomalib_gen.samplers.diagnostics import effective_sample_size, split_rhat
from anomalib_gen.samplers.langevin import annealed_langevin, mala, ula

__all__ = [
    "SamplerInfo",
    "annealed_langevin",
    "effective_sample_size",
    "mala",
    "score_of",
    "split_rhat",
    "ula",
]
