"""Likelihoods of denoisers: the exact log-density of a mixture, its integral, the bound below it, and whose it is."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from anomalib_gen._runtime import forked_rng
from anomalib_gen.models import (
    EnergyModel,
    GaussianMixtureEnergy,
    NetworkDenoiser,
    ScoreDenoiser,
    balanced_elbo_terms,
    elbo_terms,
    ode_log_prob,
)
from anomalib_gen.models.denoiser import LEVEL_FEATURES
from anomalib_gen.models.likelihood import _denoise_and_trace
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.paths import EDM, PATHS, VariancePreserving


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def mixture():
    """Two normals in two columns, with mean 0 and unit variances together."""
    weights, means = tensor([0.4, 0.6]), tensor([[-1.2, 0.6], [0.8, -0.4]])
    covariances = tensor([[[0.1, 0.1], [0.1, 0.3]], [[0.2, -0.15], [-0.15, 0.4]]])
    total = (weights[:, None, None] * covariances).sum(0) + (weights[:, None] * means).T @ means
    scale = total.diagonal().sqrt()
    factors = torch.linalg.cholesky(covariances / torch.outer(scale, scale))
    return GaussianMixtureEnergy(weights.log(), means / scale, factors).requires_grad_(False)


def exact(model, x, level):
    return -model.energy(x, x.new_full((len(x),), level))


def gaussian(v):
    """Exact denoiser of N(0, v)."""
    return lambda y, level: (v / (v + level.square())).unsqueeze(1) * y


def oracle(path=None):
    truth = mixture()
    return truth, ScoreDenoiser(truth, EDM() if path is None else path)


def network(features=3, dtype=torch.float64, **rest):
    with forked_rng(0):
        net = ResidualMLP(features, features, context_features=LEVEL_FEATURES, zero_output=False).to(dtype)
    return NetworkDenoiser(net, VariancePreserving(), **rest)


class Images(torch.nn.Module):
    """A denoiser of rows, for events of another shape."""

    def __init__(self, model, event_shape):
        super().__init__()
        self.model, self.event_shape = model, event_shape

    def denoise(self, y, level):
        return self.model.denoise(y.flatten(1), level).unflatten(1, self.event_shape)


# The log-density -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0.01, 0.5])
def test_log_prob_of_the_mixture_is_exact(low):
    truth, model = oracle()
    # Rows of the mixture, and some where its density is low.
    x = torch.cat([truth.sample(20, generator()), 3 * rows(10, 2)])
    found = ode_log_prob(model.denoise, x, (low, 1000.0), n_steps=120)
    torch.testing.assert_close(found.log_prob, exact(truth, x, low), rtol=0, atol=1e-3)
    assert (found.error < 1e-2).all()


@pytest.mark.parametrize("name", list(PATHS))
def test_models_give_the_density_at_their_smallest_level(name):
    truth, model = oracle(PATHS[name]())
    x = truth.sample(15, generator())
    low, high = model.noise_levels
    found = model.log_prob(x)
    # What is left of the data at the largest level: their correlation.
    torch.testing.assert_close(found, exact(truth, x, low), rtol=0, atol=2e-3 + 10 / high**2)
    assert not found.requires_grad


def flow_of_a_gaussian(x, v, low, high):
    """What equation 2 gives for the exact denoiser of N(0, v): rows keep their place among their like."""
    stretch = (v + high**2) / (v + low**2)
    end = torch.distributions.Normal(tensor(0.0), math.sqrt(1 + high**2))
    return (end.log_prob(x * math.sqrt(stretch)) + 0.5 * math.log(stretch)).sum(1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_and_error_estimate(method, order):
    x, v, low, high = rows(30, 2), 0.1, 0.02, 100.0
    truth, errors = flow_of_a_gaussian(x, v, low, high), []
    for n_steps in (80, 160):
        found = ode_log_prob(gaussian(v), x, (low, high), n_steps=n_steps, method=method)
        error = (found.log_prob - truth).abs()
        errors.append(error)
        # The estimate is the error of half the steps, or rather what the other half has mended of it.
        assert (found.error > 0.8 * (2 ** (order - 1)) * error).float().mean() > 0.9
    assert math.log2(errors[0].median() / errors[1].median()) == pytest.approx(order, abs=0.3)


def test_unit_normal_data_need_no_steps():
    x = 3 * rows(10, 4)
    found = ode_log_prob(gaussian(1.0), x, (0.1, 50.0), n_steps=2)
    variance = 1 + 0.1**2
    expected = -0.5 * (x.square().sum(1) / variance + 4 * math.log(2 * math.pi * variance))
    # The variables in which the equation is solved stand still; the integral of 1 - 1 in (2) is exact as well.
    torch.testing.assert_close(found.log_prob, expected)
    torch.testing.assert_close(found.error, torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_density_integrates_to_one():
    _, model = oracle()
    axis, low = torch.linspace(-5.4, 5.4, 46, dtype=torch.float64), 0.3
    x = torch.cartesian_prod(axis, axis)
    log_prob = ode_log_prob(model.denoise, x, (low, 1000.0), n_steps=16, estimate_error=False).log_prob
    assert float(log_prob.exp().sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_a_network_s_density_integrates_to_one():
    """Whatever the network says: it is the density of a flow."""
    model = network(2)
    axis = torch.linspace(-6, 6, 46, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    log_prob = ode_log_prob(model.denoise, x, (0.3, 100.0), n_steps=16, estimate_error=False).log_prob
    assert float(log_prob.exp().sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=5e-3)


# Divergences -----------------------------------------------------------------------------------------------


def test_traces_are_those_of_the_jacobian():
    model, y = network(), rows(5, 3)
    level = torch.logspace(-1, 1, 5, dtype=torch.float64)
    jacobians = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda row, k=k: model.denoise(row.unsqueeze(0), level[k : k + 1]).squeeze(0), y[k]
            )
            for k in range(5)
        ]
    )
    clean, trace = _denoise_and_trace(model.denoise, y, level, None)
    torch.testing.assert_close(clean, model.denoise(y, level).detach())
    torch.testing.assert_close(trace.squeeze(1), jacobians.diagonal(dim1=1, dim2=2).sum(1))
    probes = rows(4, 3, seed=1)
    _, forms = _denoise_and_trace(model.denoise, y, level, probes)
    torch.testing.assert_close(forms, torch.einsum("ki,bij,kj->bk", probes, jacobians, probes))


def test_hutchinson_agrees_with_the_exact_divergence():
    model, x = network(), rows(12, 3)
    rest = {"n_steps": 4}
    sure = ode_log_prob(model.denoise, x, (0.05, 100.0), divergence="exact", **rest)
    many = ode_log_prob(
        model.denoise,
        x,
        (0.05, 100.0),
        divergence="hutchinson",
        n_probes=100,
        generator=generator(),
        **rest,
    )
    off = (many.log_prob - sure.log_prob).abs()
    assert (off < 4 * many.error).all()
    assert ((many.error - sure.error).abs() < 0.3).all()
    assert float(off.max()) > 1e-6


def test_an_exact_divergence_is_chosen_for_few_coordinates():
    small, large = network(4), network(33)
    for model, shape, free in ((small, (2, 2, 1), True), (large, (33,), False), (large, (11, 3, 1), False)):
        x, events = rows(3, *shape), Images(model, shape)
        if free:
            found = ode_log_prob(events.denoise, x, (0.1, 50.0), n_steps=4)
        else:
            with pytest.raises(ValueError, match="a generator must be given"):
                ode_log_prob(events.denoise, x, (0.1, 50.0), n_steps=4)
            found = ode_log_prob(events.denoise, x, (0.1, 50.0), n_steps=4, generator=generator())
        flat = ode_log_prob(model.denoise, x.flatten(1), (0.1, 50.0), n_steps=4, generator=generator())
        torch.testing.assert_close(found.log_prob, flat.log_prob)
        torch.testing.assert_close(found.error, flat.error)


# Whose it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_row_s_value_is_its_own(divergence):
    model, x = network(), rows(40, 3)
    x[7] = 50.0
    together, alone = (
        ode_log_prob(
            model.denoise, x, (0.01, 100.0), n_steps=10, divergence=divergence, generator=generator()
        )
        for x in (x, x[3:5])
    )
    torch.testing.assert_close(together.log_prob[3:5], alone.log_prob, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(together.error[3:5], alone.error, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        first, second = (model.elbo_terms(x, generator(), n_steps=10).elbo for x in (x, x[3:5]))
    torch.testing.assert_close(first[3:5], second, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_inference_mode_changes_nothing(divergence):
    model, x = network(), rows(5, 3)
    energy = EnergyModel(
        ResidualMLP(3, 1, context_features=1, zero_output=False).double(), 3, noise_levels=(0.05, 50.0)
    ).double()
    for denoiser in (model, ScoreDenoiser(energy, EDM(sigma_min=0.05, sigma_max=50.0))):
        values = []
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                values.append(denoiser.log_prob(x.clone(), generator(), n_steps=2, divergence=divergence))
        for value in values[1:]:
            torch.testing.assert_close(value.clone(), values[0])
        assert values[0].isfinite().all()
        assert all(p.grad is None for p in denoiser.parameters())


def test_float32_and_far_rows():
    model = network(dtype=torch.float32)
    x = torch.cat([rows(4, 3).float(), torch.full((1, 3), 700.0)])
    found = ode_log_prob(model.denoise, x, model.noise_levels, n_steps=20)
    assert found.log_prob.dtype == found.error.dtype == torch.float32
    assert found.log_prob.isfinite().all()
    assert found.log_prob[4] < found.log_prob[:4].min()


def test_what_is_not_finite_has_an_infinite_error():
    x = tensor([[1.0], [-1.0]])
    found = ode_log_prob(
        lambda y, s: torch.where(y < 0, math.nan, gaussian(1.0)(y, s)), x, (0.1, 50.0), n_steps=2
    )
    assert found.error.isfinite().tolist() == [True, False]
    assert ode_log_prob(lambda y, s: y / 2, x, (0.1, 50.0), estimate_error=False).error.isnan().all()


# The bound -------------------------------------------------------------------------------------------------

COVARIANCE = tensor([[0.8, 0.5], [0.5, 1.2]])


def linear_denoiser(y, level):
    """Exact for N(0, COVARIANCE); all levels of a call are equal."""
    total = COVARIANCE + level[0].square() * torch.eye(2, dtype=torch.float64)
    return y @ torch.linalg.solve(total, COVARIANCE)


def gaussian_log_prob(x, level):
    total = COVARIANCE + level**2 * torch.eye(2, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(tensor([0.0, 0.0]), total).log_prob(x)


def expected_terms(x, levels):
    """Exact mean of the terms over the noise: they are quadratic in it, so two axes, both ways, are enough."""
    steps = len(levels) - 1
    terms = [
        elbo_terms(linear_denoiser, x, levels, (sign * math.sqrt(2) * tensor(axis)).expand(steps, 2))
        for axis in ([1.0, 0.0], [0.0, 1.0])
        for sign in (1, -1)
    ]
    return [torch.stack(parts).mean(0) for parts in zip(*terms, strict=True)]


def levels_between(low, high, n_steps):
    return torch.logspace(math.log10(low), math.log10(high), n_steps + 1, dtype=torch.float64)


def test_terms_are_divergences_of_normals():
    """Each term by torch's own divergences, and the mean of the steps over the noise in closed form."""
    x, levels, e = rows(5, 2), tensor([0.1, 0.5, 3.0]), rows(2, 2, seed=1)
    terms = elbo_terms(linear_denoiser, x, levels, e)
    assert terms.steps.shape == (2, 5)
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    for i in (1, 2):
        s, before = float(levels[i]), float(levels[i - 1])
        keep, z = (before / s) ** 2, x + s * e[i - 1]
        std = before * math.sqrt(1 - keep)
        clean = linear_denoiser(z, x.new_full((5,), s))
        posterior = normal(keep * z + (1 - keep) * x, std)
        model = normal(keep * z + (1 - keep) * clean, std)
        torch.testing.assert_close(terms.steps[i - 1], kl(posterior, model).sum(1))
        left = torch.eye(2, dtype=torch.float64) - torch.linalg.solve(
            COVARIANCE + s**2 * torch.eye(2, dtype=torch.float64), COVARIANCE
        )
        kept = torch.eye(2, dtype=torch.float64) - left
        mean = (x @ left).square().sum(1) + s**2 * kept.square().sum()
        weight = 0.5 * (before**-2 - s**-2)
        torch.testing.assert_close(expected_terms(x, levels)[0][i - 1], weight * mean)
    prior = kl(normal(x, 3.0), normal(torch.zeros_like(x), math.sqrt(10.0)))
    torch.testing.assert_close(terms.prior, prior.sum(1))
    z_0 = x[:1] + 0.1 * rows(100_000, 2, seed=2)
    decoder = normal(z_0, 0.1).log_prob(x[:1]).sum(1)
    error = float(decoder.std()) / math.sqrt(len(decoder))
    assert float(terms.reconstruction[0]) == pytest.approx(float(decoder.mean()), abs=4 * error)
    torch.testing.assert_close(terms.elbo, terms.reconstruction - terms.prior - terms.steps.sum(0))


