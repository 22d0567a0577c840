"""What a server sends while it writes: server-sent events, or one whole text where it does not stream."""

from __future__ import annotations

import codecs
import re
from collections.abc import AsyncIterator
from typing import NamedTuple

MAX_EVENT_BYTES = 64 << 20
"""Longest event, or whole text, that is read."""
DONE = "[DONE]"
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
_FIELD = re.compile(rb"\s*(?:data|event|id|retry)?:|\s*(?:data|event|id|retry)\s*\Z")


class ServerEvent(NamedTuple):
    """One event that has data."""

    name: str
    """Empty if it has none."""
    data: str


async def server_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[ServerEvent]:
    """Yield the events with data, in order, without comments; a body that does not begin like one is one by itself.

    Raises:
        ValueError: an event is not UTF-8 or too long.
    """
    name, data = "", list[bytes]()
    whole: bool | None = None
    async for line in _lines(pieces):
        if whole is None:
            line = line.removeprefix(codecs.BOM_UTF8)
        if whole is None and line.strip():
            whole = not _FIELD.match(line)
        field, _, value = line.partition(b":")
        if whole:
            data.append(line)
        elif not line:
            if any(data):
                yield _event(name, data)
            name, data = "", []
        elif field.strip() == b"data":
            data.append(value.removeprefix(b" "))
        elif field.strip() == b"event":
            name = value.strip().decode(errors="replace")
        if sum(map(len, data)) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES:,} bytes")
    if any(data):
        yield _event(name, data)


def _event(name: str, data: list[bytes]) -> ServerEvent:
    return ServerEvent(name, b"\n".join(data).decode().strip())


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines, without their ends; LF, CR and CRLF end one."""
    buffer = bytearray()
    async for piece in pieces:
        start = len(buffer)
        buffer += piece
        if len(buffer) > MAX_EVENT_BYTES:
            raise ValueError(f"a line of more than {MAX_EVENT_BYTES:,} bytes")
        if b"\n" in piece or b"\r" in piece or buffer[start - 1 : start] == b"\r":
            *lines, rest = _LINE_END.split(bytes(buffer))
            buffer = bytearray(rest)
            for line in lines:
                yield line
    if buffer:
        yield bytes(buffer.removesuffix(b"\r"))
