import json
import re

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("jinja2", reason="the benchmark extra is not installed")

from anomalib_gen.benchmark.cells import results_frame
from anomalib_gen.benchmark.report import print_summary, to_html, to_markdown
from anomalib_gen.benchmark.summary import summarise

AUROC = {  # data set -> detector -> values of the seeds; None is a failure
    "one": {"a": [0.90, 0.94], "b": [0.80, 0.82], "c": [0.70, 0.72]},
    "two": {"a": [0.60, 0.60], "b": [0.6005, 0.6005], "c": [0.50, 0.52]},
    "three": {"a": [0.70, 0.90], "b": [0.90, None], "c": [0.80, 0.80]},
    "four": {"a": [0.99, 0.99], "b": [None, None], "c": [0.10, 0.10]},
}


def cells(auroc, suite="clean"):
    rows = []
    for dataset, detectors in auroc.items():
        for detector, values in detectors.items():
            for seed, value in enumerate(values):
                row = {"suite": suite, "dataset": dataset, "detector": detector, "seed": seed}
                row |= {"specification": f"package.{detector}()", "versions": json.dumps({"numpy": "2"})}
                if value is None:
                    row |= {
                        "status": "failed",
                        "failure": "exception",
                        "error": "ValueError: <i>bad</i> | worse",
                    }
                    row |= {"traceback": "Traceback\n<script>alert(1)</script>"}
                else:
                    row |= {"status": "ok", "auroc": value, "average_precision": value / 2, "failure": ""}
                    row |= {"error": "", "traceback": "", "fit_seconds": 1.0 + seed, "score_seconds": 0.25}
                    row |= {"n_train": 10, "n_test": 9, "n_features": 2, "n_anomalies": 4}
                rows.append(row)
    return results_frame(rows)


def test_numbers_by_hand():
    summary = summarise(cells(AUROC))
    # "four" has no seed that b finished; on "three" only the first seed counts, for everyone.
    assert summary.compared == ["one", "two", "three"]
    assert summary.left_out == {"four": "b: exception"}
    table = summary.table
    assert list(table.index) == ["b", "a", "c"]
    assert table.loc["a", "mean_auroc"] == pytest.approx((0.92 + 0.60 + 0.70) / 3)
    assert table.loc["b", "mean_auroc"] == pytest.approx((0.81 + 0.6005 + 0.90) / 3)
    assert table.loc["c", "mean_auroc"] == pytest.approx((0.71 + 0.51 + 0.80) / 3)
    assert table.loc["a", "median_auroc"] == pytest.approx(0.70)
    assert table.loc["a", "mean_ap"] == pytest.approx((0.92 + 0.60 + 0.70) / 6)
    assert table.loc["a", "mean_rank"] == pytest.approx((1 + 2 + 3) / 3)
    assert table.loc["b", "mean_rank"] == pytest.approx((2 + 1 + 1) / 3)
    assert summary.pairs.loc["a", "b"] == (1, 1, 1)
    assert summary.pairs.loc["b", "a"] == (1, 1, 1)
    assert summary.pairs.loc["a", "c"] == (2, 0, 1)
    assert table.loc["a", ["wins", "ties", "losses"]].tolist() == [3, 1, 2]
    assert table.loc["b", "failed_cells"] == 3
    assert table.loc["a", "fit_seconds"] == 1.0  # of 1, 2, 1, 2, 1
    assert "3 of 4 data sets" in summary.basis
    assert "Left out: four" in summary.basis
    assert summary.failures["cells"].tolist() == [3]
    assert summary.failures["where"].tolist() == ["three (seed 1); four (seed 0, 1)"]


def test_interval_contains_the_mean_and_is_reproducible():
    rng = np.random.default_rng(0)
    data = {f"d{i}": {"a": [rng.uniform(0.5, 1)], "b": [rng.uniform(0.5, 1)]} for i in range(40)}
    first, second = summarise(cells(data)).table, summarise(cells(data)).table
    assert (first["auroc_low"] < first["mean_auroc"]).all()
    assert (first["mean_auroc"] < first["auroc_high"]).all()
    values = np.array([data[name]["a"][0] for name in data])
    width = 2 * 1.96 * values.std() / np.sqrt(40)
    assert first.loc["a", "auroc_high"] - first.loc["a", "auroc_low"] == pytest.approx(width, rel=0.1)
    np.testing.assert_array_equal(first["auroc_low"], second["auroc_low"])


