"""The examples are run: shell and TOML with the real command, files of schedulers by their own tools where present."""

import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pandas as pd
import pytest

from anomalib_gen.scoring import config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCHEDULERS = ("airflow", "cron", "docker", "systemd")
YESTERDAY = (datetime.date.today() - datetime.timedelta(days=1)).isoformat()

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples/ is not part of an installation"),
    pytest.mark.skipif(sys.platform != "linux", reason="cron, systemd and GNU date are of Linux"),
]


@pytest.fixture
def place(tmp_path, described, rows):
    """The folder that all examples work in: a model, the files of a day, and what to do, without alerts."""
    shutil.copytree(described, tmp_path / "model")
    shutil.copy(EXAMPLES / "nightly.sh", tmp_path)
    text = (EXAMPLES / "score.toml").read_text()
    assert "alert-above = 0.05" in text
    (tmp_path / "score.toml").write_text(text.replace("alert-above = 0.05", "alert-above = 1"))
    (tmp_path / "incoming" / YESTERDAY).mkdir(parents=True)
    rows(60, 1).to_parquet(tmp_path / "incoming" / YESTERDAY / "rows.parquet")
    (tmp_path / "scores").mkdir()
    return tmp_path


@pytest.fixture
def command(tmp_path):
    """Make `anomalib-gen` the real command, or one that leaves with given codes in turn; the result is a PATH."""

    def make(*codes):
        folder = tmp_path / "bin"
        folder.mkdir()
        script = folder / "anomalib-gen"
        if codes:
            (folder / "codes").write_text("\n".join(map(str, codes)) + "\n")
            script.write_text(
                f'#!/bin/sh\ncd {shlex.quote(str(folder))}\necho "$@" >> calls\n'
                "code=$(head -n 1 codes)\nsed -i 1d codes\nexit $code\n"
            )
        else:
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m anomalib_gen.cli "$@"\n')
        script.chmod(0o755)
        return f"{folder}:/usr/bin:/bin"

    return make


def run_in(folder, arguments, path, **environment):
    return subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_scored(place, day=YESTERDAY):
    record = json.loads((place / "scores" / f"{day}.parquet.run.json").read_text())
    assert record["rows"] == 60
    assert list(pd.read_parquet(place / "scores" / f"{day}.parquet")["id"]) == [
        f"1-{k:05d}" for k in range(60)
    ]
    assert (place / "scores" / f"{day}.parquet.html").exists()
    assert (place / "scores" / "monitor.sqlite").exists()


# What all have in common -----------------------------------------------------------------------------------


def test_the_configuration_is_valid():
    path = EXAMPLES / "score.toml"
    options = config.resolve(
        config.ScoreOptions, "score", {"input": ["a.parquet"], "output": "b.parquet"}, path
    )
    assert options.resume
    assert options.overwrite
    for command, options in (("monitor", config.MonitorOptions), ("report", config.ReportOptions)):
        assert config.resolve(options, command, {"scores": "a.parquet"}, path).model == "model"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_file_is_explained(name):
    text = (EXAMPLES / name / "README.md").read_text()
    for path in (EXAMPLES / name).iterdir():
        if path.suffix in (".sh", ".toml", ".py"):
            assert path.name in text, path
    assert "nightly.sh" in text
    assert "score.toml" in text
    assert f"]({name})" in (EXAMPLES / "README.md").read_text()


# cron ------------------------------------------------------------------------------------------------------


