"""The fast tier: a bounded arena that holds lists and scores them. Accounting, a link and a scorer put together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from telerag_cli.arrays import BoolArray, DoubleArray, FloatArray, IntArray, TableArray
from telerag_cli.config import CacheKind
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.index.artifact import Index
from telerag_cli.tiers.arena import Arena
from telerag_cli.tiers.cache import make_policy
from telerag_cli.tiers.rates import InPlace
from telerag_cli.tiers.residency import ABSENT, MOVING, RESIDENT, Occupancy, Protected, Residency
from telerag_cli.tiers.transport import Move, Transport
from telerag_cli.tracing import Tracer
from telerag_cli.units import format_bytes

ListsArrived = Callable[[Sequence[int], TeleragError | None], None]
"""Called with the numbers of lists that are in the arena now, or with the error that kept them out; from any thread."""


@dataclass(frozen=True)
class PinResult:
    """What became of lists that a query needs; all but ``absent`` are referenced until released."""

    hits: list[int]
    """In the arena: score them now."""
    coming: list[int]
    """Already under way when they were asked for."""
    started: list[int]
    """Not in the arena; a move was started."""
    absent: list[int]
    """Not in the arena: there is no room now (ask again after a release), or no move was wanted."""


class Scorer(Protocol):
    """Scores lists that lie in an arena."""

    table: TableArray
    """Size, capacity and byte offset of each list in the arena, shape (nlist, 3); zeros for those not there."""

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """See `FastTier.score`."""

    def close(self) -> None:
        """Let go of the arena's memory."""


def size_arena(index: Index, nbytes: int, option: str) -> Arena:
    """The accounting of an arena of so many bytes, or of what the whole index needs if that is less.

    Raises:
        UsageError: it is smaller than the largest list.
    """
    largest = int(index.list_bytes.max(initial=0))
    arena = Arena(min(nbytes, max(int(index.list_bytes.sum()), 1)))
    if arena.nbytes < largest:
        raise UsageError(
            f"Fast memory of {format_bytes(nbytes)} is smaller than the largest list, {format_bytes(largest)}.",
            remedy=f"Give {option} at least {largest}, or build the index with more lists.",
        )
    return arena


