"""Composed detectors: energies that add up, columns that belong together, samples from what was composed."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import config_context
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError, UnsetMetadataPassedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline

from anomalib_gen import ComposedDetector, DiffusionDetector, EnergyDetector, VAEDetector
from anomalib_gen.models import GaussianMixtureEnergy, ScoreDenoiser
from anomalib_gen.paths import EDM


class Gaussian(torch.nn.Module):
    """A flow whose density is N(mean, deviation^2) exactly: x -> (x - mean) / deviation."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.as_tensor(mean))
        self.deviation = deviation

    def forward(self, x, context=None):
        log_det = -x.shape[1] * np.log(self.deviation)
        return (x - self.mean) / self.deviation, torch.full_like(x[:, 0], log_det)

    def inverse(self, u, context=None):
        return u * self.deviation + self.mean, torch.zeros_like(u[:, 0])


def gaussian(tiny, mean, deviation=1.0, features=1):
    """A fitted detector whose density is known in closed form, in the units of X."""
    rows = np.array([[-1.0], [1.0]]) * np.ones(
        features
    )  # mean 0 and deviation 1: standardising changes nothing
    detector = tiny(
        transform=lambda d, c: Gaussian([mean] * d, deviation), max_noise=None, noise=0.0, max_iter=1
    ).fit(rows)
    with torch.no_grad():
        detector.model_.transform.mean.fill_(mean)
        detector.model_.spread.fill_(1.0)
    return detector


@pytest.fixture
def pair(tiny):
    return gaussian(tiny, -1.0), gaussian(tiny, 2.0, 0.5)


grid = np.linspace(-4, 4, 41)[:, None]


def test_a_product_adds_energies_and_a_mixture_densities(pair):
    a, b = pair
    left, right = stats.norm(-1, 1), stats.norm(2, 0.5)
    np.testing.assert_allclose(a.energy(grid), -left.logpdf(grid[:, 0]), rtol=1e-6)
    product = ComposedDetector([("a", a), ("b", b)], weights=[1.0, 0.5]).fit(grid)
    expected = left.logpdf(grid[:, 0]) + 0.5 * right.logpdf(grid[:, 0])
    np.testing.assert_allclose(product.score_samples(grid), expected, rtol=1e-6)
    mixture = ComposedDetector([("a", a), ("b", b)], rule="mixture", weights=[3, 1]).fit(grid)
    expected = np.log(0.75 * left.pdf(grid[:, 0]) + 0.25 * right.pdf(grid[:, 0]))
    np.testing.assert_allclose(mixture.score_samples(grid), expected, rtol=1e-6)
    assert np.trapezoid(
        np.exp(mixture.score_samples(fine := np.linspace(-9, 9, 2001)[:, None])), fine[:, 0]
    ) == (pytest.approx(1, abs=1e-5))
    np.testing.assert_allclose(
        mixture.member_energies(grid), np.column_stack([a.energy(grid), b.energy(grid)])
    )


def test_a_negative_weight_turns_a_member_around(pair):
    a, b = pair
    composed = ComposedDetector([("a", a), ("not b", b)], weights=[1.0, -0.1]).fit(grid)
    np.testing.assert_allclose(composed.energy(grid), a.energy(grid) - 0.1 * b.energy(grid))
    gain = composed.score_samples(grid) - a.score_samples(grid)
    assert grid[gain.argmin(), 0] == pytest.approx(2.0)


