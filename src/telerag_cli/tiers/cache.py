"""What to give up when the arena is full: policies over the same accounting, so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from telerag_cli.arrays import DoubleArray, IntArray
from telerag_cli.config import CacheKind


class CachePolicy(Protocol):
    """Keeps a heat per list; the coldest leave first."""

    heat: DoubleArray
    """What each list is worth keeping, shape (nlist,), never negative."""
    hot: float
    """Heat from which a list is kept through a round, within the cache's share of the arena."""
    keeps: bool
    """Whether lists stay from one round to the next."""

    def admitted(self, lists: IntArray) -> None:
        """These lists have been moved in."""

    def used(self, lists: IntArray) -> None:
        """These lists were probed."""

    def new_round(self) -> None:
        """A query or micro-batch begins."""


class NoCache:
    """Nothing stays between rounds: the baseline that shows what a cache is worth."""

    keeps = False
    hot = np.inf

    def __init__(self, nlist: int) -> None:
        self.heat: DoubleArray = np.zeros(nlist)

    def admitted(self, lists: IntArray) -> None:
        """No list is worth more than another."""

    def used(self, lists: IntArray) -> None:
        """No list is worth more than another."""

    def new_round(self) -> None:
        """Nothing to age."""


class LeastRecentlyUsed:
    """The list probed longest ago leaves first; heat is the age-ordered clock of its last use."""

    keeps = True
    hot = np.inf

    def __init__(self, nlist: int) -> None:
        self.heat: DoubleArray = np.zeros(nlist)
        self._clock = 0

    def admitted(self, lists: IntArray) -> None:
        """Moving in counts as a use."""
        self.heat[lists] = self._clock

    def used(self, lists: IntArray) -> None:
        """Probed now."""
        self.heat[lists] = self._clock

    def new_round(self) -> None:
        """Time passes by rounds."""
        self._clock += 1


class Hotness:
    """TeleRAG's hotness (arXiv 2502.20969): a base on arrival, raised by each hit, halved each round."""

    keeps = True
    base = 0.25
    raised_by = 1.0
    hot = 0.7
    """At a round's start a list probed in the last round only has at most (0.25 + 1) / 2 = 0.625; above it, it was
    probed in more than one of the last rounds."""

    def __init__(self, nlist: int) -> None:
        self.heat: DoubleArray = np.zeros(nlist)

    def admitted(self, lists: IntArray) -> None:
        """Start at the base, or at what is left of an earlier stay."""
        self.heat[lists] = np.maximum(self.heat[lists], self.base)

    def used(self, lists: IntArray) -> None:
        """Raise."""
        self.heat[lists] += self.raised_by

    def new_round(self) -> None:
        """Halve."""
        self.heat *= 0.5


class Frequency:
    """The list probed least often leaves first: heat counts the rounds in which it was probed, each worth less as it ages.

    It differs from `Hotness` in three things. Uses are remembered for some fifty rounds instead of two, and beyond a
    list's stay, so that one that comes again is as hot as its uses were: this is nearly all that it gains. Nothing is
    kept from lookahead, which needs the room more. And arriving is worth nothing: what was moved in vain leaves first.
    Source: the measurement by scripts/cache_study.py.
    """

    keeps = True
    decay = 0.98
    hot = np.inf

    def __init__(self, nlist: int) -> None:
        self.heat: DoubleArray = np.zeros(nlist)

    def admitted(self, lists: IntArray) -> None:
        """Only a probe shows that a list was worth moving."""

    def used(self, lists: IntArray) -> None:
        """One more."""
        self.heat[lists] += 1.0

    def new_round(self) -> None:
        """All that was counted is worth less."""
        self.heat *= self.decay


def make_policy(kind: CacheKind, nlist: int) -> CachePolicy:
    """A fresh policy for an index of ``nlist`` lists."""
    policies: dict[CacheKind, Callable[[int], CachePolicy]] = {
        CacheKind.NONE: NoCache,
        CacheKind.LRU: LeastRecentlyUsed,
        CacheKind.HOTNESS: Hotness,
        CacheKind.FREQUENCY: Frequency,
    }
    return policies[kind](nlist)
