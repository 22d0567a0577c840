"""Accounting of one fixed block of fast memory: who holds which bytes. Integers only; it touches no memory."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort

import numpy as np

from telerag_cli.arrays import DoubleArray
from telerag_cli.config import PAGE_BYTES

SPARE_RUNS = 4
"""Runs looked at for each that is wanted: some lie beside cheaper ones."""


class Arena:
    """A block of ``nbytes``, cut into slots of whatever length their owners need.

    Lists differ in length and must lie contiguously for Faiss and for one copy each, so slots are extents, not pages.
    Room is made by giving up the cheapest *contiguous* run of slots, which is what keeps fragmentation from mattering.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes // PAGE_BYTES * PAGE_BYTES
        self.used_bytes = 0
        # (length, offset) of what is free, shortest first.
        self._gaps = [(self.nbytes, 0)] if self.nbytes else []
        # In address order. Arrays, because NumPy sees them without a copy.
        self._starts = array("q")
        self._ends = array("q")
        self._owners = array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def allocate(self, nbytes: int, owner: int) -> int | None:
        """Take the smallest gap that fits ``nbytes`` (a multiple of 4 KiB); its offset, or None if none does."""
        assert nbytes > 0
        assert nbytes % PAGE_BYTES == 0
        fitting = bisect_left(self._gaps, (nbytes, 0))
        if fitting == len(self._gaps):
            return None
        length, offset = self._gaps.pop(fitting)
        self._add_gap(offset + nbytes, offset + length)
        place = bisect_left(self._starts, offset)
        self._starts.insert(place, offset)
        self._ends.insert(place, offset + nbytes)
        self._owners.insert(place, owner)
        self.used_bytes += nbytes
        return offset

    def release(self, offset: int) -> None:
        """Give back the slot that begins at ``offset``."""
        place = bisect_left(self._starts, offset)
        assert place < len(self._starts)
        assert self._starts[place] == offset
        end = self._ends[place]
        self.used_bytes -= end - offset
        del self._starts[place], self._ends[place], self._owners[place]
        before = self._ends[place - 1] if place else 0
        after = self._starts[place] if place < len(self._starts) else self.nbytes
        self._drop_gap(before, offset)
        self._drop_gap(end, after)
        self._add_gap(before, after)

    def cheapest_runs(self, nbytes: int, cost: DoubleArray, count: int) -> list[list[int]]:
        """Owners of contiguous runs of slots, the removal of each of which leaves a gap of at least ``nbytes``.

        The gap is larger than any there is. The cost of giving up a slot is indexed by owner, and infinite for slots
        that must stay. There may be fewer runs than ``count`` and than there are, but there is one if there is any.

        Returns:
            The owners in address order, of the cheapest run first; runs share neither slots nor the gaps beside them.
        """
        assert not self._gaps or self._gaps[-1][0] < nbytes
        if not self._starts:
            return []
        starts, ends, owners = np.array(self._starts), np.array(self._ends), np.array(self._owners)
        left = np.append(0, ends[:-1])  # where the gap would begin: the gap before a slot counts too
        right = np.append(starts[1:], self.nbytes)
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
        runs: list[list[int]] = []
        taken = bytearray(len(owners) + 2)  # with an edge on either side
        for start in _least(total, SPARE_RUNS * count if count > 1 else 1):
            end = int(last[start])
            if total[start] == np.inf or len(runs) == count:
                break
            # A neighbour counts if there is a gap between, which both would use.
            first_in, last_in = start - (left[start] < starts[start]), end + (ends[end] < right[end])
            if not any(taken[first_in + 1 : last_in + 2]):
                taken[start + 1 : end + 2] = bytes([1]) * (end + 1 - start)
                runs.append(owners[start : end + 1].tolist())
        return runs

    def slots(self) -> list[tuple[int, int, int]]:
        """(offset, bytes, owner) of every slot, in address order."""
        return [
            (start, end - start, owner)
            for start, end, owner in zip(self._starts, self._ends, self._owners, strict=True)
        ]

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
        ends, starts = [0, *self._ends], [*self._starts, self.nbytes]
        gaps = sorted((start - end, end) for end, start in zip(ends, starts, strict=True) if start > end)
        assert gaps == self._gaps, "what is free is not between the slots"
        assert self.used_bytes == sum(length for _start, length, _owner in self.slots())
        assert len(set(self._owners)) == len(self._owners), "an owner holds two slots"

    def _add_gap(self, begin: int, end: int) -> None:
        if end > begin:
            insort(self._gaps, (end - begin, begin))

    def _drop_gap(self, begin: int, end: int) -> None:
        if end > begin:
            del self._gaps[bisect_left(self._gaps, (end - begin, begin))]


def _least(values: DoubleArray, count: int) -> list[int]:
    """Places of the least values, in ascending order of the values."""
    if count == 1:
        return [int(values.argmin())]
    some = np.argpartition(values, count)[:count] if count < len(values) else np.arange(len(values))
    places: list[int] = some[np.argsort(values[some], kind="stable")].tolist()
    return places
