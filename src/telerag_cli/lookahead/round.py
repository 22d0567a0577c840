"""One round of lookahead: keep the link busy with the plan's next list until the query arrives."""

from __future__ import annotations

import threading

from telerag_cli.errors import TeleragError
from telerag_cli.index.artifact import IntArray
from telerag_cli.lookahead.plan import Plan
from telerag_cli.tiers.base import FastTier, Prefetch


class Round:
    """Pulls lists from the plan and starts their moves, ``tier.depth`` at a time, from `follow` until `stop`.

    A move's end starts the next one, in the link's own thread: nothing polls, and stopping is one flag.
    """

    def __init__(self, tier: FastTier, plan: Plan) -> None:
        self._tier = tier
        self._plan = plan
        self._lock = threading.Lock()
        self._under_way = 0
        self._going = True
        self.moved: list[int] = []
        """Lists moved in this round, in order of arrival."""
        self.failed = 0
        """Moves that ended in an error; the join tries those lists again and tells."""
        self.orders = 0
        """How many orders were followed: one, and one more for each refinement."""

    def follow(self, order: IntArray, reach: int) -> None:
        """Move the ``reach`` best lists of this order from now on; what is under way goes on."""
        with self._lock:
            if not self._going:
                return
            self.orders += 1
            self._plan.reorder(order, reach)
        self._fill()

    def stop(self) -> None:
        """Start no more moves. Those under way end by themselves and are waited for only if needed."""
        with self._lock:
            self._going = False

    @property
    def idle(self) -> bool:
        """Whether the order has been followed to its end."""
        with self._lock:
            return self._plan.ended and not self._under_way

    @property
    def bytes_moved(self) -> int:
        """Bytes of the lists moved so far."""
        return int(self._tier.extents[self.moved].sum()) if self.moved else 0

    def _fill(self) -> None:
        while True:
            with self._lock:
                if not self._going or self._under_way >= self._tier.depth:
                    return
                list_no = self._plan.next(self._tier.absent())
                if list_no is None:
                    return
                self._under_way += 1
                stay, worth = self._plan.stay(list_no), self._plan.worth
            outcome = self._tier.prefetch(list_no, stay, worth, self._arrived)
            if outcome is not Prefetch.STARTED:
                with self._lock:
                    self._under_way -= 1
                    if outcome is Prefetch.FULL:
                        # What ranks lower may evict even less: only a new order can go on.
                        self._plan.end()

    def _arrived(self, list_no: int, error: TeleragError | None) -> None:
        with self._lock:
            self._under_way -= 1
            if error is None:
                self.moved.append(list_no)
            else:
                self.failed += 1
        self._fill()
