"""The commands `fit`, `evaluate` and `models`, and their configuration."""

import decimal
import importlib
import json
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from anomalib_gen import EnergyDetector, FlowDetector, load, persistence, save
from anomalib_gen.scoring import config
from anomalib_gen.scoring import run as scoring_run
from anomalib_gen.scoring._errors import UsageError
from anomalib_gen.scoring._log import count
from anomalib_gen.scoring.rows import for_command_line

FLOW = (
    "anomalib_gen.FlowDetector(transform='realnvp', n_layers=2, hidden_features=8, max_iter=20, device='cpu')"
)


def test_fit_is_what_python_does(run, rows, tmp_path):
    frame = rows(200, 0)
    frame[:120].to_csv(tmp_path / "a.csv", index=False)
    frame[120:].to_parquet(tmp_path / "b.parquet")
    arguments = (tmp_path / "a.csv", tmp_path / "b.parquet", "--column", "x", "--column", "n", "--seed", 3)
    result = run("fit", *arguments, "-m", tmp_path / "model", "--detector", FLOW)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == persistence.verify(tmp_path / "model")
    mine = FlowDetector(
        transform="realnvp", n_layers=2, hidden_features=8, max_iter=20, device="cpu", random_state=3
    ).fit(frame[["x", "n"]])
    model = load(tmp_path / "model")
    assert isinstance(model, FlowDetector)
    np.testing.assert_array_equal(
        model.score_samples(frame[["x", "n"]]), mine.score_samples(frame[["x", "n"]])
    )
    columns = persistence.inspect(tmp_path / "model")["schema"]["columns"]
    assert [column["type"] for column in columns] == ["float", "integer"]
    result = run("fit", *arguments, "-m", tmp_path / "model", "--detector", FLOW)
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert run("fit", *arguments, "-m", tmp_path / "model", "--detector", FLOW, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("os.system(command='true')", "must be a class|cannot"),
        ("sklearn.ensemble.IsolationForest()", "Use one of anomalib_gen"),
        ("anomalib_gen.FlowDetector(transform='none')", "transform"),
        ("anomalib_gen.FlowDetector(no_such=1)", "no_such"),
        ("anomalib_gen.FlowDetector(", "cannot be read"),
    ],
)
def test_fit_takes_detectors_only(run, rows, tmp_path, detector, message):
    rows(50, 0).to_parquet(tmp_path / "a.parquet")
    result = run("fit", tmp_path / "a.parquet", "-m", tmp_path / "model", "--detector", detector)
    assert result.exit_code == 1
    assert pytest.importorskip("re").search(message, result.stderr)
    assert not (tmp_path / "model").exists()


def test_fit_refuses_what_it_cannot_use(run, rows, tmp_path):
    frame = rows(50, 0).assign(when=pd.Timestamp("2024-01-01"))
    frame.to_parquet(tmp_path / "a.parquet")
    for extra, message in (((), "'when' holds times"), (("--exclude", "wen"), "no column 'wen'")):
        result = run("fit", tmp_path / "a.parquet", "-m", tmp_path / "model", *extra)
        assert result.exit_code == 2
        assert message in result.stderr
    frame[["x"]].to_parquet(tmp_path / "b.parquet")
    result = run("fit", tmp_path / "a.parquet", tmp_path / "b.parquet", "-m", tmp_path / "model")
    assert result.exit_code == 2
    assert "other columns" in result.stderr
    frame[:1][["x"]].to_parquet(tmp_path / "c.parquet")
    result = run("fit", tmp_path / "c.parquet", "-m", tmp_path / "model")
    assert result.exit_code == 2
    assert "cannot be fitted" in result.stderr


