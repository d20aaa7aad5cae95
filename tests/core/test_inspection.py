"""Displays show the numbers they are given, on the axes they are given, and import matplotlib only to draw."""

import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.ensemble import IsolationForest
from sklearn.impute import SimpleImputer
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from anomalib_gen import DiffusionDetector, VAEDetector, inspection
from anomalib_gen.calibration import SplitConformalDetector
from anomalib_gen.explain import feature_contributions
from anomalib_gen.heatmaps import KINDS, explain_images
from anomalib_gen.images import ChannelsFirst
from anomalib_gen.inspection import (
    DetectionCurveDisplay,
    FeatureContributionsDisplay,
    ImageHeatmapDisplay,
    LandscapeDisplay,
    LatentSpaceDisplay,
    LossCurveDisplay,
    PValueDisplay,
    SamplesDisplay,
    ScoreHistogramDisplay,
    TopAnomaliesDisplay,
)
from anomalib_gen.inspection.images import UNITS

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def figures():
    matplotlib.use("Agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def new_axes():
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


@pytest.fixture
def labelled(fitted, X):
    rows = np.vstack([X[:60], X[:20] + np.array([5.0, -5.0, 20.0])])
    return rows, np.repeat([1, -1], [60, 20])


def test_matplotlib_is_imported_to_draw_only():
    code = "import sys; import anomalib_gen.inspection; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_histogram_counts_every_row(fitted, labelled):
    rows, y = labelled
    ax = new_axes()
    display = ScoreHistogramDisplay.from_estimator(fitted, rows, y, ax=ax)
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    np.testing.assert_array_equal(display.scores, fitted.score_samples(rows))
    assert display.threshold == fitted.offset_
    # Filled bars of each group add up to one.
    filled = [c for c in ax.containers if len(c) == 50]
    assert [sum(bar.get_height() for bar in bars) for bars in filled] == pytest.approx([1, 1])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    flagged = (display.scores < fitted.offset_).mean()
    assert labels == ["normal (60)", "anomaly (20)", f"threshold ({flagged:.1%} below)"]
    assert ax.get_title() == "FlowDetector"


def test_histogram_says_what_lies_outside():
    scores = np.r_[np.random.default_rng(0).normal(size=100), -1e6, -1e7]
    display = ScoreHistogramDisplay.from_predictions(scores, threshold=-2.0)
    assert display.ax_.get_xlabel().endswith("counted at the edge: 2 rows farther left")
    both = ScoreHistogramDisplay.from_predictions(np.r_[scores, 1e6])
    assert "2 rows farther left, 1 row farther right" in both.ax_.get_xlabel()
    assert display.ax_.get_xlim()[0] > -100
    again = display.plot(bins=10)
    assert again is display
    assert ScoreHistogramDisplay.from_predictions(np.ones(5)).ax_.get_title() == ""


def test_histogram_of_pyod_is_turned_around(X):
    ecod = pytest.importorskip("pyod.models.ecod").ECOD().fit(X)
    display = ScoreHistogramDisplay.from_estimator(ecod, X)
    np.testing.assert_allclose(display.scores, -ecod.decision_function(X))
    assert (display.scores < display.threshold).mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("kind", ["roc", "precision-recall"])
def test_curves_have_the_areas_of_scikit_learn(fitted, labelled, kind):
    rows, y = labelled
    display = DetectionCurveDisplay.from_estimator(fitted, rows, y, kind=kind, n_resamples=100)
    anomaly = -fitted.score_samples(rows)
    area = {"roc": roc_auc_score, "precision-recall": average_precision_score}[kind](y == -1, anomaly)
    assert display.area == pytest.approx(area)
    assert display.interval[0] <= area <= display.interval[1]
    assert (display.low <= display.high).all()
    assert f"{area:.3f}" in display.ax_.get_legend().get_texts()[0].get_text()
    # A second detector on the same axes; chance is drawn once.
    n = len(display.ax_.lines)
    IF = IsolationForest(random_state=0).fit(rows[:60])
    DetectionCurveDisplay.from_estimator(IF, rows, y, kind=kind, n_resamples=10, ax=display.ax_, color="k")
    assert len(display.ax_.lines) == n + 1


def test_bootstrap_interval_has_the_width_of_theory():
    """Standard error of an AUC after Hanley and McNeil (1982), for normals of N(0, 1) and anomalies of N(-1, 1)."""
    random = np.random.default_rng(0)
    y = np.repeat([1, -1], [400, 100])
    scores = random.normal(size=500) - (y == -1)
    display = DetectionCurveDisplay.from_predictions(y, scores, n_resamples=400)
    A = stats.norm.cdf(1 / np.sqrt(2))
    q1, q2 = A / (2 - A), 2 * A**2 / (1 + A)
    error = np.sqrt((A * (1 - A) + 99 * (q1 - A**2) + 399 * (q2 - A**2)) / (100 * 400))
    assert np.diff(display.interval)[0] == pytest.approx(2 * 1.96 * error, rel=0.25)
    again = DetectionCurveDisplay.from_predictions(y, scores, n_resamples=400)
    assert again.interval == display.interval


def test_p_values_are_shown_by_their_shares(X):
    random = np.random.default_rng(0)
    detector = SplitConformalDetector(IsolationForest(n_estimators=20, random_state=0), random_state=0).fit(X)
    display = PValueDisplay.from_estimator(detector, X[:50])
    assert display.name == "SplitConformalDetector of IsolationForest"
    np.testing.assert_array_equal(display.p_values, np.sort(detector.p_values(X[:50])))
    line = display.ax_.lines[-1]
    shown = dict(zip(*line.get_data(), strict=True))
    p = display.p_values[20]
    assert shown[p] == (display.p_values <= p).mean()
    PValueDisplay.from_predictions(random.uniform(size=100), log=False)
    with pytest.raises(TypeError, match="IsolationForest has no p_values"):
        PValueDisplay.from_estimator(IsolationForest().fit(X), X)
    with pytest.raises(ValueError, match=r"p_values must lie in \[0, 1\]"):
        PValueDisplay.from_predictions([0.5, 2.0])


@pytest.fixture(scope="module")
def plane():
    return np.random.default_rng(0).normal(size=(150, 2))


def test_landscape_is_the_score_over_the_plane(tiny, plane):
    detector = tiny().fit(plane)
    display = LandscapeDisplay.from_estimator(detector, plane, np.ones(150, dtype=int), resolution=20)
    i, j = 3, 11
    score = detector.score_samples([[display.x[j], display.y[i]]])
    assert display.values[i, j] == pytest.approx(score[0])
    assert display.threshold == detector.offset_
    energy = LandscapeDisplay.from_estimator(detector, plane, response_method="energy", resolution=10)
    assert energy.threshold is None
    exact = LandscapeDisplay.from_estimator(detector, plane, response_method="log_prob", resolution=10)
    np.testing.assert_allclose(exact.values, -energy.values)
    assert exact.figure_.axes[-1].get_ylabel() == "log-density in nats"
    frame = pd.DataFrame(plane, columns=["speed", "fuel"])
    named = LandscapeDisplay.from_estimator(tiny().fit(frame), frame, resolution=10)
    assert (named.ax_.get_xlabel(), named.ax_.get_ylabel()) == ("speed", "fuel")
    pipeline = make_pipeline(StandardScaler(), tiny()).fit(plane)
    assert LandscapeDisplay.from_estimator(pipeline, plane, resolution=10).name == "FlowDetector"
    with pytest.raises(ValueError, match=r"two columns to be drawn in a plane, got shape \(3, 3\)"):
        LandscapeDisplay.from_estimator(detector, np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"two columns to be drawn in a plane, got shape \(3, 3\)"):
        LandscapeDisplay.from_estimator(
            detector, pd.DataFrame(np.zeros((3, 3))).assign(kind="car").iloc[:, 1:]
        )
    with pytest.raises(ValueError, match=r"not real numbers in column 'fuel' \(e.g. 'oil'\)"):
        LandscapeDisplay.from_estimator(detector, frame.assign(fuel="oil"))
    gaps = np.vstack([plane, [np.nan, 0.0]])
    filling = make_pipeline(SimpleImputer(), tiny()).fit(gaps)
    shown = LandscapeDisplay.from_estimator(filling, gaps, resolution=10)
    assert shown.x[0] < plane[:, 0].min()
    assert shown.x[-1] > plane[:, 0].max()
    with pytest.raises(ValueError, match="without a finite value"):
        LandscapeDisplay.from_estimator(filling, gaps[-1:])


def test_landscape_of_a_constant(plane):
    detector = SplitConformalDetector(IsolationForest(n_estimators=5, random_state=0), random_state=0)
    detector.fit(np.tile([1.0, 2.0], (50, 1)))
    display = LandscapeDisplay.from_estimator(detector, plane, response_method="p_values", resolution=10)
    assert (display.values == 1).all()
    for value in (-1e6, 1e12):
        LandscapeDisplay(
            x=display.x,
            y=display.y,
            values=np.full((10, 10), value),
            rows=plane,
            labels=None,
            threshold=None,
            feature_names=["a", "b"],
            response="score",
        ).plot().figure_.canvas.draw()


def test_landscape_of_other_libraries(plane):
    pyod = pytest.importorskip("pyod.models.knn")
    detector = pyod.KNN().fit(plane)
    assert LandscapeDisplay.from_estimator(detector, plane, resolution=5).threshold == -detector.threshold_
    density = KernelDensity(kernel="tophat").fit(plane)
    with pytest.raises(ValueError, match=r"score_samples of points must be finite, and \d+ of 400 are not"):
        LandscapeDisplay.from_estimator(density, plane, resolution=20)


def test_loss_curve_ends_at_the_last_step(fitted, X):
    display = LossCurveDisplay.from_estimator(make_pipeline(fitted))
    assert display.steps[-1] == fitted.n_iter_
    assert len(display.steps) == len(fitted.loss_curve_)
    assert display.best_step == fitted.best_iter_
    with pytest.raises(TypeError, match="IsolationForest keeps no loss_curve_"):
        LossCurveDisplay.from_estimator(IsolationForest().fit(X))


def drawn_losses(detector):
    """Steps of the points of both curves, and of the line at the weights kept, as they are drawn."""
    lines = LossCurveDisplay.from_estimator(detector).ax_.lines
    return [list(line.get_xdata()) for line in lines[:2]], lines[-1].get_xdata()[0]


def test_losses_are_drawn_at_the_steps_of_their_evaluations(X):
    detector = VAEDetector(max_iter=60, warm_start=True, random_state=0, device="cpu").fit(X)
    assert drawn_losses(detector)[0] == [[25, 50, 60]] * 2
    detector.fit(X).partial_fit(X[:30])
    # Of 30 rows none are held out, so one point has no loss of such rows.
    last = detector.n_iter_
    training, held_out = [25, 50, 60, 85, 110, 120, last], [25, 50, 60, 85, 110, 120]
    assert last > 120
    (drawn, judged), best = drawn_losses(detector)
    assert (drawn, judged) == (training, held_out)
    assert (detector.loss_steps_, detector.validation_steps_) == (training, held_out)
    assert best == detector.best_iter_ == last
    detector.fit(X)
    _, best = drawn_losses(detector)
    assert detector.validation_steps_[6 + int(np.argmin(detector.validation_curve_[6:]))] == best
    detector.set_params(warm_start=False).fit(X)
    assert detector.loss_steps_ == detector.validation_steps_ == [25, 50, 60]


def test_a_detector_without_steps_has_its_losses_evenly_spaced(X):
    detector = VAEDetector(max_iter=60, warm_start=True, random_state=0, device="cpu").fit(X)
    # As one that was saved before steps were kept.
    del detector.loss_steps_, detector.validation_steps_
    assert drawn_losses(detector)[0] == [[20, 40, 60]] * 2
    assert detector.fit(X).loss_steps_ is None
    assert drawn_losses(detector)[0] == [[20, 40, 60, 80, 100, 120]] * 2
    assert detector.set_params(warm_start=False).fit(X).loss_steps_ == [25, 50, 60]


def test_samples_are_shown_by_column_and_pair(fitted, X):
    display = SamplesDisplay.from_estimator(fitted, X, n_samples=150)
    assert display.axes_.shape == (3, 3)
    assert display.axes_[0, 1] is None
    assert display.axes_[2, 1].get_xlabel() == "x1"
    np.testing.assert_array_equal(display.samples, fitted.sample(150, random_state=0))
    two = SamplesDisplay.from_estimator(fitted, X, columns=[2], ax=new_axes())
    assert two.axes_.shape == (1, 1)
    # In sight: in the one cell, where no corner is empty.
    assert [text.get_text() for text in two.axes_[0, 0].get_legend().get_texts()] == [
        "data (200)",
        "samples (1000)",
    ]
    with pytest.raises(ValueError, match="must have the same columns"):
        SamplesDisplay.from_predictions(X, X[:, :2])
    with pytest.raises(TypeError, match=r"Pipeline draws no rows: it has no sample\. Its last step does"):
        SamplesDisplay.from_estimator(make_pipeline(StandardScaler(), fitted), X)
    with pytest.raises(TypeError, match="IsolationForest draws no rows"):
        SamplesDisplay.from_estimator(IsolationForest().fit(X), X)


def test_samples_stand_beside_rows_of_the_same_columns(fitted, X):
    """Each of these was drawn, or ended in an error of matplotlib after the rows were drawn."""
    named = clone(fitted).fit(pd.DataFrame(X, columns=["a", "b", "c"]))
    frame = pd.DataFrame(X, columns=["c", "b", "a"])
    with pytest.raises(ValueError, match="same order"):
        SamplesDisplay.from_estimator(named, frame, n_samples=5)
    with pytest.raises(ValueError, match="2 features"):
        SamplesDisplay.from_estimator(fitted, X[:, :2], n_samples=5)
    with pytest.raises(ValueError, match="NaN in column 0"):
        SamplesDisplay.from_estimator(fitted, np.where(np.arange(3) == 0, np.nan, X), n_samples=5)
    for columns in (["d"], [3], []):
        with pytest.raises(ValueError, match=r"columns must be among \['x0', 'x1', 'x2'\], or positions"):
            SamplesDisplay.from_estimator(fitted, X, columns=columns, n_samples=5)
    images = np.random.default_rng(0).normal(size=(10, 1, 8, 8))
    with pytest.raises(ValueError, match=r"draws images of shape \(1, 8, 8\)"):
        SamplesDisplay.from_estimator(VAEDetector(max_iter=1, device="cpu").fit(images), images)


def test_samples_are_drawn_where_axes_stand_by_themselves(fitted, X):
    import matplotlib.pyplot as plt

    figure = plt.figure()
    ax = figure.add_axes((0.5, 0.2, 0.4, 0.6))
    display = SamplesDisplay.from_estimator(fitted, X, n_samples=20, ax=ax)
    figure.canvas.draw()
    for cell in (display.axes_[0, 0], display.axes_[2, 0], display.axes_[2, 2]):
        box, within = cell.get_position(), ax.get_position()
        assert within.x0 - 1e-9 <= box.x0 < box.x1 <= within.x1
        assert within.y0 - 1e-9 <= box.y0 < box.y1 <= within.y1


def test_contributions_are_ordered_and_the_rest_is_added_up(fitted, X):
    found = feature_contributions(fitted, X[:5] + np.array([0.0, 3.0, 0.0]), background=X)
    display = FeatureContributionsDisplay.from_contributions(found, row=2, max_columns=2)
    widths = [bar.get_width() for bar in display.ax_.patches]
    assert sum(widths) == pytest.approx(found.values[2].sum())
    assert widths[0] >= widths[1]
    labels = [text.get_text() for text in display.ax_.get_yticklabels()]
    assert labels[-1] == "1 other column"
    assert labels[0].startswith(f"x{found.values[2].argmax()} = ")
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    with pytest.warns(UserWarning, match="X has feature names"):
        one = FeatureContributionsDisplay.from_estimator(fitted, frame, row=7, background=frame)
    assert one.contributions.feature_names == ["a", "b", "c"]
    expected = feature_contributions(fitted, X, background=X).values[7]
    np.testing.assert_allclose(one.contributions.values[0], expected)


def test_latent_space_shows_posterior_means(X):
    detector = VAEDetector(n_components=3, max_iter=20, hidden_features=8, random_state=0, device="cpu").fit(
        X
    )
    display = LatentSpaceDisplay.from_estimator(detector, X, np.ones(len(X), dtype=int))
    Z = detector.transform(X)
    # Two axes that keep most of the variance, of means that are centred.
    centred = Z - Z.mean(axis=0)
    kept = (display.points**2).sum() / (centred**2).sum()
    singular = np.linalg.svd(centred, compute_uv=False) ** 2
    assert kept == pytest.approx(singular[:2].sum() / singular.sum())
    flat = VAEDetector(n_components=2, max_iter=20, hidden_features=8, random_state=0, device="cpu").fit(X)
    np.testing.assert_array_equal(LatentSpaceDisplay.from_estimator(flat, X).points, flat.transform(X))
    narrow = VAEDetector(n_components=1, max_iter=20, hidden_features=8, random_state=0, device="cpu").fit(X)
    assert LatentSpaceDisplay.from_estimator(narrow, X).points.shape == (200, 2)
    with pytest.raises(TypeError, match="IsolationForest has no latent space"):
        LatentSpaceDisplay.from_estimator(IsolationForest().fit(X), X)


def test_the_table_names_the_most_abnormal_rows(fitted, labelled):
    rows, y = labelled
    frame = pd.DataFrame(rows, columns=["a", "b", "c"], index=[f"id-{i}" for i in range(len(rows))])
    detector = SplitConformalDetector(clone(fitted), random_state=0)
    detector.fit(frame[y == 1])
    display = TopAnomaliesDisplay.from_estimator(detector, frame, y, n_top=6, n_columns=2, background=frame)
    table = display.frame_
    scores = detector.score_samples(frame)
    order = np.argsort(scores, kind="stable")[:6]
    assert list(table["key"]) == [f"id-{i}" for i in order]
    assert list(table.index) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(table["score"], scores[order])
    np.testing.assert_array_equal(table["p_value"], detector.p_values(frame)[order])
    np.testing.assert_array_equal(table["flagged"], scores[order] < detector.offset_)
    np.testing.assert_array_equal(table["label"], y[order])
    found = feature_contributions(detector, frame.iloc[order], background=frame)
    first = np.argmax(found.values, axis=1)
    assert list(table["column_1"]) == [found.feature_names[j] for j in first]
    np.testing.assert_allclose(table["contribution_1"], found.values.max(axis=1))
    np.testing.assert_array_equal(table["value_1"], rows[order, first])
    assert "contribution_3" not in table
    assert display.name == "FlowDetector"
    # The figure says the same.
    cells = {place: cell.get_text().get_text() for place, cell in display.ax_.tables[0].get_celld().items()}
    assert cells[0, 1] == "row"
    assert [cells[i, 1] for i in range(1, 7)] == list(table["key"])
    assert cells[1, 6].startswith(f"{table['column_1'][1]} = ")
    assert "6 most abnormal of 80 rows" in display.ax_.get_title(loc="left")


def test_the_table_of_a_notebook_takes_the_place_of_the_figure(fitted, labelled):
    import matplotlib.pyplot as plt

    pytest.importorskip("jinja2")
    rows, _ = labelled
    keys = [f"<b>{i}</b>" for i in range(len(rows))]
    display = TopAnomaliesDisplay.from_estimator(fitted, rows, keys=keys, n_top=3)
    assert plt.fignum_exists(display.figure_.number)
    html = display._repr_html_()
    assert not plt.fignum_exists(display.figure_.number)
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert "the 3 most abnormal of 80 rows" in html
    assert "rgba(224, 100, 26" in html
    # Axes that somebody else made are theirs to close.
    ax = new_axes()
    TopAnomaliesDisplay.from_estimator(fitted, rows, ax=ax)._repr_html_()
    assert plt.fignum_exists(ax.figure.number)


def test_the_table_takes_scores_of_any_detector(fitted, X):
    forest = IsolationForest(random_state=0).fit(X)
    display = TopAnomaliesDisplay.from_estimator(forest, X, n_top=4)
    assert list(display.frame_) == ["key", "score", "flagged"]
    assert list(display.frame_["key"]) == list(np.argsort(forest.score_samples(X))[:4])
    found = feature_contributions(fitted, X, background=X)
    scores = -found.anomaly
    display = TopAnomaliesDisplay.from_predictions(
        scores, p_values=np.linspace(0, 1, 200), contributions=found, n_top=2
    )
    lowest = int(np.argmin(scores))
    assert display.frame_.loc[1, "p_value"] == np.linspace(0, 1, 200)[lowest]
    assert display.frame_.loc[1, "contribution_1"] == found.values[lowest].max()
    assert len(TopAnomaliesDisplay.from_predictions([2.0, 1.0, 1.0]).frame_) == 3
    tied = TopAnomaliesDisplay.from_predictions([2.0, 1.0, 1.0], keys=["a", "b", "c"]).frame_
    assert list(tied["key"]) == ["b", "c", "a"]
    assert "flagged" not in tied
    with pytest.raises(
        ValueError, match="contributions must be of the 3 rows that have scores, got those of 200"
    ):
        TopAnomaliesDisplay.from_predictions([1.0, 2.0, 3.0], contributions=found)
    with pytest.raises(ValueError, match="keys must be one for each of 2 rows, got 3"):
        TopAnomaliesDisplay.from_predictions([1.0, 2.0], keys=["a", "b", "c"])
    with pytest.raises(ValueError, match="n_columns must be a non-negative integer, got -1"):
        TopAnomaliesDisplay.from_predictions([1.0, 2.0], n_columns=-1)
    with pytest.raises(ValueError, match="n_top must be a positive integer, got 0"):
        TopAnomaliesDisplay.from_predictions([1.0, 2.0], n_top=0)


@pytest.fixture(scope="module")
def image_detector():
    from sklearn.datasets import load_digits

    digits = (load_digits().images * 15).astype(np.uint8)
    vae = VAEDetector(max_iter=10, hidden_features=16, random_state=0, device="cpu")
    return make_pipeline(ChannelsFirst(), vae).fit(digits[:100]), digits[100:]


def test_heat_maps_lie_over_their_images(image_detector):
    pipeline, digits = image_detector
    masks = np.zeros((5, 8, 8), dtype=bool)
    masks[:, 2:4, 1:3] = True
    display = ImageHeatmapDisplay.from_estimator(
        pipeline, digits[:5], masks=masks, smooth=1, subtract=digits, n_columns=2
    )
    images = ChannelsFirst().transform(digits)
    expected = explain_images(pipeline[-1], images[:5], smooth=1, subtract=images)
    np.testing.assert_array_equal(display.maps, expected)
    np.testing.assert_array_equal(display.scores, pipeline.score_samples(digits[:5]))
    # Three pictures for each of five images, in three rows of two pairs; the outline lies on the second picture.
    pictures = display.ax_.images
    assert len(pictures) == 15
    np.testing.assert_array_equal(pictures[5].get_array(), expected[1])
    left, right, bottom, top = pictures[5].get_extent()
    assert (left, right, top, bottom) == (26, 34, 0, 8)
    outline = np.concatenate([path.vertices for path in display.ax_.collections[1].get_paths()])
    np.testing.assert_allclose([outline.min(axis=0), outline.max(axis=0)], [[27, 2], [29, 4]], atol=0.1)
    # One scale for all.
    assert len({(p.norm.vmin, p.norm.vmax) for p in pictures[2::3]}) == 1
    texts = [text.get_text() for text in display.ax_.texts]
    assert texts == [f"score {score:.4g}" for score in display.scores]
    assert "above normal" in display.figure_.axes[-1].get_ylabel()


def test_every_kind_of_heat_map_has_a_unit(image_detector):
    assert {"auto", *UNITS} == set(KINDS)
    _, digits = image_detector
    pipeline = make_pipeline(ChannelsFirst(), DiffusionDetector(random_state=0, device="cpu")).fit(
        digits[:50]
    )
    display = ImageHeatmapDisplay.from_estimator(pipeline, digits[:2], subtract=digits[:50])
    assert display.unit == "unmatched gradients above normal, as a share of all"


def test_heat_maps_of_colour_images_and_what_is_refused():
    random = np.random.default_rng(0)
    images = random.uniform(size=(2, 3, 4, 6))
    display = ImageHeatmapDisplay.from_predictions(images, np.zeros((2, 4, 6)))
    shown = np.asarray(display.ax_.images[0].get_array())
    expected = (images - images.min()) / (images.max() - images.min())
    np.testing.assert_allclose(shown, expected[0].transpose(1, 2, 0))
    with pytest.raises(ValueError, match=r"images must have the shape .* with 1 or 3 channels, got \(4, 6\)"):
        ImageHeatmapDisplay.from_predictions(images[0, 0], np.zeros((4, 6)))
    with pytest.raises(
        ValueError, match=r"maps must have the shape \(2, 4, 6\) of the images, got \(2, 4, 4\)"
    ):
        ImageHeatmapDisplay.from_predictions(images, np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="maps must be finite, and 48 values are not"):
        ImageHeatmapDisplay.from_predictions(images, np.full((2, 4, 6), np.nan))
    with pytest.raises(ValueError, match="scores must be one for each of 2 images, got 1"):
        ImageHeatmapDisplay.from_predictions(images, np.zeros((2, 4, 6)), scores=[1.0])
    with pytest.raises(ValueError, match="n_columns must be a positive integer, got 0"):
        ImageHeatmapDisplay.from_predictions(images, np.zeros((2, 4, 6)), n_columns=0)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (31, 17), (8, 64), (128, 16)])
