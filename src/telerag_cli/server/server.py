"""A server's life: it listens, loads, answers, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from telerag_cli.engine.engine import Engine
from telerag_cli.engine.scheduler import Scheduler
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.server.connections import Connection, ConnectionLimits, connection_limits
from telerag_cli.server.service import Service

CHECK_TICKS = 10
"""Connections are checked once per so many of uvicorn's ticks, which are tenths of a second."""
LAST_ANSWERS_S = 2
"""Seconds for sending what there is to say to those whose questions were under way when the time to drain was over."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address that does not listen yet; port 0 is any that is free."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UsageError(
            f"--host {host} is not an address: {error.strerror}.",
            remedy="Give an address of this machine, like 127.0.0.1 or 0.0.0.0.",
        ) from error
    family, kind, _protocol, _name, address = found[0]
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise ResourceError(
            f"The server cannot listen at {host} port {port}: {(error.strerror or str(error)).lower()}.",
            remedy="Choose another --port or --host; --port 0 takes any that is free.",
        ) from error
    return made


def address_of(listening: socket.socket) -> str:
    """Return the server's address for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


class Serving:
    """One run of a server, from listening to the end."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        load: Callable[[], AbstractContextManager[tuple[Engine, Scheduler]]],
        *,
        drain_s: float,
        tell: Callable[[str], None],
    ) -> None:
        """Prepare a run.

        Args:
            app: what answers requests.
            service: opened once everything is loaded.
            load: opens everything; entered in a thread, and left in the main one.
            drain_s: seconds that requests under way have once the server is to end.
            tell: takes messages for the user.
        """
        self._service = service
        self._load = load
        self._tell = tell
        self._drain_s = drain_s
        self._ended: signal.Signals | None = None
        self._server = uvicorn_server(app, drain_s)

    def run(self, listening: socket.socket) -> signal.Signals:
        """Serve until a signal, and return it: a first one drains, a second one ends at once."""
        with ExitStack() as opened:
            asyncio.run(self._live(listening, opened))
        assert self._ended
        return self._ended

    async def _live(self, listening: socket.socket, opened: ExitStack) -> None:
        listening.listen(self._server.config.backlog)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end, number)
        serving = asyncio.create_task(self._server.serve([listening]))
        try:
            # Not to be interrupted half way: what is opened must be closed.
            engine, scheduler = await asyncio.to_thread(opened.enter_context, self._load())
            if self._ended is None:
                await self._service.warm_up(engine)
                self._service.open(engine, scheduler, engine.concurrency)
                self._tell(f"Ready at {address_of(listening)}")
                notify("READY=1")
            await serving
        finally:
            self._server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)
            await self._service.close()
            loop.remove_signal_handler(signal.SIGINT)
            loop.remove_signal_handler(signal.SIGTERM)

    def end(self, why: signal.Signals) -> None:
        """Begin to end, or end at once if that has begun; from the event loop's thread."""
        if self._ended is not None:
            self._tell("Ending at once.")
            self._service.drain(0.0)
            self._server.force_exit = True
            return
        self._ended = why
        notify("STOPPING=1")
        self._service.drain(self._drain_s)
        self._server.should_exit = True
        if under_way := self._service.under_way:
            self._tell(
                f"Stopping: {under_way} requests under way have {self._drain_s:g} s to end; once more ends them now."
            )


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn raises them again, and so chooses the exit code. Checks connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override, unused-ignore]
        yield

    async def on_tick(self, counter: int) -> bool:
        if counter % CHECK_TICKS == 0:
            for each in list(self.server_state.connections):
                if isinstance(each, Connection):
                    each.check()
        return await super().on_tick(counter)


def uvicorn_server(app: ASGIApp, drain_s: float, limits: ConnectionLimits | None = None) -> uvicorn.Server:
    """Return a server that has not begun, and that gives requests under way so many seconds once it is to end."""
    limits = limits or connection_limits()
    protocol: Any = partial(Connection, limits=limits)
    return _Server(
        uvicorn.Config(
            app,
            http=protocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            backlog=limits.backlog,
            timeout_keep_alive=round(limits.idle_s),
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=round(drain_s) + LAST_ANSWERS_S,
        )
    )


def notify(state: str) -> None:
    """Tell systemd, if it is what started this process; see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.sendall(state.encode())
