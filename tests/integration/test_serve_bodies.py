"""How the middleware takes in bodies: whole, bounded in size and time, and over a real connection."""

import contextlib
import json
import socket
import time
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from served import listening_app
from telerag_cli.server import middleware
from wrapped_app import CHUNKED, GONE, Server, body, check_error


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=12), min_size=1, max_size=8),
    st.integers(0, 40),
    st.sampled_from([None, "true", b"0", b"nonsense", b"-5"]),
)
def test_a_body_is_whole_or_refused(pieces, most, declared):
    whole = b"".join(pieces)
    length = str(len(whole)).encode() if declared == "true" else declared
    messages = [body(piece, more=number < len(pieces)) for number, piece in enumerate(pieces, 1)]
    sent = Server(max_body_bytes=most).drive([*messages, GONE], headers=[(b"content-length", length)] if length else [])
    if len(whole) <= most:
        assert json.loads(sent[1]["body"]) == {"bytes": len(whole), "text": whole.decode("latin-1")}
    else:
        assert sent[0]["status"] == 413
        assert not sent[-1].get("more_body")


@pytest.mark.parametrize("length", [b"11", b"1" * 30, b"9" * 5000])
def test_what_says_that_it_is_too_large_is_refused_unread(length):
    server = Server(max_body_bytes=10)
    sent = server.drive([GONE], headers=[(b"content-length", length)])
    assert sent[0]["status"] == 413
    assert dict(sent[0]["headers"])[b"connection"] == b"close"
    assert server.counted("requests_rejected_total", reason="size") == 1
    assert server.entries[0]["outcome"] == "refused"


def test_a_refusal_comes_at_once_and_what_is_still_sent_is_thrown_away(monkeypatch):
    monkeypatch.setattr(middleware, "LINGER_S", 0.05)
    sent = Server(max_body_bytes=10).drive([body(b"x" * 8, more=True)] * 20, headers=CHUNKED)
    start, content, end = sent
    assert int(dict(start["headers"])[b"content-length"]) == len(content["body"])
    assert content["more_body"]
    assert not end["body"]
    check_error(httpx2.Response(413, content=content["body"]), 413, "request_too_large")


def test_a_body_has_its_time():
    server = Server(body_timeout_s=0.05)
    start, content = server.drive([body(b"{", more=True)], headers=CHUNKED)
    assert start["status"] == 408
    assert dict(start["headers"])[b"connection"] == b"close"
    assert json.loads(content["body"])["error"]["type"] == "timeout_error"
    assert server.entries[0]["outcome"] == "timeout"


def test_a_client_that_leaves_while_sending_is_not_answered():
    server = Server()
    assert server.drive([body(b"{", more=True), GONE], headers=CHUNKED) == []
    assert [(entry["status"], entry["outcome"]) for entry in server.entries] == [(499, "cancelled")]
    assert server.counted("http_requests_total", route="unmatched", status="499") == 1


def test_a_route_still_learns_that_the_client_left():
    async def app(scope, receive, send):
        assert (await receive())["body"] == b"all"
        assert (await receive())["type"] == "http.disconnect"

    server = Server(app)
    assert server.drive([body(b"al", more=True), body(b"l"), GONE]) == []
    assert server.entries[0]["outcome"] == "cancelled"


def test_a_client_that_leaves_with_the_whole_answer_has_not_given_up():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"all"})
        assert (await receive())["type"] == "http.disconnect"

    server = Server(app)
    assert len(server.drive([body(), GONE])) == 2
    assert (server.entries[0]["status"], server.entries[0]["outcome"]) == (200, "done")


# Over a real connection


@pytest.fixture(scope="module")
def running():
    """A server on a port of its own."""
    server = Server(max_body_bytes=1000, body_timeout_s=0.2)
    with listening_app(server.wrapped) as (url, _stop):
        server.address = ("127.0.0.1", urlsplit(url).port)
        yield server


@contextlib.contextmanager
def connected(server):
    with socket.create_connection(server.address, timeout=5.0) as connection:
        server.lines.clear()
        yield connection


def everything(connection):
    """Until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def waited_for(server, lines=1):
    until_s = time.monotonic() + 5.0
    while len(server.lines) < lines and time.monotonic() < until_s:
        time.sleep(0.005)
    return server.entries


@pytest.mark.parametrize("header", ["content-length: 3000000", "transfer-encoding: chunked"])
def test_a_client_that_sends_too_much_reads_why(running, header):
    with connected(running) as connection:
        connection.sendall(f"POST /v1/echo HTTP/1.1\r\nhost: a\r\n{header}\r\n\r\n".encode())
        data = b"x" * 100_000
        with contextlib.suppress(BrokenPipeError):
            for _ in range(30):
                connection.sendall(b"%x\r\n%s\r\n" % (len(data), data) if "chunked" in header else data)
            connection.sendall(b"0\r\n\r\n" if "chunked" in header else b"")
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in answer
    assert waited_for(running)[0]["outcome"] == "refused"


def test_a_client_that_waits_for_leave_sends_nothing(running):
    with connected(running) as connection:
        connection.sendall(b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 3000\r\nexpect: 100-continue\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_slow_sender_is_let_go(running):
    with connected(running) as connection:
        connection.sendall(b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nab")
        assert everything(connection).startswith(b"HTTP/1.1 408 ")


def test_a_reader_that_leaves_ends_the_work(running):
    with connected(running) as connection:
        connection.sendall(b"GET /v1/stream HTTP/1.1\r\nhost: a\r\n\r\n")
        assert connection.recv(100)
    (entry,) = waited_for(running)
    assert (entry["status"], entry["outcome"], entry["path"]) == (200, "cancelled", "/v1/stream")
    assert running.app.state.stopped.wait(5.0)


def test_one_connection_carries_several_requests(running):
    with connected(running) as connection:
        for content in (b"one", b"three"):
            head = b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(content)
            connection.sendall(head + content)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(10_000)
            assert b'{"bytes":%d,' % len(content) in answer
    assert [entry["outcome"] for entry in waited_for(running, 2)] == ["done", "done"]
