"""Objectives of diffusion models: the loss is what its formula says, and its minimum is the exact denoiser."""

import math
from itertools import pairwise, permutations

import pytest
import torch
from scipy import stats
from sklearn.base import clone
from torch import nn

from anomalib_gen import _training
from anomalib_gen._runtime import expand_as_rows, forked_rng, make_generator
from anomalib_gen.detectors.energy import EnergyDetector
from anomalib_gen.models import EnergyModel, GaussianMixtureEnergy, NetworkDenoiser, ScoreDenoiser
from anomalib_gen.models.denoiser import LEVEL_FEATURES, Denoiser, embed_levels
from anomalib_gen.networks import MLP, ResidualMLP
from anomalib_gen.objectives import (
    OBJECTIVES,
    Denoising,
    DenoisingScoreMatching,
    FlowMatching,
    ImprovedDDPM,
)
from anomalib_gen.objectives._levels import levels_at, places, uniform_times
from anomalib_gen.objectives.flow_matching import match_by_transport
from anomalib_gen.objectives.improved_ddpm import HISTORY, hybrid_terms, step_tables
from anomalib_gen.paths import (
    EDM,
    PATHS,
    CosineBetas,
    GeometricLadder,
    Linear,
    LinearBetas,
    VarianceExploding,
)

CPU = torch.device("cpu")
ALL = [
    Denoising(),
    Denoising(times="uniform", weighting="eps"),
    FlowMatching(),
    FlowMatching(pairing="optimal-transport"),
    ImprovedDDPM(),
    ImprovedDDPM(importance_sampling=False),
]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=make_generator(seed, CPU), dtype=dtype)


def make_denoiser(path, features=2, *, hidden=16, zero_output=False, learned_variance=False, **parameters):
    with forked_rng(0):
        network = ResidualMLP(
            features,
            2 * features if learned_variance else features,
            hidden_features=hidden,
            context_features=LEVEL_FEATURES,
            zero_output=zero_output,
        )
    return NetworkDenoiser(network, path, learned_variance=learned_variance, **parameters)


def make_energy(features=2, *, levels=(0.01, 50.0), hidden=16, grain=None, zero_output=False):
    with forked_rng(0):
        network = MLP(
            features, 1, hidden_features=hidden, n_layers=3, context_features=1, zero_output=zero_output
        )
    return EnergyModel(network, features, noise_levels=levels, grain=grain)


class Images(Denoiser):
    """A linear denoiser of events of any shape, with a second output in between the bounds."""

    def denoise(self, x, level):
        return x / (1 + expand_as_rows(level.square(), x))

    def denoise_and_variance(self, x, level):
        return self.denoise(x, level), torch.full_like(x, 0.5)


# Times ----------------------------------------------------------------------------------------------------


def test_places_are_uniform_each_and_even_together():
    generator = make_generator(0, CPU)
    batches = torch.stack([places(40, draw(1), generator) for _ in range(500)])
    assert stats.kstest(batches[:, 7].numpy(), "uniform").pvalue > 1e-3
    gaps = batches.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 40))
    several = places(10, draw(1), generator, draws=4)
    for some in (several, several.reshape(4, 10)[:, 3]):
        gaps = some.sort().values.diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / len(some)))


def test_even_places_lower_the_variance_of_the_mean_loss():
    path, x = VarianceExploding(), draw(256, 2)
    model, objective = ScoreDenoiser(mixture(), path), Denoising(weighting="x0", times="log-uniform")
    generator = make_generator(0, CPU)
    means = []
    for draw_places in (
        lambda: places(256, x, generator),
        lambda: torch.rand(256, generator=generator, dtype=x.dtype),
    ):
        means.append(
            torch.stack(
                [
                    objective.loss_at(
                        model,
                        x,
                        levels_at(path, draw_places(), "log-uniform", 0.0, 1.0),
                        torch.randn(x.shape, generator=generator, dtype=x.dtype),
                    ).mean()
                    for _ in range(200)
                ]
            ).detach()
        )
    even, independent = means
    error = math.sqrt(float(even.var() + independent.var()) / 200)
    assert float(even.mean() - independent.mean()) == pytest.approx(0, abs=4 * error)
    assert even.var() < 0.7 * independent.var()