def test_cron_scores_a_day(place, command):
    path = command()
    done = run_in("/", [place / "nightly.sh"], path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_scored(place)
    # The same day by its name, with another threshold.
    text = (place / "score.toml").read_text()
    (place / "score.toml").write_text(text.replace("alert-above = 1", "alert-above = 0"))
    done = run_in("/", [place / "nightly.sh", YESTERDAY], path)
    assert done.returncode == 3
    assert f"ALERT for {YESTERDAY}" in done.stdout.splitlines()[-1]
    assert "outliers" in done.stderr


@pytest.mark.parametrize(
    ("codes", "called", "code", "last"),
    [
        ((0, 0, 0), ["score", "monitor", "report"], 0, None),
        ((3, 0, 0), ["score", "monitor", "report"], 3, "ALERT"),
        ((3, 2, 0), ["score", "monitor", "report"], 3, "ALERT"),
        ((0, 3, 0), ["score", "monitor", "report"], 3, "ALERT"),
        ((4, 0, 0), ["score", "monitor", "report"], 4, "not all of it"),
        ((4, 3, 0), ["score", "monitor", "report"], 3, "ALERT"),
        ((0, 2, 0), ["score", "monitor", "report"], 2, "FAILED"),
        ((0, 0, 4), ["score", "monitor", "report"], 0, "no whole report (code 4)"),
        ((1,), ["score"], 1, "FAILED"),
        ((2,), ["score"], 2, "FAILED"),
        ((137, 0, 0, 0), ["score", "score", "monitor", "report"], 0, "going on from there"),
        ((5, 3, 0, 0), ["score", "score", "monitor", "report"], 3, "ALERT"),
        ((5, 5), ["score", "score"], 5, "FAILED"),
    ],
)
def test_cron_acts_on_codes(place, command, codes, called, code, last):
    path = command(*codes)
    done = run_in("/", [place / "nightly.sh"], path)
    assert done.returncode == code
    calls = (place / "bin" / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == called
    assert all(f"{YESTERDAY}" in call for call in calls)
    lines = done.stdout.splitlines()
    assert last in lines[-1] if last else not lines


def test_the_crontab_is_one():
    lines = (EXAMPLES / "cron" / "crontab").read_text().splitlines()
    (job,) = (line for line in lines if line and not line.startswith("#") and "=" not in line)
    *when, what = job.split(maxsplit=5)
    assert all(re.fullmatch(r"[0-9*/,-]+", field) for field in when)
    assert what == "/srv/anomalies/nightly.sh"
    assert "%" not in what  # a line break to cron
    assert {line.split("=")[0] for line in lines if "=" in line and not line.startswith("#")} == {
        "MAILTO",
        "PATH",
    }


# systemd ---------------------------------------------------------------------------------------------------


def unit(name):
    """Lines ``key=value`` of a unit, in order."""
    lines = (EXAMPLES / "systemd" / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and line[0] not in "#[")


def test_systemd_runs_the_command(place, command):
    found = unit("anomalib-score.service")
    assert found["Environment"].startswith("PATH=/srv/anomalies/.venv/bin:")
    line = found["ExecStart"].replace("/srv/anomalies", str(place))
    done = run_in(place, shlex.split(line), command())
    assert done.returncode == 0, done.stderr
    assert_scored(place)


def test_systemd_acts_on_codes():
    found = unit("anomalib-score.service")
    assert found["SuccessExitStatus"].split() == ["4"]
    assert found["Restart"] == "on-failure"
    assert found["RestartPreventExitStatus"].split() == ["1", "2", "3"]
    assert found["OnFailure"] == "anomalib-alert.service"
    assert (found["StartLimitBurst"], found["StartLimitIntervalSec"]) == ("3", "1h")  # the first start counts
    assert "up to twice within an hour" in (EXAMPLES / "systemd" / "README.md").read_text()
    assert set(found["ReadWritePaths"].split()) == {"/srv/anomalies/scores"}


def test_systemd_alert_says_what_happened(place, command):
    path = command(0)
    logger = place / "bin" / "logger"
    logger.write_text('#!/bin/sh\necho "$@"\n')
    logger.chmod(0o755)
    for status, what in (("1", "another run"), ("2", "files"), ("3", "ALERT"), ("9", "killed 9")):
        done = run_in(
            place,
            [EXAMPLES / "systemd" / "alert.sh"],
            path,
            MONITOR_EXIT_STATUS=status,
            MONITOR_EXIT_CODE="killed",
            MONITOR_UNIT="anomalib-score.service",
        )
        assert done.returncode == 0
        assert what in done.stdout
        assert "journalctl -u anomalib-score.service" in done.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_units(place, command):
    command(0)
    shutil.copy(EXAMPLES / "systemd" / "alert.sh", place)
    names = ("anomalib-score.service", "anomalib-score.timer", "anomalib-alert.service")
    for name in names:
        text = (EXAMPLES / "systemd" / name).read_text()
        (place / name).write_text(
            text.replace("/srv/anomalies", str(place)).replace("User=anomalib", "User=root")
        )
    done = run_in(place, ["systemd-analyze", "verify", *(place / name for name in names)], "/usr/bin:/bin")
    ours = [line for line in done.stderr.splitlines() if "anomalib" in line]
    assert not ours
    assert done.returncode == 0, done.stderr
    (place / names[0]).write_text((place / names[0]).read_text().replace("Restart=", "Restrat="))
    done = run_in(place, ["systemd-analyze", "verify", place / names[0]], "/usr/bin:/bin")
    assert "Restrat" in done.stderr  # (It would say so.)
    when = unit(names[1])["OnCalendar"]
    assert run_in(place, ["systemd-analyze", "calendar", when], "/usr/bin:/bin").returncode == 0


# Airflow ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dag(monkeypatch):
    """The DAG file, imported against a stub of the few names of Airflow that it uses."""
    found = {}

    class AirflowException(Exception):
        pass

    class AirflowFailException(AirflowException):
        pass

    def make_dag(**settings):
        def decorate(function):
            def build():
                found["dag"] = {"dag_id": function.__name__, **settings}
                function()

            return build

        return decorate

    def make_task(function):
        def call(*arguments):
            found["task"], found["arguments"] = function, arguments

        return call

    exceptions = types.ModuleType("airflow.exceptions")
    exceptions.AirflowException, exceptions.AirflowFailException = AirflowException, AirflowFailException
    sdk = types.ModuleType("airflow.sdk")
    sdk.dag, sdk.task = make_dag, make_task
    for name, module in {
        "airflow": types.ModuleType("airflow"),
        "airflow.exceptions": exceptions,
        "airflow.sdk": sdk,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(
        "nightly_scores_example", EXAMPLES / "airflow" / "nightly_scores.py"
    )
    found["module"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found["module"])
    return types.SimpleNamespace(**found, stop=AirflowFailException, again=AirflowException)


def test_airflow_imports_the_dag(dag):
    assert dag.dag["dag_id"] == "nightly_scores"
    assert dag.dag["max_active_runs"] == 1  # one output at a time
    assert dag.dag["catchup"] is False
    assert dag.dag["default_args"]["retries"] > 0
    assert dag.arguments == ("{{ macros.ds_add(ds, -1) }}",)


def test_airflow_scores_a_day(dag, place, command, monkeypatch):
    monkeypatch.setenv("PATH", command())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(dag.module, "FOLDER", str(place))
    assert dag.task(YESTERDAY) == 0
    assert_scored(place)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 137])
def test_airflow_acts_on_codes(dag, place, monkeypatch, code):
    (place / "nightly.sh").write_text(f"exit {code}\n")
    monkeypatch.setattr(dag.module, "FOLDER", str(place))
    if code in (0, 4):
        assert dag.task(YESTERDAY) == code
        return
    with pytest.raises(dag.again) as caught:
        dag.task(YESTERDAY)
    # A retry is for what it can help.
    assert isinstance(caught.value, dag.stop) == (code in (1, 2, 3))


# Docker ----------------------------------------------------------------------------------------------------


def instructions():
    """Instructions of the Dockerfile, with their arguments; lines that go on are joined."""
    text = re.sub(r"\\\n", " ", (EXAMPLES / "docker" / "Dockerfile").read_text())
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            yield word, rest.strip()


def test_the_dockerfile_is_sound():
    found = list(instructions())
    words = [word for word, _ in found]
    assert set(words) <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert words[0] == "FROM"
    image, _, tag = found[0][1].partition(":")
    assert image == "python"
    assert tag
    assert tag != "latest"
    given = dict(found)
    assert given["USER"].isdigit()
    assert int(given["USER"]) > 0
    assert words.index("USER") > words.index("RUN")
    assert json.loads(given["ENTRYPOINT"]) == ["anomalib-gen"]
    assert json.loads(given["CMD"]) == ["--help"]
    ignored = (EXAMPLES / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    copied = {source for word, rest in found if word == "COPY" for source in rest.split()[:-1]}
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)


# (Installed beside this Python, which need not be on the path.)
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_likes_the_dockerfile(tmp_path):
    subprocess.run([HADOLINT, EXAMPLES / "docker" / "Dockerfile"], check=True)
    (tmp_path / "Dockerfile").write_text("FROM python:latest\n")
    assert subprocess.run(
        [HADOLINT, tmp_path / "Dockerfile"], capture_output=True
    ).returncode  # (It would say so.)


def test_the_compose_file_asks_for_nothing():
    """Compose reads all of it for every command, and `docker compose build` knows no day."""
    assert "$" not in (EXAMPLES / "docker" / "compose.yaml").read_text()


def test_the_compose_file_runs_the_command(place, command):
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((EXAMPLES / "docker" / "compose.yaml").read_text())["services"]
    (service,) = services.values()
    build = service["build"]
    assert (EXAMPLES / "docker" / build["context"] / build["dockerfile"]).samefile(
        EXAMPLES / "docker" / "Dockerfile"
    )
    assert service["read_only"]
    assert service["network_mode"] == "none"
    assert "restart" not in service  # the exit code is for who started it
    where = {}
    for volume in service["volumes"]:
        here, there, *mode = volume.split(":")
        where[Path(here).name] = (there, mode == ["ro"])
    workdir = [rest for word, rest in instructions() if word == "WORKDIR"][-1]
    assert {there for there, _ in where.values()} == {f"{workdir}/{name}" for name in where}
    assert [name for name, (_, fixed) in where.items() if not fixed] == ["scores"]
    assert {name for name in where if "." in name} == {"nightly.sh", "score.toml"}
    # What the container would run, in a folder like its own.
    (arguments,) = (
        shlex.split(line.split("score", 1)[1].replace("$(date -d yesterday +%F)", YESTERDAY))
        for line in (EXAMPLES / "docker" / "README.md").read_text().splitlines()
        if line.startswith("    docker compose run --rm score")
    )
    assert "command" not in service  # the day takes its place
    done = run_in(place, [*service["entrypoint"], *arguments], command())
    assert done.returncode == 0, done.stderr
    assert_scored(place)
