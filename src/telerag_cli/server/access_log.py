"""The server's log: a line for each request, each failure, and each warning of a library, as text or as JSON.

Nothing that a client wrote can end a line or change how a terminal shows it. Questions, answers and query strings are
not in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

QUIET_PATHS = frozenset({"/health", "/ready", "/metrics", "/telerag/state", "/page/{name}"})
"""Paths that machines ask for every few seconds, or the page many times; a line each would bury the rest."""
MAX_VALUE = 400
"""Characters of a value in a request's line; a path can be as long as a client likes."""
MAX_MESSAGE, MAX_TRACE = 2_000, 20_000
"""Characters of a message, from its beginning, and of a traceback, from its end."""
BURST, WINDOW_S = 100, 10.0
"""So many entries of a kind are written in so many seconds; of further ones their number. Requests that were answered
are all written."""
CLIENT_CLOSED = 499
"""The status that is logged where the client left before it had one; it never goes over the wire."""
_BEFORE_TRACE = "    | "
"""Begins a traceback's lines in text, so that an error's message cannot pass for a line of the log."""


class LogFormat(StrEnum):
    """How a line looks."""

    TEXT = "text"
    JSON = "json"


class RequestOutcome(StrEnum):
    """How a request ended."""

    DONE = "done"
    REFUSED = "refused"
    """It was not begun: it is wrong, not allowed, or there is no room for it now."""
    CANCELLED = "cancelled"
    """The client left."""
    TIMEOUT = "timeout"
    FAILED = "failed"


@dataclass
class _Window:
    """Entries of one kind in the latest few seconds."""

    began_s: float = -math.inf
    entries: int = 0


class AccessLog(logging.Handler):
    """Writes entries, from any thread; as a handler of `logging` it takes what libraries log, from warnings up."""

    def __init__(
        self, write: Callable[[str], None], form: LogFormat = LogFormat.TEXT, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Begin; ``write`` takes one entry without its last line end, as a whole, and from any thread."""
        super().__init__(logging.WARNING)
        self._write, self._form, self._clock = write, form, clock
        self._kinds: dict[str, _Window] = defaultdict(_Window)
        self._counting = threading.Lock()

    def request(self, own: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Log a request that has ended.

        One to `QUIET_PATHS` is logged only if it failed; that the server is not ready yet is not a failure.

        Args:
            own: ``request_id``; ``client``, its address without the port; ``method``; ``path``, the route's template
                or, for what no route answered, the path, never with a query string; ``status``; ``duration_s``.
            details: ``outcome``, and what its route notes: counts and times, nothing that was asked or answered.
        """
        status = own["status"]
        if own["path"] in QUIET_PATHS and (status < 400 or status == 503):
            return
        if status >= 400 and not self._has_room(f"requests with status {status}"):
            return
        # Nothing that a route notes replaces what is known of the request itself.
        entry = {name: _rounded(value) for name, value in {**own, **details, **own}.items()}
        levels: dict[str, str] = {RequestOutcome.FAILED: "error", RequestOutcome.TIMEOUT: "warning"}
        level = "warning" if status == 503 else levels.get(entry["outcome"], "info")
        shown = {name: _shown(value) for name, value in entry.items() if value is not None}
        head = " ".join(shown.pop(name) for name in ("request_id", "client", "method", "path", "status"))
        del shown["duration_s"]
        tail = " ".join(f"{escaped(name)}={value}" for name, value in shown.items())
        self._out(level, "request", entry, f"{head} {entry['duration_s']:.3f}s {tail}")

    def failure(self, request_id: str, error: BaseException) -> None:
        """Log an error that nobody expected, with its traceback."""
        if not self._has_room(f"failures by {type(error).__name__}"):
            return
        message = f"{type(error).__name__}: {error}"
        self._message("error", "failure", {"request_id": request_id, "message": message}, error)

    def emit(self, record: logging.LogRecord) -> None:
        """Log what a library logs."""
        try:
            if not self._has_room(f"{record.levelname.lower()}s of {record.name}"):
                return
            entry = {"logger": record.name, "message": record.getMessage().rstrip()}
            error = record.exc_info[1] if record.exc_info else None
            self._message(record.levelname.lower(), "log", entry, error)
        except Exception:
            self.handleError(record)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """While the block runs, take what libraries log and warn of, uvicorn and Python itself included."""
        root = logging.getLogger()
        root.addHandler(self)
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.removeHandler(self)

    def _message(self, level: str, event: str, entry: dict[str, Any], error: BaseException | None) -> None:
        entry["message"] = _shortened(entry["message"], MAX_MESSAGE)
        trace = "".join(traceback.format_exception(error)).rstrip()[-MAX_TRACE:] if error else ""
        lines = [": ".join(map(escaped, entry.values()))]
        lines += [_BEFORE_TRACE + escaped(line) for line in trace.splitlines()]
        self._out(level, event, entry | ({"traceback": trace} if trace else {}), "\n".join(lines))

    def _has_room(self, kind: str) -> bool:
        """Whether one more entry of a kind is to be written; says first how many were left out of the time before."""
        with self._counting:
            window, now_s = self._kinds[kind], self._clock()
            left_out = 0
            if not window.began_s <= now_s < window.began_s + WINDOW_S:
                left_out = max(window.entries - BURST, 0)
                window.began_s, window.entries = now_s, 0
            window.entries += 1
            has_room = window.entries <= BURST
        if left_out:
            self._message("warning", "left_out", {"message": f"Left out: {left_out:,} more {kind}."}, None)
        return has_room

    def _out(self, level: str, event: str, entry: Mapping[str, Any], text: str) -> None:
        now = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._form is LogFormat.JSON:
            head = {"time": now, "level": level, "event": event}
            # Nothing that a route notes replaces these. In ASCII, so that all that could move a terminal is escaped.
            line = json.dumps({**head, **entry, **head}, default=str)
        else:
            line = f"{now} {level.upper():7} {text}"
        # If nobody reads the log any more, requests go on.
        with contextlib.suppress(OSError):
            self._write(line)


def escaped(text: str) -> str:
    r"""Return a text on one line, harmless to a terminal and reversible: ``\n`` for a line end, ``\\`` for ``\``."""
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in text
    )


def _rounded(value: Any) -> Any:
    """A value as a line holds it: numbers to a microsecond, texts not too long."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if value is None or isinstance(value, int):  # bool too
        return value
    return _shortened(str(value), MAX_VALUE)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _shown(value: Any) -> str:
    """A value in a line of text: in quotes if it has spaces, quotes or ``=`` in it."""
    text = escaped(str(value).lower() if isinstance(value, bool) else str(value))
    if text and not set(text) & {" ", '"', "="}:
        return text
    return '"' + text.replace('"', '\\"') + '"'
