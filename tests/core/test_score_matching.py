"""Score matching: each estimate is unbiased, each minimum is the score of the smoothed density."""

import math

import pytest
import torch
from sklearn.base import clone

from anomalib_gen._runtime import forked_rng, make_generator
from anomalib_gen.models import EnergyModel, GaussianEnergy, GaussianMixtureEnergy, QuadraticEnergy
from anomalib_gen.networks import MLP, ResidualMLP
from anomalib_gen.objectives import (
    OBJECTIVES,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    GradientPenalty,
    NoiseContrastive,
    ScoreMatching,
    SlicedScoreMatching,
    Telescoping,
)

CPU = torch.device("cpu")
ALL = [
    ScoreMatching(),
    ScoreMatching(trace="hutchinson"),
    SlicedScoreMatching(),
    SlicedScoreMatching(variance_reduced=False),
    DenoisingScoreMatching(),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=make_generator(seed, CPU), dtype=torch.float64)


def make_model(features=3, levels=None, n_heads=1, network=MLP):
    with forked_rng(0):
        net = network(
            features,
            n_heads,
            hidden_features=16,
            context_features=0 if levels is None else 1,
            zero_output=False,
        )
    return EnergyModel(net, features, noise_levels=levels, n_heads=n_heads).double().eval()


# The trace ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [ScoreMatching(data_noise=0.0, trace="exact"), ScoreMatching(data_noise=0.0)]
)
def test_the_exact_trace_is_the_sum_of_the_hessian_s_diagonal(objective):
    model, x = make_model(), draw(4, 3)
    expected = []
    for row in x:
        hessian = torch.autograd.functional.hessian(lambda row: model.energy(row[None]).sum(), row)
        expected.append(0.5 * model.score(row[None]).square().sum() - hessian.diagonal().sum())
    torch.testing.assert_close(objective(model, x, make_generator(0, CPU)), torch.stack(expected))


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("variance_reduced", [True, False])
def test_sliced_estimates_are_unbiased(probe, variance_reduced):
    model, x = make_model(), draw(3, 3)
    n = 20_000
    exact = ScoreMatching(data_noise=0.0, trace="exact")(model, x, make_generator(0, CPU)).detach()
    objective = SlicedScoreMatching(data_noise=0.0, probe=probe, variance_reduced=variance_reduced)
    with torch.no_grad():
        losses = objective(model, x.repeat(n, 1), make_generator(1, CPU)).reshape(n, 3)
    error = losses.std(0) / math.sqrt(n)
    assert ((losses.mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_s_trace_is_unbiased(probe):
    model, x = make_model(), draw(3, 3)
    n = 10_000
    exact = ScoreMatching(data_noise=0.0)(model, x, make_generator(0, CPU)).detach()
    objective = ScoreMatching(data_noise=0.0, trace="hutchinson", probe=probe, n_probes=2)
    with torch.no_grad():
        losses = objective(model, x.repeat(n, 1), make_generator(1, CPU)).reshape(n, 3)
    assert ((losses.mean(0) - exact).abs() < 4 * losses.std(0) / math.sqrt(n)).all()


def test_signs_are_exact_where_the_hessian_is_diagonal():
    model = QuadraticEnergy(torch.diag(draw(5)), torch.zeros(5, dtype=torch.float64))
    x = draw(4, 5)
    losses = [
        ScoreMatching(data_noise=0.0, trace=trace)(model, x, make_generator(0, CPU))
        for trace in ("exact", "hutchinson")
    ]
    torch.testing.assert_close(*losses)


def test_the_reduced_variance_is_lower():
    model, x = make_model(), 2 * draw(1, 3).repeat(4000, 1)
    with torch.no_grad():
        reduced, plain = (
            SlicedScoreMatching(data_noise=0.0, variance_reduced=value)(
                model, x, make_generator(0, CPU)
            ).var()
            for value in (True, False)
        )
    assert reduced < plain


def test_wide_rows_are_probed_by_default():
    model, x = make_model(9), draw(4, 9)
    values = [
        ScoreMatching(trace=trace)(model, x, make_generator(0, CPU))
        for trace in ("auto", "hutchinson", "exact")
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (ScoreMatching(trace="some"), r"trace='some' is unknown\. Known: 'auto', 'exact', 'hutchinson'"),
        (SlicedScoreMatching(probe="cauchy"), r"probe='cauchy' is unknown\. Known probes: 'gaussian', 'rade"),
    ],
)
def test_unknown_options_list_the_known(objective, match):
    with pytest.raises(ValueError, match=match):
        objective(make_model(), draw(2, 3), make_generator(0, CPU))


# The minimum ----------------------------------------------------------------------------------------------


def test_score_matching_of_a_quadratic_is_the_precision():
    """Hyvarinen (2005), section 3.1: the minimum over A is the inverse of the sample's covariance."""
    x = draw(500, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.7]], dtype=torch.float64)
    x = x - x.mean(0)
    precision = torch.linalg.inv(x.T @ x / len(x))
    model = QuadraticEnergy(precision.clone(), torch.zeros(2, dtype=torch.float64))
    ScoreMatching(data_noise=0.0)(model, x, make_generator(0, CPU)).mean().backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-12