class FastTier:
    """The arena over one link. All methods may be called from any thread.

    One lock guards the accounting; callbacks are made outside it.
    """

    def __init__(
        self,
        index: Index,
        arena: Arena,
        transport: Transport,
        scorer: Scorer,
        *,
        cache: CacheKind = CacheKind.FREQUENCY,
        in_place: InPlace | None = None,
        notes: Sequence[str] = (),
        closing: Callable[[], None] = lambda: None,
        tracer: Tracer | None = None,
    ) -> None:
        """Begin with an empty arena, which is the accounting of the memory that transport and scorer share.

        ``in_place`` is None where lists must be moved to be scored. ``notes`` are what a user should know, beside the
        transport's own. ``closing`` is called last by `close`.
        """
        self.list_bytes = index.list_bytes
        self.nlist = index.manifest.nlist
        self.arena_bytes = arena.nbytes
        self.depth = transport.depth
        self.notes = [*notes, *([transport.note] if transport.note else [])]
        self.in_place = in_place
        self._source = index.offsets
        self._shape = index.table
        self._tracer = tracer or Tracer(enabled=False)
        self._scorer = scorer
        self._transport = transport
        self._residency = Residency(self.list_bytes, arena, make_policy(cache, self.nlist), self._evicted)
        self._waiting: dict[int, list[ListsArrived]] = {}
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._closing = False
        self._close_rest = closing

    def new_round(self, cache_fraction: float) -> BoolArray:
        """Begin a round; returns the mask of lists to keep through it (see `Residency.new_round`)."""
        with self._lock:
            return self._residency.new_round(cache_fraction)

    def absent(self) -> BoolArray:
        """Which lists are neither in the arena nor on their way, shape (nlist,)."""
        with self._lock:
            mask: BoolArray = self._residency.state == ABSENT
            return mask

    def occupancy(self) -> Occupancy:
        """What the arena holds now, all of it at one moment."""
        with self._lock:
            return self._residency.occupancy()

    def prefetch(
        self, lists: Sequence[int], protected: Protected, priority: DoubleArray, arrived: ListsArrived
    ) -> tuple[list[int], bool]:
        """Start moving lists that nobody waits for, in this order, until there is no room for one.

        Those in the arena or on their way already are passed over; ``arrived`` is called once for each of the others.
        To choose what to evict, ``protected`` is asked and ``priority``, (nlist,), is added to each list's heat.

        Returns:
            The lists started, and whether there was no room for another.
        """
        with self._lock:
            absent = [list_no for list_no in lists if self._residency.state[list_no] == ABSENT]
            moves = [] if self._closing else self._reserve(absent, arrived, protected, priority)
        self._submit(moves)
        return [move.list_no for move in moves], len(moves) < len(absent)

    def pin(self, lists: Sequence[int], arrived: ListsArrived, *, move: bool = True) -> PinResult:
        """Reference lists, and start what is absent if ``move``; ``arrived`` is called for all coming or started."""
        wanted = np.asarray(lists, np.int64)
        with self._lock:
            state = self._residency.state[wanted]
            absent, coming, hits = (wanted[state == each].tolist() for each in (ABSENT, MOVING, RESIDENT))
            # First hold all that is here or coming, so that making room for the absent cannot evict it.
            self._residency.hold(hits + coming)
            for list_no in coming:
                self._waiting[list_no].append(arrived)
            moves = self._reserve(absent, arrived) if move else []
            started = absent[: len(moves)]
            self._residency.hold(started)
        self._submit(moves)
        return PinResult(hits, coming, started, absent[len(moves) :])

    def release(self, lists: Sequence[int]) -> None:
        """Give back references taken by `pin` (or by an arrival that followed it)."""
        with self._lock:
            self._residency.drop(lists)

    def used(self, lists: IntArray) -> None:
        """Tell the cache that these lists were probed."""
        with self._lock:
            self._residency.policy.used(lists)

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The ``k`` best (score, row) of the named, referenced lists; see `ScoreLists`.

        Raises:
            ResourceError: the device failed at it; the lists stay referenced.
        """
        return self._scorer.score(queries, lists, k)

    def forget(self) -> None:
        """Empty the arena, save for what is in use or on its way: for measuring."""
        with self._lock:
            self._residency.forget()

    def check_integrity(self) -> None:
        """Assert the accounting's invariants."""
        with self._lock:
            self._residency.check_integrity()
            resident = (self._residency.state == RESIDENT) & (self.list_bytes > 0)
            table = self._scorer.table
            assert (table[~resident] == 0).all(), "the scorer can see a list that is not there"
            assert (table[resident, :2] == self._shape[resident, :2]).all()
            assert (table[resident, 2] == self._residency.offset[resident].astype(np.uint64)).all()
            assert set(self._waiting) == set(np.flatnonzero(self._residency.state == MOVING))

    def close(self) -> None:
        """Wait for moves under way and free the arena."""
        with self._settled:
            self._closing = True  # lookahead that nobody stopped ends here
            self._settled.wait_for(lambda: not self._waiting)
        self._transport.close()
        self._scorer.close()
        self._close_rest()

    def _reserve(
        self,
        lists: Sequence[int],
        arrived: ListsArrived,
        protected: Protected | None = None,
        priority: DoubleArray | None = None,
    ) -> list[Move]:
        """Moves of as many lists, from the first, as there is room for."""
        if not lists:
            return []
        targets = self._residency.reserve(lists, protected=protected, priority=priority)
        started = lists[: len(targets)]
        self._waiting.update((list_no, [arrived]) for list_no in started)
        return list(map(Move, started, self._source[started].tolist(), targets, self.list_bytes[started].tolist()))

    def _submit(self, moves: Sequence[Move]) -> None:
        if moves:
            self._transport.submit(moves, partial(self._arrived, time.perf_counter()))

    def _arrived(self, started_s: float, moves: Sequence[Move], error: TeleragError | None) -> None:
        if self._tracer.wanted:
            lane, ended_s = threading.current_thread().name, time.perf_counter()
            for move in moves:
                self._tracer.add(lane, f"list {move.list_no}", started_s, ended_s, list=move.list_no, bytes=move.nbytes)
        arrived_for: dict[ListsArrived, list[int]] = {}
        ended = np.array([move.list_no for move in moves], np.int64)
        with self._lock:
            for list_no in ended.tolist():
                for receiver in self._waiting.pop(list_no):
                    arrived_for.setdefault(receiver, []).append(list_no)
            if error is None:
                # The table first: whoever sees a list as resident may score it at once.
                self._scorer.table[ended] = self._shape[ended]
                self._scorer.table[ended, 2] = [move.target for move in moves]
                self._residency.commit(ended)
            else:
                self._residency.abort(ended)
            if not self._waiting:
                self._settled.notify_all()
        for receiver, lists in arrived_for.items():
            receiver(lists, error)

    def _evicted(self, list_no: int) -> None:
        self._scorer.table[list_no] = 0