@pytest.mark.parametrize("name", list(PATHS))
@pytest.mark.parametrize("times", ["log-normal", "log-uniform", "uniform"])
def test_levels_have_their_distribution_and_stay_on_the_path(name, times):
    path = PATHS[name]()
    low, high = path.noise_levels
    u = places(4000, draw(1), make_generator(0, CPU))
    level = levels_at(path, u, times, -0.5, 1.5)
    assert level.min() >= low * (1 - 1e-9)
    assert level.max() <= high * (1 + 1e-9)
    if times == "log-uniform":
        share = (level / low).log() / math.log(high / low)
    elif times == "log-normal":
        ends = [(math.log(end) + 0.5) / 1.5 for end in (low, high)]
        share = torch.from_numpy(stats.truncnorm(*ends, loc=-0.5, scale=1.5).cdf(level.log().numpy()))
    elif path.n_steps is None:
        first, last = path.time_range
        share = (path.time(level) - first) / (last - first)
    else:
        steps, counts = uniform_times(path, u).unique(return_counts=True)
        assert torch.equal(steps, path.grid())
        assert counts.max() - counts.min() <= 1
        return
    assert stats.kstest(share.numpy(), "uniform").statistic < 1e-3


def test_levels_in_single_precision_stay_in_range():
    for name, path in PATHS.items():
        for times in ("log-normal", "log-uniform", "uniform"):
            level = levels_at(path(), torch.tensor([0.0, 0.5, 1 - 2**-24]), times, -0.5, 1.5)
            assert level.isfinite().all(), name
            assert (level > 0).all()


# Denoising ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrization", ["x0", "eps", "v", "edm"])
def test_the_weight_of_a_parametrization_makes_the_plain_error_of_the_network(parametrization):
    path, grain = VarianceExploding(), torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)
    model = make_denoiser(path, 3, parametrization=parametrization, grain=grain).double()
    x, e = draw(50, 3), draw(50, 3, seed=1)
    level = torch.logspace(-1.5, 1, 50, dtype=torch.float64)
    s, d = level.unsqueeze(1), (1 + grain.square()).sqrt()
    total = (s.square() + d.square()).sqrt()
    noisy = x + s * e
    target = {
        "x0": x,
        "eps": e,
        # At alpha = 1 / sqrt(1 + s^2), sigma = s alpha.
        "v": (e - s * x) / (1 + s.square()).sqrt(),
        "edm": (x - (d / total).square() * noisy) * total / (s * d),
    }[parametrization]
    output = model.network(noisy / total, embed_levels(level, *path.noise_levels))
    torch.testing.assert_close(
        Denoising(weighting=parametrization).loss_at(model, x, level, e),
        0.5 * (output - target).square().sum(1),
        rtol=1e-8,
        atol=1e-10,
    )


def test_the_truncated_weight_is_that_of_noise_or_row_whichever_is_larger():
    model, x, e = make_denoiser(EDM()).double(), draw(20, 2), draw(20, 2, seed=1)
    level = torch.logspace(-1, 1, 20, dtype=torch.float64)
    truncated, eps, x0 = (
        Denoising(weighting=name).loss_at(model, x, level, e) for name in ("truncated", "eps", "x0")
    )
    torch.testing.assert_close(truncated, torch.maximum(eps, x0))


def test_the_loss_of_the_exact_denoiser_is_the_posterior_variance():
    """For rows N(0, v) the error is v s^2 / (v + s^2), here weighted by 1 / s^2."""
    v, n = 0.7, 40_000
    model = ScoreDenoiser(
        GaussianMixtureEnergy(
            *(torch.tensor(a, dtype=torch.float64) for a in ([0.0], [[0.0]], [[[v**0.5]]]))
        ),
        EDM(),
    )
    for s in (0.1, 1.0, 10.0):
        level = torch.full((n,), s, dtype=torch.float64)
        rows, e = math.sqrt(v) * draw(n, 1), draw(n, 1, seed=1)
        loss = Denoising(weighting="eps").loss_at(model, rows, level, e).detach()
        expected = 0.5 * v / (v + s**2)
        assert float(loss.mean()) == pytest.approx(expected, abs=4 * float(loss.std()) / math.sqrt(n))


