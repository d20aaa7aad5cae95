"""Folders on the disk: complete or not there, and of every format that there ever was."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from saved_attributes import new_attributes
from sklearn.base import clone
from sklearn.datasets import load_digits

import anomalib_gen
from anomalib_gen import EnergyDetector, load, persistence, save
from anomalib_gen.anomaly import ScoreNorm
from anomalib_gen.persistence import ModelFolderError, _document, _files, _tree

FOLDERS = Path(__file__).parent / "folders"


def read_all(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_in_a_folder(fitted, X, tmp_path):
    content = fitted.save(tmp_path / "deep" / "model", X=X)
    folder = tmp_path / "deep" / "model"
    assert set(read_all(folder)) == {"MODEL_CARD.md", "model.json", "tensors.safetensors"}
    assert persistence.verify(folder) == content
    facts = persistence.inspect(str(folder))
    assert facts["hash"] == content
    assert facts["class"] == "FlowDetector"
    assert facts["versions"]["torch"]
    (training,) = facts["training"]
    assert training["offset"] == fitted.offset_
    assert training["n_iter"] == fitted.n_iter_
    assert training["parameters"]["transform"] == "'realnvp'"
    assert [column["min"] for column in facts["schema"]["columns"]] == X.min(axis=0).tolist()
    card = (folder / "MODEL_CARD.md").read_text()
    assert content in card
    assert "FlowDetector" in card
    # Nothing is read from the card: it may be edited, or go.
    (folder / "MODEL_CARD.md").write_text("Approved by A. and B.")
    assert persistence.verify(folder) == content


def test_the_schema_of_rows(tiny, tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=50), "flag": rng.random(50) > 0.5, "n": np.arange(50)})
    detector = tiny().fit(frame)
    detector.save(tmp_path / "model", X=frame)
    schema = persistence.inspect(tmp_path / "model")["schema"]
    assert schema["named"]
    assert schema["n_rows"] == 50
    assert schema["columns"][1:] == [
        {"name": "flag", "type": "boolean", "missing": False},
        {"name": "n", "type": "integer", "missing": False, "min": 0, "max": 49},
    ]
    detector.save(tmp_path / "bare")
    schema = persistence.inspect(tmp_path / "bare")["schema"]
    assert schema == {
        "named": True,
        "n_rows": None,
        "columns": [{"name": name, "type": None} for name in frame],
    }
    assert "| flag | unknown |" in (tmp_path / "bare" / "MODEL_CARD.md").read_text()
    with pytest.raises(ValueError, match="columns of X are not those"):
        detector.save(tmp_path / "other", X=frame.rename(columns={"a": "b"}))
    with pytest.raises(ValueError, match="X has 2 columns"):
        detector.save(tmp_path / "other", X=frame[["a", "n"]])
    text = pd.DataFrame({"t": ["x", None, "y|<b>"], "when": pd.to_datetime(["2020-01-01"] * 3)})
    columns = _document.describe_rows(None, text)["columns"]
    assert columns[0] == {"name": "t", "type": "text", "missing": True, "categories": ["x", "y|<b>"]}
    assert columns[1] == {"name": "when", "type": "time", "missing": False}
    nullable = pd.DataFrame({"i": [1, None], "b": [True, None]}).astype({"i": "Int64", "b": "boolean"})
    assert _document.describe_rows(None, nullable)["columns"] == [
        {"name": "i", "type": "float", "missing": True, "min": 1.0, "max": 1.0},
        {"name": "b", "type": "boolean", "missing": True},
    ]
    # (So they come from Arrow, and of no rows or values nothing is known.)
    flags = pd.DataFrame({"b": [True, None], "t": ["x", pd.NA], "none": [None, None]}, dtype=object)
    kinds = [(c["type"], c["missing"]) for c in _document.describe_rows(None, flags)["columns"]]
    assert kinds == [("boolean", True), ("text", True), ("text", True)]
    assert _document.describe_rows(None, flags[:0])["n_rows"] == 0


def test_saving_replaces_only_when_asked(tiny, X, tmp_path):
    first, second = tiny(random_state=1).fit(X), tiny(random_state=2).fit(X)
    folder = tmp_path / "model"
    first.save(folder)
    before = read_all(folder)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        second.save(folder)
    assert read_all(folder) == before
    content = second.save(folder, overwrite=True)
    assert persistence.verify(folder) == content
    assert os.listdir(tmp_path) == ["model"]
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("three years")
    with pytest.raises(FileExistsError, match="no model folder"):
        second.save(other, overwrite=True)
    # Nor with a file of another program that has the same name as one of ours.
    (other / "model.json").write_text("{}")
    for refuse in (
        lambda: second.save(other, overwrite=True),
        lambda: persistence.check_place(other, overwrite=True),
    ):
        with pytest.raises(FileExistsError, match=r"holds 'thesis\.txt', which belongs to no model"):
            refuse()
    assert (other / "thesis.txt").read_text() == "three years"


def test_a_model_is_not_saved_into_another(fitted, tmp_path):
    content = fitted.save(tmp_path / "model")
    with pytest.raises(ModelFolderError, match="would be in the model folder"):
        fitted.save(tmp_path / "model" / "another")
    with pytest.raises(ModelFolderError, match="would be in the model folder"):
        persistence.check_place(tmp_path / "model" / "another", overwrite=False)
    assert persistence.verify(tmp_path / "model") == content


@pytest.mark.parametrize(
    "place", ["s3://bucket/model", "memory://b", "file:///tmp/model", Path("s3://bucket/model")], ids=str
)
def test_an_address_is_no_folder(fitted, tmp_path, monkeypatch, place):
    """As a path, ``s3://bucket/model`` would be a folder named ``s3:`` right here."""
    monkeypatch.chdir(tmp_path)
    for use in (fitted.save, load, persistence.verify, persistence.inspect, persistence.read_reference):
        with pytest.raises(ModelFolderError, match=r"is an address, and model folders are local.* copy it"):
            use(place)
    with pytest.raises(ModelFolderError, match="is an address"):
        persistence.check_place(place, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_a_colon_makes_no_address(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fitted.save("models/2026-11-27T03:15") == persistence.verify("models/2026-11-27T03:15")


@pytest.mark.parametrize("with_exchange", [True, False])
def test_a_folder_is_replaced_without_the_exchange_of_names(tiny, X, tmp_path, monkeypatch, with_exchange):
    if not with_exchange:
        monkeypatch.setattr(_files.ctypes, "CDLL", lambda *arguments, **options: object())
    tiny(random_state=1).fit(X).save(tmp_path / "model")
    content = tiny(random_state=2).fit(X).save(tmp_path / "model", overwrite=True)
    assert persistence.verify(tmp_path / "model") == content
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", range(12))
def test_a_failure_at_any_moment_leaves_what_was_there(
    tiny, fitted, X, tmp_path, monkeypatch, call, overwrite
):
    """Each call that touches the disk fails in turn: there is the old folder, the new one, or none, and no remains."""
    folder = tmp_path / "model"
    if overwrite:
        tiny(random_state=1).fit(X).save(folder)
    before = read_all(folder) if overwrite else None
    calls = iter(range(100))

    def failing(function):
        def wrapped(*arguments, **options):
            if next(calls) == call:
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename"):
            patch.setattr(os, name, failing(getattr(os, name)))
        patch.setattr("builtins.open", failing(open))
        patch.setattr(_files, "swap", failing(_files.swap))
        try:
            fitted.save(folder, overwrite=overwrite)
            failed = False
        except OSError:
            failed = True
    # Three files are opened and flushed, the folder is flushed if it can be, and gets its name.
    assert failed == (call in (0, 1, 2, 3, 4, 5, 7))
    if failed and overwrite:
        assert read_all(folder) == before
    if not failed:
        np.testing.assert_array_equal(load(folder).score_samples(X), fitted.score_samples(X))
    assert set(os.listdir(tmp_path)) <= {"model"}


@pytest.mark.parametrize("with_exchange", [True, False])
def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(
    tiny, X, tmp_path, monkeypatch, with_exchange
):
    """A model is fitted anew every night, and scored with at the same time."""
    if not with_exchange:
        monkeypatch.setattr(_files.ctypes, "CDLL", lambda *arguments, **options: object())
    folder, real = tmp_path / "model", persistence.read_file
    first, second = tiny(random_state=1).fit(X), tiny(random_state=2).fit(X)
    expected = persistence.save_described(second, tmp_path / "second", reference=b"[]")
    for moment, read, right in (
        ("tensors.safetensors", lambda: persistence.verify(folder), expected),
        ("reference.json", lambda: persistence.read_reference(folder), b"[]"),
    ):
        persistence.save_described(first, folder, reference=b"{}", overwrite=True)
        left = [1]

        def replaced(path, moment=moment, left=left, **options):
            if path.name == moment and left:
                left.pop()
                persistence.save_described(second, folder, reference=b"[]", overwrite=True)
            return real(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(persistence, "read_file", replaced)
            assert read() == right
        assert not left
    # What is damaged stays damaged.
    (folder / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="truncated"):
        load(folder)


HOLDER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(fitted, tmp_path):
    pytest.importorskip("fcntl")
    abandoned, living = tmp_path / ".model.0123abcd.tmp", tmp_path / ".model.89abcdef.tmp"
    others = [".model.tmp", ".model.0123.tmp", ".model2.0123abcd.tmp", ".model.0123abcd.tmp.bak", "models"]
    for path in (abandoned, living, *(tmp_path / name for name in others)):
        path.mkdir()
        (path / "tensors.safetensors").write_text("half")
    (tmp_path / ".model.fedcba98.tmp").symlink_to(tmp_path / "models")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(living)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            fitted.save(tmp_path / "model")
            expected = {*others, "model", ".model.fedcba98.tmp"}
            assert set(os.listdir(tmp_path)) == {*expected, living.name}
        finally:
            holder.kill()
    fitted.save(tmp_path / "model", overwrite=True)
    assert set(os.listdir(tmp_path)) == expected
    assert os.listdir(tmp_path / "models") == ["tensors.safetensors"]


def test_a_folder_that_was_taken_for_abandoned_is_made_again(fitted, tmp_path, monkeypatch):
    """Between its making and its lock another writer may remove it, or be about to."""
    pytest.importorskip("fcntl")
    real, seen = _files._lock, []

    def late(folder):
        seen.append(folder)
        if len(seen) == 1:
            folder.rmdir()
        if len(seen) == 2:
            raise BlockingIOError
        handle = real(folder)
        if len(seen) == 3:
            folder.rmdir()
        return handle

    monkeypatch.setattr(_files, "_lock", late)
    content = fitted.save(tmp_path / "model")
    assert len(set(seen)) == 4
    assert persistence.verify(tmp_path / "model") == content


def test_without_locks_nothing_is_taken_for_abandoned(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "fcntl", None)
    (tmp_path / ".model.0123abcd.tmp").mkdir()
    fitted.save(tmp_path / "model")
    assert set(os.listdir(tmp_path)) == {"model", ".model.0123abcd.tmp"}


# Formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["format-1-composed", "format-1-pipeline", "format-2-diffusion"])
@pytest.mark.filterwarnings("ignore:The folder's transformers were written")
def test_folders_of_every_format_are_read(name, tmp_path):
    """These folders stay as they are, whatever becomes of the format.

    So do the scores, but for those of the composition: the bound of its autoencoder is taken over other draws since.
    """
    expected = json.loads((FOLDERS / "expected.json").read_text())
    assert json.loads((FOLDERS / name / "model.json").read_text())["version"] == int(name.split("-")[1])
    rows = pd.DataFrame(expected["rows"], columns=["x", "y", "z"])
    model = load(FOLDERS / name)
    # (Another processor rounds differently.)
    np.testing.assert_allclose(model.score_samples(rows), expected[name], rtol=1e-9)
    save(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model.json").read_text())["version"] == _document.VERSION


def test_ranks_of_saved_models_end_where_they_did(tmp_path):
    """Ranks of stored rows go on beyond the greatest of them, but not in folders from before they did."""
    far = pd.DataFrame({"x": [9.0, 90.0], "y": [0.0, 0.0], "z": [0.0, 0.0]})

    def ranks(model):
        return model.model_.memory.coordinates(torch.as_tensor(model._scaler.transform(far.to_numpy())))[2][
            :, 0
        ]

    old = load(FOLDERS / "format-2-diffusion")
    new = clone(old).set_params(max_iter=1).fit(pd.DataFrame(np.eye(3), columns=["x", "y", "z"]))
    for name, model, same in (("old", old, True), ("new", new, False)):
        save(model, tmp_path / name)
        for other in (model, load(tmp_path / name), copy.deepcopy(model)):
            first, second = ranks(other)
            assert (first == second) == same
            np.testing.assert_array_equal(other.score_samples(far), model.score_samples(far))


@pytest.mark.parametrize("version", [2, 3, 4])
def test_stored_images_of_every_format_are_read(version, tmp_path):
    """These folders and their scores stay as they are, too.

    Places of images move together from the third format on, and views have half of the weight in the second and fourth.
    """
    name = f"format-{version}-images"
    expected = json.loads((FOLDERS / "expected.json").read_text())[name]
    assert json.loads((FOLDERS / name / "model.json").read_text())["version"] == version
    images = (load_digits().images[100:105, None] * 15).astype(np.uint8)
    model = load(FOLDERS / name)
    scores = model.score_samples(images)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    save(model, tmp_path / "again")
    copies = [load(tmp_path / "again"), copy.deepcopy(model), copy.deepcopy(model)]
    copies[2].model_.load_state_dict(model.model_.state_dict())
    for other in copies:
        other.model_.to("cpu").double()
        np.testing.assert_array_equal(other.score_samples(images), scores)


def test_a_parameter_that_is_new_since_the_folder_was_written_has_its_default(X, tmp_path, monkeypatch):
    part = ScoreNorm(summary="neighbors")
    detector = EnergyDetector(anomaly=part, max_iter=5, hidden_features=4, random_state=0, device="cpu").fit(
        X
    )

    def without_it(value):
        state = vars(value)
        return {k: v for k, v in state.items() if k != "weighting"} if isinstance(value, ScoreNorm) else state

    # As the class was before it had the parameter.
    monkeypatch.setattr(_tree, "vars", without_it, raising=False)
    save(detector, tmp_path / "model")
    assert '"weighting"' not in (tmp_path / "model" / "model.json").read_text()
    monkeypatch.undo()
    loaded = load(tmp_path / "model")
    assert loaded.anomaly_.weighting == "score"
    np.testing.assert_array_equal(loaded.score_samples(X), detector.score_samples(X))


def test_a_format_is_upgraded_step_by_step(fitted, X, tmp_path, monkeypatch):
    """Two later formats, each with other names, read what the present one wrote."""
    content, now = fitted.save(tmp_path / "model"), _document.VERSION

    def rename(document):
        document["object"] = document.pop("model")
        return document

    def rename_back(document):
        assert document["version"] == now + 1
        document["model"] = document.pop("object")
        return document

    monkeypatch.setattr(_document, "VERSION", now + 2)
    monkeypatch.setattr(_document, "UPGRADES", {now: rename, now + 1: rename_back})
    np.testing.assert_array_equal(load(tmp_path / "model").score_samples(X), fitted.score_samples(X))
    assert persistence.verify(tmp_path / "model") == content


def test_there_is_an_upgrade_from_every_version():
    assert set(_document.UPGRADES) == set(range(1, _document.VERSION))


def test_an_attribute_that_the_format_does_not_know_is_noticed(tiny, X, tmp_path, monkeypatch):
    detector = tiny().fit(X)
    detector.save(tmp_path / "model")
    document = json.loads((tmp_path / "model" / "model.json").read_text())
    assert new_attributes(document) == {}
    detector.novelty_ = 1
    detector.model_.register_buffer("surprise", torch.zeros(1))
    detector.save(tmp_path / "new")
    document = json.loads((tmp_path / "new" / "model.json").read_text())
    assert new_attributes(document) == {
        "anomalib_gen.detectors.flow:FlowDetector": ["novelty_"],
        "anomalib_gen.models.flow:FlowModel": ["surprise"],
    }
    # With a default on the class, folders that do not tell it can be read.
    monkeypatch.setattr(type(detector), "novelty_", 0, raising=False)
    assert "anomalib_gen.detectors.flow:FlowDetector" not in new_attributes(document)
    monkeypatch.setattr(_document, "VERSION", _document.VERSION + 1)
    assert "is missing" in str(new_attributes(document))


def test_a_later_format_says_so(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(anomalib_gen.persistence, "VERSION", _document.VERSION + 1)
    fitted.save(tmp_path / "model")
    with pytest.raises(ModelFolderError, match="Install a newer anomalib_gen"):
        load(tmp_path / "model")


def test_another_scikit_learn_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(anomalib_gen.persistence, "installed_versions", lambda: {"scikit-learn": "99.0"})
    with pytest.warns(UserWarning, match=r"written by scikit-learn .*, and 99\.0 is installed"):
        load(FOLDERS / "format-1-pipeline")
