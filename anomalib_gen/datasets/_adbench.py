"""The 47 classical tables of ADBench: find a file, verify it, and hand it over with +1/-1 labels."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalib_gen.datasets._bunch import make_bunch
from anomalib_gen.datasets._fetch import download as _download
from anomalib_gen.datasets._manifest import DatasetEntry, read_card, read_manifest, resolve_name

_COLLECTION = "adbench"
_DATA_VARIABLE = "ANOMALIB_GEN_DATA"
_MIRROR_VARIABLE = "ANOMALIB_GEN_MIRROR"


def load_adbench(
    name: str,
    *,
    data_home: str | os.PathLike[str] | None = None,
    download: bool = True,
    as_frame: bool = False,
    return_X_y: bool = False,
) -> Any:
    """Load one classical table of ADBench as an anomaly detection task.

    The file is looked for in ``data_home``, in the folder named by the environment variable
    ``ANOMALIB_GEN_DATA`` (both directly and in their subfolder ``adbench``) and in the cache; if it is in
    none of them it is downloaded. A file that you put into one of the first two folders and that differs from
    the recorded checksum is loaded with a warning. A cached one that differs is downloaded again, never
    loaded.

    Parameters
    ----------
    name : str
        A name from `list_adbench`, in any case.
    data_home : str or path-like, optional
        First folder to look in, and the folder to download to. Default: look in ``ANOMALIB_GEN_DATA`` and the
        cache, download to the cache.
    download : bool, default=True
        Download a file that is nowhere on this machine. Files without a recorded checksum are never
        downloaded.
    as_frame : bool, default=False
        Return ``data`` as a DataFrame and ``target`` as a Series.
    return_X_y : bool, default=False
        Return ``(data, target)`` instead of a `Bunch`.

    Returns
    -------
    sklearn.utils.Bunch
        - data : float64 array of shape (n_samples, n_features), in file order, duplicates included
        - target : int array of shape (n_samples,), +1 inlier, -1 anomaly
        - feature_names : list of str, ``x0``, ``x1``, ... (ADBench names no columns)
        - name : str, as in the manifest
        - DESCR : str, the facts of the table and the card of the collection
        - path : Path of the file that was read

    Raises
    ------
    ValueError
        Unknown name, a file that is no ADBench table, or a download that differs from its checksum.
    FileNotFoundError
        The file is absent and may not be downloaded; the message lists the places that were searched.
    ConnectionError
        The download failed.

    Warns
    -----
    UserWarning
        A file of yours differs from the manifest.

    References
    ----------
    .. [1] Han, Hu, Huang, Jiang, Zhao. "ADBench: Anomaly Detection Benchmark", NeurIPS 2022.

    Examples
    --------
    >>> from anomalib_gen.datasets import load_adbench
    >>> cardio = load_adbench("cardio")  # doctest: +SKIP
    >>> cardio.data.shape, (cardio.target == -1).sum()  # doctest: +SKIP
    ((1831, 21), 176)
    """
    entry = _entry(name)
    path = _locate(entry, data_home)
    if path is None:
        if not download or entry.sha256 is None:
            raise FileNotFoundError(_absent(entry, data_home))
        try:
            path = fetch_adbench(entry.name, data_home=data_home)
        except OSError as error:
            error.add_note(_absent(entry, data_home))
            raise
    elif entry.sha256 is not None and (found := _sha256(path)) != entry.sha256:
        warnings.warn(
            f"{path} differs from the manifest (sha256 {found}, recorded {entry.sha256}). It is loaded, as "
            "it lies in a folder of yours, but results on it may not compare with published ones.",
            UserWarning,
            stacklevel=2,
        )
    X, y = _read_npz(path)
    shape = (len(X), X.shape[1], int(y.sum()))
    published = (entry.n_samples, entry.n_features, entry.n_anomalies)
    if entry.sha256 is None and shape != published:
        warnings.warn(
            f"{path} holds (rows, columns, anomalies) = {shape}, ADBench publishes {published}: "
            "it may be another version of the table.",
            UserWarning,
            stacklevel=2,
        )
    return make_bunch(
        X,
        y == 1,
        name=entry.name,
        description=_describe(entry),
        path=path,
        as_frame=as_frame,
        return_X_y=return_X_y,
    )


def list_adbench(
    *,
    data_home: str | os.PathLike[str] | None = None,
    available_only: bool = False,
    as_frame: bool = False,
) -> Any:
    """Return the names of the classical ADBench tables, sorted without regard to case: ADBench's own order.

    Parameters
    ----------
    data_home : str or path-like, optional
        As in `load_adbench`; matters only with ``available_only``.
    available_only : bool, default=False
        Only the tables that `load_adbench` finds on this machine, without any download.
    as_frame : bool, default=False
        Return the manifest as a DataFrame with one row a table, indexed by name: file, url, licence,
        n_samples, n_features, n_anomalies, n_duplicates, sha256, bytes. The last three are missing where no
        file was checked.

    Returns
    -------
    list of str or pandas.DataFrame
    """
    entries = list(read_manifest(_COLLECTION).values())
    if available_only:
        entries = [entry for entry in entries if _locate(entry, data_home) is not None]
    if not as_frame:
        return [entry.name for entry in entries]
    import pandas as pd

    columns = list(DatasetEntry.__dataclass_fields__)
    frame = pd.DataFrame([asdict(entry) for entry in entries], columns=columns).set_index("name")
    return frame.astype({"n_duplicates": "Int64", "bytes": "Int64"})


def fetch_adbench(
    name: str,
    *,
    data_home: str | os.PathLike[str] | None = None,
    base_url: str | None = None,
    progressbar: bool = False,
    retries: int = 3,
) -> Path:
    """Make sure that a verified copy of one ADBench file is on this machine.

    Nothing is downloaded if the file is already there with the recorded checksum. An interrupted download is
    kept as ``<file>.part`` and resumed by the next call.

    Parameters
    ----------
    name : str
        A name from `list_adbench`, in any case.
    data_home : str or path-like, optional
        The file goes to ``<data_home>/adbench``. Default: the user's cache folder.
    base_url : str, optional
        Folder of a mirror; the file name is appended. Default: the environment variable
        ``ANOMALIB_GEN_MIRROR``, else the address in the manifest.
    progressbar : bool, default=False
        Show a progress bar.
    retries : int, default=3
        Further attempts after a broken or truncated transfer or a temporary HTTP status.

    Returns
    -------
    pathlib.Path
        The verified file.

    Raises
    ------
    ValueError
        Unknown name, negative ``retries``, no recorded checksum, or received bytes that differ from it; those
        are removed.
    ConnectionError
        No complete transfer after all attempts.
    """
    entry = _entry(name)
    if retries < 0:
        raise ValueError(f"retries must be 0 or more, got {retries}.")
    home = _cache_folder() if data_home is None else Path(data_home).expanduser()
    return _download(
        entry,
        home / _COLLECTION,
        base_url=base_url or os.environ.get(_MIRROR_VARIABLE) or None,
        retries=retries,
        progressbar=progressbar,
    )


def _entry(name: str) -> DatasetEntry:
    manifest = read_manifest(_COLLECTION)
    return manifest[resolve_name(name, manifest, listing="list_adbench()")]


def _cache_folder() -> Path:
    import pooch

    return Path(pooch.os_cache("anomalib_gen"))


def _candidates(entry: DatasetEntry, data_home: str | os.PathLike[str] | None) -> Iterator[tuple[Path, bool]]:
    """Yield the paths to look at, in order, and whether the user placed the file there."""
    for home in (data_home, os.environ.get(_DATA_VARIABLE)):
        if home:
            folder = Path(home).expanduser()
            yield folder / _COLLECTION / entry.file, True
            yield folder / entry.file, True
    yield _cache_folder() / _COLLECTION / entry.file, False


def _locate(entry: DatasetEntry, data_home: str | os.PathLike[str] | None) -> Path | None:
    for path, is_users in _candidates(entry, data_home):
        if path.is_file() and (is_users or entry.sha256 in (None, _sha256(path))):
            return path
    return None


def _absent(entry: DatasetEntry, data_home: str | os.PathLike[str] | None) -> str:
    looked = "".join(
        f"\n  {path}" + (" (present, but its checksum is wrong)" if path.is_file() else "")
        for path, _ in _candidates(entry, data_home)
    )
    if entry.sha256 is None:
        remedy = (
            "It is not downloaded, because no checksum is recorded to verify it by: "
            f"fetch {entry.url} yourself, check it, and put the file into one of these folders."
        )
    else:
        remedy = (
            f"Pass download=True, call fetch_adbench({entry.name!r}), or put {entry.file} into one of these "
            f"folders; data_home or the environment variable {_DATA_VARIABLE} names a folder of yours."
        )
    return f"The ADBench table {entry.name!r} was not found. Looked for:{looked}\n{remedy}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ``X`` (n, d) and ``y`` (n,) of an ADBench file, where ``y`` is 1 for anomalies."""
    try:
        # No table of the collection needs pickle, and unpickling a foreign file runs its code.
        with np.load(path, allow_pickle=False) as archive:
            X, y = archive["X"], archive["y"]
    except Exception as error:  # zip, zlib, npy header and missing members: each raises its own
        raise ValueError(_corrupt(path, f"{type(error).__name__}: {error}")) from error
    if X.dtype.kind not in "buif":
        raise ValueError(_corrupt(path, f"X must be numeric, got dtype {X.dtype}"))
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(_corrupt(path, f"X must be a table with rows and columns, got shape {X.shape}"))
    if y.shape != (len(X),):
        raise ValueError(_corrupt(path, f"y must have shape ({len(X)},) like the rows of X, got {y.shape}"))
    values = np.unique(y).tolist()
    if not set(values) <= {0, 1}:
        raise ValueError(_corrupt(path, f"the labels y must be 0 (normal) or 1 (anomaly), got {values[:5]}"))
    return X, y


def _corrupt(path: Path, found: str) -> str:
    return f"{path} is not an ADBench table: {found}. Replace it, or delete it to have it downloaded again."


def _describe(entry: DatasetEntry) -> str:
    duplicates = "not counted" if entry.n_duplicates is None else str(entry.n_duplicates)
    facts = (
        f"ADBench table {entry.name} ({entry.file})\n"
        f"samples: {entry.n_samples}, features: {entry.n_features}, anomalies: {entry.n_anomalies}, "
        f"duplicate rows: {duplicates}\nsource: {entry.url}\nlicence: {entry.licence}\n"
    )
    return f"{facts}\n{read_card(_COLLECTION)}"