def test_members_look_at_their_columns(tiny, X):
    frame = pd.DataFrame(X, columns=["age", "height", "weight"])
    a = tiny().fit(frame[["weight", "age"]])
    b = tiny().fit(frame[["height"]])
    expected = a.score_samples(frame[["weight", "age"]]) + b.score_samples(frame[["height"]])
    by_name = ComposedDetector([("a", a), ("b", b)]).fit(frame)
    np.testing.assert_allclose(by_name.score_samples(frame), expected)
    said = ComposedDetector([("a", a), ("b", b)], columns=[["weight", "age"], [1]]).fit(frame)
    np.testing.assert_allclose(said.score_samples(frame), expected)
    with pytest.raises(ValueError, match="feature names"):
        said.score_samples(frame[["weight", "age", "height"]])
    with pytest.raises(
        ValueError, match=r"'a' are those it was fitted on in another order.*\['weight', 'age'\]"
    ):
        ComposedDetector([("a", a), ("b", b)], columns=[["age", "weight"], ["height"]]).fit(frame)
    # Other columns than those of the fit are what was asked for.
    other = ComposedDetector([("a", a)], columns=[["age", "height"]]).fit(frame)
    np.testing.assert_allclose(other.score_samples(frame), a._score(X[:, [0, 1]]))
    with pytest.warns(UserWarning, match=r"'a' was fitted on columns with names.*\['weight', 'age'\]"):
        ComposedDetector([("a", a)]).fit(X[:, :2])


def test_members_that_are_fitted_again_are_followed_but_not_to_another_width(tiny, X):
    member = tiny().fit(X)
    composed = ComposedDetector([("a", member)]).fit(X)
    member.fit(X[:, ::-1] + 1)
    np.testing.assert_allclose(composed.score_samples(X), member.score_samples(X))
    member.fit(X[:, :1])  # one column would broadcast
    for use in (composed.score_samples, composed.member_energies, lambda X: composed.sample(2)):
        with pytest.raises(ValueError, match="'a' was fitted again, on 1 columns, and it looks at 3 here"):
            use(X)


def test_members_of_a_mixture_may_know_the_columns_in_another_order(tiny, X):
    frame = pd.DataFrame(X, columns=["age", "height", "weight"])
    turned = frame[["weight", "age", "height"]]
    a, b = tiny(max_iter=60).fit(frame), tiny(max_iter=60).fit(turned)
    composed = ComposedDetector([("a", a), ("b", b)], rule="mixture", weights=[1, 3]).fit(frame)
    expected = np.log(0.25 * np.exp(a.log_prob(frame)) + 0.75 * np.exp(b.log_prob(turned)))
    np.testing.assert_allclose(composed.score_samples(frame), expected)
    drawn = composed.sample(400, random_state=0)
    np.testing.assert_allclose(drawn.mean(axis=0), X.mean(axis=0), atol=0.5 * X.std(axis=0).max())


def test_the_conjunction_of_two_concepts_flags_what_neither_does(tiny):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000, 2))
    pressure, heat = (tiny(contamination=0.01, max_iter=150).fit(rows[:, [j]]) for j in (0, 1))
    both = ComposedDetector(
        [("pressure", pressure), ("heat", heat)], columns=[[0], [1]], contamination=0.01
    ).fit(rows)
    odd = np.array([[2.3, 2.3], [-2.3, 2.3], [2.3, -2.3]])
    assert (pressure.predict(odd[:, [0]]) == 1).all()
    assert (heat.predict(odd[:, [1]]) == 1).all()
    assert (both.predict(odd) == -1).all()
    assert (both.predict(rows) == -1).mean() == pytest.approx(0.01, abs=0.001)


def test_the_disjunction_accepts_what_one_of_two_accepts(tiny):
    rng = np.random.default_rng(0)
    day, night = rng.normal(0, 1, size=(500, 2)), rng.normal(8, 1, size=(500, 2))
    by_day, by_night = tiny(max_iter=100).fit(day), tiny(max_iter=100).fit(night)
    either = ComposedDetector([("day", by_day), ("night", by_night)], rule="mixture").fit(
        np.concatenate([day, night])
    )
    assert (by_day.predict(night) == -1).all()
    assert (either.predict(night) == 1).mean() > 0.9
    assert (either.predict(day) == 1).mean() > 0.9
    assert (either.predict([[4.0, 4.0], [0.0, 8.0]]) == -1).all()


