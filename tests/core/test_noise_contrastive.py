"""Noise distributions are densities; noise contrast finds log Z; telescoping reaches where one stage does not."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from torch import nn

from anomalib_gen import EnergyDetector
from anomalib_gen._runtime import make_generator
from anomalib_gen.models import EnergyModel, FlowModel, GaussianNoise, MarginalNoise, NoiseBase, fit_noise
from anomalib_gen.models.noise import NOISES, fit_flow_noise
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.objectives import OBJECTIVES, NoiseContrastive, Telescoping
from anomalib_gen.objectives.noise_contrastive import bridge_log_z

CPU = torch.device("cpu")
F64 = torch.float64
MEAN = torch.tensor([0.5, -0.3], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=F64)
LOG_Z = math.log(2 * math.pi) + 0.5 * math.log(0.55)


class Tensors:
    """Rows that lie in memory."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def take(self, index):
        return self.x[index]


class Gaussian(nn.Module):
    """E = 1/2 |R' (x - m)|^2 with trainable m and R, of which Z is known."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.root = nn.Parameter(torch.linalg.cholesky(torch.linalg.inv(covariance)))
        self.log_z = nn.Parameter(mean.new_zeros(()))

    def energy(self, x):
        return 0.5 * ((x - self.mean) @ self.root).square().sum(1)

    @property
    def covariance(self):
        return torch.linalg.inv(self.root @ self.root.T).detach()

    @property
    def true_log_z(self):
        return float(0.5 * len(self.mean) * math.log(2 * math.pi) + 0.5 * torch.logdet(self.covariance))


class Normal:
    """A noise distribution of the user's own."""

    def __init__(self, mean, width):
        self.mean, self.width = mean, width

    def sample(self, n, generator):
        e = torch.randn((n, len(self.mean)), generator=generator, dtype=self.mean.dtype)
        return self.mean + self.width * e

    def log_prob(self, x):
        u = (x - self.mean) / self.width
        return -0.5 * u.square().sum(1) - len(self.mean) * (
            math.log(self.width) + 0.5 * math.log(2 * math.pi)
        )


def gaussian_rows(n, seed=1):
    e = torch.randn(n, 2, generator=make_generator(seed, CPU), dtype=F64)
    return MEAN + e @ torch.linalg.cholesky(COVARIANCE).T


def two_clouds(n, features=2, seed=1):
    e = torch.randn(n, features, generator=make_generator(seed, CPU), dtype=F64)
    e[:, 0] = 0.5 * e[:, 0] + torch.where(torch.arange(n) % 2 == 0, -1.5, 1.5)
    e[:, -1] = e[:, -1].exp() if features > 1 else e[:, -1]
    return e


def descend(model, objective, x, *, n_steps, learning_rate=0.03, batch=500, names=None):
    generator = make_generator(0, CPU)
    objective.prepare(model, Tensors(x), generator)
    parameters = [p for name, p in model.named_parameters() if names is None or name in names]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    for _ in range(n_steps):
        index = torch.randint(len(x), (batch,), generator=generator)
        optimiser.zero_grad()
        objective(model, x[index], generator).mean().backward()
        optimiser.step()
        schedule.step()
    return objective


def grid(low, high, n, features):
    axis = torch.linspace(low, high, n, dtype=F64)
    points = torch.stack(torch.meshgrid(*[axis] * features, indexing="ij"), -1).reshape(-1, features)
    return points, float(axis[1] - axis[0]) ** features


# Noise distributions ----------------------------------------------------------------------------------------


def line(name):
    """Fine where a density costs little; a flow is smooth."""
    return grid(-60, 60, 6001 if name == "flow" else 48_001, 1)


def plane(name):
    return grid(-14, 30, 221 if name == "flow" else 1101, 2)


