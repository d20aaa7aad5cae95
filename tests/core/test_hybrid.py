"""Denoisers made of stored rows: the closed form against its truths, and the hybrid on top of it."""

import numpy as np
import pytest
import torch
from sklearn.base import clone

from anomalib_gen import DiffusionDetector
from anomalib_gen.anomaly import ClosedFormResidual, CombinedAnomaly, DiffusionTime, ScoreNorm
from anomalib_gen.models import ClosedFormDenoiser, HybridDenoiser, KernelDenoiser
from anomalib_gen.models import hybrid as module
from anomalib_gen.models._stored import row_keys
from anomalib_gen.models.denoiser import embed_levels
from anomalib_gen.networks import ResidualMLP
from anomalib_gen.objectives import Denoising, DiffusionTimeEstimation, FlowMatching, ImprovedDDPM
from anomalib_gen.paths import EDM, CosineBetas, Linear

PATH = EDM(sigma_min=0.01, sigma_max=20.0)
SMALL = {"hidden_features": 16, "n_blocks": 1, "random_state": 0, "device": "cpu"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def closed_form(rows, path=PATH):
    denoiser = ClosedFormDenoiser(path, rows.shape[1:], torch.zeros(rows.shape[1], dtype=torch.float64))
    denoiser.remember([rows], generator())
    return denoiser


def hybrid(rows, *, path=PATH, zero_output=True, learned_variance=False, width=16):
    d = rows.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(
            2 * d,
            d * (1 + learned_variance),
            hidden_features=width,
            context_features=17,
            zero_output=zero_output,
        )
    denoiser = HybridDenoiser(
        network, path, (d,), torch.zeros(d, dtype=torch.float64), learned_variance=learned_variance
    ).double()
    denoiser.remember([rows], generator())
    return denoiser


def levels(*values, n):
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(n)


# The closed form ------------------------------------------------------------------------------------------


def test_the_closed_form_is_the_posterior_mean_of_a_kernel_density_estimate():
    rows, x = draw(50, 2), 2 * draw(6, 2, seed=1)
    denoiser = closed_form(rows)
    h = float(denoiser.kernel.bandwidth)
    for s in (0.05, 0.5, 4.0):
        # By numerical integration over clean rows under the estimate, on a grid.
        axis = torch.linspace(-7, 7, 561, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        log_prior = (-torch.cdist(grid, rows).square() / (2 * h * h)).logsumexp(1)
        log_posterior = log_prior.unsqueeze(0) - torch.cdist(x, grid).square() / (2 * s * s)
        expected = log_posterior.softmax(1) @ grid
        found = denoiser.denoise(x, levels(s, n=6))
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_the_score_is_the_gradient_of_the_kernel_density_estimate():
    rows = draw(40, 3)
    denoiser, s = closed_form(rows), 0.3
    level = (s**2 + denoiser.kernel.bandwidth**2).sqrt()
    x = draw(5, 3, seed=1).requires_grad_()
    density = KernelDenoiser(rows, PATH, dtype=torch.float64).log_density(x, level.expand(5))
    (gradient,) = torch.autograd.grad(density.sum(), x)
    # (Rows are stored in single precision.)
    torch.testing.assert_close(denoiser.score(x.detach(), levels(s, n=5)), gradient, rtol=1e-4, atol=1e-5)


def test_the_ode_likelihood_of_the_closed_form_is_the_kernel_density_estimate():
    rows, x = draw(60, 2), draw(5, 2, seed=1)
    denoiser = closed_form(rows)
    level = (0.01**2 + denoiser.kernel.bandwidth**2).sqrt()
    expected = KernelDenoiser(rows, PATH, dtype=torch.float64).log_density(x, level.expand(5))
    torch.testing.assert_close(denoiser.log_prob(x, n_steps=100), expected, atol=0.03, rtol=0)


def test_leaving_rows_out_is_as_if_they_were_not_stored():
    rows = draw(30, 2)
    denoiser, other = closed_form(torch.cat([rows, rows[:5]])), closed_form(rows)
    other.kernel.rows = other.kernel.rows[5:]
    x = draw(1, 2, seed=2).expand(5, -1)
    for k in range(5):
        found = denoiser.without(rows[k : k + 1]).denoise(x[:1], levels(0.3, n=1))
        own = torch.cat([other.kernel.rows, rows[:k].float(), rows[k + 1 : 5].float()])
        copies = torch.cat([rows[:k].float(), rows[k + 1 : 5].float()])  # those of the others are seen twice
        expected = KernelDenoiser(torch.cat([own, copies]).double(), PATH, dtype=torch.float64)
        variance = 0.3**2 + denoiser.kernel.bandwidth**2
        mean = expected.denoise(x[:1], variance.sqrt().expand(1))
        torch.testing.assert_close(found, x[:1] + 0.3**2 / variance * (mean - x[:1]))


def test_without_rows_there_is_nothing_to_tell():
    denoiser = ClosedFormDenoiser(PATH, (2,), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="ClosedFormDenoiser has no stored rows yet: call remember"):
        denoiser.denoise(draw(3, 2), levels(1.0, n=3))


def test_equal_rows_alone_can_be_left_out_too():
    denoiser = closed_form(torch.ones(10, 2, dtype=torch.float64))
    x = draw(3, 2)
    found = denoiser.without(torch.ones(3, 2)).denoise(x, levels(1.0, n=3))
    assert torch.isfinite(found).all()


def test_of_many_rows_an_even_choice_is_summed(monkeypatch):
    rows, x = draw(2000, 2), draw(4, 2, seed=1)
    all_rows = closed_form(rows)
    monkeypatch.setattr(module, "KERNEL_ROWS", 1000)
    some = closed_form(rows)
    assert (len(some.kernel.rows), len(some.memory)) == (1000, 2000)
    assert some.kernel.bandwidth > all_rows.kernel.bandwidth
    level = levels(0.5, n=4)
    torch.testing.assert_close(some.denoise(x, level), all_rows.denoise(x, level), atol=0.1, rtol=0)


# The hybrid -----------------------------------------------------------------------------------------------


def test_a_hybrid_starts_as_the_closed_form():
    rows, x = draw(50, 3), draw(8, 3, seed=1)
    level = levels(0.02, 0.2, 2.0, 20.0, n=2)
    torch.testing.assert_close(hybrid(rows).denoise(x, level), closed_form(rows).denoise(x, level))


def test_the_profile_is_what_the_closed_form_leaves():
    rows = draw(800, 2)
    denoiser = hybrid(rows)
    for s in (0.1, 1.0, 5.0):
        keys = row_keys(rows)
        noised = rows + s * draw(800, 2, seed=5)
        clean = denoiser._closed_form(noised, levels(s, n=800), keys)[0]
        expected = (clean - rows).square().mean().sqrt()
        assert float(denoiser._left(levels(s, n=1))) == pytest.approx(float(expected), rel=0.12)
    # At much noise nothing is known but the mean, and what is left is the deviation of the data.
    assert float(denoiser._left(levels(20.0, n=1))) == pytest.approx(1.0, rel=0.1)


def test_the_network_scales_with_what_is_left():
    rows, x = draw(300, 2), draw(4, 2, seed=1)
    denoiser = hybrid(rows, zero_output=False)
    level = levels(0.1, 1.0, n=2)
    clean, pull = denoiser._closed_form(x, level, None)
    y = x / (level.square() + 1).sqrt().unsqueeze(1)
    out = denoiser.network(torch.cat([y, pull], 1), embed_levels(level, *PATH.noise_levels))
    expected = clean + denoiser._left(level).unsqueeze(1) * out
    torch.testing.assert_close(denoiser.denoise(x, level), expected)
    assert float(out.detach().abs().mean()) > 0.01


@pytest.mark.parametrize(
    ("objective", "path"),
    [(Denoising(), PATH), (FlowMatching(), Linear()), (ImprovedDDPM(), CosineBetas())],
    ids=["denoising", "flow-matching", "improved-ddpm"],
)
def test_training_does_not_see_the_row_that_it_asks_for(objective, path):
    """A row with copies of its own only is worth nothing to its loss; were it seen, its loss would be far less."""
    rows = draw(40, 2)
    learned = isinstance(objective, ImprovedDDPM)
    denoiser = hybrid(rows, path=path, learned_variance=learned)
    x = rows[:10].float()
    found = objective(denoiser, x.double(), generator(3))
    other = hybrid(rows, path=path, learned_variance=learned)
    other.without = lambda x: other  # as if nothing were left out
    cheated = objective(other, x.double(), generator(3))
    assert float(found.detach().mean()) > 1.1 * float(cheated.detach().mean())
    judged = objective.validate(denoiser, x.double(), generator(3))
    assert float(judged.detach().mean()) > 1.1 * float(
        objective.validate(other, x.double(), generator(3)).detach().mean()
    )


def test_every_weight_of_the_network_gets_a_gradient():
    denoiser = hybrid(draw(40, 2), zero_output=False)
    Denoising()(denoiser, draw(16, 2, seed=4), generator()).mean().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in denoiser.parameters())


def test_a_hybrid_denoises_better_than_both_of_its_parts():
    """On a curved surface of three dimensions among eight columns; judged by rows that it has not seen."""
    random = np.random.default_rng(0)
    X = np.tanh(random.normal(size=(1400, 3)) @ random.normal(size=(3, 8))) + 0.1 * random.normal(
        size=(1400, 8)
    )
    losses = {}
    for denoiser in ("closed-form", "network", "hybrid"):
        detector = DiffusionDetector(denoiser=denoiser, max_iter=300, **{**SMALL, "hidden_features": 32})
        model = detector.fit(X[:400]).model_
        z = torch.from_numpy(detector._scaler.transform(X[400:]))
        with torch.no_grad():
            losses[denoiser] = float(Denoising().validate(model, z, generator(1)).mean())
    assert losses["hybrid"] < 0.99 * min(losses["closed-form"], losses["network"])


# The detector ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("denoiser", "anomaly"),
    [
        (None, CombinedAnomaly),
        ("hybrid", CombinedAnomaly),
        ("closed-form", ClosedFormResidual),
        ("network", ScoreNorm),
    ],
)
def test_a_denoiser_brings_its_anomaly(X, denoiser, anomaly):
    detector = DiffusionDetector(denoiser=denoiser, max_iter=5, **SMALL).fit(X)
    assert type(detector.anomaly_) is anomaly
    assert detector.get_params()["anomaly"] is None
    if anomaly is ScoreNorm:
        assert detector.anomaly_.weighting == "noise"


