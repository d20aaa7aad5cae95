"""Conformal p-values are valid: exactly where that is proved, within their bounds elsewhere, around any detector."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.compose import make_column_transformer
from sklearn.covariance import EllipticEnvelope
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, LeaveOneOut, RepeatedKFold
from sklearn.neighbors import KernelDensity, LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from anomalib_gen._outlier import subtract_scores
from anomalib_gen.calibration import (
    BootstrapConformalDetector,
    CrossConformalDetector,
    SplitConformalDetector,
    adjust_p_values,
    conditional_p_values,
    conformal,
    conformal_p_values,
)
from anomalib_gen.calibration.p_values import flagged_ranks


class Distance(OutlierMixin, BaseEstimator):
    """Minus the distance from the mean of the training rows."""

    def fit(self, X, y=None):
        self.mean_ = np.asarray(X).mean(axis=0)
        self.n_features_in_ = np.asarray(X).shape[1]
        return self

    def decision_function(self, X):
        return -np.linalg.norm(np.asarray(X) - self.mean_, axis=1)


class Rounded(Distance):
    """The same up to the last digits, which depend on how many rows there are."""

    def decision_function(self, X):
        return super().decision_function(X) * (1 + np.finfo(float).eps * (len(X) % 7 - 3))


def normals(n, seed, features=2):
    return np.random.default_rng(seed).normal(size=(n, features))


@pytest.fixture
def flags():
    """Rows of three flags: eight kinds, of which the rarest is about one in forty."""
    return (np.random.default_rng(0).uniform(size=(202, 3)) < 0.3).astype(float)


# The functions --------------------------------------------------------------------------------------------


def test_p_values_by_hand():
    reference = [3.0, 1.0, 2.0, 2.0]
    np.testing.assert_allclose(
        conformal_p_values([0.0, 1.0, 2.0, 2.5, 9.0], reference), [1 / 5, 2 / 5, 4 / 5, 4 / 5, 1]
    )
    np.testing.assert_allclose(conformal_p_values([-np.inf, np.inf], reference), [1 / 5, 1])


def test_split_p_values_have_their_exact_distribution():
    """Without ties the rank of a new row is uniform on 1 ... n + 1, whatever the scores' distribution."""
    random = np.random.default_rng(0)
    n, repetitions = 9, 20_000
    scores = random.standard_cauchy(size=(repetitions, n + 1))
    p = np.array([conformal_p_values(s[:1], s[1:])[0] for s in scores])
    counts = np.bincount(np.rint(p * (n + 1)).astype(int), minlength=n + 2)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3


def test_ties_make_p_values_larger_and_smoothing_makes_them_uniform():
    random = np.random.default_rng(0)
    draws = random.integers(3, size=(20_000, 8))
    plain = np.array([conformal_p_values(s[:1], s[1:])[0] for s in draws])
    smoothed = np.array(
        [
            conformal_p_values(s[:1], s[1:], smoothed=True, random_state=k)[0]
            for k, s in enumerate(draws[:4000])
        ]
    )
    for t in (0.125, 0.25, 0.5):
        error = np.sqrt(t * (1 - t) / len(plain))
        assert (plain <= t).mean() < t + 3 * error
    assert (plain <= 0.125).mean() < 0.1
    assert stats.kstest(smoothed, "uniform").pvalue > 1e-3
    arguments = {"smoothed": True, "random_state": 3}
    np.testing.assert_array_equal(
        conformal_p_values([1, 1], [1, 2], **arguments), conformal_p_values([1, 1], [1, 2], **arguments)
    )


def test_weights_repair_a_shift():
    """Calibration rows from N(0, 1), normal rows of today from N(1, 1), with the exact density ratio."""
    random = np.random.default_rng(0)
    x = random.normal(loc=1.0, size=20_000)
    calibration = random.normal(size=4000)
    # The score is the value itself.
    ratio = {
        "weights": np.exp(x - 0.5),
        "calibration_weights": np.exp(calibration - 0.5),
    }
    shifted, weighted = conformal_p_values(-x, -calibration), conformal_p_values(-x, -calibration, **ratio)
    assert (shifted <= 0.1).mean() > 0.3
    assert (weighted <= 0.1).mean() == pytest.approx(0.1, abs=0.025)
    even = {"weights": np.full(len(x), 7.0), "calibration_weights": np.full(4000, 7.0)}
    np.testing.assert_allclose(conformal_p_values(-x, -calibration, **even), shifted)


