"""Criteria without labels: their curves have closed forms, and each tells a broken model from a sound one."""

import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy import integrate, stats
from sklearn import config_context
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.compose import make_column_transformer
from sklearn.covariance import EllipticEnvelope
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.frozen import FrozenEstimator
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.neighbors import KernelDensity, LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, OneHotEncoder, RobustScaler, StandardScaler

from anomalib_gen import EnergyDetector, FlowDetector
from anomalib_gen._inputs import as_pandas
from anomalib_gen.calibration import SplitConformalDetector
from anomalib_gen.selection import (
    ColumnReplacement,
    ExcessMass,
    LogLikelihood,
    MassVolume,
    RankStability,
    excess_mass_curve,
    mass_volume_curve,
    model_centrality,
)

SCORERS = [
    MassVolume(n_points=500),
    MassVolume(n_points=500, n_columns=1, n_subsets=2),
    ExcessMass(n_points=500),
    ColumnReplacement(n_repeats=1),
    ColumnReplacement(n_repeats=1, reference="marginal"),
    RankStability(n_fits=1),
]


class Known(OutlierMixin, BaseEstimator):
    """A detector whose scores are a known function of rows; it learns nothing."""

    def __init__(self, function=None):
        self.function = function

    def fit(self, X, y=None):
        self.n_features_in_ = np.shape(X)[1]
        return self

    def score_samples(self, X):
        return self.function(np.asarray(X, dtype=float))


def nearness(X):
    return -(X**2).sum(axis=1)


def correlated(n, rho=0.9, d=2, seed=0):
    cov = np.full((d, d), rho) + (1 - rho) * np.eye(d)
    return np.random.default_rng(seed).multivariate_normal(np.zeros(d), cov, size=n), cov


# Curves ---------------------------------------------------------------------------------------------------


def test_mass_volume_of_a_gaussian_in_closed_form():
    """A ball holds the mass F(r) and the volume pi r^2 of the square [-a, a]^2."""
    random = np.random.default_rng(0)
    a = 5.0
    mass, volume = mass_volume_curve(
        nearness(random.normal(size=(100_000, 2))), nearness(random.uniform(-a, a, size=(400_000, 2)))
    )
    inside = mass < 0.999
    truth = np.pi * stats.chi2.ppf(mass[inside], 2) / (2 * a) ** 2
    np.testing.assert_allclose(volume[inside], truth, atol=0.01)
    assert mass[-1] == 1
    assert (np.diff(mass) > 0).all()
    assert (np.diff(volume) >= 0).all()


def test_excess_mass_of_a_gaussian_in_closed_form():
    """The best ball ends where the density falls to the price: EM(t) = 1 - c t + c t log(c t), c = 2 pi / (2 a)^2."""
    random = np.random.default_rng(0)
    a = 5.0
    t, excess = excess_mass_curve(
        nearness(random.normal(size=(100_000, 2))), nearness(random.uniform(-a, a, size=(400_000, 2)))
    )
    c = 2 * np.pi / (2 * a) ** 2
    prices = np.linspace(0.1, 0.99 / c, 50)
    np.testing.assert_allclose(
        np.interp(prices, t, excess), 1 - c * prices + c * prices * np.log(c * prices), atol=0.01
    )
    assert (t[0], excess[0]) == (0, 1)


def test_excess_mass_is_the_dual_of_mass_volume():
    random = np.random.default_rng(1)
    s, reference = random.normal(size=80).round(1), random.normal(-1, 2, size=300).round(1)
    mass, volume = mass_volume_curve(s, reference)
    t, excess = excess_mass_curve(s, reference)
    for price in [*t, *random.uniform(0, 2 * t[-1], size=50)]:
        best = max(0.0, (mass - price * volume).max())
        assert np.interp(price, t, excess) == pytest.approx(best, abs=1e-12)
    assert (np.diff(t) > 0).all()