def test_denoising_score_matching_is_minimal_at_the_noised_gaussian():
    sigma = 0.6
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
    x = draw(200_000, 2) @ torch.linalg.cholesky(covariance).T

    def loss(noise_variance, objective):
        factor = torch.linalg.cholesky(
            torch.linalg.inv(covariance + noise_variance * torch.eye(2, dtype=torch.float64))
        )
        model = GaussianEnergy(torch.zeros(2, dtype=torch.float64), factor)
        value = objective(model, x, make_generator(1, CPU)).mean()
        value.backward()
        return float(value.detach()), max(float(p.grad.abs().max()) for p in model.parameters())

    objective = DenoisingScoreMatching(data_noise=sigma)
    at, gradient = loss(sigma**2, objective)
    # The value in closed form: (D - sigma^2 tr C_s^-1) / 2.
    noised = covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
    assert at == pytest.approx(1 - 0.5 * sigma**2 * float(torch.linalg.inv(noised).trace()), abs=5e-3)
    assert gradient < 5e-3
    for other in (0.0, 0.5 * sigma**2, 2 * sigma**2):
        value, slope = loss(other, objective)
        assert value > at
        assert slope > 0.02
    # And so is implicit score matching on rows with the same noise.
    assert loss(sigma**2, ScoreMatching(data_noise=sigma))[1] < 2e-2


def test_the_judge_is_the_loss_over_pairs_of_noise():
    model, x = make_model(), draw(40, 3)
    judge = DenoisingScoreMatching(data_noise=0.3)
    with torch.no_grad():
        many = torch.stack([judge(model, x, make_generator(seed, CPU)) for seed in range(400)]).mean()
        once = judge.validate(model, x, make_generator(0, CPU))
        again = judge.validate(model, x, make_generator(0, CPU))
    assert torch.equal(once, again)
    assert float(once.mean()) == pytest.approx(float(many), rel=0.05)
    for objective in (ScoreMatching(data_noise=0.3), SlicedScoreMatching(data_noise=0.3)):
        with torch.no_grad():
            assert torch.equal(objective.validate(model, x, make_generator(0, CPU)), once)


def test_without_noise_the_loss_judges_itself():
    model, x = make_model(), draw(4, 3)
    objective = ScoreMatching(data_noise=0.0)
    assert torch.equal(
        objective.validate(model, x, make_generator(0, CPU)), objective(model, x, make_generator(0, CPU))
    )


def test_levels_are_log_uniform_and_weigh_alike():
    """At each level the loss of a silent model on standard rows is half of D (1 - share of the noise)."""
    model = make_model(levels=(0.1, 2.0))
    torch.nn.init.zeros_(model.network.output.weight)
    torch.nn.init.zeros_(model.network.output.bias)
    x = draw(100_000, 3)
    s = torch.logspace(-1, math.log10(2), 2001, dtype=torch.float64)
    expected = 1.5 * float((1 / (1 + s.square())).mean())
    with torch.no_grad():
        loss = DenoisingScoreMatching()(model, x, make_generator(0, CPU)).mean()
    assert float(loss) == pytest.approx(expected, rel=0.01)


MIXTURE = GaussianMixtureEnergy(
    torch.tensor([0.3, 0.7]).log(),
    torch.tensor([[-1.0, 0.3], [0.8, -0.2]]),
    torch.tensor([[[0.6, 0.0], [0.2, 0.5]], [[0.5, 0.0], [-0.3, 0.6]]]),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "n_steps"),
    [
        (ScoreMatching(), 1500),
        (ScoreMatching(trace="hutchinson"), 1500),
        (SlicedScoreMatching(), 1500),
        (SlicedScoreMatching(variance_reduced=False, n_slices=2), 1500),
        (DenoisingScoreMatching(data_noise=0.2), 2000),
    ],
    ids=str,
)
def test_the_score_of_a_mixture_is_learnt_to_five_percent(objective, n_steps):
    """Relative error in L2 under the smoothed density, whose score is known exactly."""
    with forked_rng(0):
        model = EnergyModel(MLP(2, 1, hidden_features=64), 2)
    generator, sigma = make_generator(0, CPU), objective.data_noise
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    for _ in range(n_steps):
        optimiser.zero_grad()
        objective(model, MIXTURE.sample(512, generator), generator).mean().backward()
        optimiser.step()
        schedule.step()
    x = MIXTURE.sample(4000, make_generator(8, CPU))
    x = x + sigma * torch.randn(x.shape, generator=make_generator(9, CPU))
    with torch.no_grad():
        exact = MIXTURE.score(x, torch.full((len(x),), sigma))
        error = (model.score(x) - exact).norm() / exact.norm()
    assert float(error) < 0.05


