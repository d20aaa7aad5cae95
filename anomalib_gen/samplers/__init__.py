"""Samplers: pure functions ``(field, x, steps, *, generator) -> (x, info)`` of any callable field."""

from anomalib_gen.samplers._chains import SamplerInfo, score_of
from anomalib_gen.samplers.ais import AISResult, GaussianBase, annealed_importance_sampling
from anomalib_gen.samplers.diagnostics import effective_sample_size, pareto_k, split_rhat
from anomalib_gen.samplers.hmc import hmc
from anomalib_gen.samplers.langevin import annealed_langevin, mala, ula
from anomalib_gen.samplers.ode import solve_ode, solve_ode_adaptively
from anomalib_gen.samplers.sde import (
    SAMPLERS,
    ancestral,
    annealed,
    ddim,
    euler_maruyama,
    predictor_corrector,
    probability_flow,
)

__all__ = [
    "SAMPLERS",
    "AISResult",
    "GaussianBase",
    "SamplerInfo",
    "ancestral",
    "annealed",
    "annealed_importance_sampling",
    "annealed_langevin",
    "ddim",
    "effective_sample_size",
    "euler_maruyama",
    "hmc",
    "mala",
    "pareto_k",
    "predictor_corrector",
    "probability_flow",
    "score_of",
    "solve_ode",
    "solve_ode_adaptively",
    "split_rhat",
    "ula",
]
