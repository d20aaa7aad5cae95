"""Annealed importance sampling finds normalising constants that are known, and its interval covers them."""

import math
import warnings

import pytest
import torch

from anomalib_gen._runtime import make_generator
from anomalib_gen.samplers import GaussianBase, annealed_importance_sampling, pareto_k
from anomalib_gen.samplers.ais import log_mean_interval

CPU = torch.device("cpu")


def generator(seed=0):
    return make_generator(seed, CPU)


def gaussian(d, seed=0):
    """An unnormalised Gaussian off the origin, scales 0.4 to 2.5 and correlated; and its log Z."""
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator(seed)))[0]
    r = (q * torch.logspace(-0.3, 0.3, d).double()) @ q.T
    scale = torch.logspace(-0.4, 0.4, d).double() / r.diagonal().sqrt()
    covariance = scale[:, None] * r * scale
    precision = covariance.inverse()
    mean = 0.3 * torch.randn(d, dtype=torch.float64, generator=generator(seed + 1))

    def energy(x):
        return 0.5 * (((x - mean) @ precision) * (x - mean)).sum(1) + 1.5

    return energy, 0.5 * (d * math.log(2 * math.pi) + float(torch.logdet(covariance))) - 1.5


def run(energy, d, seed=0, **options):
    return annealed_importance_sampling(
        energy, event_shape=(d,), generator=generator(seed), n_pilot=32, **options
    )


@pytest.mark.parametrize(("d", "n_levels"), [(2, 60), (10, 100), (50, 150)])
def test_log_z_of_a_gaussian_and_coverage(d, n_levels):
    energy, log_z = gaussian(d)
    result = run(energy, d, n_chains=1000, n_levels=n_levels)
    assert abs(result.log_z - log_z) < 0.1
    assert result.interval[0] < result.log_z < result.interval[1]
    # The weights are independent given the pilot: 20 groups of 50 chains are 20 runs.
    intervals = [log_mean_interval(group, 0.95)[1] for group in result.log_weights.reshape(20, 50)]
    assert sum(low <= log_z <= high for low, high in intervals) >= 16
    assert len(result.betas) == n_levels + 1
    assert (result.betas.diff() > 0).all()
    assert 0.6 < result.acceptance.mean() < 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("d", "n_levels"), [(2, 60), (10, 100), (50, 200)])
def test_interval_covers_in_independent_runs(d, n_levels):
    energy, log_z = gaussian(d)
    results = [run(energy, d, seed, n_chains=100, n_levels=n_levels) for seed in range(100)]
    covered = sum(r.interval[0] <= log_z <= r.interval[1] for r in results)
    errors = torch.tensor([r.log_z - log_z for r in results])
    ess = sum(r.effective_sample_size for r in results) / 100
    print(f"d={d}: covered {covered} of 100, error {errors.mean():.3f} +- {errors.std():.3f}, ESS {ess:.0f}")
    assert covered >= 90


def test_mala_as_the_transition():
    energy, log_z = gaussian(2)
    result = run(energy, 2, n_chains=1000, n_levels=100, transition="mala", n_transitions=2)
    assert abs(result.log_z - log_z) < 0.1
    assert result.n_evaluations == 1 + 100 * 3


def test_given_betas_and_base():
    energy, log_z = gaussian(2)
    base = GaussianBase(torch.tensor([0.2, -0.3]).double(), torch.tensor([0.5, 2.0]).double())
    betas = torch.linspace(0, 1, 31).tolist()
    result = annealed_importance_sampling(
        energy, base=base, betas=betas, n_chains=1000, generator=generator()
    )
    assert abs(result.log_z - log_z) < 0.1
    torch.testing.assert_close(result.betas, torch.tensor(betas).double())


def test_base_is_normalised():
    mean, scale = torch.randn(2, 3, generator=generator()).double(), torch.rand(2, 3).double() + 0.1
    x = GaussianBase(mean, scale).sample(5, generator())
    expected = torch.distributions.Normal(mean, scale).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(GaussianBase(mean, scale).log_prob(x), expected)
    torch.testing.assert_close(
        GaussianBase(mean, 2.0).log_prob(x),
        torch.distributions.Normal(mean, 2.0).log_prob(x).flatten(1).sum(1),
    )


def test_an_energy_that_is_the_base_has_equal_weights():
    base = GaussianBase(torch.zeros(4).double())
    result = annealed_importance_sampling(
        lambda x: -base.log_prob(x) - 3.0, base=base, n_chains=20, n_levels=10, generator=generator()
    )
    assert result.log_z == pytest.approx(3.0, abs=1e-10)
    assert result.effective_sample_size == pytest.approx(20)


