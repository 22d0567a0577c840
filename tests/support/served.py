"""A server in a thread of the test's process, over an engine that a test made."""

import asyncio
import contextlib
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

from telerag_cli.config import ScheduleName
from telerag_cli.engine.scheduler import Schedule, Scheduler
from telerag_cli.pipelines.registry import make_pipelines
from telerag_cli.server.access_log import AccessLog, LogFormat
from telerag_cli.server.app import make_app
from telerag_cli.server.metrics import Metrics
from telerag_cli.server.middleware import LOOPBACK_HOSTS, AccessOptions, with_middleware
from telerag_cli.server.server import address_of, bind, uvicorn_server
from telerag_cli.server.service import Service


@dataclass
class Running:
    """A server that answers."""

    url: str
    service: Service
    lines: list[str]
    """Of its access log, as JSON."""
    loop: asyncio.AbstractEventLoop
    server: Any

    def line(self, number=-1):
        """A line of the log, which may come a moment after the response."""
        deadline = time.monotonic() + 5
        while not self.lines:
            assert time.monotonic() < deadline, "nothing was logged"
            time.sleep(0.005)
        return json.loads(self.lines[number])

    def idle(self):
        """Wait until nothing is under way, and assert that nothing is left."""

        async def quiet():
            async with asyncio.timeout(10):
                while True:
                    state = self.service.state()
                    queue, llm = state["queue"], state["llm"]
                    busy = (queue["running"], queue["waiting"], llm["running"], state["arena"]["references"])
                    if not any((*busy, state["lookahead"]["rounds"])):
                        return
                    await asyncio.sleep(0.01)

        asyncio.run_coroutine_threadsafe(quiet(), self.loop).result(15)


def assembled(write, access=None, **limits):
    """A service and the application before it, as the command puts them together; ``write`` takes lines of the log."""
    metrics = Metrics("0")
    service = Service(make_pipelines({}), metrics, "0", **limits)
    log = AccessLog(write, LogFormat.JSON)
    return service, with_middleware(make_app(service), access or AccessOptions(), log, metrics)


def open_over(service, engine, at_once=2):
    """Let the service answer with an engine."""
    schedule = Schedule(ScheduleName.SIMILAR, micro_batch=2, max_wait_s=0.005)
    service.open(engine, Scheduler.over(engine, schedule), at_once)


@contextlib.contextmanager
def listening_app(app, port=0, limits=None):
    """Run an application at a port of its own while the block runs; gives its address and what stops it at once."""
    server = uvicorn_server(app, 1.0, limits)
    with bind("127.0.0.1", port) as listening:
        listening.listen(100)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()

        def stop():
            server.force_exit = server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

        yield f"{address_of(listening)}/", stop
        stop()


@contextlib.contextmanager
def serving(engine, *, at_once=2, queue=8, request_s=30.0, key=None, options=None, is_open=True):
    """Serve an engine at a port of its own; with ``is_open`` false, as while it is loading."""
    lines: list[str] = []
    access = options or AccessOptions(key, LOOPBACK_HOSTS if key is None else frozenset())
    service, app = assembled(lines.append, access, max_queue=queue, request_s=request_s)
    server = uvicorn_server(app, 5.0)
    started = threading.Event()
    running: list[Running] = []

    async def live(listening):
        if is_open:
            open_over(service, engine, at_once)
        running.append(Running(address_of(listening), service, lines, asyncio.get_running_loop(), server))
        listening.listen(100)
        started.set()
        await server.serve([listening])
        await service.close()

    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(live(listening)), name="server")
        thread.start()
        try:
            assert started.wait(10)
            yield running[0]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
