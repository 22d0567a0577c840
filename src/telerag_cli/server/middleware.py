"""What every request passes before it reaches a route. Plain ASGI: streams stay streams, lost clients are noticed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import re
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from telerag_cli.errors import UsageError
from telerag_cli.server.access_log import CLIENT_CLOSED, AccessLog, RequestOutcome
from telerag_cli.server.errors import INVALID, TIMEOUT, ApiError, as_api_error, stopping
from telerag_cli.server.metrics import Metrics, Rejection

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of a server that listens on this machine only."""
MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 30.0
LINGER_S = 1.0
"""Seconds for which the rest of a refused request is read and thrown away: closing a connection that holds unread data
resets it, and the client might not see why."""
UNMATCHED = "unmatched"
"""Label of requests that no route answered: the number of series must not grow with what clients invent."""

_OPEN_PATHS = frozenset({"/", "/docs", "/health", "/ready"})
_OPEN_BELOW = "/page/"
"""Paths that need no key: the page, which asks for the key itself, and what service managers look at."""
_PRIVATE_PATHS = ("/v1/", "/telerag/", "/metrics")
"""Paths whose responses no cache may keep."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]+")
_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]]*[^\s:/@\[\].])\.?)(?::[0-9]*)?")
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class AccessOptions:
    """Who may use the server, and with how large requests."""

    key: str | None = None
    """The API key that clients must send; None lets in everybody who can reach the server."""
    hosts: frozenset[str] = frozenset()
    """Names and addresses that ``Host`` may hold, ports aside; empty for any. A server without a key needs them: a page
    in the user's browser whose name was made to point here must not be answered."""
    origins: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser; ``*`` for all."""
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout_s: float = BODY_TIMEOUT_S


def with_middleware(app: ASGIApp, options: AccessOptions, log: AccessLog, metrics: Metrics) -> ASGIApp:
    """Wrap the application, from the outside in, in `RequestContext`, CORS if origins are allowed, and `Guard`.

    CORS comes before what refuses: pages of other origins must be able to read why, and preflights carry no key. The
    application needs a handler of ``Exception`` of its own: FastAPI answers in plain text otherwise.
    """
    wrapped: ASGIApp = Guard(app, options, log, metrics)
    if options.origins:
        wrapped = CORSMiddleware(
            wrapped,
            allow_origins=options.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-should-retry"],
        )
    return RequestContext(wrapped, log, metrics)


class RequestContext:
    """Gives each request its id, puts what browsers must know on its response, and logs and counts how it ended.

    Routes find ``request.state.request_id``, and ``request.state.log``, a dict whose items go into the log's line.
    """

    def __init__(self, app: ASGIApp, log: AccessLog, metrics: Metrics) -> None:
        self._app, self._log, self._metrics = app, log, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {}).update(request_id=request_id, log={})
        status: int | None = None
        complete = client_left = False
        started_s = time.perf_counter()

        async def received() -> Message:
            nonlocal client_left
            message = await receive()
            client_left |= message["type"] == "http.disconnect" and not complete
            return message

        async def sent(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])  # ASGI lets them be absent
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if message["status"] >= 400 or scope["path"].startswith(_PRIVATE_PATHS):
                    headers["cache-control"] = "no-store"
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                # Before it is sent: servers report `http.disconnect` as soon as they have it.
                complete = True
            await send(message)

        try:
            await self._app(scope, received, sent)
        except asyncio.CancelledError:
            client_left = not complete
            raise
        finally:
            final_status = status or (CLIENT_CLOSED if client_left else 500)
            route = _route_of(scope)
            self._metrics.http(route or UNMATCHED, scope["method"], final_status)
            own = {
                "request_id": request_id,
                "client": scope["client"][0] if scope.get("client") else "-",
                "method": scope["method"],
                "path": route or scope["path"],
                "status": final_status,
                "duration_s": time.perf_counter() - started_s,
            }
            outcome = {"outcome": _outcome(final_status, complete=complete, client_left=client_left)}
            self._log.request(own, outcome | scope["state"]["log"])


def _route_of(scope: Scope) -> str | None:
    """The route's template, ``/v1/models/{id}``, or ``/page/*`` for what is mounted; None if no route answered."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    above = scope.get("app_root_path", "")
    mounted = scope.get("root_path", "").removeprefix(above) if "app_root_path" in scope else ""
    return f"{mounted}/*" if mounted else None


def _outcome(status: int, *, complete: bool, client_left: bool) -> RequestOutcome:
    """How a request ended whose route does not say."""
    if client_left or status == CLIENT_CLOSED:
        return RequestOutcome.CANCELLED
    if status in (408, 504):
        return RequestOutcome.TIMEOUT
    if 400 <= status < 500 or status == 503:
        return RequestOutcome.REFUSED
    return RequestOutcome.FAILED if status >= 500 or not complete else RequestOutcome.DONE


@dataclass(eq=False)
class _RefusedError(Exception):
    """A request that is refused before a route sees it."""

    reason: Rejection
    answer: ApiError
    body_read: bool = False