def test_a_mixture_of_two_modes():
    def energy(x):  # normalised, times e^2
        parts = [torch.distributions.Normal(m, 0.5).log_prob(x).sum(1) for m in (-2.0, 2.0)]
        return -torch.logaddexp(parts[0] + math.log(0.3), parts[1] + math.log(0.7)) - 2

    base = GaussianBase(torch.zeros(2).double(), 3.0)
    result = annealed_importance_sampling(
        energy, base=base, n_chains=1000, n_levels=60, n_pilot=32, generator=generator()
    )
    assert abs(result.log_z - 2) < 0.1
    share = (result.log_weights.softmax(0) * (result.x[:, 0] > 0)).sum()
    assert abs(float(share) - 0.7) < 0.06


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_where_the_energy_is_not_finite_there_is_no_mass(bad):
    def half(x):
        return torch.where(x[:, 0] > 0, 0.5 * x.square().sum(1), bad)

    result = run(half, 2, n_chains=2000, n_levels=20)
    assert abs(result.log_z - math.log(math.pi)) < 0.1
    assert (result.log_weights == -math.inf).any()
    assert result.interval[0] < math.log(math.pi) < result.interval[1]


def test_nothing_finite_at_all_is_an_error():
    with pytest.raises(FloatingPointError, match="No weight"):
        run(lambda x: x.sum(1) * math.nan, 2, n_chains=10, n_levels=3)


def test_few_effective_chains_come_with_a_warning():
    with pytest.warns(UserWarning, match="worth"):
        run(lambda x: 50 * (x - 5).square().sum(1), 10, n_chains=30, n_levels=5)