def test_all_words_beside_heat_maps_can_be_read(shape, n, marked):
    """Whatever the shape: nothing is cut at the edge, and words lie neither on images nor on each other."""
    images, masks = np.zeros((n, 1, *shape), np.uint8), np.zeros((n, *shape), dtype=bool)
    masks[:, 2:4, 2:4] = True
    display = ImageHeatmapDisplay.from_predictions(
        images,
        masks.astype(float),
        scores=np.full(n, -123.4),
        masks=masks if marked else None,
        unit="squared residual above normal, in standardised pixels",
        name="DiffusionDetector",
    )
    ax, figure = display.ax_, display.figure_
    figure.canvas.draw()
    bar = figure.axes[-1]
    label = bar.yaxis.label if bar.get_ylabel() else bar.xaxis.label
    words = [ax.title, *ax.texts, label, *(ax.get_legend().get_texts() if marked else ())]
    boxes = [word.get_window_extent() for word in words]
    for box in [*boxes, bar.get_window_extent()]:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    others = [picture.get_window_extent() for picture in ax.images] + [bar.get_window_extent()]
    for k, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[k + 1 :] + others)


@pytest.mark.parametrize(("values", "end"), [((0, 0), 1.0), ((-2, -3), 3.0), ((-2, 5), 5.0)])
def test_maps_without_heat_have_a_scale_that_can_be_read(values, end):
    maps = np.full((1, 32, 32), float(values[0]))
    maps[0, 0, 0] = values[1]
    display = ImageHeatmapDisplay.from_predictions(np.zeros((1, 1, 32, 32), np.uint8), maps)
    heat = display.ax_.images[2]
    assert (heat.norm.vmin, heat.norm.vmax) == (0, end)


