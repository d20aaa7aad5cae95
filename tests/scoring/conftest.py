import json

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from typer.testing import CliRunner

from anomalib_gen import load, save
from anomalib_gen.cli import app

pytest.importorskip("pyarrow")


def make_rows(n, seed):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": [f"{seed}-{k:05d}" for k in range(n)],
            "x": rng.normal(size=n),
            "n": rng.integers(0, 9, n),
            "kind": rng.choice(["a", "b"], n),
        }
    )


@pytest.fixture(scope="session")
def rows():
    """Factory of rows: a key, two numbers and text."""
    return make_rows


@pytest.fixture(scope="session")
def model(tmp_path_factory, tiny):
    """A saved pipeline; no test may change the folder."""
    frame = make_rows(300, 0).drop(columns="id")
    encode = make_column_transformer(
        ("passthrough", ["x", "n"]), (OneHotEncoder(sparse_output=False, handle_unknown="ignore"), ["kind"])
    )
    folder = tmp_path_factory.mktemp("models") / "model"
    save(make_pipeline(encode, tiny()).fit(frame), folder, X=frame)
    return folder


@pytest.fixture(scope="session")
def loaded(model):
    return load(model)


@pytest.fixture
def run():
    """Run the command; the result has `exit_code`, `stdout` and `stderr`."""

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 100 rows, so that a few hundred rows are many."""
    monkeypatch.setattr("anomalib_gen.scoring.run.rows_per_part", lambda n_columns: 100)


FLOW = (
    "anomalib_gen.FlowDetector(transform='realnvp', n_layers=2, hidden_features=8, max_iter=60, device='cpu')"
)


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code in (0, 4), result.output


@pytest.fixture(scope="session")
def described(tmp_path_factory):
    """A model folder with a training reference; no test may change it."""
    folder = tmp_path_factory.mktemp("described")
    make_rows(800, 0).to_parquet(folder / "history.parquet")
    invoke("fit", folder / "history.parquet", "--exclude", "id", "-m", folder / "model", "--detector", FLOW)
    return folder / "model"


@pytest.fixture(scope="session")
def pages(tmp_path_factory, described):
    """Reports on runs with 0, 1 and 10,000 anomalies: path and number of anomalies by the number asked for."""
    found = {}
    offset = load(described)[-1].offset_
    for n in (0, 1, 10_000):
        folder = tmp_path_factory.mktemp("pages")
        frame = make_rows(max(3 * n // 2, 400), 3)
        normal = load(described).score_samples(frame.drop(columns="id")) >= offset
        frame = frame[normal].reset_index(drop=True)
        odd = pd.concat([frame] * 3, ignore_index=True)[:n]
        odd["x"] += 40 + np.arange(n) / 100
        pd.concat([odd, frame]).to_parquet(folder / "in.parquet")
        output = folder / "scores.parquet"
        invoke("score", folder / "in.parquet", "-m", described, "-k", "id", "-o", output)
        invoke("report", output, "-m", described, "-o", folder / "page.html")
        record = json.loads((folder / "scores.parquet.run.json").read_text())
        found[n] = folder / "page.html", record["outliers"]
    return found


NASTY = '"><script>window.hacked = 1</script><img src=http://example.org/x.png onerror="window.hacked = 1">'


@pytest.fixture(scope="session")
def nasty(tmp_path_factory):
    """A page about columns, keys and values that would like to be more than text."""
    folder = tmp_path_factory.mktemp("nasty")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({NASTY: rng.normal(size=300), "$x_{": rng.normal(size=300)})
    frame["![a](http://example.org/y.png)"] = rng.choice(["u", NASTY + "v"], 300)
    frame["[b](javascript:window.hacked=1)"] = rng.choice(["{{ 7 * 7 }}", "w"], 300)
    frame.to_parquet(folder / "h.parquet")
    frame["key<b>"] = NASTY
    frame.loc[3, NASTY] = 50
    frame.loc[4, "$x_{"] = np.nan
    frame.loc[5, "[b](javascript:window.hacked=1)"] = NASTY
    frame.to_parquet(folder / "s.parquet")
    model, output = folder / "model", folder / "out.parquet"
    invoke("fit", folder / "h.parquet", "-m", model, "--detector", FLOW)
    invoke("score", folder / "s.parquet", "-m", model, "-o", output, "-k", "key<b>", "--max-bad-rows", 1)
    invoke("report", output, "-m", model, "-o", folder / "page.html")
    return folder / "page.html"
