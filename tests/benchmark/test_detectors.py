import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import IsolationForest
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.svm import OneClassSVM

from anomalib_gen.benchmark import (
    DEEP_PEERS,
    IMAGE_PEERS,
    PEERS,
    KNNDistance,
    OnPrincipalComponents,
    anomaly_metrics,
    library_detectors,
    parse_detector,
    parse_detectors,
    score_rows,
)
from anomalib_gen.benchmark.sources import find_image_sources, find_sources


def test_parse_class_with_literals():
    detector = parse_detector('my flow = a.b.C(x="maf", n=8, r=1e-3, deep={"k": [1, (2, None)]})')
    assert detector.name == "my flow"
    assert detector.path == "a.b.C"
    assert dict(detector.arguments) == {"x": "maf", "n": 8, "r": 0.001, "deep": {"k": [1, (2, None)]}}
    assert parse_detector(f"other={detector.specification}").specification == detector.specification


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sklearn.svm.OneClassSVM", "OneClassSVM"),
        ("sklearn.svm.OneClassSVM()", "OneClassSVM"),
        ("sklearn.svm.OneClassSVM(nu=0.1)", "OneClassSVM(nu=0.1)"),
        ("kNN(1)=anomalib_gen.benchmark.KNNDistance(n_neighbors=1)", "kNN(1)"),
    ],
)
def test_names(text, name):
    assert parse_detector(text).name == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "IsolationForest",
        "=a.b.C()",
        "a.b.C(1)",
        "a.b.C(x=open('f'))",
        "a.b.C(x=1 if True else 2)",
        "a.b.C(**{'x': 1})",
        "a.b.C(x=y)",
        "a.b.C(x=[i for i in (1, 2)])",
        "a.b.C()()",
        "a.b.C().fit",
        "a['b'].C()",
        "(lambda: 1)()",
        "__import__('os').system('true')",
        "a.b.C(); import os",
        "a.b.C(x=f'{1}')",
        "a.b.C(x=1, x=2)",
    ],
)
def test_parser_rejects_all_but_paths_and_literals(text):
    with pytest.raises(ValueError, match="not understood"):
        parse_detector(text)


@pytest.mark.parametrize(
    "text", ["os.system(command='true')", "builtins.dict(x=1)", "numpy.random.default_rng"]
)
def test_only_classes_with_fit_are_called(text):
    with pytest.raises(TypeError, match="class with a fit method"):
        parse_detector(text).build(seed=0, n_features=2)


def test_missing_module_is_named():
    with pytest.raises(ImportError, match=r"no_such_package\.Thing"):
        parse_detector("no_such_package.Thing()").resolve()


def test_a_text_in_place_of_a_list_is_no_list_of_letters():
    with pytest.raises(TypeError, match=r"detectors must be a list, got the text 'a\.b\.C'"):
        parse_detectors("a.b.C")
    for find in (find_sources, find_image_sources):
        with pytest.raises(TypeError, match="datasets must be a list, got the text 'mnist:not-1'"):
            find("mnist:not-1", None)


def test_equal_names_of_different_detectors_are_refused():
    assert len(parse_detectors(["a.b.C", "a.b.C()"])) == 1
    with pytest.raises(ValueError, match="other name="):
        parse_detectors(["a.b.C", "x.y.C"])


def test_random_state_is_the_seed_unless_given():
    assert parse_detector("sklearn.ensemble.IsolationForest").build(seed=7, n_features=2).random_state == 7
    given = parse_detector("sklearn.ensemble.IsolationForest(random_state=3)")
    assert given.build(seed=7, n_features=2).random_state == 3
    parse_detector("sklearn.svm.OneClassSVM").build(seed=7, n_features=2)


def test_peer_sets_are_what_the_names_say():
    assert [peer.name for peer in parse_detectors(["peers"])] == [peer.name for peer in PEERS]
    assert len(PEERS) == 11
    assert len(DEEP_PEERS) == 3
    pytest.importorskip("pyod")
    for peer in PEERS:
        peer.build(seed=0, n_features=4)
    deep = DEEP_PEERS[2].build(seed=5, n_features=4)
    assert (deep.n_features, deep.random_state) == (4, 5)


def test_the_library_is_found_with_all_its_methods():
    found = library_detectors()
    assert parse_detectors(["library"]) == list(found)
    names = [detector.name for detector in found]
    assert {"DiffusionDetector", "EnergyDetector", "FlowDetector", "VAEDetector"} <= set(names)
    assert {"FlowDetector maf", "DiffusionDetector closed-form", "VAEDetector iwae"} <= set(names)
    # What a default stands for is not run twice.
    twice = {
        "DiffusionDetector hybrid",
        "DiffusionDetector denoising",
        "FlowDetector realnvp",
        "VAEDetector elbo",
    }
    assert not twice & set(names)
    assert len(set(names)) == len(names)
    built = [detector.build(seed=0, n_features=3) for detector in found]
    for family in {type(detector) for detector in built}:
        ours = [detector for detector in built if type(detector) is family]
        for parameter, known in (("objective", family._objectives), ("anomaly", family._anomalies)):
            if parameter in family().get_params():
                named = {getattr(detector, parameter) for detector in ours} - {None}
                assert len(set(known) - named) <= 1