def test_a_tie_is_at_most_a_thousandth():
    data = {"x": {"a": [0.951], "b": [0.950]}, "y": {"a": [0.9511], "b": [0.95]}}
    assert summarise(cells(data)).pairs.loc["a", "b"] == (1, 1, 0)


def test_a_detector_without_any_result_takes_nobody_else_along():
    data = {"x": {"a": [0.9], "b": [0.8], "dead": [None]}, "y": {"a": [0.9], "b": [0.8], "dead": [None]}}
    summary = summarise(cells(data))
    assert summary.without_result == ["dead"]
    assert len(summary.compared) == 2
    assert "no cell finished: dead" in summary.basis
    assert "unless its own finished no cell at all" in page(data)


def test_suites_are_never_mixed():
    import pandas as pd

    with pytest.raises(ValueError, match="exactly one suite"):
        summarise(pd.concat([cells(AUROC), cells(AUROC, "published")]))


def page(data, **options):
    return to_html(cells(data), **options)


def test_page_is_self_contained_and_escaped():
    html = page(AUROC, introduction="<em>in</em>")
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", html)
    assert not re.search(r"@import|url\(\s*[\"']?(?!#)", html)
    assert not re.search(r"<(?:script|link|iframe|img)\b", html)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "<i>bad</i>" not in html
    assert "&lt;em&gt;in" in html
    assert "prefers-color-scheme: dark" in html
    assert "Left out: a test over ranks needs at least 3 detectors and 5 data sets, here are 3 and 3" in html


def test_page_has_the_diagram_with_enough_data():
    rng = np.random.default_rng(0)
    data = {f"d{i}": {name: [rng.uniform(0.5, 1)] for name in "abcd"} for i in range(8)}
    html = page(data)
    assert "Critical-difference diagram of mean ranks" in html
    assert html.count("<svg") == 2
    assert "#010203" not in html


@pytest.mark.parametrize(
    "data",
    [
        {"x": {"a": [0.9]}},
        {"x": {"a": [None]}},
        {f"d{i}": {name: [0.9] for name in "abc"} for i in range(6)},
    ],
    ids=["one cell", "only a failure", "all equal"],
)
def test_degenerate_results_still_make_a_page(data):
    html = page(data)
    assert "Failures" in html
    summary = summarise(cells(data))
    assert to_markdown(summary)
    print_summary(summary, console=Console(width=80, record=True))


def test_markdown_and_terminal_agree_with_the_table():
    summary = summarise(cells(AUROC))
    markdown = to_markdown(summary)
    assert "| a | 0.740 [" in markdown
    assert "\\| worse" in markdown
    for width in (60, 80, 160):
        console = Console(width=width, record=True)
        print_summary(summary, console=console)
        text = console.export_text()
        assert "0.740" in text
        assert "<i>bad</i>" in text


def test_detector_names_cannot_break_the_page():
    html = page({"<x>": {"[red]a": [0.9], "<b>": [0.8]}})
    assert "<b>" not in html.replace("<b>clean</b>", "")
    console = Console(width=100, record=True)
    print_summary(summarise(cells({"<x>": {"[red]a": [0.9], "<b>": [0.8]}})), console=console)
    assert "[red]a" in console.export_text()


ODD_NAMES = ["$_$", r"$\frac$", "a\nb", "{label}", "%s", "a|b", "back\\", "_hidden", "", "x" * 60]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_of_a_detector_makes_a_report(name):
    data = {f"d{i}": {name: [0.9 - 0.01 * i], "b": [0.8], "c": [0.7]} for i in range(6)}
    html = page(data)
    assert html.count("<svg") == 2
    if "$" in name:  # in the figures as it is, and no formula
        figures = "".join(re.findall("<svg.*?</svg>", html, flags=re.DOTALL))
        assert len(re.findall(rf">[^<]*{re.escape(name)}[^<]*</text>", figures)) == 2
    for line in to_markdown(summarise(cells(data))).splitlines():
        if line.startswith("| b"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 11)
