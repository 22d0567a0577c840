"""What every request passes before it reaches a route, as plain ASGI: streams stay streams, and who leaves is noticed.

`guarded` puts the gates together and says in which order, and why.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from telerag_cli.errors import UsageError
from telerag_cli.server.access_log import CLIENT_CLOSED, AccessLog, Outcome, Served
from telerag_cli.server.errors import INVALID, TIMEOUT, ApiError, told
from telerag_cli.server.metrics import Metrics, Rejection

OPEN_PATHS = ("/", "/page/*", "/docs", "/health", "/ready")
"""What anybody may see: the page, which asks for the key itself, and what service managers look at."""

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
"""What a server that listens on this machine only is called by those who mean it."""

MAX_BODY_BYTES = 1 << 20
BODY_S = 30.0
LINGER_S = 1.0
"""For which what a refused client still sends is read and thrown away: a connection that is closed while something
unread lies in it is reset, and the client might not see why."""

UNMATCHED = "unmatched"
"""Stands for the route of what no route answered: the names of metrics must not grow with what clients invent."""

_PRIVATE_PATHS = ("/v1/", "/telerag/", "/metrics")
"""Their responses are not for any cache."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]+")
_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]]*[^\s:/@\[\].])\.?)(?::[0-9]*)?")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}
_LARGEST_LENGTH = 15
"""Digits of a Content-Length that is taken for a number; what is longer is too large whatever it says."""


@dataclass(frozen=True)
class GateOptions:
    """Who may come in, and with how much."""

    key: str | None = None
    """What clients must show; None lets in everybody who can reach the server."""
    hosts: frozenset[str] = frozenset()
    """What the server may be called in ``Host``, ports aside; empty for anything. For a server without a key: a page in the
    user's browser whose name was made to point here must not be answered."""
    open_paths: tuple[str, ...] = OPEN_PATHS
    """Need no key; ``/page/*`` is all below ``/page/``."""
    origins: tuple[str, ...] = ()
    """Pages of other origins that browsers may let use the server; ``*`` for all."""
    max_body_bytes: int = MAX_BODY_BYTES
    body_s: float = BODY_S
    """In which a request's body must have come."""


def with_gates(app: ASGIApp, options: GateOptions, log: AccessLog, metrics: Metrics) -> ASGIApp:
    """Put the application behind its gates.

    From the outside in:

    1. ``OnlyHttp`` refuses WebSockets.
    2. ``RequestIds`` gives each request its id, so that whatever follows can name it; the id is on every response.
    3. ``Logged`` sees how each request ended, refused ones too: the log's line, and the counter of requests.
    4. ``Secured`` puts what browsers must know on every response.
    5. CORS, if origins are allowed, before anything refuses: their pages must be able to read why, and preflights carry
    no key. 6. ``LastResort`` turns an error that nobody caught into a response.
    7. ``HostGate``, before the key: who calls the server by another name is not told whether there is one.
    8. ``KeyGate``, before the body: who has no key is not listened to.
    9. ``BodyGate`` takes in the whole body. No route sees a request before it is there, so a slow sender holds no place
    in
       the queue, and a route can wait for the client to leave without losing what it sent.

    Args:
        app: the application. Give it `unhandled` as its handler of ``Exception``: FastAPI answers by itself otherwise,
            in plain text.
        options: who may come in.
        log: is told of each request and of each error that nobody caught.
        metrics: counts requests and refusals.

    Raises:
        UsageError: the key cannot be sent in a header.
    """
    gated: ASGIApp = BodyGate(app, options.max_body_bytes, options.body_s, metrics)
    if options.key is not None:
        gated = KeyGate(gated, options.key, options.open_paths, metrics)
    if options.hosts:
        gated = HostGate(gated, options.hosts, metrics)
    gated = LastResort(gated, log)
    if options.origins:
        gated = CORSMiddleware(
            gated,
            allow_origins=options.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-should-retry"],
        )
    return OnlyHttp(RequestIds(Logged(Secured(gated), log, metrics)))


def unhandled(request: Request, error: Exception) -> Response:
    """What a client is told of an error that nobody caught: for FastAPI's ``exception_handlers``, under ``Exception``."""
    return told(error, request.state.request_id).response()


def route_of(scope: Scope) -> str | None:
    """The template of the route that answered, ``/v1/models/{id}``, or ``/page/*`` for what is mounted; None if there was none."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    above = scope.get("app_root_path", "")
    mounted = scope.get("root_path", "").removeprefix(above) if "app_root_path" in scope else ""
    return f"{mounted}/*" if mounted else None


class OnlyHttp:
    """Refuses WebSockets: nothing here speaks them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is no WebSocket."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        await self._app(scope, receive, send)