def test_the_bound_lies_below_the_density_and_approaches_it():
    x, low = 1.5 * rows(20, 2), 0.01
    truth = gaussian_log_prob(x, math.sqrt(2) * low)  # the noise of z_0, and that of the decoder
    gaps = []
    for n_steps in (50, 100, 200, 400):
        steps, prior, reconstruction = expected_terms(x, levels_between(low, 1000.0, n_steps))
        gaps.append(truth - (reconstruction - prior - steps.sum(0)))
        assert (gaps[-1] > 0).all()
    # As 1 / n.
    for coarse, fine in pairwise(gaps):
        torch.testing.assert_close(coarse / fine, torch.full_like(fine, 2.0), rtol=0.1, atol=0)
    # Extrapolated to infinitely many steps, what is left is what q(z_0 | x) does not know: that there are other data.
    identity = torch.eye(2, dtype=torch.float64)
    precision = (COVARIANCE + low**2 * identity).inverse() + identity / low**2
    posterior = torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, x.T / low**2).T, precision_matrix=precision
    )
    encoder = torch.distributions.MultivariateNormal(x, low**2 * identity)
    left = torch.distributions.kl_divergence(encoder, posterior)
    limit = (64 * gaps[3] - 56 * gaps[2] + 14 * gaps[1] - gaps[0]) / 21
    torch.testing.assert_close(limit, left, rtol=0, atol=1e-4)


