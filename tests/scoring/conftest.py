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
