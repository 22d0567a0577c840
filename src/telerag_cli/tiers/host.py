"""The ``host`` link: the index file on disk, an arena in RAM, scoring by Faiss over the arena."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from telerag_cli.config import format_bytes
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.index.artifact import FloatArray, Index, IntArray
from telerag_cli.index.scoring import Coarse, ListScorer
from telerag_cli.tiers.arena import Arena
from telerag_cli.tiers.base import Claim, ListArrived, Prefetch
from telerag_cli.tiers.cache import CacheKind, make_policy
from telerag_cli.tiers.residency import BoolArray, Residency, State
from telerag_cli.tiers.transport import DirectReader, Move, Transport, allocate
from telerag_cli.tracing import Tracer

TransportFactory = Callable[[Path, npt.NDArray[np.uint8]], Transport]


class HostTier:
    """A `FastTier` in RAM. One lock guards the accounting; callbacks are made outside it."""

    def __init__(self, index: Index, coarse: Coarse, arena_bytes: int, *, cache: CacheKind = CacheKind.HOTNESS,
                 transport: TransportFactory = DirectReader, tracer: Tracer | None = None) -> None:  # fmt: skip
        """Allocate the arena and open the link.

        Args:
            index: the opened index.
            coarse: its coarse quantizer.
            arena_bytes: size of the arena; an index smaller than this takes only what it needs.
            cache: what stays between queries.
            transport: makes the link from the path of ``lists.bin`` and the arena's memory.
            tracer: where moves are recorded.

        Raises:
            UsageError: the arena is smaller than the largest list.
            ResourceError: there is not that much memory.
        """
        self.extents = index.extents
        self.nlist = index.manifest.nlist
        largest = int(self.extents.max(initial=0))
        arena = Arena(min(arena_bytes, max(int(self.extents.sum()), 1)))
        if arena.nbytes < largest:
            raise UsageError(
                f"Fast memory of {format_bytes(arena_bytes)} is smaller than the largest list, {format_bytes(largest)}.",
                remedy=f"Give --fast-memory at least {largest}, or build the index with more lists.",
            )
        self.arena_bytes = arena.nbytes
        self._source = index.offsets
        self._shape = index.table
        self._tracer = tracer or Tracer(enabled=False)
        self._memory = allocate(max(arena.nbytes, 4096))
        manifest = index.manifest
        self._scorer = ListScorer(
            self._memory, coarse, manifest.metric, manifest.storage, manifest.code_size, index.trained
        )
        self._residency = Residency(self.extents, arena, make_policy(cache, self.nlist), self._forget)
        self._waiting: dict[int, list[ListArrived]] = {}
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._closing = False
        self._transport = transport(index.paths.lists, self._memory)
        self.depth = self._transport.depth
        self.note = self._transport.note

    def new_round(self, cache_fraction: float) -> BoolArray:
        """See `FastTier`."""
        with self._lock:
            return self._residency.new_round(cache_fraction)

    def absent(self) -> BoolArray:
        """See `FastTier`."""
        with self._lock:
            mask: BoolArray = self._residency.state == State.ABSENT
            return mask

    def prefetch(
        self, list_no: int, stay: BoolArray, worth: npt.NDArray[np.float64], arrived: ListArrived
    ) -> Prefetch:
        """See `FastTier`."""
        with self._lock:
            if self._residency.state[list_no] != State.ABSENT:
                return Prefetch.PRESENT
            move = None if self._closing else self._reserve(list_no, stay, worth)
            if move is None:
                return Prefetch.FULL
            self._waiting[list_no].append(arrived)
        self._submit(move)
        return Prefetch.STARTED

    def claim(self, lists: Sequence[int], arrived: ListArrived) -> Claim:
        """See `FastTier`."""
        claim = Claim([], [], [], [])
        moves = []
        with self._lock:
            # First hold all that is here or coming, so that making room for the absent cannot evict it.
            absent = []
            for list_no in lists:
                state = self._residency.state[list_no]
                if state == State.ABSENT:
                    absent.append(list_no)
                    continue
                self._residency.hold([list_no])
                if state == State.RESIDENT:
                    claim.hits.append(list_no)
                else:
                    claim.coming.append(list_no)
                    self._waiting[list_no].append(arrived)
            for position, list_no in enumerate(absent):
                move = self._reserve(list_no)
                if move is None:
                    claim.refused.extend(absent[position:])
                    break
                self._residency.hold([list_no])
                claim.started.append(list_no)
                self._waiting[list_no].append(arrived)
                moves.append(move)
        for move in moves:
            self._submit(move)
        return claim

    def release(self, lists: Sequence[int]) -> None:
        """See `FastTier`."""
        with self._lock:
            self._residency.drop(lists)

    def used(self, lists: IntArray) -> None:
        """See `FastTier`."""
        with self._lock:
            self._residency.policy.used(lists)

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """See `FastTier`."""
        return self._scorer.score(queries, lists, k)

    def check_integrity(self) -> None:
        """See `FastTier`."""
        with self._lock:
            self._residency.check_integrity()
            resident = (self._residency.state == State.RESIDENT) & (self.extents > 0)
            assert (self._scorer.table[~resident] == 0).all(), "Faiss can see a list that is not there"
            assert (self._scorer.table[resident, 0] == self._shape[resident, 0]).all()
            assert (
                self._scorer.table[resident, 2] == self._residency.offset[resident].astype(np.uint64)
            ).all()
            assert set(self._waiting) == set(np.flatnonzero(self._residency.state == State.MOVING))

    def moves_under_way(self) -> list[int]:
        """Lists on their way now."""
        with self._lock:
            return list(self._waiting)

    def references(self) -> int:
        """References held now; zero when no query is being answered."""
        with self._lock:
            return int(self._residency.references.sum())

    def close(self) -> None:
        """See `FastTier`."""
        with self._settled:
            self._closing = True  # lookahead that nobody stopped ends here
            self._settled.wait_for(lambda: not self._waiting)
        self._transport.close()
        self._scorer.close()

    def _reserve(
        self, list_no: int, stay: BoolArray | None = None, worth: npt.NDArray[np.float64] | None = None
    ) -> Move | None:
        offset = self._residency.reserve(list_no, stay=stay, worth=worth)
        if offset is None:
            return None
        self._waiting[list_no] = []
        return Move(list_no, int(self._source[list_no]), offset, int(self.extents[list_no]))

    def _submit(self, move: Move) -> None:
        started_s = time.perf_counter()

        def arrived(move: Move, error: TeleragError | None) -> None:
            self._tracer.add(threading.current_thread().name, f"list {move.list_no}", started_s, time.perf_counter(),
                             bytes=move.nbytes)  # fmt: skip
            self._arrived(move, error)

        self._transport.submit(move, arrived)

    def _arrived(self, move: Move, error: TeleragError | None) -> None:
        with self._lock:
            waiting = self._waiting.pop(move.list_no)
            if error is None:
                # The table first: whoever sees the list as resident may score it at once.
                self._scorer.table[move.list_no, :2] = self._shape[move.list_no, :2]
                self._scorer.table[move.list_no, 2] = move.target
                self._residency.commit(move.list_no)
            else:
                self._residency.references[move.list_no] = 0  # those who wait are told, and hold nothing
                self._residency.abort(move.list_no)
            if not self._waiting:
                self._settled.notify_all()
        for tell in waiting:
            tell(move.list_no, error)

    def _forget(self, list_no: int) -> None:
        self._scorer.table[list_no] = 0
