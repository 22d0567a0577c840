"""Spans of work on named lanes, written as Chrome trace-event JSON for Perfetto or chrome://tracing."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telerag_cli.files import writing

MAX_HEARD = 50_000
"""Spans that a listener keeps: some tens of megabytes, and more than any picture shows."""


@dataclass(frozen=True)
class Span:
    """One piece of work: ``start_s`` and ``end_s`` are ``time.perf_counter`` seconds."""

    lane: str
    name: str
    start_s: float
    end_s: float
    details: dict[str, Any] = field(default_factory=dict)


class Tracer:
    """Collects spans from any thread. A disabled one keeps nothing, and gives them only to those who listen."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._spans: list[Span] = []
        self._listeners: dict[int, deque[Span]] = {}
        """By identity, as equal ones are not the same."""
        self._lock = threading.Lock()
        self._busy: set[tuple[str, int]] = set()
        self._origin_s = time.perf_counter()

    @property
    def wanted(self) -> bool:
        """Whether a span that is added now goes anywhere; if not, its details need not be found out."""
        return self.enabled or bool(self._listeners)

    def add(self, lane: str, name: str, start_s: float, end_s: float, **details: Any) -> None:
        """Record work that has ended."""
        if not self.wanted:
            return
        span = Span(lane, name, start_s, end_s, details)
        with self._lock:
            if self.enabled:
                self._spans.append(span)
            for heard in self._listeners.values():
                heard.append(span)

    @contextlib.contextmanager
    def listening(self, most: int = MAX_HEARD) -> Iterator[Sequence[Span]]:
        """A list of the spans that are added while the block runs, whether the tracer is enabled or not.

        It is the caller's own: `clear` leaves it alone, and others who listen have theirs. Spans of everybody's work
        are in it, the newest ``most`` of them.
        """
        heard: deque[Span] = deque(maxlen=most)
        with self._lock:
            self._listeners[id(heard)] = heard
        try:
            yield heard
        finally:
            with self._lock:
                del self._listeners[id(heard)]

    @contextlib.contextmanager
    def span(self, lane: str, name: str, **details: Any) -> Iterator[None]:
        """Record the work done inside the block."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, start_s, time.perf_counter(), **details)

    @contextlib.contextmanager
    def lane(self, kind: str) -> Iterator[str]:
        """Yield a lane that nobody else has meanwhile, for work that overlaps with its kind: ``LLM``, ``LLM 2``, ..."""
        with self._lock:
            number = next(n for n in itertools.count(1) if (kind, n) not in self._busy)
            self._busy.add((kind, number))
        try:
            yield kind if number == 1 else f"{kind} {number}"
        finally:
            with self._lock:
                self._busy.remove((kind, number))

    def spans(self) -> list[Span]:
        """What was recorded so far."""
        with self._lock:
            return list(self._spans)

    def clear(self) -> None:
        """Forget what was recorded so far."""
        with self._lock:
            self._spans.clear()

    def save(self, path: Path) -> None:
        """Write the Chrome trace: one process, a lane per thread row, microseconds since the tracer began."""
        spans = sorted(self.spans(), key=lambda span: span.start_s)
        # Viewers show rows by number, and take 0 for the idle process.
        lanes = {lane: number for number, lane in enumerate(dict.fromkeys(span.lane for span in spans), 1)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "telerag"}},
            *(
                {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}}
                for lane, number in lanes.items()
            ),
        ]
        for span in spans:
            took_us = round((span.end_s - span.start_s) * 1e6, 1)
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.lane,
                    "pid": 1,
                    "tid": lanes[span.lane],
                    "ts": round((span.start_s - self._origin_s) * 1e6, 1),
                    "dur": took_us,
                    "args": span.details,
                }
            )
        with writing(path) as temporary:
            temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