def test_curves_of_scores_without_a_way_to_tell():
    same = np.zeros(5)
    np.testing.assert_array_equal(mass_volume_curve(same, same), ([1.0], [1.0]))
    np.testing.assert_array_equal(excess_mass_curve(same, same), ([0.0, 1.0], [1.0, 0.0]))
    # All rows above all points: no volume at any price.
    np.testing.assert_array_equal(excess_mass_curve(same + 1, same), ([0.0], [1.0]))


def test_curves_refuse_what_is_no_score():
    for curve in (mass_volume_curve, excess_mass_curve):
        with pytest.raises(ValueError, match=r"scores must be one number a row.*\(0,\)"):
            curve([], [1.0])
        with pytest.raises(ValueError, match="reference_scores must not be NaN, and the one at 1 is"):
            curve([1.0], [1.0, np.nan])


# Scorers of volume ----------------------------------------------------------------------------------------


def test_the_area_is_the_mean_p_value_of_uniform_points():
    """Equation 3, against the p-values of the calibration part."""
    X = np.random.default_rng(0).normal(size=(400, 2))
    seen = []

    class Watched(Known):
        def score_samples(self, X):
            seen.append(np.asarray(X))
            return super().score_samples(X)

    area = MassVolume(levels=(0, 1), n_points=2000)(Watched(nearness).fit(X), X)
    conformal = SplitConformalDetector(FrozenEstimator(Known(nearness).fit(X)), alpha=0.05).fit(X)
    p = conformal.p_values(seen[1])
    assert -area == pytest.approx(p.mean(), abs=1 / 400)
    at_level = MassVolume(levels=(0.95, 0.95), n_points=2000)(Known(nearness).fit(X), X)
    # 380 of 400 rows have to be inside; the conformal set of 5 % may leave out 20 of 401.
    assert -at_level == pytest.approx((p > 0.05).mean(), abs=0.01)


def test_mass_volume_averages_the_curve_between_levels():
    X = np.random.default_rng(0).normal(size=(20_000, 2))
    found = MassVolume(n_points=200_000)(Known(nearness).fit(X), X)
    sides = np.ptp(X, axis=0)
    truth, _ = integrate.quad(lambda alpha: np.pi * stats.chi2.ppf(alpha, 2) / sides.prod(), 0.9, 0.999)
    assert -found == pytest.approx(truth / 0.099, rel=0.03)


def test_excess_mass_is_the_area_down_to_its_level():
    X = np.random.default_rng(0).normal(size=(20_000, 2))
    found = ExcessMass(n_points=200_000)(Known(nearness).fit(X), X)
    c = 2 * np.pi / np.ptp(X, axis=0).prod()

    def curve(t):
        return 1 - c * t + c * t * np.log(c * t) if t > 0 else 1.0

    grid = np.linspace(0, 1 / c, 100_001)
    values = np.array([curve(t) for t in grid])
    inside = values > 0.9
    assert found == pytest.approx(integrate.trapezoid(values[inside], grid[inside]), rel=0.03)
    # Where no point comes near the rows the curve never falls, and the area ends at the resolution.
    with pytest.warns(UserWarning, match="None of 50 uniform points"):
        assert ExcessMass(n_points=50)(Known(lambda Z: 1.0 * np.isin(Z[:, 0], X[:, 0])).fit(X), X) == 50


@pytest.mark.parametrize("scorer", [MassVolume(), ExcessMass(), ColumnReplacement(n_repeats=20)])
def test_the_density_itself_is_best(scorer):
    """All three are optimal, over all rankings, at the true density."""
    X, cov = correlated(2000)
    right = Known(stats.multivariate_normal(cov=cov).logpdf)
    found = scorer(right.fit(X), X)
    others = {
        "isotropic": nearness,
        "wrong sign": stats.multivariate_normal(cov=2 * np.eye(2) - cov).logpdf,
        "one column": lambda X: -np.abs(X[:, 0]),
        "upside down": lambda X: -stats.multivariate_normal(cov=cov).logpdf(X),
        "noise": lambda X: np.sin(1e5 * X.sum(axis=1)),
    }
    for function in others.values():
        assert found > scorer(Known(function).fit(X), X) + 0.005
    assert found == scorer(Known(lambda X: np.exp(right.function(X))).fit(X), X)


