"""What a request passes before a route sees it, and what the log and the metrics say of it."""

import asyncio
import re

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expect import fails
from telerag_cli.errors import UsageError
from telerag_cli.server.access_log import LogFormat
from telerag_cli.server.middleware import LOOPBACK_HOSTS, host_name
from wrapped_app import SECRET, Server, application, body, check_error

KEY = "sk-a-key-that-is-long-enough"
WITH_KEY = {"authorization": f"Bearer {KEY}"}


# Request ids and headers


@pytest.mark.parametrize("given_id", ["abc-1_2.3", "x" * 64])
def test_a_clients_own_id_is_kept(given_id):
    response = Server().ask("GET", "/v1/models/a", headers={"x-request-id": given_id})
    assert response.headers["x-request-id"] == response.json()["request"] == given_id


@pytest.mark.parametrize("given_id", [None, "", "x" * 65, "a b", "a\tb", "<b>", "a;b", "é".encode()])
def test_another_id_is_made_where_there_is_no_plain_one(given_id):
    server = Server()
    headers = {} if given_id is None else {"x-request-id": given_id}
    ids = {server.ask("GET", "/v1/models/a", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", each) for each in ids)
    assert ids == {entry["request_id"] for entry in server.entries}


def test_every_response_has_an_id_and_what_browsers_must_know(tmp_path):
    (tmp_path / "a.js").write_text("1")
    server = Server(application(tmp_path), key=KEY, hosts=LOOPBACK_HOSTS, max_body_bytes=10)
    responses = [
        server.ask("GET", "/"),
        server.ask("GET", "/page/a.js"),
        server.ask("GET", "/page/none"),
        server.ask("GET", "/nowhere", headers=WITH_KEY),
        server.ask("GET", "/v1/models/a"),
        server.ask("GET", "/v1/models/a", headers=WITH_KEY),
        server.ask("GET", "/", headers={"host": "evil.example"}),
        server.ask("POST", "/v1/echo", headers=WITH_KEY, content=b"x" * 11),
        server.ask("POST", "/v1/boom", headers=WITH_KEY),
    ]
    assert [each.status_code for each in responses] == [200, 200, 404, 404, 401, 200, 421, 413, 500]
    for response in responses:
        assert response.headers["x-request-id"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-frame-options"] == "DENY"
        private = response.request.url.path.startswith("/v1/") or response.status_code >= 400
        assert (response.headers.get("cache-control") == "no-store") == private


# The key


@settings(deadline=None, max_examples=30)
@given(st.binary(min_size=1, max_size=40).map(lambda data: data.hex("-")), st.binary(max_size=80))
def test_only_the_key_opens(key, shown):
    server = Server(key=key)

    async def opens(value):
        sent = await server.driven([body()], headers=[(b"authorization", value)])
        assert sent[0]["status"] in (200, 401)
        return sent[0]["status"] == 200

    async def trying():
        assert await opens(b"Bearer " + key.encode())
        assert await opens(b"bearer  " + key.encode() + b" ")
        assert await opens(b"Bearer " + shown) == (shown.strip() == key.encode())
        for wrong in (key[:-1], key + "x", "x" + key, key * 2, key.replace(key[0], "g")):
            assert not await opens(b"Bearer " + wrong.encode())
        for wrong in (key.encode(), b"", b"Bearer", b"Bearer ", b"Basic " + key.encode()):
            assert not await opens(wrong)

    asyncio.run(trying())


def test_a_request_without_the_key_learns_nothing_else():
    server = Server(key=KEY)
    missing = server.ask("GET", "/v1/models/a")
    wrong = server.ask("GET", "/v1/models/a", headers={"authorization": "Bearer wrong-key"})
    messages = {check_error(each, 401, "invalid_api_key")["message"] for each in (missing, wrong)}
    assert len(messages) == 2
    assert "wrong-key" not in wrong.text + "".join(server.lines)
    assert KEY not in wrong.text
    assert wrong.headers["www-authenticate"] == "Bearer"
    assert server.counted("requests_rejected_total", reason="key") == 2
    assert server.ask("GET", "/v1/models/a", headers=WITH_KEY).status_code == 200
    assert [entry["outcome"] for entry in server.entries] == ["refused", "refused", "done"]


@pytest.mark.parametrize(
    ("path", "is_open"),
    [
        *((path, True) for path in ("/", "/health", "/ready", "/page/a.js", "/page/sub/a.js", "/docs")),
        *((path, False) for path in ("/page", "/pages", "/page/../v1/models", "/health/", "/metrics", "//")),
        *((path, False) for path in ("/openapi.json", "/v1/models")),
    ],
)
def test_what_needs_no_key(path, is_open):
    sent = Server(key=KEY).drive([body()], method="GET", path=path)
    assert (sent[0]["status"] != 401) == is_open


@pytest.mark.parametrize("key", ["", " ", "a b", "a\nb", "schlüssel"])
def test_a_key_that_no_header_carries_is_refused(key):
    with fails(UsageError):
        Server(key=key)


PREFLIGHT = {"origin": "http://a.example", "access-control-request-method": "POST"}


def test_preflights_need_no_key_but_other_options_do():
    server = Server(key=KEY)
    assert server.ask("OPTIONS", "/v1/echo", headers=PREFLIGHT).status_code == 405  # the application's answer
    assert server.ask("OPTIONS", "/v1/echo").status_code == 401


def test_other_origins_are_allowed_on_request_and_can_read_refusals():
    headers = PREFLIGHT | {"access-control-request-headers": "authorization"}
    closed, server = Server(key=KEY), Server(key=KEY, origins=("http://a.example",))
    allowed = "access-control-allow-origin"
    assert allowed not in closed.ask("GET", "/v1/models/a", headers=WITH_KEY | headers).headers
    response = server.ask("OPTIONS", "/v1/echo", headers=headers)
    assert response.status_code == 200
    assert response.headers[allowed] == "http://a.example"
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert server.ask("GET", "/v1/models/a", headers=headers).headers[allowed] == "http://a.example"
    assert allowed not in server.ask("GET", "/v1/models/a", headers={"origin": "http://b.example"}).headers


# The host


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:80")),
        *((host, 200) for host in ("[::1]:8000", "[0:0:0:0:0:0:0:1]")),
        *((host, 421) for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example")),
        *((host, 421) for host in ("localhost@evil.example", "evil.example:localhost", "[::1]evil.example")),
        *((host, 421) for host in ("[::2]", "0.0.0.0:8000", "")),
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


def test_two_hosts_are_refused():
    server = Server(hosts=LOOPBACK_HOSTS)
    assert server.drive([body()], path="/health", headers=[(b"host", b"localhost")])[0]["status"] == 421


@settings(deadline=None)
@given(st.text("loca.127:[]@/ \n\u00e9F", max_size=12) | st.ip_addresses().map(str))
def test_any_host_has_one_spelling(host):
    name = host_name(host)
    if name is not None:
        assert host_name(name) == name
        assert host_name(f"[{name}]:80" if ":" in name else f"{name}:80") == name


# Errors and streams


@pytest.mark.parametrize(("method", "path"), [("GET", "/ready"), ("POST", "/v1/boom"), ("GET", "/x")])
def test_an_error_that_nobody_caught_is_in_the_log_and_not_in_the_answer(method, path):
    async def bare(scope, receive, send):
        raise ValueError(SECRET)

    server = Server(bare if path == "/x" else None)
    response = server.ask(method, path, headers={"x-request-id": "mine"})
    assert "mine" in check_error(response, 500, "internal_error")["message"]
    assert SECRET not in response.text
    failure, request = server.entries
    assert failure["event"] == "failure"
    assert SECRET in failure["message"]
    assert failure["traceback"].endswith(f"ValueError: {SECRET}")
    assert (request["path"], request["status"], request["outcome"], request["level"]) == (path, 500, "failed", "error")


def test_an_error_in_a_clients_request_has_no_traceback():
    server = Server()
    assert check_error(server.ask("POST", "/v1/wrong"), 400, None)["message"] == "The question is empty."
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
        assert [message.get("body") for message in sent] == [None, b"1"]
        await send({"type": "http.response.body", "body": b"2"})

    sent = []
    server = Server(app, key=KEY, hosts=LOOPBACK_HOSTS, origins=("*",))
    server.drive([body()], headers=[(b"authorization", WITH_KEY["authorization"].encode())], sent=sent)
    assert [message.get("body") for message in sent] == [None, b"1", b"2"]
    assert server.entries[0]["outcome"] == "done"


def test_a_request_that_the_server_gives_up_is_answered():
    async def app(scope, receive, send):
        await asyncio.Event().wait()

    server, sent = Server(app), []

    async def driving():
        await asyncio.wait_for(server.driven([body()], sent=sent), 0.01)

    asyncio.run(driving())
    check_error(httpx2.Response(sent[0]["status"], content=sent[1]["body"]), 503, "stopping")
    assert (server.entries[0]["status"], server.entries[0]["outcome"]) == (503, "refused")


# The log


def test_a_line_has_the_routes_name_and_what_the_route_notes(tmp_path):
    server = Server(application(tmp_path))
    server.ask("GET", f"/v1/models/{SECRET}?key={SECRET}", headers={"x-request-id": "mine"})
    server.ask("GET", "/page/none.js")
    server.ask("GET", "/nowhere?really=1")
    known, page, nowhere = server.entries
    assert 0 < known.pop("duration_s") < 5
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


def test_what_machines_ask_for_is_logged_if_it_fails():
    server = Server()
    server.ask("GET", "/health")
    server.ask("GET", "/telerag/state")
    assert server.lines == []
    server.ask("POST", "/health")
    assert [entry["status"] for entry in server.entries] == [405]


def test_a_log_that_nobody_reads_stops_nothing():
    def broken(line):
        raise BrokenPipeError

    assert Server(write=broken).ask("GET", "/v1/models/a").status_code == 200