def test_the_grain_is_part_of_the_data():
    """A denoiser that gives the noisy row back errs by the noise of the level alone."""

    class Recorder:
        path, grain, spread = EDM(), torch.tensor([0.0, 0.5]), torch.tensor([1.0, math.hypot(1, 0.5)])

        def denoise(self, x, level):
            self.noisy, self.level = x, level
            return x

    model, x = Recorder(), torch.zeros(20_000, 2)
    loss = Denoising(weighting="x0")(model, x, make_generator(0, CPU))
    assert float((loss / model.level.square()).mean()) == pytest.approx(1, rel=0.05)
    small = model.level < 0.02
    assert float(model.noisy[small, 0].std()) < 0.03
    assert float(model.noisy[small, 1].std()) == pytest.approx(0.5, rel=0.1)
    assert ScoreDenoiser(make_energy(grain=torch.tensor([0.0, 0.5])), EDM()).model.grain[1] == 0.5
    loss = [
        Denoising(weighting="eps")(
            ScoreDenoiser(make_energy(grain=grain), EDM()), x[:500], make_generator(0, CPU)
        )
        for grain in (None, torch.tensor([0.0, 0.5]))
    ]
    assert not torch.equal(*loss)


# Flow matching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PATHS))
def test_flow_matching_is_denoising_with_a_known_weight(name):
    """The same loss, hence the same gradient, row by row."""
    path = PATHS[name]()
    model, x = make_denoiser(path).double(), draw(30, 2)
    loss = FlowMatching()(model, x, make_generator(3, CPU))
    generator = make_generator(3, CPU)
    t = uniform_times(path, places(30, x, generator))
    # That of the grain, which is zero here, comes first.
    _, e = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
    weight = (path.alpha_dot(t) - path.alpha(t) * path.sigma_dot(t) / path.sigma(t)).square()
    if name == "linear":
        torch.testing.assert_close(weight, t**-2)
    same = weight * Denoising(weighting="x0").loss_at(model, x, path.noise_level(t), e)
    torch.testing.assert_close(loss, same, rtol=1e-6, atol=1e-9)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss.mean(), parameters, allow_unused=True),
        torch.autograd.grad(same.mean(), parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_pairs_by_transport_are_closest_and_keep_rows_and_noise():
    x, e = draw(6, 3), draw(6, 3, seed=1)
    matched = match_by_transport(x, e)
    best = min(float((x - e[list(order)]).square().sum()) for order in permutations(range(6)))
    assert float((x - matched).square().sum()) == pytest.approx(best)
    torch.testing.assert_close(match_by_transport(x, 10 * e), 10 * matched)

    x, e = draw(700, 2), draw(700, 2, seed=1)
    matched = FlowMatching(pairing="optimal-transport")._pair(x, e)
    assert torch.equal(matched.sort(0).values, e.sort(0).values)
    # In groups of 256 normal rows of two columns meet noise at a sixth of the distance squared, at least.
    assert (x - matched).square().sum() < (x - e).square().sum() / 6
    images = FlowMatching(pairing="optimal-transport")._pair(draw(20, 1, 4, 4), draw(20, 1, 4, 4, seed=1))
    assert images.shape == (20, 1, 4, 4)


def test_transport_makes_the_straight_path_s_velocity_easier_to_tell():
    """A model that knows the mean alone is off by the variance of e - x_0, which is less for closer pairs."""
    model, x = Images(Linear()), draw(512, 2)
    independent, transport = (
        FlowMatching(pairing=pairing).validate(model, x, make_generator(0, CPU)).mean()
        for pairing in ("independent", "optimal-transport")
    )
    assert transport < 0.6 * independent


# Improved DDPM --------------------------------------------------------------------------------------------


def ddpm_kl(path, k, x, e, clean, log_share):
    """L_k by the formulas of DDPM in the coordinates x_k = alpha_k x + sigma_k e, with torch's divergences."""
    beta = torch.cat([torch.zeros(1, dtype=torch.float64), path.betas()])
    bar = (1 - beta).cumprod(0)
    x_k = bar[k].sqrt() * x + (1 - bar[k]).sqrt() * e

    def mean(row):
        return (
            bar[k - 1].sqrt() * beta[k] / (1 - bar[k]) * row
            + (1 - beta[k]).sqrt() * (1 - bar[k - 1]) / (1 - bar[k]) * x_k
        )

    tilde = (1 - bar[:-1]) / (1 - bar[1:]) * beta[1:]
    lower = tilde[k - 1] if k > 1 else tilde[1]
    deviation = (log_share * beta[k].log() + (1 - log_share) * lower.log()).exp().sqrt()
    if k == 1:
        return -torch.distributions.Normal(clean, deviation).log_prob(x).sum(1)
    q = torch.distributions.Normal(mean(x), lower.sqrt().expand_as(x))
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(mean(clean), deviation)).sum(1)


