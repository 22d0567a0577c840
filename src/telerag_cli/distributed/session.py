"""Being part of a Ray cluster for a while: one of this process's own on this machine, or one that is there already.

What Ray changes in this process (SIGTERM's handler, the excepthook, the environment) is put back, and what was started
here is gone afterwards, its folder of logs and sockets too. If this process is killed it ends within seconds: Ray's
daemons watch the process that started them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telerag_cli.errors import ResourceError, TeleragError, UsageError, needs_extra

OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray started here: what passes through it is small, what is large goes through files."""
CONNECT_S = 5
FOLDER = "telerag-ray-"
MAX_TEMPORARY = 16
"""Characters of a folder under which Ray's sockets still have names of the 107 characters that they may have."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports its use to nobody
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers run in the environment they find, not in one made for them
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a FutureWarning, and workers that see no GPU
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what concerns a caller comes as an exception too
    "RAY_worker_niceness": "0",  # what runs in a worker is the work itself
    "RAY_py_gcs_connect_timeout_s": str(CONNECT_S),
    "RAY_NUM_REDIS_GET_RETRIES": "1",
}


@dataclass(frozen=True)
class Cluster:
    """What there is to run on."""

    nodes: int
    cpus: int
    gpus: int
    local: bool
    """It was started here, and ends here."""
    node_cpus: int = 1
    """CPUs of the smallest machine that has any: a worker that needs more might never be placed."""


@contextlib.contextmanager
def joined(address: str | None = None, *, cpus: int | None = None) -> Iterator[Cluster]:
    """Be part of a Ray cluster inside the block.

    The address is that of a cluster that is running (``auto`` for this machine's, or ``host:port``). Without one, a Ray
    with so many CPUs is started on this machine, whatever else runs on it, and ended with the block.

    Raises:
        ResourceError: Ray is not installed, cannot be started, or there is no cluster at ``address``.
        UsageError: ``address`` is not an address.
    """
    if address is not None:
        _check(address)
    with _as_it_was(), contextlib.ExitStack() as ended:
        ray = _ray()
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if address is None:
            options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
            options["_temp_dir"] = ended.enter_context(_folder())
        ended.callback(ray.shutdown)  # also after a start that failed
        try:
            with _starting():
                ray.init(address or "local", **options)
        except Exception as error:  # Ray has a dozen ways to say it
            raise _refused(address, error) from error
        total = ray.cluster_resources()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        smallest = min((int(cpus) for node in nodes if (cpus := node.get("CPU", 0)) >= 1), default=1)
        yield Cluster(len(nodes), int(total.get("CPU", 0)), int(total.get("GPU", 0)), address is None, smallest)


def cause(error: Exception) -> Exception:
    """The error that a worker raised, out of what Ray has wrapped around it.

    What only Ray can say (a worker or a machine is gone, and was so when it was restarted) becomes a `ResourceError`.
    """
    from ray.exceptions import RayError, RayTaskError

    inner: BaseException | None = error
    deepest: BaseException = error
    while inner is not None:
        if isinstance(inner, TeleragError | OSError) and not isinstance(inner, RayTaskError):
            return inner
        deepest = inner
        # Ray raises what only looks like an instance of the error's class, and holds the error as it was raised.
        held = inner.cause if isinstance(inner, RayTaskError) else None
        inner = held if isinstance(held, BaseException) else inner.__cause__
    if isinstance(deepest, RayError):
        return ResourceError(
            f"A worker of Ray was lost: {_first_sentence(deepest)}.", remedy="Run the same command again."
        )
    return deepest if isinstance(deepest, Exception) else error


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the `cause` of what the block raises."""
    try:
        yield
    except Exception as error:
        found = cause(error)
        if found is error:
            raise
        raise found from error


def _check(address: str) -> None:
    """Look whether somebody is there, since Ray itself would try for minutes."""
    if "://" in address:
        raise UsageError(
            f"--ray-address is {address}, and a cluster is joined from one of its own machines.",
            remedy="Run telerag on a machine of the cluster with --ray-address auto, or name its head as host:port.",
        )
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(
            f"--ray-address is '{address}', which is neither auto nor host:port.", remedy="Write it like 10.0.0.1:6379."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise _refused(address, error) from error


def _refused(address: str | None, error: BaseException) -> ResourceError:
    what, remedy = (
        ("Ray could not be started on this machine", "Leave out --ray, or join a cluster with --ray-address.")
        if address is None
        else (
            f"There is no Ray cluster to join at {address}",
            "Start one with ray start --head, or leave out --ray-address.",
        )
    )
    return ResourceError(f"{what}: {_first_sentence(error)}.", remedy=remedy)


def _first_sentence(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(". ")


def _ray() -> Any:
    hook = sys.excepthook
    try:
        with needs_extra("ray", "Working on several processes or machines"):
            return importlib.import_module("ray")
    finally:
        sys.excepthook = hook  # Ray's would send a traceback to a cluster that is gone by then


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """What Ray writes into the environment, and what is written there for it, ends with the block."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in QUIET.items() if name not in before})
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Drop what Ray's native code writes to stderr while it starts, and keep the handler of SIGTERM.

    Ray's own handler would raise an exception, at any line of ours.
    """
    sys.stderr.flush()
    handler, saved = signal.getsignal(signal.SIGTERM), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """For the logs and sockets of a Ray started here."""
    place = tempfile.gettempdir()
    parent = place if len(place) <= MAX_TEMPORARY else "/tmp"  # where sockets may be, Ray's own default
    # A process that was killed left its own.
    for left in Path(parent).glob(f"{FOLDER}*-*"):
        owner = left.name.removeprefix(FOLDER).partition("-")[0]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{FOLDER}{os.getpid()}-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield folder
