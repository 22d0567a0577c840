"""Reading files and members of archives as a stream: never more in memory than one entry and a buffer."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from telerag_cli.errors import InputError, one_line
from telerag_cli.files import wrap_os_error
from telerag_cli.text import TextError, parse_json
from telerag_cli.units import format_bytes

BUFFER_CHARACTERS = 64 << 10
MAX_ENTRY_CHARACTERS = 64 << 20
"""An entry of an array that is still incomplete at this size is taken for damaged."""
MAX_RATIO = 200
"""An archive that unpacks to more than so many times its size is not one of texts, which are packed to a tenth."""
AGAIN = "Fetch it again."

Row = tuple[int, dict[str, Any]]
"""The line on which an object begins, and the object."""
OnBad = Callable[[int, object], None]
"""Called with the line of each entry that cannot be used, and the reason; raises unless such entries are skipped."""


@contextlib.contextmanager
def archive_errors(label: str) -> Iterator[None]:
    """Turn the exceptions of archives and disks into ours."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(
            f"{label} is damaged or incomplete: {str(error).rstrip('.')}.", remedy="Remove it and fetch it again."
        ) from error
    except OSError as error:
        raise wrap_os_error(error, Path(label)) from error


@contextlib.contextmanager
def opened(path: Path, member: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file, unpacked if it is ``.gz``, or a member of a zip or tar archive.

    Raises:
        InputError: the archive is damaged or has no such member.
        ResourceError: the file cannot be read.
    """
    with archive_errors(str(path)), contextlib.ExitStack() as stack:
        if member is not None:
            yield _bounded(_member(path, member, stack), path)
        elif path.suffix == ".gz":
            yield _bounded(cast("IO[bytes]", stack.enter_context(gzip.open(path))), path)
        else:
            yield stack.enter_context(path.open("rb"))


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip archive.

    Raises:
        InputError: it is of a kind that cannot be read.
        zipfile.BadZipFile: it is damaged.
    """
    try:
        return zipfile.ZipFile(path)
    except (NotImplementedError, ValueError, struct.error) as error:
        raise InputError(
            f"{path} is not a zip archive that can be read: {one_line(str(error))}.", remedy=AGAIN
        ) from error


class _Bounded(io.RawIOBase):
    """What is unpacked of an archive, up to a limit."""

    def __init__(self, handle: IO[bytes], most: int, path: Path) -> None:
        self._handle, self._left, self._most, self._path = handle, most, most, path

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; raises InputError beyond the limit."""
        data = self._handle.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                f"{self._path} unpacks to more than {format_bytes(self._most)}, {MAX_RATIO} times its size, as no text "
                "does.",
                remedy="Take it from elsewhere.",
            )
        buffer[: len(data)] = data
        return len(data)


def _bounded(handle: IO[bytes], path: Path) -> IO[bytes]:
    return io.BufferedReader(_Bounded(handle, MAX_RATIO * path.stat().st_size + MAX_ENTRY_CHARACTERS, path))


def lines_of(handle: IO[bytes], on_bad: OnBad) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line; one that is too long to be an entry is passed over, and never held whole."""
    number = 0
    while raw := handle.readline(MAX_ENTRY_CHARACTERS):
        number += 1
        if len(raw) == MAX_ENTRY_CHARACTERS and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = handle.readline(MAX_ENTRY_CHARACTERS)
            on_bad(number, f"longer than {format_bytes(MAX_ENTRY_CHARACTERS)}")
        else:
            yield number, raw


def _member(path: Path, member: str, stack: contextlib.ExitStack) -> IO[bytes]:
    if path.suffix == ".zip":
        archive = stack.enter_context(open_zip(path))
        if member in archive.namelist():
            try:
                return stack.enter_context(archive.open(member))
            except RuntimeError as error:  # encrypted, or packed in a way that Python has no code for
                raise InputError(
                    f"{member} of {path} cannot be unpacked: {one_line(str(error))}.",
                    remedy="Pack it without a password, by deflate.",
                ) from error
    else:
        for entry in (tar := stack.enter_context(tarfile.open(path, "r|*"))):  # noqa: SIM115  # the stack closes it
            handle = tar.extractfile(entry) if entry.name.removeprefix("./") == member else None
            if handle is not None:
                return handle
    raise InputError(f"{path} has no {member}.", remedy=f"{AGAIN} If that does not help, its description is outdated.")


def json_lines(handle: IO[bytes], on_bad: OnBad) -> Iterator[Row]:
    """Read JSON lines; empty lines are skipped."""
    for line, raw in lines_of(handle, on_bad):
        if not raw.strip():
            continue
        try:
            value = parse_json(raw.removeprefix(codecs.BOM_UTF8))
        except TextError as error:
            on_bad(line, f"not JSON: {error}")
        else:
            yield from _object(line, value, on_bad)


def json_array(handle: IO[bytes], label: str, on_bad: OnBad, key: str | None = None) -> Iterator[Row]:
    """Read the entries of a JSON array one at a time; with a ``key`` it is a value of the object that the file is.

    Raises:
        InputError: the file is not such JSON, or ends too early.
    """
    reader = _JsonReader(handle, label)
    if key is not None:
        reader.take("{")
        while reader.value() != key:
            reader.take(":")
            reader.value()
            if reader.take(",}") == "}":
                raise InputError(f"{label} is an object without '{key}'.", remedy=AGAIN)
        reader.take(":")
    reader.take("[")
    if reader.peek() == "]":
        return
    while True:
        reader.peek()
        yield from _object(reader.line, reader.value(), on_bad)
        if reader.take(",]") == "]":
            return


def _object(line: int, value: Any, on_bad: OnBad) -> Iterator[Row]:
    if isinstance(value, dict):
        yield line, value
    else:
        on_bad(line, f"a JSON {type(value).__name__} where an object is expected")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


class _JsonReader:
    """Reads JSON values one after the other from text that is loaded as needed."""

    def __init__(self, handle: IO[bytes], label: str) -> None:
        self._handle, self._decoder = handle, codecs.getincrementaldecoder("utf-8-sig")()
        self._decode = json.JSONDecoder(parse_constant=_no_constant).raw_decode
        self._label, self._text = label, ""
        self.line = 1

    def peek(self) -> str:
        """Return the next character that is not a blank, or nothing at the end."""
        while True:
            self._skip(len(self._text) - len(self._text.lstrip(" \t\r\n")))
            if self._text or not self._more():
                return self._text[:1]

    def take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            raise self._error(f"{found or 'the end'} where {' or '.join(allowed)} is expected")
        self._skip(1)
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text)
            except (ValueError, RecursionError) as error:
                if len(self._text) > MAX_ENTRY_CHARACTERS or not self._more():
                    raise self._error(f"not JSON ({getattr(error, 'msg', error)})") from error
                continue
            # A number may continue beyond the buffer.
            if end < len(self._text) or isinstance(value, dict | list | str) or not self._more():
                self._skip(end)
                return value

    def _skip(self, count: int) -> None:
        self.line += self._text.count("\n", 0, count)
        self._text = self._text[count:]

    def _more(self) -> bool:
        """Load at least as much as is there, so that a long value is not tried too often."""
        try:
            raw = self._handle.read(max(BUFFER_CHARACTERS, len(self._text)))
            self._text += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise self._error(f"not UTF-8 ({error.reason})") from error
        return bool(raw)

    def _error(self, reason: str) -> InputError:
        return InputError(f"{self._label}:{self.line}: {reason}.", remedy=AGAIN)