# What all of them promise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, (0.1, 2.0)])
@pytest.mark.parametrize("network", [MLP, ResidualMLP])
@pytest.mark.parametrize("objective", ALL, ids=str)
def test_every_parameter_gets_a_gradient(objective, network, levels):
    model, x = make_model(levels=levels, network=network).train(), draw(16, 3)
    objective(model, x, make_generator(0, CPU)).mean().backward()
    # A constant added to the energy changes no score.
    blind = {"log_z", "network.output.bias"}
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert learns != (name in blind), name


class Rows:
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def take(self, index):
        return self.x[index]

    def blocks(self, rows_per_block):
        yield from self.x.split(rows_per_block)


@pytest.mark.parametrize(
    ("objective", "n_heads", "blind"),
    [
        (NoiseContrastive(), 1, set()),
        (Telescoping(), 3, {"log_z"}),
        (ContrastiveDivergence(n_steps=2), 1, {"log_z"}),
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient_from_contrast(objective, n_heads, blind):
    objective, model, x = clone(objective), make_model(n_heads=n_heads).train(), draw(64, 3)
    objective.prepare(model, Rows(x), make_generator(0, CPU))
    objective(model, x, make_generator(0, CPU)).mean().backward()
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert learns != (name in blind), name


@pytest.mark.parametrize("levels", [None, (0.1, 2.0)])
@pytest.mark.parametrize("objective", ALL, ids=str)
def test_without_recording_the_loss_is_the_same_and_has_no_graph(objective, levels):
    model, x = make_model(levels=levels), draw(8, 3)
    recorded = objective(model, x, make_generator(0, CPU))
    with torch.no_grad():
        silent = objective(model, x, make_generator(0, CPU))
    assert recorded.shape == (8,)
    assert not silent.requires_grad
    torch.testing.assert_close(recorded.detach(), silent, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_grain_keeps_the_loss_of_columns_on_a_grid_bounded(objective):
    with forked_rng(0):
        model = EnergyModel(MLP(2, 1), 2, grain=torch.tensor([0.5, 0.0]))
    x = torch.zeros(4000, 2)
    loss = objective(model, x, make_generator(0, CPU))
    assert loss.isfinite().all()
    # The first column is seen with its noise, the second with that of the objective.
    silent = EnergyModel(MLP(2, 1), 2)
    assert not torch.equal(loss, objective(silent, x, make_generator(0, CPU)))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_are_components(name):
    objective = OBJECTIVES[name]()
    assert repr(clone(objective)) == repr(objective)


# The gradient penalty -------------------------------------------------------------------------------------


def test_the_penalty_is_half_the_squared_slope():
    model, x = GaussianEnergy(torch.zeros(3).double(), 2 * torch.eye(3).double()), draw(5, 3)
    plain = DenoisingScoreMatching(data_noise=0.2)
    penalised = GradientPenalty(DenoisingScoreMatching(data_noise=0.2), weight=0.3)
    difference = penalised(model, x, make_generator(0, CPU)) - plain(model, x, make_generator(0, CPU))
    torch.testing.assert_close(difference, 0.3 * 0.5 * (4 * x).square().sum(1))
    assert torch.equal(
        penalised.validate(model, x, make_generator(0, CPU)), plain.validate(model, x, make_generator(0, CPU))
    )


def test_the_penalty_passes_on_what_the_objective_offers():
    penalised = GradientPenalty(ContrastiveDivergence())
    assert penalised.diverged() is None
    assert hasattr(penalised, "prepare")
    assert not hasattr(GradientPenalty(DenoisingScoreMatching()), "prepare")
    assert GradientPenalty(DenoisingScoreMatching()).uses_noise_levels
    copied = clone(penalised).set_params(objective__n_steps=3, weight=0.5)
    assert (copied.objective.n_steps, copied.weight) == (3, 0.5)
    assert penalised.objective.n_steps != 3