def test_energy_models_enter_a_mixture_as_densities():
    rng = np.random.default_rng(0)
    small = {"hidden_features": 16, "max_iter": 30, "random_state": 0, "device": "cpu"}
    left, right = (
        EnergyDetector(objective="score-matching", max_noise=None, **small).fit(
            rng.normal(m, 1, size=(200, 1))
        )
        for m in (-2.0, 2.0)
    )
    composed = ComposedDetector([("a", left), ("b", right)], rule="mixture", weights=[0.3, 0.7])
    with pytest.warns(
        UserWarning, match=r"energies of members \['a', 'b'\] have a constant that is not known"
    ):
        composed.fit(grid)
    raw = np.log(0.3 * np.exp(-left.energy(grid)) + 0.7 * np.exp(-right.energy(grid)))
    np.testing.assert_allclose(composed.score_samples(grid), raw)
    for member in (left, right):
        member.normalize(n_chains=64, n_levels=20, random_state=0)
    expected = np.log(0.3 * np.exp(left.log_prob(grid)) + 0.7 * np.exp(right.log_prob(grid)))
    np.testing.assert_allclose(composed.score_samples(grid), expected)
    differentiable = composed._torch_energy(torch.device("cpu"))
    np.testing.assert_allclose(-differentiable(torch.tensor(grid)).detach(), expected)
    # Constants mean nothing to a product, and with them there is nothing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        composed.fit(grid)
        product = ComposedDetector([("a", left), ("b", right)]).fit(grid)
    np.testing.assert_allclose(product.energy(grid), left.energy(grid) + right.energy(grid))


@pytest.fixture(scope="module")
def diffusions():
    """Two diffusion models, of about N(0, 1) and N(2, 1/4)."""
    rng = np.random.default_rng(0)
    detector = DiffusionDetector(
        denoiser="network", hidden_features=16, max_iter=300, random_state=0, device="cpu"
    )
    return [clone(detector).fit(rng.normal(m, s, size=(1000, 1))) for m, s in ((0.0, 1.0), (2.0, 0.5))]


def test_diffusion_models_enter_a_mixture_as_densities(diffusions):
    members = list(zip("ab", map(copy.copy, diffusions), strict=True))
    composed = ComposedDetector(members, rule="mixture", weights=[0.3, 0.7])
    with pytest.warns(UserWarning, match=r"energies of members \['a', 'b'\] .* Call their normalize\(\)"):
        composed.fit(grid)
    fine = np.linspace(-8, 8, 801)[:, None]
    for _, member in members:
        assert member.normalize(n_samples=200, random_state=0) is member
        mass = np.trapezoid(np.exp(-member.energy(fine)), fine[:, 0])
        low, high = member.log_normalizer_interval_
        assert low < member.log_normalizer_ < high < low + 0.2
        assert member.log_normalizer_ == pytest.approx(np.log(mass), abs=0.05)
        assert mass < 0.5  # a bound, and not a tight one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        composed.fit(grid)
    assert np.trapezoid(np.exp(composed.score_samples(fine)), fine[:, 0]) == pytest.approx(1, abs=0.05)
    again = members[0][1].fit(grid)
    assert not hasattr(again, "log_normalizer_")
    assert not hasattr(again, "log_normalizer_interval_")


def test_the_constant_of_a_diffusion_model_of_rows_without_width():
    """Bound and density differ along the noise of the smallest level, over which their ratio has to be averaged."""
    rows = np.array([[-1.0], [1.0]]).repeat(20, axis=0)  # standardising changes nothing
    path = EDM(sigma_min=0.3, sigma_max=20.0)
    detector = DiffusionDetector(denoiser="closed-form", path=path, random_state=0, device="cpu").fit(rows)
    means = torch.tensor([[-1.5], [0.0], [1.5]], dtype=torch.float64)
    truth = GaussianMixtureEnergy(means.new_zeros(3), means, means.new_full((3, 1, 1), 1e-3))
    detector.model_ = ScoreDenoiser(truth, path, event_shape=(1,)).requires_grad_(False)
    fine = np.linspace(-4, 4, 401)[:, None]
    log_mass = np.log(np.trapezoid(np.exp(-detector.energy(fine)), fine[:, 0]))
    low, high = detector.normalize(n_samples=400, random_state=0).log_normalizer_interval_
    assert low < log_mass < high < low + 0.15


