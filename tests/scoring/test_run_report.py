"""The command `report`: what stands on the page is what is in the files, whatever their names; and a page it is."""

import html.parser
import json
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from anomalib_gen import load
from anomalib_gen.explain import feature_contributions
from anomalib_gen.monitoring import load_reference
from anomalib_gen.scoring._log import Log
from anomalib_gen.scoring.config import ReportOptions
from anomalib_gen.scoring.page import contribution_shares, count, number, share, short, size
from anomalib_gen.scoring.reporting import gather

FLOW = (
    "anomalib_gen.FlowDetector(transform='realnvp', n_layers=1, hidden_features=4, max_iter=5, device='cpu')"
)

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture
def scored(run, described, tmp_path):
    """Score frames, each a file; the result is the path of the scores."""

    def score(*frames, ending=".parquet", model=described, keys=("id",), options=()):
        for k, frame in enumerate(frames):
            frame.to_parquet(tmp_path / f"in-{k}.parquet")
        output = tmp_path / f"scores{ending}"
        named = [part for key in keys for part in ("-k", key)]
        inputs = [tmp_path / f"in-{k}.parquet" for k in range(len(frames))]
        result = run("score", *inputs, "-m", model, *named, "-o", output, "--max-bad-rows", 50, *options)
        assert result.exit_code in (0, 4), result.output
        return output

    return score


class Page(html.parser.HTMLParser):
    """Elements of a page, and the cells of its tables."""

    VOID = ("meta", "link", "input", "br", "use", "path")

    def __init__(self, text):
        super().__init__()
        self.elements, self.stack, self.tables, self.text = [], [], {}, ""
        self.feed(text)
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "table":
            self.tables[found.get("id", len(self.tables))] = self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack and "script" not in self.stack:
            self.text += data
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data

    def all(self, tag):
        return [found for name, found in self.elements if name == tag]


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


# What the page says ----------------------------------------------------------------------------------------


def test_anomalies_are_the_lowest_scores_with_their_own_values(scored, described, rows):
    frames = [rows(150, 1), rows(150, 2)]
    frames[0].loc[[3, 40], "x"] = [8.0, -9.0]
    frames[0].loc[7, "x"] = np.nan  # left out: later rows move up in the scores
    frames[1].loc[5, "n"] = 60
    output = scored(*frames)
    found = gather(output, ReportOptions(scores=str(output), model=str(described)), Log(quiet=True))
    assert not found.notes
    written = pd.read_parquet(output)
    odd = written[written["label"] == -1].sort_values("score", kind="stable")
    assert [anomaly.keys["id"] for anomaly in found.anomalies] == list(odd["id"])
    assert [anomaly.row for anomaly in found.anomalies] == list(odd.index)
    np.testing.assert_array_equal([anomaly.score for anomaly in found.anomalies], odd["score"])
    assert {"1-00003", "1-00040", "2-00005"} <= set(odd["id"])
    whole = pd.concat(frames).set_index("id")
    for anomaly in found.anomalies:
        for name, value, _ in anomaly.contributions:
            assert value == whole.loc[anomaly.keys["id"], name]
    blamed = {anomaly.keys["id"]: anomaly.contributions[0][0] for anomaly in found.anomalies}
    assert (blamed["1-00003"], blamed["1-00040"], blamed["2-00005"]) == ("x", "x", "n")
    # They are those of the library, and add up.
    model = load(described)
    anomaly = found.anomalies[0]
    row = whole.loc[[anomaly.keys["id"]]]
    explained = feature_contributions(model, row, background=whole.dropna()[:200])
    assert explained.top(1)[0][0][0] == anomaly.contributions[0][0]
    assert {name for name, _, _ in anomaly.contributions} == {"x", "n", "kind"}
    assert found.bad_rows == 1
    assert [count for _, _, count in found.inputs] == [150, 150]


