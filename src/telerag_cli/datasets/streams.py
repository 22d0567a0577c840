"""Reading files, and members of archives, as they come: never more in memory than one entry and a buffer."""

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

BUFFER_CHARACTERS = 1 << 20
MAX_ENTRY_CHARACTERS = 64 << 20
"""Of an array: what has no end by then is taken for damaged."""

Bad = Callable[[int, object], None]
"""Told of each entry that cannot be used: its line, and why. It raises if such entries are not to be left out."""

_BLANK = " \t\r\n"


@contextlib.contextmanager
def damage_told(label: str) -> Iterator[None]:
    """Turn what archives and disks raise into a sentence."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(
            f"{label} is damaged or not whole: {str(error).rstrip('.')}.", remedy="Remove it and fetch it again."
        ) from error
    except OSError as error:
        raise wrap_os_error(error, Path(label)) from error


@contextlib.contextmanager
def opened(path: Path, member: str | None = None) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked if it is ``.gz``; or those of a member of a zip or tar archive.

    Raises:
        InputError: the archive is damaged or has no such member.
        ResourceError: the file cannot be read.
    """
    with damage_told(str(path)):
        if member is not None and path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                if member not in archive.namelist():
                    raise _no_member(path, member)
                with archive.open(member) as handle:
                    yield handle
        elif member is not None:
            with tarfile.open(path, "r|*") as tar:
                for entry in tar:
                    if entry.name.removeprefix("./") == member:
                        handle_or_none = tar.extractfile(entry)
                        if handle_or_none is not None:
                            yield handle_or_none
                            return
                raise _no_member(path, member)
        elif path.suffix == ".gz":
            with gzip.open(path) as unpacked:
                yield cast("IO[bytes]", unpacked)
        else:
            with path.open("rb") as plain:
                yield plain


def _no_member(path: Path, member: str) -> InputError:
    return InputError(
        f"{path} has no {member}.",
        remedy="Fetch it again; if that is what is published now, its description is out of date.",
    )


def json_lines(handle: IO[bytes], bad: Bad) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of JSON lines; empty lines are skipped."""
    for line, raw in enumerate(handle, 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"), parse_constant=_no_constant)
        except UnicodeDecodeError as error:
            bad(line, f"not UTF-8 ({error.reason} at byte {error.start})")
        except json.JSONDecodeError as error:
            bad(line, f"not JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:
            bad(line, f"not JSON ({error})")
        else:
            if isinstance(value, dict):
                yield line, value
            else:
                bad(line, f"a JSON {type(value).__name__} where an object is expected")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def json_array(handle: IO[bytes], label: str, bad: Bad, key: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line on which it begins, object) of each entry of an array.

    Args:
        handle: of a file that is that array, or an object that has it.
        label: of the file, for messages.
        bad: told of entries that are no objects.
        key: of the array in the object.

    Raises:
        InputError: the file is no such JSON, or ends too early.
    """
    reader = _Reader(handle, label)
    if key is not None:
        reader.expect("{")
        while (name := reader.value()) != key:
            reader.expect(":")
            reader.value()
            if reader.take(",}") == "}":
                raise InputError(f"{label} is an object without '{key}'.", remedy="Fetch it again.")
        reader.expect(":")
        assert name == key
    reader.expect("[")
    if reader.peek() == "]":
        return
    while True:
        line = reader.line()
        value = reader.value()
        if isinstance(value, dict):
            yield line, value
        else:
            bad(line, f"a JSON {type(value).__name__} where an object is expected")
        if reader.take(",]") == "]":
            return


class _Reader:
    """JSON values one after the other, from text that is read as needed."""

    def __init__(self, handle: IO[bytes], label: str) -> None:
        self._handle, self._label = handle, label
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(parse_constant=_no_constant)
        self._text, self._at, self._ended = "", 0, False
        self._line, self._counted = 1, 0
        """The line of the place in the buffer up to which line ends were counted, and that place."""

    def line(self) -> int:
        self.peek()
        self._count()
        return self._line

    def _count(self) -> None:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at

    def peek(self) -> str:
        """The next character that is no blank, or nothing at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, allowed: str) -> str:
        """The next character, which has to be one of those."""
        found = self.peek()
        if not found or found not in allowed:
            raise self._wrong(f"'{found}'" if found else "the end", " or ".join(allowed))
        self._at += 1
        return found

    def expect(self, character: str) -> None:
        self.take(character)

    def value(self) -> Any:
        """The next value."""
        if not self.peek():
            raise self._wrong("the end", "a value")
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at > MAX_ENTRY_CHARACTERS or not self._more():
                    raise self._damaged(error) from error
                continue
            # A number that ends with the buffer may go on beyond it.
            if end < len(self._text) or isinstance(value, dict | list | str):
                self._at = end
                return value
            if not self._more():
                self._at = len(self._text)
                return value

    def _more(self) -> bool:
        """Read on, at least as much as is there, so that a long value is not tried too often."""
        if self._ended:
            return False
        self._count()
        self._text, self._at, self._counted = self._text[self._at :], 0, 0
        raw = self._handle.read(max(BUFFER_CHARACTERS, len(self._text)))
        try:
            self._text += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + raw.count(b"\n", 0, error.start)
            raise InputError(f"{self._label}:{line}: not UTF-8 ({error.reason}).", remedy="Fetch it again.") from error
        self._ended = not raw
        return bool(raw)

    def _wrong(self, found: str, expected: str) -> InputError:
        return InputError(
            f"{self._label}:{self.line()}: {found} where {expected} is expected.", remedy="Fetch it again."
        )

    def _damaged(self, error: Exception) -> InputError:
        why, begins = str(error), self.line()
        if isinstance(error, json.JSONDecodeError):
            ends = self._text.count("\n", self._at, error.pos)
            why = f"{error.msg} at line {begins + ends}"
        return InputError(f"{self._label}:{begins}: not JSON ({why}).", remedy="Fetch it again.")
