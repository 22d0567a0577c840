"""Reading files and members of archives as a stream: never more in memory than one entry and a buffer."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from telerag_cli.errors import InputError
from telerag_cli.files import wrap_os_error
from telerag_cli.text import TextError, parse_json

BUFFER_CHARACTERS = 64 << 10
MAX_ENTRY_CHARACTERS = 64 << 20
"""An entry of an array that is still incomplete at this size is taken for damaged."""
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
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
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
            yield _member(path, member, stack)
        elif path.suffix == ".gz":
            yield cast("IO[bytes]", stack.enter_context(gzip.open(path)))
        else:
            yield stack.enter_context(path.open("rb"))


def _member(path: Path, member: str, stack: contextlib.ExitStack) -> IO[bytes]:
    if path.suffix == ".zip":
        archive = stack.enter_context(zipfile.ZipFile(path))
        if member in archive.namelist():
            return stack.enter_context(archive.open(member))
    else:
        for entry in (tar := stack.enter_context(tarfile.open(path, "r|*"))):  # noqa: SIM115  # the stack closes it
            handle = tar.extractfile(entry) if entry.name.removeprefix("./") == member else None
            if handle is not None:
                return handle
    raise InputError(f"{path} has no {member}.", remedy=f"{AGAIN} If that does not help, its description is outdated.")


def json_lines(handle: IO[bytes], on_bad: OnBad) -> Iterator[Row]:
    """Read JSON lines; empty lines are skipped."""
    for line, raw in enumerate(handle, 1):
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
