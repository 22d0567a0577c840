"""A server as a child process: started, awaited, watched from outside and stopped. For scripts and tests.

What is known of it comes from ``/proc``, so a server is watched the same way whoever wrote it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADDRESS = "127.0.0.1"
KEY_VARIABLE = "TELERAG_API_KEY"
LOOK_S = 0.05
"""Between two looks at a server that is starting or ending."""
LOUD_LINES = 20
"""Of the log, when a server does not start."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever the environment says of proxies."""
_SAID_ADDRESS = re.compile(r"http://(?:127\.0\.0\.1|localhost|0\.0\.0\.0|\[::1?\]):([1-9]\d*)")


@dataclass(frozen=True)
class Served:
    """A server that has been started."""

    process: subprocess.Popen[bytes]
    url: str
    """Without a path: ``http://127.0.0.1:8000``."""
    log: Path
    """What it writes to stdout and stderr."""

    def stop(self, within_s: float) -> int:
        """Ask it to end, and wait; returns its exit code.

        Raises:
            SystemExit: it does not end in time; it is killed.
        """
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise SystemExit(f"the server did not end within {within_s:g} s of SIGTERM\n{_end(self.log)}") from None


@contextlib.contextmanager
def serve_local(index: Path, *arguments: object, log: Path, api_key: str | None = None,
                ready_s: float = 180.0) -> Iterator[Served]:  # fmt: skip
    """Run ``telerag serve-local`` on a free port while the block runs.

    Args:
        index: the folder.
        arguments: further options.
        log: file that its output goes to.
        api_key: what clients must send; None for a server that asks for none.
        ready_s: the longest that it may take to be ready.

    Raises:
        SystemExit: it ended, or is not ready in time.
    """
    command = [sys.executable, "-m", "telerag_cli", "serve-local", str(index), "--port", "0"]
    command += map(str, arguments)
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    if api_key is not None:
        environment[KEY_VARIABLE] = api_key
    with _child(command, log, environment) as process:
        deadline_s = time.monotonic() + ready_s
        while (said := _SAID_ADDRESS.search(log.read_text(errors="replace"))) is None:
            _check_alive(process, log, deadline_s)
            time.sleep(LOOK_S)
        served = Served(process, f"http://{ADDRESS}:{said.group(1)}", log)
        _await(served, "/ready", deadline_s)
        yield served


@contextlib.contextmanager
def llama_server(model: Path, *arguments: object, log: Path, ready_s: float = 120.0) -> Iterator[Served]:
    """Run ``python -m llama_cpp.server`` on a free port while the block runs.

    Args:
        model: a GGUF file.
        arguments: further options.
        log: file that its output goes to.
        ready_s: the longest that it may take to be ready.

    Raises:
        SystemExit: it ended, or is not ready in time.
    """
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model)]
    command += ["--host", ADDRESS, "--port", str(port), *map(str, arguments)]
    with _child(command, log, os.environ) as process:
        served = Served(process, f"http://{ADDRESS}:{port}", log)
        _await(served, "/v1/models", time.monotonic() + ready_s)
        yield served


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server((ADDRESS, 0)) as free:
        port: int = free.getsockname()[1]
        return port


def get_text(url: str, api_key: str | None = None, timeout_s: float = 10.0) -> str:
    """What a GET answers; raises OSError (``urllib.error.HTTPError``) for any status but 200."""
    return _read(urllib.request.Request(url, headers=_headers(api_key)), timeout_s).decode()


def get_json(url: str, api_key: str | None = None, timeout_s: float = 10.0) -> Any:
    """As `get_text`, of JSON."""
    return json.loads(get_text(url, api_key, timeout_s))


def post_json(url: str, body: Any, api_key: str | None = None, timeout_s: float = 300.0) -> Any:
    """What a POST of JSON answers, as JSON; errors as of `get_text`."""
    headers = _headers(api_key) | {"content-type": "application/json"}
    return json.loads(_read(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout_s))


def _headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _read(request: urllib.request.Request, timeout_s: float) -> bytes:
    with _DIRECT.open(request, timeout=timeout_s) as response:
        content: bytes = response.read()
        return content


@dataclass(frozen=True)
class Sample:
    """A process and its children at one moment."""

    at_s: float
    """By `time.monotonic`."""
    resident_bytes: int
    private_bytes: int
    """The part that belongs to no file."""
    threads: int
    files: int


def sample(pid: int) -> Sample:
    """Look at a process and all that it has started.

    Raises:
        ProcessLookupError: it is no longer there.
    """
    resident = private = threads = files = 0
    for each in _tree(pid):
        try:
            _size, total, shared, *_rest = (Path("/proc") / str(each) / "statm").read_text().split()
            status = (Path("/proc") / str(each) / "status").read_text()
            files += len(os.listdir(f"/proc/{each}/fd"))  # noqa: PTH208 -- names alone, every second
        except (FileNotFoundError, ProcessLookupError, PermissionError) as error:
            if each == pid:
                raise ProcessLookupError(f"process {pid} is not there") from error
            continue  # a child that has just ended
        resident += int(total) * PAGE_BYTES
        private += (int(total) - int(shared)) * PAGE_BYTES
        threads += int(status.split("Threads:", 1)[1].split(None, 1)[0])
    return Sample(time.monotonic(), resident, private, threads, files)


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


@contextlib.contextmanager
def _child(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(served: Served, path: str, deadline_s: float) -> None:
    """Wait until the path answers 200."""
    while True:
        _check_alive(served.process, served.log, deadline_s)
        try:
            _DIRECT.open(served.url + path, timeout=5).close()
            return
        except OSError:  # nobody listens yet, or it answers 503
            time.sleep(LOOK_S)


def _check_alive(process: subprocess.Popen[bytes], log: Path, deadline_s: float) -> None:
    if process.poll() is not None:
        raise SystemExit(f"the server ended with exit code {process.returncode}\n{_end(log)}")
    if time.monotonic() > deadline_s:
        raise SystemExit(f"the server is not ready in time\n{_end(log)}")


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOUD_LINES:])
