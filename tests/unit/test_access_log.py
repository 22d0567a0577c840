"""Lines of the server's log: their form, and that nothing a client wrote ends a line or moves a terminal."""

import json
import logging
import re
import unicodedata
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from telerag_cli.server.access_log import (
    BURST,
    MAX_MESSAGE,
    MAX_TRACE,
    MAX_VALUE,
    WINDOW_S,
    AccessLog,
    LogFormat,
    RequestOutcome,
    escaped,
)


def test_an_error_in_text_cannot_pass_for_a_line():
    lines = []
    log = AccessLog(lines.append, LogFormat.TEXT, clock=lambda: 0.0)
    forged = "1970-01-01T00:00:00.000Z INFO    other 127.0.0.1 GET / 200"
    try:
        raise ValueError(f"no\n{forged}\x1b[2J")
    except ValueError as error:
        log.failure("mine", error)
    (entry,) = lines
    first, *trace = entry.splitlines()
    assert first == f"1970-01-01T00:00:00.000Z ERROR   mine: ValueError: no\\n{forged}\\x1b[2J"
    assert len(trace) > 3
    assert all(line.startswith("    | ") for line in trace)
    assert "\x1b" not in entry


@settings(deadline=None, max_examples=50)
@given(st.text(), st.text(), st.dictionaries(st.text(max_size=5), st.text() | st.floats() | st.none() | st.booleans()))
@example("\x7f\x9b\u202e\u2028\ud800", "\r\n", {})
@example("", "", {"time": None, "event": "forged", "status": 200})
def test_nothing_ends_a_line_or_moves_a_terminal(path, request_id, details):
    for form in LogFormat:
        lines = []
        log = AccessLog(lines.append, form, clock=lambda: 1e9)
        own = {"request_id": request_id, "client": path, "method": path, "path": path, "status": 500}
        log.request(own | {"duration_s": 0.1}, {"outcome": RequestOutcome.FAILED} | details)
        (line,) = lines
        assert line.isprintable()
        if form is LogFormat.JSON:
            entry = json.loads(line, parse_constant=pytest.fail)
            assert entry["path"] == path or len(path) > MAX_VALUE == len(entry["path"])
            assert (entry["status"], entry["event"], entry["time"]) == (500, "request", "2001-09-09T01:46:40.000Z")


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_escaping_loses_nothing(text):
    shown = escaped(text)
    assert not [char for char in shown if unicodedata.category(char)[0] == "C"]
    assert len(shown.splitlines()) <= 1

    def char(found):
        return named[found[1]] if found[1] else chr(int(found[2] or found[3] or found[4], 16))

    named = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    assert re.sub(r"\\(?:([nrt\\])|x(..)|u(.{4})|U(.{8}))", char, shown) == text


def test_messages_of_libraries_have_the_same_form():
    lines = []
    log = AccessLog(lines.append, LogFormat.JSON)
    before = list(logging.getLogger().handlers)
    with warnings.catch_warnings(), log.capturing():
        warnings.simplefilter("always")
        logging.getLogger("uvicorn.error").warning("Invalid %s\nreceived", "request")
        logging.getLogger("uvicorn.error").info("not this")
        warnings.warn("an old thing", UserWarning, stacklevel=1)
        try:
            raise OSError("disk")
        except OSError:
            logging.getLogger("a").exception("It failed")
    assert logging.getLogger().handlers == before
    first, warned, failed = map(json.loads, lines)
    assert (first["event"], first["level"], first["logger"]) == ("log", "warning", "uvicorn.error")
    assert first["message"] == "Invalid request\nreceived"
    assert (warned["logger"], "an old thing" in warned["message"]) == ("py.warnings", True)
    assert failed["level"] == "error"
    assert failed["traceback"].endswith("OSError: disk")


def test_a_flood_is_counted_and_not_written():
    lines, now = [], [0.0]
    log = AccessLog(lines.append, LogFormat.JSON, clock=lambda: now[0])
    own = {"request_id": "r", "client": "c", "method": "GET", "path": "/v1/models", "duration_s": 0.1}
    record = logging.LogRecord("asyncio", logging.ERROR, "", 0, "no more files\n" * 1000, (), None)
    for _ in range(BURST + 20):
        log.request(own | {"status": 400}, {"outcome": RequestOutcome.REFUSED})
        log.emit(record)
        log.failure("r", MemoryError("x" * 10**6))
    assert len(lines) == 3 * BURST
    assert max(map(len, lines)) < MAX_TRACE + 2 * MAX_MESSAGE
    log.request(own | {"status": 200}, {"outcome": RequestOutcome.DONE})
    assert json.loads(lines[-1])["status"] == 200
    lines.clear()
    now[0] = WINDOW_S
    log.emit(record)
    told, entry = map(json.loads, lines)
    assert (told["event"], entry["event"]) == ("left_out", "log")
    assert "20 " in told["message"]