@pytest.mark.parametrize(
    "path", [LinearBetas(), CosineBetas(), LinearBetas(n_steps=20, beta_max=0.5)], ids=str
)
def test_the_terms_of_the_bound_are_divergences(path):
    model, x, e = make_denoiser(path, 3, learned_variance=True).double(), draw(4, 3), draw(4, 3, seed=1)
    tables = step_tables(path)
    for k in (1, 2, 3, path.n_steps // 2, path.n_steps):
        steps = torch.full((4,), k - 1)
        level = tables.level[steps]
        clean, v = model.denoise_and_variance(x + level.unsqueeze(1) * e, level)
        simple, vlb = hybrid_terms(model, x, steps, e, tables)
        torch.testing.assert_close(vlb, ddpm_kl(path, k, x, e, clean, v), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(simple, ((clean - x) / level.unsqueeze(1)).square().sum(1))


class KnownSteps(Denoiser):
    """The exact denoiser of N(0, v), with one share of the variances for each step of the path."""

    def __init__(self, path, v, shares):
        super().__init__(path)
        self.v, self.shares = v, nn.Parameter(shares)
        self.register_buffer("levels", step_tables(path).level)

    def denoise_and_variance(self, x, level):
        k = torch.searchsorted(self.levels, level * (1 - 1e-6))
        return self.v / (self.v + level.square()).unsqueeze(1) * x, self.shares[k].unsqueeze(1)


def best_shares(path, v):
    """Of N(0, v) the reverse steps are normal: their exact variances, between the two bounds."""
    tables = step_tables(path)
    before = torch.cat([torch.zeros(1, dtype=torch.float64), tables.level[:-1]]).square()
    variance = (v + before) * (tables.level.square() - before) / (v + tables.level.square())
    return (variance.log() - tables.log_lower) / (tables.log_upper - tables.log_lower)


@pytest.mark.parametrize(
    "path",
    [CosineBetas(n_steps=25), LinearBetas(n_steps=25, beta_max=0.4), GeometricLadder(n_steps=25)],
    ids=str,
)
def test_with_exact_means_and_variances_the_bound_is_the_likelihood(path):
    v = 0.6
    model = KnownSteps(path, v, best_shares(path, v))
    tables = step_tables(path)
    x = torch.tensor([[-2.0], [0.0], [0.3], [1.5]], dtype=torch.float64)
    bound = torch.zeros(4, dtype=torch.float64)
    for k in range(len(tables.level)):
        # Terms are quadratic in the noise: its mean over -1 and 1 is that over N(0, 1).
        both = [
            hybrid_terms(model, x, torch.full((4,), k), sign * torch.ones_like(x), tables)[1]
            for sign in (1, -1)
        ]
        bound += torch.stack(both).mean(0).detach()
    last = tables.level[-1]
    zero, variance = torch.zeros(1, dtype=torch.float64), torch.tensor(v, dtype=torch.float64)
    bound += torch.distributions.kl_divergence(
        torch.distributions.Normal(x, last), torch.distributions.Normal(zero, (v + last.square()).sqrt())
    ).squeeze(1)
    truth = -torch.distributions.Normal(zero, variance.sqrt()).log_prob(x).squeeze(1)
    torch.testing.assert_close(bound, truth, rtol=1e-9, atol=1e-9)


def test_learned_shares_reach_the_known_optimum():
    path, v = CosineBetas(n_steps=12), 0.6
    model, tables = KnownSteps(path, v, torch.full((12,), 0.5, dtype=torch.float64)), step_tables(path)
    # The loss is quadratic in row and noise: over these it has the mean that it has over N(0, v) and N(0, 1).
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    x, e = (a.repeat(12).unsqueeze(1) for a in signs.unbind(1))
    x, steps = math.sqrt(v) * x, torch.arange(12).repeat_interleave(4)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def closure():
        optimiser.zero_grad()
        loss = hybrid_terms(model, x, steps, e, tables)[1].mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(model.shares.detach(), best_shares(path, v), rtol=0, atol=1e-3)


def test_the_bound_has_no_gradient_to_the_denoiser():
    path = CosineBetas(n_steps=10)
    model = make_denoiser(path, learned_variance=True, zero_output=True).double()
    x, e = draw(8, 2), draw(8, 2, seed=1)
    simple, vlb = hybrid_terms(model, x, torch.arange(8), e, step_tables(path))
    means, variances = torch.autograd.grad(vlb.sum(), model.network.output.bias, retain_graph=True)[0].chunk(
        2
    )
    assert (means == 0).all()
    assert (variances != 0).all()
    means, variances = torch.autograd.grad(simple.sum(), model.network.output.bias)[0].chunk(2)
    assert (means != 0).all()
    assert (variances == 0).all()


def test_importance_sampling_leaves_the_expectation_and_lowers_the_variance():
    path, x = CosineBetas(n_steps=20), draw(2000, 2)
    model = make_denoiser(path, learned_variance=True).double()
    uniform, weighted = (ImprovedDDPM(importance_sampling=sampled) for sampled in (False, True))
    generator = make_generator(0, CPU)
    weighted.prepare(model, None, generator)
    with torch.no_grad():
        # Too few losses yet: uniform.
        torch.testing.assert_close(
            *(objective(model, x[:3], make_generator(1, CPU)) for objective in (uniform, weighted)),
            rtol=1e-6,
            atol=0,
        )
        torch.testing.assert_close(weighted.probabilities(), torch.full((20,), 1 / 20))
        for _ in range(3):
            weighted(model, x, generator)
        p = weighted.probabilities()
        assert float(p.sum()) == pytest.approx(1)
        assert p.max() > 3 * p.min()
        means = {
            objective: torch.stack([objective(model, x[:200], generator).mean() for _ in range(200)])
            for objective in (uniform, weighted)
        }
    error = math.sqrt(sum(float(m.var()) for m in means.values()) / 200)
    assert float(means[uniform].mean() - means[weighted].mean()) == pytest.approx(0, abs=4 * error)
    assert means[weighted].var() < means[uniform].var()


def test_the_history_keeps_the_last_losses_of_each_step():
    objective = ImprovedDDPM()
    objective.prepare(
        make_denoiser(CosineBetas(n_steps=4), learned_variance=True), None, make_generator(0, CPU)
    )
    kept = [[] for _ in range(4)]
    generator, number = make_generator(0, CPU), 0
    for size in (3, 40, 1, 25, 7, 60):
        steps = torch.randint(0, 4, (size,), generator=generator)
        loss = torch.arange(number, number + size, dtype=torch.float32)
        number += size
        objective._remember(steps, loss)
        for k, value in zip(steps.tolist(), loss.tolist(), strict=True):
            kept[k].append(value)
    assert objective.counts_.tolist() == [len(values) for values in kept]
    for row, values in zip(objective.history_.tolist(), kept, strict=True):
        assert sorted(row) == values[-HISTORY:]


def test_what_improved_ddpm_needs_is_named():
    x = draw(2, 2, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"at least two discrete steps, such as CosineBetas\(\), got EDM\(\)"
    ):
        ImprovedDDPM()(make_denoiser(EDM(), learned_variance=True), x, make_generator(0, CPU))
    with pytest.raises(ValueError, match=r"learns no variances.*learned_variance=True"):
        ImprovedDDPM()(make_denoiser(CosineBetas()), x, make_generator(0, CPU))


# All of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ALL, ids=str)
@pytest.mark.parametrize("event_shape", [(1,), (3,), (1, 4, 4)])
def test_one_loss_a_row_by_the_generator_alone(objective, event_shape):
    model, x = Images(CosineBetas(n_steps=50)), draw(6, *event_shape)
    state = torch.get_rng_state()
    for call in (objective, objective.validate):
        first, again, other = (call(model, x, make_generator(seed, CPU)) for seed in (0, 0, 1))
        assert first.shape == (6,)
        assert first.isfinite().all()
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_validation_is_the_expected_loss_with_less_noise(objective):
    objective = clone(objective)
    path = CosineBetas(n_steps=50)
    model, x = make_denoiser(path, learned_variance=True).double(), draw(64, 2)
    generator = make_generator(0, CPU)
    with torch.no_grad():
        plain = torch.stack([objective(model, x, generator).mean() for _ in range(60)])
        judged = torch.stack([objective.validate(model, x, generator).mean() for _ in range(30)])
    assert judged.var() < plain.var() / 2
    # Transport in groups of 64 rows is another than in the judge's groups of 256.
    if getattr(objective, "pairing", None) != "optimal-transport":
        error = math.sqrt(float(plain.var() / 60 + judged.var() / 30))
        assert float(plain.mean() - judged.mean()) == pytest.approx(0, abs=4 * error)


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (
            Denoising(weighting="l1"),
            r"weighting='l1' is unknown\. Known: 'edm', 'eps', 'truncated', 'v', 'x0'",
        ),
        (
            Denoising(times="linear"),
            r"times='linear' is unknown\. Known: 'log-normal', 'log-uniform', 'uniform'",
        ),
        (Denoising(log_mean=50.0), r"log_mean=50.0 and log_std=1.5 leave nothing of the noise levels"),
        (Denoising(log_std=0.0), r"log_std must be positive and finite, got 0\.0"),
        (ImprovedDDPM(vlb_weight=-1.0), r"vlb_weight of .* must be finite and not negative, got -1\.0"),
        (Denoising(log_mean=99.0), r"log_mean=99.0 and log_std=1.5 leave nothing of the noise levels"),
        (
            FlowMatching(pairing="random"),
            r"pairing='random' is unknown\. Known: 'independent', 'optimal-trans",
        ),
    ],
)
def test_wrong_options_are_named(objective, match):
    with pytest.raises(ValueError, match=match):
        objective(make_denoiser(EDM()), draw(2, 2, dtype=torch.float32), make_generator(0, CPU))


