"""Reverse-time samplers: published formulas, exact cases, and samples of a mixture along every path."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.stats import ks_2samp

from anomalib_gen._runtime import forked_rng
from anomalib_gen.models import GaussianMixtureEnergy, NetworkDenoiser, ScoreDenoiser
from anomalib_gen.models.denoiser import LEVEL_FEATURES
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.paths import (
    EDM,
    PATHS,
    GeometricLadder,
    Linear,
    LinearBetas,
    VarianceExploding,
    VariancePreserving,
)
from anomalib_gen.samplers import (
    SAMPLERS,
    ancestral,
    annealed,
    ddim,
    euler_maruyama,
    predictor_corrector,
    probability_flow,
)

each_path = pytest.mark.parametrize("path", [kind() for kind in PATHS.values()], ids=list(PATHS))
each_sampler = pytest.mark.parametrize("name", list(SAMPLERS))
EVALUATIONS = {
    "ancestral": 1,
    "annealed-langevin": 10,
    "ddim": 1,
    "euler": 1,
    "euler-maruyama": 1,
    "heun": 2,
    "predictor-corrector": 2,
    "rk4": 4,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def gaussian(v):
    """Exact denoiser of N(0, v)."""
    return lambda y, level: (v / (v + level.square())).reshape(-1, *[1] * (y.ndim - 1)) * y


def falling(path, n_steps):
    return path.grid(n_steps).flip(0)


class Mixture(torch.nn.Module):
    """Two correlated normals with mean 0 and unit variances, and the score at all levels from eigenvectors."""

    def __init__(self):
        super().__init__()
        self.weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
        self.means = torch.tensor([[-1.2, 0.6], [0.8, -0.4]], dtype=torch.float64)
        self.covariances = torch.tensor(
            [[[0.1, 0.1], [0.1, 0.3]], [[0.2, -0.15], [-0.15, 0.4]]], dtype=torch.float64
        )
        within = (self.weights[:, None, None] * self.covariances).sum(0)
        total = within + (self.weights[:, None] * self.means).T @ self.means
        scale = total.diagonal().sqrt()
        self.means = self.means / scale
        self.covariances = self.covariances / torch.outer(scale, scale)
        self.total = total / torch.outer(scale, scale)
        self.variances, self.axes = torch.linalg.eigh(self.covariances)
        self.exact = GaussianMixtureEnergy(
            self.weights.log(), self.means, torch.linalg.cholesky(self.covariances)
        ).requires_grad_(False)

    def score(self, x, level):
        d = torch.einsum("bkd,kde->bke", x.unsqueeze(1) - self.means, self.axes)
        v = self.variances + level.square()[:, None, None]
        log_joint = self.weights.log() - 0.5 * (d.square() / v + v.log()).sum(-1)
        return -torch.einsum("bk,bke,kde->bd", log_joint.softmax(1), d / v, self.axes)


MIXTURE = Mixture()


def test_the_oracle_is_that_of_the_package():
    x, level = 2 * rows(50, 2), torch.logspace(-2, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(MIXTURE.score(x, level), MIXTURE.exact.score(x, level))
    draws = MIXTURE.exact.sample(100_000, generator())
    torch.testing.assert_close(
        draws.T.cov().diagonal(), torch.ones(2, dtype=torch.float64), rtol=0, atol=0.02
    )


# Samples ---------------------------------------------------------------------------------------------------


def spread(x):
    """Mean distance within a sample."""
    return float(torch.cdist(x, x).sum()) / (len(x) * (len(x) - 1))


def energy_distance(x, y, spread_y):
    """Twice the mean distance between two samples less the mean distances within them (Szekely and Rizzo)."""
    return 2 * float(torch.cdist(x, y).mean()) - spread(x) - spread_y


@pytest.fixture(scope="module")
def truth():
    x = MIXTURE.exact.sample(3000, generator(1))
    return x, spread(x)


def runs():
    """Every sampler with every path that is meant for it, and enough steps."""
    for sampler in SAMPLERS:
        for path in PATHS:
            # Langevin dynamics alone needs a ladder of levels; Euler's steps are those of DDIM.
            meant = {"annealed-langevin": ["ncsn"], "rk4": ["cosine", "edm", "vp"], "euler": []}
            if path in meant.get(sampler, PATHS):
                yield sampler, path, 100


@pytest.mark.parametrize(("name", "path", "n_steps"), list(runs()))
def test_samples_are_those_of_the_mixture(name, path, n_steps, truth):
    n = 1000
    exact, exact_spread = truth
    model = ScoreDenoiser(MIXTURE, PATHS[path](), event_shape=(2,))
    x = model.sample(n, generator(), sampler=name, n_steps=n_steps)
    assert x.shape == (n, 2)
    assert x.dtype == torch.float64
    # Moments, within four standard errors and what the steps leave.
    assert (x.mean(0).abs() < 4 / math.sqrt(n) + 0.02).all()
    products, expected = (x[:, :, None] * x[:, None]).flatten(1), MIXTURE.total.flatten()
    assert ((products.mean(0) - expected).abs() < 4 * products.std(0) / math.sqrt(n) + 0.04).all()
    for direction in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]):
        projection = torch.tensor(direction, dtype=torch.float64)
        assert ks_2samp(x @ projection, exact @ projection).pvalue > 1e-3
    assert energy_distance(x, exact, exact_spread) < TOLERATED


TOLERATED = 0.012
"""Energy distance: exact samples of these sizes lie 0 +- 0.002 apart, a normal of the same moments 0.03."""


def test_the_two_sample_test_sees_wrong_samples(truth):
    exact, exact_spread = truth
    wrong = rows(1000, 2) @ torch.linalg.cholesky(MIXTURE.total).T
    assert energy_distance(wrong, exact, exact_spread) > 2 * TOLERATED
    right = MIXTURE.exact.sample(1000, generator(2))
    assert abs(energy_distance(right, exact, exact_spread)) < 0.5 * TOLERATED


# Exact cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("kind", ["ancestral", "ddim-0", "ddim-0.6", "ddim-1"])
@each_path
def test_few_steps_are_exact_for_a_single_row(path, kind, n_steps):
    """If all data are one row m, every step leads from N(alpha m, sigma^2) to N(alpha m, sigma^2) of its time."""
    m, n, grid = 0.8, 20_000, falling(path, 8)[: n_steps + 1]
    x = float(path.alpha(grid[0])) * m + float(path.sigma(grid[0])) * rows(n, 1)
    rest = {"path": path, "generator": generator(1), "final_denoise": False}

    def denoise(y, level):
        return torch.full_like(y, m)

    if kind == "ancestral":
        x, _ = ancestral(denoise, x, grid, **rest)
    else:
        x, _ = ddim(denoise, x, grid, eta=float(kind.removeprefix("ddim-")), **rest)
    found = (x - float(path.alpha(grid[-1])) * m) / float(path.sigma(grid[-1]))
    assert float(found.mean()) == pytest.approx(0, abs=4.5 / math.sqrt(n))
    assert float(found.std()) == pytest.approx(1, abs=4.5 / math.sqrt(2 * n))


@pytest.mark.parametrize("path", [VariancePreserving(), LinearBetas(), PATHS["cosine"]()])
def test_the_upper_variance_is_exact_for_unit_normal_data(path):
    n = 20_000
    x, _ = ancestral(
        gaussian(1.0),
        rows(n, 1),
        falling(path, 3),
        path=path,
        generator=generator(1),
        variance=1.0,
        final_denoise=False,
    )
    assert float(x.std()) == pytest.approx(1, abs=4.5 / math.sqrt(2 * n))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
@each_path
def test_order_of_the_probability_flow(path, method, order):
    v, x = 0.5, rows(5, 2)
    low, high = torch.tensor([0.3, 3.0], dtype=torch.float64)
    x = x * (v + high**2).sqrt()

    def error(n):
        # Evenly in log s, through the path's clock and back.
        grid = path.time(torch.logspace(math.log10(high), math.log10(low), n + 1, dtype=torch.float64))
        start = path.alpha(grid[0]) * x
        end, _ = probability_flow(gaussian(v), start, grid, path=path, method=method, final_denoise=False)
        truth = path.alpha(grid[-1]) * x * ((v + low**2) / (v + high**2)).sqrt()
        return float((end - truth).abs().max())

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.2)


# Published formulas ----------------------------------------------------------------------------------------


def test_ancestral_steps_are_those_of_ddpm():
    path = LinearBetas(n_steps=50, beta_max=0.2)
    betas, grid, x = path.betas(), path.grid().flip(0), rows(4, 3)
    k = 20
    beta, bar, before = betas[k], torch.cumprod(1 - betas, 0)[k], torch.cumprod(1 - betas, 0)[k - 1]
    step, e = grid[grid.tolist().index((k + 1) / 50) :][:2], rows(4, 3, seed=7)
    score = -x / (bar * 0.5 + 1 - bar)  # of data N(0, 0.5)
    rest = {"path": path, "final_denoise": False}
    # Ho et al. 2020, algorithm 2, with the score in place of -eps / sqrt(1 - bar).
    mean = (x + beta * score) / (1 - beta).sqrt()
    for share, variance in ((1.0, beta), (0.0, beta * (1 - before) / (1 - bar))):
        y, _ = ancestral(gaussian(0.5), x, step, generator=generator(7), variance=share, **rest)
        torch.testing.assert_close(y, mean + variance.sqrt() * e)
    # Song et al. 2021 (SDE), reverse diffusion.
    y, _ = predictor_corrector(gaussian(0.5), x, step, generator=generator(7), n_corrections=0, **rest)
    torch.testing.assert_close(y, (2 - (1 - beta).sqrt()) * x + beta * score + beta.sqrt() * e)
    # Song et al. 2021 (DDIM), equation 12.
    eps = -(1 - bar).sqrt() * score
    y, _ = ddim(gaussian(0.5), x, step, **rest)
    clean = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    torch.testing.assert_close(y, before.sqrt() * clean + (1 - before).sqrt() * eps)


def test_euler_maruyama_is_the_published_step():
    path, x, e = VariancePreserving(), rows(4, 3), rows(4, 3, seed=7)
    grid = torch.tensor([0.6, 0.57], dtype=torch.float64)
    y, _ = euler_maruyama(gaussian(0.5), x, grid, path=path, generator=generator(7), final_denoise=False)
    beta, left = 0.1 + 0.6 * 19.9, math.exp(-(0.6 * 0.1 + 0.18 * 19.9))
    score = -x / (left * 0.5 + 1 - left)
    torch.testing.assert_close(y, x + 0.03 * (0.5 * beta * x + beta * score) + math.sqrt(0.03 * beta) * e)


def test_heun_is_the_published_algorithm():
    path = EDM()
    grid, denoise = falling(path, 17), ScoreDenoiser(MIXTURE, path).denoise
    x = y = 80 * rows(6, 2)
    levels = [*grid.tolist(), 0.0]
    for t, u in pairwise(levels):
        d = (y - denoise(y, y.new_full((6,), t))) / t
        after = y + (u - t) * d
        if u > 0:
            d_after = (after - denoise(after, y.new_full((6,), u))) / u
            after = y + (u - t) * (d + d_after) / 2
        y = after
    found, info = probability_flow(denoise, x, grid, path=path)
    torch.testing.assert_close(found, y)
    assert info.n_evaluations == 35  # as the paper counts for 18 levels


@pytest.mark.parametrize("final_denoise", [True, False])
@each_path
def test_special_cases_of_ddim(path, final_denoise):
    denoise, grid, x = ScoreDenoiser(MIXTURE, path).denoise, falling(path, 12), rows(5, 2)
    rest = {"path": path, "final_denoise": final_denoise}
    flow, _ = probability_flow(denoise, x, grid, method="euler", **rest)
    torch.testing.assert_close(ddim(denoise, x, grid, **rest)[0], flow)
    ddpm, _ = ancestral(denoise, x, grid, generator=generator(), **rest)
    torch.testing.assert_close(ddim(denoise, x, grid, eta=1.0, generator=generator(), **rest)[0], ddpm)


# One family ------------------------------------------------------------------------------------------------

FREE_OF_PATHS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": probability_flow,
    "adaptive": lambda *args, **rest: probability_flow(*args, method="adaptive", **rest),
    "annealed": annealed,
    "predictor-corrector": lambda *args, **rest: predictor_corrector(*args, predictor="ancestral", **rest),
}


@pytest.mark.parametrize("sampler", FREE_OF_PATHS.values(), ids=list(FREE_OF_PATHS))
@each_path
def test_samplers_in_levels_do_not_depend_on_the_path(path, sampler):
    levels = torch.logspace(1.5, -1, 11, dtype=torch.float64)
    times, x, reference = path.time(levels), rows(5, 2), EDM()
    denoise = ScoreDenoiser(MIXTURE, path).denoise
    one, one_info = sampler(denoise, path.alpha(times[0]) * 30 * x, times, path=path, generator=generator())
    two, two_info = sampler(denoise, 30 * x, levels, path=reference, generator=generator())
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert one_info.n_evaluations == two_info.n_evaluations


@each_sampler
def test_ncsn_and_ve_and_edm_are_one_process(name):
    ladder, exploding, edm = GeometricLadder(n_steps=20), VarianceExploding(), EDM()
    x, denoise = 50 * rows(5, 2), ScoreDenoiser(MIXTURE, ladder).denoise
    t = ladder.grid().flip(0)
    a, b, c = (
        SAMPLERS[name](denoise, x, grid, path=path, generator=generator())[0]
        for path, grid in ((ladder, t), (exploding, t), (edm, ladder.sigma(t)))
    )
    torch.testing.assert_close(a, b)
    # Euler's steps on a stochastic equation depend on the clock.
    if name != "euler-maruyama":
        torch.testing.assert_close(a, c)


def test_clocks_agree_in_the_limit_of_short_steps():
    """Euler-Maruyama in the clocks of VE and of EDM: variances of N(0, 0.5) after steps that shrink."""
    n, errors = 10_000, []
    for path in (VarianceExploding(sigma_max=20.0), EDM(sigma_max=20.0, rho=3.0)):
        x, _ = euler_maruyama(
            gaussian(0.5), 20 * rows(n, 1), falling(path, 300), path=path, generator=generator(1)
        )
        errors.append(abs(float(x.var()) / 0.5 - 1))
    assert max(errors) < 0.04


# Correctors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["ancestral", "reverse-diffusion"])
def test_corrections_mend_coarse_steps(predictor):
    path, v, n = VariancePreserving(), 0.2, 8000
    grid = falling(path, 8)

    def error(n_corrections):
        x, _ = predictor_corrector(
            gaussian(v),
            rows(n, 1),
            grid[:8],
            path=path,
            generator=generator(1),
            predictor=predictor,
            n_corrections=n_corrections,
            final_denoise=False,
        )
        exact = path.alpha(grid[7]).square() * v + path.sigma(grid[7]).square()
        return abs(float(x.var() / exact) - 1)

    assert error(0) > 0.15
    assert error(100) < 0.05


# Learned variances -----------------------------------------------------------------------------------------


def test_learned_variances_lie_between_the_bounds():
    path, x = LinearBetas(n_steps=20, beta_max=0.3), rows(4, 3)
    grid, share = path.grid().flip(0), torch.rand(4, 3, generator=generator(), dtype=torch.float64)
    rest = {"path": path, "final_denoise": False}

    def with_share(y, level):
        return gaussian(0.5)(y, level), share

    low, high = (ancestral_log_variance(path, grid, v) for v in (0.0, 1.0))
    y, _ = ancestral(with_share, x, grid[:2], generator=generator(), variance="learned", **rest)
    base, _ = ancestral(gaussian(0.5), x, grid[:2], generator=generator(), variance=0.0, **rest)
    e = rows(4, 3)
    mean = base - math.exp(0.5 * low) * e
    torch.testing.assert_close(((y - mean) / e).square().log(), share * high + (1 - share) * low)


def ancestral_log_variance(path, grid, share):
    """Log-variance of the first step from the betas."""
    betas = path.betas()
    bars = torch.cumprod(1 - betas, 0)
    upper = betas[-1]
    return float((upper if share == 1 else upper * (1 - bars[-2]) / (1 - bars[-1])).log())


def test_models_sample_with_the_variances_they_learned():
    with forked_rng(0):
        network = ResidualMLP(3, 6, context_features=LEVEL_FEATURES)
    path = VariancePreserving()
    model = NetworkDenoiser(network, path, learned_variance=True, event_shape=(3,))
    one = model.sample(7, generator(), sampler="ancestral", n_steps=5, variance="learned")
    # An untrained network is half way between the bounds.
    two = model.sample(7, generator(), sampler="ancestral", n_steps=5, variance=0.5)
    torch.testing.assert_close(one, two)
    assert one.dtype == torch.float32
    with pytest.raises(ValueError, match="must come with a denoiser that has learned variances"):
        ScoreDenoiser(MIXTURE, path, event_shape=(2,)).sample(
            3, generator(), sampler="ancestral", variance="learned"
        )


# The call --------------------------------------------------------------------------------------------------


@each_sampler
def test_one_call_for_all(name):
    path, calls = EDM(), []

    def denoise(y, level):
        assert y.shape == (3, 2, 4, 4)
        assert level.shape == (3,)
        assert y.dtype == level.dtype == torch.float32
        calls.append(float(level[0]))
        return gaussian(1.0)(y, level)

    grid, start = falling(path, 6), 80 * rows(3, 2, 4, 4).float()
    x, info = SAMPLERS[name](denoise, start, grid, path=path, generator=generator(), thin=1)
    assert x.shape == start.shape
    assert x.dtype == torch.float32
    assert info.n_evaluations == len(calls)
    if name in EVALUATIONS:
        assert len(calls) == 6 * EVALUATIONS[name] + 1 + (10 if name == "annealed-langevin" else 0)
    assert calls[-1] == pytest.approx(0.002)
    assert info.samples.shape == (10 if name == "annealed-langevin" else 6, 3, 2, 4, 4)
    # The last state kept is that before the denoiser's last word.
    last = gaussian(1.0)(info.samples[-1], torch.full((3,), 0.002))
    torch.testing.assert_close(last, x)
    assert info.divergences.tolist() == [0, 0, 0]
    rough, info = SAMPLERS[name](denoise, start, grid, path=path, generator=generator(), final_denoise=False)
    torch.testing.assert_close(gaussian(1.0)(rough, torch.full((3,), 0.002)), x)
    assert info.samples is None


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "rk4"])
def test_deterministic_samples_are_those_of_their_own_start(name):
    path, x = VariancePreserving(), rows(9, 2)
    denoise, grid = ScoreDenoiser(MIXTURE, path).denoise, falling(path, 20)
    together, _ = SAMPLERS[name](denoise, x, grid, path=path, generator=None)
    alone, _ = SAMPLERS[name](denoise, x[4:5], grid, path=path, generator=None)
    torch.testing.assert_close(together[4:5], alone, rtol=0, atol=1e-12)


@each_sampler
def test_the_same_generator_gives_the_same_samples(name):
    model = ScoreDenoiser(MIXTURE, EDM(), event_shape=(2,))
    one, two, other = (model.sample(4, generator(seed), sampler=name, n_steps=5) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "adaptive"])
def test_moves_that_are_not_finite_are_not_made(name):
    path = EDM()
    start = torch.tensor([[1.0, 2.0], [math.nan, 0.0]], dtype=torch.float64)
    x, info = SAMPLERS[name](gaussian(1.0), start, falling(path, 4), path=path, generator=generator())
    assert x[0].isfinite().all()
    assert info.divergences[0] == 0
    assert info.divergences[1] >= 4


def test_models_start_from_the_end_of_their_path():
    for path in (EDM(), VariancePreserving(), PATHS["linear"]()):
        starts = []
        model = ScoreDenoiser(MIXTURE, path, event_shape=(2,))
        model.denoise = lambda y, level, starts=starts: starts.append((y, level)) or y
        model.sample(20_000, generator(), sampler="ddim", n_steps=1)
        y, level = starts[0]
        assert float(level[0]) == pytest.approx(path.noise_levels[1])
        assert float(y.var()) == pytest.approx(1 + path.noise_levels[1] ** 2, rel=0.03)


def test_mistakes_are_refused():
    path, x, rest = EDM(), rows(2, 2), {"path": EDM(), "generator": generator()}
    grid, denoise = falling(path, 3), gaussian(1.0)
    for sampler in SAMPLERS.values():
        with pytest.raises(ValueError, match="grid must fall"):
            sampler(denoise, x, grid.flip(0), **rest)
        for wrong in (lambda y, s: y[:, :1], lambda y, s: y.sum(1), lambda y, s: y.sum()):
            with pytest.raises(ValueError, match=r"denoise returned .*; shape \(2, 2\) is needed"):
                sampler(wrong, x, grid, **rest)
        # Nothing of a row is left at the end of the straight path, and no noise at its start.
        for times in (torch.tensor([1.0, 0.5, 0.1]), torch.tensor([0.5, 0.1, 0.0])):
            with pytest.raises(ValueError, match=r"grid must hold times at which Linear\(\) has a positive"):
                sampler(denoise, x, times, path=Linear(), generator=generator())
        with pytest.raises(ValueError, match=r"x must be a floating-point tensor \(B, \*E\)"):
            sampler(denoise, x.numpy(), grid, **rest)
    for call, message in (
        (lambda: ancestral(denoise, x, grid, variance=1.5, **rest), "variance must"),
        (lambda: ancestral(denoise, x, grid, variance="upper", **rest), "variance must"),
        (lambda: ddim(denoise, x, grid, eta=-1, **rest), "eta must"),
        (lambda: ddim(denoise, x, grid, eta=1, path=path), "generator must"),
        (
            lambda: predictor_corrector(denoise, x, grid, predictor="ddim", **rest),
            "predictor='ddim' is unknown",
        ),
        (lambda: predictor_corrector(denoise, x, grid, n_corrections=-1, **rest), "n_corrections must"),
        (lambda: predictor_corrector(denoise, x, grid, signal_to_noise=1.0, **rest), "signal_to_noise must"),
        (lambda: probability_flow(denoise, x, grid, method="dopri5", **rest), "method='dopri5' is unknown"),
        (lambda: ScoreDenoiser(MIXTURE, path).sample(2, generator()), "without the event_shape"),
        (
            lambda: ScoreDenoiser(MIXTURE, path, event_shape=(2,)).sample(2, generator(), sampler="ode"),
            "sampler='ode' is unknown",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@each_sampler
def test_progress_is_shown_on_request(name, capsys):
    path = EDM()
    for verbose in (0, 1):
        SAMPLERS[name](
            gaussian(1.0), rows(2, 2), falling(path, 3), path=path, generator=generator(), verbose=verbose
        )
        shown = "100%" in capsys.readouterr().err
        assert shown == (bool(verbose) and name != "adaptive")
