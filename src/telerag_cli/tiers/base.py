"""What lookahead and the join need of a fast tier, whatever link feeds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

import numpy as np
import numpy.typing as npt

from telerag_cli.errors import TeleragError
from telerag_cli.index.artifact import FloatArray, IntArray
from telerag_cli.tiers.residency import BoolArray

ListArrived = Callable[[int, TeleragError | None], None]
"""Called with a list's number when it is in the arena, or with the error that kept it out; from any thread."""


class Prefetch(Enum):
    """What became of a move that nobody waits for."""

    STARTED = auto()
    PRESENT = auto()
    """The list is in the arena or on its way already."""
    FULL = auto()
    """No room, and nothing that may leave for it."""


@dataclass(frozen=True)
class Claim:
    """What became of lists that a query needs; all but ``refused`` are referenced until released."""

    hits: list[int]
    """In the arena: score them now."""
    coming: list[int]
    """Already under way when they were asked for."""
    started: list[int]
    """Absent; a move was started."""
    refused: list[int]
    """Absent and no room now; ask again after a release."""


class FastTier(Protocol):
    """A bounded arena that holds lists and scores them. All methods may be called from any thread."""

    nlist: int
    arena_bytes: int
    depth: int
    """Moves that lookahead keeps under way."""
    extents: IntArray
    """Bytes each list takes, shape (nlist,)."""
    note: str | None
    """What a user should know about the link, if anything."""

    def new_round(self, cache_fraction: float) -> BoolArray:
        """Begin a round; the lists to keep through it (see `Residency.new_round`)."""

    def absent(self) -> BoolArray:
        """Which lists are neither in the arena nor on their way, shape (nlist,)."""

    def prefetch(
        self, list_no: int, stay: BoolArray, worth: npt.NDArray[np.float64], arrived: ListArrived
    ) -> Prefetch:
        """Start moving a list that nobody waits for.

        Args:
            list_no: the list.
            stay: lists that may not be evicted for it, shape (nlist,).
            worth: added to each list's heat when choosing what to evict, shape (nlist,).
            arrived: called once it has ended, if the answer is STARTED.
        """

    def claim(self, lists: Sequence[int], arrived: ListArrived) -> Claim:
        """Reference lists for scoring and start what is absent; ``arrived`` is called for each coming or started one."""

    def release(self, lists: Sequence[int]) -> None:
        """Give back references taken by `claim` (or by an arrival that followed it)."""

    def used(self, lists: IntArray) -> None:
        """Tell the cache that these lists were probed."""

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The ``k`` best (score, row) of the named, referenced lists; see `ListScorer.score`."""

    def check_integrity(self) -> None:
        """Assert the accounting's invariants."""

    def close(self) -> None:
        """Wait for moves under way and free the arena."""
