"""The model's bounds against closed forms: linear maps make it probabilistic PCA, where everything is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_gen import VAEDetector
from anomalib_gen._runtime import make_generator
from anomalib_gen.anomaly import (
    ImportanceWeighted,
    KLDivergence,
    LikelihoodRegret,
    NegativeELBO,
    ReconstructionError,
    ReconstructionProbability,
)
from anomalib_gen.models import VAEModel
from anomalib_gen.models.observation import GaussianObservation, StudentTObservation
from anomalib_gen.models.vae import ENCODER_BOUND, LOG_STD_RANGE, Posterior
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.objectives import EvidenceLowerBound

CPU = torch.device("cpu")


def generator():
    return make_generator(0, CPU)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=make_generator(seed, CPU))


def perceptron(n_inputs, n_outputs):
    return ResidualMLP(n_inputs, n_outputs, hidden_features=8, n_blocks=1, zero_output=False)


def make_model(factory=perceptron, observation=None, features=4, n_components=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        observation = observation or GaussianObservation(features, noise=0.02)
        model = VAEModel(factory, factory, observation, features=features, n_components=n_components)
    return model.double().eval().requires_grad_(False)


class Linear:
    """Closed forms of a model whose decoder is a linear layer, for rows within the bulk."""

    def __init__(self, model):
        self.W, self.b = model.decoder.weight, model.decoder.bias
        self.s2 = model.observation.deviation.square().expand(len(self.b))
        self.model = model

    def log_prob(self, x):
        covariance = self.W @ self.W.T + torch.diag(self.s2)
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x)

    def elbo(self, x):
        q = self.model.encode(x)
        residual = x - q.mean @ self.W.T - self.b
        # E_q |x_j - W_j z - b_j|^2 is the square at the mean plus the variance of W_j z.
        expected = residual.square() + torch.exp(2 * q.log_std) @ self.W.T.square()
        return -0.5 * (expected / self.s2 + (2 * math.pi * self.s2).log()).sum(1) - q.kl().sum(1)

    def best_posterior(self, x):
        """The factorised normal that maximises the bound."""
        precision = torch.eye(self.W.shape[1]) + self.W.T @ (self.W / self.s2[:, None])
        mean = torch.linalg.solve(precision, ((x - self.b) / self.s2 @ self.W).T).T
        return Posterior(mean, (-0.5 * precision.diagonal().log()).expand_as(mean))


def tie(model):
    """Give a linear model's encoder the best means and deviations there are; both are exact."""
    L, closed = model.n_components, Linear(model)
    zero, unit = torch.zeros(1, len(closed.b)), torch.eye(len(closed.b))
    q = closed.best_posterior(zero.double())
    model.encoder.weight[:L] = (closed.best_posterior(unit.double()).mean - q.mean).T
    model.encoder.weight[L:] = 0
    model.encoder.bias.copy_(
        torch.cat([q.mean[0], LOG_STD_RANGE * torch.atanh(q.log_std[0] / LOG_STD_RANGE)])
    )
    return model


# Probabilistic PCA ----------------------------------------------------------------------------------------


def test_linear_maps_reach_the_likelihood_of_probabilistic_pca():
    """Tipping and Bishop (1999): the maximum likelihood in closed form, from the eigenvalues of the covariance."""
    D, L, n = 6, 2, 1000
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, L)) @ rng.normal(size=(L, D)) + 0.4 * rng.normal(size=(n, D))
    X = (X - X.mean(0)) / X.std(0)  # the model standardises; with this, its units are those of X
    eigenvalues = np.linalg.eigvalsh(np.cov(X.T, bias=True))[::-1]
    s2 = eigenvalues[L:].mean()
    exact = -0.5 * (D * math.log(2 * math.pi) + np.log(eigenvalues[:L]).sum() + (D - L) * math.log(s2) + D)
    detector = VAEDetector(
        n_components=L,
        encoder=nn.Linear,
        decoder=nn.Linear,
        variance="shared",
        batch_size=n,
        learning_rate=0.02,
        max_iter=1000,
        validation_fraction=0.0,
        random_state=0,
        device="cpu",
    ).fit(X)
    bounds = detector.elbo(X, n_draws=64)
    assert exact - 0.05 * D < bounds.mean() < exact + 0.01
    own = Linear(detector.model_)
    with torch.no_grad():
        x = torch.from_numpy(X)
        inside = (x.abs() < 5).all(1)  # beyond, tails are compressed and the closed forms another model's
        exact_rows, closed = own.log_prob(x), own.elbo(x)
    assert inside.all()
    # Row by row, the bound is below the log-density of the very model it is a bound for.
    assert (closed <= exact_rows + 1e-9).all()
    np.testing.assert_allclose(bounds, closed.numpy(), atol=1.0)
    assert bounds.mean() == pytest.approx(float(closed.mean()), abs=0.05)
    np.testing.assert_allclose(detector.log_prob(X, n_draws=1000), exact_rows.numpy(), atol=0.3)
    assert float(own.s2[0].detach()) == pytest.approx(s2, rel=0.05)
    assert detector.n_active_ == L