class _Gate(ABC):
    """Lets through what is not HTTP: the server's messages that it starts and ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one request."""
        await (self._http if scope["type"] == "http" else self._app)(scope, receive, send)

    @abstractmethod
    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one HTTP request."""


class RequestIds(_Gate):
    """Gives each request an id, its own if that is short and plain, and a place for what is noted of it.

    Routes find ``request.state.request_id``, and ``request.state.log``, a dict whose items become part of the log's
    line.
    """

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {}).update(request_id=request_id, log={})

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                _headers(message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, named)


@dataclass
class _Seen:
    """What is known of a response from what passed."""

    status: int | None = None
    complete: bool = False
    left: bool = False
    """The client, before the response was complete."""


class Logged(_Gate):
    """Notes how each request ended, in the log and in the metrics."""

    def __init__(self, app: ASGIApp, log: AccessLog, metrics: Metrics) -> None:
        super().__init__(app)
        self._log = log
        self._metrics = metrics

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = _Seen()
        began_s = time.perf_counter()

        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not seen.complete:
                seen.left = True
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                # Before it is sent: a server says `http.disconnect` to others as soon as it has it.
                seen.complete = True
            await send(message)

        try:
            await self._app(scope, received, sent)
        except asyncio.CancelledError:
            seen.left = not seen.complete
            raise
        finally:
            self._note(scope, seen, time.perf_counter() - began_s)

    def _note(self, scope: Scope, seen: _Seen, took_s: float) -> None:
        state = scope["state"]
        details = dict(state["log"])
        status = seen.status or (CLIENT_CLOSED if seen.left else 500)
        outcome = details.pop("outcome", None) or _outcome(status, seen)
        route = route_of(scope)
        client = scope.get("client")
        self._metrics.http(route or UNMATCHED, scope["method"], status)
        self._log.request(
            Served(
                state["request_id"],
                client[0] if client else "-",
                scope["method"],
                route or scope["path"],
                status,
                took_s,
                outcome,
                details,
            )
        )


def _outcome(status: int, seen: _Seen) -> Outcome:
    """How a request ended whose route does not say."""
    if seen.left or status == CLIENT_CLOSED:
        return Outcome.CANCELLED
    if status in (408, 504):
        return Outcome.TIMEOUT
    if 400 <= status < 500 or status == 503:
        return Outcome.REFUSED
    return Outcome.FAILED if status >= 500 or not seen.complete else Outcome.DONE


class Secured(_Gate):
    """Puts on every response what keeps browsers from guessing types, telling addresses, framing, and keeping answers."""

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        private = scope["path"].startswith(_PRIVATE_PATHS)

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = _headers(message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if private or message["status"] >= 400:
                    headers["cache-control"] = "no-store"
            await send(message)

        await self._app(scope, receive, secured)


class LastResort(_Gate):
    """Turns an error that nobody caught into a response, if there is still time for one; the log has the traceback."""

    def __init__(self, app: ASGIApp, log: AccessLog) -> None:
        super().__init__(app)
        self._log = log

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        state = scope["state"]
        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            state["log"].setdefault("outcome", Outcome.CANCELLED)
        except Exception as error:
            answer = told(error, state["request_id"])
            if answer.status >= 500:
                self._log.failure(state["request_id"], error)
                state["log"].setdefault("outcome", Outcome.FAILED)
            # A response that has begun stays torn: the server then closes the connection, which tells the client.
            if not begun:
                await answer.response()(scope, receive, send)


class HostGate(_Gate):
    """Answers only those who call the server by a name of its own.

    A page may have its name point to this machine once the browser has loaded it (DNS rebinding). To the browser it
    then is the server's own page, and all that gives it away is the name that it calls the server by.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], metrics: Metrics) -> None:
        super().__init__(app)
        self._hosts = frozenset(filter(None, map(host_name, hosts)))
        self._metrics = metrics

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).getlist("host")
        name = host_name(given[0]) if len(given) == 1 else None
        if name not in self._hosts:
            refusal = ApiError(
                421,
                "This server does not answer to the host name of this request. Use the address that "
                "it printed when it started.",
                INVALID,
                code="wrong_host",
            )
            await _refuse(scope, receive, send, refusal, self._metrics, "host")
            return
        await self._app(scope, receive, send)


