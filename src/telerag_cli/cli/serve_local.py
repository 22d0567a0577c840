"""``telerag serve-local``: the system behind an OpenAI-compatible server, with a page to ask and to watch."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli import __version__
from telerag_cli.cli import console
from telerag_cli.cli.options import Without
from telerag_cli.config import EngineConfig, ScheduleConfig
from telerag_cli.errors import EXIT_INTERRUPTED, UsageError
from telerag_cli.server.access_log import LogFormat
from telerag_cli.setting import Setting, settings_of
from telerag_cli.system import bound_kernel_caches
from telerag_cli.units import parse_bytes

if TYPE_CHECKING:
    from telerag_cli.engine.engine import Engine
    from telerag_cli.engine.scheduler import Scheduler
    from telerag_cli.server.middleware import AccessOptions

KEY_VARIABLE = "TELERAG_API_KEY"
LOCAL_HOST, LOCAL_NAME = "127.0.0.1", "localhost"
_SERVER, _LIMITS = "The server", "Limits"


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and to whom."""

    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; any but this machine's own needs an API key.", rich_help_panel=_SERVER
        ),
    ] = LOCAL_HOST
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.", rich_help_panel=_SERVER)
    ] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            help="What clients must send as their API key; "
            f"better given in {KEY_VARIABLE}, which no list of processes shows.",
            metavar="KEY",
            rich_help_panel=_SERVER,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="An origin whose pages may use the server from a browser, like https://chat.example.org; repeatable.",
            metavar="ORIGIN",
            rich_help_panel=_SERVER,
        ),
    ] = None
    log_format: Annotated[LogFormat, typer.Option(help="How lines on stderr look.", rich_help_panel=_SERVER)] = (
        LogFormat.TEXT
    )

    @property
    def key(self) -> str | None:
        """What clients must show, if anything.

        Raises:
            UsageError: anybody could reach the server, and would need none.
        """
        if not self.api_key and not self.local:
            raise UsageError(
                f"--host {self.host} can be reached from other machines, and there is no API key.",
                remedy=f"Give one in {KEY_VARIABLE} or --api-key, or listen at {LOCAL_HOST}.",
            )
        return self.api_key or None

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == LOCAL_NAME:
            return True
        try:
            return ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class LimitOptions:
    """How much the server takes on."""

    max_queue: Annotated[
        int, typer.Option(min=0, help="Questions that may wait; more are refused with 503.", rich_help_panel=_LIMITS)
    ] = 64
    request_timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds that a question may take, waiting included.", rich_help_panel=_LIMITS),
    ] = 300.0
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest request.", rich_help_panel=_LIMITS)] = "1MiB"
    drain: Annotated[
        float,
        typer.Option(
            min=0.0, help="Seconds that questions under way have once the server is to stop.", rich_help_panel=_LIMITS
        ),
    ] = 30.0


@dataclass(frozen=True, kw_only=True)
class ServedConfig(EngineConfig):
    """An engine behind a server."""

    concurrency: Annotated[
        int | None,
        Setting(
            "Questions answered at once.",
            min=1,
            panel=_LIMITS,
            default="what memory holds contexts for, at most 16; 8 with a server",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ServedScheduleConfig(ScheduleConfig):
    """Which questions are answered together; a person waits for each."""

    max_wait: Annotated[float, settings_of(ScheduleConfig)["max_wait"][1]] = 0.02


def serve_local(
    config: Annotated[ServedConfig, Without("pipeline", "explain", "replay")],
    server: ServerOptions,
    limits: LimitOptions,
    schedule: ServedScheduleConfig,
) -> None:
    """Serve an index to OpenAI clients, and a page to ask and to watch at the same address.

    Every pipeline is a model: telerag-hyde, telerag-naive, and so on. The page is at /, the API's description at /docs.
    """
    key = server.key
    bound_kernel_caches()
    with console.stdout_reserved(), console.talking(as_json=server.log_format is LogFormat.JSON):
        from telerag_cli.cli.reporting import ConsoleReporter
        from telerag_cli.engine.engine import Engine
        from telerag_cli.engine.scheduler import Scheduler, scheduled
        from telerag_cli.pipelines.registry import make_pipelines
        from telerag_cli.server.access_log import AccessLog
        from telerag_cli.server.app import make_app
        from telerag_cli.server.metrics import Metrics
        from telerag_cli.server.middleware import with_middleware
        from telerag_cli.server.server import Serving, address_of, bind
        from telerag_cli.server.service import Service

        metrics = Metrics(__version__)
        service = Service(
            make_pipelines(config.pipeline_options),
            metrics,
            __version__,
            max_queue=limits.max_queue,
            request_s=limits.request_timeout,
        )
        log = AccessLog(_write, server.log_format)
        app = with_middleware(make_app(service), _access(server, limits, key), log, metrics)
        listening = bind(server.host, server.port)

        @contextlib.contextmanager
        def load() -> Iterator[tuple[Engine, Scheduler]]:
            with Engine.open(config, reporter=ConsoleReporter()) as engine:
                arena_bytes, index = engine.retriever.tier.arena_bytes, engine.retriever.index
                fitting = scheduled(schedule, engine.concurrency, arena_bytes, index, engine.nprobe)
                yield engine, Scheduler.over(engine, fitting)

        with listening, log.capturing():
            console.say(f"Listening at {address_of(listening)}; loading {config.index}")
            ended = Serving(app, service, load, drain_s=limits.drain, tell=console.say).run(listening)
        console.say("Stopped.")
    if ended is signal.SIGINT:
        raise typer.Exit(EXIT_INTERRUPTED)


def _access(server: ServerOptions, limits: LimitOptions, key: str | None) -> AccessOptions:
    from telerag_cli.server.middleware import LOOPBACK_HOSTS, AccessOptions

    hosts = frozenset() if key else LOOPBACK_HOSTS | {server.host}
    return AccessOptions(
        key, hosts, origins=tuple(server.cors_origin or ()), max_body_bytes=parse_bytes(limits.max_body)
    )


def _write(line: str) -> None:
    """One line to stderr, in one call."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