def test_importance_weighting_rises_from_the_bound_to_the_log_density():
    model = tie(make_model(nn.Linear, features=3))
    x = draw(4, 3, seed=1)
    exact, elbo = Linear(model).log_prob(x), Linear(model).elbo(x)
    replicates = 2000
    rows, means = x.repeat_interleave(replicates, 0), []
    for k in (1, 4, 16, 64):
        values = model.iwae(rows, draw(k, len(rows), 2, seed=k)).reshape(4, replicates)
        means.append(values.mean(1))
    error = 5 * values.std() / math.sqrt(replicates)
    torch.testing.assert_close(means[0], elbo, atol=0.1, rtol=0)
    assert all((after > before).all() for before, after in pairwise(means))
    assert (elbo < means[1]).all()
    assert (means[-1] < exact + error).all()
    torch.testing.assert_close(means[-1], exact, atol=0.1, rtol=0)


def test_a_weighted_divergence_leaves_a_bound_from_one_on():
    model = tie(make_model(nn.Linear, features=3))
    x = draw(4, 3, seed=1)
    exact, elbo, kl = Linear(model).log_prob(x), Linear(model).elbo(x), model.kl(x)
    rows = x.repeat_interleave(4000, 0)
    for beta in (0.2, 1.0, 3.0):
        found = -EvidenceLowerBound(beta=beta)(model, rows, generator()).reshape(4, -1)
        error = 5 * found.std(1) / math.sqrt(found.shape[1])
        bound = elbo - (beta - 1) * kl
        assert ((found.mean(1) - bound).abs() < error).all()
        assert ((bound < exact) == (beta >= 1)).all()


def test_the_best_posterior_closes_the_gap_of_one_dimension():
    """With one latent dimension the posterior is factorised, and every weight equals p(x)."""
    model = make_model(nn.Linear, features=3, n_components=1)
    x, closed = draw(5, 3), Linear(model)
    q = closed.best_posterior(x)
    torch.testing.assert_close(model.log_weight(x, draw(5, 1, seed=3), q), closed.log_prob(x))
    bounds = torch.stack([model.elbo(x, e, q) for e in model.draw_balanced_noise(6, generator())])
    # Balanced draws make the expectation of a square exact.
    torch.testing.assert_close(bounds.mean(0), closed.log_prob(x))


# The divergence -------------------------------------------------------------------------------------------


def test_divergence_matches_torch_and_draws():
    q = Posterior(draw(3, 2), 0.5 * draw(3, 2, seed=1))
    normal = torch.distributions.Normal(q.mean, q.log_std.exp())
    prior = torch.distributions.Normal(torch.zeros(2, dtype=torch.float64), 1.0)
    torch.testing.assert_close(q.kl(), torch.distributions.kl_divergence(normal, prior))
    z = q.draw(draw(200_000, 1, 1, seed=2) * torch.ones(3, 2))
    ratio = normal.log_prob(z) - prior.log_prob(z)
    torch.testing.assert_close(ratio.mean(0), q.kl(), atol=0.02, rtol=0.02)


def test_divergence_of_rows():
    model, x = make_model(), draw(7, 4)
    torch.testing.assert_close(model.kl(x), model.encode(x).kl().sum(1))
    assert (model.kl(x) >= 0).all()


# Pieces ---------------------------------------------------------------------------------------------------


def test_the_bound_is_what_equation_2_says():
    model, x, e = make_model(), draw(7, 4), draw(7, 2, seed=1)
    q = model.encode(x)
    z = q.mean + q.log_std.exp() * e
    expected = model.observation.log_prob(x, model.decoder(z)) - q.kl().sum(1)
    torch.testing.assert_close(model.elbo(x, e), expected)
    torch.testing.assert_close(model.elbo(x, e, q), expected)


def test_log_weight_is_a_ratio_of_densities():
    model, x, e = make_model(), draw(7, 4), draw(7, 2, seed=1)
    q = model.encode(x)
    z = q.draw(e)
    prior = torch.distributions.Normal(torch.zeros(2, dtype=torch.float64), 1.0)
    log_q = torch.distributions.Normal(q.mean, q.log_std.exp()).log_prob(z).sum(1)
    expected = model.log_likelihood(x, z) + prior.log_prob(z).sum(1) - log_q
    torch.testing.assert_close(model.log_weight(x, e), expected)


