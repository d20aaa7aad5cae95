"""The manifest is complete and consistent, and is found both in a checkout and in a wheel."""

import ast
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import anomalib_gen.datasets as datasets
from anomalib_gen.datasets._adbench import _read_npz, _sha256
from anomalib_gen.datasets._manifest import manifest_folder, read_card, read_manifest, resolve_name

ENTRIES = list(read_manifest("adbench").values())
PACKAGE = Path(datasets.__file__).parent


def test_lists_the_47_classical_tables_in_adbench_order():
    assert [entry.file for entry in ENTRIES] == [
        f"{i}_{entry.name}.npz" for i, entry in enumerate(ENTRIES, 1)
    ]
    assert len({entry.name.lower() for entry in ENTRIES}) == 47


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entry_is_consistent(entry):
    assert entry.url.startswith("https://raw.githubusercontent.com/Minqi824/ADBench/")
    assert entry.url.endswith(f"/{entry.file}")
    assert "/main/" not in entry.url  # pinned to a commit
    assert entry.licence == "BSD-2-Clause"
    assert 0 < entry.n_anomalies < entry.n_samples
    assert (entry.sha256 is None) == (entry.bytes is None) == (entry.n_duplicates is None)
    assert entry.sha256 is None or len(entry.sha256) == 64


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.sha256], ids=lambda entry: entry.name)
def test_entry_agrees_with_the_file(entry):
    home = os.environ.get("ANOMALIB_GEN_DATA")
    if not home:
        pytest.skip("ANOMALIB_GEN_DATA is not set: no local ADBench files to compare the manifest with")
    path = Path(home) / "adbench" / entry.file
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    assert (path.stat().st_size, _sha256(path)) == (entry.bytes, entry.sha256)
    X, y = _read_npz(path)
    assert (*X.shape, y.sum()) == (entry.n_samples, entry.n_features, entry.n_anomalies)
    rows = np.ascontiguousarray(
        np.c_[X.astype(float), y] + 0.0
    )  # adding 0 makes -0.0 equal to 0.0 as bytes too
    distinct = Counter(rows.view(f"V{rows.shape[1] * rows.itemsize}").ravel().tolist())
    assert len(rows) - len(distinct) == entry.n_duplicates


def test_card_states_the_duplicates_of_the_manifest():
    card = read_card("adbench")
    for entry in ENTRIES:
        if entry.n_duplicates:
            assert f"| {entry.name} | {entry.n_duplicates:,} |" in card


@pytest.mark.parametrize("family", ["adbench", "sklearn", "synthetic"])
def test_cards_name_origin_licence_labels_and_defects(family):
    card = read_card(family)
    for word in ("Origin", "icence", "Labels here", "nown defects"):
        assert word in card


def test_manifest_folder_in_a_checkout_and_in_a_wheel(tmp_path):
    checkout = tmp_path / "checkout" / "anomalib_gen" / "datasets"
    wheel = tmp_path / "site-packages" / "anomalib_gen" / "datasets"
    for package, manifest in ((checkout, tmp_path / "checkout" / "datasets"), (wheel, wheel / "manifest")):
        package.mkdir(parents=True)
        manifest.mkdir()
        (manifest / "adbench.toml").touch()
        assert manifest_folder(package) == manifest


def test_manifest_folder_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adbench\.toml is neither in .* install it again"):
        manifest_folder(tmp_path / "a" / "b")


def test_resolve_name():
    assert resolve_name("CARDIO", ["cardio", "http"], listing="f()") == "cardio"
    with pytest.raises(ValueError, match=r"name='cardo'. Did you mean 'cardio'\? f\(\) lists the names"):
        resolve_name("cardo", ["cardio", "http"], listing="f()")
    with pytest.raises(ValueError, match=r"name='zzz'. f\(\) lists the names"):
        resolve_name("zzz", ["cardio", "http"], listing="f()")
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        resolve_name(3, ["cardio"], listing="f()")


def test_package_imports_only_light_things_at_the_top():
    allowed = {"numpy", "scipy", "sklearn", *sys.stdlib_module_names}
    for file in PACKAGE.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("anomalib_gen.datasets"), (
                    file.name,
                    name,
                )


def test_all_names_are_public_and_documented():
    for name in datasets.__all__:
        assert getattr(datasets, name).__doc__
