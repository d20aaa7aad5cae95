"""Samplers leave the density they claim to invariant, and err by as much as theory says."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy import integrate

from anomalib_gen._runtime import make_generator
from anomalib_gen.samplers import (
    annealed_importance_sampling,
    annealed_langevin,
    effective_sample_size,
    hmc,
    mala,
    score_of,
    split_rhat,
    ula,
)
from anomalib_gen.samplers._chains import state_at
from anomalib_gen.samplers.hmc import leapfrog

CPU = torch.device("cpu")
COVARIANCE = torch.tensor([[1.0, 1.2], [1.2, 4.0]], dtype=torch.float64)
PRECISION = COVARIANCE.inverse()
MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)


def gaussian(x):
    return 0.5 * (((x - MEAN) @ PRECISION) * (x - MEAN)).sum(1)


def standard(x):
    return 0.5 * x.flatten(1).square().sum(1)


def quartic(x):
    return x.pow(4).sum(1)


def generator(seed=0):
    return make_generator(seed, CPU)


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


MALA = partial(mala, step_size=0.5)
HMC = partial(hmc, step_size=0.3, n_leapfrog=5)
ULA = partial(lambda energy, *args, **rest: ula(score_of(energy), *args, **rest), step_size=0.1)
ANNEALED = partial(
    lambda energy, x, n_steps, **rest: annealed_langevin(
        lambda x, sigma: -x / (1 + sigma[0] ** 2), x, [2.0, 0.5], n_steps_per_level=n_steps, **rest
    )
)
METROPOLIS = [pytest.param(MALA, id="mala"), pytest.param(HMC, id="hmc")]
ALL = [*METROPOLIS, pytest.param(ULA, id="ula"), pytest.param(ANNEALED, id="annealed")]


def assert_mean(draws, truth):
    """The mean of `draws` (N, B) is `truth`, within 4 standard errors of their effective sample size."""
    error = draws.std() / effective_sample_size(draws).sqrt()
    assert error < 0.1 * (abs(truth) + draws.std())
    assert abs(draws.mean() - truth) < 4 * error


# Stationary densities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", METROPOLIS)
@pytest.mark.parametrize("scale", [None, COVARIANCE.diagonal().sqrt()])
def test_moments_of_a_correlated_gaussian(sampler, scale):
    # MALA's steps are shorter and cheaper than HMC's.
    n = 150 if sampler is HMC else 600
    _, info = sampler(gaussian, zeros(100, 2), n, n_warmup=100, scale=scale, generator=generator(), thin=1)
    assert info.samples.shape == (n, 100, 2)
    x = info.samples[n // 4 :]
    assert (split_rhat(x) < 1.05).all()
    for i in range(2):
        assert_mean(x[..., i], MEAN[i])
        for j in range(i + 1):
            assert_mean((x[..., i] - MEAN[i]) * (x[..., j] - MEAN[j]), COVARIANCE[i, j])


# Without truncated scores MALA sees too little of tails so light: it sticks in them, and so it hardly ever gets there.
@pytest.mark.parametrize(
    "sampler", [pytest.param(partial(MALA, max_score_norm=2.0), id="mala"), pytest.param(HMC, id="hmc")]
)
def test_moments_of_a_quartic(sampler):
    n = 150 if sampler is HMC else 600
    _, info = sampler(quartic, zeros(100, 1), n, n_warmup=100, generator=generator(1), thin=1)
    x = info.samples[n // 4 :, :, 0]
    z = integrate.quad(lambda x: math.exp(-(x**4)), -6, 6)[0]
    for power in (1, 2, 4):
        truth = integrate.quad(lambda x, p=power: x**p * math.exp(-(x**4)), -6, 6)[0] / z
        assert_mean(x**power, truth)


@pytest.mark.parametrize("target", [0.574, 0.8])
@pytest.mark.parametrize("sampler", METROPOLIS)
@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_warm_up_reaches_the_target_acceptance(sampler, target, start):
    _, info = sampler(
        standard,
        torch.randn(100, 10, dtype=torch.float64, generator=generator()),
        50,
        step_size=start,
        n_warmup=150,
        target_acceptance=target,
        generator=generator(2),
    )
    assert abs(float(info.acceptance.mean()) - target) < 0.07
    assert info.n_evaluations == 1 + 200 * (5 if sampler is HMC else 1)


@pytest.mark.parametrize("h", [0.8, 0.4, 0.2])
def test_bias_of_ula_is_that_of_the_discretised_process(h):
    start = torch.randn(2000, 1, dtype=torch.float64, generator=generator())
    _, info = ula(lambda x: -x, start, 400, step_size=h, generator=generator(1), thin=2)
    assert_mean(info.samples[20:, :, 0] ** 2, 1 / (1 - h / 2))
    # The bias itself is seen, not only covered by the error bar.
    assert abs(float(info.samples[20:].var()) / (1 / (1 - h / 2)) - 1) < 0.2 * (h / 2)


def test_temperature_and_noise_scale_say_the_same():
    start, h, t = zeros(500, 3), 0.05, 0.3
    x, _ = ula(lambda x: -x, start, 200, step_size=h, temperature=t, generator=generator())
    y, _ = ula(lambda x: -x, start, 200, step_size=h, noise_scale=math.sqrt(2 * h * t), generator=generator())
    assert torch.equal(x, y)
    assert abs(float(x.var()) / (t / (1 - h / 2)) - 1) < 0.15


def test_without_noise_ula_is_gradient_ascent():
    x, info = ula(lambda x: -x, zeros(3, 2) + 1, 10, step_size=0.1, temperature=0, generator=generator())
    torch.testing.assert_close(x, torch.full_like(x, 0.9**10))
    assert info.acceptance is None
    assert info.energies is None
    assert info.effective_sample_size is None


def test_scores_are_scaled_down_as_whole_events():
    start = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    x, _ = ula(lambda x: x, start, 1, step_size=1.0, temperature=0, max_score_norm=1.0, generator=generator())
    torch.testing.assert_close(x - start, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]).double())


# Metropolis ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", METROPOLIS)
def test_small_steps_are_all_accepted(sampler):
    start = torch.randn(50, 2, dtype=torch.float64, generator=generator())
    _, info = sampler(gaussian, start, 20, step_size=1e-7, generator=generator(1))
    assert (info.acceptance > 1 - 1e-6).all()


@pytest.mark.parametrize("longest", [None, 0.8])
def test_mala_acceptance_is_the_ratio_of_densities(longest):
    # Equation 1 of _chains, written out with normal densities, on x / scale.
    h, scale = 0.7, torch.tensor([0.5, 2.0], dtype=torch.float64)
    start = torch.randn(2000, 2, dtype=torch.float64, generator=generator())
    noise = torch.randn(start.shape, dtype=torch.float64, generator=generator(1))

    def mean(x):
        score = scale * score_of(gaussian)(x)
        if longest is not None:
            score *= (longest / score.norm(dim=1, keepdim=True)).clamp(max=1)
        return x + scale * h * score

    proposal = mean(start) + math.sqrt(2 * h) * scale * noise

    def log_q(to, origin):
        return torch.distributions.Normal(mean(origin), math.sqrt(2 * h) * scale).log_prob(to).sum(1)

    ratio = gaussian(start) - gaussian(proposal) + log_q(start, proposal) - log_q(proposal, start)
    x, info = mala(
        gaussian, start, 1, step_size=h, scale=scale, max_score_norm=longest, generator=generator(1)
    )
    torch.testing.assert_close(info.acceptance, ratio.clamp(max=0).exp())
    moved = (x != start).any(1)
    torch.testing.assert_close(x[moved], proposal[moved])
    assert abs(float(moved.double().mean() - info.acceptance.mean())) < 0.04


def test_truncated_scores_free_a_chain_that_would_stick():
    # Tails lighter than normal, of which Roberts and Tweedie prove that MALA is not geometrically ergodic.
    start = zeros(200, 1) + 20
    stuck, _ = mala(quartic, start, 200, step_size=0.1, generator=generator())
    assert torch.equal(stuck, start)
    _, info = mala(quartic, start, 600, step_size=0.1, max_score_norm=4.0, generator=generator(), thin=1)
    truth = math.gamma(3 / 4) / math.gamma(1 / 4)
    assert_mean(info.samples[200:, :, 0], 0.0)
    assert_mean(info.samples[200:, :, 0].square(), truth)


@pytest.mark.parametrize("sampler", METROPOLIS)
def test_detailed_balance(sampler):
    # From stationarity, transitions a -> b of one step are as frequent as b -> a, for any two regions.
    cells = [-0.5, 0.4]
    start = torch.randn(100_000, 1, dtype=torch.float64, generator=generator())
    end, _ = sampler(standard, start, 1, step_size=0.8, generator=generator(1))
    a, b = (torch.bucketize(x[:, 0].contiguous(), torch.tensor(cells).double()) for x in (start, end))
    flow = torch.bincount(3 * a + b, minlength=9).reshape(3, 3).double()
    assert ((flow - flow.T).abs() <= 4 * (flow + flow.T).sqrt()).all()
    assert flow.min() > 500


def phase(x, v, eps, n, scale=None):
    state, v = leapfrog(quartic, state_at(quartic, x), v, torch.full((len(x),), eps).double(), n, scale=scale)
    return state.x, v


@pytest.mark.parametrize("scale", [None, torch.tensor([0.5, 2.0], dtype=torch.float64)])
def test_leapfrog_is_reversible_and_preserves_volume(scale):
    x, v = (torch.randn(5, 2, dtype=torch.float64, generator=generator(seed)) for seed in (0, 1))
    x_end, v_end = phase(x, v, 0.05, 20, scale)
    assert (x_end - x).abs().min() > 1e-3
    x_back, v_back = phase(x_end, -v_end, 0.05, 20, scale)
    torch.testing.assert_close(x_back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(v_back, -v, rtol=0, atol=1e-10)
    # The Jacobian by central differences: one perturbed copy of the first row for each coordinate of phase space.
    delta, z = 1e-6, torch.cat([x[0], v[0]])
    nudged = torch.cat([z + delta * torch.eye(4).double(), z - delta * torch.eye(4).double()])
    image = torch.cat(phase(nudged[:, :2], nudged[:, 2:], 0.05, 20, scale), dim=1)
    jacobian = (image[:4] - image[4:]) / (2 * delta)
    assert abs(abs(float(torch.linalg.det(jacobian))) - 1) < 1e-6


def test_leapfrog_errs_by_the_square_of_its_step():
    x, v = (torch.randn(50, 1, dtype=torch.float64, generator=generator(seed)) for seed in (0, 1))

    def error(n):
        x_end, v_end = phase(x, v, 1.0 / n, n)
        return (quartic(x_end) + standard(v_end) - quartic(x) - standard(v)).abs().mean()

    order = math.log2(error(200) / error(400))
    assert abs(order - 2) < 0.05


@pytest.mark.parametrize("sampler", METROPOLIS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_energies_are_never_accepted(sampler, bad):
    def truncated(x):
        return torch.where(x[:, 0] > 0, standard(x), bad)

    _, info = sampler(truncated, zeros(200, 1) + 0.5, 200, generator=generator(), thin=1)
    assert (info.samples > 0).all()
    assert info.energies.isfinite().all()
    assert info.divergences.sum() > 0
    assert_mean(info.samples[20:, :, 0], math.sqrt(2 / math.pi))


@pytest.mark.parametrize("sampler", METROPOLIS)
def test_a_chain_that_starts_outside_finds_its_way_in(sampler):
    x, info = sampler(lambda x: torch.where(x[:, 0] > 0, standard(x), math.nan), zeros(20, 1) - 0.2, 100,
                      generator=generator())  # fmt: skip
    assert (x > 0).all()
    assert info.energies[-1].isfinite().all()


@pytest.mark.parametrize("sampler", METROPOLIS)
def test_chains_outside_the_support_do_not_adapt_the_step(sampler):
    # Where most chains start at no density, their refusals must not shrink the step of the others to nothing.
    def box(x):
        return torch.where(x.abs().amax(1) < 1, standard(x), math.inf)

    start = torch.cat([zeros(10, 2), zeros(40, 2) + 100])
    with pytest.warns(UserWarning, match="40 of 50 chains never reached a finite energy"):
        _, info = sampler(box, start, 50, n_warmup=200, generator=generator())
    assert abs(float(info.acceptance[:10].mean()) - (0.574 if sampler is MALA else 0.8)) < 0.15
    assert (info.acceptance[10:] == 0).all()
    assert (info.divergences[10:] == 50).all()
    # Without a single chain inside there is nothing to adapt to.
    with pytest.warns(UserWarning, match="50 of 50"):
        _, info = sampler(box, zeros(50, 2) + 100, 5, step_size=0.1, n_warmup=5, generator=generator())
    assert info.step_size == pytest.approx((0.1,))


def test_huge_steps_diverge_and_leave_the_chains_where_they_were():
    start = zeros(10, 2) + 1
    x, info = hmc(lambda x: (x**8).sum(1), start, 5, step_size=100.0, generator=generator())
    assert torch.equal(x, start)
    assert (info.divergences == 5).all()
    assert (info.acceptance == 0).all()


def test_ula_does_not_make_a_move_that_is_not_finite():
    start = torch.tensor([[1.0], [-1.0]]).double()
    x, info = ula(lambda x: torch.where(x > 0, math.nan, -x), start, 1, step_size=0.01, generator=generator())
    assert x[0] == 1
    assert x[1] != -1
    assert info.divergences.tolist() == [1, 0]


# Noise levels ----------------------------------------------------------------------------------------------


def mixture_score(x, sigma, weights=(0.3, 0.7), means=(-8.0, 8.0), width=0.5):
    """Exact score of 0.3 N(-8, 1/4) + 0.7 N(8, 1/4), each coordinate alike, with noise sigma added."""
    variance = (width**2 + sigma.square())[:, None]
    parts = torch.stack([math.log(w) - (x - m).square().sum(1) / (2 * variance[:, 0])
                         for w, m in zip(weights, means, strict=True)]).softmax(0)  # fmt: skip
    mean = sum(part[:, None] * m for part, m in zip(parts, means, strict=True))
    return (mean - x) / variance


def test_annealing_finds_both_modes_in_proportion_and_plain_langevin_does_not():
    n, sigmas = 2000, torch.logspace(math.log10(20), -1, 16)
    start = 20 * torch.randn(n, 2, dtype=torch.float64, generator=generator())
    x, info = annealed_langevin(mixture_score, start, sigmas, n_steps_per_level=40, generator=generator(1))
    share = float((x[:, 0] > 0).double().mean())
    assert abs(share - 0.7) < 4 * math.sqrt(0.21 / n) + 0.01
    assert info.n_evaluations == 16 * 40 + 1
    assert len(info.step_size) == 16
    # Each mode has its own width: the last level's noise is gone.
    right = x[x[:, 0] > 0]
    assert abs(float(right.std()) - 0.5) < 0.05
    stuck, _ = ula(lambda x: mixture_score(x, x.new_full((len(x),), 0.1)), zeros(200, 2) - 8, 640, step_size=0.01,
                   generator=generator(2))  # fmt: skip
    assert (stuck < 0).all()


def test_steps_of_annealing_are_in_proportion_to_the_variance_of_the_noise():
    # Where all is noise, each level has the variance sigma^2 / (1 - r / 2).
    r, sigmas = 0.4, [5.0, 0.5]
    _, info = annealed_langevin(lambda x, sigma: -x / sigma[:, None] ** 2, zeros(2000, 1), sigmas, step_ratio=r,
                                n_steps_per_level=200, generator=generator(), thin=10)  # fmt: skip
    assert info.step_size == pytest.approx([r * 25, r * 0.25])
    assert float(info.samples[10:].var()) == pytest.approx(0.25 / (1 - r / 2), rel=0.03)


def test_denoising_takes_the_last_noise_away():
    def score(x, sigma):  # of a point at 3
        return (3 - x) / sigma[:, None] ** 2

    noisy, _ = annealed_langevin(score, zeros(50, 1), [1.0, 0.3], denoise=False, generator=generator())
    clean, _ = annealed_langevin(score, zeros(50, 1), [1.0, 0.3], generator=generator())
    assert noisy.std() > 0.2
    torch.testing.assert_close(clean, torch.full_like(clean, 3.0))


# Contracts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event_shape", [(3,), (2, 4, 4)])
def test_any_event_in_any_precision(sampler, dtype, event_shape):
    start = torch.randn(7, *event_shape, dtype=dtype, generator=generator())
    kept = start.clone()
    x, info = sampler(standard, start, 6, generator=generator(1), thin=4)
    assert x.shape == start.shape
    assert x.dtype == dtype
    assert not torch.equal(x, kept)
    assert torch.equal(start, kept), "the starting rows were written to"
    assert info.samples.shape == (1, *start.shape)
    assert info.divergences.tolist() == [0] * 7
    if info.energies is not None:
        assert info.energies.shape == (6, 7)
        assert info.energies.dtype == dtype
        torch.testing.assert_close(info.energies[-1], standard(x))
        assert info.acceptance.shape == (7,)


@pytest.mark.parametrize("sampler", ALL)
def test_the_generator_decides_and_the_global_one_is_left_alone(sampler):
    before = torch.get_rng_state()
    runs = [sampler(gaussian, zeros(5, 2), 20, generator=generator(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sampler", ALL)
def test_chains_do_not_see_each_other(sampler):
    start = torch.randn(6, 2, dtype=torch.float64, generator=generator())
    other = start.clone()
    other[3] += 1
    x, y = (sampler(gaussian, s, 20, generator=generator(1))[0] for s in (start, other))
    rest = [0, 1, 2, 4, 5]
    torch.testing.assert_close(x[rest], y[rest])
    assert not torch.equal(x[3], y[3])


@pytest.mark.parametrize("sampler", ALL)
def test_chains_from_the_same_place_part(sampler):
    x, _ = sampler(standard, zeros(200, 2), 200, generator=generator())
    assert len(x[:, 0].unique()) == 200
    assert abs(float(torch.corrcoef(x.reshape(100, -1).T)[0, 2])) < 0.4


@pytest.mark.parametrize("sampler", ALL)
def test_no_graph_stays_attached_and_parameters_get_no_gradient(sampler):
    network = torch.nn.Linear(2, 1).double()
    start = zeros(4, 2).requires_grad_()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x, info = sampler(
                lambda x: standard(x) + network(x)[:, 0], start, 3, generator=generator(), thin=1
            )
            assert torch.is_grad_enabled() == grad
        for result in (x, info.samples, info.energies, info.acceptance):
            assert result is None or not result.requires_grad
    assert network.weight.grad is None
    assert start.grad is None
    assert not start.detach().any()


@pytest.mark.parametrize("create_graph", [False, True])
def test_score_is_the_exact_negative_gradient(create_graph):
    network = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator())

    def energy(x, factor=1.0):
        return factor * network(x)[:, 0]

    score = score_of(energy, create_graph=create_graph)
    with torch.no_grad():
        value = score(x)
    slope = torch.stack([
        (energy(x + e) - energy(x - e)) / 2e-6 for e in 1e-6 * torch.eye(2).double()
    ], dim=1)  # fmt: skip
    torch.testing.assert_close(value, -slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(score(x, 3.0), 3 * value)
    assert value.requires_grad == create_graph
    assert network[0].weight.grad is None
    if create_graph:
        value.square().sum().backward()
        assert network[0].weight.grad.abs().max() > 0
        again = x.clone().requires_grad_()
        score(again).sum().backward()
        assert again.grad.abs().max() > 0


def test_score_works_in_inference_mode():
    with torch.inference_mode():
        x = torch.ones(2, 3)
        torch.testing.assert_close(score_of(standard)(x), -x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, g: ula(torch.neg, x, 0, step_size=0.1, generator=g),
        lambda x, g: ula(torch.neg, x, 2.5, step_size=0.1, generator=g),
        lambda x, g: hmc(standard, x, 10.0, step_size=0.1, generator=g),
        lambda x, g: ula(torch.neg, x, 5, step_size=-0.1, generator=g),
        lambda x, g: ula(torch.neg, x, 5, step_size=0.1, temperature=-1, generator=g),
        lambda x, g: mala(standard, x, 5, step_size=math.nan, generator=g),
        lambda x, g: mala(standard, x, 5, step_size=0.1, max_score_norm=0.0, generator=g),
        lambda x, g: mala(standard, x, 5, step_size=0.1, n_warmup=-1, generator=g),
        lambda x, g: hmc(standard, x, 5, step_size=0.1, n_leapfrog=0, generator=g),
        lambda x, g: hmc(standard, x, 5, step_size=0.1, jitter=1.0, generator=g),
        lambda x, g: hmc(standard, x, 5, step_size=0.1, thin=0, generator=g),
        lambda x, g: annealed_langevin(lambda x, s: -x, x, [0.1, 1.0], generator=g),
        lambda x, g: ula(torch.neg, x, 5, step_size=0.1, temperature=math.nan, generator=g),
        lambda x, g: ula(torch.neg, x, 5, step_size=0.1, noise_scale=math.inf, generator=g),
        lambda x, g: annealed_langevin(lambda x, s: -x, x, [], generator=g),
        lambda x, g: annealed_langevin(lambda x, s: -x, x, [1.0, math.nan], generator=g),
        lambda x, g: annealed_langevin(lambda x, s: -x, x, [math.inf, 1.0], generator=g),
        lambda x, g: annealed_langevin(lambda x, s: -x, x, [1.0], step_ratio=2.0, generator=g),
        lambda x, g: effective_sample_size(zeros(3, 2)),
        lambda x, g: hmc(standard, x, 5, step_size=0.1, n_leapfrog=2.5, generator=g),
        lambda x, g: mala(standard, x, 5, step_size=None, generator=g),
        lambda x, g: ula(torch.neg, x, 5, step_size="0.1", generator=g),
    ],
)
def test_mistakes_are_refused(call):
    with pytest.raises(ValueError, match="must"):
        call(zeros(2, 2), generator())


@pytest.mark.parametrize("sampler", METROPOLIS)
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0])])
def test_scales_that_would_freeze_or_break_chains_are_refused(sampler, bad):
    with pytest.raises(ValueError, match="scale must be positive and finite, got"):
        sampler(standard, zeros(3, 2), 5, scale=bad, generator=generator())


@pytest.mark.parametrize("sampler", METROPOLIS)
def test_scales_must_broadcast_and_keep_the_precision_of_the_rows(sampler):
    for shape in ((3,), (4, 2), (1, 3, 2)):
        with pytest.raises(
            ValueError, match=rf"scale must broadcast with rows \(3, 2\), got shape {re.escape(str(shape))}"
        ):
            sampler(standard, zeros(3, 2), 5, scale=torch.ones(shape), generator=generator())
    x, _ = sampler(standard, zeros(3, 2, dtype=torch.float32), 5, scale=zeros(2) + 0.7, generator=generator())
    assert x.dtype == torch.float32
    y, _ = sampler(standard, zeros(3, 2, dtype=torch.float32), 5, scale=0.7, generator=generator())
    assert torch.equal(x, y)


@pytest.mark.parametrize("wrong", [None, 0, np.random.default_rng(0), np.random.RandomState(0)])
def test_chance_comes_from_a_generator_of_torch(wrong):
    state = torch.get_rng_state()
    for run in (
        lambda: ula(torch.neg, zeros(2, 1), 1, step_size=0.1, generator=wrong),
        lambda: mala(standard, zeros(2, 1), 1, step_size=0.1, generator=wrong),
        lambda: hmc(standard, zeros(2, 1), 1, step_size=0.1, generator=wrong),
        lambda: annealed_langevin(lambda x, s: -x, zeros(2, 1), [1.0], generator=wrong),
        lambda: annealed_importance_sampling(standard, event_shape=(1,), n_levels=2, generator=wrong),
    ):
        with pytest.raises(
            TypeError, match=f"generator must be a torch.Generator, .* {type(wrong).__name__}"
        ):
            run()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(), (2,), (2, 1), (2, 2)])
@pytest.mark.parametrize("run", [mala, hmc])
def test_energies_and_scores_of_another_shape_are_refused(run, shape):
    # One that broadcasts would give another density without a word, where there are as many rows as columns above all.
    def energy(x):
        return x.square().sum() if shape == () else x.square().sum().expand(shape)

    x = zeros(2, 2)
    if shape == (2,):
        run(energy, x, 1, step_size=0.1, generator=generator())
        return
    with pytest.raises(
        ValueError, match=rf"energy returned .* shape {re.escape(str(shape))} for 2 rows; shape \(2,\) is"
    ):
        run(energy, x, 1, step_size=0.1, generator=generator())
    with pytest.raises(ValueError, match="energy returned"):
        score_of(energy)(x)


def test_scores_must_have_the_shape_of_the_rows():
    x = zeros(3, 2)
    for score in (lambda x: -x[:, :1], lambda x: -x.sum(1), lambda x: None):
        with pytest.raises(ValueError, match=r"score returned .* for 3 rows; shape \(3, 2\) is needed"):
            ula(score, x, 1, step_size=0.1, generator=generator())
    with pytest.raises(ValueError, match="score returned"):
        annealed_langevin(lambda x, s: -x[:, :1], x, [1.0], generator=generator())


PARAMETER = torch.nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize(
    "energy",
    [lambda x: standard(x.detach()), torch.no_grad()(standard), lambda x: PARAMETER.expand(len(x))],
    ids=["detached", "no_grad", "constant"],
)
def test_energies_without_a_gradient_are_named(energy):
    with pytest.raises(ValueError, match="energy must be differentiable"):
        mala(energy, zeros(2, 2), 1, step_size=0.1, generator=generator())


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.zeros(4), r"torch.float32 \(4,\)"),
        (torch.zeros(4, 1, dtype=torch.long), "torch.int64"),
        ([[0.0]], "list"),
    ],
)
def test_chains_start_at_rows(x, found):
    for run in (
        lambda: ula(torch.neg, x, 1, step_size=0.1, generator=generator()),
        lambda: hmc(standard, x, 1, step_size=0.1, generator=generator()),
        lambda: annealed_langevin(lambda x, s: -x, x, [1.0], generator=generator()),
    ):
        with pytest.raises(ValueError, match=rf"x must be a floating-point tensor .* got {found}"):
            run()


def test_a_last_step_that_is_not_finite_is_not_made_and_counted():
    def score(x, sigma):
        calls.append(x)
        return x * math.nan if len(calls) > 5 else -x

    calls = []
    x, info = annealed_langevin(score, zeros(2, 2), [1.0], n_steps_per_level=5, generator=generator())
    assert torch.isfinite(x).all()
    assert info.divergences.tolist() == [1, 1]


@pytest.mark.parametrize("sampler", ALL)
def test_progress_is_shown_on_request(sampler, capsys):
    sampler(standard, zeros(2, 2), 3, generator=generator())
    assert capsys.readouterr().err == ""
    sampler(standard, zeros(2, 2), 3, generator=generator(), verbose=1)
    assert "100%" in capsys.readouterr().err


# Diagnostics -----------------------------------------------------------------------------------------------


def autoregression(rho, n, m, seed=0):
    """m stationary chains x' = rho x + sqrt(1 - rho^2) e, whose autocorrelations are rho^t."""
    noise = torch.randn(n, m, dtype=torch.float64, generator=generator(seed))
    x = [noise[0]]
    for e in noise[1:]:
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * e)
    return torch.stack(x)


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregression(rho, m):
    n = 16000 // m
    truth = n * m * (1 - rho) / (1 + rho)
    assert float(effective_sample_size(autoregression(rho, n, m))) == pytest.approx(truth, rel=0.2)


