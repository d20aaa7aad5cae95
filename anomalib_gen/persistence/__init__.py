"""Model folders: fitted detectors and pipelines on disk, without pickle.

    model/
      model.json            what the model is made of, the columns it takes, versions, a hash over everything
      tensors.safetensors   all numbers
      part-0.skops ...      scikit-learn transformers, where there are some
      reference.json        what the training rows looked like, where that is known; nothing is loaded from it
      MODEL_CARD.md         for people; nothing is read from it

A loaded model gives the same scores, bit for bit, on the same machine. A folder is written completely or not at all,
and reading one runs no code from it: classes are looked up by name among those of this package and of the libraries
that networks are built from, and their objects are filled with what the folder says, without calling a method of them.
What was damaged, cut off or changed is refused. The hash protects from accidents, and from changes by those who do not
make a new one; who may write to the folder can still make the model wrong. So keep the hash of a model you have
approved elsewhere, and compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from anomalib_gen._warnings import warn_user
from anomalib_gen.persistence._allowed import normalise_trusted
from anomalib_gen.persistence._card import model_card
from anomalib_gen.persistence._document import (
    FORMAT,
    VERSION,
    canonical,
    content_hash,
    describe_rows,
    describe_training,
    installed_versions,
    malformed_part,
    read_document,
)
from anomalib_gen.persistence._errors import ModelFolderError
from anomalib_gen.persistence._estimators import dump_estimator, load_estimator
from anomalib_gen.persistence._files import (
    CARD,
    DOCUMENT,
    REFERENCE,
    TENSORS,
    check_place,
    list_folder,
    local_path,
    make_folder,
    part_name,
    read_file,
    steadily,
    swap,
    sync_folder,
    write_folder,
)
from anomalib_gen.persistence._tree import Decoder, Encoder, contains_ours

__all__ = [
    "MAX_BYTES",
    "ModelFolderError",
    "check_place",
    "inspect",
    "load",
    "load_described",
    "make_folder",
    "model_card",
    "read_reference",
    "save",
    "save_described",
    "swap",
    "sync_folder",
    "verify",
]

MAX_DOCUMENT_BYTES = 2**24
"""Of model.json; those of our own models have some ten thousand, and a hundred for each column."""
MAX_BYTES = 2**32
"""Of all files of a folder together, unless asked for more."""


def save(
    model: Any,
    folder: str | PathLike[str],
    *,
    X: Any = None,
    overwrite: bool = False,
    trusted: Collection[str] = (),
) -> str:
    """Save a fitted detector, or a scikit-learn pipeline around one, to a folder.

    Parameters
    ----------
    model : detector or pipeline
        A detector of this package, or a pipeline, column transformer, feature union or frozen estimator with one in it.
    folder : str or path
        The folder to make; it appears when it is complete.
    X : array-like or data frame of shape (n_samples, n_features), optional
        Rows as `fit` saw them: their types and ranges become the folder's schema. None leaves those open. Of images,
        which may be given as a folder or as paths where `fit` took those, nothing is kept but the number, if it is
        known.
    overwrite : bool, default=False
        Whether to replace a model folder of that name.
    trusted : list of str, default=()
        Import paths of classes and functions of your own (``"package.module:name"``) that the model may be made of.

    Returns
    -------
    str
        The content hash, in hexadecimal; equal models have equal hashes.

    Raises
    ------
    ModelFolderError
        If the model has a part that cannot be saved without pickle; the message names it. Or if the folder is an
        address (``scheme://...``): model folders are local.
    FileExistsError
        If there is something under that name already.
    NotFittedError
        If the model is not fitted.
    """
    return save_described(model, folder, X=X, overwrite=overwrite, trusted=trusted)


def save_described(
    model: Any,
    folder: str | PathLike[str],
    *,
    X: Any = None,
    schema: Mapping[str, Any] | None = None,
    reference: bytes | None = None,
    overwrite: bool = False,
    trusted: Collection[str] = (),
) -> str:
    """Save a model together with what its folder is to say of it, as `load_described` loads it.

    Parameters
    ----------
    model : detector or pipeline
        As for `save`.
    folder : str or path
    X : array-like or data frame of shape (n_samples, n_features), optional
        As for `save`.
    schema : mapping, optional
        The "schema" of another folder whose model takes the same rows; X is then not looked at.
    reference : bytes, optional
        A file about the training rows, kept in the folder and under its hash, and returned by `read_reference`.
    overwrite : bool, default=False
    trusted : list of str, default=()
        As for `save`.

    Returns
    -------
    str
        The content hash, in hexadecimal.

    Raises
    ------
    ModelFolderError, FileExistsError, NotFittedError
        As for `save`.
    """
    if not isinstance(model, BaseEstimator) or not contains_ours(model):
        raise TypeError(
            f"save is for detectors of anomalib_gen and pipelines around them, got {type(model).__name__!r}."
        )
    check_is_fitted(model)
    place = local_path(folder)
    paths = normalise_trusted(trusted)
    encoder = Encoder(paths, lambda estimator: dump_estimator(estimator, paths))
    name = type(model).__name__
    try:
        tree = encoder.encode(model, name)
    except RecursionError:
        raise ModelFolderError(f"{name} is nested too deeply to be saved.") from None
    from safetensors.numpy import save as dump_arrays

    files = {TENSORS: dump_arrays(encoder.arrays)}
    files |= {part_name(k): data for k, data in enumerate(encoder.estimators)}
    if reference is not None:
        files[REFERENCE] = bytes(reference)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "class": name,
        "versions": installed_versions(),
        "schema": describe_rows(model, X) if schema is None else dict(schema),
        "training": describe_training(model),
        "files": {
            key: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for key, data in files.items()
        },
        "model": tree,
    }
    document["hash"] = content_hash(document)
    files[DOCUMENT] = canonical(document)
    if len(files[DOCUMENT]) > MAX_DOCUMENT_BYTES:
        raise ModelFolderError(
            f"{name} has too many parts to be saved: {len(files[DOCUMENT])} bytes of description."
        )
    files[CARD] = model_card(document).encode()
    write_folder(place, files, overwrite=overwrite)
    return str(document["hash"])


def load(folder: str | PathLike[str], *, trusted: Collection[str] = (), max_bytes: int = MAX_BYTES) -> Any:
    """Load a model from a folder that `save` made.

    Parameters
    ----------
    folder : str or path
    trusted : list of str, default=()
        Import paths of classes and functions of your own that the model may be made of, as for `save`.
    max_bytes : int, default=2**32
        Refuse folders whose files are larger in all, before anything of that size is allocated.

    Returns
    -------
    detector or pipeline
        On the CPU, wherever it was fitted; `device` says where it scores, if that is there.

    Raises
    ------
    ModelFolderError
        If the folder is damaged, was changed, or holds what a model folder must not hold, or is an address.
    FileNotFoundError
        If there is no such folder.

    Warns
    -----
    UserWarning
        If another version of scikit-learn wrote the folder's transformers.

    Notes
    -----
    Nothing of the folder is ever run, unlike with pickle. See `anomalib_gen.persistence` for what the content hash
    protects from.
    """
    return _load(local_path(folder), trusted, max_bytes)[0]


def load_described(
    folder: str | PathLike[str], *, trusted: Collection[str] = (), max_bytes: int = MAX_BYTES
) -> tuple[Any, dict[str, Any]]:
    """Load a model together with what its folder says of it, from one reading: the hash is that of the model.

    Parameters
    ----------
    folder : str or path
    trusted : list of str, default=()
        As for `load`.
    max_bytes : int, default=2**32
        As for `load`.

    Returns
    -------
    model : detector or pipeline
    facts : dict
        As from `inspect`.

    Raises
    ------
    ModelFolderError, FileNotFoundError
        As for `load`.
    """
    return _load(local_path(folder), trusted, max_bytes)


def inspect(folder: str | PathLike[str]) -> dict[str, Any]:
    """Read what a folder says of itself, without loading the model.

    Parameters
    ----------
    folder : str or path

    Returns
    -------
    dict
        "format", "class", "hash", "version", "versions", "schema", "training" and "files".

    Raises
    ------
    ModelFolderError
        If the folder or its document is damaged; the other files are not read, see `verify`.
    FileNotFoundError
        If there is no such folder.
    """
    path = local_path(folder)
    return _facts(steadily(path, lambda: _read_document(path)[0]))


def read_reference(folder: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes | None:
    """Read the file about the training rows of a folder, checked against the folder's hash.

    Parameters
    ----------
    folder : str or path
    max_bytes : int, default=2**32
        Refuse a larger one.

    Returns
    -------
    bytes or None
        None if the folder has none.

    Raises
    ------
    ModelFolderError, FileNotFoundError
        As for `load`; the other files are not read.
    """
    path = local_path(folder)
    return steadily(path, lambda: _read_reference(path, max_bytes))


def _read_reference(path: Path, max_bytes: int) -> bytes | None:
    document, names = _read_document(path)
    if (REFERENCE in names) != (REFERENCE in document["files"]):
        raise ModelFolderError(f"{path} and its {DOCUMENT} do not have the same files: {REFERENCE}.")
    if REFERENCE not in names:
        return None
    return _read_checked(path, REFERENCE, document["files"][REFERENCE], max_bytes)


def verify(folder: str | PathLike[str], *, trusted: Collection[str] = (), max_bytes: int = MAX_BYTES) -> str:
    """Check every file of a folder against its hash, and that the model can be loaded.

    Parameters
    ----------
    folder : str or path
    trusted : list of str, default=()
        As for `load`.
    max_bytes : int, default=2**32
        As for `load`.

    Returns
    -------
    str
        The content hash, to be compared with that of the model you mean.

    Raises
    ------
    ModelFolderError
        If anything is wrong.
    FileNotFoundError
        If there is no such folder.
    """
    return str(_load(local_path(folder), trusted, max_bytes)[1]["hash"])


def _load(folder: Path, trusted: Collection[str], max_bytes: int) -> tuple[Any, dict[str, Any]]:
    paths = normalise_trusted(trusted)
    document, files = steadily(folder, lambda: _read(folder, max_bytes))
    _warn_of_versions(document)
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load as load_arrays

        try:
            arrays = {key: array.copy() for key, array in load_arrays(files.pop(TENSORS)).items()}
        except SafetensorError as error:
            raise ModelFolderError(f"{folder / TENSORS} is damaged ({error}).") from error

        def estimator(number: int) -> Any:
            return load_estimator(files[part_name(number)], paths)

        model = Decoder(arrays, paths, estimator).decode(document["model"])
    except ModelFolderError:
        raise
    except Exception as error:
        # Whatever a hand-made tree makes Python, numpy or torch complain of.
        raise ModelFolderError(
            f"{folder} cannot be read: its parts do not fit together ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    if not isinstance(model, BaseEstimator) or not contains_ours(model):
        raise ModelFolderError(f"{folder} holds a {type(model).__name__} and no detector.")
    return model, _facts(document)


def _facts(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "model"}


def _read_document(folder: Path) -> tuple[dict[str, Any], set[str]]:
    names = list_folder(folder)
    document = read_document(read_file(folder / DOCUMENT, size=None, limit=MAX_DOCUMENT_BYTES))
    for key, kind in (
        ("class", str),
        ("versions", dict),
        ("schema", dict),
        ("training", list),
        ("files", dict),
    ):
        if not isinstance(document.get(key), kind):
            raise ModelFolderError(f"{folder / DOCUMENT} has no proper {key!r}.")
    if (odd := malformed_part(document)) is not None:
        raise ModelFolderError(f"{folder / DOCUMENT} has no proper {odd!r}.")
    return document, names


def _read(folder: Path, max_bytes: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Document and checked contents of a folder."""
    document, names = _read_document(folder)
    listed = document["files"]
    # Names of the folder's own listing are opened, never those of the document.
    if set(listed) != names - {DOCUMENT, CARD} or TENSORS not in listed:
        odd = sorted(set(map(str, listed)) ^ (names - {DOCUMENT, CARD}))
        raise ModelFolderError(
            f"{folder} and its {DOCUMENT} do not have the same files: {', '.join(odd)[:200]}."
        )
    total = 0
    for entry in listed.values():
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if type(size) is not int or size < 0:
            raise ModelFolderError(f"{folder / DOCUMENT} does not say how large the files are.")
        total += size
    if total > max_bytes:
        raise ModelFolderError(
            f"{folder} has {total} bytes, more than max_bytes={max_bytes}. If that is right, allow more."
        )
    files = {}
    for name in sorted(names & set(listed)):
        files[name] = _read_checked(folder, name, listed[name], max_bytes)
    return document, files


def _read_checked(folder: Path, name: str, entry: Any, max_bytes: int) -> bytes:
    """Contents of a file that must be as the document's entry says."""
    size = entry.get("bytes") if isinstance(entry, dict) else None
    if type(size) is not int or size < 0:
        raise ModelFolderError(f"{folder / DOCUMENT} does not say how large {name} is.")
    data = read_file(folder / name, size=size, limit=max_bytes)
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise ModelFolderError(
            f"{folder / name} was changed after it was saved, or is damaged: its hash differs."
        )
    return data


def _warn_of_versions(document: dict[str, Any]) -> None:
    saved, here = document["versions"].get("scikit-learn"), installed_versions().get("scikit-learn")
    if any(name not in (TENSORS, REFERENCE) for name in document["files"]) and saved != here:
        warn_user(
            f"The folder's transformers were written by scikit-learn {str(saved)[:40]}, and {here} is installed here. "
            "Scikit-learn does not promise that they work the same; fit the pipeline again, or install that version.",
        )
