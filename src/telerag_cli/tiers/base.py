"""What lookahead and the join need of a fast tier, whatever link feeds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from telerag_cli.arrays import BoolArray, DoubleArray, FloatArray, IntArray
from telerag_cli.errors import TeleragError
from telerag_cli.tiers.residency import Occupancy

ListsArrived = Callable[[Sequence[int], TeleragError | None], None]
"""Called with the numbers of lists that are in the arena now, or with the error that kept them out; from any thread."""

Stay = Callable[[int], BoolArray]
"""Which lists may not be evicted for the one named, shape (nlist,)."""

ScoreLists = Callable[[FloatArray, IntArray, int], tuple[FloatArray, IntArray]]
"""The ``k`` best (score, row) of the lists named, (n, m) with -1 to skip, for queries (n, dimension); see `ListScorer.score`."""


@dataclass(frozen=True)
class Prefetched:
    """What became of moves that nobody waits for."""

    started: list[int]
    """The others were in the arena or on their way already, or came after the one for which there was no room."""
    full: bool
    """There was no room for a list, and nothing that may leave for it."""


@dataclass(frozen=True)
class PinResult:
    """What became of lists that a query needs; all but ``refused`` are referenced until released."""

    hits: list[int]
    """In the arena: score them now."""
    coming: list[int]
    """Already under way when they were asked for."""
    started: list[int]
    """Absent; a move was started."""
    absent: list[int]
    """Absent still: there is no room now (ask again after a release), or no move was wanted."""


class Rate:
    """How many bytes a second something does, from what it did: the average, in which old work fades by half with each ``HALF``."""

    HALF_BYTES = 1 << 30

    def __init__(self, nbytes: float, took_s: float) -> None:
        """Begin with a first measurement."""
        self._bytes = float(nbytes)
        self._took_s = took_s

    @property
    def bytes_per_s(self) -> float:
        """The rate."""
        return self._bytes / max(self._took_s, 1e-9)

    def observe(self, nbytes: float, took_s: float) -> None:
        """Learn from work done."""
        kept = 0.5 ** (nbytes / self.HALF_BYTES)
        self._bytes = kept * self._bytes + nbytes
        self._took_s = kept * self._took_s + took_s


@dataclass(frozen=True)
class JoinRates:
    """What a join between two tiers goes by, in bytes of lists a second, where it was measured before."""

    link: float
    in_place: float
    moved: float
    latency_s: float
    slowdown: float = 1.0
    """How much longer both ends take side by side than these rates say."""

    WEIGHT_BYTES = 1 << 28
    """With which these begin: what joins show soon counts more."""

    def rates(self) -> tuple[Rate, Rate, Rate]:
        """Link, in place and moved, to go on from."""
        one, two, three = (
            Rate(self.WEIGHT_BYTES, self.WEIGHT_BYTES / each) for each in (self.link, self.in_place, self.moved)
        )
        return one, two, three


@dataclass(frozen=True)
class InPlace:
    """Scoring lists where they lie in the slow tier, as an alternative to moving them; and how fast is either."""

    score: ScoreLists
    scoring: Rate
    """Bytes of lists scored in place a second, counted for each query."""
    link: Rate
    """Bytes that the link moves a second."""
    scoring_moved: Rate
    """Bytes of lists scored in the fast tier a second, counted for each query, beside the latency."""
    latency_s: float
    """What scoring in the fast tier takes at least."""
    slowdown: float = 1.0
    """How much longer both ends took side by side than these rates say, as far as that is known at the start."""


class FastTier(Protocol):
    """A bounded arena that holds lists and scores them. All methods may be called from any thread."""

    nlist: int
    arena_bytes: int
    depth: int
    """Moves that lookahead keeps under way."""
    list_bytes: IntArray
    """Bytes each list takes, shape (nlist,)."""
    notes: list[str]
    """What a user should know about the link, if anything."""
    in_place: InPlace | None
    """How lists are scored where they lie in the slow tier; None where they must be moved for it."""

    def new_round(self, cache_fraction: float) -> BoolArray:
        """Begin a round; the lists to keep through it (see `Residency.new_round`)."""

    def occupancy(self) -> Occupancy:
        """What the arena holds now."""

    def absent(self) -> BoolArray:
        """Which lists are neither in the arena nor on their way, shape (nlist,)."""

    def prefetch(
        self, lists: Sequence[int], protected: Stay, priority: DoubleArray, arrived: ListsArrived
    ) -> Prefetched:
        """Start moving lists that nobody waits for, in this order, until there is no room for one.

        Args:
            lists: numbers of lists.
            protected: asked only when something must leave.
            priority: added to each list's heat when choosing what to evict, shape (nlist,).
            arrived: called once for each list started.
        """

    def claim(self, lists: Sequence[int], arrived: ListsArrived, *, move: bool = True) -> PinResult:
        """Reference lists for scoring, and start what is absent if ``move``; ``arrived`` is called for each coming or started one."""

    def release(self, lists: Sequence[int]) -> None:
        """Give back references taken by `claim` (or by an arrival that followed it)."""

    def used(self, lists: IntArray) -> None:
        """Tell the cache that these lists were probed."""

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The ``k`` best (score, row) of the named, referenced lists; see `ScoreLists`.

        Raises:
            ResourceError: the device failed at it; the lists stay referenced.
        """

    def forget(self) -> None:
        """Empty the arena, save for what is in use or on its way: for measuring."""

    def check_integrity(self) -> None:
        """Assert the accounting's invariants."""

    def close(self) -> None:
        """Wait for moves under way and free the arena."""