def test_only_images_of_eight_bits_have_a_fixed_scale():
    levels = np.arange(17).repeat(4).reshape(1, 1, 17, 4)  # as of scikit-learn's digits
    for images, brightest in ((levels, 1), (levels / 16, 1), (levels.astype(np.uint8), 16 / 255)):
        display = ImageHeatmapDisplay.from_predictions(images, np.zeros((1, 17, 4)))
        assert np.asarray(display.ax_.images[0].get_array()).max() == pytest.approx(brightest)


def test_wrong_labels_and_scores_are_refused(fitted, X):
    with pytest.raises(ValueError, match=r"y must hold 200 labels.*values \[0\]"):
        ScoreHistogramDisplay.from_estimator(fitted, X, np.zeros(200, dtype=int))
    flags = np.arange(200) % 9 == 0
    with pytest.raises(ValueError, match=r"If 1 marks the anomalies, give numpy\.where\(y, -1, 1\)"):
        DetectionCurveDisplay.from_estimator(fitted, X, flags)
    DetectionCurveDisplay.from_estimator(fitted, X, np.where(flags, -1, 1))
    with pytest.raises(ValueError, match=r"values \[None, 'good'\]\.$"):
        ScoreHistogramDisplay.from_estimator(fitted, X, np.array(["good", None] * 100, dtype=object))
    with pytest.raises(ValueError, match=r"y must hold 200 labels.*got shape \(3,\)"):
        DetectionCurveDisplay.from_estimator(fitted, X, [1, 1, -1])
    with pytest.raises(ValueError, match="one of them is missing"):
        DetectionCurveDisplay.from_estimator(fitted, X, np.ones(200, dtype=int))
    with pytest.raises(ValueError, match="kind must be 'roc' or 'precision-recall', got 'lift'"):
        DetectionCurveDisplay.from_predictions([1, -1], [0.0, 1.0], kind="lift")
    with pytest.raises(ValueError, match="scores must be finite, and 2 of 3 are not, the first at 1"):
        ScoreHistogramDisplay.from_predictions([0.0, np.nan, np.inf])
    with pytest.raises(ValueError, match=r"scores must be one number a row, .*got shape \(0,\)"):
        ScoreHistogramDisplay.from_predictions([])