def test_subsets_of_columns_are_fitted_and_judged_apart():
    """Thirty columns go in tens: hardly a volume of all of them is seen, one of a few is."""
    random = np.random.default_rng(0)
    X = random.normal(size=(600, 3)).repeat(10, axis=1) + 0.1 * random.normal(size=(600, 30))
    fits = []

    class Recorded(EllipticEnvelope):
        def fit(self, X, y=None):
            fits.append(X.shape)
            return super().fit(X)

    def score(detector, **options):
        return MassVolume(levels=(0.5, 0.9), n_points=1000, **options)(detector.fit(X[:300]), X[300:])

    with pytest.warns(UserWarning, match="1000 uniform points in 30 columns .* take ColumnReplacement"):
        assert score(Recorded()) == 0
    assert -0.01 < score(Known(nearness)) <= 0
    fits.clear()
    found = score(Recorded(), n_columns=3, n_subsets=20)
    assert fits == [(300, 30)] + 20 * [(150, 3)]
    assert found > score(Known(nearness), n_columns=3, n_subsets=20) + 0.05


@pytest.mark.parametrize(
    "scorer",
    [MassVolume(n_points=50, n_columns=1, n_subsets=4), RankStability(n_fits=4)],
    ids=["volume", "stability"],
)
def test_candidates_with_and_without_seeds_see_the_same_rows(scorer):
    X, _ = correlated(40, d=5)

    def rows_of(seed):
        fits = []

        class Recorded(Known):
            def __init__(self, function=nearness, random_state=None):
                super().__init__(function)
                self.random_state = random_state

            def fit(self, X, y=None):
                fits.append(np.array(X))
                return super().fit(X)

        scorer(Recorded(random_state=seed).fit(X), X)
        return fits

    for seeded, unseeded in zip(rows_of(0), rows_of(None), strict=True):
        np.testing.assert_array_equal(seeded, unseeded)


# Replaced columns -----------------------------------------------------------------------------------------


def test_column_replacement_of_a_gaussian_in_closed_form():
    X, cov = correlated(20_000, rho=0.8)
    found = ColumnReplacement(n_repeats=10)(Known(stats.multivariate_normal(cov=cov).logpdf).fit(X), X)
    half_ranges = np.ptp(X, axis=0) / 2
    truth = np.mean(1 - np.sqrt(2 / np.pi) * np.sqrt(1 - 0.8**2) / half_ranges)
    assert found == pytest.approx(truth, abs=0.003)


def test_values_of_other_rows_test_relations_alone():
    X, cov = correlated(5000)
    scorer = ColumnReplacement(reference="marginal", n_repeats=10)
    independent = Known(nearness).fit(X)
    # Each column's own density cannot tell an own value from another row's.
    assert scorer(independent, X) == pytest.approx(0.5, abs=0.01)
    # For two columns p(x_1 | x_2) / p(x_1) is the ratio of the joint density and the product.
    joint = stats.multivariate_normal(cov=cov).logpdf
    assert scorer(Known(lambda X: joint(X) - nearness(X) / 2).fit(X), X) > scorer(Known(joint).fit(X), X)
    assert scorer(Known(lambda X: X[:, 0] * 0).fit(X), X) == 0.5


def test_constant_columns_are_not_replaced():
    X, cov = correlated(300)
    wider = np.column_stack([X, np.full(300, 0.1)])
    density = stats.multivariate_normal(cov=cov).logpdf
    value = ColumnReplacement()(Known(lambda X: density(X[:, :2])).fit(wider), wider)
    assert value == ColumnReplacement()(Known(density).fit(X), X)
    with pytest.raises(ValueError, match="All of the 1 columns of X are constant"):
        ColumnReplacement()(Known(nearness).fit(wider[:, 2:]), wider[:, 2:])


