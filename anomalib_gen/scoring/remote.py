"""Outputs in object stores, ``scheme://...`` through fsspec.

A store has no rename, no lock and no flush to the disk. So the run works in a folder on this machine, with all that
makes it resumable there, and its files are uploaded when they are complete: the quarantine, the output, and last of
all the record, which says that it is done. An object is replaced as a whole by the stores themselves; elsewhere the
upload goes to a temporary name first.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anomalib_gen.scoring._errors import DataError, UsageError
from anomalib_gen.scoring._log import Log
from anomalib_gen.scoring.config import ScoreOptions
from anomalib_gen.scoring.parts import digest, quarantine_beside, record_of, sole_run, to_json
from anomalib_gen.scoring.sources import find_inputs, first_line

WHOLE_OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "r2"}
"""Stores in which an upload appears when it is complete."""
OTHER_SIZE = "{output} has {found:,} bytes, and its run wrote {expected:,}: it was cut off or changed"


def score_to_store(options: ScoreOptions, log: Log, score: Callable[[ScoreOptions], Any]) -> Any:
    """Score to a folder on this machine and upload what came out.

    Parameters
    ----------
    options : ScoreOptions
        With an output in a store.
    log : Log
    score : callable
        Scores to an output on this machine.

    Returns
    -------
    Summary

    Raises
    ------
    UsageError, DataError
        As the exit codes say. Earlier results in the store are then untouched, and ``--resume`` goes on from here.
    """
    if options.partition_by:
        raise UsageError(
            f"--partition-by makes folders, and in a store one file is written, --output {options.output}. Write to a "
            "folder of this machine and copy it, or leave --partition-by out."
        )
    store = _Store(options.output)
    name = posixpath.basename(store.place)
    if not posixpath.splitext(name)[1]:
        raise UsageError(
            f"--output {options.output} has no ending, so it would be a folder. In a store, give one file a name with "
            "an ending, such as scores.parquet."
        )
    if any(item.path == options.output for item in find_inputs(options.input)):
        raise UsageError(f"--output {options.output} is one of the inputs. Choose another.")
    folder = Path(options.work or ".anomalib-gen") / digest(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with sole_run(folder):
            return _score_and_upload(options, store, folder / name, log, score)
    except UsageError as error:
        text = str(error).replace(str(folder / name), options.output).replace(str(folder), options.output)
        raise UsageError(text) from None


def _score_and_upload(
    options: ScoreOptions, store: _Store, output: Path, log: Log, score: Callable[[ScoreOptions], Any]
) -> Any:
    is_there = store.exists("")
    if is_there and not (options.overwrite or options.resume):
        raise UsageError(
            f"{options.output} exists already. Choose another output, or replace it with --overwrite."
        )
    record, quarantine = record_of(output), quarantine_beside(output)
    if output.exists() and not output.stat().st_size:
        output.unlink()
    before = None
    if options.resume and is_there and not output.exists() and store.exists(".run.json"):
        # So that a run that is done in the store is known here. An empty file stands for the output, and no output
        # is ever empty.
        store.get(".run.json", record)
        if _is_whole(options, store, record, log):
            before = record.read_bytes()
            output.touch()
    here = dataclasses.replace(  # type: ignore[type-var]
        options, output=str(output), work=None, overwrite=options.overwrite or not is_there
    )
    summary = score(here)
    if before is None or output.stat().st_size:
        if quarantine.exists():
            store.put(quarantine, ".quarantine.jsonl")
        elif options.quarantine is None:
            store.remove(".quarantine.jsonl")
        store.put(output, "")
        store.put(record, ".run.json")
        log.info(f"uploaded {options.output}", output=options.output)
    shutil.rmtree(output.parent, ignore_errors=True)
    return summary


def _is_whole(options: ScoreOptions, store: _Store, record: Path, log: Log) -> bool:
    """Whether an object is as large as its record says, which is then left without the size: that of no stand-in.

    Raises
    ------
    DataError
        If it is not, and must not be replaced.
    """
    try:
        facts = json.loads(record.read_bytes())
        expected = facts.pop("bytes", None)
    except (ValueError, AttributeError):
        return True  # (It is no record, and will not be taken for one.)
    if expected is None:
        return True
    if (found := store.size("")) in (None, expected):
        record.write_bytes(to_json(facts))
        return True
    record.unlink()
    damage = OTHER_SIZE.format(output=options.output, found=found, expected=expected)
    if not options.overwrite:
        raise DataError(f"{damage}. Score the files again with --overwrite, or choose another output.")
    log.warning(f"{damage}, so the files are scored again")
    return False


class _Store:
    """An object, and those beside it whose names begin with its name.

    Raises
    ------
    UsageError
        If no file system is installed for the scheme.
    DataError
        If the store cannot be reached or written to.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, self.scheme = url, url.split("://", 1)[0]
        try:
            self.files, self.place = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"--output {url}: {error}") from None
        except Exception as error:
            raise self._failed(error) from None

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(self.files, method)(*arguments, **options)
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> DataError:
        """Whatever the libraries of stores raise: none of it is an error of this program."""
        what = f"{type(error).__name__} {first_line(error)}"
        return DataError(f"{self.url}: {what}. What was scored is kept: --resume goes on from here.")

    def exists(self, suffix: str) -> bool:
        """Whether there is an object."""
        self._call("invalidate_cache")
        return bool(self._call("exists", self.place + suffix))

    def size(self, suffix: str) -> int | None:
        """Bytes of an object; None where the store does not tell."""
        found: int | None = self._call("size", self.place + suffix)
        return found

    def get(self, suffix: str, path: Path) -> None:
        """Download an object."""
        self._call("get_file", self.place + suffix, str(path))

    def put(self, path: Path, suffix: str) -> None:
        """Upload a file so that it is there as a whole, or not."""
        place = self.place + suffix
        if self.scheme in WHOLE_OBJECTS:
            self._call("put_file", str(path), place)
            return
        parent, name = posixpath.split(place)
        if parent.strip("/"):
            self._call("makedirs", parent, exist_ok=True)
        fresh = posixpath.join(parent, f".{name}.tmp")
        self._call("put_file", str(path), fresh)
        self._call("mv", fresh, place)

    def remove(self, suffix: str) -> None:
        """Remove an object that may be there."""
        if self.exists(suffix):
            self._call("rm_file", self.place + suffix)
