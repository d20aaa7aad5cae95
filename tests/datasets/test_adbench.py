"""Finding, verifying and reading ADBench files."""

import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from anomalib_gen.datasets import list_adbench, load_adbench

real = pytest.mark.skipif(
    not (Path(os.environ.get("ANOMALIB_GEN_DATA", "")) / "adbench" / "6_cardio.npz").is_file(),
    reason="ANOMALIB_GEN_DATA does not name a folder with adbench/6_cardio.npz",
)


def place(folder, body, file="1_Toy.npz"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(body)
    return folder / file


@real
def test_load_real_table():
    bunch = load_adbench("CARDIO", download=False)
    assert bunch.data.shape == (1831, 21)
    assert bunch.data.dtype == np.float64
    assert (bunch.target == -1).sum() == 176
    assert set(bunch.target) == {-1, 1}
    assert bunch.name == "cardio"
    assert bunch.path.name == "6_cardio.npz"
    assert "duplicate rows: 9" in bunch.DESCR
    assert len(bunch.feature_names) == 21


@real
def test_list_available_real_tables():
    available = list_adbench(available_only=True)
    assert "cardio" in available
    assert set(available) <= set(list_adbench())


def test_list_is_sorted_without_case():
    names = list_adbench()
    assert names == sorted(names, key=str.lower)
    assert len(names) == 47


def test_list_as_frame():
    frame = list_adbench(as_frame=True)
    assert frame.loc["http", "n_duplicates"] == 345596
    assert pd.isna(frame.loc["fraud", "sha256"])
    assert frame.index.name == "name"


def test_list_available_of_an_empty_machine(toy, cache):
    assert list_adbench(available_only=True) == []
    assert list_adbench(available_only=True, as_frame=True).columns[0] == "file"
    place(cache / "adbench", toy)
    assert list_adbench(available_only=True) == ["Toy"]


@pytest.mark.parametrize("subfolder", ["", "adbench"])
def test_load_from_data_home(toy, tmp_path, subfolder):
    path = place(tmp_path / "home" / subfolder, toy)
    bunch = load_adbench("toy", data_home=str(tmp_path / "home"))
    assert bunch.path == path
    assert bunch.target.tolist() == np.where(np.arange(5000) % 10 == 0, -1, 1).tolist()


def test_search_order(toy, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ANOMALIB_GEN_DATA", str(tmp_path / "variable"))
    cached = place(cache / "adbench", toy)
    assert load_adbench("toy", data_home=tmp_path / "home").path == cached
    named = place(tmp_path / "variable" / "adbench", toy)
    assert load_adbench("toy", data_home=tmp_path / "home").path == named
    explicit = place(tmp_path / "home", toy)
    assert load_adbench("toy", data_home=tmp_path / "home").path == explicit


def test_frames_and_pairs(toy, cache):
    place(cache / "adbench", toy)
    bunch = load_adbench("toy", as_frame=True)
    assert list(bunch.data.columns) == bunch.feature_names == ["x0", "x1", "x2"]
    assert bunch.target.name == "target"
    X, y = load_adbench("toy", return_X_y=True)
    assert isinstance(X, np.ndarray)
    np.testing.assert_array_equal(X, bunch.data)
    np.testing.assert_array_equal(y, bunch.target)


def test_bunch_pickles(toy, cache):
    place(cache / "adbench", toy)
    bunch = pickle.loads(pickle.dumps(load_adbench("toy")))
    assert bunch.data.shape == (5000, 3)


def test_users_file_with_another_checksum_is_loaded_with_a_warning(toy, tmp_path, write_npz):
    path = write_npz(tmp_path / "home" / "1_Toy.npz", X=np.eye(4), y=np.array([0, 0, 0, 1]))
    with pytest.warns(UserWarning, match=r"1_Toy\.npz differs from the manifest"):
        bunch = load_adbench("toy", data_home=path.parent)
    assert bunch.data.shape == (4, 4)


def test_cached_file_with_another_checksum_is_refused(toy, cache, write_npz):
    write_npz(cache / "adbench" / "1_Toy.npz", X=np.eye(4), y=np.array([0, 0, 0, 1]))
    assert list_adbench(available_only=True) == []
    with pytest.raises(FileNotFoundError, match="present, but its checksum is wrong"):
        load_adbench("toy", download=False)


def test_absent_file_names_the_places_and_the_remedy(toy, cache, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_adbench("toy", data_home=tmp_path / "home", download=False)
    message = str(error.value)
    for part in (
        str(tmp_path / "home" / "adbench" / "1_Toy.npz"),
        str(cache),
        "fetch_adbench('Toy')",
        "data_home",
    ):
        assert part in message


def test_table_without_checksum_is_never_downloaded(toy, server, monkeypatch):
    monkeypatch.setenv("ANOMALIB_GEN_MIRROR", server.url)
    with pytest.raises(FileNotFoundError, match="not downloaded, because no checksum is recorded"):
        load_adbench("unverified")
    assert server.requests == []


def test_table_without_checksum_loads_and_is_compared_with_the_published_counts(
    toy, tmp_path, write_npz, recwarn
):
    place(tmp_path / "home", toy, "2_unverified.npz")
    assert load_adbench("unverified", data_home=tmp_path / "home").data.shape == (5000, 3)
    assert not recwarn
    write_npz(tmp_path / "home" / "2_unverified.npz", X=np.eye(4), y=np.array([0, 0, 0, 1]))
    with pytest.warns(UserWarning, match=r"\(4, 4, 1\), ADBench publishes \(5000, 3, 500\)"):
        load_adbench("unverified", data_home=tmp_path / "home")


def test_unknown_name_suggests():
    with pytest.raises(ValueError, match=r"name='cardioo'. Did you mean 'cardio'"):
        load_adbench("cardioo")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.eye(3)}, "KeyError"),
        ({"X": np.eye(3).astype(str), "y": np.zeros(3)}, "X must be numeric, got dtype <U"),
        ({"X": np.eye(3).astype(object), "y": np.zeros(3)}, "Object arrays cannot be loaded"),
        ({"X": np.zeros(3), "y": np.zeros(3)}, r"X must be a table with rows and columns, got shape \(3,\)"),
        (
            {"X": np.zeros((0, 3)), "y": np.zeros(0)},
            r"X must be a table with rows and columns, got shape \(0, 3\)",
        ),
        ({"X": np.eye(3), "y": np.zeros(2)}, r"y must have shape \(3,\) like the rows of X, got \(2,\)"),
        (
            {"X": np.eye(3), "y": np.zeros((3, 1))},
            r"y must have shape \(3,\) like the rows of X, got \(3, 1\)",
        ),
        (
            {"X": np.eye(3), "y": np.array([1, -1, 1])},
            r"y must be 0 \(normal\) or 1 \(anomaly\), got \[-1, 1\]",
        ),
        ({"X": np.eye(3), "y": np.array([0, np.nan, 1])}, r"y must be 0 \(normal\) or 1"),
    ],
)
def test_corrupt_content(toy, tmp_path, write_npz, arrays, message):
    write_npz(tmp_path / "home" / "2_unverified.npz", **arrays)
    with pytest.raises(ValueError, match=rf"2_unverified\.npz is not an ADBench table: .*{message}"):
        load_adbench("unverified", data_home=tmp_path / "home")


@pytest.mark.parametrize("body", [b"", b"PK\x03\x04 and no more", b"<html>404</html>"])
def test_corrupt_file(toy, tmp_path, body):
    place(tmp_path / "home", body, "2_unverified.npz")
    with pytest.raises(ValueError, match=r"is not an ADBench table: .* Replace it"):
        load_adbench("unverified", data_home=tmp_path / "home")