def test_dollars_in_names_and_values_are_no_mathematics(tiny, X):
    """Between two of them matplotlib sets text as formulas, or fails where it is none."""
    frame = pd.DataFrame(X, columns=["US$ in A$", r"$\x$", "b"])
    detector = tiny().fit(frame)
    bars = FeatureContributionsDisplay.from_estimator(detector, frame)
    labels = [label.get_text() for label in bars.ax_.get_yticklabels()]
    assert any(label.startswith(r"US\$ in A\$ = ") for label in labels)
    bars.figure_.canvas.draw()
    table = TopAnomaliesDisplay.from_estimator(detector, frame, keys=[r"$\y$"] * len(frame), n_top=2)
    table.figure_.canvas.draw()
    assert r"$\y$" in table._repr_html_()
    samples = SamplesDisplay.from_estimator(detector, frame, n_samples=20)
    assert samples.axes_[2, 0].get_xlabel() == r"US\$ in A\$"
    samples.figure_.canvas.draw()
    plane = LandscapeDisplay.from_estimator(tiny().fit(frame.iloc[:, :2]), frame.iloc[:, :2], resolution=5)
    plane.figure_.canvas.draw()


def test_the_title_of_a_narrow_table_is_not_cut():
    table = TopAnomaliesDisplay.from_predictions(np.arange(200.0), name="BootstrapConformalDetector")
    table.figure_.canvas.draw()
    assert table.ax_.get_title(loc="left").startswith("Bootstrap")
    (title,) = (t for t in table.ax_.get_children() if getattr(t, "get_text", str)().startswith("Bootstrap"))
    assert title.get_window_extent().x1 <= table.figure_.bbox.x1


