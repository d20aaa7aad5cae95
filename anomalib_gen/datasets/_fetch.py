"""Downloads that are verified by checksum and resume where an earlier attempt stopped.

`pooch` decides whether a download is needed, checks the sha256 and moves only a verified file into place. Its
own HTTP downloader always starts at the first byte; `ResumingDownloader` takes its place and continues a
``.part`` file by an HTTP range request.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from anomalib_gen.datasets._manifest import DatasetEntry

_CHUNK_BYTES = 1 << 12  # small, because a broken connection loses the chunk that it breaks
_MAX_WAIT_SECONDS = 10.0
_WAIT_SECONDS = 1.0  # before the first retry; doubled for each further one


class ResumingDownloader:
    """A `pooch` downloader that continues a partial file and retries what may pass.

    Parameters
    ----------
    part : Path
        Where an interrupted download is kept until the next call.
    n_bytes : int or None
        Expected size of the whole file. It bounds what is written, and tells a truncated body from a complete
        one where the server states no length.
    retries : int
        Further attempts after a broken connection, a truncated body or a temporary HTTP status.
    progressbar : bool
        Show a tqdm bar.
    timeout : float
        Seconds without an answer after which an attempt counts as failed.

    Attributes
    ----------
    resumed : bool
        Whether the last call began with bytes of an earlier one.
    """

    def __init__(
        self,
        part: Path,
        *,
        n_bytes: int | None = None,
        retries: int = 3,
        progressbar: bool = False,
        timeout: float = 30.0,
    ) -> None:
        self.part = part
        self.n_bytes = n_bytes
        self.retries = retries
        self.progressbar = progressbar
        self.timeout = timeout
        self.resumed = False

    def __call__(self, url: str, output_file: str | os.PathLike[str], pooch: Any = None) -> None:
        """Write the body of ``url`` to ``output_file``; on failure leave the bytes received in ``part``.

        Raises
        ------
        ConnectionError
            No complete body after all attempts.
        """
        output = Path(output_file)
        # Renaming is atomic: of several processes that fetch the same file exactly one takes the partial
        # bytes, and the others start afresh in their own temporary file. None ever writes into another's.
        with suppress(FileNotFoundError):
            os.replace(self.part, output)
        self.resumed = output.exists() and output.stat().st_size > 0
        try:
            self._download(url, output)
        except BaseException:
            if output.exists() and output.stat().st_size > 0:
                os.replace(output, self.part)
            raise

    def _download(self, url: str, output: Path) -> None:
        from requests.exceptions import RequestException

        for attempt in range(self.retries + 1):
            try:
                self._attempt(url, output)
                return
            except RequestException as error:
                if attempt == self.retries or not _may_pass(error):
                    kept = output.stat().st_size if output.exists() else 0
                    after = f" after {attempt + 1} attempts" if attempt else ""
                    hint = (
                        f" {kept} bytes are kept in {self.part}; the next call resumes there." if kept else ""
                    )
                    raise ConnectionError(f"{url} could not be downloaded{after}: {error}.{hint}") from error
                time.sleep(min(_WAIT_SECONDS * 2**attempt, _MAX_WAIT_SECONDS))

    def _attempt(self, url: str, output: Path) -> None:
        import requests
        from tqdm.auto import tqdm

        done = output.stat().st_size if output.exists() else 0
        # A compressed body would make byte offsets and lengths refer to something other than the file.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        with requests.get(url, headers=headers, stream=True, timeout=self.timeout) as response:
            first, total = _byte_range(response.headers.get("Content-Range", ""))
            if response.status_code == 416 and total == done:
                return
            if response.status_code == 416 or (response.status_code == 206 and first != done):
                output.unlink()
                raise requests.ConnectionError(f"the server cannot continue at byte {done}, starting again")
            response.raise_for_status()
            if response.status_code != 206:  # the server knows no ranges, and sends the whole file
                done = 0
                total = _content_length(response.headers)
            if total is None:
                total = self.n_bytes
            with (
                output.open("ab" if done else "wb") as file,
                tqdm(
                    total=total, initial=done, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1],
                    disable=not self.progressbar,
                ) as bar,
            ):  # fmt: skip
                for chunk in response.iter_content(_CHUNK_BYTES):
                    done += file.write(chunk)
                    bar.update(len(chunk))
                    if self.n_bytes is not None and done > self.n_bytes:
                        return  # certainly another file: the checksum refuses it, and the disk is spared
        if total is not None and done < total:
            raise requests.ConnectionError(f"the connection closed after {done} of {total} bytes")


def download(
    entry: DatasetEntry, folder: Path, *, base_url: str | None, retries: int, progressbar: bool
) -> Path:
    """Return ``folder / entry.file``, downloaded if it is absent or differs from the recorded checksum.

    Raises
    ------
    ValueError
        No checksum is recorded, or the bytes received differ from it.
    ConnectionError
        No complete body after all attempts.
    """
    if entry.sha256 is None:
        raise ValueError(
            f"{entry.file} has no recorded checksum, so a download could not be verified and is refused. "
            f"Fetch {entry.url} yourself, check it, and put the file into {folder}."
        )
    import pooch

    url = entry.url if base_url is None else f"{base_url.rstrip('/')}/{entry.file}"
    downloader = ResumingDownloader(
        folder / f"{entry.file}.part", n_bytes=entry.bytes, retries=retries, progressbar=progressbar
    )
    for _ in range(2):
        try:
            return Path(pooch.retrieve(url, entry.sha256, entry.file, folder, downloader=downloader))
        except ValueError as error:
            mismatch = error
        # The partial file may stem from another version of the remote file: one clean attempt tells.
        if not downloader.resumed:
            break
    raise ValueError(
        f"{url} does not hold the file that the manifest describes; what it sent was removed. {mismatch} "
        "If the address is a mirror, refresh it; otherwise put a good copy of the file into the data folder."
    ) from mismatch


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: connection trouble, and statuses that ask to come back."""
    from requests.exceptions import ChunkedEncodingError, ConnectionError, HTTPError, Timeout

    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, ChunkedEncodingError | ConnectionError | Timeout)


def _byte_range(content_range: str) -> tuple[int | None, int | None]:
    """Return first byte and whole length of ``bytes 5-9/10`` or ``bytes */10``; None where not stated."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", content_range.strip())
    first, total = match.groups() if match else (None, None)
    return None if first is None else int(first), None if total is None else int(total)


def _content_length(headers: Any) -> int | None:
    """Return the stated length of an unencoded body."""
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() and "Content-Encoding" not in headers else None
