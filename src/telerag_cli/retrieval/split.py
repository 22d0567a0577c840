"""Who deals with misses: the link from one end of their row, the processor from the other. Integers and times."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from enum import Enum

import numpy as np

from telerag_cli.arrays import DoubleArray


class Ends(Enum):
    """Which ends deal with a row of misses."""

    BOTH = "both"
    LINK = "link"
    IN_PLACE = "in place"


class ContentionEstimate:
    """How much longer both ends take than the rate of each alone promises: they share memory, and perhaps cores.

    It is learned from the joins in which both worked. While they do not, what was learned fades, so that they are tried
    again.
    """

    LEARNED = 0.5
    KEPT = 0.98
    """Share of what exceeds 1 that each join with one end leaves: some fifty of those between two attempts."""

    def __init__(self, slowdown: float = 1.0) -> None:
        """Begin with what was learned before."""
        self.slowdown = slowdown
        """Measured seconds to expected ones."""
        self._lock = threading.Lock()

    def observe(self, expected_s: float, took_s: float) -> None:
        """Both have worked."""
        with self._lock:
            self.slowdown += self.LEARNED * (took_s / max(expected_s, 1e-9) - self.slowdown)

    def fade(self) -> None:
        """One has worked alone."""
        with self._lock:
            self.slowdown = 1.0 + self.KEPT * (self.slowdown - 1.0)


def ends_by_share_s(
    link_s: DoubleArray, in_place_s: DoubleArray, link_busy_s: float = 0.0, in_place_busy_s: float = 0.0
) -> DoubleArray:
    """When the later of both ends is done if the link takes the first 0, 1, ... n lists, shape (n + 1,).

    Both need seconds for each list, shape (n,), and are busy for some seconds with what they have.
    """
    link_ends_s = link_busy_s + np.concatenate([[0.0], np.cumsum(link_s)])
    in_place_ends_s = in_place_busy_s + np.concatenate([np.cumsum(in_place_s[::-1])[::-1], [0.0]])
    ends_s: DoubleArray = np.maximum(link_ends_s, in_place_ends_s)
    return ends_s


class Misses:
    """Absent lists in a row. Each end takes what it should by what both are expected to need, until they meet.

    Between two ends nothing is committed before it is taken, so a wrong expectation costs at most what an end has taken
    last. Both may be called from different threads.
    """

    def __init__(
        self,
        lists: Sequence[int],
        link_s: DoubleArray,
        in_place_s: DoubleArray,
        grain: int,
        latency_s: float = 0.0,
        slowdown: float = 1.0,
    ) -> None:
        """Put the lists in a row.

        ``link_s`` and ``in_place_s`` are the seconds that each end needs for each list, shape (n,), and ``latency_s``
        what the link's needs beside, once. Scoring in place should take ``grain`` lists at a time, for all its threads
        to have work. Side by side both take ``slowdown`` times as long; if one of them alone is done sooner, it gets
        everything.
        """
        order = np.argsort(link_s / np.maximum(in_place_s, 1e-12), kind="stable")
        self._row: list[int] = np.asarray(lists, np.int64)[order].tolist()
        self._link_s, self._in_place_s = link_s[order], in_place_s[order]
        self._grain = grain
        self._latency_s = latency_s
        self.expected_s = float(ends_by_share_s(self._link_s, self._in_place_s, latency_s).min())
        """Seconds of both ends together, if neither slowed the other."""
        alone_s = {Ends.IN_PLACE: float(in_place_s.sum()), Ends.LINK: latency_s + float(link_s.sum())}
        better = min(alone_s, key=alone_s.__getitem__)
        self.ends = better if alone_s[better] <= slowdown * self.expected_s else Ends.BOTH
        """Who takes from the row. What cannot be moved is scored in place all the same."""
        self._front, self._back = 0, len(lists)
        self._failed: list[int] = []
        self._lock = threading.Lock()
        self._link_busy_s = self._in_place_busy_s = 0.0
        self._room = True

    def __len__(self) -> int:
        with self._lock:
            return self._back - self._front + len(self._failed)

    def for_link(self, most: int) -> list[int]:
        """Take at most ``most`` lists from the front, as far as the link should go; `moved` tells when they came."""
        with self._lock:
            taken = slice(self._front, self._front + min(most, self._share_of_link()))
            self._front = taken.stop
            self._link_busy_s += float(self._link_s[taken].sum())
            return self._row[taken]

    def moved(self, busy: bool) -> None:
        """Some that the link took have ended; whether it still has others."""
        with self._lock:
            self._link_busy_s = self._link_busy_s / 2 if busy else 0.0

    def refused(self, lists: Sequence[int]) -> None:
        """There was no room for these of what the link took last: scored in place, unless room comes before."""
        with self._lock:
            for list_no in reversed(lists):
                # Back to the front; what did find room changes places with it, and so stays out of the row.
                self._front -= 1
                place = self._row.index(list_no, 0, self._front + 1)
                for row in (self._row, self._link_s, self._in_place_s):
                    row[place], row[self._front] = row[self._front], row[place]
            self._room = False

    def room(self) -> None:
        """There may be room again."""
        with self._lock:
            self._room = True

    def failed(self, lists: Sequence[int]) -> None:
        """These could not be moved; they are scored in place."""
        with self._lock:
            self._failed.extend(lists)

    def in_place(self) -> list[int]:
        """Take half of what scoring in place should do, from the back; when that is scored, ask again.

        All of it, if the link gets nothing, or could not even begin in that time.
        """
        with self._lock:
            self._in_place_busy_s = 0.0
            share = self._back - self._front - self._share_of_link()
            rest_s = float(self._in_place_s[self._front : self._back].sum())
            at_once = self.ends is Ends.IN_PLACE or rest_s <= self._latency_s
            taken = slice(self._back - (share if at_once else min(share, max(self._grain, -(-share // 2)))), self._back)
            self._back = taken.start
            self._in_place_busy_s = float(self._in_place_s[taken].sum())
            failed, self._failed = self._failed, []
            return self._row[taken] + failed

    def _share_of_link(self) -> int:
        """How many lists of the rest, from the first, the link should take so that both ends are done soonest."""
        if not self._room or self.ends is Ends.IN_PLACE:
            return 0
        if self.ends is Ends.LINK:
            return self._back - self._front
        rest = slice(self._front, self._back)
        link_busy_s = self._latency_s + self._link_busy_s
        return int(
            ends_by_share_s(self._link_s[rest], self._in_place_s[rest], link_busy_s, self._in_place_busy_s).argmin()
        )