def test_numbers_out_of_range_are_refused_by_name(fitted, X):
    found = feature_contributions(fitted, X[:3])
    for row in (3, -4, 1.0):
        with pytest.raises(ValueError, match="row must be an integer from 0 to 2, got"):
            FeatureContributionsDisplay.from_contributions(found, row=row)
        with pytest.raises(ValueError, match="row must be an integer from 0 to 2, got"):
            FeatureContributionsDisplay.from_estimator(fitted, X[:3], row=row)
    last = FeatureContributionsDisplay.from_estimator(fitted, X[:3], row=-1)
    np.testing.assert_array_equal(last.contributions.data, X[2:3])
    with pytest.raises(ValueError, match="max_columns must be a positive integer, got 0"):
        FeatureContributionsDisplay.from_contributions(found, max_columns=0)
    with pytest.raises(ValueError, match="n must be a positive integer, got -1"):
        found.top(-1)
    with pytest.raises(ValueError, match="bins must be a positive integer, got 0"):
        ScoreHistogramDisplay.from_predictions([0.0, 1.0], bins=0)
    with pytest.raises(ValueError, match="bins must be a positive integer, got 0"):
        SamplesDisplay.from_predictions(X, X, bins=0)
    with pytest.raises(ValueError, match="resolution must be an integer of at least 2, got 1"):
        LandscapeDisplay.from_estimator(fitted, X[:, :2], resolution=1)
    with pytest.raises(ValueError, match="n_resamples must be a positive integer, got 0"):
        DetectionCurveDisplay.from_predictions([1, -1], [0.0, 1.0], n_resamples=0)
    for make in (DetectionCurveDisplay.from_predictions, PValueDisplay.from_predictions):
        data = ([1, -1], [0.0, 1.0]) if make == DetectionCurveDisplay.from_predictions else ([0.5],)
        with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
            make(*data, confidence=95)
    curve = DetectionCurveDisplay.from_predictions([1, -1], [0.0, 1.0], confidence=0.999, n_resamples=5)
    assert curve.ax_.get_legend().get_title().get_text() == "99.9% bootstrap intervals"


