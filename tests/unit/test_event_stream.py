"""Server-sent events: what counts, what is passed over, however the bytes are cut."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telerag_cli.llm import event_stream as module
from telerag_cli.llm.event_stream import server_events

BODY = (
    "\ufeff: a comment\n\n"
    'data:{"a": 1}\r\n\r\n'
    "data:\n\n"
    "event: ping\ndata: {}\n\n"
    "id: 7\nretry: 10\nunknown: x\n\n"
    'data: {"b":\rdata: "ä"}\r\r'
    "data\n\n"
    "data: [DONE]"
).encode()
EVENTS = [("", '{"a": 1}'), ("ping", "{}"), ("", '{"b":\n"ä"}'), ("", "[DONE]")]


def read(*pieces):
    async def given_pieces():
        for piece in pieces:
            yield piece

    async def all_of():
        return [tuple(event) async for event in server_events(given_pieces())]

    return asyncio.run(all_of())


@given(st.lists(st.integers(0, len(BODY)), max_size=8))
def test_events_do_not_depend_on_how_bytes_arrive(cuts):
    places = sorted({0, *cuts, len(BODY)})
    assert read(*(BODY[start:end] for start, end in itertools.pairwise(places))) == EVENTS


@pytest.mark.parametrize("body", ['{"choices":\n\n[]}', "<!DOCTYPE html>\n<p>", '\n[1, "data: x"]'])
def test_a_body_without_events_comes_whole(body):
    assert read(body.encode()) == [("", body.strip())]


@pytest.mark.parametrize("body", [b"", b"\n\n", b": only\n\n: comments\n\n"])
def test_nothing_is_nothing(body):
    assert read(body) == []


def test_what_is_not_utf8_or_too_long_is_said(monkeypatch):
    with pytest.raises(ValueError, match="utf-8"):
        read(b'data: {"a": "\xff"}\n\n')
    monkeypatch.setattr(module, "MAX_EVENT_BYTES", 100)
    for endless in ([b"data: " + b"x" * 50] * 3, [b"data: " + b"x" * 50 + b"\n"] * 3, [b"{" + b"x" * 50 + b"\n"] * 3):
        with pytest.raises(ValueError, match="100"):
            read(*endless)