# Stability ------------------------------------------------------------------------------------------------


def test_top_down_correlation_by_hand():
    """Savage scores of three ranks are 11/6, 5/6 and 1/3 (Iman and Conover 1987)."""
    savage = np.array([11 / 6, 5 / 6, 2 / 6]) - 1
    swapped = savage[[0, 2, 1]]
    truth = savage @ swapped / (savage @ savage)
    np.testing.assert_allclose(model_centrality([[1, 2, 3], [1, 3, 2]]), [truth, truth])
    # Agreement at the top counts for more than agreement at the end.
    top = model_centrality([[1, 2, 3, 4], [1, 2, 4, 3]])[0]
    end = model_centrality([[1, 2, 3, 4], [2, 1, 3, 4]])[0]
    assert top > end
    # Only ranks matter, and ties share theirs.
    np.testing.assert_allclose(model_centrality([[1, 2, 2, 9], [-8, 0, 0, 0.5]]), 1)
    np.testing.assert_array_equal(model_centrality([[1, 2, 3], [5, 5, 5]]), 0)


def test_the_centre_is_found():
    random = np.random.default_rng(0)
    truth = random.normal(size=500)
    scores = [truth + scale * random.normal(size=500) for scale in (2.0, 0.3, 1.0, 3.0)]
    assert model_centrality([*scores, random.normal(size=500)]).argmax() == 1
    unrelated = model_centrality(random.normal(size=(2, 2000)))
    assert abs(unrelated[0]) < 3 / np.sqrt(2000)


def test_held_out_scores_of_a_search_can_be_compared():
    X, _ = correlated(60)
    scores = [
        cross_val_predict(
            IsolationForest(n_estimators=n, random_state=0), X, cv=2, method="decision_function"
        )
        for n in (5, 50, 60)
    ]
    assert model_centrality(scores).argmin() == 0


def test_centrality_refuses():
    with pytest.raises(ValueError, match=r"at least two of each, got \(1, 3\)"):
        model_centrality([[1, 2, 3]])
    with pytest.raises(ValueError, match="candidate 1 has some"):
        model_centrality([[1, 2, 3], [1, 2, np.nan]])


def test_stability_is_about_variance_alone():
    X, _ = correlated(600, d=4)
    small, large = (
        RankStability()(IsolationForest(n_estimators=n, random_state=0).fit(X[:300]), X[300:])
        for n in (2, 100)
    )
    assert small + 0.1 < large < 1
    # What learns nothing is perfectly stable, and worth nothing.
    assert RankStability()(Known(lambda X: np.sin(1e5 * X.sum(axis=1))).fit(X), X) == pytest.approx(1)


def test_stability_refuses():
    X, _ = correlated(50)
    with pytest.raises(ValueError, match="n_samples=3, but at least 4"):
        RankStability()(IsolationForest().fit(X), X[:3])
    frozen = FrozenEstimator(IsolationForest().fit(X))
    with pytest.raises(ValueError, match="estimator is frozen"):
        RankStability()(frozen, X)
    with pytest.raises(ValueError, match="estimator is frozen"):
        MassVolume(n_columns=1)(frozen, X)