def test_they_are_known_by_name_and_not_offered_for_energies():
    names = {"denoising": Denoising, "flow-matching": FlowMatching, "improved-ddpm": ImprovedDDPM}
    for name, objective in names.items():
        assert OBJECTIVES[name] is objective
        assert name not in EnergyDetector._objectives
    assert repr(clone(Denoising(weighting="v", log_std=1.0))) == "Denoising(log_std=1.0, weighting='v')"


# Energies as diffusion models -----------------------------------------------------------------------------


def test_an_energy_s_denoiser_has_its_exact_negative_gradient_as_score():
    energy, path = make_energy().double(), VarianceExploding()
    model, x = ScoreDenoiser(energy, path), draw(5, 2)
    level = torch.logspace(-1.5, 1, 5, dtype=torch.float64)
    for row, s, score in zip(x, level, model.score(x, level).detach(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda z, s=s: energy.energy(z[None], s[None])[0], row)
        torch.testing.assert_close(score, -jacobian, rtol=1e-10, atol=1e-10)
        step = 1e-5
        for i in range(2):
            move = step * torch.eye(2, dtype=torch.float64)[i]
            slope = (
                energy.energy((row + move)[None], s[None]) - energy.energy((row - move)[None], s[None])
            ) / (2 * step)
            assert float(-slope.detach()) == pytest.approx(float(score[i]), rel=1e-5, abs=1e-6)
    # A gradient has no curl: its Jacobian is symmetric, unlike that of a network with as many outputs.
    for field, symmetric in ((model, True), (make_denoiser(path).double(), False)):
        jacobian = torch.autograd.functional.jacobian(
            lambda z, f=field: f.denoise(z[None], level[2:3])[0], x[0]
        )
        assert torch.allclose(jacobian, jacobian.T, rtol=1e-9, atol=1e-9) == symmetric


def test_denoising_with_weight_eps_is_denoising_score_matching():
    energy = make_energy().double()
    x, e = draw(30, 2), draw(30, 2, seed=1)
    level = torch.logspace(-1.5, 1, 30, dtype=torch.float64)
    s = level.unsqueeze(1)
    torch.testing.assert_close(
        Denoising(weighting="eps").loss_at(ScoreDenoiser(energy, VarianceExploding()), x, level, e),
        0.5 * (s * energy.score(x + s * e, level) + e).square().sum(1),
    )
    # The same in expectation as the objective of that name, which draws levels log-uniformly.
    generator, n = make_generator(0, CPU), 100
    objectives = {
        Denoising(weighting="eps", times="log-uniform"): ScoreDenoiser(energy, VarianceExploding()),
        DenoisingScoreMatching(): energy,
    }
    with torch.no_grad():
        a, b = (
            torch.stack([objective(model, x, generator).mean() for _ in range(n)])
            for objective, model in objectives.items()
        )
    assert float(a.mean() - b.mean()) == pytest.approx(0, abs=4 * math.sqrt(float(a.var() + b.var()) / n))


@pytest.mark.parametrize("objective", [Denoising(), FlowMatching()], ids=str)
def test_energies_get_a_gradient_through_their_score(objective):
    model = ScoreDenoiser(make_energy(), VarianceExploding())
    objective(model, draw(16, 2, dtype=torch.float32), make_generator(0, CPU)).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    # What no score depends on.
    assert {name for name, g in gradients.items() if g is None} <= {
        "model.log_z",
        "model.network.output.bias",
    }
    assert all(g.isfinite().all() and (g != 0).any() for g in gradients.values() if g is not None)
    with torch.no_grad():
        assert not objective.validate(
            model, draw(16, 2, dtype=torch.float32), make_generator(0, CPU)
        ).requires_grad


# Truth ----------------------------------------------------------------------------------------------------


def mixture():
    """Three components of unlike shapes, of unit variance together."""
    means = torch.tensor([[-1.2, 0.6], [1.0, 1.0], [0.5, -1.1]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.20, 0.10], [0.10, 0.10]], [[0.10, -0.05], [-0.05, 0.20]], [[0.30, 0.0], [0.0, 0.05]]],
        dtype=torch.float64,
    )
    weights = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    return GaussianMixtureEnergy(weights.log(), means, torch.linalg.cholesky(covariances))