def test_diffusion_models_compose_with_one_another_and_with_flows(diffusions, tiny):
    a, b = diffusions
    product = ComposedDetector([("a", a), ("b", b)], n_steps=40).fit(grid)
    np.testing.assert_allclose(product.energy(grid), a.energy(grid) + b.energy(grid))
    np.testing.assert_array_equal(a.energy(grid), -a.elbo(grid, n_steps=32))
    # N(0, 1) N(2, 1/4) ~ N(1.6, 1/5), as far as bounds in few steps tell
    drawn = product.sample(100, random_state=0)
    assert drawn.mean() == pytest.approx(1.6, abs=0.2)
    assert drawn.std() == pytest.approx(np.sqrt(0.2), abs=0.12)
    # N(0, 1) N(-1, 1) ~ N(-1/2, 1/2)
    mixed = ComposedDetector([("a", a), ("flow", gaussian(tiny, -1.0))], n_steps=40).fit(grid)
    drawn = mixed.sample(100, random_state=0)
    assert drawn.mean() == pytest.approx(-0.5, abs=0.25)
    assert drawn.std() == pytest.approx(np.sqrt(0.5), abs=0.2)


def test_samples_of_a_product_have_its_moments(tiny):
    # N(-1, 1) N(2, 1/4) ~ N(1.4, 1/5)
    composed = ComposedDetector(
        [("a", gaussian(tiny, -1.0)), ("b", gaussian(tiny, 2.0, 0.5))], n_steps=60
    ).fit(grid)
    drawn = composed.sample(1000, random_state=0)
    assert drawn.shape == (1000, 1)
    assert drawn.mean() == pytest.approx(1.4, abs=4 * np.sqrt(0.2 / 1000))
    assert drawn.var() == pytest.approx(0.2, rel=4 * np.sqrt(2 / 1000))
    np.testing.assert_array_equal(drawn, composed.sample(1000, random_state=0))
    assert not np.array_equal(drawn, composed.sample(1000))


def test_samples_of_a_product_over_other_columns(tiny, X):
    a, b = tiny(max_iter=60).fit(X[:, :2]), tiny(max_iter=60).fit(X[:, 2:])
    composed = ComposedDetector([("a", a), ("b", b)], columns=[[0, 1], [2]], n_steps=50).fit(X)
    drawn = composed.sample(300, random_state=0)
    assert drawn.shape == (300, 3)
    np.testing.assert_allclose(drawn.mean(axis=0), X.mean(axis=0), atol=0.5 * X.std(axis=0).max())
    partly = ComposedDetector([("a", a)], columns=[[0, 1]]).fit(X)
    with pytest.raises(ValueError, match=r"No member looks at columns \[2\]"):
        partly.sample(3)


def test_samples_of_a_mixture_are_in_proportion(pair):
    a, b = pair
    composed = ComposedDetector([("a", a), ("b", b)], rule="mixture", weights=[0.2, 0.8]).fit(grid)
    drawn = composed.sample(4000, random_state=0)[:, 0]
    cdf = lambda x: 0.2 * stats.norm(-1, 1).cdf(x) + 0.8 * stats.norm(2, 0.5).cdf(x)  # noqa: E731
    assert stats.kstest(drawn, cdf).pvalue > 0.01


def test_composed_detectors_compose(pair):
    a, b = pair
    either = ComposedDetector([("a", a), ("b", b)], rule="mixture").fit(grid)
    nested = ComposedDetector([("either", either), ("a", a)], n_steps=20).fit(grid)
    np.testing.assert_allclose(nested.energy(grid), either.energy(grid) + a.energy(grid))
    assert np.isfinite(nested.sample(10, random_state=0)).all()


