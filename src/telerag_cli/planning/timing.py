"""Timing something until it can be believed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from telerag_cli.planning.profile import Measured


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    """For one figure, warm-up aside."""
    repeats: int
    """At least so many, whatever they take."""
    runs: int
    """Of the LLM for each of its figures."""
    most_s: float
    """Repeats end when they have taken this long together, and what would take much longer still is left out."""


QUICK = Effort(0.06, 3, 1, 1.5)
FULL = Effort(0.2, 5, 2, 3.0)


def times_s(function: Callable[[], object], effort: Effort) -> list[float]:
    """Seconds of each repeat, after one that warms up; only the first if that took long already."""
    began_s = time.perf_counter()
    function()
    warm_s = time.perf_counter() - began_s
    if warm_s > effort.most_s:
        return [warm_s]
    return list(_repeats(function, effort))


def seconds(function: Callable[[], object], effort: Effort) -> Measured:
    """What a call takes."""
    return Measured.of(times_s(function, effort))


def rate(nbytes: float, times: list[float]) -> Measured:
    """Bytes a second, from what so many bytes took each time."""
    return Measured.of([nbytes / max(took_s, 1e-9) for took_s in times])


def _repeats(function: Callable[[], object], effort: Effort) -> Iterator[float]:
    started_s = time.perf_counter()
    count = 0
    while count < effort.repeats or time.perf_counter() - started_s < effort.seconds:
        began_s = time.perf_counter()
        function()
        ended_s = time.perf_counter()
        yield ended_s - began_s
        count += 1
        if ended_s - started_s > effort.most_s:
            return