class Resident:
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def take(self, index):
        return self.x[index]

    def blocks(self, rows_per_block):
        return iter(self.x.split(rows_per_block))


def train(model, objective, *, max_iter=1000):
    x = mixture().sample(20_000, make_generator(1, CPU)).float()
    if hasattr(objective, "prepare"):
        objective.prepare(model, Resident(x), make_generator(2, CPU))
    result = _training.train(
        model,
        objective,
        Resident(x[1000:]),
        validation=Resident(x[:1000]),
        options=_training.TrainingOptions(
            max_iter=max_iter,
            batch_size=512,
            learning_rate=1e-2,
            eval_every=100,
            ema_decay=0.98,
        ),
        seed=0,
        device=CPU,
    )
    assert result.validation_curve[-1] < result.validation_curve[0]
    return model.double()


LEVELS = (0.05, 0.15, 0.5, 1.5, 5.0)


def relative_errors(model, other=None):
    """Relative L2 error of the score at each level, over rows with noise of that level."""
    truth = mixture()
    other = ScoreDenoiser(truth, VarianceExploding()) if other is None else other
    x = truth.sample(4000, make_generator(9, CPU))
    errors = []
    for s in LEVELS:
        level = torch.full((len(x),), s, dtype=torch.float64)
        noisy = x + s * draw(*x.shape, seed=10)
        exact = other.score(noisy, level).detach()
        errors.append(float((model.score(noisy, level).detach() - exact).norm() / exact.norm()))
    return errors