def test_energies_of_all_families_are_on_one_scale(fitted, X):
    small = {"hidden_features": 16, "max_iter": 30, "random_state": 0, "device": "cpu"}
    vae, energy = VAEDetector(**small).fit(X), EnergyDetector(anomaly="energy", **small).fit(X)
    diffusion = DiffusionDetector(**small).fit(X)
    np.testing.assert_array_equal(fitted.energy(X), -fitted.log_prob(X))
    np.testing.assert_array_equal(vae.energy(X), -vae.score_samples(X))
    np.testing.assert_array_equal(energy.energy(X), -energy.score_samples(X))
    members = [("flow", fitted), ("vae", vae), ("energy", energy), ("diffusion", diffusion)]
    composed = ComposedDetector(members, n_steps=10).fit(X)
    np.testing.assert_allclose(composed.energy(X), sum(member.energy(X) for _, member in members))
    for _, member in [*members, ("all", composed)]:
        # What sampling follows is the energy that scores.
        differentiable = member._torch_energy(torch.device("cpu"))
        np.testing.assert_allclose(differentiable(torch.tensor(X)).detach(), member.energy(X), rtol=1e-9)
    assert composed.sample(5, random_state=0).shape == (5, 3)
    # Stretching a column by c adds log c to every energy, whatever the family.
    for member in (fitted, vae, energy, diffusion):
        stretched = clone(member).fit(X * [1, 1, 1e3])
        np.testing.assert_allclose(
            stretched.energy(X * [1, 1, 1e3]) - member.energy(X), np.log(1e3), atol=1e-3
        )


def test_far_rows_stay_finite(pair):
    a, b = pair
    composed = ComposedDetector([("a", a), ("b", b)], weights=[1.0, -1.0]).fit(grid)
    far = np.array([[1e30], [1e200], [1e308], [-1e308]])
    assert np.isfinite(composed.score_samples(far)).all()


def test_clones_are_fitted_if_asked(tiny, X):
    members = [("a", tiny()), ("b", tiny(random_state=None))]
    composed = ComposedDetector(members, prefit=False, random_state=0).fit(X)
    assert not hasattr(members[0][1], "model_")
    np.testing.assert_allclose(
        composed.score_samples(X), sum(d.fit(X).score_samples(X) for d in (tiny(), composed.detectors_[1]))
    )
    again = ComposedDetector(members, prefit=False, random_state=0).fit(X)
    np.testing.assert_array_equal(again.score_samples(X), composed.score_samples(X))
    assert set(np.unique(cross_val_predict(composed, X, cv=2))) <= {-1, 1}


def test_weights_reach_the_members_that_are_fitted(tiny, fitted, X):
    weights = (np.arange(len(X)) % 3).astype(float)
    members = [("kept", FrozenEstimator(fitted)), ("new", tiny())]
    composed = ComposedDetector(members, prefit=False, contamination=0.1).fit(X, sample_weight=weights)
    alone = tiny().fit(X, sample_weight=weights)
    np.testing.assert_array_equal(composed.detectors_[1].energy(X), alone.energy(X))
    # Rows without weight have no say in the threshold.
    scores = composed.score_samples(X)
    assert composed.offset_ == pytest.approx(np.quantile(scores[weights > 0], 0.1))
    prefit = ComposedDetector([("a", fitted)], contamination=0.1).fit(X, sample_weight=weights)
    assert prefit.offset_ == pytest.approx(np.quantile(prefit.score_samples(X)[weights > 0], 0.1))
    nested = ComposedDetector([("all", ComposedDetector(members, prefit=False))], prefit=False)
    np.testing.assert_array_equal(nested.fit(X, sample_weight=weights).energy(X), composed.energy(X))
    for wrong, message in ((np.ones(3), r"sample_weight\.shape"), (-weights, "Negative values")):
        with pytest.raises(ValueError, match=message):
            composed.fit(X, sample_weight=wrong)
    np.testing.assert_array_equal(composed.score_samples(X), scores)