def test_the_bound_is_on_the_density_with_the_noise_of_its_decoder_too():
    """Between two points the log-density is convex: the bound lies above that of z_0, below that of the row."""
    level = 0.1
    points = GaussianMixtureEnergy(
        tensor([0.0, 0.0]), tensor([[-0.3], [0.3]]), tensor([[[0.01]]]).repeat(2, 1, 1)
    )
    points.requires_grad_(False)
    denoiser, x = ScoreDenoiser(points, EDM(sigma_min=level)), tensor([[0.0]])
    nodes, weights = (tensor(part) for part in np.polynomial.hermite_e.hermegauss(40))
    limit = float((weights / weights.sum()) @ exact(points, x + level * nodes.unsqueeze(1), level))
    levels = levels_between(level, 100.0, 200)
    bounds = torch.stack(
        [balanced_elbo_terms(denoiser.denoise, x, levels, generator(seed)).elbo[0] for seed in range(30)]
    )
    # Less than its limit by what the length of the steps costs.
    assert float(bounds.mean()) == pytest.approx(limit - 0.05, abs=0.15)
    assert (
        float(exact(points, x, level)) + 1
        < float(bounds.mean())
        < float(exact(points, x, math.sqrt(2) * level))
    )


def test_draws_of_the_bound_have_it_as_their_mean():
    x, levels = rows(3, 2), levels_between(0.1, 100.0, 20)
    draws = torch.stack([elbo_terms(linear_denoiser, x, levels, e).elbo for e in rows(200, 20, 2, seed=3)])
    steps, prior, reconstruction = expected_terms(x, levels)
    error = draws.std(0) / math.sqrt(200)
    assert ((draws.mean(0) - (reconstruction - prior - steps.sum(0))).abs() < 4 * error).all()