def test_the_library_for_images_has_the_anomalies_and_the_defaults_of_images():
    found = library_detectors(images=True)
    assert parse_detectors(["library"], images=True) == list(found)
    names = {detector.name for detector in found}
    assert names >= {f"{family} input_complexity" for family in ("DiffusionDetector", "EnergyDetector")}
    assert names >= {f"{family} input_complexity" for family in ("FlowDetector", "VAEDetector")}
    assert {name for name in names if name.endswith("multiscale_reconstruction")} == {
        "DiffusionDetector multiscale_reconstruction",
        "VAEDetector multiscale_reconstruction",
    }
    assert {"FlowDetector realnvp", "DiffusionDetector network", "DiffusionDetector hybrid"} <= names
    assert not {"FlowDetector glow", "DiffusionDetector closed-form", "DiffusionDetector closed_form"} & names
    assert not any("input_complexity" in detector.name for detector in library_detectors())


@pytest.fixture
def cloud():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(120, 4))
    test = np.r_[rng.normal(size=(40, 4)), rng.normal(6, 1, size=(20, 4))]
    return train, test, np.r_[np.ones(40, int), -np.ones(20, int)]


SLOW = ("HBOS", "CBLOF", "COPOD", "PCA")  # pyod compiles these on first use


@pytest.mark.parametrize(
    "detector",
    [pytest.param(d, id=d.name, marks=[pytest.mark.slow] if d.name.endswith(SLOW) else []) for d in PEERS],
)
def test_every_adapter_scores_anomalies_lower(detector, cloud):
    if detector.path.startswith("pyod"):
        pytest.importorskip("pyod")
    train, test, y = cloud
    estimator = detector.build(seed=0, n_features=4).fit(train)
    auroc, precision = anomaly_metrics(y, score_rows(estimator, test))
    assert auroc > 0.95
    assert precision > 0.9


def test_scikit_learn_detectors_keep_their_own_scores(cloud):
    train, test, _ = cloud
    for estimator in (IsolationForest(random_state=0), OneClassSVM(), LocalOutlierFactor(novelty=True)):
        estimator.fit(train)
        np.testing.assert_array_equal(score_rows(estimator, test), estimator.score_samples(test))


def test_unscorable_detectors_say_so(cloud):
    train, test, _ = cloud
    with pytest.raises(TypeError, match="novelty=True"):
        score_rows(LocalOutlierFactor().fit(train), test)


def test_a_high_decision_is_normal_but_for_pyod(cloud):
    """Unlike the detectors of `calibration`, a benchmark cannot ask for the direction."""
    train, test, _ = cloud

    class Decisions(BaseEstimator):
        def decision_function(self, X):
            return X[:, 0]

    np.testing.assert_array_equal(score_rows(Decisions(), test), test[:, 0])
    ecod = pytest.importorskip("pyod.models.ecod").ECOD().fit(train)
    for estimator in (ecod, make_pipeline(FrozenEstimator(ecod))):
        np.testing.assert_array_equal(score_rows(estimator, test), -ecod.decision_function(test))


def test_knn_distance_by_hand():
    X = np.array([[0.0], [1.0], [5.0]])
    scores = KNNDistance(n_neighbors=2).fit(X).score_samples([[0.0], [9.0]])
    np.testing.assert_allclose(scores, [-0.5, -6.0])
    assert clone(KNNDistance(n_neighbors=2)).n_neighbors == 2


def test_a_detector_on_principal_components_by_hand():
    rng = np.random.default_rng(0)
    X = np.c_[10 * rng.normal(size=50), rng.normal(size=(50, 3))] @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    one = OnPrincipalComponents(
        detector="anomalib_gen.benchmark.KNNDistance(n_neighbors=1)", n_components=1, random_state=0
    ).fit(X)
    axis = np.linalg.svd(X - X.mean(axis=0))[2][0]
    new = rng.normal(size=(6, 4))
    np.testing.assert_allclose(one.score_samples(new), -np.abs(new @ axis - (X @ axis)[:, None]).min(axis=0))
    # No fewer rows than components: all of them, which keep distances.
    every = clone(one).set_params(n_components=64).fit(X)
    np.testing.assert_allclose(
        every.score_samples(new), KNNDistance(n_neighbors=1).fit(X).score_samples(new), rtol=1e-10
    )


@pytest.mark.parametrize("detector", ["sklearn.ensemble.IsolationForest", "pyod.models.ecod.ECOD"])
def test_detectors_of_either_direction_see_principal_components(detector, cloud):
    pytest.importorskip("pyod")
    train, test, y = cloud
    wrapped = OnPrincipalComponents(detector=detector, n_components=2, random_state=3)
    scores = wrapped.fit(train).score_samples(test)
    assert anomaly_metrics(y, scores)[0] > 0.8
    np.testing.assert_array_equal(clone(wrapped).fit(train).score_samples(test), scores)


def test_peers_of_images_have_the_names_of_peers():
    assert parse_detectors(["peers"], images=True) == list(IMAGE_PEERS)
    assert len(IMAGE_PEERS) == 5
    assert {"kNN(1), 64 PCA", "sklearn.IsolationForest, 64 PCA"} <= {peer.name for peer in IMAGE_PEERS}
    assert parse_detectors(["deep-peers"], images=True) == list(DEEP_PEERS)
    for detector in IMAGE_PEERS:
        assert parse_detector(f"{detector.name}={detector.specification}") == detector


def test_metric_directions_by_hand():
    y = np.array([1, 1, 1, -1, -1])
    # Ordered from most abnormal: anomaly, normal, anomaly, normal, normal.
    scores = np.array([-4.0, 2.0, 3.0, -9.0, -1.0])
    auroc, precision = anomaly_metrics(y, scores)
    assert auroc == pytest.approx(5 / 6)
    assert precision == pytest.approx((1 + 2 / 3) / 2)
    assert anomaly_metrics(y, -scores)[0] == pytest.approx(1 / 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ValueError, match="not finite for 1 of 3"):
        anomaly_metrics([1, -1, 1], [0.0, bad, 1.0])