def test_effective_sample_size_is_that_of_its_definition():
    # Without the Fourier transform, one chain at a time.
    x = autoregression(0.7, 301, 3)
    n, m = x.shape
    centred = x - x.mean(0)
    covariance = torch.stack([(centred[: n - t] * centred[t:]).sum(0) / (n - 1) for t in range(n)]).mean(1)
    total = (n - 1) / n * x.var(0).mean() + x.mean(0).var()
    rho = 1 - (x.var(0).mean() - covariance) / total
    rho[0] = 1
    tau, smallest = -1.0, math.inf
    for k in range(n // 2):
        pair = float(rho[2 * k] + rho[2 * k + 1])
        if pair <= 0:
            break
        smallest = min(smallest, pair)
        tau += 2 * smallest
    assert float(effective_sample_size(x)) == pytest.approx(n * m / tau, rel=1e-9)


def test_diagnostics_see_chains_that_disagree():
    x = autoregression(0.0, 500, 4)
    assert float(split_rhat(x)) < 1.01
    apart = x + torch.tensor([0.0, 0.0, 3.0, 3.0])
    assert float(split_rhat(apart)) > 1.5
    assert float(effective_sample_size(apart)) < 20
    trend = x + torch.linspace(0, 3, 500)[:, None]
    assert float(split_rhat(trend)) > 1.2
    with pytest.raises(TypeError, match=r"torch.Tensor, got a ndarray; see torch.as_tensor"):
        effective_sample_size(x.numpy())


def test_diagnostics_of_events_and_of_constants():
    x = torch.randn(50, 3, 2, 4, 4, generator=generator())
    assert effective_sample_size(x).shape == (2, 4, 4)
    assert effective_sample_size(x).dtype == torch.float32
    x[:, :, 0, 0, 0] = 1.0
    for diagnostic in (effective_sample_size, split_rhat):
        value = diagnostic(x)
        assert value[0, 0, 0].isnan()
        assert value.isnan().sum() == 1


def test_diagnostics_of_frozen_chains_and_of_counts():
    # 0.1 has a mean that is off by its last bit, and so a variance that is not zero.
    frozen = torch.full((1000, 4, 2), 0.1, dtype=torch.float64)
    frozen[:, :, 1] += torch.arange(4)
    assert split_rhat(frozen)[0].isnan()
    assert split_rhat(frozen)[1] == math.inf
    assert effective_sample_size(frozen)[0].isnan()
    assert float(effective_sample_size(frozen)[1]) < 4
    counts = torch.randint(0, 9, (100, 4, 1), generator=generator())
    for diagnostic in (effective_sample_size, split_rhat):
        torch.testing.assert_close(diagnostic(counts), diagnostic(counts.float()))