def test_the_closed_form_is_not_trained(X):
    detector = DiffusionDetector(denoiser="closed-form", **SMALL).fit(X)
    assert detector.n_iter_ == 0
    assert detector.loss_curve_ == []
    assert detector.reconstruct(X[:3], n_steps=4).shape == (3, X.shape[1])
    assert np.isfinite(detector.log_prob(X[:3], n_steps=5)).all()
    assert detector.sample(3, n_steps=5, random_state=0).shape == (3, X.shape[1])
    again = DiffusionDetector(denoiser="closed-form", **SMALL).fit(X)
    np.testing.assert_array_equal(again.score_samples(X), detector.score_samples(X))


def test_held_out_rows_are_not_stored(X):
    detector = DiffusionDetector(max_iter=5, validation_fraction=0.2, **SMALL).fit(X)
    assert len(detector.model_.memory) == len(X) - round(0.2 * len(X))


def test_stored_rows_count_alike_but_for_those_without_weight(X):
    """As the class says of `sample_weight`; the columns' scaling is all that weights change here."""
    weights = np.linspace(0.1, 10, len(X))
    weights[::4] = 0
    detector = DiffusionDetector(denoiser="closed-form", validation_fraction=0, **SMALL)
    rows = detector.fit(X, sample_weight=weights).model_.kernel.rows
    expected = detector._scaler.transform(X[weights > 0])
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