SIZE = {"hidden": 64, "zero_output": True}


def test_training_by_default_comes_close_to_the_exact_score():
    """Slow tests below have closer bounds."""
    errors = relative_errors(train(make_denoiser(VarianceExploding(), **SIZE), Denoising(), max_iter=300))
    assert all(error < bound for error, bound in zip(errors, (0.8, 0.4, 0.2, 0.1, 0.05), strict=True)), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "objective", "parameters"),
    [
        (VarianceExploding(), Denoising(), {}),
        (VarianceExploding(), Denoising(times="log-uniform"), {}),
        (EDM(), Denoising(), {}),
        (LinearBetas(), Denoising(weighting="eps", times="uniform"), {"parametrization": "eps"}),
        (GeometricLadder(), Denoising(weighting="eps", times="uniform"), {"parametrization": "eps"}),
        (CosineBetas(), Denoising(weighting="v", times="uniform"), {"parametrization": "v"}),
        (VarianceExploding(), Denoising(weighting="truncated"), {"parametrization": "v"}),
        (Linear(), FlowMatching(), {}),
        (CosineBetas(), ImprovedDDPM(), {"learned_variance": True}),
        (CosineBetas(), ImprovedDDPM(importance_sampling=False), {"learned_variance": True}),
    ],
    ids=str,
)
def test_training_finds_the_exact_score(path, objective, parameters):
    errors = relative_errors(train(make_denoiser(path, **SIZE, **parameters), objective))
    print(path, objective, errors)
    # At the smallest level, well below the widths of the mixture, noise hides almost nothing and tells little.
    assert all(error < bound for error, bound in zip(errors, (0.55, 0.25, 0.12, 0.06, 0.05), strict=True)), (
        errors
    )