def test_the_bound_of_the_mixture_lies_below_its_likelihood():
    truth, model = oracle(EDM(sigma_min=0.02))
    x = truth.sample(30, generator())
    bound = model.elbo_terms(x, generator(), n_draws=8)
    assert bound.steps.shape == (100, 30)
    gap = model.log_prob(x) - bound.elbo
    # About 0.5 nats from the length of the steps, and 0.1 from the draws.
    assert 0.2 < float(gap.mean()) < 0.8
    one, two = (model.elbo_terms(x, generator(), n_steps=10).elbo for _ in range(2))
    assert torch.equal(one, two)


def test_balanced_draws_have_the_same_mean_and_scatter_less():
    x, levels, draws = rows(3, 2), levels_between(0.05, 100.0, 20), 100
    steps, prior, reconstruction = expected_terms(x, levels)
    bound = reconstruction - prior - steps.sum(0)
    pairs, plain = generator(), []
    balanced = torch.stack(
        [balanced_elbo_terms(linear_denoiser, x, levels, pairs).elbo for _ in range(draws)]
    )
    for e in rows(draws, 20, 2, seed=3):
        both = [elbo_terms(linear_denoiser, x, levels, sign * e).elbo for sign in (1, -1)]
        plain.append((both[0] + both[1]) / 2)
    error = balanced.std(0) / math.sqrt(draws)
    assert ((balanced.mean(0) - bound).abs() < 4 * error).all()
    assert (balanced.std(0) < 0.6 * torch.stack(plain).std(0)).all()