def test_drift_and_quality_are_on_the_page(run, scored, described, rows, tmp_path):
    frame = rows(400, 1)
    frame["x"] += 2
    frame.loc[:40, "kind"] = "new"
    frame.loc[9, "x"] = np.inf
    output = scored(frame)
    result = run("report", output, "-m", described)
    assert result.exit_code == 0, result.output
    page = page_of(tmp_path / "scores.parquet.html")
    drift = {row[0]: row for row in page.tables["drift-table"][1:]}
    assert set(drift) == {"x", "n", "kind"}
    assert (drift["x"][2], drift["n"][2]) == ("alert", "no alert")
    assert float(drift["x"][3]) > 0.5
    quality = {row[0]: row for row in page.tables["quality-table"][1:]}
    assert quality["kind"][3:] == ["10.25 %", "new"]
    assert quality["x"][1] == "0.25 %"
    (entry,) = page.tables["quarantine-table"][1:]
    assert entry[1:] == ["9", "missing or infinite in 'x'"]
    text = " ".join(page.text.split())
    assert "x: has drifted" in text
    assert "Model card" in text
    assert load_reference(described).n_rows == 800
    assert "Described from 800 rows" in text
    # Bars of the pictures add up to all rows.
    assert len(page.all("svg")) >= 3


def test_report_and_monitor_find_the_same(run, scored, described, rows, tmp_path):
    frame = rows(300, 1)
    frame["x"] += 1
    output = scored(frame)
    found = gather(output, ReportOptions(scores=str(output), model=str(described)), Log(quiet=True))
    result = run(
        "monitor", output, "-m", described, "--input", tmp_path / "in-0.parquet", "--json", "--quiet"
    )
    assert result.exit_code == 3
    assert found.drift.alerts
    assert json.loads(result.stdout)["report"] == json.loads(json.dumps(found.drift.to_dict()))


@pytest.fixture
def nights(run, scored, described, rows, tmp_path):
    """Scores of a last night after six others, written to one place; the history; and what monitor found last."""
    history = tmp_path / "h.sqlite"
    for k in range(7):
        frame = rows(130 if k == 6 else 300 + 10 * k, k + 1)
        frame["x"] += 2.0 * (k == 3)
        output = scored(frame, options=("--overwrite",))
        result = run(
            "monitor", output, "-m", described, "--history", history, "--run", f"night-{k}", "--json"
        )
        assert result.exit_code == (3 if k in (3, 6) else 0), result.output
    return output, history, json.loads(result.stdout)


def test_earlier_runs_are_those_of_monitor(run, nights, described, tmp_path):
    output, history, found = nights
    before = history.read_bytes()
    arguments = ("report", output, "-m", described, "-o", tmp_path / "page.html", "--overwrite")
    result = run(*arguments, "--history", history)
    assert result.exit_code == 0, result.output
    page = page_of(tmp_path / "page.html")
    table = page.tables["earlier-table"][1:]
    # This run is not among them, though monitor knew it by a name of its own.
    assert [row[0] for row in table] == [f"night-{k}" for k in range(5, -1, -1)]
    assert [row[2] for row in table] == [f"{300 + 10 * k}" for k in range(5, -1, -1)]
    assert [row[5] for row in table] == ["no alert"] * 2 + ["alert"] + ["no alert"] * 3
    assert float(table[2][4]) > 0.3 > float(table[0][4])
    assert {alert["kind"] for alert in found["report"]["alerts"]} == {"volume"}
    text = " ".join(page.text.split())
    assert "130 rows, and 325 are usual" in text
    assert "their median, 325." in text
    labels = [found["aria-label"] for found in page.all("svg")]
    assert "Rows of the last 7 runs; of this one 130" in labels
    assert history.read_bytes() == before
    # The configuration of monitor names the history, too.
    (tmp_path / "run.toml").write_text(f"[monitor]\nhistory = '{history}'\nmin-runs = 7\n")
    assert run(*arguments, "--config", tmp_path / "run.toml").exit_code == 0
    page = page_of(tmp_path / "page.html")
    assert len(page.tables["earlier-table"]) == 7
    assert "too few to tell" in page.text
    # Without it there is no word of it.
    assert run(*arguments).exit_code == 0
    assert "Earlier runs" not in page_of(tmp_path / "page.html").text


