"""The scripts in benchmarks/ run end to end; their figures are not judged here."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from anomalib_gen import EnergyDetector

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="benchmarks/ is not part of an installation")


def run(script, *options):
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), "--quick", *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_overhead_does_the_same_work_as_the_bare_loop(tmp_path):
    pytest.importorskip("zuko")
    out = tmp_path / "overhead.json"
    text = run("training_overhead.py", "--output", out)
    assert "unequal work" not in text
    (found,) = json.loads(out.read_text())["detectors"].values()
    assert found["training"]["largest_weight_difference"] < 1e-5
    assert found["training"]["equal"]["ratio"] > 0
    assert found["scoring"]["float64"]["ratio"] > 0
    assert min(found["zuko"]["weights"]) > 0
    assert out.with_suffix(".md").read_text().count("\n| FlowDetector") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "detector",
    [
        "VAEDetector(anomaly='iwae')",
        *(f"EnergyDetector(objective={name!r})" for name in EnergyDetector._objectives),
    ],
)
def test_training_overhead_measures_every_family(tmp_path, detector):
    out = tmp_path / "overhead.json"
    text = run("training_overhead.py", "--detector", f"anomalib_gen.{detector}", "--output", out)
    assert "unequal work" not in text
    assert len(json.loads(out.read_text())["detectors"]) == 1


def test_density_compares_every_model_with_the_best_mixture(tmp_path):
    out = tmp_path / "density.json"
    run("density.py", "--output", out)
    (found,) = json.loads(out.read_text())["tables"].values()
    models = found["models"]
    assert sum(name.startswith("flow") for name in models) == 4
    best = models[found["best_mixture"]]["log_likelihood"]["mean"]
    for name, figures in models.items():
        difference = figures["difference"]["mean"]
        assert difference == pytest.approx(figures["log_likelihood"]["mean"] - best)
        assert name.startswith("flow") or difference <= 0
    assert out.with_suffix(".md").read_text().count("\n|") == len(models) + 2


def test_calibration_compares_realised_with_nominal_rates(tmp_path):
    out = tmp_path / "calibration.json"
    run("calibration.py", "--detector", "isolation forest", "--output", out)
    (found,) = json.loads(out.read_text())["results"]
    rates = found["rates"]
    assert {
        "false positives: held-out",
        "false positives: CV+",
        "false discoveries: BH",
        "found: LORD",
    } <= set(rates)
    assert all(0 <= rate["mean"] <= 1 for rate in rates.values())
    assert out.with_suffix(".md").read_text().count("##") == 3
    # What is there is kept, and the other detector joins it.
    text = run("calibration.py", "--detector", "isolation forest", "--detector", "Gaussian", "--output", out)
    assert "digits, isolation forest:" not in text
    first, second = json.loads(out.read_text())["results"]
    assert (first, second["detector"]) == (found, "Gaussian")
    assert {f"false positives: {name}, 100 rows" for name in ("split", "CV+", "jackknife+")} <= set(
        second["rates"]
    )
    assert out.with_suffix(".md").read_text().count("##") == 4


@pytest.mark.slow
def test_explanations_rank_the_changed_column(tmp_path):
    out = tmp_path / "explanations.json"
    run("explanations.py", "--output", out)
    found = json.loads(out.read_text())["results"]
    assert {one["injection"] for one in found} == {"shift", "swap"}
    (best,) = (
        one for one in found if one["explanation"] == "absolute z-score" and one["injection"] == "shift"
    )
    assert best["mean_rank"] < 3
    assert all(1 <= one["mean_rank"] <= one["columns"] for one in found)


@pytest.mark.slow
def test_gpu_script_measures_every_family_on_a_cpu(tmp_path):
    run("gpu.py", "--device", "cpu", "--skip-tests", "--output", tmp_path)
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    rows = [case["row"] for case in found["cases"]]
    assert rows.count("1 x 8 x 8") == 4  # a family of images each
    assert rows.count("10") >= 4
    assert not found["skipped"]
    for case in found["cases"]:
        assert case["train_rows_per_second"] > 0
        assert case["score_rows_per_second"] > 0
    assert (tmp_path / "gpu-cpu.md").exists()


def test_gpu_script_needs_neither_rich_nor_typer(tmp_path):
    """A GPU machine may lack them."""
    (tmp_path / "blocked").mkdir()
    for name in ("rich", "typer"):
        (tmp_path / "blocked" / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import gpu; "
        "gpu.show('title', ['a', 'b'], [['1', '2']]); print(gpu.in_turn([1, 2, 3], [4]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "blocked")],
        capture_output=True,
        text=True,
        cwd=FOLDER,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "title\na  b\n1  2" in done.stdout
    assert "[1, 4, 2, 3]" in done.stdout


@pytest.mark.slow
def test_vae_script_compares_with_pyod(tmp_path):
    out = tmp_path / "vae.json"
    run("vae_against_pyod.py", "--output", out)
    found = json.loads(out.read_text())
    assert set(found["equal_work"]) == {"32", "256"}
    assert found["defaults"][0]["pyod"]["auroc"] > 0


@pytest.mark.slow
def test_closed_form_script_runs(tmp_path):
    run("closed_form_denoiser.py")


def test_stability_script_runs(tmp_path):
    out = tmp_path / "stability.json"
    run("ebm_stability.py", "--output", out)
    found = json.loads(out.read_text())["runs"]
    assert len(found) == 4
    assert all(one["diverged"] == "no" for one in found)


@pytest.mark.slow
def test_contrastive_objectives_stay_stable_on_a_mixture(tmp_path):
    out = tmp_path / "stability.json"
    done = subprocess.run(
        [
            sys.executable,
            str(FOLDER / "ebm_stability.py"),
            "--table",
            "mixture",
            "--steps",
            "2000",
            "--output",
            str(out),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for one in json.loads(out.read_text())["runs"]:
        assert one["diverged"] == "no"
        assert one["steps"] == 2000
        assert max(map(abs, one["median_energy"])) < 20
        assert one["judge"][1] < one["judge"][0]


def test_a_gain_is_confirmed_where_it_is_real_and_not_where_it_is_chosen(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("confirmed_gain")
    random = np.random.default_rng(0)
    peer = random.uniform(60, 90, size=30)
    noise = {f"noise {k}": peer + random.normal(0, 3, size=30) for k in range(20)}
    table = pd.DataFrame({"peer": peer, **noise})
    best = max(one["gain"] for one in script.gains(table, list(noise), "peer"))
    halves = script.confirm(table, list(noise), ["peer"], 200, random)
    assert best > 0.8  # the best of twenty that are all worth nothing
    assert abs(halves["mean"]) < 0.5
    table["real"] = peer + 2 + random.normal(0, 1, size=30)
    halves = script.confirm(table, [*noise, "real"], ["peer"], 200, random)
    assert halves["mean"] == pytest.approx(2, abs=0.4)
    assert halves["chosen"]["real"] > 0.8
    (found,) = script.gains(table, ["real"], "peer")
    assert found["gain"] == pytest.approx(float((table["real"] - peer).mean()))
    assert found["won"] + found["lost"] <= 30


def test_the_cost_of_diffusion_is_measured(tmp_path):
    pytest.importorskip("pyod")
    out = tmp_path / "cost.json"
    run("diffusion_cost.py", "--output", out)
    found = json.loads(out.read_text())
    assert set(found["fit"]) == {"hybrid", "network", "closed-form"}
    assert found["scores"]["ratio"] > 0


def test_the_effect_of_training_time_is_measured(tmp_path):
    out = tmp_path / "time.json"
    run("training_time.py", "--output", out)
    cells = json.loads(out.read_text())["cells"]
    assert [cell["steps"] for cell in cells] == [10, 20, 40]


def test_the_width_of_a_network_is_measured_on_other_rows(tmp_path):
    out = tmp_path / "width.json"
    run("network_width.py", "--output", out)
    (cell,) = json.loads(out.read_text())["cells"]
    shares = [cell[width] for width in ("16", "64", "256")]
    assert len(set(shares)) == 3  # the networks have moved from where they start, at the closed form
    assert all(0.5 < share < 1.5 for share in shares)


def test_fresh_tables_are_judged_group_by_group(tmp_path):
    out = tmp_path / "fresh.json"
    run("fresh_tables.py", "--seeds", 1, "--output", out)
    cells = pd.DataFrame(json.loads(out.read_text())["cells"])
    assert len(cells) == 15
    assert cells["auroc"].between(50, 100).all()
    assert "| all (3) | kNN(1) |" in out.with_suffix(".md").read_text()


def test_a_busy_machine_is_compared_with_an_idle_one(tmp_path):
    out = tmp_path / "busy.json"
    run("busy_machine.py", "--output", out)
    results = json.loads(out.read_text())["results"]
    assert len(results) == 5
    for found in results.values():
        assert found["score, one thread"]["idle"]["ratio"] == 1
        assert all(place["ratio"] > 0 for way in found.values() for place in way.values())


def test_throughput_is_measured_from_file_to_file(tmp_path):
    out = tmp_path / "throughput.json"
    run("scoring_throughput.py", "--only", "realnvp", "--output", out)
    found = json.loads(out.read_text())["detectors"]
    assert set(found) == {"FlowDetector (realnvp)", "IsolationForest (scikit-learn)"}
    for one in found.values():
        assert one["rows_per_second"]["cpu"] > 0
        assert one["overhead"]["clock"]["ratio"] > 0
    forest, flow = found["IsolationForest (scikit-learn)"], found["FlowDetector (realnvp)"]
    assert forest["against_isolation_forest"]["cpu"]["ratio"] == 1
    assert forest["bound"] is None
    assert flow["bound"] > flow["rows_per_second"]["clock"]
    assert out.with_suffix(".md").exists()


@pytest.mark.slow
def test_throughput_is_measured_for_every_family_and_peer(tmp_path):
    pytest.importorskip("pyod")
    out = tmp_path / "throughput.json"
    run("scoring_throughput.py", "--output", out)
    assert len(json.loads(out.read_text())["detectors"]) == 14


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_of_scoring_is_measured(tmp_path):
    out = tmp_path / "memory.json"
    run("scoring_memory.py", "--folder", tmp_path, "--output", out)
    found = json.loads(out.read_text())["runs"]
    assert [one["rows"] for one in found] == [2000, 8000]
    assert all(10**8 < one["peak_rss_bytes"] < 10**9 for one in found)
    assert {path.name for path in tmp_path.iterdir()} == {"memory.json", "memory.md"}


@pytest.fixture
def digits_home(tmp_path, monkeypatch):
    """A tiny collection in the layout of MNIST."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 60), ("test", 20)):
        arrays[f"X_{part}"] = rng.integers(0, 120, (n, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = (np.arange(n) % 10).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    monkeypatch.setenv("ANOMALIB_GEN_DATA", str(tmp_path))
    return tmp_path


def test_image_defects_judges_maps(digits_home):
    out = digits_home / "defects.json"
    assert "pixel AUROC" in run("image_defects.py", "--output", out)
    found = json.loads(out.read_text())["collections"]["mnist"]["figures"]
    assert set(found) == {"distance from the mean", "vae"}
    figures = {name: part for family in found.values() for name, part in family.items()}
    baselines = {"distance from the mean", "distance from the mean, averaged"}
    assert set(figures) == baselines | {"vae, residual", "vae, likelihood", "vae, score"}
    for part in figures.values():
        assert all(0 <= value <= 1 for name, value in part.items() if name != "fit_seconds")
    # A second call finds all of it done.
    before = out.read_text()
    run("image_defects.py", "--output", out)
    assert out.read_text() == before


def test_changes_of_images_are_judged_one_by_one(digits_home):
    out = digits_home / "corruptions.json"
    assert "blurred" in run("image_corruptions.py", "--output", out)
    found = json.loads(out.read_text())["collections"]["mnist"]["figures"]
    assert set(found["flow"]) == {"flow", "flow, input_complexity", "flow, typicality"}
    for row in found["flow"].values():
        assert len(row) == 11
        assert all(0 <= value <= 1 for value in row.values())
    # A second call finds all of it done.
    before = out.read_text()
    run("image_corruptions.py", "--output", out)
    assert out.read_text() == before


def test_changes_of_images_are_what_they_are_called(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import image_corruptions

    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    after = {
        name: image_corruptions.changed(images, change, 0)
        for name, change in image_corruptions.CHANGES.items()
    }
    assert {(x.shape, x.dtype) for x in after.values()} == {(images.shape, images.dtype)}
    assert not any(np.array_equal(x, images) for x in after.values())
    np.testing.assert_array_equal(after["negative"], 255 - images)
    np.testing.assert_array_equal(after["half as bright"], np.round(images / 2).astype(np.uint8))
    np.testing.assert_array_equal(after["a quarter off"][..., 2:], images[..., :-2])
    np.testing.assert_array_equal(after["turned by 90 degrees"][0, 0], np.rot90(images[0, 0]))
    assert all(len(np.unique(x)) == 1 for x in after["one grey"])
    assert after["a third of the contrast"].std() < 0.4 * images.std()
    assert after["blurred (3 x 3)"].std() < 0.5 * images.std()


@pytest.mark.slow
def test_label_free_selection_resumes(tmp_path):
    pytest.importorskip("pyod")
    out = tmp_path / "selection.json"
    run("label_free_selection.py", "--output", out)
    found = json.loads(out.read_text())
    for among, criteria in (("detectors", 7), ("densities", 8)):
        ways = found["judged"][among]["ways"]
        assert len(ways) == 3 + criteria
        for figures in ways.values():
            assert figures["behind_oracle"]["mean"] >= 0
    noise = [(cell["broken"]["noise"], cell["candidates"].values()) for cell in found["cells"]]
    assert all(own["mass-volume"] < max(c["mass-volume"] for c in others) for own, others in noise)
    text = run("label_free_selection.py", "--output", out)
    assert "CPU time" not in text
    assert json.loads(out.read_text())["judged"] == found["judged"]


def test_choices_without_labels_are_judged(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("label_free_selection")

    def cell(table, seed, **auroc):
        candidates = {
            name: {"auroc": value, "right": value, "wrong": -value, "blind": 0.0}
            for name, value in auroc.items()
        }
        return {"table": table, "seed": seed, "candidates": candidates}

    cells = [
        cell("x", 0, a=0.9, b=0.6, c=0.6),
        cell("x", 1, a=0.7, b=0.8, c=0.6),
        cell("y", 0, a=0.5, b=0.7, c=0.6),
        cell("z", 0, a=0.9, b=0.8, c=0.7),
    ]
    ways = script.judge(cells, ["a", "b", "c"], ["right", "wrong", "blind"])["ways"]
    mean = {way: figures["auroc"]["mean"] for way, figures in ways.items()}
    assert mean["oracle"] == mean["right"] == pytest.approx((85 + 70 + 90) / 3)
    assert mean["random"] == mean["blind"] == pytest.approx((70 + 60 + 80) / 3)
    assert mean["wrong"] == pytest.approx((60 + 50 + 70) / 3)
    # On the tables other than x, y and z the best on average are b, a and b.
    assert mean["best default"] == pytest.approx((70 + 50 + 80) / 3)
    assert ways["right"]["rank_correlation"]["mean"] == pytest.approx(1, abs=0.05)
    assert ways["wrong"]["behind_oracle"]["mean"] == pytest.approx(mean["oracle"] - mean["wrong"])
    low, high = ways["wrong"]["gain_over_random"]["interval"]
    assert low <= ways["wrong"]["gain_over_random"]["mean"] <= high < 0


def test_image_detection_goes_on_where_it_stopped(digits_home):
    pytest.importorskip("pebble")
    folder = digits_home / "cells"
    options = ("--families", "vae", "--output", folder)
    assert "Stopped" in run("image_detection.py", *options, "--budget", 0.001)
    text = run("image_detection.py", *options)
    assert "All cells are done" in text
    assert len(list((folder / "cells").glob("*.json"))) == 3
    tables = text.split("## ")
    (precision,) = (t for t in tables if t.startswith("MNIST, one digit held out: Average precision"))
    rows = {
        row.split(" | ")[0].strip("| "): row.split(" | ")[1:]
        for row in precision.splitlines()[2:]
        if "|" in row
    }
    assert {"VAEDetector", "VAEDetector typicality", "published: joint energy prior"} < set(rows)
    assert rows["VAEDetector"][1] == "–"  # digit 4 was not run
    assert rows["chance"][0] == "0.100"
    assert "| mnist | VAEDetector | 1 |" in text
    notes = json.loads((folder / "devices.json").read_text())
    assert set(notes) == {path.name for path in (folder / "cells").glob("*.json")}
    assert all(note.startswith("CPU, ") and ", torch " in note for note in notes.values())


def test_a_cell_keeps_the_device_that_it_was_run_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    script = importlib.import_module("image_detection")
    (tmp_path / "cells").mkdir()

    def finish(seed, device):
        before = script.finished_cells(tmp_path)
        cell = {"dataset": "mnist:not-1", "seed": seed, "detector": "a.B()"}
        (tmp_path / "cells" / f"{seed}.json").write_text(json.dumps({"cell": cell}))
        if device:
            monkeypatch.setattr(script, "device_name", lambda asked: f"{device} ({asked})")
            script.note_devices(tmp_path, before, "auto")

    for seed, device in enumerate((None, "first", "second")):  # the first of a run without notes
        finish(seed, device)
    found = script.devices_of(tmp_path)
    assert found["device"].str.partition(",")[0].tolist() == ["not noted", "first (auto)", "second (auto)"]
    assert found["specification"].tolist() == ["a.B()"] * 3


def test_image_detection_runs_every_task_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    script = importlib.import_module("image_detection")
    asked = []
    monkeypatch.setattr(
        script, "run_benchmark", lambda detectors, **options: asked.append(options["datasets"])
    )
    for options in ((), ("--tasks", "against")):
        monkeypatch.setattr(sys, "argv", ["image_detection.py", "--output", str(tmp_path), *options])
        script.main()
    assert asked == [[task for group in script.TASKS.values() for task in group], script.TASKS["against"]]
    assert "mnist:only-9" in asked[0]


def test_recorded_cells_of_several_calls_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    script = importlib.import_module("image_detection")
    monkeypatch.setattr(script, "RESULTS", tmp_path)

    def record(device, **auroc):
        cells = [
            {"dataset": f"mnist:not-{digit}", "detector": detector.replace("_", " "), "auroc": value}
            for detector, value in auroc.items()
            for digit in (4, 1)
        ]
        common = {"suite": "images", "seed": 0, "status": "ok", "average_precision": 0.5, "fit_seconds": 1.0}
        common |= {"score_seconds": 1.0, "n_train": 40, "n_test": 20, "n_anomalies": 2}
        common |= {"bits_per_dimension": np.nan, "specification": "", "error": None}
        results = pd.DataFrame(cells).assign(**common)
        notes = results[["dataset", "seed", "specification"]].assign(device=f"{device}, torch 2")
        monkeypatch.setattr(script, "load_results", lambda folder: results)
        monkeypatch.setattr(script, "devices_of", lambda folder: notes)
        script.record(tmp_path, "found", "command")
        return pd.read_csv(tmp_path / "found.csv")

    record("first", VAEDetector=0.7, FlowDetector=0.6)
    found = record("second", DiffusionDetector_network=0.8, VAEDetector=0.9)
    names = ["FlowDetector", "VAEDetector", "DiffusionDetector network"]
    assert found["detector"].tolist() == names * 2  # in the order of the families
    assert found["dataset"].tolist() == ["mnist:not-1"] * 3 + ["mnist:not-4"] * 3
    assert found["auroc"].tolist() == [0.6, 0.9, 0.8] * 2
    assert found["device"].str.partition(",")[0].tolist() == ["first", "second", "second"] * 2
    text = (tmp_path / "found.md").read_text()
    assert "| VAEDetector | 0.900 | 0.900 | – | – | – |" in text
    assert "first, torch" in text
    assert "second, torch" in text


def test_image_views_are_all_combined(digits_home):
    out = digits_home / "views.json"
    assert "pixels + gradients" in run("image_views.py", "--output", out)
    found = json.loads(out.read_text())["mnist"]
    assert len(found) == 14
    # (Images asked for that were among those stored would all be told apart.)
    assert all(len(values) == 5 and 0 < min(values) < 1 and max(values) <= 1 for values in found.values())


def test_autoencoders_of_images_stand_beside_principal_components(digits_home):
    out = digits_home / "autoencoders.json"
    assert "probabilistic PCA" in run("vae_images.py", "--output", out)
    found = json.loads(out.read_text())["variants"]
    assert set(found) == {"probabilistic PCA", "default"}
    assert all(one["mnist"] > 2 for one in found.values())
    assert 0 <= found["default"]["reconstruction, 8"] <= 1
    run("vae_images.py", "--output", out)
    assert json.loads(out.read_text())["variants"] == found


def test_bits_per_dimension_adds_families(digits_home):
    out = digits_home / "bits.json"
    run("bits_per_dimension.py", "--families", "vae", "--output", out)
    first = json.loads(out.read_text())["families"]["vae"]
    assert 2 < first["bits_per_dimension"] < 12
    run("bits_per_dimension.py", "--families", "vae", "diffusion", "--output", out)
    families = json.loads(out.read_text())["families"]
    assert families["vae"] == first
    assert np.isfinite(families["diffusion"]["bits_per_dimension"])
    assert out.with_suffix(".md").exists()


@pytest.mark.slow
def test_published_diffusion_time_runs_through(tmp_path):
    text = run("published_diffusion_time.py", tmp_path / "cells")
    assert "builtin:wine" in text
    assert "mean AUROC 0." in text


def test_the_page_of_results_shows_what_is_recorded():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "recorded_table.py")], capture_output=True, text=True, check=True
    )
    page = (FOLDER.parent / "docs" / "benchmark.md").read_text()
    assert done.stdout in page