def test_principal_axes_need_rows_that_differ_or_say_nothing(X, recwarn):
    vae = VAEDetector(max_iter=1, n_components=3, device="cpu").fit(X)
    with pytest.raises(ValueError, match="two rows at least, got 1"):
        LatentSpaceDisplay.from_estimator(vae, X[:1])
    display = LatentSpaceDisplay.from_estimator(vae, np.repeat(X[:1], 2, axis=0))
    assert "(0% of the variance)" in display.ax_.get_xlabel()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_a_single_loss_is_a_point(X):
    ax = LossCurveDisplay.from_estimator(VAEDetector(max_iter=1, device="cpu").fit(X)).ax_
    assert [line.get_marker() for line in ax.lines[:2]] == ["o", "o"]
    ax = LossCurveDisplay.from_estimator(VAEDetector(max_iter=60, device="cpu").fit(X)).ax_
    assert [line.get_marker() for line in ax.lines[:2]] == ["None", "None"]


def test_a_closed_form_has_no_loss_to_draw(X):
    detector = DiffusionDetector(denoiser="closed-form", device="cpu").fit(X)
    with pytest.raises(ValueError, match="loss_curve_ of this DiffusionDetector is empty"):
        LossCurveDisplay.from_estimator(detector)


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_displays_hand_frames_of_any_library_on(tiny, plane, make, recwarn):
    frame = make({"a": plane[:, 0], "b": plane[:, 1]})
    pipeline = make_pipeline(make_column_transformer((StandardScaler(), ["b", "a"])), tiny()).fit(frame)
    bars = FeatureContributionsDisplay.from_estimator(pipeline, frame, row=3)
    np.testing.assert_array_equal(bars.contributions.data, plane[[3]])
    landscape = LandscapeDisplay.from_estimator(pipeline, frame, resolution=4)
    corner = make({"a": landscape.x[:1], "b": landscape.y[:1]})
    np.testing.assert_allclose(landscape.values[0, 0], pipeline.score_samples(corner)[0])
    assert not [w for w in recwarn if "feature names" in str(w.message)]


