"""What is known of each data set before it is opened: manifests and cards of the top-level ``datasets/``."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One data set of the manifest.

    ``sha256``, ``bytes`` and ``n_duplicates`` are None for a file that was never checked; its counts are then
    those that its publisher states.
    """

    name: str
    file: str
    url: str
    licence: str
    n_samples: int
    n_features: int
    n_anomalies: int
    n_duplicates: int | None = None
    sha256: str | None = None
    bytes: int | None = None


def manifest_folder(package_folder: Path = _HERE) -> Path:
    """Return the folder of manifests and cards: ``manifest/`` in a wheel, ``datasets/`` in a checkout."""
    candidates = (package_folder / "manifest", package_folder.parents[1] / "datasets")
    for folder in candidates:
        if (folder / "adbench.toml").is_file():
            return folder
    raise FileNotFoundError(
        f"The data set manifest adbench.toml is neither in {candidates[0]} nor in {candidates[1]}: "
        "the installation of anomalib_gen is incomplete; install it again."
    )


@cache
def read_manifest(collection: str) -> dict[str, DatasetEntry]:
    """Return the entries of ``<collection>.toml`` by name, in the order of the file."""
    text = (manifest_folder() / f"{collection}.toml").read_text(encoding="utf-8")
    entries = [DatasetEntry(**table) for table in tomllib.loads(text)["dataset"]]
    return {entry.name: entry for entry in entries}


def read_card(family: str) -> str:
    """Return the Markdown card of a family of data sets."""
    return (manifest_folder() / f"{family}.md").read_text(encoding="utf-8")


def resolve_name(name: str, known: Iterable[str], *, listing: str | None = None) -> str:
    """Return the member of ``known`` that equals ``name`` but for case; the error suggests near ones, or all."""
    by_key = {candidate.lower(): candidate for candidate in known}
    names = (
        f"{listing} lists the names." if listing else f"Known names: {', '.join(map(repr, by_key.values()))}."
    )
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}. {names}")
    if name.lower() in by_key:
        return by_key[name.lower()]
    near = [repr(by_key[key]) for key in difflib.get_close_matches(name.lower(), by_key, n=3)]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"Unknown data set name={name!r}. {hint}{names}")
