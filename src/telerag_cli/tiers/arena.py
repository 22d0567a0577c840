"""Accounting of one fixed block of fast memory: who holds which bytes. Integers only; it touches no memory."""

from __future__ import annotations

from array import array
from bisect import bisect_left

import numpy as np
import numpy.typing as npt

from telerag_cli.config import PAGE_BYTES


class Arena:
    """A block of ``nbytes``, cut into slots of whatever length their owners need.

    Lists differ in length and must lie contiguously for Faiss and for one copy each, so slots are extents, not pages.
    Room is made by giving up the cheapest *contiguous* run of slots, which is what keeps fragmentation from mattering.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes // PAGE_BYTES * PAGE_BYTES
        self.used_bytes = 0
        # In address order. Arrays, because NumPy sees them without a copy: this runs for every list that is moved.
        self._starts = array("q")
        self._ends = array("q")
        self._owners = array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def allocate(self, nbytes: int, owner: int) -> int | None:
        """Take the smallest gap that fits ``nbytes`` (a multiple of 4 KiB); its offset, or None if none does."""
        assert nbytes > 0
        assert nbytes % PAGE_BYTES == 0
        if self.used_bytes + nbytes > self.nbytes:
            return None
        if self.used_bytes == (self._ends[-1] if self._ends else 0):  # the only gap is at the end
            return self._insert(len(self._starts), self.used_bytes, nbytes, owner)
        gaps = np.empty(len(self._starts) + 1, np.int64)
        gaps[:-1] = self._starts
        gaps[-1] = self.nbytes
        gaps[1:] -= self._ends
        fitting = np.where(gaps >= nbytes, gaps, np.iinfo(np.int64).max)
        place = int(fitting.argmin())
        if gaps[place] < nbytes:
            return None
        return self._insert(place, self._ends[place - 1] if place else 0, nbytes, owner)

    def release(self, offset: int) -> None:
        """Give back the slot that begins at ``offset``."""
        place = bisect_left(self._starts, offset)
        assert place < len(self._starts)
        assert self._starts[place] == offset
        self.used_bytes -= self._ends[place] - offset
        del self._starts[place], self._ends[place], self._owners[place]

    def cheapest_run(self, nbytes: int, cost: npt.NDArray[np.float64]) -> list[int] | None:
        """Owners of the cheapest contiguous run of slots whose removal leaves a gap of at least ``nbytes``.

        Args:
            nbytes: the gap needed.
            cost: what giving up each owner's slot costs, indexed by owner; infinite for slots that must stay.

        Returns:
            The owners in address order, or None when no run will do.
        """
        if not self._starts:
            return None
        owners = np.array(self._owners)
        left = np.empty_like(owners)  # where the gap would begin: the gap before a slot counts too
        left[0] = 0
        left[1:] = self._ends[:-1]
        right = np.empty_like(owners)
        right[:-1] = self._starts[1:]
        right[-1] = self.nbytes
        price = cost[owners]
        fixed = np.isinf(price)
        spent = np.concatenate([[0.0], np.cumsum(np.where(fixed, 0.0, price))])
        blocked = np.concatenate([[0], np.cumsum(fixed)])
        first = np.arange(len(owners))
        last = np.searchsorted(right, left + nbytes)
        possible = last < len(owners)
        last = np.minimum(last, len(owners) - 1)
        possible &= blocked[last + 1] == blocked[first]
        total = np.where(possible, spent[last + 1] - spent[first], np.inf)
        start = int(total.argmin())
        if not possible[start]:
            return None
        return [int(owner) for owner in owners[start : last[start] + 1]]

    def slots(self) -> list[tuple[int, int, int]]:
        """(offset, bytes, owner) of every slot, in address order."""
        return [(start, end - start, owner)
                for start, end, owner in zip(self._starts, self._ends, self._owners, strict=True)]  # fmt: skip

    def check_integrity(self) -> None:
        """Assert that slots are aligned, lie inside the block, do not overlap and add up."""
        position = 0
        for start, length, _owner in self.slots():
            assert start >= position, "slots overlap"
            assert length > 0
            assert start % PAGE_BYTES == 0
            assert length % PAGE_BYTES == 0
            position = start + length
        assert position <= self.nbytes, "a slot lies outside the block"
        assert self.used_bytes == sum(length for _start, length, _owner in self.slots())
        assert len(set(self._owners)) == len(self._owners), "an owner holds two slots"

    def _insert(self, place: int, offset: int, nbytes: int, owner: int) -> int:
        self._starts.insert(place, offset)
        self._ends.insert(place, offset + nbytes)
        self._owners.insert(place, owner)
        self.used_bytes += nbytes
        return offset
