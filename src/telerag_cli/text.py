"""The gate for text: every text that enters the program is decoded, parsed and checked here.

What passes is text that any output can hold: UTF-8 without half characters and NULs, and JSON without infinities and
bounded in depth. A reader names the item that does not pass and goes on with the next one.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

SNIFFED_BYTES = 1 << 20
"""Bytes from the start of a file by which its encoding is judged."""
LATIN = "cp1252"
"""What Windows and the web call Latin-1."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MAYBE_INFINITE = re.compile(rb"[eE]\+?0*[0-9]{3}|[0-9]{300}")


class TextError(ValueError):
    """Why a text cannot be taken, as the end of a sentence without its full stop."""


def checked(text: str) -> str:
    """Return the text as it is.

    Raises:
        TextError: it holds a NUL, or half of a surrogate pair, which no encoding can express.
    """
    if (place := text.find("\0")) >= 0:
        raise TextError(f"it holds a NUL at character {place + 1}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, place = ord(text[error.start]), error.start + 1
        if 0xDC80 <= code <= 0xDCFF:  # how Python spells a byte that it could not decode
            raise TextError(f"the byte 0x{code - 0xDC00:02X} at character {place} is not of its encoding") from None
        raise TextError(f"it holds half of a surrogate pair (U+{code:04X}) at character {place}") from None
    return text


def repaired(text: str) -> str:
    """Return a text that must not be lost, such as an LLM's, with what `checked` refuses made U+FFFD.

    The two halves of a pair become the character they stand for.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\0", "\ufffd")


def printable(text: str) -> str:
    """Return the text for terminals and logs: control and direction characters are escaped, tabs and line ends stay."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def of_path(path: Path | str) -> str:
    """Return a path as text; bytes that are not UTF-8 are written as hexadecimal escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def encoding_of(start: bytes, *, whole: bool = False) -> str:
    """Return the Python name of a text's encoding, by its first bytes.

    A byte order mark decides. Without one, UTF-16 shows by its zero bytes, and a text that has bytes that are not UTF-8
    and no character of several bytes that is, is Windows-1252. Everything else is UTF-8, perhaps with errors.

    Args:
        start: the first bytes, `SNIFFED_BYTES` are enough.
        whole: whether they are all there are; otherwise the last character may be cut off.
    """
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    if len(start) >= 4 and start.count(0) * 3 > len(start):
        even, odd = start[::2].count(0), start[1::2].count(0)
        if max(even, odd) > 4 * min(even, odd):
            return "utf-16-be" if even > odd else "utf-16-le"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, final=whole)
    except UnicodeDecodeError:
        valid = start.decode("utf-8", "ignore")
        return "utf-8" if any(ord(char) > 0x7F for char in valid) else LATIN
    return "utf-8"


def decoded(data: bytes, encoding: str = "utf-8") -> str:
    """Return the checked text of these bytes.

    Raises:
        TextError: they are not of the encoding, or `checked` refuses them.
    """
    try:
        return checked(data.decode(encoding))
    except UnicodeDecodeError as error:
        raise TextError(f"byte {error.start + 1} (0x{data[error.start]:02x}) is not {encoding.upper()}") from None


@contextlib.contextmanager
def reading(
    data: IO[bytes], encoding: str | None = None, *, may_be_latin: bool = True
) -> Iterator[tuple[io.TextIOWrapper, str]]:
    """Yield a reader of these bytes as text, and the encoding it settled on; lines end at LF only.

    Bytes that are not of the encoding come through as surrogates, which `checked` refuses in the line that holds them.
    Of a pipe as much is read as is there: nothing waits for `SNIFFED_BYTES`.

    Args:
        data: the source, at its start.
        encoding: its encoding, if that is known.
        may_be_latin: whether Windows-1252 may be guessed; bytes that are not UTF-8 are errors otherwise.
    """
    if not isinstance(data, io.BufferedReader):
        data = io.BufferedReader(cast("io.RawIOBase", data), SNIFFED_BYTES)
    encoding = encoding or encoding_of(data.peek(SNIFFED_BYTES)[:SNIFFED_BYTES])
    if encoding == LATIN and not may_be_latin:
        encoding = "utf-8"
    errors = "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    handle = io.TextIOWrapper(data, encoding, errors, newline="\n")
    try:
        yield handle, encoding
    finally:
        if not data.closed:
            handle.detach()  # the source stays its owner's


def parse_json(data: bytes | str, *, max_values: int | None = None) -> Any:
    """Return the value of a JSON text, strictly: no NaN or infinity, no half characters, at most 200 levels deep.

    ``max_values`` bounds the values in its arrays and objects, and so what it costs to look at each.

    Raises:
        TextError: it is not such a text.
    """
    from pydantic_core import from_json  # only where there is JSON to read: --help has none

    if isinstance(data, str):
        try:
            data = data.encode()
        except UnicodeEncodeError:
            raise TextError("it is not valid Unicode text") from None
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        decoded(data)  # says it more plainly if that is the reason
        raise TextError(str(error)) from None
    if _MAYBE_INFINITE.search(data) and _has_infinity(value):
        raise TextError("it holds a number beyond the largest of 64 bits")
    if max_values is not None and _has_more_values(value, max_values):
        raise TextError(f"it holds more than {max_values:,} values")
    return value


def _has_more_values(value: Any, most: int) -> bool:
    waiting, count = [value], 0
    while waiting:
        value = waiting.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(inner)
        if count > most:
            return True
        waiting.extend(inner)
    return False


def _has_infinity(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_has_infinity(each) for each in inner)