def test_samples_have_the_marginal_moments():
    model = make_model(nn.Linear, features=3)
    drawn = model.sample(50_000, make_generator(0, CPU))
    closed = Linear(model)
    torch.testing.assert_close(drawn.mean(0), closed.b, atol=0.03, rtol=0)
    covariance = closed.W @ closed.W.T + torch.diag(closed.s2)
    torch.testing.assert_close(torch.cov(drawn.T), covariance, atol=0.03, rtol=0)


def test_the_encoder_sees_a_clipped_row():
    model = make_model()
    far = torch.full((1, 4), math.exp(20.0), dtype=torch.float64)
    seen = torch.full((1, 4), ENCODER_BOUND, dtype=torch.float64)
    q, at_bound = model.encode(far), model.encoder(seen)
    torch.testing.assert_close(q.mean, at_bound[:, :2])
    torch.testing.assert_close(model.encode(1e9 * far).log_std, q.log_std)


@pytest.mark.parametrize("raw", [-1e6, 1e6])
def test_posterior_deviations_are_bounded(raw):
    model = make_model(nn.Linear)
    model.encoder.bias[2:] = raw
    std = model.encode(draw(3, 4)).log_std.exp()
    assert float(std.min()) > 0.002
    assert float(std.max()) < 404


class Mean(nn.Linear):
    """A layer that forgets the rows."""

    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("factories", "message"),
    [
        ((lambda i, o: nn.Linear(i, o // 2), nn.Linear), r"encoder returned .* \(5, 2\) .* \(5, 4\)"),
        ((nn.Linear, lambda i, o: nn.Linear(i, 1)), r"decoder returned .* \(5, 1\) .* \(5, 3\)"),
        ((Mean, nn.Linear), r"encoder returned .* \(1, 4\) .* \(5, 4\)"),
    ],
)
def test_networks_of_another_shape_are_refused(factories, message):
    model = VAEModel(*factories, GaussianObservation(3), features=3, n_components=2)
    with pytest.raises(ValueError, match=message):
        model.elbo(torch.zeros(5, 3), torch.zeros(2))


# Anomalies ------------------------------------------------------------------------------------------------

ANOMALIES = [
    NegativeELBO(),
    ImportanceWeighted(),
    KLDivergence(),
    LikelihoodRegret(n_steps=15),
    ReconstructionError(),
    ReconstructionProbability(),
]


def test_anomalies_against_closed_forms():
    model = tie(make_model(nn.Linear, features=3))
    x, closed = draw(6, 3), Linear(model)
    torch.testing.assert_close(
        NegativeELBO(n_draws=500)(model, x, generator()), -closed.elbo(x), atol=0.1, rtol=0
    )
    torch.testing.assert_close(
        ImportanceWeighted(n_draws=1000)(model, x, generator()), -closed.log_prob(x), atol=0.05, rtol=0
    )
    torch.testing.assert_close(KLDivergence()(model, x, generator()), model.kl(x))
    torch.testing.assert_close(
        NegativeELBO()(model, x, generator()),
        ReconstructionProbability()(model, x, generator()) + model.kl(x),
    )
    mean = model.encode(x).mean
    torch.testing.assert_close(
        ReconstructionError()(model, x, generator()),
        (x - mean @ closed.W.T - closed.b).square().mean(1),
    )


def test_more_draws_lower_the_importance_weighted_anomaly():
    model, x = make_model(), 2 * draw(50, 4)
    values = [float(ImportanceWeighted(n_draws=k)(model, x, generator()).mean()) for k in (1, 10, 100, 1000)]
    assert values == sorted(values, reverse=True)


def test_regret_against_the_best_posterior_in_closed_form():
    # With one dimension, balanced draws make the climbed function the bound itself.
    model = make_model(nn.Linear, features=3, n_components=1)
    x, closed = 2 * draw(6, 3), Linear(model)
    regret = LikelihoodRegret()(model, x, generator())
    torch.testing.assert_close(regret, closed.log_prob(x) - closed.elbo(x), atol=0.02, rtol=0)


@pytest.mark.parametrize("observation", [None, StudentTObservation(4, noise=0.02)], ids=["gaussian", "t"])
def test_regret_converges(observation):
    """The default's steps reach what a long search by another method reaches."""
    model, x = make_model(observation=observation), 1.5 * draw(8, 4)
    anomaly = LikelihoodRegret()
    regret = anomaly(model, x, generator())
    assert (regret >= 0).all()
    noise = model.draw_balanced_noise(anomaly.n_draws, generator())
    parts = [part.clone().requires_grad_() for part in model.encode(x)]
    search = torch.optim.LBFGS(parts, max_iter=2000, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def bound():
        return torch.stack([model.elbo(x, e, Posterior(*parts)) for e in noise]).mean(0)

    start = bound().detach()

    def closure():
        search.zero_grad()
        loss = -bound().sum()
        loss.backward()
        return loss

    search.step(closure)
    torch.testing.assert_close(regret, (bound() - start).detach(), atol=0.02, rtol=0.02)


def test_regret_takes_gradients_where_they_are_off_and_leaves_none():
    model, x = make_model().requires_grad_(True), draw(3, 4)
    with torch.no_grad():
        values = LikelihoodRegret(n_steps=5)(model, x, generator())
    assert not values.requires_grad
    assert (values > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("anomaly", ANOMALIES, ids=lambda anomaly: type(anomaly).__name__)
def test_a_row_counts_alone(anomaly):
    model, x = make_model(), draw(20, 4)
    a = anomaly(model, x, generator())
    assert a.shape == (20,)
    assert torch.equal(a, anomaly(model, x, generator()))
    torch.testing.assert_close(anomaly(model, x.flip(0), generator()), a.flip(0), rtol=1e-9, atol=1e-9)
    alone = torch.cat([anomaly(model, row, generator()) for row in x.split(1)])
    torch.testing.assert_close(alone, a, rtol=1e-9, atol=1e-9)
    others = x.clone()
    others[1:] = 1e6
    torch.testing.assert_close(anomaly(model, others, generator())[0], a[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("anomaly", ANOMALIES, ids=lambda anomaly: type(anomaly).__name__)
def test_anomalies_are_finite_for_the_largest_rows(anomaly):
    model = make_model()
    x = torch.tensor([1e3, 1e30, 1e300, 1.7e308], dtype=torch.float64)[:, None] * torch.ones(
        4, dtype=torch.float64
    )
    assert torch.isfinite(anomaly(model, torch.cat([x, -x]), generator())).all()


@pytest.mark.parametrize("n", [2, 3, 7, "auto"])
def test_balanced_noise_has_the_moments_of_a_normal(n):
    model = make_model()  # two latent dimensions
    noise = model.draw_balanced_noise(n, generator())
    assert len(noise) == (4 if n == "auto" else n)
    torch.testing.assert_close(noise.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(noise.square().mean(0), torch.ones(2, dtype=torch.float64))
    if len(noise) > 2:
        assert abs(noise.prod(1).mean()) < 1e-12


def test_one_balanced_draw_is_a_draw():
    model = make_model()
    assert torch.equal(model.draw_balanced_noise(1, generator()), model.draw_noise(1, generator()))


@pytest.mark.parametrize(("n_components", "n_draws"), [(1, 4), (3, 4), (5, 6), (15, 16), (32, 16)])
def test_draws_by_default_are_one_more_than_dimensions(n_components, n_draws):
    model = make_model(n_components=n_components)
    assert model.draw_balanced_noise("auto", generator()).shape == (n_draws, n_components)


@pytest.mark.parametrize("n_components", [3, 15, 16, 32])
def test_draws_by_default_have_all_covariances_up_to_fifteen_dimensions(n_components):
    noise = make_model(n_components=n_components).draw_balanced_noise("auto", generator())
    covariance = noise.T @ noise / len(noise)
    torch.testing.assert_close(covariance.diagonal(), torch.ones(n_components, dtype=torch.float64))
    away = (covariance - torch.eye(n_components)).abs().max()
    assert (away < 1e-12) == (n_components <= 15)


def test_few_draws_give_the_bound_of_a_linear_model_exactly():
    model, x = make_model(nn.Linear), draw(50, 4)
    for seed in range(3):
        found = -NegativeELBO(n_draws=3)(model, x, make_generator(seed, CPU))
        torch.testing.assert_close(found, Linear(model).elbo(x), rtol=1e-10, atol=1e-10)


def test_draws_are_a_number_or_auto():
    with pytest.raises(ValueError, match="n_draws must be a positive integer or 'auto', got 'all'"):
        NegativeELBO(n_draws="all")(make_model(), draw(3, 4), generator())


def test_at_least_one_draw():
    with pytest.raises(ValueError, match="n_draws must be a positive integer, got 0"):
        NegativeELBO(n_draws=0)(make_model(), draw(3, 4), generator())
