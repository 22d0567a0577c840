"""Simulated devices: what several want at once is shared. Seconds are simulated ones."""

from __future__ import annotations

import heapq
import itertools
import math

import simpy


class Device:
    """Serves all who want something at the same time, each with an equal part of its rate, and at most ``most``."""

    def __init__(self, env: simpy.Environment, rate: float, most: float = math.inf) -> None:
        """Begin idle.

        Args:
            env: the clock.
            rate: units a second for all together.
            most: units a second for one.
        """
        assert rate > 0
        assert most > 0
        self._env = env
        self._rate = rate
        self._most = most
        self._served = 0.0
        """Units that one who was there from the beginning would have."""
        self._since_s = 0.0
        self._waiting: list[tuple[float, int, simpy.Event]] = []
        self._numbers = itertools.count()
        self._turn = 0
        self.units = 0.0
        """Served to all so far."""
        self.busy_s = 0.0
        """With anybody to serve."""
        self.short_s = 0.0
        """Of that, with so many that one got less than it could use."""

    def serve(self, amount: float) -> simpy.Event:
        """Happens when so many units have been served to whoever asks now."""
        assert amount >= 0
        self._go_on()
        event = self._env.event()
        if amount == 0:
            return event.succeed()
        heapq.heappush(self._waiting, (self._served + amount, next(self._numbers), event))
        self._wait()
        return event

    def used_share(self, over_s: float) -> float:
        """Of what could be served in so much time."""
        return self.units / (self._rate * over_s) if over_s else 0.0

    def _speed(self) -> float:
        return min(self._rate / len(self._waiting), self._most)

    def _go_on(self) -> None:
        """Account for the time since the last change."""
        passed_s = self._env.now - self._since_s
        self._since_s = self._env.now
        if self._waiting and passed_s:
            served = self._speed() * passed_s
            self._served += served
            self.units += served * len(self._waiting)
            self.busy_s += passed_s
            self.short_s += passed_s if self._speed() < self._most else 0.0

    def _wait(self) -> None:
        """Come back when the next one is done, unless somebody comes before."""
        self._turn += 1
        if not self._waiting:
            return
        left_s = max(self._waiting[0][0] - self._served, 0.0) / self._speed()
        turn = self._turn
        timeout = self._env.timeout(left_s)
        assert timeout.callbacks is not None
        timeout.callbacks.append(lambda _event: self._done(turn))

    def _done(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._go_on()
        self._served = max(self._served, self._waiting[0][0])  # rounding must not leave a rest that takes no time
        while self._waiting and self._waiting[0][0] <= self._served * (1 + 1e-12):
            heapq.heappop(self._waiting)[2].succeed()
        self._wait()


class Busy:
    """How long something was in use by anybody."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._users = 0
        self._since_s = 0.0
        self._total_s = 0.0

    @property
    def now(self) -> bool:
        """Whether it is in use."""
        return self._users > 0

    @property
    def total_s(self) -> float:
        """Seconds in use so far."""
        return self._total_s + (self._env.now - self._since_s if self._users else 0.0)

    def enter(self) -> None:
        """One more uses it."""
        if not self._users:
            self._since_s = self._env.now
        self._users += 1

    def leave(self) -> None:
        """One fewer uses it."""
        assert self._users > 0
        self._users -= 1
        if not self._users:
            self._total_s += self._env.now - self._since_s
