"""Timing something until it can be believed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from telerag_cli.planning.profile import Measured


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    """For one figure, without the warm-up."""
    repeats: int
    """At least so many, however long they take."""
    runs: int
    """Of the LLM for each of its figures."""
    most_s: float
    """Repeats end when they have taken this long together, and what would take much longer still is left out."""


def times_s(function: Callable[[], object], effort: Effort) -> list[float]:
    """Return the seconds of each repeat, after one that warms up; only of the first if that took long already."""
    clock = time.perf_counter
    began_s = clock()
    function()
    started_s = clock()
    if started_s - began_s > effort.most_s:
        return [started_s - began_s]
    times: list[float] = []
    while len(times) < effort.repeats or clock() - started_s < effort.seconds:
        began_s = clock()
        function()
        ended_s = clock()
        times.append(ended_s - began_s)
        if ended_s - started_s > effort.most_s:
            break
    return times


def seconds(function: Callable[[], object], effort: Effort) -> Measured:
    """Measure what a call takes."""
    return Measured.of(times_s(function, effort))


def rate(nbytes: float, times: list[float]) -> Measured:
    """Return bytes per second, from the times that so many bytes took."""
    return Measured.of([nbytes / max(took_s, 1e-9) for took_s in times])