def test_a_history_that_tells_nothing(run, nights, described, tmp_path):
    output, history, _ = nights
    arguments = ("report", output, "-m", described, "-o", tmp_path / "page.html", "--overwrite", "--history")
    assert run(*arguments, history, "--job", "other").exit_code == 0
    assert "The history has none of this job." in page_of(tmp_path / "page.html").text
    history.write_text("no database " * 100)
    for path, message in ((history, "not a database"), (tmp_path / "none.sqlite", "is not there")):
        result = run(*arguments, path)
        assert result.exit_code == 4
        assert message in result.stderr
        assert message in page_of(tmp_path / "page.html").text
    assert not (tmp_path / "none.sqlite").exists()


def test_a_configuration_of_monitor_holds_for_report(run, scored, described, rows, tmp_path):
    frame = rows(300, 1)
    frame["x"] += 1
    output = scored(frame)
    result = run("report", output, "-m", described, "-o", tmp_path / "a.html")
    assert re.search("[1-9] alerts?$", result.stderr.strip())
    path = tmp_path / "run.toml"
    path.write_text("[monitor]\nalpha = 1e-9\ndistance = 1\npsi = 99\nwasserstein = 99\nalert-rate = 99\n")
    result = run("report", output, "-m", described, "-o", tmp_path / "b.html", "--config", path)
    assert "anomal" in result.stderr
    assert ", 0 alerts" in result.stderr
    path.write_text("[monitor]\npsi = 'much'\n")
    result = run("report", output, "-m", described, "-o", tmp_path / "c.html", "--config", path)
    assert result.exit_code == 1
    assert "monitor.psi must be a number" in result.stderr