def test_a_pass_over_new_rows_stores_them_too_and_a_warm_start_stores_anew(X):
    detector = DiffusionDetector(max_iter=5, validation_fraction=0, warm_start=True, **SMALL).fit(X)
    assert len(detector.model_.memory) == len(X)
    detector.partial_fit(X[:50])
    assert len(detector.model_.memory) == len(X) + 50
    detector.fit(X[:60])
    assert len(detector.model_.memory) == 60


def test_the_network_has_the_share_that_the_number_of_rows_says(X):
    detector = DiffusionDetector(max_iter=5, **SMALL).fit(X)
    n = len(detector.model_.memory)
    share = 0.5 * n / (n + 1000)
    closed = -detector.with_anomaly("closed_form", X).score_samples(X)
    network = detector.with_anomaly(CombinedAnomaly(learned=ScoreNorm(weighting="noise")), X)
    np.testing.assert_allclose(network.score_samples(X), detector.score_samples(X))
    rest = (-detector.score_samples(X) - (1 - share) * closed) / share
    noise = -detector.with_anomaly(ScoreNorm(weighting="noise"), X).score_samples(X)
    order = np.argsort(noise)
    assert (np.diff(rest[order]) > -1e-9).all()  # a rising function of the noise norm alone


def test_an_anomaly_of_ones_own_can_be_combined(X):
    detector = DiffusionDetector(anomaly=CombinedAnomaly(learned=DiffusionTime()), max_iter=5, **SMALL).fit(X)
    assert np.isfinite(detector.score_samples(X)).all()
    assert clone(detector).anomaly.get_params()["learned"].get_params()["n_neighbors"] == 5
    with pytest.raises(TypeError, match="learned must be a component, got 'score_norm'"):
        DiffusionDetector(anomaly=CombinedAnomaly(learned="score_norm"), max_iter=5, **SMALL).fit(X)


