"""Accounting of lists: which are in the arena, on their way, or in use. Integers only; not thread-safe by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import BoolArray, DoubleArray, IntArray
from telerag_cli.tiers.arena import Arena
from telerag_cli.tiers.cache import CachePolicy

Protected = Callable[[int], BoolArray]
"""Which lists may not be evicted for the one named, shape (nlist,)."""


ABSENT, MOVING, RESIDENT = range(3)
"""Where a list is, seen from the fast tier; numbers, for an enumeration takes longer to look up than to act upon."""
MAX_AT_ONCE = 16
"""Lists that room is made for at once. Each gets as much as the longest of them needs, so more would evict more."""


@dataclass(frozen=True)
class Occupancy:
    """What an arena holds now. Empty lists, which take no room, are not counted."""

    resident_bytes: int
    moving_bytes: int
    """Room taken for lists on their way."""
    lists_resident: int
    lists_moving: int
    references: int
    """Uses of lists by queries that are being answered; a list may have several."""


class Residency:
    """The slot table: state, slot, references and heat of every list.

    A list goes ABSENT → MOVING (`reserve`) → RESIDENT (`commit`) → ABSENT (evicted), or MOVING → ABSENT (`abort`).
    Lists being moved or referenced are never evicted. Empty lists are resident from the start and take no room.
    """

    def __init__(self, list_bytes: IntArray, arena: Arena, policy: CachePolicy, evicted: Callable[[int], None]) -> None:
        """Begin with an empty arena; ``evicted`` is called with each list that leaves, before another gets its bytes.

        ``list_bytes``, (nlist,), are multiples of 4 KiB.
        """
        self.list_bytes = list_bytes
        self.arena = arena
        self.policy = policy
        self._evicted = evicted
        nlist = len(list_bytes)
        self.state: npt.NDArray[np.int8] = np.where(list_bytes == 0, RESIDENT, ABSENT).astype(np.int8)
        self.offset: IntArray = np.full(nlist, -1, np.int64)
        self.references: npt.NDArray[np.int32] = np.zeros(nlist, np.int32)

    def new_round(self, cache_fraction: float) -> BoolArray:
        """Begin a round: age the heat, and return which lists to keep through it, shape (nlist,).

        They are the hottest resident ones within a share ``cache_fraction`` of the arena.
        """
        self.policy.new_round()
        if not self.policy.keeps:
            self._evict(np.flatnonzero(self._evictable()).tolist())
        kept: BoolArray = np.zeros(len(self.list_bytes), np.bool_)
        hot = np.flatnonzero((self.state == RESIDENT) & (self.list_bytes > 0) & (self.policy.heat >= self.policy.hot))
        hot = hot[np.argsort(-self.policy.heat[hot], kind="stable")]
        kept[hot[np.cumsum(self.list_bytes[hot]) <= cache_fraction * self.arena.nbytes]] = True
        return kept

    def reserve(
        self, lists: Sequence[int], *, protected: Protected | None = None, priority: DoubleArray | None = None
    ) -> list[int]:
        """Take room for lists that are ABSENT, evicting the coldest runs where there is none; they become MOVING.

        If something must leave, ``protected`` says what may not for a list, and ``priority`` is added to the heat.

        Returns:
            The slots' byte offsets, of as many lists from the first as find room.
        """
        offsets: list[int] = []
        for place, (list_no, nbytes) in enumerate(zip(lists, self.list_bytes[lists].tolist(), strict=True)):
            assert self.state[list_no] == ABSENT
            offset = self.arena.allocate(nbytes, list_no)
            if offset is None:
                # Looking through the arena takes longer than a fast link takes to move a list, so once for several.
                rest = lists[place : place + MAX_AT_ONCE]
                if not (self._make_room(rest, protected, priority) or self._make_room(rest[:1], protected, priority)):
                    break
                offset = self.arena.allocate(nbytes, list_no)
                assert offset is not None
            self.state[list_no] = MOVING
            self.offset[list_no] = offset
            offsets.append(offset)
        return offsets

    def commit(self, lists: IntArray) -> None:
        """The bytes of MOVING lists have arrived."""
        assert (self.state[lists] == MOVING).all()
        self.state[lists] = RESIDENT
        self.policy.admitted(lists)

    def abort(self, lists: IntArray) -> None:
        """The bytes of MOVING lists will not arrive; they are no longer referenced."""
        assert (self.state[lists] == MOVING).all()
        self.references[lists] = 0
        for list_no in lists.tolist():
            self._vacate(list_no)

    def hold(self, lists: Sequence[int]) -> None:
        """Reference distinct lists that are not ABSENT, so that they stay."""
        assert (self.state[lists] != ABSENT).all()
        self.references[lists] += 1

    def drop(self, lists: Sequence[int]) -> None:
        """Give references to distinct lists back."""
        assert (self.references[lists] > 0).all()
        self.references[lists] -= 1

    def forget(self) -> None:
        """Evict all that is not moving or referenced, and all that was known of its heat."""
        self._evict(np.flatnonzero(self._evictable()).tolist())
        self.policy.heat[:] = 0

    def occupancy(self) -> Occupancy:
        """What the arena holds; cheap enough to be asked each second."""
        moving = np.flatnonzero(self.state == MOVING)
        moving_bytes = int(self.list_bytes[moving].sum())
        return Occupancy(
            self.arena.used_bytes - moving_bytes,
            moving_bytes,
            len(self.arena) - len(moving),
            len(moving),
            int(self.references.sum()),
        )

    def check_integrity(self) -> None:
        """Assert that the slot table and the arena agree about every list."""
        self.arena.check_integrity()
        slots = {owner: (offset, nbytes) for offset, nbytes, owner in self.arena.slots()}
        for list_no in range(len(self.list_bytes)):
            if self.list_bytes[list_no] == 0:
                assert self.state[list_no] == RESIDENT
                assert list_no not in slots
            elif self.state[list_no] == ABSENT:
                assert list_no not in slots, "an absent list holds a slot"
                assert self.offset[list_no] == -1
                assert self.references[list_no] == 0, "an absent list is referenced"
            else:
                assert slots[list_no] == (self.offset[list_no], self.list_bytes[list_no])
        assert (self.references >= 0).all()
        assert (self.policy.heat >= 0).all()

    def _evictable(self) -> BoolArray:
        mask: BoolArray = (self.state == RESIDENT) & (self.references == 0) & (self.list_bytes > 0)
        return mask

    def _make_room(self, lists: Sequence[int], protected: Protected | None, priority: DoubleArray | None) -> bool:
        """Evict what makes room for the first of the lists, and for others if possible; whether it was possible."""
        evictable = self._evictable()
        if protected is not None:
            evictable &= ~protected(lists[-1])  # who may not leave for the last may not for any before it
        heat = self.policy.heat if priority is None else self.policy.heat + priority
        # One unit in a million per slot: of two equally cold runs the one with fewer lists goes.
        cost = np.where(evictable, heat + 1e-6, np.inf)
        runs = self.arena.cheapest_runs(int(self.list_bytes[lists].max()), cost, len(lists))
        for run in runs:
            self._evict(run)
        return bool(runs)

    def _evict(self, lists: Sequence[int]) -> None:
        for list_no in lists:
            self._evicted(list_no)
            self._vacate(list_no)

    def _vacate(self, list_no: int) -> None:
        assert self.references[list_no] == 0
        self.arena.release(int(self.offset[list_no]))
        self.state[list_no] = ABSENT
        self.offset[list_no] = -1