@pytest.mark.parametrize("method", ["simes", "dkw"])
@pytest.mark.parametrize("n", [20, 101])
def test_conditional_p_values_hold_for_all_levels_at_once(n, method):
    """b_j bounds the jth smallest of n uniforms for all j together, with probability 1 - delta at least."""
    delta = 0.2
    bounds = conditional_p_values(np.arange(1, n + 2) / (n + 1), n, delta=delta, method=method)
    assert bounds[-1] == 1
    assert (np.diff(bounds) >= 0).all()
    uniforms = np.sort(np.random.default_rng(0).uniform(size=(20_000, n)), axis=1)
    holds = (uniforms <= bounds[:-1]).all(axis=1).mean()
    assert holds >= 1 - delta - 3 * np.sqrt(delta * (1 - delta) / len(uniforms))
    # And not for nothing: a bound a good deal lower fails.
    tighter = 0.8 * bounds[:-1]
    assert (uniforms <= tighter).all(axis=1).mean() < 1 - delta


def test_simes_bounds_by_hand():
    # n = 4, k = 2: b_4 = b_5 = 1 by the convention of the product, b_j = 1 - sqrt(delta i (i - 1) / 12), i = 5 - j.
    bounds = conditional_p_values(np.arange(1, 6) / 5, 4, delta=0.09)
    expected = [1 - np.sqrt(0.09 * i * (i - 1) / 12) for i in (4, 3, 2, 1)]
    np.testing.assert_allclose(bounds, [*expected, 1.0])


