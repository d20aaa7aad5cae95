"""What can go wrong, by the exit code that says so."""

from __future__ import annotations

import errno

DONE, USAGE, DATA, ALERT, PARTIAL, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class ScoringError(Exception):
    """A run cannot go on; the message says why and what to do."""

    code = INTERNAL


class UsageError(ScoringError):
    """Options that are wrong or do not fit together, or an output that is in use."""

    code = USAGE


class DataError(ScoringError):
    """Files that cannot be found, read or written, or do not fit the model."""

    code = DATA


def explain_os_error(error: OSError, what: str) -> DataError:
    """Say in words of the user's why `what` failed."""
    if error.errno in _FULL:
        return DataError(
            f"The disk is full ({what}). Earlier results are untouched. Free some space and run it again; score goes "
            "on from here with --resume."
        )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return DataError(f"{what}: something on that path is a file where a folder should be.")
    return DataError(f"{what}: {error.strerror or error}.")