def host_name(host: str) -> str | None:
    """The name or address in a ``Host`` header, without port, in one spelling: ``::1`` for ``[0:0::1]:80``; None if it is neither."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).compressed  # so that `hosts` may hold addresses without brackets
    parts = _HOST.fullmatch(host)
    if parts is None:
        return None
    if parts["v6"]:
        try:
            return ipaddress.IPv6Address(parts["v6"]).compressed
        except ValueError:
            return None
    return parts["name"].lower()


class KeyGate(_Gate):
    """Lets in those who show the key, and everybody to the open paths."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Iterable[str], metrics: Metrics) -> None:
        if not _KEY.fullmatch(key):
            raise UsageError(
                "The API key is empty or has characters in it that a header cannot carry.",
                remedy="Use letters, digits and signs of ASCII, without spaces.",
            )
        super().__init__(app)
        self._salt = secrets.token_bytes(32)
        self._digest = self._digest_of(key.encode())
        self._open = frozenset(path for path in open_paths if not path.endswith("/*"))
        self._open_below = tuple(path.removesuffix("*") for path in open_paths if path.endswith("/*"))
        self._metrics = metrics

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not (self._is_open(scope["path"]) or _is_preflight(scope)):
            scheme, _, shown = _header(scope, b"authorization").partition(b" ")
            if scheme.lower() != b"bearer" or not self._fits(shown.strip()):
                missing = "You did not provide an API key. Send it in the header Authorization: Bearer KEY."
                wrong = "Incorrect API key provided."
                refusal = ApiError(
                    401,
                    wrong if scheme else missing,
                    INVALID,
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await _refuse(scope, receive, send, refusal, self._metrics, "key")
                return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        below = path.startswith(self._open_below) and ".." not in path.split("/")
        return path in self._open or below

    def _fits(self, shown: bytes) -> bool:
        # Digests are of one length, so the time tells nothing of the key's; the salt keeps their bytes from being
        # chosen.
        return hmac.compare_digest(self._digest_of(shown), self._digest)

    def _digest_of(self, key: bytes) -> bytes:
        return hmac.digest(self._salt, key, "sha256")


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks whether it may ask; such a request carries no key."""
    headers = Headers(scope=scope)
    return scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


class BodyGate(_Gate):
    """Takes in a request's body, as long as it is neither too large nor too slow, and hands it on as one piece."""

    def __init__(self, app: ASGIApp, max_bytes: int, within_s: float, metrics: Metrics) -> None:
        super().__init__(app)
        self._max_bytes = max_bytes
        self._within_s = within_s
        self._metrics = metrics

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _declared_bytes(scope) > self._max_bytes:
            await self._too_large(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self._within_s):
                more = True
                while more and len(body) <= self._max_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return  # there is nobody to answer
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            refusal = ApiError(
                408,
                f"The request's body did not come within {self._within_s:g} s.",
                TIMEOUT,
                code="request_timeout",
                headers={"connection": "close"},
            )
            await refusal.response()(scope, receive, send)
            return
        if len(body) > self._max_bytes:
            await self._too_large(scope, receive, send, all_read=not more)
            return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}
        del body

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send, *, all_read: bool = False) -> None:
        refusal = ApiError(
            413,
            f"The request is larger than {self._max_bytes:,} bytes, the most that this server takes.",
            INVALID,
            code="request_too_large",
        )
        await _refuse(scope, receive, send, refusal, self._metrics, "size", all_read=all_read)


def _declared_bytes(scope: Scope) -> int:
    """By Content-Length; 0 without one, or if it is no number."""
    length = _header(scope, b"content-length").strip()
    if not length.isdigit():
        return 0
    return int(length[:_LARGEST_LENGTH]) if len(length) <= _LARGEST_LENGTH else 10**_LARGEST_LENGTH


async def _refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    refusal: ApiError,
    metrics: Metrics,
    reason: Rejection,
    *,
    all_read: bool = False,
) -> None:
    """Answer with an error at once. If the request has a body, its connection ends, but not before the client could read why.

    ``all_read`` says that the whole body has come.
    """
    metrics.rejected(reason)
    scope["state"]["log"]["outcome"] = Outcome.REFUSED
    names = {name for name, _value in scope["headers"]}
    if all_read or not names & {b"content-length", b"transfer-encoding"}:
        await refusal.response()(scope, receive, send)
        return
    refusal.headers["connection"] = "close"

    async def unfinished(message: Message) -> None:
        # By its Content-Length the client has the whole response; the server reads on until it is finished.
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await refusal.response()(scope, receive, unfinished)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b""})


def _header(scope: Scope, name: bytes) -> bytes:
    """A header's first value, empty if it is not there; as bytes, since clients send what they like."""
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")


def _headers(message: Message) -> MutableHeaders:
    """Of a response's first message, to be changed; ASGI lets it have none."""
    message.setdefault("headers", [])
    return MutableHeaders(scope=message)