@functools.cache
def fitted(name, features):
    """A flow takes a second to fit."""
    return fit_noise(name, two_clouds(1000, features), make_generator(0, CPU))


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("features", [1, 2])
def test_noise_integrates_to_one(name, features):
    noise = fitted(name, features)
    # Beyond the compressed tails' start at 5 a density falls slowly: log-spaced panels would be needed in 2-D.
    points, cell = line(name) if features == 1 else plane(name)
    with torch.no_grad():
        mass = float(noise.log_prob(points).exp().sum()) * cell
    assert mass == pytest.approx(1, abs=0.002 if features == 1 else 0.01)


@pytest.mark.parametrize("name", NOISES)
def test_noise_samples_are_of_its_density(name):
    """In 1-D against the integrated density, in 2-D by the mean of importance weights on half-spaces."""
    noise = fitted(name, 1)
    points, cell = line(name)
    with torch.no_grad():
        cdf = noise.log_prob(points).exp().cumsum(0) * cell
        drawn = noise.sample(4000, make_generator(1, CPU))[:, 0]
        place = torch.searchsorted(points[:, 0].contiguous(), drawn).clamp(max=len(points) - 1)
        assert stats.kstest(cdf[place].clamp(0, 1).numpy(), "uniform").pvalue > 1e-3

        noise = fitted(name, 2)
        drawn = noise.sample(8000, make_generator(1, CPU))
        points, cell = plane(name)
        density = noise.log_prob(points).exp() * cell
    for direction in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]):
        d = torch.tensor(direction, dtype=F64)
        for level in (-0.5, 0.5, 1.5):
            share = float((drawn @ d < level).double().mean())
            mass = float(density[points @ d < level].sum())
            assert share == pytest.approx(mass, abs=0.025)


@pytest.mark.parametrize("name", ["gaussian", "product-of-marginals"])
def test_noise_matches_the_rows_it_was_fitted_to(name):
    x = two_clouds(4000)
    drawn = fit_noise(name, x, make_generator(0, CPU)).sample(4000, make_generator(1, CPU))
    if name == "gaussian":
        inside = gaussian_rows(4000)
        drawn = GaussianNoise.fit(inside).sample(20_000, make_generator(1, CPU))
        torch.testing.assert_close(drawn.mean(0), inside.mean(0), rtol=0, atol=0.03)
        torch.testing.assert_close(torch.cov(drawn.T), torch.cov(inside.T), rtol=0, atol=0.05)
    else:
        for column in range(2):
            distance = stats.ks_2samp(drawn[:, column].numpy(), x[:, column].numpy()).statistic
            assert distance < 0.05
        assert abs(float(torch.corrcoef(drawn.clamp(-3, 3).T)[0, 1])) < 0.06


def test_covariance_is_shrunk_where_rows_are_few():
    x = torch.randn(5, 20, generator=make_generator(0, CPU), dtype=F64)
    factor = GaussianNoise.fit(x).factor
    assert float(torch.linalg.cond(factor @ factor.T)) < 20
    many = torch.randn(20_000, 3, generator=make_generator(0, CPU), dtype=F64) * torch.tensor([1.0, 0.1, 2.0])
    factor = GaussianNoise.fit(many).factor
    torch.testing.assert_close(factor.diagonal(), many.std(0), rtol=0.03, atol=0)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_hard_rows(name, dtype):
    """Constant columns, few rows, rows far out: the density is finite wherever the row is."""
    x = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1e4]], dtype=dtype)
    noise = fit_noise(name, x, make_generator(0, CPU))
    far = torch.tensor([[1e30, -1e30, 0.0], [0.0, 1.0, 1.0]], dtype=dtype)
    with torch.no_grad():
        assert bool(noise.log_prob(far).isfinite().all())
        drawn = noise.sample(50, make_generator(0, CPU))
    assert drawn.dtype == dtype
    assert drawn.shape == (50, 3)
    assert bool(drawn.isfinite().all())