# Likelihood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaler",
    [
        StandardScaler(),
        StandardScaler(with_std=False),
        RobustScaler(),
        MaxAbsScaler(),
        MinMaxScaler((-3, 8)),
        make_pipeline(RobustScaler(), "passthrough", MinMaxScaler()),
    ],
)
def test_likelihood_is_in_the_units_of_the_input(scaler):
    """A Gaussian fitted to scaled rows is the one fitted to the rows."""
    X = correlated(400)[0] * [1.0, 50.0] + 7
    bare = GaussianMixture(reg_covar=0).fit(X[:200])
    scaled = make_pipeline(scaler, GaussianMixture(reg_covar=0)).fit(X[:200])
    truth = bare.score_samples(X[200:]).mean()
    assert LogLikelihood()(bare, X[200:]) == pytest.approx(truth)
    assert LogLikelihood()(scaled, X[200:]) == pytest.approx(truth)
    assert LogLikelihood()(FrozenEstimator(scaled), X[200:]) == pytest.approx(truth)


def test_likelihood_is_that_of_the_density_whatever_the_anomaly():
    X, _ = correlated(200)
    flow = FlowDetector(transform="maf", max_iter=5, random_state=0, anomaly="typicality").fit(X)
    assert LogLikelihood()(flow, X) == pytest.approx(flow.log_prob(X).mean())
    assert LogLikelihood()(flow, X) != pytest.approx(flow.score(X))
    kernel = KernelDensity().fit(X)
    assert LogLikelihood()(kernel, X) == pytest.approx(kernel.score(X) / len(X))
    energy = EnergyDetector(max_iter=5, random_state=0).fit(X)
    with pytest.raises(ValueError, match="call normalize"):
        LogLikelihood()(energy, X)


def test_likelihood_refuses_what_is_none_or_in_other_units():
    X, _ = correlated(100)
    with pytest.raises(TypeError, match="IsolationForest has no density"):
        LogLikelihood()(IsolationForest().fit(X), X)
    with pytest.raises(TypeError, match="What PCA does to a density is not known here"):
        LogLikelihood()(make_pipeline(PCA(), GaussianMixture()).fit(X), X)
    clipping = [MinMaxScaler(clip=True)]
    if "clip" in MaxAbsScaler().get_params():
        clipping.append(MaxAbsScaler(clip=True))
    for scaler in clipping:
        with pytest.raises(TypeError, match=f"What {type(scaler).__name__} does"):
            LogLikelihood()(make_pipeline(scaler, GaussianMixture()).fit(X), X)


def test_likelihood_chooses_the_number_of_components():
    random = np.random.default_rng(0)
    X = np.concatenate([random.normal(size=(200, 2)), random.normal([8, 0], size=(200, 2))])
    search = GridSearchCV(
        GaussianMixture(random_state=0), {"n_components": [1, 2, 30]}, scoring=LogLikelihood(), cv=3
    ).fit(random.permutation(X))
    assert search.best_params_ == {"n_components": 2}


# As scikit-learn's scorers ---------------------------------------------------------------------------------


def test_searches_take_them_and_repeat():
    X, _ = correlated(300)
    grid = {"n_neighbors": [2, 20]}
    for scorer in SCORERS:
        search = GridSearchCV(LocalOutlierFactor(novelty=True), grid, scoring=scorer, cv=2).fit(X)
        again = GridSearchCV(LocalOutlierFactor(novelty=True), grid, scoring=scorer, cv=2).fit(X)
        np.testing.assert_array_equal(
            search.cv_results_["mean_test_score"], again.cv_results_["mean_test_score"]
        )
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    with config_context(enable_metadata_routing=True):
        cross_validate(IsolationForest(random_state=0), X, scoring=SCORERS[0], cv=2, error_score="raise")
    together = {f"{k}": scorer for k, scorer in enumerate(SCORERS)}
    found = cross_validate(IsolationForest(random_state=0), X, scoring=together, cv=2)
    assert sum(name.startswith("test_") for name in found) == len(SCORERS)


