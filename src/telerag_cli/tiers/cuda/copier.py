"""The PCIe link: lists from host memory to the arena by asynchronous copies on a stream of their own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from telerag_cli.errors import TeleragError
from telerag_cli.tiers.cuda.gpu import Copy, Event, Stream
from telerag_cli.tiers.rates import Rate
from telerag_cli.tiers.transport import Arrived, Move

IN_FLIGHT_S = 0.002
"""The link is kept busy for so long ahead: enough for the interpreter to come round, little to wait for at a join."""
MIN_IN_FLIGHT, MAX_IN_FLIGHT = 4, 256
"""Bounds of the moves under way that make that."""


@dataclass(frozen=True)
class _CopyJob:
    moves: Sequence[Move]
    arrived: Arrived
    event: Event | TeleragError
    """The error of a copy that never started."""
    started_s: float

    def passed(self) -> bool:
        """Whether it has ended well; a failure is reported when it is waited for, apart from those that went well."""
        try:
            return not isinstance(self.event, TeleragError) and self.event.passed()
        except TeleragError:
            return False

    def wait(self) -> TeleragError | None:
        """Wait for its end; what went wrong."""
        if isinstance(self.event, TeleragError):
            return self.event
        try:
            self.event.wait()
        except TeleragError as error:
            return error
        return None


class Copier:
    """A `Transport`. Whoever asks starts the copies; a thread waits for their events and reports them."""

    def __init__(
        self, stream: Stream, source: torch.Tensor, arena: torch.Tensor, rate: Rate, mean_bytes: float
    ) -> None:
        """Begin with nothing under way; lists of ``mean_bytes`` move from source to arena, both uint8.

        The rate is what was measured of the link; it goes on learning.
        """
        wanted = IN_FLIGHT_S * rate.bytes_per_s / max(mean_bytes, 1)
        self.depth = int(min(MAX_IN_FLIGHT, max(MIN_IN_FLIGHT, wanted)))
        self.note: str | None = None
        self.rate = rate
        self._stream = stream
        self._source = source
        self._arena = arena
        self._jobs: deque[_CopyJob] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="link", daemon=True)
        self._thread.start()

    def submit(self, moves: Sequence[Move], arrived: Arrived) -> None:
        """See `Transport`."""
        runs = coalesce(moves)
        with self._changed:  # under the lock, so that events pass in the order in which they are waited for
            started_s = time.perf_counter()
            events: Sequence[Event | TeleragError]
            try:
                events = self._stream.copy([self._copy(run) for run in runs])
            except TeleragError as error:
                events = [error] * len(runs)
            self._jobs.extend(_CopyJob(run, arrived, event, started_s) for run, event in zip(runs, events, strict=True))
            self._changed.notify()

    def close(self) -> None:
        """See `Transport`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._stream.close()
        del self._source, self._arena

    def _copy(self, run: Sequence[Move]) -> Copy:
        first, nbytes = run[0], sum(move.nbytes for move in run)
        return Copy(
            self._source[first.source : first.source + nbytes], self._arena[first.target : first.target + nbytes]
        )

    def _work(self) -> None:
        idle_since_s = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
            error = self._jobs[0].wait()
            # Only this thread takes away. What has passed meanwhile is reported together, if to the same receiver.
            first = self._jobs.popleft()
            moves = list(first.moves)
            while error is None and self._jobs and self._jobs[0].arrived is first.arrived and self._jobs[0].passed():
                moves += self._jobs.popleft().moves
            ended_s = time.perf_counter()
            if error is None:
                busy_s = ended_s - max(first.started_s, idle_since_s)
                self.rate.observe(sum(move.nbytes for move in moves), busy_s)
            idle_since_s = ended_s
            first.arrived(moves, error)


def coalesce(moves: Sequence[Move]) -> list[list[Move]]:
    """The same moves in the same order, in runs that are contiguous on both sides and so are one copy each."""
    runs: list[list[Move]] = []
    for move in moves:
        last = runs[-1][-1] if runs else None
        if last and (last.source + last.nbytes, last.target + last.nbytes) == (move.source, move.target):
            runs[-1].append(move)
        else:
            runs.append([move])
    return runs
