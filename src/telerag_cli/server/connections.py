"""A connection of HTTP/1.1 with the limits that uvicorn's has not, and with errors that are JSON."""

from __future__ import annotations

import asyncio
import heapq
import json
import resource
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from telerag_cli.server.errors import INVALID, OVERLOADED, TIMEOUT, ApiError

MAX_HEAD_BYTES = 16 << 10
"""Of a request's line and headers."""
SPARE_FILES = 128
"""Files that connections leave to the rest of the process: the index, the model, the replicas."""
FREE_CHUNKS, MIN_CHUNK_BYTES = 200, 256
"""A body may come in so many chunks of any size, and in one more for each of so many bytes: each takes the time of a
kilobyte in few chunks."""


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be, and how long each may do nothing."""

    count: int = 500
    head_s: float = 15.0
    """Seconds until a request's line and headers are there, from when the connection was made or the request began."""
    idle_s: float = 90.0
    """Seconds between two requests. Proxies keep connections for 60 or 75, and must be the first to close."""
    write_s: float = 60.0
    """Seconds for which a client may read nothing of a response."""

    @property
    def backlog(self) -> int:
        """Connections that the kernel keeps until they are accepted: a burst of clients, all accepted at once."""
        return min(256, self.count // 2)


def connection_limits() -> ConnectionLimits:
    """Return limits that this process has files for, after raising its own soft limit as far as it may go."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    usual, unlimited = ConnectionLimits(), resource.RLIM_INFINITY
    wanted = usual.count + usual.backlog + SPARE_FILES
    if soft == unlimited or soft >= wanted:
        return usual
    if hard == unlimited or hard > soft:
        soft = wanted if hard == unlimited else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # The backlog takes half as many again.
    return ConnectionLimits(min(usual.count, max(soft - SPARE_FILES, soft // 4) * 2 // 3))


class _Parser(h11.Connection):
    """Refuses bodies in a great many small chunks, and remembers with which status it refused something."""

    refused_with = 400
    refused_for = ""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._chunks = self._body_bytes = 0

    def next_event(self) -> Any:
        """See `h11.Connection`."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._chunks = self._body_bytes = 0
            elif isinstance(event, h11.Data):
                self._chunks += 1
                self._body_bytes += len(event.data)
                if self._chunks > FREE_CHUNKS + self._body_bytes // MIN_CHUNK_BYTES:
                    raise h11.RemoteProtocolError("the body comes in too many small chunks")
        except h11.RemoteProtocolError as error:
            self.refused_with = error.error_status_hint
            self.refused_for = str(error)
            raise
        return event


class Connection(H11Protocol):
    """One client's connection; `check` is to be called about once per second."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: _Parser = _Parser()
        self._limits = limits
        self._active_s = self.loop.time()
        self._began_s: float | None = self._active_s
        """When the head of a request began to come, or could have; None if none is waited for."""
        self._unsent_bytes = 0
        self._unsent_since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection; if there are too many, those that were idle longest go, or else this one."""
        super().connection_made(transport)
        if len(self.connections) <= self._limits.count:
            return
        idle = [each for each in self.connections if isinstance(each, Connection) and each.is_idle and each is not self]
        if idle:
            # Some at once, for looking through all of them takes a while; they leave the set later by themselves, too.
            for each in heapq.nsmallest(1 + self._limits.count // 32, idle, key=lambda each: each._active_s):
                each.transport.abort()
                self.connections.discard(each)
        else:
            message = f"There are {self._limits.count:,} connections, as many as may be; try again in a second."
            self.logger.warning(message)
            self._refuse(ApiError(503, message, OVERLOADED, code="too_many_connections", headers={"retry-after": "1"}))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._active_s = self.loop.time()
        if self._began_s is None and self.is_idle:
            self._began_s = self._active_s
        super().data_received(data)
        if not self.is_idle:
            self._began_s = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way; the head of one may be."""
        return self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE

    def on_response_complete(self) -> None:
        """See `H11Protocol`."""
        self._active_s = self.loop.time()
        super().on_response_complete()

    def check(self) -> None:
        """End the connection if the client takes too long to ask or to read."""
        now_s, unsent_bytes = self.loop.time(), self.transport.get_write_buffer_size()
        if not unsent_bytes or unsent_bytes != self._unsent_bytes:
            self._unsent_bytes, self._unsent_since_s = unsent_bytes, now_s
        elif now_s - self._unsent_since_s > self._limits.write_s:
            self.transport.abort()
            return
        if self._began_s is not None and now_s - self._began_s > self._limits.head_s and self.is_idle:
            if self.conn.trailing_data[0]:
                message = f"The request's headers did not come within {self._limits.head_s:g} s."
                self._refuse(ApiError(408, message, TIMEOUT, code="request_timeout"))
            else:
                self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, and end the connection."""
        reason = f"{msg.rstrip('.')}: {self.conn.refused_for}."
        self._refuse(ApiError(self.conn.refused_with, reason, INVALID, code="malformed_http"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error, unless a response has begun, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body).encode()
            headers = {**error.headers, "content-type": "application/json", "content-length": str(len(body))}
            head = h11.Response(
                status_code=error.status,
                headers=[*headers.items(), ("cache-control", "no-store"), ("connection", "close")],
                reason=HTTPStatus(error.status).phrase.encode(),
            )
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a client that offers another protocol is answered in this one."""
