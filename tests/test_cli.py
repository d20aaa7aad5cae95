import json
import os
import subprocess
import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from anomalib_gen.cli import _parse_seeds, app

KNN = "kNN=anomalib_gen.benchmark.KNNDistance(n_neighbors=1)"


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "cloud.npz"
    X = np.r_[rng.normal(size=(60, 2)), rng.normal(5, 1, size=(10, 2))]
    np.savez(path, X=X, y=np.r_[np.ones(60, int), -np.ones(10, int)])
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version_and_help():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("anomalib-gen ")
    for command in ((), ("benchmark",), ("demo",)):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("benchmark", "--no-such-option"),
        ("benchmark", "--suite", "dirty", "--peers"),
        ("benchmark",),
        ("benchmark", "--peers", "--seeds", "many"),
        ("benchmark", "--peers", "--jobs", "0"),
        ("benchmark", "--detector", "os.system(command='true')"),
        ("benchmark", "--detector", "a.b.C(x=open('f'))"),
        ("benchmark", "--detector", "no_such_package.Thing"),
    ],
)
def test_wrong_usage_is_code_1(arguments, tmp_path):
    extra = ("--output", tmp_path) if arguments[0] == "benchmark" else ()
    assert run(*arguments, *extra).exit_code == 1


def test_bad_data_is_code_2(tmp_path):
    result = run("benchmark", "--detector", KNN, "--datasets", "absent.npz", "--output", tmp_path)
    assert result.exit_code == 2
    assert "absent.npz does not exist" in result.output
    result = run("benchmark", "--detector", KNN, "--datasets", "", "--output", tmp_path)  # an unset variable
    assert result.exit_code == 2
    assert "datasets is empty" in result.output
    result = run("benchmark", "--report-only", "--output", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "holds no benchmark results" in result.output


def test_run_report_and_partial_failure(table, tmp_path):
    pytest.importorskip("pebble")
    output = tmp_path / "out"
    options = ("--datasets", table, "--seeds", "0,1", "--output", output)
    result = run("benchmark", "--detector", KNN, *options)
    assert result.exit_code == 0, result.output
    assert "kNN" in result.output
    for name in ("report.html", "report.md", "results.parquet", "settings.json"):
        assert (output / name).is_file()
    assert json.loads((output / "settings.json").read_text())["seeds"] == [0, 1]

    too_many = "greedy=anomalib_gen.benchmark.KNNDistance(n_neighbors=1000)"
    result = run("benchmark", "--detector", KNN, "--detector", too_many, *options)
    assert result.exit_code == 4
    assert "--retry-failed" in result.output
    assert "greedy" in (output / "report.md").read_text()

    (output / "report.html").unlink()
    result = run("benchmark", "--report-only", "--output", output)
    assert result.exit_code == 0
    assert (output / "report.html").is_file()


def test_help_of_the_benchmark_tells_of_images():
    text = " ".join(run("benchmark", "--help").output.replace("│", " ").split())
    assert "images: MNIST and CIFAR-10 in their own split" in text
    assert "images-full: the same with all images" in text
    assert "--suite images --detector anomalib_gen.DiffusionDetector --peers" in text
    assert "in the suites of images MNIST with a digit held out" in text


def test_sets_of_detectors_follow_the_suite(tmp_path, monkeypatch):
    import anomalib_gen.benchmark
    from anomalib_gen.benchmark import parse_detectors
    from anomalib_gen.benchmark.runner import run_benchmark

    found = {}

    def parse(detectors, **options):
        found[options["images"]] = {detector.name for detector in parse_detectors(detectors, **options)}
        raise ValueError("enough")

    monkeypatch.setattr("anomalib_gen.benchmark.runner.parse_detectors", parse)
    monkeypatch.setattr(anomalib_gen.benchmark, "run_benchmark", run_benchmark)
    for suite in ("clean", "images"):
        run("benchmark", "--suite", suite, "--library", "--peers", "--output", tmp_path / suite)
    assert {"kNN(1), 64 PCA", "FlowDetector input_complexity"} <= found[True] - found[False]
    assert {"sklearn.LOF", "FlowDetector glow"} & found[True] == set()


def test_internal_errors_are_code_5(monkeypatch, tmp_path):
    from anomalib_gen.benchmark import demo

    def fail(output):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(demo, "run_demo", fail)
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 5


def test_missing_extra_says_how_to_install(monkeypatch, tmp_path):
    from anomalib_gen.benchmark import _extra

    monkeypatch.setattr(_extra, "find_spec", lambda name: None)
    for command in (("demo",), ("benchmark", "--peers")):
        result = run(*command, "--output", tmp_path)
        assert result.exit_code == 1
        assert "pip install 'anomalib-gen[benchmark]'" in result.output


def test_seeds():
    assert _parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert _parse_seeds("0, 2,7-8") == [0, 2, 7, 8]
    assert len(_parse_seeds("1-1000")) == 1000
    for text in ("0-1000", "0-100000000", "0-99999999999999999999"):
        with pytest.raises(typer.BadParameter, match="more than 1,000"):
            _parse_seeds(text)


def test_importing_the_command_is_light():
    code = (
        "import sys; before = set(sys.modules)\n"
        "import anomalib_gen\n"
        "package = set(sys.modules)\n"
        "import anomalib_gen.cli\n"
        "print(sorted({'matplotlib', 'pyod', 'pandas', 'pebble', 'jinja2'} & (set(sys.modules) - package)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_shell_completes_commands_and_options(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "_ANOMALIB_GEN_COMPLETE": "complete_bash"}

    def complete(words):
        return subprocess.run(
            [sys.executable, "-c", "from anomalib_gen.cli import app; app(prog_name='anomalib-gen')"],
            env={**environment, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)},
            capture_output=True,
            text=True,
        ).stdout.split()

    assert complete("anomalib-gen mon") == ["monitor"]
    assert complete("anomalib-gen score --max-bad") == ["--max-bad-rows", "--max-bad-files"]
    assert "--install-completion" in run("--help").output


def test_package_runs_as_the_command():
    def call(*arguments):
        command = [sys.executable, "-m", "anomalib_gen", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert call("--version").stdout == run("--version").output
    wrong = call("no-such-command")
    assert wrong.returncode == 1
    assert wrong.stdout == ""
    assert "python -m anomalib_gen" in wrong.stderr
