"""A folder that appears at once and complete, and is read with care.

Writing: everything goes to a new folder beside the wanted one, is flushed to the disk, and the folder is renamed. Where
one is to be replaced, the two change names in one step where the system can (Linux), so that there is a complete
folder under the name at every moment. A process that is killed leaves its new folder; the next one that writes under
the same name removes it, where the system has locks by which a folder whose process lives is known.

Reading: a file is opened once, must be a plain file (no link, no device), of the size that the folder's document says,
and what is checked is what is used. A folder that is replaced while it is read is read again.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from anomalib_gen.persistence._errors import ModelFolderError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

DOCUMENT = "model.json"
TENSORS = "tensors.safetensors"
CARD = "MODEL_CARD.md"
REFERENCE = "reference.json"
PART = re.compile(r"part-\d{1,4}\.skops", re.ASCII)
ADDRESS = re.compile(r"[\w+.:-]{2,}:/")
"""How addresses begin, also of those that went through `Path`, which takes one of their slashes; no drive does."""
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
Result = TypeVar("Result")


def part_name(number: int) -> str:
    """File of a scikit-learn estimator."""
    return f"part-{number}.skops"


def local_path(folder: str | os.PathLike[str]) -> Path:
    """Path of a model folder, which is one of this machine.

    Raises
    ------
    ModelFolderError
        If it is an address, such as one of an object store: as a path it would be that of a folder named like it.
    """
    folder = os.fspath(folder)
    if ADDRESS.match(folder):
        raise ModelFolderError(
            f"{folder} is an address, and model folders are local: their files are checked and replaced together. Give "
            "a folder of this machine, and copy it from or to the store with the store's own tools."
        )
    return Path(folder)


def write_folder(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Write a folder of files, all or nothing.

    Raises
    ------
    FileExistsError
        If there is something under the name already and `overwrite` is False, or it is no model folder, or holds
        anything else.
    ModelFolderError
        If it would be in another model folder.
    """
    folder = Path(os.path.abspath(folder))
    _refuse_existing(folder, overwrite=overwrite)
    make_folder(folder.parent)
    _remove_abandoned(folder)
    fresh, handle = _own_folder(folder)
    try:
        for name, data in files.items():
            with open(fresh / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(fresh)
        if os.path.lexists(folder) and overwrite:
            _refuse_existing(folder, overwrite=True)
            swap(fresh, folder)
        else:
            os.rename(fresh, folder)
        sync_folder(folder.parent)
    finally:
        # Either what could not be finished, or what was replaced.
        shutil.rmtree(fresh, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _own_folder(folder: Path) -> tuple[Path, int | None]:
    """A new folder beside one, with a lock that the system gives back when this process ends, however it does."""
    while True:
        fresh = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
        fresh.mkdir()
        # (Another writer may take it for abandoned until it is locked.)
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            handle = _lock(fresh)
            if fresh.is_dir():
                return fresh, handle
            if handle is not None:
                os.close(handle)


def _lock(folder: Path) -> int | None:
    """Handle that holds the lock of a folder; None where there are no such locks.

    Raises
    ------
    BlockingIOError
        If a living process holds it.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(handle)
        if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            return None
        raise
    return handle


def _remove_abandoned(folder: Path) -> None:
    """Remove what writers of the same folder left that were killed: no living process holds its lock."""
    pattern = re.compile(re.escape(f".{folder.name}.") + r"[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):
        for path in [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]:
            with contextlib.suppress(OSError):
                if (handle := _lock(path)) is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(handle)


def check_place(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Tell before a long computation what `write_folder` would refuse after it.

    Raises
    ------
    FileExistsError
        As `write_folder`.
    ModelFolderError
        If it is no path of this machine, or in another model folder.
    OSError
        If the folder that it would be in is none, or cannot be written to.
    """
    folder = Path(os.path.abspath(local_path(folder)))
    _refuse_existing(folder, overwrite=overwrite)
    above = next(path for path in folder.parents if os.path.lexists(path))
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def _refuse_existing(folder: Path, *, overwrite: bool) -> None:
    if all((folder.parent / name).is_file() for name in (DOCUMENT, TENSORS)):
        raise ModelFolderError(
            f"{folder} would be in the model folder {folder.parent}, which holds nothing else: that could not be "
            "loaded any more. Choose another place."
        )
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists already. Choose another name, or replace it with overwrite=True."
        )
    if folder.is_symlink() or not folder.is_dir() or not (folder / DOCUMENT).is_file():
        raise FileExistsError(
            f"{folder} is no model folder, so it is not replaced. Remove it yourself if it may go."
        )
    # (Many programs call a file model.json; what lies beside it would be lost.)
    if strangers := sorted(entry.name for entry in folder.iterdir() if not _belongs(entry.name)):
        raise FileExistsError(
            f"{folder} holds {strangers[0]!r}, which belongs to no model, so it is not replaced. Move that elsewhere, "
            "or choose another folder."
        )


def _belongs(name: str) -> bool:
    """Whether a model folder may have a file of that name."""
    return name in (DOCUMENT, TENSORS, CARD, REFERENCE) or PART.fullmatch(name) is not None


def swap(fresh: Path, folder: Path) -> None:
    """Put a folder in the place of another, which has the first one's name afterwards, or is gone."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is not None:
        pair = os.fsencode(fresh), os.fsencode(folder)
        if rename(_AT_FDCWD, pair[0], _AT_FDCWD, pair[1], _RENAME_EXCHANGE) == 0:
            return
    # Elsewhere there is a moment without a folder of that name; never one with a part of it.
    old = fresh.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)  # of one that was killed here
    os.rename(folder, old)
    try:
        os.rename(fresh, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a loss of power does not take them with what is in them."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power, where the system lets us."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def steadily(folder: Path, read: Callable[[], Result]) -> Result:
    """Result of reading a folder, of the new one where it was replaced meanwhile: parts of two do not fit together."""
    while True:
        before = _identity(folder)
        try:
            return read()
        except (ModelFolderError, FileNotFoundError):
            if _identity(folder) == before:
                raise


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def list_folder(folder: Path) -> set[str]:
    """Names in a model folder.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ModelFolderError
        If there is anything in it that does not belong there.
    """
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} is no folder. Give the path of a folder that save() or `anomalib-gen fit` made."
        ) from None
    for entry in found:
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            raise ModelFolderError(
                f"{folder} holds {entry.name!r}, which is no plain file. A model folder has neither links nor folders."
            )
        if not _belongs(entry.name):
            what = (
                "may be a pickle, and is never opened"
                if entry.name.endswith(PICKLES)
                else "does not belong there"
            )
            raise ModelFolderError(
                f"{folder} holds {entry.name!r}, which {what}. Remove it, or save the model to another folder."
            )
    names = {entry.name for entry in found}
    if DOCUMENT not in names:
        raise ModelFolderError(f"{folder} has no {DOCUMENT}: it is no model folder, or a damaged one.")
    return names


def read_file(path: Path, *, size: int | None, limit: int) -> bytes:
    """Read a file that must have a size, or at most `limit` bytes.

    Raises
    ------
    ModelFolderError
        If it is no plain file, or of another size.
    """
    # (A pipe would be waited for.)
    flags = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    try:
        handle = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ModelFolderError(f"{path} is a link. A model folder has none.") from None
        raise
    with open(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ModelFolderError(f"{path} is no plain file.")
        if size is not None and status.st_size != size:
            raise ModelFolderError(
                f"{path} has {status.st_size} bytes and should have {size}: it is truncated or was changed. "
                "Copy the folder again."
            )
        if status.st_size > limit:
            raise ModelFolderError(
                f"{path} has {status.st_size} bytes, more than the {limit} that are read. "
                "If that is right, load with a larger max_bytes."
            )
        data = file.read(status.st_size + 1)
    if len(data) != status.st_size:
        raise ModelFolderError(f"{path} changed while it was read.")
    return data
