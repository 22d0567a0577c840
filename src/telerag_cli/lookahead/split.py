"""Who deals with a query's misses: the link from one end of their row, the processor in place from the other. Integers and times."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


def share_of_link(link_s: Seconds, in_place_s: Seconds, link_busy_s: float = 0.0, in_place_busy_s: float = 0.0) -> int:  # fmt: skip
    """How many lists, from the first, the link should take so that the later of both ends is done soonest.

    Args:
        link_s: seconds the link needs for each list, shape (n,).
        in_place_s: seconds that scoring each in place needs, shape (n,).
        link_busy_s: seconds until the link is done with what it has.
        in_place_busy_s: seconds until scoring in place is done with what it has.

    Returns:
        0 to n; the least of several that are as good.
    """
    link_ends_s = link_busy_s + np.concatenate([[0.0], np.cumsum(link_s)])
    in_place_ends_s = in_place_busy_s + np.concatenate([np.cumsum(in_place_s[::-1])[::-1], [0.0]])
    return int(np.maximum(link_ends_s, in_place_ends_s).argmin())


class Misses:
    """Absent lists in a row. Each end takes what it should by what both are expected to need, until they meet.

    Nothing is committed before it is taken, so a wrong expectation costs at most what an end has taken last. Both ends may be
    called from different threads.
    """

    def __init__(
        self, lists: Sequence[int], link_s: Seconds, in_place_s: Seconds, grain: int, latency_s: float = 0.0
    ) -> None:
        """Put the lists in a row.

        Args:
            lists: the lists; where moving is cheap beside scoring in place comes first.
            link_s: seconds the link's end needs for each, shape (n,).
            in_place_s: seconds to score each in place, shape (n,).
            grain: lists that scoring in place should take at a time, for all its threads to have work.
            latency_s: what the link's end needs beside, once.
        """
        self._cost_s = dict(zip(lists, zip(link_s.tolist(), in_place_s.tolist(), strict=True), strict=True))
        self._row = [0] * len(lists)
        self._link_s, self._in_place_s = np.empty_like(link_s), np.empty_like(in_place_s)
        for place, chosen in enumerate(np.argsort(link_s / np.maximum(in_place_s, 1e-12), kind="stable")):
            self._put(place, lists[chosen])
        self._grain = grain
        self._latency_s = latency_s
        self._front, self._back = 0, len(lists)
        self._failed: list[int] = []
        self._lock = threading.Lock()
        self._link_busy_s = 0.0
        self._in_place_busy_s = 0.0
        self._room = True

    def __len__(self) -> int:
        with self._lock:
            return self._back - self._front + len(self._failed)

    def for_link(self, most: int) -> list[int]:
        """Take at most ``most`` lists from the front, as far as the link should go; say `moved` when they have come."""
        with self._lock:
            count = min(most, self._share_of_link())
            taken = slice(self._front, self._front + count)
            self._front += count
            self._link_busy_s += float(self._link_s[taken].sum())
            return self._row[taken]

    def moved(self, busy: bool) -> None:
        """Some that the link took have ended; whether it still has others."""
        with self._lock:
            self._link_busy_s = self._link_busy_s / 2 if busy else 0.0

    def refused(self, lists: Sequence[int]) -> None:
        """There was no room for these of what the link took last: they are scored in place, unless room comes before."""
        with self._lock:
            self._front -= len(lists)
            for place, list_no in enumerate(lists, self._front):
                self._put(place, list_no)
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

        All of it, if the link's end could not even begin in that time.
        """
        with self._lock:
            self._in_place_busy_s = 0.0
            share = self._back - self._front - self._share_of_link()
            rest_s = float(self._in_place_s[self._front : self._back].sum())
            count = share if rest_s <= self._latency_s else min(share, max(self._grain, -(-share // 2)))
            taken = slice(self._back - count, self._back)
            self._back -= count
            self._in_place_busy_s = float(self._in_place_s[taken].sum())
            failed, self._failed = self._failed, []
            return self._row[taken] + failed

    def _put(self, place: int, list_no: int) -> None:
        self._row[place] = list_no
        self._link_s[place], self._in_place_s[place] = self._cost_s[list_no]

    def _share_of_link(self) -> int:
        if not self._room:
            return 0
        rest = slice(self._front, self._back)
        link_busy_s = self._latency_s + self._link_busy_s
        return share_of_link(self._link_s[rest], self._in_place_s[rest], link_busy_s, self._in_place_busy_s)