def test_flow_noise_is_frozen_and_close_to_the_rows():
    x, flow = two_clouds(1000), fitted("flow", 2)
    state = torch.get_rng_state()
    first, again = (fit_flow_noise(x, make_generator(0, CPU), n_steps=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.log_prob(x), again.log_prob(x))
    assert isinstance(flow, FlowModel)
    assert not any(p.requires_grad for p in flow.parameters())
    assert float(flow.log_prob(x).mean()) > float(GaussianNoise.fit(x).log_prob(x).mean()) + 0.3


def test_own_noise():
    own = Normal(MEAN, 2.0)
    assert fit_noise(own, gaussian_rows(3), make_generator(0, CPU)) is own
    with pytest.raises(TypeError, match="must have sample"):
        fit_noise(3, gaussian_rows(3), make_generator(0, CPU))
    with pytest.raises(ValueError, match="'uniform' is unknown"):
        fit_noise("uniform", gaussian_rows(3), make_generator(0, CPU))


# Noise-contrastive estimation -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [*NOISES, Normal(torch.zeros(2, dtype=F64), 1.5)])
def test_bridge_and_nce_find_log_z_of_a_known_energy(noise):
    model, objective = Gaussian(MEAN, COVARIANCE), NoiseContrastive(noise=noise, data_noise=0.0)
    x = gaussian_rows(20_000)
    objective.prepare(model, Tensors(x), make_generator(0, CPU))
    assert model.log_z.item() == pytest.approx(LOG_Z, abs=0.05)
    with torch.no_grad():
        model.log_z.fill_(0.0)
    generator, optimiser = make_generator(0, CPU), torch.optim.Adam([model.log_z], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 60)
    for _ in range(60):
        optimiser.zero_grad()
        objective(model, x[:2000], generator).mean().backward()
        optimiser.step()
        schedule.step()
    assert model.log_z.item() == pytest.approx(LOG_Z, abs=0.05)


@pytest.mark.parametrize("step", ["prepare", "conclude"])
def test_the_bridge_weighs_rows_as_the_loss_does(step):
    """Rows that are twice as wide, weighted by the ratio of the densities, are those of the model."""
    wide = MEAN + 2 * (gaussian_rows(20_000) - MEAN)
    model = Gaussian(MEAN, COVARIANCE)
    rows = Tensors(wide)
    rows.weights = torch.exp(-0.75 * model.energy(wide).detach())
    objective = NoiseContrastive(noise=Normal(torch.zeros(2, dtype=F64), 1.5), data_noise=0.0)
    objective.prepare(model, rows, make_generator(0, CPU))
    if step == "conclude":
        with torch.no_grad():
            model.log_z.fill_(0.0)
        objective.conclude(model, rows, make_generator(0, CPU))
    assert model.log_z.item() == pytest.approx(LOG_Z, abs=0.05)


@pytest.mark.parametrize("noise", ["gaussian", "product-of-marginals", "flow"])
def test_nce_finds_energy_and_log_z_together(noise):
    model = Gaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    objective = NoiseContrastive(noise=noise, data_noise=0.0)
    descend(model, objective, gaussian_rows(20_000), n_steps=150, learning_rate=0.06)
    torch.testing.assert_close(model.mean.data, MEAN, rtol=0, atol=0.06)
    torch.testing.assert_close(model.covariance, COVARIANCE, rtol=0, atol=0.08)
    assert model.log_z.item() == pytest.approx(model.true_log_z, abs=0.05)
    assert model.log_z.item() == pytest.approx(LOG_Z, abs=0.1)


@pytest.mark.parametrize("n_noise", [1, 5])
def test_the_gradient_vanishes_at_the_truth(n_noise):
    model = Gaussian(MEAN, COVARIANCE)
    objective = NoiseContrastive(data_noise=0.0, n_noise=n_noise)
    x = gaussian_rows(40_000)
    objective.noise_ = Normal(torch.zeros(2, dtype=F64), 1.5)
    with torch.no_grad():
        model.log_z.fill_(LOG_Z)
    losses = objective(model, x, make_generator(0, CPU))
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        assert float(parameter.grad.abs().max()) < 0.02, name
    # Away from it the loss is larger: the held-out loss judges soundly.
    for shift in (-0.5, 0.5):
        with torch.no_grad():
            model.log_z.fill_(LOG_Z + shift)
            assert float(objective(model, x, make_generator(0, CPU)).mean()) > float(losses.mean()) + 0.01


def test_the_loss_is_that_of_logistic_regression():
    model, x = Gaussian(MEAN, COVARIANCE), gaussian_rows(7)
    objective = NoiseContrastive(data_noise=0.0, n_noise=3)
    noise = objective.noise_ = Normal(torch.zeros(2, dtype=F64), 1.5)
    loss = objective(model, x, make_generator(0, CPU))
    y = noise.sample(21, make_generator(0, CPU))

    def posterior(z):
        model_density = (-model.energy(z) - model.log_z).exp().detach()
        return model_density / (model_density + 3 * noise.log_prob(z).exp())

    expected = -posterior(x).log() - (1 - posterior(y)).log().reshape(7, 3).sum(1)
    torch.testing.assert_close(loss.detach(), expected)


def test_the_loss_is_stable():
    class Steep(Gaussian):
        def energy(self, x):
            return 1e6 * super().energy(x)

    model, objective = Steep(MEAN, COVARIANCE), NoiseContrastive()
    objective.prepare(model, Tensors(gaussian_rows(100)), make_generator(0, CPU))
    loss = objective(model, gaussian_rows(100), make_generator(0, CPU))
    loss.mean().backward()
    assert bool(loss.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_bridge_with_far_off_energies():
    rows, noise = torch.full((10,), 1e5, dtype=F64), torch.full((20,), -1e5, dtype=F64)
    assert math.isfinite(bridge_log_z(rows, noise, n_noise=2))
    same = torch.full((10,), 3.0, dtype=F64)
    # A constant ratio exp(3) is Z.
    assert bridge_log_z(same, same, n_noise=1) == pytest.approx(3.0, abs=1e-6)


# Telescoping ------------------------------------------------------------------------------------------------


class QuadraticHeads(nn.Module):
    """Bridges that are quadratic forms, which log-ratios of Gaussians are."""

    def __init__(self, features, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.a = nn.Parameter(torch.zeros(n_heads, features, dtype=F64))
        self.b = nn.Parameter(torch.zeros(n_heads, features, dtype=F64))
        self.c = nn.Parameter(torch.zeros(n_heads, dtype=F64))
        self.base = None

    def set_base(self, base):
        self.base = base

    def head_energies(self, x):
        return x.square() @ self.a.T + x @ self.b.T + self.c

    def energy(self, x):
        return self.base.energy(x) + self.head_energies(x).sum(1)


def scaled_newton(model, objective, x, noise_rows):
    """Minimise the loss on fixed draws to the end, with L-BFGS."""

    def closure():
        optimiser.zero_grad()
        loss = objective(model, x, make_generator(0, CPU)).mean()
        loss.backward()
        return loss

    optimiser = torch.optim.LBFGS(
        model.parameters(), lr=1.0, max_iter=noise_rows, history_size=50, line_search_fn="strong_wolfe"
    )
    optimiser.step(closure)


def test_telescoping_reaches_a_narrow_gaussian_that_one_stage_misses():
    """N(1, 0.005^2) in two dimensions under N(0, 1): the log-ratio at its centre is 11.6 nats."""
    width, center = 0.005, torch.ones(2, dtype=F64)
    x = center + width * torch.randn(4000, 2, generator=make_generator(1, CPU), dtype=F64)
    truth = Normal(center, width).log_prob(x)
    noise = Normal(torch.zeros(2, dtype=F64), 1.0)

    def error(n_heads):
        model = QuadraticHeads(2, n_heads)
        objective = Telescoping(noise=noise, data_noise=0.0)
        objective.prepare(model, Tensors(x), make_generator(0, CPU))
        assert isinstance(model.base, NoiseBase)
        scaled_newton(model, objective, x, 400)
        return float((-model.energy(x).detach() - truth).mean().abs())

    errors = {n_heads: error(n_heads) for n_heads in (1, 4)}
    assert errors[4] < 0.2
    # Not one of the noise rows falls where the data are: their ratio can be anything.
    assert errors[1] > 5


def test_telescoping_learns_a_normalised_density_with_a_network():
    x = two_clouds(4000).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EnergyModel(ResidualMLP(2, 4, hidden_features=32, n_blocks=1), 2, n_heads=4)
    descend(model, Telescoping(), x, n_steps=400, learning_rate=5e-3, batch=256, names=trainable(model))
    points, cell = plane("flow")
    with torch.no_grad():
        mass = float((-model.energy(points.float())).exp().sum()) * cell
        fitted = float(-model.energy(x).mean())
        noise = float(model.base.noise.log_prob(x).mean())
    assert mass == pytest.approx(1, abs=0.1)
    assert fitted > noise + 0.3
    assert model.log_z.item() == 0


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and name != "log_z"}


def test_waymarks_preserve_the_variance_and_meet_their_bridges():
    class Recorder(QuadraticHeads):
        def head_energies(self, x):
            self.x = x
            # Head k answers with its number and the waymark's: 10 k + w.
            waymark = torch.arange(self.n_heads + 1).repeat_interleave(len(x) // (self.n_heads + 1))
            return 10.0 * torch.arange(self.n_heads) + waymark[:, None].double()

    model, x = Recorder(2, 3), torch.randn(5000, 2, generator=make_generator(1, CPU), dtype=F64)
    objective = Telescoping(noise=Normal(torch.zeros(2, dtype=F64), 1.0), data_noise=0.0, power=1.0)
    objective.prepare(model, Tensors(x), make_generator(0, CPU))
    loss = objective(model, x, make_generator(0, CPU))
    waymarks = model.x.reshape(4, 5000, 2)
    assert torch.equal(waymarks[0], x)
    for k, waymark in enumerate(waymarks):
        torch.testing.assert_close(waymark.std(0), torch.ones(2, dtype=F64), rtol=0, atol=0.04)
        overlap = float((waymark * x).mean())
        assert overlap == pytest.approx(math.sqrt(1 - (k / 3) ** 2), abs=0.04)
    near, far = torch.tensor([0.0, 11.0, 22.0]), torch.tensor([1.0, 12.0, 23.0])
    expected = (nn.functional.softplus(near) + nn.functional.softplus(-far)).mean()
    torch.testing.assert_close(loss, expected.double().expand(5000))


def test_a_second_training_keeps_the_base():
    model, x = QuadraticHeads(2, 2), two_clouds(100)
    Telescoping().prepare(model, Tensors(x), make_generator(0, CPU))
    base, later = model.base, Telescoping()
    later.prepare(model, Tensors(x + 1), make_generator(1, CPU))
    assert model.base is base
    assert later.noise_ is base.noise


# Both -------------------------------------------------------------------------------------------------------


def make_pair(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EnergyModel(ResidualMLP(2, 3, hidden_features=16, n_blocks=1), 2, n_heads=3)
        nn.init.normal_(model.network.output.weight)
    return model, make()


BOTH = [NoiseContrastive, Telescoping]


@pytest.mark.parametrize("make", BOTH)
def test_every_weight_gets_a_gradient(make):
    model, objective = make_pair(make)
    x, generator = two_clouds(64).float(), make_generator(0, CPU)
    objective.prepare(model, Tensors(x), generator)
    losses = objective(model, x, generator)
    assert losses.shape == (64,)
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        if name == "log_z" and make is Telescoping:
            assert parameter.grad is None
        else:
            assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("noise", ["gaussian", "product-of-marginals"])
def test_the_generator_determines_everything(make, noise):
    x, state = two_clouds(200).float(), None

    def losses(seed):
        nonlocal state
        model, objective = make_pair(make)
        objective.set_params(noise=noise)
        state, generator = torch.get_rng_state(), make_generator(seed, CPU)
        objective.prepare(model, Tensors(x), generator)
        value = torch.stack([objective(model, x, generator) for _ in range(2)]).detach()
        assert torch.equal(torch.get_rng_state(), state)
        return value

    first = losses(0)
    assert torch.equal(first, losses(0))
    assert (first != losses(1)).any()


@pytest.mark.parametrize(
    "name",
    ["contrastive-divergence", "persistent-contrastive-divergence", "noise-contrastive", "telescoping"],
)
def test_the_energy_detector_takes_them_by_name(name):
    X = two_clouds(120).numpy()
    detector = EnergyDetector(
        objective=name, hidden_features=8, n_layers=1, max_iter=15, random_state=0, device="cpu", n_heads=3
    )
    scores = detector.fit(X).score_samples(X)
    assert scores.shape == (120,)
    assert scores.min() < scores.max()
    assert detector.model_.n_heads == (3 if name == "telescoping" else 1)
    again = clone(detector).fit(X).score_samples(X)
    assert (again == scores).all()
    assert math.isfinite(detector.partial_fit(X).score_samples(X[:2]).sum())


def test_the_detector_tells_objectives_the_weights_of_rows():
    seen = []

    class Spy(NoiseContrastive):
        def conclude(self, model, rows, generator):
            seen.append((rows.take(torch.arange(len(rows))), rows.weights))

    X, weights = gaussian_rows(40).numpy(), np.arange(40.0)
    detector = EnergyDetector(objective=Spy(), hidden_features=8, max_iter=1, random_state=0, device="cpu")
    detector.fit(X, sample_weight=weights)
    ((rows, given),) = seen
    nearest = np.abs(X[:, 0] - detector._scaler.inverse_transform(rows)[:, :1]).argmin(axis=1)
    expected = weights[nearest]
    np.testing.assert_allclose(given / given.sum(), expected / expected.sum())


def test_are_components():
    assert OBJECTIVES["noise-contrastive"] is NoiseContrastive
    assert OBJECTIVES["telescoping"] is Telescoping
    assert clone(NoiseContrastive(n_noise=2)).get_params() == {
        "noise": "gaussian",
        "n_noise": 2,
        "data_noise": 0.1,
    }
    own = NoiseContrastive(noise=MarginalNoise.fit(two_clouds(50)))
    assert isinstance(clone(own).noise, MarginalNoise)
    assert repr(Telescoping(power=1.0)) == "Telescoping(power=1.0)"


@pytest.mark.parametrize("objective", [NoiseContrastive, Telescoping])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"log_prob": lambda x: torch.zeros_like(x)}, "The noise's log_prob returned"),
        ({"sample": lambda n, generator: torch.zeros(n, 1)}, "The noise's sample returned"),
    ],
)
def test_noise_of_another_shape_is_refused(objective, change, match):
    X = np.random.default_rng(0).normal(size=(60, 3))
    small = {"hidden_features": 4, "n_layers": 1, "max_iter": 2, "random_state": 0, "device": "cpu"}
    EnergyDetector(objective=objective(noise=Own()), **small).fit(X)
    with pytest.raises(ValueError, match=match):
        EnergyDetector(objective=objective(noise=Own(**change)), **small).fit(X)


class Own:
    """A noise distribution of a user's."""

    def __init__(self, log_prob=None, sample=None):
        self.log_prob = log_prob or (lambda x: -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi))
        self.sample = sample or (lambda n, generator: torch.randn(n, 3, generator=generator))


def test_distributions_of_torch_are_told_why_not():
    x = torch.zeros(4, 2)
    with pytest.raises(TypeError, match=r"noise=Normal\(.*\) draws from torch's global generator"):
        fit_noise(torch.distributions.Normal(torch.zeros(2), torch.ones(2)), x, make_generator(0, CPU))