@pytest.mark.parametrize("name", inspection.__all__)
def test_every_display_draws_on_light_and_dark(name, fitted, X, tiny, plane, labelled, image_detector):
    """Neutral lines take the colour of the text, so that none vanishes in the background."""
    import matplotlib.pyplot as plt

    rows, y = labelled
    image_pipeline, digits = image_detector
    vae = VAEDetector(max_iter=10, hidden_features=8, random_state=0, device="cpu")
    draw = {
        "DetectionCurveDisplay": lambda: DetectionCurveDisplay.from_estimator(fitted, rows, y, n_resamples=5),
        "FeatureContributionsDisplay": lambda: FeatureContributionsDisplay.from_estimator(fitted, X),
        "ImageHeatmapDisplay": lambda: ImageHeatmapDisplay.from_estimator(
            image_pipeline, digits[:2], masks=digits[:2] > 200
        ),
        "LandscapeDisplay": lambda: LandscapeDisplay.from_estimator(tiny().fit(plane), plane, resolution=8),
        "LatentSpaceDisplay": lambda: LatentSpaceDisplay.from_estimator(vae.fit(X), X),
        "LossCurveDisplay": lambda: LossCurveDisplay.from_estimator(fitted),
        "PValueDisplay": lambda: PValueDisplay.from_predictions(np.linspace(0.01, 1, 100)),
        "SamplesDisplay": lambda: SamplesDisplay.from_estimator(fitted, X, n_samples=20),
        "ScoreHistogramDisplay": lambda: ScoreHistogramDisplay.from_estimator(fitted, rows, y),
        "TopAnomaliesDisplay": lambda: TopAnomaliesDisplay.from_estimator(fitted, rows, y, n_top=3),
    }[name]
    for style in ("default", "dark_background"):
        with plt.style.context(style):
            display = draw()
            display.figure_.canvas.draw()
            background = matplotlib.colors.to_rgb(display.figure_.get_facecolor())
            for ax in display.figure_.axes:
                assert ax.get_xlabel() or ax.get_ylabel() or ax is not display.ax_ or not ax.axison
                texts = [cell.get_text() for table in ax.tables for cell in table.get_celld().values()]
                for text in [*ax.texts, *texts]:
                    assert matplotlib.colors.to_rgb(text.get_color()) != background
                for line in ax.lines:
                    assert matplotlib.colors.to_rgb(line.get_color()) != background
