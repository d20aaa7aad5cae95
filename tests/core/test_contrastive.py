"""Contrastive divergence follows the likelihood's gradient, recovers Gaussians and says when it goes astray."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from anomalib_gen._runtime import make_generator
from anomalib_gen._scaling import ArrayRows, Standardizer
from anomalib_gen._training import TrainingOptions, train
from anomalib_gen.models import EnergyModel
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.objectives import OBJECTIVES, ContrastiveDivergence, PersistentContrastiveDivergence

CPU = torch.device("cpu")
MEAN = torch.tensor([0.5, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=torch.float64)


class Tensors:
    """Rows that lie in memory."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def take(self, index):
        return self.x[index]

    def blocks(self, rows_per_block):
        yield from self.x.split(rows_per_block)


class Gaussian(nn.Module):
    """E = 1/2 (x - m)' P (x - m) with trainable m and a trainable root of P."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.root = nn.Parameter(torch.linalg.cholesky(torch.linalg.inv(covariance)))
        self.log_z = nn.Parameter(mean.new_zeros(()))

    @property
    def precision(self):
        return self.root @ self.root.T

    def energy(self, x):
        return 0.5 * ((x - self.mean) @ self.root).square().sum(1)

    def score(self, x):
        return -(x - self.mean) @ self.precision


class ExactGaussian(Gaussian):
    """One sweep of `gibbs` is an infinitely long chain."""

    def gibbs(self, x, generator):
        e = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return self.mean + torch.linalg.solve_triangular(self.root.T, e.T, upper=True).T


class BinaryRBM(nn.Module):
    """A restricted Boltzmann machine on {0, 1}^D, small enough to be summed out."""

    def __init__(self, n_visible, n_hidden):
        super().__init__()
        w = torch.randn(n_visible, n_hidden, generator=make_generator(0, CPU), dtype=torch.float64)
        self.w = nn.Parameter(0.1 * w)
        self.b = nn.Parameter(torch.zeros(n_visible, dtype=torch.float64))
        self.c = nn.Parameter(torch.zeros(n_hidden, dtype=torch.float64))

    def energy(self, x):
        return -x @ self.b - nn.functional.softplus(self.c + x @ self.w).sum(1)

    def gibbs(self, x, generator):
        h = torch.bernoulli(torch.sigmoid(self.c + x @ self.w), generator=generator)
        return torch.bernoulli(torch.sigmoid(self.b + h @ self.w.T), generator=generator)

    def pseudo_log_likelihood(self, x):
        e, total = self.energy(x), 0
        for d in range(x.shape[1]):
            flipped = x.clone()
            flipped[:, d] = 1 - x[:, d]
            total = total + nn.functional.logsigmoid(self.energy(flipped) - e)
        return total

    def log_likelihood(self, x):
        states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=x.shape[1])), dtype=x.dtype)
        with torch.no_grad():
            return float((-self.energy(x)).mean() - (-self.energy(states)).logsumexp(0))


def gaussian_rows(n, seed=1):
    e = torch.randn(n, 2, generator=make_generator(seed, CPU), dtype=torch.float64)
    # Exact moments, so that the answer is known to the last digit.
    e = (e - e.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(e.T, correction=0))).T
    return MEAN + e @ torch.linalg.cholesky(COVARIANCE).T


def descend(model, objective, x, *, n_steps, learning_rate, batch=500, seed=0):
    """Adam on random batches, with a learning rate that falls to zero."""
    generator = make_generator(seed, CPU)
    objective.prepare(model, Tensors(x), generator)
    parameters = [p for name, p in model.named_parameters() if name != "log_z"]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    for _ in range(n_steps):
        index = torch.randint(len(x), (batch,), generator=generator)
        optimiser.zero_grad()
        objective(model, x[index], generator).mean().backward()
        optimiser.step()
        schedule.step()
    return objective


def energy_model(features, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EnergyModel(ResidualMLP(features, 1, hidden_features=32, n_blocks=1), features)


BOTH = [ContrastiveDivergence, PersistentContrastiveDivergence]


# Gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [(Gaussian, {"n_steps": 150, "step_size": 0.05}), (ExactGaussian, {"n_steps": 1})],
)
def test_with_long_chains_the_gradient_is_that_of_the_likelihood(model_type, settings):
    model = model_type(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    x = gaussian_rows(20_000)
    objective = ContrastiveDivergence(data_noise=0.0, alpha=0.0, **settings)
    objective(model, x, make_generator(0, CPU)).mean().backward()
    # E_data - E_model of dE/dm = -P (x - m) and of dE/dR = (x - m)(x - m)' R, at m = 0 and P = R = I.
    torch.testing.assert_close(model.mean.grad, -MEAN, rtol=0, atol=0.03)
    second = COVARIANCE + torch.outer(MEAN, MEAN) - torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(model.root.grad, second, rtol=0, atol=0.05)
    assert model.log_z.grad is None


def test_at_the_truth_the_gradient_vanishes_with_a_single_step():
    model = Gaussian(MEAN, COVARIANCE)
    objective = ContrastiveDivergence(n_steps=1, step_size=0.3, data_noise=0.0, alpha=0.0, transition="mala")
    objective(model, gaussian_rows(20_000), make_generator(0, CPU)).mean().backward()
    for parameter in (model.mean, model.root):
        assert float(parameter.grad.abs().max()) < 0.03


def test_no_gradient_runs_through_the_chain():
    model, x = Gaussian(MEAN, COVARIANCE), gaussian_rows(50)
    objective = ContrastiveDivergence(alpha=0.0)
    loss = objective(model, x, make_generator(0, CPU)).sum()
    (through_loss,) = torch.autograd.grad(loss, model.mean)
    # The same loss from chains that were run beforehand.
    generator = make_generator(0, CPU)
    positive = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    with torch.no_grad():
        negative = objective._transit(model, positive, generator)
    (alone,) = torch.autograd.grad((model.energy(positive) - model.energy(negative)).sum(), model.mean)
    torch.testing.assert_close(through_loss, alone)


@pytest.mark.parametrize("make", BOTH)
def test_every_weight_but_log_z_gets_a_gradient(make):
    model, x = energy_model(2), gaussian_rows(64).float()
    nn.init.normal_(model.network.output.weight)
    objective, generator = make(), make_generator(0, CPU)
    objective.prepare(model, Tensors(x), generator)
    losses = objective(model, x, generator)
    assert losses.shape == (64,)
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        if name == "log_z":
            assert parameter.grad is None
        else:
            assert float(parameter.grad.abs().sum()) > 0, name


# What is learnt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("transition", ["langevin", "mala"])
def test_recovers_a_gaussian(make, transition):
    model = Gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64) / 2)
    objective = make(n_steps=5, step_size=0.05, alpha=0.0, transition=transition)
    descend(model, objective, gaussian_rows(5000), n_steps=300, learning_rate=0.03, batch=400)
    assert objective.diverged() is None
    smoothed = COVARIANCE + 0.1**2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(model.mean.data, MEAN, rtol=0, atol=0.06)
    torch.testing.assert_close(torch.linalg.inv(model.precision).detach(), smoothed, rtol=0, atol=0.08)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.45])
def test_steepness_of_a_column_without_width(share):
    """P (1 - h P / 2) = 1 / sigma^2 has a solution up to h = sigma^2 / 2, and the default is half of that."""
    sigma = 0.1
    steepness = (1 - math.sqrt(1 - 2 * share)) / share
    x = torch.zeros(50_000, 1, dtype=torch.float64)
    model = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), sigma**2 / steepness).double())
    objective = ContrastiveDivergence(
        n_steps=3, data_noise=sigma, alpha=0.0, step_size=None if share == 0.25 else share * sigma**2
    )

    def pull(factor):
        """Gradient by the root, in units of sigma."""
        root = model.root.detach().clone()
        with torch.no_grad():
            model.root.mul_(factor)
        loss = objective(model, x, make_generator(0, CPU)).mean()
        (gradient,) = torch.autograd.grad(loss, model.root)
        with torch.no_grad():
            model.root.copy_(root)
        return gradient.item() / sigma

    # Steeper than that is pushed back, flatter is pushed on, and in between there is rest.
    assert pull(1.05) > 0.005
    assert pull(0.95) < -0.005
    assert abs(pull(1.0)) < 0.02


def test_alpha_flattens_by_the_stated_power():
    """E (1 + 4 alpha) = -log p + const, where the constant is free."""

    class Free(ExactGaussian):
        def __init__(self, *args):
            super().__init__(*args)
            self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def energy(self, x):
            return super().energy(x) + self.offset

    model, alpha = Free(MEAN, COVARIANCE), 0.05
    descend(
        model,
        ContrastiveDivergence(n_steps=1, data_noise=0.0, alpha=alpha),
        gaussian_rows(5000),
        n_steps=500,
        learning_rate=0.03,
    )
    inflated = (
        torch.linalg.det(torch.linalg.inv(model.precision)) / torch.linalg.det(COVARIANCE)
    ).item() ** 0.5
    assert inflated == pytest.approx(1 + 4 * alpha, abs=0.06)
    # The mean energy is pulled to zero.
    assert abs(float(model.energy(gaussian_rows(5000)).detach().mean())) < 0.1


@pytest.mark.parametrize("make", BOTH)
def test_a_boltzmann_machine_gains_exact_likelihood(make):
    patterns = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]], dtype=torch.float64)
    flips = torch.rand(600, 6, generator=make_generator(3, CPU), dtype=torch.float64) < 0.05
    x = torch.where(flips, 1 - patterns.repeat(200, 1), patterns.repeat(200, 1))
    model = BinaryRBM(6, 8)
    before = model.log_likelihood(x)
    objective = make(n_steps=1, alpha=0.0)
    judged = (objective.validate(model, x, make_generator(0, CPU)).mean()).item()
    descend(model, objective, x, n_steps=800, learning_rate=0.03, batch=100)
    # 6 log 2 = 4.16 nats is a coin for each pixel; the entropy of the source is 2.2 nats.
    assert before == pytest.approx(-6 * math.log(2), abs=0.1)
    assert model.log_likelihood(x) > -2.7
    assert objective.validate(model, x, make_generator(0, CPU)).mean().item() < judged - 1
    if make is PersistentContrastiveDivergence:
        assert set(objective.buffer_.unique().tolist()) == {0.0, 1.0}


# Validation -------------------------------------------------------------------------------------------------


def test_validation_is_least_at_the_score_of_the_smoothed_density():
    x, noise = gaussian_rows(20_000), 0.4
    smoothed = COVARIANCE + noise**2 * torch.eye(2, dtype=torch.float64)
    objective = ContrastiveDivergence(data_noise=noise)

    def judge(mean, covariance):
        return objective.validate(Gaussian(mean, covariance), x, make_generator(0, CPU)).mean().item()

    best = judge(MEAN, smoothed)
    for mean, covariance in [(MEAN + 0.2, smoothed), (MEAN, 1.2 * smoothed), (MEAN, 0.8 * smoothed)]:
        assert judge(mean, covariance) > best
    # 1/2 E|sigma s + e|^2 = 1/2 (D - sigma^2 tr P) for a Gaussian.
    expected = 0.5 * (2 - noise**2 * float(torch.linalg.inv(smoothed).trace()))
    assert best == pytest.approx(expected, abs=0.01)


def test_validation_takes_the_noise_of_each_column():
    class Grained(Gaussian):
        grain = torch.tensor([0.0, 0.5])

    x = gaussian_rows(20_000)
    widths = torch.tensor([0.01, 0.5**2 + 0.01], dtype=torch.float64)
    smoothed = COVARIANCE + torch.diag(widths)
    value = ContrastiveDivergence().validate(Grained(MEAN, smoothed), x, make_generator(0, CPU)).mean()
    expected = 0.5 * (2 - (widths * torch.linalg.inv(smoothed).diagonal()).sum())
    assert float(value.detach()) == pytest.approx(float(expected), abs=0.01)


# Chains -----------------------------------------------------------------------------------------------------


def still(model, x, generator):
    return x


def test_buffer_keeps_its_size_and_restarts_at_its_rate():
    rows = torch.arange(60, dtype=torch.float64).reshape(30, 2)
    objective = PersistentContrastiveDivergence(
        transition=still, buffer_size=4000, p_restart=0.25, data_noise=0.0
    )
    generator, model = make_generator(0, CPU), Gaussian(MEAN, COVARIANCE)
    objective.prepare(model, Tensors(rows), generator)
    # The noise has the marginals of the data: even numbers on the left, odd ones on the right, unpaired.
    assert bool((objective.buffer_[:, 0] % 2 == 0).all() & (objective.buffer_[:, 1] % 2 == 1).all())
    assert float((objective.buffer_[:, 0] + 1 == objective.buffer_[:, 1]).double().mean()) < 0.1
    objective.buffer_[:] = -1.0
    batch = rows.repeat(100, 1)
    objective(model, batch, generator)
    assert objective.buffer_.shape == (4000, 2)
    anew = float((objective.buffer_[:, 0] >= 0).double().sum()) / len(batch)
    assert anew == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 3000))
    # Nothing but the chains picked has moved.
    objective.buffer_[:] = -1.0
    objective.set_params(p_restart=1.0)
    objective(model, batch[:500], generator)
    assert int((objective.buffer_[:, 0] >= 0).sum()) == 500


def test_chains_continue():
    def step(model, x, generator):
        return x + 1.0

    objective = PersistentContrastiveDivergence(transition=step, buffer_size=10, p_restart=0.0)
    x, generator, model = gaussian_rows(10), make_generator(0, CPU), Gaussian(MEAN, COVARIANCE)
    objective.prepare(model, Tensors(x), generator)
    start = objective.buffer_.clone()
    for _ in range(3):
        objective(model, x, generator)
    torch.testing.assert_close(objective.buffer_, start + 3)


def test_a_batch_larger_than_the_buffer_is_refused():
    objective, x = PersistentContrastiveDivergence(buffer_size=5), gaussian_rows(10)
    objective.prepare(None, Tensors(x), make_generator(0, CPU))
    with pytest.raises(ValueError, match="buffer_size=5 must not be below the 10 rows"):
        objective(Gaussian(MEAN, COVARIANCE), x, make_generator(0, CPU))


@pytest.mark.parametrize("slope", [1e2, 1e3, 1e4])
def test_no_slope_is_too_steep_for_a_persistent_chain(slope):
    """Chains that stick push the energy up under them, which makes it steeper."""

    class Cone(Gaussian):
        def energy(self, x):
            return slope * x.norm(dim=1)

    start = 5.0 + torch.zeros(200, 12, dtype=torch.float64)
    objective, model = PersistentContrastiveDivergence(), Cone(MEAN, COVARIANCE)
    end = objective._transit(model, start, make_generator(0, CPU))
    assert float((end != start).any(1).double().mean()) > 0.95
    assert float((model.energy(end) < model.energy(start)).double().mean()) > 0.95


def test_unknown_transition():
    with pytest.raises(ValueError, match=r"'nuts' is unknown\. Known: 'auto'"):
        ContrastiveDivergence(transition="nuts")(
            Gaussian(MEAN, COVARIANCE), gaussian_rows(5), make_generator(0, CPU)
        )


@pytest.mark.parametrize("make", BOTH)
def test_the_generator_determines_everything(make):
    x, model = gaussian_rows(40), Gaussian(MEAN, 2 * COVARIANCE)
    state = torch.get_rng_state()

    def losses(seed):
        objective, generator = make(buffer_size=100) if make is not ContrastiveDivergence else make(), None
        generator = make_generator(seed, CPU)
        objective.prepare(model, Tensors(x), generator)
        return torch.stack([objective(model, x, generator) for _ in range(3)]).detach()

    assert torch.equal(losses(0), losses(0))
    assert (losses(0) != losses(1)).any()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", BOTH)
def test_runs_without_recording_gradients_and_leaves_no_trace(make):
    """As the dry run before training does, on a copy."""
    model, x = energy_model(2), gaussian_rows(2).float()
    objective, generator = make(), make_generator(0, CPU)
    objective.prepare(model, Tensors(x), generator)
    with torch.no_grad():
        assert copy.deepcopy(objective)(model, x, generator).shape == (2,)
    assert objective.diverged() is None
    assert objective.means_ is None


# Divergence -------------------------------------------------------------------------------------------------


def clouds(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, 1)) < 0.5, -2.0, 2.0) + rng.normal(size=(n, 2)) * [1.0, 0.3]


def train_energy(objective, *, n_steps, learning_rate, seed=0):
    X = clouds(1000)
    scaler = Standardizer.fit(X, None, None)
    rows = ArrayRows(X, np.arange(len(X)), scaler, CPU)
    model = energy_model(2)
    objective.prepare(model, rows, make_generator(seed, CPU))
    options = TrainingOptions(max_iter=n_steps, batch_size=128, learning_rate=learning_rate)
    train(model, objective, rows, options=options, seed=seed, device=CPU)
    return model, rows


@pytest.mark.parametrize("make", BOTH)
def test_silent_at_the_defaults(make):
    objective = make()
    model, rows = train_energy(objective, n_steps=250, learning_rate=2e-3)
    assert objective.diverged() is None
    x = next(rows.blocks(1000))
    judged = [
        objective.validate(m, x, make_generator(0, CPU)).mean().item() for m in (model, energy_model(2))
    ]
    assert judged[0] < judged[1] - 0.005


@pytest.mark.parametrize("make", BOTH)
def test_an_unstable_setting_is_told(make):
    objective = make(step_size=3.0, data_noise=0.01, alpha=0.0, transition="langevin")
    with pytest.warns(UserWarning, match="diverged and was stopped") as told:
        train_energy(objective, n_steps=400, learning_rate=0.1)
    assert "Markov chains" in str(told[0].message)


def test_what_divergence_is_told_by():
    objective, x = ContrastiveDivergence(transition=still, data_noise=0.0), gaussian_rows(100)
    generator = make_generator(0, CPU)
    model = Gaussian(MEAN, COVARIANCE)
    assert objective.diverged() is None
    objective(model, x, generator)
    assert objective.diverged() is None

    def told(transition, scale=1.0):
        fresh = clone(objective).set_params(transition=transition)
        scaled = Gaussian(MEAN, COVARIANCE / scale)
        fresh(scaled, x, generator)
        return fresh.diverged()

    assert "left the data" in told(lambda model, x, generator: 30 * x)
    assert "nats above that of the rows" in told(lambda model, x, generator: 2 * x, scale=1e3)
    assert "have grown to" in told(still, scale=1e5)
    assert "not finite" in told(lambda model, x, generator: x * math.nan)


def test_are_components():
    assert OBJECTIVES["contrastive-divergence"] is ContrastiveDivergence
    assert OBJECTIVES["persistent-contrastive-divergence"] is PersistentContrastiveDivergence
    assert repr(ContrastiveDivergence(n_steps=3)) == "ContrastiveDivergence(n_steps=3)"
    assert clone(PersistentContrastiveDivergence(p_restart=0.2)).get_params() == {
        "n_steps": 10,
        "step_size": None,
        "data_noise": 0.1,
        "alpha": 1e-3,
        "transition": "auto",
        "buffer_size": 1024,
        "p_restart": 0.2,
    }
