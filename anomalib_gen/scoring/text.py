"""Text as bytes in which every row is one, before a parser sees it.

A value in quotes may have line breaks, so to a parser a quote too many makes one value of all rows up to the next
quote, or to the end of the file, and nothing is wrong with that. Here each line on which quotes stay open is looked at
together with those that follow: one among them that is a row by itself shows that the quote was none. What is no row,
or no UTF-8, is replaced by a line that the parser refuses, so that it is counted where it stood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

from anomalib_gen.scoring._errors import DataError

MAX_ROW_BYTES = 2**24
"""What one row may take, line breaks in its values included."""
SHOWN_CHARACTERS = 1000
"""Of a row that is left out."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CONVERT = "Text must be UTF-8: save it as that, or convert it, as in `iconv -f LATIN1 -t UTF-8`"


class CheckedText:
    """Rows of a text file with a header, checked, as bytes: an iterable of whole rows, a block at a time.

    Parameters
    ----------
    stream : file
        Bytes, decompressed.
    path : str
        For messages.
    delimiter : str
        Between fields.
    needed : callable
        Whether a column of a name is wanted. What is no UTF-8 in others does not matter.
    block_bytes : int
        What is read at a time. No more than this and `MAX_ROW_BYTES` is held.

    Attributes
    ----------
    names : list of str
        Of the columns, as the header has them; it is read at once, and is no part of what is given.
    bad : dict of str to (str, str)
        What was no row: the reason and the text, by the line in its place.

    Raises
    ------
    DataError
        Also while it is read, if the header is damaged or a line is longer than any row.
    """

    def __init__(
        self,
        stream: Any,
        path: str,
        delimiter: str,
        needed: Callable[[str], bool],
        block_bytes: int,
    ) -> None:
        self._stream, self._path, self._needed, self._block_bytes = stream, path, needed, block_bytes
        self._delimiter = delimiter.encode()
        self.bad: dict[str, tuple[str, str]] = {}
        mark = re.escape(self._delimiter)
        # Quotes count where a field begins; what follows the closing one belongs to the field, as parsers see it.
        quoted = rb'"[^"]*+(?:""[^"]*+)*+"'
        rest = rb"[^" + mark + rb"]*+"
        field = rb"(?:" + quoted + rest + rb'|(?!")' + rest + rb")"
        fields = field + rb"(?:" + mark + field + rb")*+"
        self._closed = re.compile(fields)
        self._closes = re.compile(quoted[1:] + rest + rb"(?:" + mark + field + rb")*+")
        # Lines that nobody can take for anything else: with quotes around whole fields alone.
        proper = rb'(?:"[^"\r\n]*+(?:""[^"\r\n]*+)*+"|[^"' + mark + rb"\r\n]*+)"
        line = proper + rb"(?:" + mark + proper + rb")*+"
        self._proper = re.compile(rb"(?:" + line + rb"[\r\n]++)*+(?:" + line + rb")?")
        # (The last one may stay open.)
        self._field = re.compile(rb"(" + quoted + rest + rb'|"(?s:.*)|' + rest + rb")(?:" + mark + rb"|\Z)")
        self.names: list[str] = []
        self._n_fields = 0
        self._needed_fields: list[int] = []
        self._line = 1
        self._chunks = self._read_all()
        self._first = b""
        while not self._n_fields and (chunk := next(self._chunks, None)) is not None:
            self._first = chunk

    def __iter__(self) -> Iterator[bytes]:
        """What is left to read."""
        first, self._first = self._first, b""
        if first:
            yield first
        yield from (chunk for chunk in self._chunks if chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        # (What waits in it would stay until cycles are looked for.)
        self._chunks.close()
        self._first = b""

    def _read_all(self) -> Generator[bytes, None, None]:
        rest, block = b"", self._stream.read(max(self._block_bytes, len(BYTE_ORDER_MARK) + 1))
        block = block.removeprefix(BYTE_ORDER_MARK)
        while block:
            data = rest + block
            # (A carriage return at the end may be half of a line break.)
            end = (data.rfind(b"\n") if b"\n" in data else data.rfind(b"\r", 0, -1)) + 1
            good, waiting = self._checked(data[:end], final=False)
            rest = waiting + data[end:]
            if len(rest) - len(waiting) > MAX_ROW_BYTES:
                line = self._line + waiting.count(b"\n")
                raise DataError(
                    f"{self._path} cannot be read: line {line} has more than {MAX_ROW_BYTES >> 20} MB. Is it text?"
                )
            yield good
            block = self._stream.read(self._block_bytes)
        yield self._checked(rest, final=True)[0]

    def _checked(self, data: bytes, *, final: bool) -> tuple[bytes, bytes]:
        """What of some lines is to be parsed, and what has to wait for the lines that follow."""
        is_utf8 = _is_utf8(data)
        if self._n_fields and is_utf8 and (b'"' not in data or self._proper.fullmatch(data)):
            self._line += data.count(b"\n")
            return data, b""
        lines, good, start = data.splitlines(keepends=True), [], 0
        while start < len(lines):
            n, reason = self._row(lines, start, final=final)
            if not n:
                break
            text = lines[start] if n == 1 else b"".join(lines[start : start + n])
            if not self._n_fields:
                self._read_header(text, reason)
                text = b""
            elif reason is not None:
                text = self._left_out(text, n, reason)
            elif not is_utf8:
                text = self._decoded(text, n)
            good.append(text)
            start += n
            self._line += n
        return b"".join(good), b"".join(lines[start:])

    def _row(self, lines: list[bytes], start: int, *, final: bool) -> tuple[int, str | None]:
        """How many lines a row takes (0 if it may go on in the next block), and why it is none."""
        first = lines[start]
        if b'"' not in first or self._closed.fullmatch(first):
            return 1, None
        fields = self._fields(first)
        # What it has if the quote is none.
        n_first = len(fields) + fields[-1].count(self._delimiter)
        n_fields = self._n_fields or n_first
        opened, size = f"line {self._line} opens a quote", len(first)
        for n in range(1, len(lines) - start):
            line = lines[start + n]
            another = f"{opened}, and line {self._line + n} looks like another row"
            if self._proper.fullmatch(line) and self._count(line) == n_fields:
                return n, another
            if self._closes.fullmatch(line):
                alike = n_fields in (self._count(line), line.count(self._delimiter) + 1)
                if self._n_fields and alike and n_first == n_fields:
                    # One row or two: nobody can tell.
                    return n + 1, another
                found = self._count(b"".join(lines[start : start + n + 1]))
                wrong = f"{opened}, and has {found} fields up to its end, not {n_fields}"
                return n + 1, wrong if self._n_fields and found != n_fields else None
            size += len(line)
            if size > MAX_ROW_BYTES:
                return n + 1, f"{opened} that is not closed within {MAX_ROW_BYTES >> 20} MB"
        return (len(lines) - start, f"{opened} that is not closed") if final else (0, None)

    def _count(self, text: bytes) -> int:
        if b'"' not in text:
            return text.count(self._delimiter) + 1
        return len(self._fields(text))

    def _fields(self, text: bytes) -> list[bytes]:
        fields = []
        for match in self._field.finditer(text):
            fields.append(match[1])
            if match.end() == match.end(1):
                break
        return fields

    def _read_header(self, text: bytes, reason: str | None) -> None:
        if not text.strip(b"\r\n"):
            return
        if not _is_utf8(text):
            raise DataError(f"{self._path} has a header that {_no_utf8(text)}. {CONVERT}.")
        if reason is not None:
            raise DataError(f"{self._path} has a damaged header: {reason}. Mend it, or double the quote.")
        fields = self._fields(text.rstrip(b"\r\n"))
        self._n_fields = len(fields)
        self.names = [_unquoted(field.decode()) for field in fields]
        self._needed_fields = [k for k, name in enumerate(self.names) if self._needed(name)]

    def _decoded(self, text: bytes, n: int) -> bytes:
        """A row that may be no UTF-8, without what is none."""
        if _is_utf8(text):
            return text
        fields = self._fields(text)
        for k in self._needed_fields:
            if len(fields) == self._n_fields and not _is_utf8(fields[k]):
                return self._left_out(text, n, f"line {self._line} {_no_utf8(fields[k])}. {CONVERT}")
        return text.decode(errors="replace").encode()

    def _left_out(self, text: bytes, n: int, reason: str) -> bytes:
        """Line that stands for what is no row: of another number of fields than rows have."""
        if n > 1:
            reason += f" (lines {self._line} to {self._line + n - 1})"
        line = f"\0{self._line}" + (self._delimiter.decode() if self._n_fields == 1 else "")
        shown = text[: 4 * SHOWN_CHARACTERS].decode(errors="backslashreplace").rstrip("\r\n")
        self.bad[line] = reason, shown[:SHOWN_CHARACTERS]
        return line.encode() + b"\n"


def _unquoted(field: str) -> str:
    """A field without its quotes; what follows them belongs to it."""
    if (match := re.match(r'"((?:[^"]|"")*)"', field)) is None:
        return field
    return match[1].replace('""', '"') + field[match.end() :]


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _no_utf8(text: bytes) -> str:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"is no UTF-8 (byte 0x{text[error.start]:02x})"
    return "is UTF-8"
