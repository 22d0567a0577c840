"""Attack a server of one's own, and print what others noticed: how long ``/health`` and a neighbour's answer took.

Start ``telerag serve-local INDEX 2> LOG`` and then ``python scripts/attack_server.py http://127.0.0.1:8000 --log LOG``.
Each attack goes on for some seconds in processes of its own. The server must run on this machine, and is not harmed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import socket
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROCESSES = 4
QUESTION = "What does the with statement do?"
STRING = {"type": "string"}
CHAT, SEARCH = "/v1/chat/completions", "/v1/vector_stores/vs_telerag/search"


def with_schema(value: Any, **more: Any) -> tuple[str, bytes]:
    """Return a question whose answer is an object with one value of this schema."""
    schema = {"type": "object", "properties": {"a": value}, "required": ["a"], "additionalProperties": False, **more}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return CHAT, json.dumps({**question(), "response_format": form}).encode()


def question(text: str = QUESTION) -> dict[str, Any]:
    """Return a request for a short answer."""
    return {
        "model": "telerag-naive",
        "max_tokens": 32,
        "temperature": 0,
        "messages": [{"role": "user", "content": text}],
    }


def in_list(values: int) -> tuple[str, bytes]:
    """Return a search for passages whose attribute is one of so many values."""
    value = ",".join(["1"] * values)
    return SEARCH, f'{{"query": "q", "filters": {{"type": "in", "key": "a", "value": [{value}]}}}}'.encode()


def messages(count: int) -> tuple[str, bytes]:
    """Return a conversation of so many messages that are none."""
    return CHAT, f'{{"model": "telerag-naive", "messages": [{",".join(["{}"] * count)}]}}'.encode()


REQUESTS: Mapping[str, tuple[str, bytes]] = {
    "maxLength 100,000": with_schema({**STRING, "maxLength": 100_000}),
    "minItems 1e8": with_schema({"type": "array", "items": STRING, "minItems": 10**8}),
    "pattern a{0,20000}": with_schema({**STRING, "pattern": "^a{0,20000}$"}),
    "30 patterns at once": with_schema({"allOf": [{**STRING, "pattern": f"^.*a.{{{n}}}$"} for n in range(30)]}),
    "multipleOf 99,999,989": with_schema({"type": "integer", "multipleOf": 99_999_989}),
    "3,000 properties": with_schema({"type": "object", "properties": {f"n{n}": STRING for n in range(3_000)}}),
    "enum of 60,000": with_schema({"enum": list(range(60_000))}),
    "ESC in a schema": with_schema({"type": "\x1b[2J\nforged" * 10_000}),
    "in with 450,000 values": in_list(450_000),
    "in with 9,000 values": in_list(9_000),
    "a question of 900 KB": (CHAT, json.dumps(question("words and more " * 60_000)).encode()),
    "300,000 bad messages": messages(300_000),
    "a filter that never matches": (
        SEARCH,
        b'{"query": "q", "filters": {"type": "eq", "key": "no such key", "value": 1}}',
    ),
    "JSON 100,000 deep": (CHAT, b"[" * 100_000),
}


def send(url: str, path: str, body: bytes | None = None, key: str = "") -> int:
    """Return the status of one request; 0 if there was no answer."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url + path, body, headers), timeout=120) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code
    except OSError:
        return 0


def connect(url: str) -> socket.socket:
    """Open a connection."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def silent(url: str, seconds: float, count: int) -> None:
    """Hold connections on which nothing is said."""
    with contextlib.ExitStack() as opened:
        for _ in range(count):
            with contextlib.suppress(OSError):
                opened.enter_context(connect(url))
        time.sleep(seconds)


def slow_headers(url: str, seconds: float) -> None:
    """Send a byte of headers now and then, on a hundred connections."""
    with contextlib.ExitStack() as opened:
        held = [opened.enter_context(connect(url)) for _ in range(100)]
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            for each in held:
                with contextlib.suppress(OSError):
                    each.sendall(b"x")
            time.sleep(0.2)


def chunks(url: str, seconds: float) -> None:
    """Send a million chunks of one byte, again and again."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), connect(url) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n"
            connection.sendall(head.encode() + b"1\r\n \r\n" * 1_000_000)


