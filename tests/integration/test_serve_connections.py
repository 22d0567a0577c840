"""Connections that ask nothing, ask nonsense, never read, or are too many: each is let go, and others are answered."""

import contextlib
import http.client
import json
import resource
import socket
import time
from urllib.parse import urlsplit

import pytest

from served import listening_app
from telerag_cli.server import connections
from telerag_cli.server.connections import ConnectionLimits, connection_limits
from telerag_cli.server.server import uvicorn_server
from wrapped_app import Server

LIMITS = ConnectionLimits(count=20, head_s=1.0, idle_s=90.0, write_s=1.0)
ASK = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
WAIT_S = 15.0


@pytest.fixture(scope="module")
def address():
    """Of a server with small limits, whose path ``/large`` gives more than any buffer holds."""
    usual = Server().wrapped

    async def app(scope, receive, send):
        if scope["path"] != "/large":
            return await usual(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    with listening_app(app, limits=LIMITS) as (url, _stop):
        yield "127.0.0.1", urlsplit(url).port


@contextlib.contextmanager
def connected(address):
    with socket.create_connection(address, timeout=WAIT_S) as connection:
        yield connection


def answer(connection):
    """Status, headers and JSON of the one response before the server closes."""
    head, _, content = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), json.loads(content)


def closed_by_server(connection):
    """Wait until the server ends a connection that it says nothing on."""
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(100) == b""


def asked(connection):
    connection.sendall(ASK)
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status == 200 and json.load(response) == {"status": "ok"}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", 501),
        (b"GET /" + b"a" * 70_000, 431),
    ],
)
def test_malformed_http_is_answered_in_json(address, sent, status):
    with connected(address) as connection:
        connection.sendall(sent)
        got, headers, content = answer(connection)
    assert got == status
    assert headers["content-type"] == "application/json"
    assert content["error"]["code"] == "malformed_http"


def test_headers_have_their_time(address):
    with connected(address) as connection:
        began_s = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n")
        for number in range(5):  # a byte now and then does not prolong it
            connection.sendall(b"x-%d: 1\r\n" % number)
            time.sleep(0.1)
        got, _headers, content = answer(connection)
        assert time.monotonic() - began_s >= LIMITS.head_s
    assert (got, content["error"]["code"]) == (408, "request_timeout")


def test_headers_of_a_later_request_have_their_time_too(address):
    with connected(address) as connection:
        assert asked(connection)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert answer(connection)[0] == 408


def test_a_connection_that_never_asks_is_closed(address):
    with connected(address) as connection:
        closed_by_server(connection)


def test_a_connection_is_kept_for_longer_than_a_proxy_keeps_it():
    assert uvicorn_server(lambda *_: None, 1.0).config.timeout_keep_alive > 75


def test_between_requests_a_connection_is_kept_longer_than_headers_may_take(address):
    with connected(address) as connection:
        assert asked(connection)
        time.sleep(LIMITS.head_s + 1.5)
        assert asked(connection)


def test_of_too_many_connections_the_longest_idle_goes(address):
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(connected(address)) for _ in range(LIMITS.count)]
        with connected(address) as connection:
            assert asked(connection)
        closed_by_server(silent[0])


def test_where_all_are_busy_a_further_one_is_told(address):
    busy = b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n"
    with contextlib.ExitStack() as opened:
        for _ in range(3 * LIMITS.count):  # as long as the server has not read what one sent, it is idle
            connection = opened.enter_context(connected(address))
            connection.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                got, headers, content = answer(connection)
                break
            connection.sendall(busy)
    assert (got, content["error"]["code"]) == (503, "too_many_connections")
    assert headers["retry-after"] == "1"


def test_a_client_that_never_reads_is_let_go(address):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
        time.sleep(LIMITS.write_s + 3)
        connection.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            assert sum(iter(lambda: len(connection.recv(1 << 20)), 0)) < 1000 << 16


def test_a_body_in_a_great_many_chunks_is_refused(address):
    with connected(address) as connection:
        connection.sendall(b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            connection.sendall(b"1\r\na\r\n" * 1_000_000)
        with contextlib.suppress(ConnectionResetError):
            assert answer(connection)[0] == 400


@pytest.mark.parametrize(("size", "count"), [(1, connections.FREE_CHUNKS), (1000, 3000)])
def test_a_body_in_some_chunks_is_taken(address, size, count):
    with connected(address) as connection:
        connection.sendall(
            b"POST /v1/echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        connection.sendall(b"%x\r\n%s\r\n" % (size, b"a" * size) * count + b"0\r\n\r\n")
        got, _headers, content = answer(connection)
    # The second is too large for its server, and is read to the end all the same.
    assert got == (200 if size * count <= 1 << 20 else 413)
    assert content.get("bytes", count) == count


def test_an_offer_of_another_protocol_is_answered_in_this_one(address):
    with connected(address) as connection:
        connection.sendall(ASK[:-2] + b"connection: upgrade, close\r\nupgrade: h2c\r\n\r\n")
        assert answer(connection)[0] == 200


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(1024, 4096, 1024), (256, 4096, 878), (256, 256, 256), (64, 64, 64), (resource.RLIM_INFINITY,) * 2 + (None,)],
)
def test_the_limit_leaves_files_for_the_rest_of_the_process(monkeypatch, soft, hard, raised):
    now = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _which: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda _which, new: now.__setitem__(slice(None), new))
    limits = connection_limits()
    if raised is None or raised >= 878:
        assert limits == ConnectionLimits()
    else:
        assert 8 <= limits.count + limits.backlog <= max(raised - connections.SPARE_FILES, raised // 4)
    assert now == [raised or soft, hard]