def test_one_run_gives_one_page(run, scored, described, rows, tmp_path):
    output = scored(rows(120, 1))
    for name in ("a.html", "b.html"):
        assert run("report", output, "-m", described, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("ending", [".csv", ".feather", ""])
def test_outputs_of_every_kind(run, scored, described, rows, tmp_path, ending):
    frame = rows(120, 1)
    frame.loc[3, "x"] = 9.0
    output = scored(frame, ending=ending)
    result = run("report", output, "-m", described, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    table = page_of(tmp_path / "page.html").tables["anomaly-table"]
    assert table[1][:2] == ["1", "1-00003"]


def test_a_model_without_names(run, fitted, X, tmp_path):
    fitted.save(tmp_path / "model", X=X)
    frame = pd.DataFrame(X, columns=["p", "q", "r"]).assign(key=range(len(X)))
    frame.loc[11, "q"] += 90
    frame.to_parquet(tmp_path / "in.parquet")
    output = tmp_path / "s.parquet"
    assert (
        run("score", tmp_path / "in.parquet", "-m", tmp_path / "model", "-k", "key", "-o", output).exit_code
        == 0
    )
    result = run("report", output, "-m", tmp_path / "model")
    # Saved by Python, it has no training reference.
    assert result.exit_code == 4
    assert "has no training reference" in result.stderr
    page = page_of(tmp_path / "s.parquet.html")
    assert page.tables["anomaly-table"][1][1] == "11"
    assert page.tables["anomaly-table"][1][3].startswith("q = ")
    assert "has no training reference" in page.text


def test_p_values_are_shown_and_explanations_are_no_keys(run, described, rows, tmp_path):
    rows(300, 5).to_parquet(tmp_path / "normal.parquet")
    conformal = tmp_path / "conformal"
    arguments = (
        "calibrate",
        tmp_path / "normal.parquet",
        "-m",
        described,
        "--method",
        "conformal",
        "-o",
        conformal,
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    frame = rows(100, 1)
    frame.loc[3, "x"] = 9.0
    frame.to_parquet(tmp_path / "in.parquet")
    output = tmp_path / "s.parquet"
    result = run(
        "score",
        tmp_path / "in.parquet",
        "-m",
        conformal,
        "-k",
        "id",
        "-o",
        output,
        "--p-values",
        "--explain",
        2,
    )
    assert result.exit_code == 0, result.output
    result = run("report", output, "-m", conformal)
    assert result.exit_code == 0, result.output
    head, first, *_ = page_of(tmp_path / "s.parquet.html").tables["anomaly-table"]
    assert head == ["Rank", "id", "Score", "p", "Largest contributions", "Row"]
    assert first[1] == "1-00003"
    assert float(first[3]) == pytest.approx(1 / 301, rel=1e-3)
    assert first[4].startswith("x = 9")


def test_options_may_stand_in_a_file(run, scored, described, rows, tmp_path):
    output = scored(rows(120, 1))
    (tmp_path / "report.toml").write_text(
        f"[report]\nscores = '{output}'\nmodel = '{described}'\noutput = '{tmp_path}/page.html'\ntop = 2\n"
    )
    assert run("report", "--config", tmp_path / "report.toml").exit_code == 0
    assert len(page_of(tmp_path / "page.html").tables["anomaly-table"]) == 3
    result = run("report", "--config", tmp_path / "report.toml", "--top", 1, "--overwrite")
    assert result.exit_code == 0
    assert len(page_of(tmp_path / "page.html").tables["anomaly-table"]) == 2
    (tmp_path / "report.toml").write_text("[report]\ntop = 0\n")
    result = run("report", output, "-m", described, "--config", tmp_path / "report.toml", "--overwrite")
    assert result.exit_code == 1
    assert "report.top must be from 1 to 1000" in result.stderr


# What can go wrong -----------------------------------------------------------------------------------------


def test_a_page_is_replaced_only_if_asked(run, scored, described, rows, tmp_path):
    output = scored(rows(60, 1))
    page = tmp_path / "scores.parquet.html"
    page.write_text("mine")
    assert run("report", output, "-m", described).exit_code == 1
    assert page.read_text() == "mine"
    assert run("report", output, "-m", described, "-o", tmp_path / "page.txt").exit_code == 1
    (tmp_path / "folder.html").mkdir()
    result = run("report", output, "-m", described, "-o", tmp_path / "folder.html", "--overwrite")
    assert result.exit_code == 1
    assert "is a folder" in result.stderr
    assert run("report", output, "-m", described, "--overwrite").exit_code == 0
    assert page.read_text().startswith("<!doctype html>")
    assert not list(tmp_path.glob("*.tmp"))


def test_scores_must_be_on_this_machine(run, described):
    for arguments in (("memory://s.parquet",), ("s.parquet", "-o", "s3://bucket/page.html")):
        result = run("report", *arguments, "-m", described)
        assert result.exit_code == 1
        assert "files of this machine" in result.stderr


def test_scores_and_model_must_belong_together(run, scored, described, model, rows, tmp_path):
    output = scored(rows(60, 1))
    result = run("report", output, "-m", model)
    assert result.exit_code == 2
    assert "was made by the model" in result.stderr
    for path, message in (
        (tmp_path / "none.parquet", "does not exist"),
        (tmp_path / "in-0.parquet", "run.json is missing"),
    ):
        result = run("report", path, "-m", described)
        assert result.exit_code == 2
        assert message in result.stderr
    record = tmp_path / "scores.parquet.run.json"
    whole = record.read_text()
    for text in ("{", "[]", '{"rows": 1}', whole.replace('"rows": 60', '"rows": 59')):
        record.write_text(text)
        result = run("report", output, "-m", described)
        assert result.exit_code == 2, result.output
        assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_what_has_changed_since_is_left_out_and_named(run, scored, described, rows, tmp_path):
    frame = rows(120, 1)
    frame.loc[4, "x"] = np.nan
    output = scored(frame)
    frame[:100].to_parquet(tmp_path / "in-0.parquet")
    result = run("report", output, "-m", described)
    assert result.exit_code == 4
    assert "in-0.parquet has changed since it was scored" in result.stderr
    page = page_of(tmp_path / "scores.parquet.html")
    assert "has changed since it was scored" in page.text
    assert "anomaly-table" in page.tables
    assert "drift-table" not in page.tables
    (tmp_path / "in-0.parquet").unlink()
    assert run("report", output, "-m", described, "--overwrite").exit_code == 4
    # The quarantine file tells which rows of the file the scores belong to.
    output = scored(frame, options=("--overwrite", "--quarantine", tmp_path / "bad.jsonl"))
    result = run("report", output, "-m", described, "--overwrite")
    assert result.exit_code == 0, result.output
    (tmp_path / "bad.jsonl").write_text(
        (tmp_path / "bad.jsonl").read_text().replace('"row": 4', '"row": 119')
    )
    result = run("report", output, "-m", described, "--overwrite")
    assert result.exit_code == 4
    assert "do not have the scores that were written" in result.stderr
    (tmp_path / "bad.jsonl").unlink()
    result = run("report", output, "-m", described, "--overwrite")
    assert result.exit_code == 4
    assert "is not there or not whole" in result.stderr


def test_packages_that_are_needed_are_named(run, monkeypatch):
    monkeypatch.setattr("anomalib_gen.scoring._extra.find_spec", lambda name: None if name == "jinja2" else 1)
    result = run("report", "s.parquet", "-m", "m")
    assert result.exit_code == 1
    assert "jinja2" in result.stderr


# The page as a page ----------------------------------------------------------------------------------------


def test_names_and_values_stay_text(nasty):
    page = page_of(nasty)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not page.all("b>")
    assert {found["href"] for found in page.all("a")} == {
        "#main",
        *(f"#{name}" for name in ("scores", "anomalies", "drift", "quality", "card")),
    }
    assert "49" not in page.tables["quality-table"][1]
    assert "key<b>" in page.tables["anomaly-table"][0]
    # No address but names of SVG's own vocabulary.
    for _, found in page.elements:
        for name, value in found.items():
            assert not name.startswith("on")
            assert name.startswith(("xmlns", "aria", "data-")) or "http" not in (value or "")


def test_structure_serves_those_who_do_not_see_it(nasty):
    page = page_of(nasty)
    tags = Counter(tag for tag, _ in page.elements)
    assert all(tags[tag] == 1 for tag in ("header", "nav", "main", "footer", "h1"))
    assert dict(page.elements)["html"]["lang"] == "en"
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    referred = [
        found[name]
        for _, found in page.elements
        for name in ("for", "aria-labelledby", "aria-controls")
        if name in found
    ]
    referred += [found["href"][1:] for found in page.all("a")]
    assert set(referred) <= set(ids)
    assert all("scope" in found for found in page.all("th"))
    assert all(found["role"] == "img" and found["aria-label"] for found in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    labelled = {found["for"] for found in page.all("label")}
    assert {found["id"] for found in page.all("input")} == labelled
    # What scrolls sideways can be reached with the keyboard, and has a name.
    for tag, found in page.elements:
        if tag == "div" and found.get("class") == "scroll":
            assert found["tabindex"] == "0"
            assert found["aria-label"]


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_told_apart(nasty):
    """Contrast of WCAG 2.1: 4.5 to 1 for words, 3 to 1 for marks."""
    text = nasty.read_text()
    found = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{([^}]*)\}", text)
    ]
    assert len(found) == 3  # light, dark and paper
    for colours in found:
        for ground in ("bg", "card"):
            for name, least in (("fg", 4.5), ("soft", 4.5), ("accent", 4.5), ("bad", 4.5), ("bar", 3)):
                if name in colours:
                    light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                    assert (light + 0.05) / (dark + 0.05) >= least, (name, ground, colours)


def test_numbers_are_short():
    assert [number(value) for value in (None, float("nan"), 12345, 0.123456, -1e-9)] == [
        "–",
        "–",
        "12,345",
        "0.1235",
        "-1e-09",
    ]
    assert [share(value) for value in (None, 0, 1e-6, 0.12345, 1)] == [
        "–",
        "0.00 %",
        "< 0.01 %",
        "12.35 %",
        "100.00 %",
    ]
    assert [size(n) for n in (0, 999, 1000, 1234567)] == ["0 bytes", "999 bytes", "1 kB", "1.235 MB"]
    assert (count(1, "row"), count(2000, "row"), count(2, "anomaly", "anomalies")) == (
        "1 row",
        "2,000 rows",
        "2 anomalies",
    )
    assert short("a\n b") == "a b"
    assert [short(value) for value in (2024.0, 123456.7, float("nan"), np.float64(0.5), 7)] == [
        "2024",
        "123457",
        "–",
        "0.5",
        "7",
    ]
    assert len(short("x" * 500)) == 80
    assert contribution_shares([("a", 1, 3.0), ("b", 2, 1.0), ("c", 3, -5.0)]) == [
        ("a", 1, 3.0, 75.0),
        ("b", 2, 1.0, 25.0),
    ]
    assert contribution_shares([("a", 1, 0.0)]) == []


@pytest.mark.parametrize("n", [0, 1, 10_000])
def test_any_number_of_anomalies(pages, n):
    path, found = pages[n]
    assert found == n
    page = page_of(path)
    assert path.stat().st_size < 600_000
    text = " ".join(page.text.split())
    if n == 0:
        assert "None: no row scored below the threshold" in text
        assert "anomaly-table" not in page.tables
    elif n == 1:
        assert "1 anomaly, most abnormal first" in text
        assert len(page.tables["anomaly-table"]) == 2
    else:
        assert "The 100 most abnormal of 10,000 anomalies" in text
        assert len(page.tables["anomaly-table"]) == 101


def test_a_run_without_rows(run, scored, described, rows, tmp_path):
    output = scored(rows(5, 1)[:0])
    result = run("report", output, "-m", described)
    assert result.exit_code == 0, result.output
    text = page_of(tmp_path / "scores.parquet.html").text
    assert "No rows were scored" in text
    assert "there are no rows" in text


def test_many_columns_and_files_are_cut(run, tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(60, 320)), columns=[f"c{j}" for j in range(320)])
    frame.to_parquet(tmp_path / "h.parquet")
    for k in range(103):
        frame[:1].to_parquet(tmp_path / f"in-{k:03d}.parquet")
    detector = "anomalib_gen.VAEDetector(max_iter=5, hidden_features=8, device='cpu')"
    assert run("fit", tmp_path / "h.parquet", "-m", tmp_path / "m", "--detector", detector).exit_code == 0
    assert (
        run("score", f"{tmp_path}/in-*.parquet", "-m", tmp_path / "m", "-o", tmp_path / "s.parquet").exit_code
        == 0
    )
    result = run("report", tmp_path / "s.parquet", "-m", tmp_path / "m")
    assert result.exit_code == 0, result.output
    page = page_of(tmp_path / "s.parquet.html")
    assert len(page.tables["drift-table"]) == 301
    assert "300 of 320 columns are listed" in " ".join(page.text.split())
    assert "103 files, the first 100 of them" in page.text


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_keys_are_shown_as_they_are(run, rows, scored, described, tmp_path, ending):
    """Text of digits is no number, and a whole number beside a missing one is no float."""
    frame = rows(60, 3)
    frame.loc[:3, "x"] = [30.0, 29.0, 28.0, 27.0]
    frame["id"] = [f"{k:05d}" for k in range(len(frame))]
    frame["big"] = pd.array([2**53 + 1, None, *range(len(frame) - 2)], dtype="Int64")
    # (What the program itself calls the place of a row.)
    frame["row"] = [f"r{k}" for k in range(len(frame))]
    output = scored(frame, ending=ending, keys=("id", "big", "row"))
    assert run("report", output, "-m", described, "-o", tmp_path / "page.html").exit_code == 0
    table = page_of(tmp_path / "page.html").tables["anomaly-table"]
    found = {row[1]: row[2] for row in table[1:]}
    assert found["00000"] == str(2**53 + 1)
    assert found["00001"] in ("None", "–", "")
    assert {row[1]: row[3] for row in table[1:]}["00001"] == "r1"


def test_lines_of_a_quarantine_end_where_json_says(run, rows, scored, described, tmp_path):
    """Other characters that end lines may stand in a value."""
    frame = rows(60, 3)
    frame.loc[2, ["x", "id"]] = [np.nan, "a\u2028b\x85c\x0bd"]
    model = tmp_path / "strict"
    frame[3:].drop(columns=["id", "kind"]).to_parquet(tmp_path / "h.parquet")
    assert run("fit", tmp_path / "h.parquet", "-m", model, "--detector", FLOW).exit_code == 0
    output = scored(frame, model=model)
    assert run("report", output, "-m", model, "-o", tmp_path / "page.html").exit_code == 0
