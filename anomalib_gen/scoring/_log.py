"""What a run says on the way: lines for people or for machines, on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, TextIO


def count(n: int, one: str, many: str | None = None) -> str:
    """Number of things, in words."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


class Log:
    """Messages of a run.

    Parameters
    ----------
    quiet : bool, default=False
        Whether to leave out all but warnings and errors.
    as_json : bool, default=False
        Whether each message is a JSON object on a line of its own, with "time" (seconds since 1970), "level", "message"
        and facts.
    stream : file, optional
        Standard error if None.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False, stream: TextIO | None = None) -> None:
        self.quiet, self.as_json, self._stream = quiet, as_json, stream

    def info(self, message: str, **facts: Any) -> None:
        """Say what was done."""
        if not self.quiet:
            self._write("info", message, facts)

    def warning(self, message: str, **facts: Any) -> None:
        """Say what somebody should look at."""
        self._write("warning", message, facts)

    def error(self, message: str, **facts: Any) -> None:
        """Say why a run ended."""
        self._write("error", message, facts)

    @property
    def shows_progress(self) -> bool:
        """Whether somebody is looking on: at a terminal, and at messages for people."""
        return not self.quiet and not self.as_json and (self._stream or sys.stderr).isatty()

    def progress(self, unit: str) -> Any:
        """Bar for somebody who is looking on, or what does nothing; to be updated and closed."""
        from tqdm import tqdm

        stream = self._stream or sys.stderr
        return tqdm(
            unit=f" {unit}", unit_scale=True, file=stream, disable=not self.shows_progress, leave=False
        )

    def _write(self, level: str, message: str, facts: dict[str, Any]) -> None:
        stream = self._stream or sys.stderr
        if self.as_json:
            record = {"time": round(time.time(), 3), "level": level, "message": message, **facts}
            print(json.dumps(record, default=str), file=stream, flush=True)
            return
        mark = "" if level == "info" else f"{level}: "
        with _bars_aside(stream):
            print(f"anomalib-gen: {mark}{message}", file=stream, flush=True)


def _bars_aside(stream: TextIO) -> contextlib.AbstractContextManager[None]:
    """Take bars off a terminal, where a line would go on in theirs."""
    if not stream.isatty():
        return contextlib.nullcontext()
    from tqdm import tqdm

    return tqdm.external_write_mode(file=stream)


@contextlib.contextmanager
def python_warnings_in(log: Log) -> Iterator[None]:
    """Make messages of what Python warns of while a command runs; which warnings are shown stays as it is."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        name = category.__name__
        text = str(message) if category is UserWarning else f"{name}: {message}"
        log.warning(text, category=name, place=f"{filename}:{lineno}")

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
