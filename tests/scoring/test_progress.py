"""Bars for somebody who is looking on, and nothing of them for anybody else."""

import io
import sys

import numpy as np
import pytest

from anomalib_gen.cli import app
from anomalib_gen.scoring._log import Log

FLOW = (
    "anomalib_gen.FlowDetector(transform='realnvp', n_layers=2, hidden_features=8, max_iter=60, device='cpu')"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """Messages of a command on some standard error, and its exit code."""

    def shown(stream, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with pytest.raises(SystemExit) as left:
                app([str(argument) for argument in arguments])
        return stream.getvalue(), left.value.code or 0

    return shown


@pytest.fixture(scope="session")
def scored(tmp_path_factory, rows, described):
    """A folder with rows and their scores; no test may change what is there."""
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("scored")
    frame = rows(120, 1).assign(y=np.where(np.arange(120) % 10, 1, -1))
    frame.loc[::40, "x"] = 50
    frame.to_parquet(folder / "rows.parquet")
    command = ["score", folder / "rows.parquet", "-m", described, "-k", "id", "-o", folder / "scores.parquet"]
    assert CliRunner().invoke(app, [str(item) for item in command]).exit_code == 0
    return folder


COMMANDS = {
    "fit": (["rows.parquet", "--exclude", "id", "--exclude", "y", "--detector", FLOW], ["rows/s", "loss="]),
    "score": (["rows.parquet"], ["rows/s"]),
    "evaluate": (["rows.parquet", "--label", "y"], ["rows/s"]),
    "calibrate": (["rows.parquet"], ["rows/s"]),
    "explain": (["rows.parquet", "--top", 3], ["rows/s", "rows explained/s"]),
    "monitor": (["scores.parquet", "--input", "rows.parquet"], ["rows/s"]),
    "report": (["scores.parquet"], ["rows/s", "rows explained/s"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_whoever_looks_on_sees_progress(shown, scored, described, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(scored)
    arguments, bars = COMMANDS[name]
    endings = {"explain": ".csv", "report": ".html", "score": ".csv", "evaluate": ".json", "monitor": ".json"}

    def run(stream, number, *more):
        place = tmp_path / f"{number}{endings.get(name, '')}"
        places = ("-m", place) if name == "fit" else ("-m", described, "-o", place)
        text, code = shown(stream, name, *arguments, *places, *more)
        assert code in (0, 3), text
        return text, capsys.readouterr().out.replace(str(place), "")

    text, out = run(Terminal(), 0)
    for bar in bars:
        assert bar in text
    # A message has its own line, and the bar goes on below it.
    for line in text.split("\n"):
        before, mark, _ = line.rpartition("anomalib-gen: ")
        assert not mark or not before.rpartition("\r")[2].strip()
    for number, (stream, more) in enumerate(
        [
            (io.StringIO(), ()),
            (Terminal(), ("--quiet",)),
            (Terminal(), ("--log-format", "json")),
        ],
        start=1,
    ):
        text, same = run(stream, number, *more)
        assert "/s" not in text
        # What comes out is the same, whoever looks on: of a model its hash.
        assert same == out or (name == "monitor" and more == ("--quiet",))


def test_progress_is_for_terminals():
    for stream, options, is_shown in (
        (Terminal(), {}, True),
        (Terminal(), {"quiet": True}, False),
        (Terminal(), {"as_json": True}, False),
        (io.StringIO(), {}, False),
    ):
        with Log(stream=stream, **options).progress("rows") as bar:
            bar.update(5)
        assert ("rows" in stream.getvalue()) == is_shown


def test_messages_do_not_go_on_in_the_line_of_a_bar():
    stream = Terminal()
    log = Log(stream=stream)
    with log.progress("rows") as bar:
        bar.update(5)
        log.warning("one")
    before, after = stream.getvalue().split("anomalib-gen: warning: one\n")
    assert before.endswith("\r")
    assert before.splitlines()[-1].strip() == ""
    assert "rows" in after