def test_functions_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="calibration_scores is empty"):
        conformal_p_values([1.0], [])
    with pytest.raises(ValueError, match="scores must not be NaN, and 1 of 2 are, the first at 1"):
        conformal_p_values([0.0, np.nan], [1.0])
    with pytest.raises(ValueError, match=r"scores must be one number a row, got shape \(1, 1\)"):
        conformal_p_values([[1.0]], [1.0])
    with pytest.raises(ValueError, match="belong together"):
        conformal_p_values([1.0], [1.0], weights=[1.0])
    with pytest.raises(ValueError, match="calibration_weights must be 1 finite"):
        conformal_p_values([1.0], [1.0], weights=[1.0], calibration_weights=[-1.0])
    with pytest.raises(ValueError, match=r"p_values hold .*0\.3.*no multiple of 1 / \(n_calibration \+ 1\)"):
        conditional_p_values([0.3], 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (np.nan, np.inf, 0.0, 1.1):
            with pytest.raises(ValueError, match=f"p_values hold {value:g}, which"):
                conditional_p_values(np.append(np.full(3000, 0.5), value), 9)
    with pytest.raises(ValueError, match=r"n_calibration must be .*, got an array of shape \(3000,\)"):
        conditional_p_values([0.5], [0.1] * 3000)
    with pytest.raises(ValueError, match="n_calibration must be an integer of at least 2, got 1"):
        conditional_p_values([0.5], 1)
    with pytest.raises(ValueError, match="delta must lie between 0 and 1, got 1"):
        conditional_p_values([0.5], 3, delta=1)
    with pytest.raises(ValueError, match="method must be 'simes' or 'dkw'"):
        conditional_p_values([0.5], 3, method="exact")


def test_number_of_flagged_ranks_agrees_with_floating_point_comparison():
    for n in range(1, 300):
        for alpha in (0.01, 0.05, 0.07, 0.1, 0.29, 0.57):
            p = np.arange(1, n + 2) / (n + 1)
            assert flagged_ranks(alpha, n) == (p <= alpha).sum()


# The detectors --------------------------------------------------------------------------------------------

DETECTORS = [
    SplitConformalDetector(Distance(), random_state=0),
    CrossConformalDetector(Distance(), random_state=0),
    CrossConformalDetector(Distance(), cv=LeaveOneOut()),
    BootstrapConformalDetector(Distance(), n_estimators=7, random_state=0),
]
NAMES = ["split", "CV+", "jackknife+", "after-bootstrap"]


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
def test_p_values_of_new_normal_rows_are_valid(detector):
    """Split: exact distribution. Others: at most 2 t is proved, about t expected of so stable a detector."""
    n = 39
    p = []
    for seed in range(600):
        rows = normals(n + 5, seed)
        fitted = clone(detector).set_params(alpha=0.1)
        p.append(fitted.fit(rows[:n]).p_values(rows[n:])[0])
    p = np.array(p)
    for t in (0.05, 0.1, 0.3):
        exact = np.floor(t * (fitted.n_calibration_ + 1)) / (fitted.n_calibration_ + 1)
        error = np.sqrt(exact * (1 - exact) / len(p))
        assert (p <= t).mean() == pytest.approx(
            exact, abs=3.3 * error + (0.02 if detector is not DETECTORS[0] else 0)
        )


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
@pytest.mark.parametrize("alpha", [0.04, 0.05, 0.11, 0.3])
def test_predict_is_a_p_value_of_at_most_alpha(detector, alpha):
    fitted = clone(detector).set_params(alpha=alpha).fit(normals(99, 0))
    rows = np.vstack([normals(300, 1), 3 * normals(300, 2)])
    p = fitted.p_values(rows)
    np.testing.assert_array_equal(fitted.predict(rows), np.where(p <= alpha, -1, 1))
    np.testing.assert_allclose(fitted.decision_function(rows), fitted.score_samples(rows) - fitted.offset_)
    assert len(np.unique(fitted.score_samples(rows))) == len(
        rows
    )  # finer than p-values, so that ranks are kept
    assert stats.spearmanr(fitted.score_samples(rows), p).statistic > 0.95
    np.testing.assert_allclose(np.rint(p * (fitted.n_calibration_ + 1)), p * (fitted.n_calibration_ + 1))
    # A row has the p-value and score it has alone.
    np.testing.assert_array_equal(fitted.p_values(rows[:1]), p[:1])
    np.testing.assert_array_equal(fitted.score_samples(rows[7:8]), fitted.score_samples(rows)[7:8])


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
def test_rows_that_repeat_tie_whatever_number_of_them_is_scored(detector, flags):
    fitted = clone(detector).set_params(estimator=Rounded(), alpha=0.1).fit(flags)
    exact = clone(detector).set_params(alpha=0.1).fit(flags)
    for n in range(1, 8):
        np.testing.assert_array_equal(fitted.p_values(flags[:n]), exact.p_values(flags[:n]))
        np.testing.assert_array_equal(fitted.predict(flags[:n]), exact.predict(flags[:n]))
    p = fitted.p_values(flags)
    np.testing.assert_array_equal(fitted.predict(flags), np.where(p <= 0.1, -1, 1))


def test_ties_up_to_rounding_by_hand():
    nearly = np.array([-3.0, 1e-30, 2.0, 1e30]) * (1 + 1e-15)
    reference = nearly / (1 + 1e-15)
    np.testing.assert_allclose(conformal_p_values(nearly[::-1], reference), [1, 4 / 5, 3 / 5, 2 / 5])
    np.testing.assert_allclose(
        conformal_p_values(2 * reference - nearly, reference), [2 / 5, 3 / 5, 4 / 5, 1]
    )
    np.testing.assert_allclose(conformal_p_values([0.0, -3.0001, 2.0001], reference), [2 / 5, 1 / 5, 4 / 5])
    infinite = np.array([-np.inf, np.inf])
    np.testing.assert_array_equal(subtract_scores(infinite, infinite[::-1]), infinite)
    np.testing.assert_array_equal(subtract_scores(infinite, infinite), [0, 0])
    np.testing.assert_array_equal(subtract_scores(nearly, reference), np.zeros(4))


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_rows_outside_the_support_of_a_density_tie(detector, alpha, recwarn):
    # A density of bounded kernels is zero, and its logarithm -inf, for one new row in five, of whatever fold.
    density = KernelDensity(kernel="tophat", bandwidth=0.25)
    fitted = clone(detector).set_params(estimator=density, alpha=alpha).fit(normals(99, 0))
    rows = np.vstack([normals(300, 1), normals(3, 2) + 50])
    scores = fitted.calibration_scores_
    assert np.isinf(scores).mean() > 0.1
    p = fitted.p_values(rows)
    # Normal rows lie outside too, and none of these can be told from one far away.
    assert p[-1] == p.min() == (1 + np.isneginf(scores).sum()) / (1 + len(scores))
    np.testing.assert_array_equal(fitted.predict(rows), np.where(p <= alpha, -1, 1))
    assert not np.isnan(fitted.score_samples(rows)).any()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_jackknife_by_hand():
    X = np.array([[0.0], [1.0], [5.0]])
    detector = CrossConformalDetector(Distance(), cv=LeaveOneOut(), alpha=0.5).fit(X)
    # Means without each row: 3, 2.5, 0.5; distances of the rows left out: 3, 1.5, 4.5.
    np.testing.assert_allclose(detector.calibration_scores_, [-3, -1.5, -4.5])
    # x = 6: distances 3, 3.5, 5.5, each at least that of the row: none of the rows is as far.
    np.testing.assert_allclose(detector.p_values([[6.0], [6.1], [2.0]]), [(1 + 1) / 4, 1 / 4, (1 + 3) / 4])
    # Margins of x = 2 are -3 + 1 = -2, -1.5 + .5 = -1, -4.5 + 1.5 = -3; the second smallest is -2, that of scores -3.
    np.testing.assert_allclose(detector.score_samples([[2.0]]), [-3 + 2])
    assert detector.offset_ == -3


def test_bootstrap_uses_only_models_that_missed_a_row():
    X = normals(30, 0)
    detector = BootstrapConformalDetector(Distance(), n_estimators=4, random_state=1).fit(X)
    random = np.random.RandomState(1)
    samples = [random.randint(30, size=30) for _ in range(4)]
    missed = np.array([[i not in sample for i in range(30)] for sample in samples])
    means = [X[sample].mean(axis=0) for sample in samples]
    expected = [
        np.mean([-np.linalg.norm(X[i] - means[b]) for b in range(4) if missed[b, i]])
        for i in range(30)
        if missed[:, i].any()
    ]
    assert detector.n_calibration_ == len(expected) < 30
    np.testing.assert_allclose(detector.calibration_scores_, expected)


def test_blocks_change_nothing(monkeypatch):
    fitted = CrossConformalDetector(Distance(), random_state=0).fit(normals(50, 0))
    rows = normals(20, 1)
    before = fitted.p_values(rows), fitted.score_samples(rows)
    monkeypatch.setattr(conformal, "COMPARED_VALUES", 150)
    np.testing.assert_array_equal(fitted.p_values(rows), before[0])
    np.testing.assert_array_equal(fitted.score_samples(rows), before[1])


def test_too_few_rows_flag_nothing_and_say_so():
    for kind, n in (
        (CrossConformalDetector, 20),
        (BootstrapConformalDetector, 20),
        (SplitConformalDetector, 40),
    ):
        fitted = kind(Distance(), alpha=0.01, random_state=0)
        with pytest.warns(UserWarning, match=r"alpha=0.01 is below 1 / \(n \+ 1\).*n = 20") as caught:
            fitted.fit(normals(n, 0))
        assert [warning.filename for warning in caught] == [__file__]
    assert (fitted.predict(100 * normals(50, 1)) == 1).all()
    assert np.isfinite(fitted.score_samples(normals(5, 1))).all()


# Any detector ---------------------------------------------------------------------------------------------


def test_detectors_of_this_package_and_of_scikit_learn(tiny):
    X, far = normals(200, 0), np.full((1, 2), 20.0)
    for estimator in (
        tiny(),
        IsolationForest(n_estimators=20, random_state=0),
        LocalOutlierFactor(novelty=True),
        EllipticEnvelope(random_state=0),
        KernelDensity(),
        make_pipeline(StandardScaler(), KernelDensity()),
        GridSearchCV(KernelDensity(), {"bandwidth": [0.1, 1.0]}, cv=2),
    ):
        fitted = SplitConformalDetector(estimator, random_state=0).fit(X)
        assert fitted.p_values(far) == 1 / 101
        assert fitted.predict([[0.0, 0.0]]) == 1


def test_pyod_scores_are_turned_around():
    ecod = pytest.importorskip("pyod.models.ecod").ECOD
    X, far = normals(200, 0), np.full((1, 2), 20.0)
    for detector in (
        SplitConformalDetector(ecod(), random_state=0),
        SplitConformalDetector(make_pipeline(StandardScaler(), ecod()), random_state=0),
        CrossConformalDetector(ecod(), random_state=0),
        BootstrapConformalDetector(ecod(), n_estimators=8, random_state=0),
    ):
        fitted = clone(detector).fit(X)
        assert fitted.p_values(far) == 1 / (fitted.n_calibration_ + 1)
        assert fitted.predict(far) == -1
    plain = ecod().fit(X[:100])
    frozen = SplitConformalDetector(FrozenEstimator(plain)).fit(X[100:])
    np.testing.assert_allclose(frozen.score_samples(far), -plain.decision_function(far))


class Unknown(BaseEstimator):
    """A detector that says nothing of its scores."""

    def fit(self, X, y=None):
        self.mean_ = np.asarray(X).mean(axis=0)
        return self

    def decision_function(self, X):
        return np.linalg.norm(np.asarray(X) - self.mean_, axis=1)


def test_an_unknown_direction_is_not_guessed():
    X, far = normals(100, 0), [[9.0, 9.0]]
    with pytest.raises(
        TypeError, match=r"high score of Unknown means is not known.*score_direction='normal'"
    ):
        SplitConformalDetector(Unknown()).fit(X)
    assert SplitConformalDetector(Unknown(), score_direction="abnormal").fit(X).p_values(far) == 1 / 51
    assert SplitConformalDetector(Unknown(), score_direction="normal").fit(X).p_values(far) == 1


def test_what_cannot_score_new_rows_is_refused():
    X = normals(100, 0)
    with pytest.raises(TypeError, match=r"neither score_samples nor decision_function.*novelty=True"):
        SplitConformalDetector(LocalOutlierFactor()).fit(X)
    with pytest.raises(TypeError, match="StandardScaler has neither score_samples nor decision_function"):
        SplitConformalDetector(StandardScaler()).fit(X)

    class Wide(Unknown):
        def decision_function(self, X):
            return np.asarray(X)

    class Broken(Unknown):
        def decision_function(self, X):
            return np.full(len(X), np.nan)

    with pytest.raises(ValueError, match=r"returned scores of shape \(50, 2\) for 50 rows"):
        SplitConformalDetector(Wide(), score_direction="normal").fit(X)
    with pytest.raises(ValueError, match="returned NaN for row 0"):
        SplitConformalDetector(Broken(), score_direction="normal").fit(X)


def test_a_frozen_estimator_is_calibrated_on_all_rows():
    inner = Distance().fit(normals(50, 0))
    fitted = SplitConformalDetector(FrozenEstimator(inner)).fit(normals(99, 1))
    assert fitted.n_calibration_ == 99
    assert fitted.estimator_.estimator is inner
    with pytest.raises(NotFittedError):
        SplitConformalDetector(FrozenEstimator(Distance())).fit(normals(9, 1))
    for detector in (CrossConformalDetector, BootstrapConformalDetector):
        with pytest.raises(ValueError, match=f"frozen, but {detector.__name__} fits it to parts"):
            detector(FrozenEstimator(inner)).fit(normals(99, 1))


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
def test_a_warning_that_is_an_error_leaves_the_former_fit(detector):
    rows = normals(5, 1)
    fitted = clone(detector).fit(normals(40, 0))
    before = fitted.p_values(rows), fitted.score_samples(rows)
    fitted.set_params(alpha=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"alpha=0\.001 is below"):
            fitted.fit(normals(20, 2, features=3))
    assert fitted.n_features_in_ == 2
    np.testing.assert_array_equal(fitted.p_values(rows), before[0])
    np.testing.assert_array_equal(fitted.score_samples(rows), before[1])


def test_folds_must_not_overlap():
    with pytest.raises(ValueError, match="holds a row out more than once"):
        CrossConformalDetector(Distance(), cv=RepeatedKFold(n_splits=2, n_repeats=2)).fit(normals(20, 0))
    with pytest.raises(ValueError, match="cv=5 folds need as many rows, got n_samples=4"):
        CrossConformalDetector(Distance()).fit(normals(4, 0))


def test_folds_may_be_masks():
    X = normals(40, 0)
    first = np.arange(40) < 15
    masks, positions = [(~first, first)], [(np.flatnonzero(~first), np.flatnonzero(first))]
    a, b = (CrossConformalDetector(Distance(), alpha=0.2, cv=cv).fit(X) for cv in (masks, positions))
    assert a.n_calibration_ == 15
    np.testing.assert_array_equal(a.p_values(normals(5, 1)), b.p_values(normals(5, 1)))
    once = CrossConformalDetector(Distance(), alpha=0.2, cv=iter(masks)).fit(X)
    with pytest.raises(ValueError, match="has no folds, as an iterator that was used before"):
        once.fit(X)


@pytest.mark.parametrize("detector", DETECTORS, ids=NAMES)
def test_clone_parameters_pickle_and_seeds(detector):
    detector = clone(detector).set_params(estimator=IsolationForest(n_estimators=3), alpha=0.2)
    if "cv" in detector.get_params():
        detector.set_params(cv=3)
    detector.set_params(estimator__max_samples=16, random_state=5)
    X, rows = normals(60, 0), normals(20, 1)
    a, b = clone(detector).fit(X), clone(detector).fit(X)
    np.testing.assert_array_equal(a.p_values(rows), b.p_values(rows))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(a)).p_values(rows), a.p_values(rows))
    assert detector.estimator.random_state is None
    assert (clone(detector).set_params(random_state=6).fit(X).p_values(rows) != a.p_values(rows)).any()
    with pytest.raises(NotFittedError):
        detector.p_values(rows)