@pytest.mark.parametrize(
    "labels", [("-1", (1, -1)), ("1", (0, 1)), ("true", (False, True)), ("fraud", ("fine", "fraud"))]
)
def test_evaluate_is_what_scikit_learn_says(run, rows, model, loaded, tmp_path, labels):
    value, (normal, anomalous) = labels
    frame = rows(200, 1)
    odd = np.arange(200) % 10 == 0
    frame.loc[odd, "x"] *= 4
    scores = loaded.score_samples(frame.drop(columns="id"))
    frame.assign(y=np.where(odd, anomalous, normal)).to_csv(tmp_path / "rows.csv", index=False)
    result = run(
        "evaluate",
        tmp_path / "rows.csv",
        "-m",
        model,
        "--label",
        "y",
        "--anomaly",
        value,
        "-o",
        tmp_path / "f.json",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads((tmp_path / "f.json").read_text()) == found
    flagged = scores < loaded[-1].offset_
    assert (found["rows"], found["anomalies"], found["flagged"]) == (200, 20, flagged.sum())
    assert found["auroc"] == pytest.approx(roc_auc_score(odd, -scores))
    assert found["average_precision"] == pytest.approx(average_precision_score(odd, -scores))
    for name, figure in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert found[name] == pytest.approx(figure(odd, flagged))
    assert found["false_positive_rate"] == pytest.approx((flagged & ~odd).sum() / 180)
    again = run("evaluate", tmp_path / "rows.csv", "-m", model, "--label", "y", "-o", tmp_path / "f.json")
    assert again.exit_code == 1


def test_evaluate_without_anomalies_or_with_bad_rows(run, rows, model, tmp_path):
    frame = rows(50, 1).assign(y=1)
    frame.to_parquet(tmp_path / "rows.parquet")
    result = run("evaluate", tmp_path / "rows.parquet", "-m", model, "--label", "y")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["auroc"] is None
    assert "no row has '-1' in 'y'" in result.stderr
    frame.loc[3, "x"] = np.nan
    frame.to_parquet(tmp_path / "rows.parquet")
    result = run("evaluate", tmp_path / "rows.parquet", "-m", model, "--label", "y")
    assert result.exit_code == 2
    assert "row 3, missing or infinite in 'x'" in result.stderr
    result = run("evaluate", tmp_path / "rows.parquet", "-m", model, "--label", "z")
    assert result.exit_code == 2


def test_evaluate_refuses_files_without_rows_and_folders(run, rows, model, tmp_path):
    rows(5, 0)[:0].assign(y=1).to_csv(tmp_path / "a.csv", index=False)
    result = run("evaluate", tmp_path / "a.csv", "-m", model, "--label", "y")
    assert result.exit_code == 2
    assert "have no rows" in result.stderr
    (tmp_path / "folder").mkdir()
    result = run("evaluate", tmp_path / "a.csv", "-m", model, "--label", "y", "-o", tmp_path / "folder")
    assert result.exit_code == 1
    assert "is a folder. Name a file" in result.stderr


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_a_model_takes_the_files_that_it_was_fitted_to(run, tmp_path, ending):
    """Whatever numbers and flags they have: with other types in memory they would be refused, or be news."""
    rng = np.random.default_rng(0)
    n = 60
    columns = {
        "decimal": pa.array(
            [decimal.Decimal(int(k)) / 100 for k in rng.integers(1, 999, n)], pa.decimal128(6, 2)
        ),
        "flag": pa.array([None if k == 2 else bool(k) for k in rng.integers(0, 3, n)]),
        "whole": pa.array([int(k) or None for k in rng.integers(0, 3, n)]),
        "half": pa.array(rng.normal(size=n).astype(np.float16)),
        "code": pa.array(rng.integers(0, 3, n)).dictionary_encode(),
        "kind": pa.array(rng.choice(["u", "v"], n)).dictionary_encode(),
    }
    table = pa.table(columns)
    for name, part in (("all", table), ("whole", table.filter(table.column("flag").is_valid()))):
        if ending == ".csv":
            part.to_pandas().to_csv(tmp_path / f"{name}.csv", index=False)
        else:
            papq.write_table(part, tmp_path / f"{name}.parquet")
    model = tmp_path / "model"
    result = run("fit", tmp_path / f"all{ending}", "-m", model, "--detector", FLOW)
    assert result.exit_code == 0, result.output
    for name in ("all", "whole"):
        given, scores = tmp_path / f"{name}{ending}", tmp_path / f"{name}.scores.parquet"
        result = run("score", given, "-m", model, "-o", scores)
        assert result.exit_code == 0, result.output
        result = run("monitor", scores, "-m", model, "--input", given, "--json")
        unseen = [column["unseen"] for column in json.loads(result.stdout)["report"]["columns"]]
        assert not any(unseen)


def test_an_index_is_no_column(run, rows, tmp_path):
    frame = rows(60, 0).drop(columns="kind")
    frame.set_index("id").to_parquet(tmp_path / "named.parquet")
    frame[frame["x"] > -1].drop(columns="id").to_parquet(tmp_path / "left.parquet")
    for name in ("named", "left"):
        model = tmp_path / name
        assert run("fit", tmp_path / f"{name}.parquet", "-m", model, "--detector", FLOW).exit_code == 0
        columns = persistence.inspect(model)["schema"]["columns"]
        assert [column["name"] for column in columns] == ["x", "n"]


def test_a_column_without_values_is_none_to_the_detector(run, rows, tmp_path):
    """A job with --quiet would print, every night, that nothing can be imputed."""
    source, model = tmp_path / "rows.parquet", tmp_path / "model"
    rows(60, 0).assign(nothing=np.nan).to_parquet(source)
    detector = "anomalib_gen.FlowDetector(transform='realnvp', n_layers=1, hidden_features=4, max_iter=2)"
    result = run("fit", source, "--exclude", "id", "-m", model, "--detector", detector, "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("nothing") == 1
    assert "no row has a value in nothing: the detector does not see it" in result.stderr
    result = run("score", source, "-m", model, "-o", tmp_path / "out.csv", "--explain", 2, "-q")
    assert (result.exit_code, result.output) == (0, "")
    rows(60, 0)[["id"]].assign(nothing=np.nan).to_parquet(source)
    result = run("fit", source, "--exclude", "id", "-m", tmp_path / "other")
    assert result.exit_code == 2
    assert "No column has a value" in result.stderr


def test_fit_takes_no_keys_for_categories(run, rows, tmp_path):
    rows(60, 0).to_parquet(tmp_path / "a.parquet")
    arguments = ("fit", tmp_path / "a.parquet", "-m", tmp_path / "model", "--detector", FLOW)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "'id' has another text in every row" in result.stderr
    assert "--exclude id" in result.stderr
    result = run(*arguments, "--exclude", "id")
    assert result.exit_code == 0
    assert "one-hot encoded in kind (2 categories)" in result.stderr


@pytest.mark.parametrize("command", ["fit", "calibrate"])
def test_a_place_for_no_model_is_refused_before_the_work(run, model, tmp_path, command, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: "closed" not in str(path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    (tmp_path / "closed").mkdir()
    flag, more = ("-o", ("-m", model)) if command == "calibrate" else ("-m", ())
    for place, code, message in (
        (tmp_path / "mine", 1, "is no model folder"),
        (tmp_path / "mine" / "thesis.txt" / "model", 2, "is a file where a folder should be"),
        (tmp_path / "closed" / "deep" / "model", 2, "Permission denied"),
    ):
        # (The input is not there, which would be said next.)
        result = run(command, tmp_path / "none.parquet", *more, flag, place, "--overwrite")
        assert result.exit_code == code, result.output
        assert message in result.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "three years"


def test_an_address_is_no_model_folder(run, rows, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows(60, 0).to_parquet("rows.parquet")
    for code, arguments in (
        (1, ("fit", "rows.parquet", "--exclude", "id", "-m", "s3://bucket/model")),
        (1, ("calibrate", "rows.parquet", "-m", model, "-o", "memory://x/m")),
        (2, ("score", "rows.parquet", "-m", "memory://b", "-o", "out.parquet")),
        (2, ("evaluate", "rows.parquet", "-m", "memory://b", "--label", "kind")),
        (2, ("models", "verify", "memory://b")),
    ):
        result = run(*arguments)
        assert result.exit_code == code, result.output
        assert f"{arguments[-1] if code == 1 else 'memory://b'} is an address" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_evaluate_replaces_no_input(run, rows, model, tmp_path):
    path = tmp_path / "a.csv"
    rows(20, 0).assign(y=1).to_csv(path, index=False)
    before = path.read_bytes()
    result = run("evaluate", path, "-m", model, "--label", "y", "--overwrite", "-o", path)
    assert result.exit_code == 1
    assert "one of the inputs" in result.stderr
    assert path.read_bytes() == before


def test_a_dash_is_no_output(run, rows, described, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows(20, 0).to_csv("a.csv", index=False)
    for command in (("score",), ("explain",), ("evaluate", "--label", "kind")):
        result = run(*command, "a.csv", "-m", described, "-o", "-")
        assert result.exit_code == 1
        assert "nothing is written to standard output" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.csv"]
    assert not (tmp_path / "-").exists()


def test_nothing_is_written_into_the_model_folder(run, rows, described, tmp_path):
    """It would be refused from then on."""
    source = rows(50, 0).to_parquet(tmp_path / "rows.parquet") or tmp_path / "rows.parquet"
    assert run("score", source, "-m", described, "-o", tmp_path / "scores.parquet").exit_code == 0
    for command, name in (
        (("score", source), "scores.parquet"),
        (("score", source), "folder"),
        (("score", source, "-o", tmp_path / "more.parquet", "--quarantine"), "bad.jsonl"),
        (("explain", source), "why.csv"),
        (("evaluate", source, "--label", "n"), "found.json"),
        (("report", tmp_path / "scores.parquet"), "page.html"),
        (("calibrate", source), "calibrated"),
        (("fit", source, "--exclude", "id"), "fitted"),
    ):
        if command[0] == "fit":
            result = run(*command, "-m", described / name)
        else:
            place = (described / name,) if command[-1] == "--quarantine" else ("-o", described / name)
            result = run(*command, *place, "-m", described)
        assert result.exit_code == 1, (command, result.output)
        assert "which holds nothing else" in result.stderr
    persistence.verify(described)


def test_files_of_this_machine_may_be_addresses(run, rows, described, tmp_path, monkeypatch):
    """As paths they would be those of a folder named ``file:`` right here."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    frame = rows(60, 0)
    frame.loc[0, "n"] = np.nan
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.drop(index=0).to_parquet(tmp_path / "labelled.parquet")

    def place(name):
        return f"file://{tmp_path / name}"

    source, scores, history = place("rows.parquet"), place("s.parquet"), ("--history", place("h.sqlite"))
    for code, *arguments in (
        (4, "score", source, "-o", scores, "--max-bad-rows", 1, "--quarantine", place("bad.jsonl")),
        (0, "evaluate", place("labelled.parquet"), "--label", "kind", "-o", place("found.json")),
        (0, "explain", place("labelled.parquet"), "-o", place("why.csv")),
        (None, "monitor", scores, "-o", place("m.json"), "--prometheus", place("m.prom"), *history),
        (0, "report", scores, "-o", place("page.html"), *history),
    ):
        result = run(*arguments, "-m", described)
        assert result.exit_code in ((0, 3) if code is None else (code,)), result.output
    names = ("s.parquet", "bad.jsonl", "found.json", "why.csv", "m.json", "m.prom", "h.sqlite", "page.html")
    assert [name for name in names if not (tmp_path / name).is_file()] == []
    assert list((tmp_path / "here").iterdir()) == []


def test_numbers_of_things_are_in_words():
    assert [count(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert count(1, "anomaly", "anomalies") == "1 anomaly"
    assert count(2, "anomaly", "anomalies") == "2 anomalies"


def test_models(run, model, tmp_path):
    content = persistence.verify(model)
    assert json.loads(run("models", "inspect", model).stdout)["hash"] == content
    result = run("models", "verify", model)
    assert (result.exit_code, result.stdout.strip()) == (0, content)
    assert run("models", "verify", model, "--hash", content).exit_code == 0
    result = run("models", "verify", model, "--hash", "0" * 64)
    assert result.exit_code == 2
    assert "another model" in result.stderr
    assert run("models", "card", model).stdout.strip() == (model / "MODEL_CARD.md").read_text().strip()
    for action in ("inspect", "verify", "card"):
        assert run("models", action, tmp_path).exit_code == 2
        assert run("models", action).exit_code == 1
    assert run("models").exit_code in (0, 1, 2)


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, n_features, *more, **options):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_features, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x, *more):
        return self.layers(x)
"""


def test_models_with_code_of_ones_own(run, rows, tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("own_networks").Net
    frame, folder, given = rows(60, 0), tmp_path / "own", tmp_path / "rows.parquet"
    frame.assign(y=np.where(np.arange(60) < 6, -1, 1)).to_parquet(given)
    X = frame[["x", "n"]]
    detector = EnergyDetector(network=net, max_iter=3, random_state=0, device="cpu").fit(X)
    save(detector, folder, X=X, trusted=["own_networks:Net"])
    output, calibrated = tmp_path / "out.parquet", tmp_path / "calibrated"
    commands = [
        ("models", "verify", folder),
        ("score", given, "-m", folder, "-o", output),
        ("calibrate", given, "-m", folder, "-o", calibrated),
        ("evaluate", given, "-m", folder, "--label", "y"),
        ("explain", given, "-m", folder, "-o", tmp_path / "why.csv", "--top", 2),
        ("report", output, "-m", folder),
    ]
    for arguments in commands:
        refused = run(*arguments)
        assert refused.exit_code == 2
        assert "If you trust it, add --trusted own_networks:Net." in refused.stderr
        result = run(*arguments, "--trusted", "own_networks:Net")
        assert result.exit_code in (0, 4), result.output
    (tmp_path / "own.toml").write_text("[score]\ntrusted = ['own_networks:Net']\n")
    result = run(
        "score", given, "-m", calibrated, "-o", output, "--overwrite", "--config", tmp_path / "own.toml"
    )
    assert result.exit_code == 0, result.output


def test_messages_about_several_classes_name_the_options():
    text = for_command_line(ValueError("If you do trust them, save and load with trusted=['a.b', 'c.d']."))
    assert text == "If you do trust them, add --trusted a.b --trusted c.d."


def test_help_names_every_option_of_a_command(run):
    for name, options in config.COMMANDS.items():
        text = run(name, "--help").output
        assert "Usage" in text
        for field in options.__dataclass_fields__:
            if field not in ("input", "columns", "scores"):
                assert f"--{field.replace('_', '-')}" in text


# Messages --------------------------------------------------------------------------------------------------


def messages(result):
    """What a run with `--log-format json` says; every line must be JSON."""
    return [json.loads(line) for line in result.stderr.splitlines()]


def test_warnings_of_python_are_messages(run, rows, model, tmp_path, monkeypatch):
    rows(20, 1).to_parquet(tmp_path / "rows.parquet")
    real = scoring_run.score_rows

    def warn(*arguments, **options):
        np.log(np.zeros(1))
        warnings.warn("The folder's transformers are old.")
        return real(*arguments, **options)

    monkeypatch.setattr(scoring_run, "score_rows", warn)
    before = warnings.showwarning
    arguments = (
        "score",
        tmp_path / "rows.parquet",
        "-m",
        model,
        "-o",
        tmp_path / "out.parquet",
        "--overwrite",
    )
    result = run(*arguments, "--quiet", "--log-format", "json")
    assert result.exit_code == 0, result.output
    found = [(entry["level"], entry["message"], entry["category"]) for entry in messages(result)]
    assert found == [
        ("warning", "RuntimeWarning: divide by zero encountered in log", "RuntimeWarning"),
        ("warning", "The folder's transformers are old.", "UserWarning"),
    ]
    assert all(entry["place"].startswith(__file__) for entry in messages(result))
    assert run(*arguments, "--quiet").stderr.splitlines() == [
        "anomalib-gen: warning: RuntimeWarning: divide by zero encountered in log",
        "anomalib-gen: warning: The folder's transformers are old.",
    ]
    assert warnings.showwarning is before


@pytest.mark.parametrize("form", [("--log-format", "json"), ("--log-format=json",)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-bad-rows", "many"), "Invalid value for '--max-bad-rows'"),
        (("--no-such-option",), "No such option"),
        (("a.csv",), "score needs --model"),
    ],
)
def test_wrong_usage_is_a_message(run, form, arguments, message):
    for order in ((*arguments, *form), (*form, *arguments)):
        result = run("score", *order)
        assert result.exit_code == 1
        (found,) = messages(result)
        assert (found["level"], found["code"]) == ("error", 1)
        assert message in found["message"]
    assert run("score", *form, "--help").exit_code == 0
    # (What format is wanted is not known here.)
    result = run("score", "--log-format", "yaml")
    assert result.exit_code == 1
    assert "Usage" in result.stderr


def test_an_internal_error_is_a_message(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring_run, "load_model", lambda folder, trusted: 1 / 0)
    arguments = ("score", "a.csv", "-m", model, "-o", tmp_path / "out.csv")
    result = run(*arguments, "--log-format", "json")
    assert result.exit_code == 5
    (found,) = messages(result)
    assert found["code"] == 5
    assert "internal error, ZeroDivisionError: division by zero. This is a bug" in found["message"]
    assert "Traceback" in found["traceback"]
    result = run(*arguments)
    assert result.exit_code == 5
    assert result.stderr.startswith("Traceback")
    assert "internal error. This is a bug" in result.stderr.splitlines()[-1]


# Configuration ---------------------------------------------------------------------------------------------


def test_a_file_gives_what_flags_do_not(run, rows, model, tmp_path):
    rows(50, 1).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "run.toml").write_text(
        f"[score]\nmodel = '{model}'\ninput = '{tmp_path}/rows.parquet'\noutput = '{tmp_path}/a.csv'\n"
        "key = ['id']\nmax-bad-rows = 3\nalert_above = 1\n\n[evaluate]\nlabel = 'y'\n"
    )
    assert run("score", "--config", tmp_path / "run.toml").exit_code == 0
    assert (tmp_path / "a.csv").read_text().startswith('"id"')
    assert run("score", "--config", tmp_path / "run.toml", "-o", tmp_path / "b.csv", "-k", "n").exit_code == 0
    assert (tmp_path / "b.csv").read_text().startswith('"n"')


@pytest.mark.parametrize("command", sorted(config.COMMANDS))
def test_flags_switch_off_what_a_file_switches_on(run, tmp_path, monkeypatch, command):
    options, found = config.COMMANDS[command], []
    switches = [
        name for name, field in options.__dataclass_fields__.items() if field.metadata["kind"] == "flag"
    ]
    (tmp_path / "run.toml").write_text("\n".join([f"[{command}]", *(f"{name} = true" for name in switches)]))
    real = config.resolve

    def resolve(cls, name, flags, file):
        needed = {"input": ["a"], "scores": "a", "model": "m", "output": "o", "label": "y"}
        given = {key: value for key, value in needed.items() if key in cls.__dataclass_fields__}
        found.append(real(cls, name, {**flags, **given}, file))
        raise UsageError("enough")

    monkeypatch.setattr(config, "resolve", resolve)
    for value, flags in ((True, []), (False, [f"--no-{name.replace('_', '-')}" for name in switches])):
        assert run(command, "--config", tmp_path / "run.toml", *flags).exit_code == 1
        assert [getattr(found[-1], name) for name in switches] == [value] * len(switches)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[score]\nmax_bad_row = 1", "score.max_bad_row is unknown. Did you mean 'max-bad-rows'"),
        ("[scores]\nx = 1", "'scores' is unknown. Did you mean 'score'"),
        (
            "[score]\nmax_bad_rows = 1\nmax-bad-rows = 5",
            "score.max_bad_rows and score.max-bad-rows are one option. Keep one.",
        ),
        ("score = 1", "'score' must be a table"),
        ("[score]\nmax-bad-rows = 'many'", "score.max-bad-rows must be a whole number, got 'many'"),
        ("[score]\nmax-bad-rows = true", "score.max-bad-rows must be a whole number, got True"),
        ("[score]\nmax-bad-rows = -1", "score.max-bad-rows must be at least 0, got -1"),
        ("[score]\nalert-above = 2", "score.alert-above must be from 0 to 1, got 2"),
        ("[score]\nalert-above = nan", "score.alert-above must be from 0 to 1, got nan"),
        ("[score]\nkey = [1]", r"score.key must be a list of texts, got [1]"),
        ("[score]\nresume = 'yes'", "score.resume must be true or false, got 'yes'"),
        ("[score]\nmodel = ''", "score.model must be text"),
        ("[calibrate]\nmethod = 1\n[scor]", "'scor' is unknown. Did you mean 'score'"),
        ("[score", "is no TOML"),
        ("", "score needs --model"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(run, tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    flags = ("a.csv", "-o", "b.csv", *(() if "model" in message else ("-m", "m")))
    result = run("score", *flags, "--config", path)
    assert result.exit_code == 1, result.output
    assert message in result.stderr


def test_an_empty_list_of_files_is_none(run, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[fit]\ninput = []\nexclude = []")
    result = run("fit", "-m", tmp_path / "model", "--config", path)
    assert result.exit_code == 1
    assert "fit needs an INPUT, as an argument or as 'input'" in result.stderr


def test_a_file_that_is_not_there(run, tmp_path):
    result = run("score", "--config", tmp_path / "none.toml")
    assert result.exit_code == 1
    assert "cannot be read" in result.stderr


def test_options_are_checked_as_those_of_a_file():
    with pytest.raises(UsageError, match="--alert-above must be from 0 to 1"):
        config.resolve(
            config.ScoreOptions,
            "score",
            {"input": ["a"], "model": "m", "output": "o", "alert_above": 1.5},
            None,
        )
    options = config.resolve(
        config.ScoreOptions, "score", {"input": ["a"], "model": "m", "output": "o"}, None
    )
    assert options.key == ()
    assert options.max_bad_rows == 0


def test_the_extra_is_asked_for(run, monkeypatch):
    monkeypatch.setattr("anomalib_gen.scoring._extra.find_spec", lambda name: None)
    result = run("score", "a.csv", "-m", "m", "-o", "b.csv")
    assert result.exit_code == 1
    assert "pip install 'anomalib-gen[scoring]'" in result.stderr


def test_fit_asks_before_it_trains_for_what_it_needs_to_save(run, monkeypatch):
    monkeypatch.setattr("anomalib_gen.scoring._extra.find_spec", lambda name: None if name == "skops" else 1)
    result = run("fit", "a.csv", "-m", "m")
    assert result.exit_code == 1
    assert "not installed: skops." in result.stderr