class Guard:
    """Refuses requests under another host's name, without the key, or with a body that is too large or too slow.

    The host comes first, so that a client that uses another name does not learn whether there is a key. The body is
    taken in whole before a route sees the request: a slow sender holds no place in the queue, and a route can wait for
    the client to leave without losing data. Refusals, and errors that nobody caught, become responses here.
    """

    def __init__(self, app: ASGIApp, options: AccessOptions, log: AccessLog, metrics: Metrics) -> None:
        if options.key is not None and not _KEY.fullmatch(options.key):
            raise UsageError(
                "The API key is empty or has characters that a header cannot carry.",
                remedy="Use letters, digits and signs of ASCII, without spaces.",
            )
        self._app, self._options, self._log, self._metrics = app, options, log, metrics
        self._hosts = {host_name(host) for host in options.hosts} - {None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request."""
        state = scope["state"]
        began = False

        async def sent(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_key(headers, scope)
            whole = [{"type": "http.request", "body": await self._read_body(headers, receive), "more_body": False}]

            async def replayed() -> Message:
                return whole.pop() if whole else await receive()

            await self._app(scope, replayed, sent)
        except _RefusedError as refused:
            self._metrics.rejected(refused.reason)
            state["log"]["outcome"] = RequestOutcome.REFUSED
            if refused.body_read or not {"content-length", "transfer-encoding"} & set(headers):
                await refused.answer.response()(scope, receive, send)
            else:
                await _refuse_and_drain(refused.answer, scope, receive, send)
        except ClientDisconnect:
            state["log"].setdefault("outcome", RequestOutcome.CANCELLED)
        except asyncio.CancelledError:
            # Nothing but the server's end cancels a request that has come so far.
            if began:
                raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await stopping().response()(scope, receive, send)
        except Exception as error:
            answer = as_api_error(error, state["request_id"])
            if answer.status >= 500:
                self._log.failure(state["request_id"], error)
                state["log"].setdefault("outcome", RequestOutcome.FAILED)
            # A response that has begun stays torn: the server then closes the connection, which tells the client.
            if not began:
                await answer.response()(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """Refuse a request under a name that is not the server's own.

        A page may have its name point to this machine once the browser has loaded it (DNS rebinding). The browser then
        takes the server for the page's own, and only the name in ``Host`` gives it away.
        """
        given = headers.getlist("host")
        if self._hosts and (len(given) != 1 or host_name(given[0]) not in self._hosts):
            message = "This server does not answer to the host name of this request."
            remedy = "Use the address that it printed when it started."
            raise _RefusedError("host", ApiError(421, f"{message} {remedy}", INVALID, code="wrong_host"))

    def _check_key(self, headers: Headers, scope: Scope) -> None:
        path = scope["path"]
        is_open = path in _OPEN_PATHS or (path.startswith(_OPEN_BELOW) and ".." not in path.split("/"))
        # A browser that asks whether it may ask sends no key.
        is_preflight = (
            scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
        )
        if self._options.key is None or is_open or is_preflight:
            return
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same_secret(shown.strip(" \t"), self._options.key):
            return
        missing = "You did not provide an API key. Send it in the header Authorization: Bearer KEY."
        message = "Incorrect API key provided." if scheme else missing
        challenge = {"www-authenticate": "Bearer"}
        raise _RefusedError("key", ApiError(401, message, INVALID, code="invalid_api_key", headers=challenge))

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        max_bytes, timeout_s = self._options.max_body_bytes, self._options.body_timeout_s
        message = f"The request is larger than {max_bytes:,} bytes, the most that this server takes."
        too_large = ApiError(413, message, INVALID, code="request_too_large")
        declared = headers.get("content-length", "").strip()
        # Of a longer number the first digits are too large already, and int() refuses thousands of them.
        if declared.isdecimal() and int(declared[:19]) > max_bytes:
            raise _RefusedError("size", too_large)
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(timeout_s):
                while more and len(body) <= max_bytes:
                    part = await receive()
                    if part["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += part.get("body", b"")
                    more = part.get("more_body", False)
        except TimeoutError:
            message = f"The request's body did not come within {timeout_s:g} s."
            raise ApiError(408, message, TIMEOUT, code="request_timeout", headers={"connection": "close"}) from None
        if len(body) > max_bytes:
            raise _RefusedError("size", too_large, body_read=not more)
        return bytes(body)


async def _refuse_and_drain(answer: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once, and end the connection, but not before the client could read why."""

    async def unfinished(message: Message) -> None:
        # By its Content-Length the client has the whole response; the server reads on until it is finished.
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    response = answer.response()
    response.headers["connection"] = "close"
    await response(scope, receive, unfinished)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b""})


def _same_secret(shown: str, key: str) -> bool:
    # Digests are of one length, so the time tells nothing of the key's.
    return hmac.compare_digest(*(hashlib.sha256(each.encode("latin-1")).digest() for each in (shown, key)))


def host_name(host: str) -> str | None:
    """Return the name or address in a ``Host`` header in one spelling, ``::1`` for ``[0:0::1]:80``; None if invalid."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).compressed  # so that `hosts` may hold addresses without brackets
    parts = _HOST.fullmatch(host)
    if parts is None:
        return None
    if not parts["v6"]:
        return parts["name"].lower()
    try:
        return ipaddress.IPv6Address(parts["v6"]).compressed
    except ValueError:
        return None