def test_weights_are_routed_to_the_members_that_ask(tiny, fitted, X):
    weights = (np.arange(len(X)) % 3).astype(float)
    with config_context(enable_metadata_routing=True):
        asks = tiny().set_fit_request(sample_weight=True)
        declines = tiny().set_fit_request(sample_weight=False)
        members = [("asks", asks), ("declines", declines), ("kept", FrozenEstimator(fitted))]
        composed = ComposedDetector(members, prefit=False).set_fit_request(sample_weight=True)
        pipeline = make_pipeline(composed).fit(X, sample_weight=weights)
        found = pipeline[-1].detectors_
        weighted = tiny().fit(X, sample_weight=weights)
        np.testing.assert_array_equal(found[0].energy(X), weighted.energy(X))
        np.testing.assert_array_equal(found[1].energy(X), tiny().fit(X).energy(X))
        with pytest.raises(UnsetMetadataPassedError, match=r"sample_weight.*FlowDetector"):
            ComposedDetector([("a", tiny())], prefit=False).fit(X, sample_weight=weights)
        # Members that are fitted already are asked nothing.
        ComposedDetector([("a", fitted)]).fit(X, sample_weight=weights)


def test_frozen_members_stay_fitted_through_clone(tiny, fitted, X):
    composed = ComposedDetector([("kept", FrozenEstimator(fitted)), ("new", tiny())], prefit=False).fit(X)
    assert composed.detectors_[0] is fitted
    frozen = ComposedDetector([("kept", FrozenEstimator(fitted))])
    np.testing.assert_array_equal(clone(frozen).fit(X).energy(X), fitted.energy(X))
    with pytest.raises(NotFittedError, match=r"'kept' .* kept fitted by clone, .*FrozenEstimator"):
        clone(ComposedDetector([("kept", fitted)])).fit(X)


def test_parameters_of_members_are_nested(tiny, X):
    composed = ComposedDetector([("a", tiny()), ("b", tiny())], prefit=False)
    composed.set_params(a__max_iter=3, b=tiny(max_iter=4)).fit(X)
    assert [member.n_iter_ for member in composed.detectors_] == [3, 4]
    assert composed.get_params()["a__max_iter"] == 3


def test_a_pickle_scores_the_same(fitted, X):
    composed = ComposedDetector([("a", fitted)]).fit(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(composed)).predict(X), composed.predict(X))


def test_bad_compositions_are_refused(tiny, fitted, X):
    def fit(*members, **parameters):
        return ComposedDetector([(f"m{k}", m) for k, m in enumerate(members)], **parameters).fit(X)

    with pytest.raises(ValueError, match="detectors is empty"):
        fit()
    with pytest.raises(NotFittedError, match=r"Member 'm1' .* set prefit=False"):
        fit(fitted, tiny())
    with pytest.raises(ValueError, match="Member 'm0' is of class IsolationForest, which has no energy"):
        fit(IsolationForest().fit(X))
    timed = DiffusionDetector(objective="diffusion-time", hidden_features=8, max_iter=2, device="cpu").fit(X)
    with pytest.raises(ValueError, match=r"Member 'm1' has no energy\. .* another objective"):
        fit(fitted, timed)
    with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
        fit(fitted, fitted, weights=[1.0])
    with pytest.raises(ValueError, match=r"weights must be 2 finite numbers, .* got \['m0', 'm1'\]"):
        fit(fitted, fitted, weights=["m0", "m1"])
    with pytest.raises(ValueError, match="all zero"):
        fit(fitted, weights=[0.0])
    with pytest.raises(ValueError, match="weights of a mixture must be positive"):
        fit(fitted, fitted, rule="mixture", weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="one entry for each of the 1 detectors, got 2"):
        fit(fitted, columns=[[0], [1]])
    with pytest.raises(ValueError, match="'m0' was fitted on 3 columns and is given 2"):
        fit(fitted, columns=[[0, 1]])
    with pytest.raises(ValueError, match="hold 7; names or positions from 0 to 2"):
        fit(fitted, columns=[[0, 1, 7]])
    with pytest.raises(ValueError, match="name 'age', which X lacks"):
        fit(fitted, columns=[["age", 1, 2]])
    narrow = tiny().fit(X[:, :2])
    for mask in ([True, True, False], np.array([True, True, False])):
        with pytest.raises(ValueError, match=r"columns of member 'm0' are a mask.*flatnonzero"):
            fit(narrow, columns=[mask])
    for columns in ("age", slice(0, 2), 1):
        with pytest.raises(ValueError, match=r"a list of names or positions, or None, .* for member 'm0'"):
            fit(narrow, columns=[columns])
    for columns in ([0, 0], []):
        with pytest.raises(ValueError, match="columns of member 'm0' must be at least one and differ"):
            fit(narrow, columns=[columns])
    with pytest.raises(ValueError, match=r"pairs \(name, detector\), got FlowDetector"):
        ComposedDetector([fitted]).fit(X)
    with pytest.raises(ValueError, match="same columns"):
        fit(narrow, narrow, rule="mixture", columns=[[0, 1], [1, 2]])
    with pytest.raises(NotFittedError):
        ComposedDetector([("a", fitted)]).score_samples(X)
    with pytest.raises(ValueError, match="n_samples"):
        fit(fitted).sample(0)


