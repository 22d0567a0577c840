"""What to give up when the arena is full: policies over the same accounting, so that they can be compared."""

from __future__ import annotations

import numpy as np

from telerag_cli.arrays import DoubleArray, IntArray
from telerag_cli.config import CacheKind


class CachePolicy:
    """Keeps a heat per list; the coldest leave first. This one, ``none``, keeps nothing between rounds: a baseline."""

    keeps = False
    """Whether lists stay from one round to the next."""
    hot = np.inf
    """Heat from which a list is kept through a round, within the cache's share of the arena."""

    def __init__(self, nlist: int) -> None:
        self.heat: DoubleArray = np.zeros(nlist)
        """What each list is worth keeping, shape (nlist,), never negative."""

    def admitted(self, lists: IntArray) -> None:
        """These lists have been moved in."""

    def used(self, lists: IntArray) -> None:
        """These lists were probed."""

    def new_round(self) -> None:
        """A query or micro-batch begins."""


class LeastRecentlyUsed(CachePolicy):
    """The list probed longest ago leaves first; heat is the round of its last use, and moving in counts as a use."""

    keeps = True

    def __init__(self, nlist: int) -> None:
        super().__init__(nlist)
        self._clock = 0

    def admitted(self, lists: IntArray) -> None:
        """See `CachePolicy`."""
        self.heat[lists] = self._clock

    used = admitted

    def new_round(self) -> None:
        """See `CachePolicy`."""
        self._clock += 1


class Hotness(CachePolicy):
    """TeleRAG's hotness (arXiv 2502.20969): a base on arrival, raised by each hit, halved each round."""

    keeps = True
    base = 0.25
    raised_by = 1.0
    hot = 0.7
    """At a round's start a list probed in the last round only has at most (0.25 + 1) / 2 = 0.625; above it, it was
    probed in more than one of the last rounds."""

    def admitted(self, lists: IntArray) -> None:
        """See `CachePolicy`: at least the base, or what is left from before."""
        self.heat[lists] = np.maximum(self.heat[lists], self.base)

    def used(self, lists: IntArray) -> None:
        """See `CachePolicy`."""
        self.heat[lists] += self.raised_by

    def new_round(self) -> None:
        """See `CachePolicy`."""
        self.heat *= 0.5


class Frequency(CachePolicy):
    """The list probed least often leaves first: heat counts the rounds in which it was probed, fading as they age.

    It differs from `Hotness` in three things. Uses are remembered for some fifty rounds instead of two, and beyond a
    list's stay, so that one that comes again is as hot as its uses were: this is nearly all that it gains. Nothing is
    kept from lookahead, which needs the room more. And arriving is worth nothing: what was moved in vain leaves first.
    Source: the measurement by scripts/cache_study.py.
    """

    keeps = True
    decay = 0.98

    def used(self, lists: IntArray) -> None:
        """See `CachePolicy`."""
        self.heat[lists] += 1.0

    def new_round(self) -> None:
        """See `CachePolicy`."""
        self.heat *= self.decay


_POLICIES: dict[CacheKind, type[CachePolicy]] = {
    CacheKind.NONE: CachePolicy,
    CacheKind.LRU: LeastRecentlyUsed,
    CacheKind.HOTNESS: Hotness,
    CacheKind.FREQUENCY: Frequency,
}


def make_policy(kind: CacheKind, nlist: int) -> CachePolicy:
    """A fresh policy for an index of ``nlist`` lists."""
    return _POLICIES[kind](nlist)