def test_labels_and_global_random_numbers_do_not_matter():
    X, _ = correlated(100)
    detector = LocalOutlierFactor(novelty=True).fit(X)
    for scorer in SCORERS:
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        assert scorer(detector, X) == scorer(detector, X, np.ones(100))
        np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_pyod_and_other_directions_are_turned_around():
    hbos = pytest.importorskip("pyod.models.hbos", reason="pyod is not installed")
    X, _ = correlated(300)
    detector = hbos.HBOS().fit(X)
    assert ColumnReplacement()(detector, X) > 0.6

    class Unknown(BaseEstimator):
        def fit(self, X):
            return self

        def decision_function(self, X):
            return -nearness(np.asarray(X))

    with pytest.raises(TypeError, match="score_direction"):
        MassVolume()(Unknown(), X)
    for scorer in SCORERS:
        turned = type(scorer)(**{**scorer.get_params(), "score_direction": "abnormal"})
        assert turned(Unknown(), X) == pytest.approx(scorer(Known(nearness), X), abs=1e-12)


def mixed(n=300):
    random = np.random.default_rng(0)
    size = random.normal(size=n)
    kind = np.where(size > 0, "large", "small")
    return pd.DataFrame(
        {
            "size": size,
            "kind": kind,
            "level": pd.Categorical(kind),
            "flag": size > 1,
            "count": np.array([0, 1, 5])[np.arange(n) % 3],
        }
    )


def test_frames_with_text_flags_and_categories():
    frame = mixed()
    encode = make_column_transformer(
        (OneHotEncoder(), ["kind", "level"]), remainder="passthrough", sparse_threshold=0
    )
    pipeline = make_pipeline(encode, IsolationForest(random_state=0)).fit(frame)
    before = frame.copy(deep=True)
    for scorer in (MassVolume(n_points=200), ColumnReplacement(), ColumnReplacement(reference="marginal")):
        assert np.isfinite(scorer(pipeline, frame))
    pd.testing.assert_frame_equal(frame, before)
    # Text that contradicts the size is noticed where the model looks at it.
    assert ColumnReplacement(reference="marginal")(pipeline, frame) > 0.55


@pytest.mark.parametrize("values", [np.nan, None], ids=str)
def test_columns_of_missing_values_stay_as_they_are(values):
    frame = mixed().assign(gone=pd.Series([values] * 300, dtype=type(values) if values else object))
    seen = []

    class Watched(Known):
        def score_samples(self, X):
            seen.append(X)
            return np.asarray(X["size"], dtype=float)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scorer in (MassVolume(n_points=900), ExcessMass(n_points=900), ColumnReplacement()):
            assert np.isfinite(scorer(Watched(), frame))
    for rows in seen:
        assert rows["gone"].isna().all()
        assert rows["gone"].dtype == frame["gone"].dtype


@pytest.mark.parametrize("kind", ["Int64", "UInt8", "int32[pyarrow]", "category"])
def test_whole_numbers_of_which_some_are_missing(kind):
    counts = pd.Series([0, 1, 5] * 100).astype(kind)
    frame = mixed().assign(count=counts.where(np.arange(300) % 7 > 0))
    assert frame["count"].dtype == counts.dtype
    drawn = []

    class Watched(Known):
        def score_samples(self, X):
            if len(X) == 900:
                drawn.append(X["count"])
            return np.asarray(X["size"], dtype=float)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(ColumnReplacement()(Watched(), frame))
        assert np.isfinite(MassVolume(n_points=900)(Watched(), frame))
    # Of the range from 0 to 5 what is above 3 is nearest to 5; each category is one unit.
    share = drawn[0].value_counts(normalize=True)
    assert share.sum() == pytest.approx(1)
    assert share[5] == pytest.approx(1 / 3 if kind == "category" else 0.4, abs=0.05)
    assert drawn[0].dtype == counts.dtype