def test_data_frames_reach_the_pipeline_inside():
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"a": random.normal(size=120), "kind": random.choice(["x", "y"], size=120)})
    encode = make_column_transformer(
        (StandardScaler(), ["a"]), (OneHotEncoder(sparse_output=False), ["kind"])
    )
    for detector in DETECTORS:
        fitted = clone(detector).set_params(estimator=make_pipeline(encode, Distance()))
        if isinstance(fitted, CrossConformalDetector):
            fitted.set_params(cv=3)
        fitted.fit(frame)
        assert list(fitted.feature_names_in_) == ["a", "kind"]
        assert fitted.p_values(pd.DataFrame({"a": [30.0], "kind": ["x"]})) < 0.05
    # And a conformal detector may itself end a pipeline.
    outer = make_pipeline(PCA(n_components=2), SplitConformalDetector(Distance(), random_state=0))
    assert outer.fit(normals(100, 0, features=4)).predict([[50.0, 0, 0, 0]]) == -1


# False discoveries ----------------------------------------------------------------------------------------


def test_benjamini_hochberg_controls_false_discoveries_with_conformal_p_values():
    """60 normal rows and 40 anomalies per batch, one shared calibration set each: FDR at most 0.2 * 0.6."""
    random = np.random.default_rng(0)
    alpha, proportions, power = 0.2, {"bh": [], "storey": []}, {"bh": [], "storey": []}
    for _ in range(1000):
        calibration = random.normal(size=200)
        scores = np.concatenate([random.normal(size=60), random.normal(-3, size=40)])
        p = conformal_p_values(scores, calibration)
        for method in proportions:
            flagged = adjust_p_values(p, method=method) <= alpha
            proportions[method].append(flagged[:60].sum() / max(flagged.sum(), 1))
            power[method].append(flagged[60:].mean())
    error = {method: np.std(values) / np.sqrt(len(values)) for method, values in proportions.items()}
    assert np.mean(proportions["bh"]) <= 0.6 * alpha + 3 * error["bh"]
    assert np.mean(proportions["storey"]) <= alpha + 3 * error["storey"]
    assert np.mean(proportions["storey"]) > 0.6 * alpha  # the slack is used
    assert np.mean(power["storey"]) > np.mean(power["bh"]) > 0.5
    # While a p-value of 0.2 alone is no discovery: without adjustment far more flags are false.
    assert 60 * alpha / (60 * alpha + 40) > alpha