@pytest.mark.slow
def test_an_energy_a_denoiser_and_the_truth_agree():
    path = VarianceExploding()
    energy = train(ScoreDenoiser(make_energy(**SIZE), path), Denoising())
    free = train(make_denoiser(path, **SIZE), Denoising())
    for one, other, bounds in (
        (energy, None, (0.4, 0.2, 0.1, 0.05, 0.02)),
        (free, None, (0.4, 0.2, 0.1, 0.05, 0.02)),
        (energy, free, (0.4, 0.2, 0.1, 0.05, 0.02)),
    ):
        errors = relative_errors(one, other)
        print(errors)
        assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors


@pytest.mark.slow
def test_flows_of_pairs_by_transport_are_straighter():
    """From noise to rows in a few steps of Euler's method: the error is what is bent."""

    def sample(model, n_steps):
        x = draw(3000, 2, seed=5)
        t = torch.linspace(0.99, 1e-3, n_steps + 1, dtype=torch.float64)
        with torch.no_grad():
            for now, then in pairwise(t):
                x = x + (then - now) * model.predict(x, now.expand(len(x))).velocity
        return x

    def energy_distance(x, y):
        return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())

    truth = mixture().sample(3000, make_generator(8, CPU))
    distances = {}
    for pairing in ("independent", "optimal-transport"):
        model = train(make_denoiser(Linear(), **SIZE), FlowMatching(pairing=pairing), max_iter=400)
        distances[pairing] = [energy_distance(sample(model, n), truth) for n in (2, 100)]
    print(distances)
    few, many = distances["optimal-transport"]
    assert few < 0.5 * distances["independent"][0]
    assert many < 0.01