@pytest.mark.parametrize(
    ("scale", "said"), [(0.02, "times as wide as it is"), (20.0, "times as narrow as it is")]
)
def test_a_base_of_another_width_is_named_and_its_successor_mends_it(scale, said):
    # The effective sample sizes of 10 to 30 chains, of 256, used to pass without a word.
    d, log_z = 10, 5 * math.log(2 * math.pi)
    base = GaussianBase(torch.zeros(d).double(), scale)

    def estimate():
        return annealed_importance_sampling(
            lambda x: 0.5 * x.square().sum(1), base=base, n_levels=50, generator=generator()
        )

    with pytest.warns(UserWarning, match=rf"independent draws .*Raise n_levels.* {said}.*GaussianBase"):
        first = estimate()
    assert not first.reliable
    factor = float(first.widening.log().mean().exp())
    assert (factor > 10) if scale < 1 else (factor < 0.1)
    base = GaussianBase(first.x.mean(0), first.x.std(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = estimate()
    assert second.reliable
    assert abs(second.log_z - log_z) < 0.1
    assert second.effective_sample_size > 200


def test_what_is_said_of_the_intervals_is_true():
    # Log-normal weights of mean one: the spread runs through, and the intervals are grouped by what a user sees.
    spread = torch.linspace(0.5, 3, 4000, dtype=torch.float64)[:, None]
    draws = torch.randn(4000, 256, dtype=torch.float64, generator=generator()) * spread - spread**2 / 2
    found = [log_mean_interval(group, 0.95)[1:] for group in draws]
    covered = torch.tensor([low <= 0 <= high for (low, high), _ in found]).double()
    share = torch.tensor([ess for _, ess in found]) / 256
    for low, high, stated in ((0.3, 1.0, 0.94), (0.1, 0.2, 0.84), (0.05, 0.1, 0.69)):
        group = covered[(share >= low) & (share < high)]
        assert len(group) > 400
        assert float(group.mean()) == pytest.approx(stated, abs=0.05)


@pytest.mark.parametrize("k", [-0.3, 0.2, 0.5, 0.8, 1.2])
def test_pareto_k_is_that_of_generalised_pareto_weights(k):
    u = torch.rand(20_000, dtype=torch.float64, generator=generator())
    w = (u.pow(-k) - 1) / k
    # 425 weights in the tail, whose deviation of k is (1 + k) / sqrt(425).
    assert pareto_k(w.log() - 700) == pytest.approx(k, abs=0.25)


def test_pareto_k_of_few_and_of_equal_weights():
    assert math.isnan(pareto_k(torch.zeros(1000)))
    assert math.isnan(pareto_k(torch.randn(24, generator=generator())))
    assert math.isnan(pareto_k(torch.full((100,), -math.inf)))
    dead = torch.full((100,), -math.inf)
    dead[:30] = torch.randn(30, generator=generator())
    assert math.isfinite(pareto_k(dead))
    assert pareto_k(dead.float()) == pytest.approx(pareto_k(dead.double()), abs=1e-4)


def test_a_heavy_tail_is_reason_enough_for_a_warning():
    # Plain importance sampling of N(0, 1) by N(0, s^2): the weights have a tail of k = 1 - s^2.
    base = GaussianBase(torch.zeros(1).double(), 0.5)
    with pytest.warns(UserWarning, match="Pareto k"):
        result = annealed_importance_sampling(
            lambda x: 0.5 * x.square().sum(1),
            base=base,
            betas=[0.0, 1.0],
            n_chains=1000,
            generator=generator(1),
        )
    assert result.effective_sample_size > 200
    assert result.pareto_k == pytest.approx(0.75, abs=0.15)


def test_a_heavy_tail_of_weights_that_hardly_differ_is_no_reason():
    # The base times 1 + a little that is heavy-tailed: k does not see how little it is.
    base = GaussianBase(torch.zeros(1).double())

    def energy(x):
        return -base.log_prob(x) - torch.log1p(1e-6 * (0.5 * x.square().sum(1)).exp().clamp(max=1e4))

    result = annealed_importance_sampling(
        energy, base=base, betas=[0.0, 1.0], n_chains=500, generator=generator()
    )
    assert result.pareto_k > 0.7
    assert result.effective_sample_size > 499
    assert result.reliable


def test_chains_outside_the_support_do_not_adapt_the_step():
    # A fifth of the draws of the base is in the box; the others must not shrink the steps of these.
    def box(x):
        return torch.where(x.abs().amax(1) < 1, 0.0 * x.sum(1), math.inf)

    base = GaussianBase(torch.zeros(1).double(), 5.0)
    result = annealed_importance_sampling(box, base=base, n_levels=40, generator=generator())
    assert abs(result.log_z - math.log(2)) < 0.4
    assert 0.6 < result.acceptance.mean() < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_events_of_any_shape_and_precision(dtype):
    shape = (2, 3, 3)
    base = GaussianBase(torch.zeros(shape, dtype=dtype))
    result = annealed_importance_sampling(
        lambda x: 0.5 * (x / 0.7).square().flatten(1).sum(1),
        base=base,
        n_chains=400,
        n_levels=60,
        generator=generator(),
    )
    assert result.x.shape == (400, *shape)
    assert result.x.dtype == dtype
    assert result.log_weights.dtype == torch.float64
    assert not result.log_weights.requires_grad
    assert abs(result.log_z - 18 * math.log(0.7 * math.sqrt(2 * math.pi))) < 0.15


def test_the_generator_decides_and_the_global_one_is_left_alone():
    before = torch.get_rng_state()
    energy, _ = gaussian(2)
    a, b, c = (run(energy, 2, seed, n_chains=40, n_levels=20).log_weights for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_get_no_gradient():
    network = torch.nn.Linear(2, 1).double()
    run(lambda x: x.square().sum(1) + network(x)[:, 0], 2, n_chains=20, n_levels=5)
    assert network.weight.grad is None


@pytest.mark.parametrize("spread", [0.3, 0.8])
@pytest.mark.parametrize("n", [50, 200])
def test_interval_of_log_normal_weights(n, spread):
    # Their mean is exactly one.
    draws = torch.randn(1000, n, dtype=torch.float64, generator=generator()) * spread - spread**2 / 2
    intervals = [log_mean_interval(group, 0.95)[1] for group in draws]
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert 915 <= covered <= 985


@pytest.mark.parametrize(
    "options",
    [
        {"transition": "gibbs"},
        {"n_chains": 1},
        {"n_pilot": 4},
        {"confidence": 1.0},
        {"betas": [0.0, 0.7, 0.5, 1.0]},
        {"betas": [0.1, 1.0]},
        {"event_shape": None},
    ],
)
def test_mistakes_are_refused(options):
    settings = {"event_shape": (2,), **options}
    with pytest.raises(ValueError, match=r"must|Give"):
        annealed_importance_sampling(
            lambda x: x.square().sum(1), n_levels=3, **settings, generator=generator()
        )


def test_mistakes_are_shown():
    for wrong, match in (
        ({"n_chains": 1}, "n_chains must be an integer of at least 2, got 1"),
        ({"n_levels": 2.5}, r"n_levels must be a positive integer, got 2\.5"),
        ({"confidence": 95}, r"confidence must lie in \(0, 1\), got 95"),
    ):
        with pytest.raises(ValueError, match=match):
            annealed_importance_sampling(
                lambda x: x.square().sum(1), event_shape=(2,), **wrong, generator=generator()
            )
    for scale in (-1.0, 0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"scale must be positive and finite, got {scale}"):
            GaussianBase(torch.zeros(2), scale)
    for mean in ([0.0], torch.zeros(2, dtype=torch.long), torch.tensor([0.0, math.nan])):
        with pytest.raises(ValueError, match="mean must be a tensor of finite floating-point numbers"):
            GaussianBase(mean)


@pytest.mark.parametrize("give", [torch.sum, lambda e: e.unsqueeze(1)])
def test_one_energy_and_one_density_a_row_are_needed(give):
    # The energy of all rows together would be annealed like any other, towards a number that is no log Z.
    with pytest.raises(ValueError, match=r"energy returned .* shape \(64,\) is needed"):
        annealed_importance_sampling(
            lambda x: give(x.square().sum(1)), event_shape=(2,), n_levels=3, generator=generator()
        )
    base = GaussianBase(torch.zeros(2))
    log_prob = base.log_prob
    object.__setattr__(base, "log_prob", lambda x: give(log_prob(x)))
    with pytest.raises(ValueError, match=r"base.log_prob returned .* shape \(64,\) is needed"):
        annealed_importance_sampling(
            lambda x: x.square().sum(1), base=base, n_levels=3, generator=generator()
        )


def test_progress_is_shown_on_request(capsys):
    run(lambda x: x.square().sum(1), 2, n_chains=40, n_levels=10, verbose=1)
    assert "AIS" in capsys.readouterr().err