@pytest.mark.parametrize("variances", [[1.0, 1.0], [1.0, 1e-6], [0.09] * 10])
def test_what_one_pair_of_noise_adds_to_the_bound_of_normal_data(variances):
    v, s = tensor(variances), levels_between(0.01, 20.0, 100)
    x = v.sqrt() * rows(3, len(v))
    found = torch.stack(
        [
            balanced_elbo_terms(lambda y, s: y * v / (v + s[:, None] ** 2), x, s, generator(seed)).elbo
            for seed in range(100)
        ]
    )
    left = v * s[1:, None] / (v + s[1:, None] ** 2)
    taken = (s[1:] / (1 + s[1:] ** 2)).square()
    steps = (s[:-1] ** -2 - s[1:] ** -2).square()
    expected = (0.5 * steps @ (left.square() - taken[:, None]).square().sum(1)).sqrt()
    torch.testing.assert_close(found.std(0), expected.expand(3), rtol=0.3, atol=1e-6)
    assert float((found - found.mean(0)).std(1).max()) < 1e-6  # a shift, the same for all rows
    assert float(expected) == pytest.approx({1.0: 0.0, 1e-6: 0.8, 0.09: 0.95}[variances[-1]], abs=0.05)


# Mistakes --------------------------------------------------------------------------------------------------


def test_mistakes_are_refused():
    x, levels, denoise = rows(2, 2), (0.1, 10.0), linear_denoiser
    ladder = levels_between(0.1, 10, 3)
    for call in (
        lambda: ode_log_prob(denoise, x, (1.0, 0.1)),
        lambda: ode_log_prob(denoise, x, (0.0, 0.1)),
        lambda: ode_log_prob(denoise, x, levels, n_steps=0),
        lambda: ode_log_prob(denoise, x, levels, n_steps=3),
        lambda: ode_log_prob(denoise, x, levels, divergence="hutchinson", n_probes=0),
        lambda: ode_log_prob(denoise, x, levels, divergence="hutchinson"),
        lambda: elbo_terms(denoise, x, ladder.flip(0), rows(3, 2)),
        lambda: elbo_terms(denoise, x, ladder, rows(4, 2)),
        lambda: elbo_terms(denoise, x, ladder, rows(3, 2, 2)),
        lambda: balanced_elbo_terms(denoise, x, ladder, generator(), n_draws=0),
    ):
        with pytest.raises(ValueError, match="must"):
            call()
    for wrong in (lambda y, s: y[:, :1], lambda y, s: y.sum(1), lambda y, s: y.sum()):
        for call in (
            lambda wrong=wrong: ode_log_prob(wrong, x, levels, n_steps=2),
            lambda wrong=wrong: elbo_terms(wrong, x, ladder, rows(3, 2)),
            lambda wrong=wrong: EDM().predict(wrong, x, torch.ones(2, dtype=x.dtype)),
        ):
            with pytest.raises(ValueError, match=r"denoise returned .* for 2 rows; shape \(2, 2\) is needed"):
                call()
    with pytest.raises(ValueError, match="divergence='trace' is unknown"):
        ode_log_prob(denoise, x, levels, divergence="trace")
    with pytest.raises(ValueError, match="method='rk5' is unknown"):
        ode_log_prob(denoise, x, levels, method="rk5")