def test_a_model_without_stored_rows_cannot_be_asked_for_them(X):
    with pytest.raises(TypeError, match=r"CombinedAnomaly\(\) does not work with NetworkDenoiser.*memory"):
        DiffusionDetector(denoiser="network", anomaly="combined", max_iter=5, **SMALL).fit(X)


def test_an_energy_cannot_be_a_hybrid(X):
    with pytest.raises(ValueError, match="denoiser='hybrid' does not work with network='energy'"):
        DiffusionDetector(denoiser="hybrid", network="energy", **SMALL).fit(X)
    assert (
        type(DiffusionDetector(network="energy", max_iter=2, **SMALL).fit(X).model_).__name__
        == "ScoreDenoiser"
    )


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_handful_of_rows_is_enough(n):
    X = np.random.default_rng(0).normal(size=(n, 1)) * [1, 2, 3] + 0.01 * np.random.default_rng(1).normal(
        size=(n, 3)
    )
    for denoiser in ("closed-form", "hybrid"):
        detector = DiffusionDetector(denoiser=denoiser, max_iter=5, **SMALL).fit(X)
        scores = detector.score_samples([X.mean(0), [9, -9, 9]])
        assert np.isfinite(scores).all()
        assert scores[1] < scores[0]


@pytest.mark.parametrize("distribution", ["categorical", "inverse-gamma"])
def test_the_noise_in_a_row_is_learned_instead(distribution):
    random = np.random.default_rng(0)
    # Rows along a line: across it, noise is all that there is.
    X = random.normal(size=(600, 1)) + 0.01 * random.normal(size=(600, 4))
    objective = DiffusionTimeEstimation(distribution=distribution)
    detector = DiffusionDetector(objective=objective, max_iter=400, **{**SMALL, "hidden_features": 32}).fit(X)
    assert detector.anomaly_.estimator == "learned"
    deviations = X.std(0)
    levels = np.repeat([0.2, 0.5, 0.8], 300)
    noisy = np.tile(X[:300], (3, 1)) + levels[:, None] * deviations * np.random.default_rng(1).normal(
        size=(900, 4)
    )
    estimates = -detector.score_samples(noisy)
    medians = [np.median(estimates[levels == level]) for level in (0.2, 0.5, 0.8)]
    if distribution == "categorical":
        np.testing.assert_allclose(medians, [0.2, 0.5, 0.8], atol=0.2)
    assert medians[0] < medians[1] < medians[2]


def test_what_tells_noise_cannot_take_it_away(X):
    detector = DiffusionDetector(objective="diffusion-time", max_iter=5, **SMALL).fit(X)
    for method in ("denoise", "reconstruct", "log_prob", "log_prob_error", "elbo", "energy"):
        with pytest.raises(TypeError, match="to tell how much noise is in a row, not to take it away"):
            getattr(detector, method)(X)
    with pytest.raises(TypeError, match="Fit it with another objective"):
        detector.sample(3)
    with pytest.raises(
        ValueError, match=r"distribution='normal' is unknown. Known: 'categorical', 'inverse-gamma'"
    ):
        DiffusionDetector(objective=DiffusionTimeEstimation(distribution="normal"), **SMALL).fit(X)


def test_the_time_of_a_row_is_its_distance_to_the_stored_ones():
    X = np.random.default_rng(0).normal(size=(80, 3))
    time = DiffusionTime(n_neighbors=5)
    detector = DiffusionDetector(denoiser="closed-form", anomaly=time, validation_fraction=0, **SMALL).fit(X)
    new = np.random.default_rng(1).normal(size=(9, 3))
    new[0] = [30, 0, -4]  # far beyond where tails are compressed: distances are in plain deviations
    Z, z = (X - X.mean(0)) / X.std(0), (new - X.mean(0)) / X.std(0)
    squares = np.sort(((z[:, None] - Z) ** 2).sum(2), axis=1)[:, :5]
    np.testing.assert_allclose(-detector.score_samples(new), np.sqrt(squares.mean(1) / 3), rtol=1e-5)