def test_a_failed_refit_keeps_the_fitted_composition(tiny, fitted, X):
    narrow = tiny().fit(X[:, 1:])
    composed = ComposedDetector([("all", fitted), ("some", narrow)], columns=[range(3), [1, 2]]).fit(X)
    scores = composed.score_samples(X)
    with pytest.raises(ValueError, match="from 0 to 1 are needed"):
        composed.fit(X[:, :2])
    np.testing.assert_array_equal(composed.score_samples(X), scores)


def test_members_of_zeros_and_ones_see_and_give_nothing_else(tiny):
    flags = (np.random.default_rng(0).random((80, 3)) < [0.2, 0.5, 0.8]).astype(float)
    small = {"max_iter": 5, "hidden_features": 8, "random_state": 0, "device": "cpu"}
    a, b = (VAEDetector(observation="bernoulli", n_components=n, **small).fit(flags) for n in (1, 2))
    product = ComposedDetector([("a", a), ("b", b)]).fit(flags)
    np.testing.assert_allclose(product.energy(flags), a.energy(flags) + b.energy(flags))
    for composed in (product, ComposedDetector([("a", a), ("flow", tiny().fit(flags))]).fit(flags)):
        with pytest.raises(ValueError, match="observation='bernoulli' cannot be sampled"):
            composed.sample(3)
        with pytest.raises(ValueError, match="observation='bernoulli' needs zeros and ones"):
            composed.energy(flags + 0.5)
    mixture = ComposedDetector([("a", a), ("b", b)], rule="mixture").fit(flags)
    assert set(np.unique(mixture.sample(20, random_state=0))) == {0.0, 1.0}


def test_compositions_of_images_keep_to_the_units_of_their_members():
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8)).astype(np.uint8)
    small = {"max_iter": 2, "hidden_features": 16, "random_state": 0, "device": "cpu"}
    a, b = (VAEDetector(**small, n_components=n).fit(images) for n in (2, 3))
    for rule in ("product", "mixture"):
        composed = ComposedDetector([("a", a), ("b", b)], rule=rule, n_steps=2).fit(images)
        drawn = composed.sample(2, random_state=0)
        assert drawn.dtype == np.uint8
        assert np.isfinite(composed.score_samples(drawn)).all()
        with pytest.raises(ValueError, match="ComposedDetector was fitted on uint8 images"):
            composed.score_samples(images / 255)
    with pytest.raises(
        ValueError, match="VAEDetector was fitted on uint8 images, 0 to 255, and X is float64"
    ):
        ComposedDetector([("a", a)]).fit(images / 255)
    with pytest.raises(ValueError, match=r"images of shape \(1, 9, 8\)"):
        ComposedDetector([("a", a)]).fit(np.zeros((3, 1, 9, 8), np.uint8))