def nonsense(url: str, seconds: float) -> None:
    """Send what is not HTTP, again and again."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), connect(url) as connection:
            connection.sendall(b"\x1b[2J\nforged line\r\n\r\n")
            connection.recv(1000)


def never_read(url: str, seconds: float) -> None:
    """Ask for streams and read nothing, on five connections."""
    body = json.dumps({**question(), "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with contextlib.ExitStack() as opened:
        for _ in range(5):
            opened.enter_context(connect(url)).sendall(f"{head}\r\n\r\n".encode() + body)
        time.sleep(seconds)


def repeat(url: str, seconds: float, path: str, body: bytes, key: str) -> None:
    """Send a request again and again."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        send(url, path, body, key)


def attacks(key: str) -> Iterator[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """Yield each attack's name, function and further arguments."""
    ordinary = json.dumps(question("What does a list comprehension do?")).encode()
    yield "as many ordinary clients", repeat, (CHAT, ordinary, key)
    yield "500 silent connections", silent, (500 // PROCESSES,)
    yield "2,000 silent connections", silent, (2_000 // PROCESSES,)
    yield "slow headers", slow_headers, ()
    yield "a million one-byte chunks", chunks, ()
    yield "nonsense", nonsense, ()
    yield "never reading", never_read, ()
    for name, (path, body) in REQUESTS.items():
        yield name, repeat, (path, body, key)


class Watch:
    """Times ``/health`` and a neighbour's answers until it is stopped."""

    def __init__(self, url: str, key: str) -> None:
        self.health_s: list[float] = []
        self.answers_s: list[float] = []
        self._stop = threading.Event()
        body = json.dumps(question()).encode()
        self._threads = [
            threading.Thread(target=self._time, args=(self.health_s, 0.02, url, "/health", None, "")),
            threading.Thread(target=self._time, args=(self.answers_s, 0.0, url, CHAT, body, key)),
        ]
        for each in self._threads:
            each.start()

    def _time(self, took_s: list[float], pause_s: float, *what: Any) -> None:
        while not self._stop.wait(pause_s):
            began_s = time.perf_counter()
            status = send(*what)
            took_s.append(time.perf_counter() - began_s if status == 200 else math.inf)

    def stop(self) -> None:
        """Wait for the last answers."""
        self._stop.set()
        for each in self._threads:
            each.join()


def idle(url: str, key: str) -> bool:
    """Whether nothing is under way a little later."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{url}/telerag/state", headers={"authorization": f"Bearer {key}"})
    for _ in range(100):
        with opener.open(request, timeout=10) as response:
            state = json.load(response)
        queue, llm = state["queue"], state["llm"]
        if not any((queue["running"], queue["waiting"], llm["running"], llm["waiting"], state["arena"]["references"])):
            return True
        time.sleep(0.2)
    return False


def main() -> None:
    """Make each attack and print a row for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--key", default="")
    parser.add_argument("--log", type=Path, help="the server's log, whose growth is told")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack")
    parser.add_argument("--only", default="", help="attacks whose names hold this")
    options = parser.parse_args()
    url = options.url.rstrip("/")

    def row(name: str, function: Callable[..., None] | None, more: tuple[Any, ...], usual_s: float) -> float:
        size = options.log.stat().st_size if options.log else 0
        arguments = (url, options.seconds, *more)
        spawn = multiprocessing.get_context("spawn")
        attackers = [spawn.Process(target=function, args=arguments) for _ in range(PROCESSES)] if function else []
        for each in attackers:
            each.start()
        time.sleep(1.0)
        watch = Watch(url, options.key)
        time.sleep(options.seconds)
        watch.stop()
        for each in attackers:
            each.join()
        health_s, answer_s = sorted(watch.health_s), statistics.median(watch.answers_s)
        p99_ms = 1000 * health_s[int(len(health_s) * 0.99)]
        grown = options.log.stat().st_size - size if options.log else 0
        factor = answer_s / usual_s if usual_s else 1.0
        left = "free" if idle(url, options.key) else "BUSY"
        print(
            f"| {name} | {1000 * statistics.median(health_s):.0f} | {p99_ms:.0f} | {1000 * health_s[-1]:.0f} "
            f"| {1000 * answer_s:.0f} | {factor:.2f} | {left} | {grown:,} |",
            flush=True,
        )
        return answer_s

    print("| attack | health p50 ms | p99 | max | neighbour ms | factor | slots | log bytes |\n| " + "--- | " * 8)
    send(url, CHAT, json.dumps(question()).encode(), options.key)  # the neighbour's prompt is known from here on
    usual_s = row("none", None, (), 0.0)
    for name, function, more in attacks(options.key):
        if options.only in name:
            row(name, function, more, usual_s)


if __name__ == "__main__":
    main()
