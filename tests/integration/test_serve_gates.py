"""What a request passes before a route sees it, and what the log says of it."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import threading
import time
import unicodedata
import warnings

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.staticfiles import StaticFiles

from telerag_cli.errors import InputError, UsageError
from telerag_cli.server import gates
from telerag_cli.server.access_log import MAX_VALUE, AccessLog, LogFormat, Outcome, Served, escaped
from telerag_cli.server.gates import LOOPBACK_HOSTS, GateOptions, host_name, unhandled, with_gates
from telerag_cli.server.metrics import Metrics

KEY = "sk-a-key-that-is-long-enough"
ASKED = {"authorization": f"Bearer {KEY}"}
SECRET = "never to be told"


def application(folder=None):
    app = FastAPI(exception_handlers={Exception: unhandled})

    @app.get("/")
    @app.get("/health")
    @app.get("/telerag/state")
    async def seen():
        return {"status": "ok"}

    @app.get("/ready")
    async def not_ready():
        raise ValueError(SECRET)

    @app.get("/v1/models/{name}")
    async def model(name: str, request: Request):
        request.state.log.update(model="telerag-naive", prompt_tokens=7, queue_s=0.12345678, stream=False)
        return {"id": name, "request": request.state.request_id}

    @app.post("/v1/echo")
    async def echo(request: Request):
        body = await request.body()
        return {"bytes": len(body), "text": body.decode("latin-1")}

    @app.post("/v1/boom")
    async def boom():
        raise ValueError(SECRET)

    @app.post("/v1/wrong")
    async def wrong():
        raise InputError("The question is empty.")

    @app.get("/v1/torn")
    async def torn():
        async def pieces():
            yield "one"
            raise ValueError(SECRET)

        return StreamingResponse(pieces())

    @app.get("/v1/stream")
    async def stream(request: Request):
        async def pieces():
            try:
                for number in range(10_000):
                    yield f"{number}\n"
                    await asyncio.sleep(0.01)
            finally:
                app.state.stopped.set()

        return StreamingResponse(pieces())

    app.state.stopped = threading.Event()
    if folder:
        app.mount("/page", StaticFiles(directory=folder))
    return app


class Server:
    """An application behind its gates, and what it logged and counted."""

    def __init__(self, app=None, form=LogFormat.JSON, **options):
        self.lines = []
        self.app = app or application()
        self.metrics = Metrics("0")
        self.log = AccessLog(self.lines.append, form)
        self.gated = with_gates(self.app, GateOptions(**options), self.log, self.metrics)

    def ask(self, method, path, **how):
        async def asking():
            transport = httpx2.ASGITransport(app=self.gated, client=("192.0.2.7", 4321))
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
                return await client.request(method, path, **how)

        return asyncio.run(asking())

    def drive(self, messages, *, method="POST", path="/v1/echo", headers=()):
        """What the application sends for these messages from the server; after them nothing comes any more."""
        sent = []

        async def driving():
            left = list(messages)

            async def receive():
                if left:
                    return left.pop(0)
                await asyncio.Event().wait()

            async def send(message):
                sent.append(message)

            scope = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "method": method,
                "path": path,
                "query_string": b"",
                "headers": [(b"host", b"localhost"), *headers],
                "client": ("192.0.2.7", 4321),
                "root_path": "",
            }
            await self.gated(scope, receive, send)

        asyncio.run(driving())
        return sent

    @property
    def entries(self):
        return [json.loads(line) for line in self.lines]

    def counted(self, name, **labels):
        text = self.metrics.exposition()[0].decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"telerag_{name}" and labels.items() <= sample.labels.items()
        )


def body(data=b"", *, more=False):
    return {"type": "http.request", "body": data, "more_body": more}


GONE = {"type": "http.disconnect"}


def check_error(response, status, code):
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


# ---- ids ----


@pytest.mark.parametrize("given_id", ["abc-1_2.3", "x" * 64])
def test_a_clients_own_id_is_kept(given_id):
    response = Server().ask("GET", "/v1/models/a", headers={"x-request-id": given_id})
    assert response.headers["x-request-id"] == response.json()["request"] == given_id


@pytest.mark.parametrize("given_id", [None, "", "x" * 65, "a b", "a\tb", "<b>", "a;b", "é".encode()])
def test_another_id_is_made_where_there_is_no_plain_one(given_id):
    server = Server()
    headers = {} if given_id is None else {"x-request-id": given_id}
    asked = [server.ask("GET", "/v1/models/a", headers=headers) for _ in range(2)]
    ids = {response.headers["x-request-id"] for response in asked}
    assert len(ids) == 2
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", each) for each in ids)
    assert ids == {entry["request_id"] for entry in server.entries}


def test_every_response_has_an_id_and_what_browsers_must_know(tmp_path):
    (tmp_path / "a.js").write_text("1")
    server = Server(application(tmp_path), key=KEY, hosts=LOOPBACK_HOSTS, max_body_bytes=10)
    asked = [
        server.ask("GET", "/"),
        server.ask("GET", "/page/a.js"),
        server.ask("GET", "/page/none"),
        server.ask("GET", "/nowhere", headers=ASKED),
        server.ask("GET", "/v1/models/a"),
        server.ask("GET", "/v1/models/a", headers=ASKED),
        server.ask("GET", "/", headers={"host": "evil.example"}),
        server.ask("POST", "/v1/echo", headers=ASKED, content=b"x" * 11),
        server.ask("POST", "/v1/boom", headers=ASKED),
    ]
    assert [each.status_code for each in asked] == [200, 200, 404, 404, 401, 200, 421, 413, 500]
    for response in asked:
        assert response.headers["x-request-id"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-frame-options"] == "DENY"
        private = response.request.url.path.startswith("/v1/") or response.status_code >= 400
        assert (response.headers.get("cache-control") == "no-store") == private


# ---- key ----


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=40).map(lambda data: data.hex("-")), st.binary(max_size=80))
def test_only_the_key_opens(key, shown):
    app, metrics = _Reached(), Metrics("0")
    gate = gates.KeyGate(app, key, (), metrics)

    async def opens(value):
        app.reached = False
        sent = []
        await gate(_scope("/v1/models", [(b"authorization", value)]), None, _keep(sent))
        assert app.reached == (not sent)
        assert app.reached or sent[0]["status"] == 401
        return app.reached

    async def trying():
        assert await opens(b"Bearer " + key.encode())
        assert await opens(b"bearer  " + key.encode() + b" ")
        assert await opens(b"Bearer " + shown) == (shown.strip() == key.encode())
        for wrong in (key[:-1], key + "x", "x" + key, key * 2, key.replace(key[0], "g")):
            assert not await opens(b"Bearer " + wrong.encode())
        for wrong in (key.encode(), b"", b"Bearer", b"Bearer ", b"Basic " + key.encode()):
            assert not await opens(wrong)

    asyncio.run(trying())


class _Reached:
    reached = False

    async def __call__(self, scope, receive, send):
        self.reached = True


def _scope(path, headers=(), method="GET"):
    return {"type": "http", "method": method, "path": path, "headers": list(headers), "state": {"log": {}}}


def _keep(sent):
    async def send(message):
        sent.append(message)

    return send


def test_a_request_without_the_key_is_told_so_and_nothing_else():
    server = Server(key=KEY)
    error = check_error(server.ask("GET", "/v1/models/a"), 401, "invalid_api_key")
    assert "did not provide" in error["message"]
    response = server.ask("GET", "/v1/models/a", headers={"authorization": "Bearer wrong-key"})
    error = check_error(response, 401, "invalid_api_key")
    assert "Incorrect" in error["message"]
    assert "wrong-key" not in response.text
    assert KEY not in response.text
    assert response.headers["www-authenticate"] == "Bearer"
    assert server.counted("requests_rejected_total", reason="key") == 2
    assert server.ask("GET", "/v1/models/a", headers=ASKED).status_code == 200
    assert [entry["outcome"] for entry in server.entries] == ["refused", "refused", "done"]
    assert "wrong-key" not in "".join(server.lines)


@pytest.mark.parametrize(
    ("path", "is_open"),
    [
        ("/", True),
        ("/health", True),
        ("/ready", True),
        ("/page/a.js", True),
        ("/page/sub/a.js", True),
        ("/page", False),
        ("/pages", False),
        ("/page/../v1/models", False),
        ("/health/", False),
        ("/metrics", False),
        ("/docs", True),
        ("/openapi.json", False),
        ("//", False),
        ("/v1/models", False),
    ],
)
def test_what_needs_no_key(path, is_open):
    app = _Reached()
    gate = gates.KeyGate(app, KEY, gates.OPEN_PATHS, Metrics("0"))
    asyncio.run(gate(_scope(path), None, _keep([])))
    assert app.reached == is_open


@pytest.mark.parametrize("key", ["", " ", "a b", "a\nb", "schlüssel"])
def test_a_key_that_no_header_carries_is_refused(key):
    with pytest.raises(UsageError, match="API key"):
        Server(key=key)


def test_preflights_need_no_key_but_other_options_do():
    preflight = {"origin": "http://a.example", "access-control-request-method": "POST"}
    server = Server(key=KEY)
    assert server.ask("OPTIONS", "/v1/echo", headers=preflight).status_code == 405  # the application's answer
    assert server.ask("OPTIONS", "/v1/echo").status_code == 401


def test_other_origins_are_allowed_if_asked_for_and_can_read_refusals():
    preflight = {
        "origin": "http://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    closed, server = Server(key=KEY), Server(key=KEY, origins=("http://a.example",))
    origin = "access-control-allow-origin"
    assert origin not in closed.ask("GET", "/v1/models/a", headers=ASKED | preflight).headers
    response = server.ask("OPTIONS", "/v1/echo", headers=preflight)
    assert response.status_code == 200
    assert response.headers[origin] == "http://a.example"
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert server.ask("GET", "/v1/models/a", headers=preflight).headers[origin] == "http://a.example"
    assert origin not in server.ask("GET", "/v1/models/a", headers={"origin": "http://b.example"}).headers


# ---- host ----


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("localhost.", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:8000", 200),
        ("[0:0:0:0:0:0:0:1]", 200),
        ("evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("evil.example:localhost", 421),
        ("[::1]evil.example", 421),
        ("[::2]", 421),
        ("0.0.0.0:8000", 421),
        ("", 421),
    ],
)
def test_a_server_answers_to_its_own_names(host, status):
    server = Server(hosts=LOOPBACK_HOSTS)
    response = server.ask("GET", "/health", headers={"host": host})
    assert response.status_code == status
    if status == 421:
        check_error(response, 421, "wrong_host")
        assert "evil" not in response.text
        assert server.counted("requests_rejected_total", reason="host") == 1


def test_two_hosts_or_none_are_nobody():
    app = _Reached()
    gate = gates.HostGate(app, LOOPBACK_HOSTS, Metrics("0"))
    for headers in ([], [(b"host", b"localhost")] * 2):
        sent = []
        asyncio.run(gate(_scope("/", headers), None, _keep(sent)))
        assert not app.reached
        assert sent[0]["status"] == 421


@settings(deadline=None)
@given(st.text("loca.127:[]@/ \n\u00e9F", max_size=12) | st.ip_addresses().map(str))
def test_any_host_has_one_spelling(host):
    name = host_name(host)
    if name is not None:
        assert host_name(name) == name
        assert host_name(f"[{name}]:80" if ":" in name else f"{name}:80") == name


# ---- bodies ----


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=12), min_size=1, max_size=8),
    st.integers(0, 40),
    st.sampled_from([None, "true", b"0", b"nonsense", b"-5"]),
)
def test_a_body_is_whole_or_refused(pieces, most, declared):
    whole = b"".join(pieces)
    length = str(len(whole)).encode() if declared == "true" else declared
    reached = []

    async def app(scope, receive, send):
        message = await receive()
        assert not message["more_body"]
        reached.append(message["body"])

    sent = []

    async def send(message):
        sent.append(message)

    async def driving():
        messages = [body(piece, more=number < len(pieces)) for number, piece in enumerate(pieces, 1)]

        async def receive():
            return messages.pop(0)  # fails where more is read than there is

        headers = [(b"content-length", length)] if length else []
        gate = gates.BodyGate(app, most, 5.0, Metrics("0"))
        await gate(_scope("/", headers, "POST"), receive, send)

    asyncio.run(driving())
    if len(whole) <= most:
        assert reached == [whole]
    else:
        assert reached == []
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
    monkeypatch.setattr(gates, "LINGER_S", 0.05)
    server = Server(max_body_bytes=10)
    began_s = time.perf_counter()
    sent = server.drive([body(b"x" * 8, more=True)] * 20, headers=[(b"transfer-encoding", b"chunked")])
    assert time.perf_counter() - began_s < 2.0
    start, content, end = sent
    assert int(dict(start["headers"])[b"content-length"]) == len(content["body"])
    assert content["more_body"]
    assert not end["body"]
    check_error(httpx2.Response(413, content=content["body"]), 413, "request_too_large")


def test_a_body_has_its_time():
    server = Server(body_s=0.05)
    sent = server.drive([body(b"{", more=True)], headers=[(b"content-length", b"10")])
    start, content = sent
    assert start["status"] == 408
    assert dict(start["headers"])[b"connection"] == b"close"
    assert json.loads(content["body"])["error"]["type"] == "timeout_error"
    assert server.entries[0]["outcome"] == "timeout"


def test_who_leaves_while_sending_is_not_answered():
    server = Server()
    assert server.drive([body(b"{", more=True), GONE], headers=[(b"content-length", b"10")]) == []
    (entry,) = server.entries
    assert (entry["status"], entry["outcome"]) == (499, "cancelled")
    assert server.counted("http_requests_total", route="unmatched", status="499") == 1


def test_a_route_still_learns_that_the_client_left():
    async def app(scope, receive, send):
        assert (await receive())["body"] == b"all"
        assert (await receive())["type"] == "http.disconnect"

    server = Server(app)
    assert server.drive([body(b"al", more=True), body(b"l"), GONE]) == []
    assert server.entries[0]["outcome"] == "cancelled"


def test_who_leaves_with_the_whole_answer_has_not_given_up():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"all"})
        assert (await receive())["type"] == "http.disconnect"

    server = Server(app)
    assert len(server.drive([body(), GONE])) == 2
    assert (server.entries[0]["status"], server.entries[0]["outcome"]) == (200, "done")


# ---- errors ----


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_error_that_nobody_caught_is_in_the_log_and_not_in_the_answer(method):
    server = Server()
    path = "/ready" if method == "GET" else "/v1/boom"
    response = server.ask(method, path, headers={"x-request-id": "mine"})
    error = check_error(response, 500, "internal_error")
    assert "mine" in error["message"]
    assert SECRET not in response.text
    failure, request = server.entries
    assert failure["event"] == "failure"
    assert SECRET in failure["message"]
    assert "test_serve_gates.py" in failure["traceback"]
    assert (request["path"], request["status"], request["outcome"], request["level"]) == (path, 500, "failed", "error")


def test_an_application_without_a_handler_is_answered_for_too():
    async def app(scope, receive, send):
        raise ValueError(SECRET)

    server = Server(app)
    check_error(server.ask("GET", "/x"), 500, "internal_error")
    assert [entry["event"] for entry in server.entries] == ["failure", "request"]


def test_an_error_in_a_clients_request_has_no_traceback():
    server = Server()
    response = server.ask("POST", "/v1/wrong")
    assert check_error(response, 400, None)["message"] == "The question is empty."
    assert [(entry["event"], entry["outcome"]) for entry in server.entries] == [("request", "refused")]


def test_a_response_that_breaks_off_is_not_completed():
    server = Server()
    sent = server.drive([body()], method="GET", path="/v1/torn")
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"]
    failure, request = server.entries
    assert SECRET in failure["message"]
    assert (request["status"], request["outcome"], request["level"]) == (200, "failed", "error")


def test_what_a_stream_sends_goes_out_at_once():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        assert [message.get("body") for message in seen] == [None, b"1"]
        await send({"type": "http.response.body", "body": b"2"})

    server = Server(app, key=KEY, hosts=LOOPBACK_HOSTS, origins=("*",))
    seen = []

    async def driving():
        scope = _scope("/v1/stream", [(b"host", b"localhost"), (b"authorization", f"Bearer {KEY}".encode())])
        messages = [body()]

        async def receive():
            return messages.pop(0)

        await server.gated(scope | {"query_string": b""}, receive, _keep(seen))

    asyncio.run(driving())
    assert [message.get("body") for message in seen] == [None, b"1", b"2"]
    assert server.entries[0]["outcome"] == "done"


def test_a_request_that_the_server_gives_up_is_logged():
    async def app(scope, receive, send):
        await asyncio.Event().wait()

    server = Server(app)

    async def driving():
        async def receive():
            return body()

        task = asyncio.create_task(server.gated(_scope("/v1/stream"), receive, _keep([])))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(driving())
    assert (server.entries[0]["status"], server.entries[0]["outcome"]) == (499, "cancelled")


def test_websockets_are_refused_and_the_servers_own_messages_pass():
    app, sent = _Reached(), []

    async def receive():
        return {"type": "websocket.connect"}

    gated = Server(app, key=KEY, hosts=LOOPBACK_HOSTS).gated
    asyncio.run(gated({"type": "websocket", "path": "/", "headers": []}, receive, _keep(sent)))
    assert not app.reached
    assert [message["type"] for message in sent] == ["websocket.close"]
    asyncio.run(gated({"type": "lifespan"}, receive, _keep(sent)))
    assert app.reached


# ---- log ----


def test_a_line_has_the_routes_name_and_what_the_route_notes(tmp_path):
    server = Server(application(tmp_path))
    server.ask("GET", f"/v1/models/{SECRET}?key={SECRET}", headers={"x-request-id": "mine"})
    server.ask("GET", "/page/none.js")
    server.ask("GET", "/nowhere?really=1")
    known, page, nowhere = server.entries
    took_s = known.pop("duration_s")
    assert 0 < took_s < 5
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", known.pop("time"))
    assert known == {
        "level": "info",
        "event": "request",
        "request_id": "mine",
        "client": "192.0.2.7",
        "method": "GET",
        "path": "/v1/models/{name}",
        "status": 200,
        "outcome": "done",
        "model": "telerag-naive",
        "prompt_tokens": 7,
        "queue_s": 0.123457,
        "stream": False,
    }
    assert (page["path"], page["status"]) == ("/page/*", 404)
    assert nowhere["path"] == "/nowhere"
    assert server.counted("http_requests_total", route="/v1/models/{name}", method="GET", status="200") == 1
    assert server.counted("http_requests_total", route="unmatched", status="404") == 1
    assert server.counted("http_requests_total") == 3


def test_text_is_a_line_too():
    server = Server(form=LogFormat.TEXT)
    server.ask("GET", "/v1/models/a?q=1", headers={"x-request-id": "mine"})
    (line,) = server.lines
    assert re.fullmatch(
        r"\S+Z INFO    mine 192\.0\.2\.7 GET /v1/models/\{name\} 200 \d\.\d{3}s outcome=done model=telerag-naive "
        r"prompt_tokens=7 queue_s=0\.123457 stream=false",
        line,
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


def test_what_machines_ask_for_is_logged_if_it_fails():
    server = Server()
    server.ask("GET", "/health")
    server.ask("GET", "/telerag/state")
    assert server.lines == []
    server.ask("POST", "/health")
    assert [entry["status"] for entry in server.entries] == [405]


@settings(deadline=None)
@given(st.text(), st.text(), st.dictionaries(st.text(max_size=5), st.text() | st.floats() | st.none() | st.booleans()))
@example("\x7f\x9b\u202e\u2028\ud800", "\r\n", {})
@example("", "", {"time": None, "event": "forged"})
def test_nothing_ends_a_line_or_moves_a_terminal(path, request_id, details):
    for form in LogFormat:
        lines = []
        log = AccessLog(lines.append, form, clock=lambda: 1e9)
        log.request(Served(request_id, path, path, path, 500, 0.1, Outcome.FAILED, details))
        (line,) = lines
        assert line.isprintable()
        if form is LogFormat.JSON:
            entry = json.loads(line, parse_constant=pytest.fail)
            assert entry["path"] == path or len(path) > MAX_VALUE == len(entry["path"])
            assert (entry["status"], entry["event"], entry["time"]) == (500, "request", "2001-09-09T01:46:40.000Z")


@settings(deadline=None)
@given(st.text())
def test_escaping_loses_nothing(text):
    shown = escaped(text)
    assert not [char for char in shown if unicodedata.category(char)[0] == "C"]
    assert len(shown.splitlines()) <= 1

    def char(found):
        return named[found[1]] if found[1] else chr(int(found[2] or found[3] or found[4], 16))

    named = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    assert re.sub(r"\\(?:([nrt\\])|x(..)|u(.{4})|U(.{8}))", char, shown) == text


def test_a_log_that_nobody_reads_stops_nothing():
    def broken(line):
        raise BrokenPipeError

    server = Server()
    server.gated = with_gates(server.app, GateOptions(), AccessLog(broken), server.metrics)
    assert server.ask("GET", "/v1/models/a").status_code == 200


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
    assert warned["logger"] == "py.warnings"
    assert "an old thing" in warned["message"]
    assert failed["level"] == "error"
    assert failed["traceback"].endswith("OSError: disk")


# ---- over a real connection ----


@pytest.fixture(scope="module")
def running():
    """A server on a port of its own."""
    server = Server(max_body_bytes=1000, body_s=0.2)
    config = uvicorn.Config(server.gated, log_config=None, access_log=False, lifespan="off")
    uvicorn_server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.address = listening.getsockname()
        thread = threading.Thread(target=lambda: uvicorn_server.run(sockets=[listening]))
        thread.start()
        yield server
        uvicorn_server.should_exit = True
        thread.join()


@contextlib.contextmanager
def connected(server):
    with socket.create_connection(server.address, timeout=5.0) as connection:
        server.lines.clear()
        yield connection


def everything(connection):
    """Until the server closes."""
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def waited_for(server, lines=1):
    until_s = time.monotonic() + 5.0
    while len(server.lines) < lines and time.monotonic() < until_s:
        time.sleep(0.005)
    return server.entries


@pytest.mark.parametrize(
    "headers", ["content-length: 3000000\r\n", "transfer-encoding: chunked\r\n"], ids=["declared", "chunked"]
)
def test_a_client_that_sends_too_much_reads_why(running, headers):
    with connected(running) as connection:
        connection.sendall(f"POST /v1/echo HTTP/1.1\r\nhost: a\r\n{headers}\r\n".encode())
        with contextlib.suppress(BrokenPipeError):
            for _ in range(30):
                data = b"x" * 100_000
                connection.sendall(b"%x\r\n%s\r\n" % (len(data), data) if "chunked" in headers else data)
            connection.sendall(b"0\r\n\r\n" if "chunked" in headers else b"")
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
            connection.sendall(
                b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(content) + content
            )
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(10_000)
            assert b'{"bytes":%d,' % len(content) in answer
    assert [entry["outcome"] for entry in waited_for(running, 2)] == ["done", "done"]