@pytest.mark.parametrize("convert", [pl.from_pandas, pa.Table.from_pandas])
@pytest.mark.parametrize("kind", ["Int64", "UInt8"])
def test_whole_numbers_of_other_libraries_of_which_some_are_missing(kind, convert):
    counts = pd.Series([0, 1, 5] * 100).astype(kind)
    frame = pd.DataFrame({"size": np.linspace(0.0, 1.0, 300), "count": counts.where(np.arange(300) % 7 > 0)})
    drawn = []

    class Watched(Known):
        def score_samples(self, X):
            drawn.append(X["count"])
            return np.asarray(X["size"], dtype=float)

    for scorer in (ColumnReplacement(), MassVolume(n_points=300)):
        assert scorer(Watched(), convert(frame)) == scorer(Watched(), frame)
    for found in drawn:
        assert found.dtype == counts.dtype
        assert set(found.dropna()) <= {0, 1, 5}


def test_large_whole_numbers_stay_exact():
    large = pl.DataFrame({"id": [2**60 + 1, None, 2**60 + 3]})
    assert list(as_pandas(large)["id"].dropna()) == [2**60 + 1, 2**60 + 3]
    assert as_pandas(large.fill_null(0))["id"].dtype == np.int64
    assert as_pandas(large.to_arrow())["id"].dtype == "Int64"


def test_polars_frames_are_read_by_their_names():
    X, _ = correlated(100)
    frame = pd.DataFrame(X, columns=["a", "b"])
    detector = IsolationForest(random_state=0).fit(frame)
    for scorer in (MassVolume(n_points=200), ColumnReplacement()):
        assert scorer(detector, pl.from_pandas(frame)) == scorer(detector, frame)


def test_reference_points_keep_to_the_range_of_each_column():
    frame = mixed()
    seen = []

    class Watched(Known):
        def score_samples(self, X):
            seen.append(X)
            return np.zeros(len(X))

    MassVolume(n_points=2000)(Watched().fit(frame), frame)
    points = seen[1]
    assert list(points.columns) == list(frame.columns)
    assert points["size"].between(frame["size"].min(), frame["size"].max()).all()
    assert (
        stats.kstest((points["size"] - frame["size"].min()) / np.ptp(frame["size"]), "uniform").pvalue > 1e-3
    )
    assert points["level"].dtype == frame["level"].dtype
    assert points["flag"].dtype == bool
    # Whole numbers stay those that occur, each for the part of the range around it.
    assert set(points["count"]) == {0, 1, 5}
    assert points["count"].dtype == frame["count"].dtype
    assert (points["count"] == 5).mean() == pytest.approx(2 / 5, abs=0.05)
    # Categories and flags count alike, however rare.
    assert points["flag"].mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (MassVolume(levels=(0.9, 0.1)), r"levels must be two numbers.*\(0.9, 0.1\)"),
        (MassVolume(levels=0.9), r"levels must be two numbers.* got 0\.9"),
        (MassVolume(n_points=0), "n_points must be a positive integer, got 0"),
        (MassVolume(n_columns=0), "n_columns must be a positive integer, got 0"),
        (
            MassVolume(n_columns=3),
            "n_columns=3 columns and 2 rows are needed, and X has 2 columns and 40 rows",
        ),
        (ExcessMass(level=1), "level must lie between 0 and 1, got 1"),
        (ExcessMass(n_subsets=1.5), "n_subsets must be a positive integer, got 1.5"),
        (ColumnReplacement(reference="normal"), "reference must be 'uniform' or 'marginal', got 'normal'"),
        (ColumnReplacement(n_repeats=0), "n_repeats must be a positive integer, got 0"),
        (RankStability(n_fits=0), "n_fits must be a positive integer, got 0"),
    ],
)
def test_errors(scorer, message):
    X, _ = correlated(40)
    with pytest.raises(ValueError, match=message):
        scorer(Known(nearness).fit(X), X)


def test_images_are_refused():
    for scorer in (MassVolume(), ColumnReplacement()):
        with pytest.raises(
            ValueError, match=rf"{type(scorer).__name__} needs a table .* got shape \(5, 1, 8, 8\)"
        ):
            scorer(Known(nearness), np.zeros((5, 1, 8, 8)))
