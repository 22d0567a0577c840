"""The bounded queue before the engine: who may begin, and together with whom. For one event loop.

While a seat is free, requests that come within a short time of each other are looked at together, as a run's questions
are: similar ones become a micro-batch, whose first lookahead is planned once. What waits because all seats are taken is
    looked at
when one is free. Members of a micro-batch begin in order, as seats become free; nobody waits for a whole micro-batch to
fit, and nobody who came after a batch was looked at begins before its members.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.scheduler import Scheduler


class QueueFullError(Exception):
    """As many wait as may."""


@dataclass(eq=False)
class _Entry:
    """A request that waits for a seat."""

    question: str
    groups: bool
    came_s: float
    seat: asyncio.Future[MicroBatch] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    batch: MicroBatch | None = None
    """Once it was looked at."""


@dataclass(frozen=True)
class Permit:
    """The right to be answered now."""

    batch: MicroBatch
    waited_s: float


class AdmissionQueue:
    """Gives out seats."""

    def __init__(self, scheduler: Scheduler, at_once: int, limit: int) -> None:
        """Begin with nobody.

        Args:
            scheduler: groups similar questions; its queue of micro-batches is not used.
            at_once: seats.
            limit: requests that may wait for one.
        """
        self.at_once = at_once
        self.limit = limit
        self.running = 0
        self._scheduler = scheduler
        self._new: list[_Entry] = []
        self._ordered: deque[_Entry] = deque()
        """Looked at already, in the order in which they begin."""
        self._changed = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Requests without a seat."""
        return len(self._new) + sum(not entry.seat.done() for entry in self._ordered)

    @contextlib.asynccontextmanager
    async def seat(self, question: str, *, groups: bool) -> AsyncIterator[Permit]:
        """Wait for a seat and keep it while the block runs.

        Args:
            question: what lookahead begins with.
            groups: whether being answered beside similar questions is worth anything.

        Raises:
            QueueFullError: too many wait already.
        """
        # A seat that is free is not a place in the queue, though taking it takes a moment.
        if self.waiting - max(self.at_once - self.running, 0) >= self.limit:
            raise QueueFullError
        entry = _Entry(question, groups, time.perf_counter())
        self._new.append(entry)
        self._wake()
        try:
            yield Permit(await entry.seat, time.perf_counter() - entry.came_s)
        finally:
            self._leave(entry)

    async def close(self) -> None:
        """End the task that gives out seats; nobody holds or wants one any more."""
        if self._working:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    def check_integrity(self) -> None:
        """Assert that nobody is lost: with nobody inside, there is nothing."""
        assert 0 <= self.running <= self.at_once
        assert self.running or not self._ordered or self._working

    def _wake(self) -> None:
        self._changed.set()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())

    def _leave(self, entry: _Entry) -> None:
        """Forget a request, wherever it had come to."""
        if entry.seat.done() and not entry.seat.cancelled() and entry.seat.exception() is None:
            self.running -= 1
        entry.seat.cancel()
        if entry in self._new:
            self._new.remove(entry)
        if entry in self._ordered:
            self._ordered.remove(entry)
        if entry.batch:
            entry.batch.__exit__()
        self._wake()

    async def _work(self) -> None:
        """Give out seats until nobody waits."""
        try:
            await self._until_nobody_waits()
        except Exception as error:  # a bug; whatever it is, nobody may wait for ever
            self._refuse([*self._new, *self._ordered], error)
            raise

    async def _until_nobody_waits(self) -> None:
        while self._new or self._ordered:
            self._changed.clear()
            self._give()
            # What was given up or refused is taken out by who waited for it, a moment later.
            self._new = [entry for entry in self._new if not entry.seat.done()]
            if self._ordered or not self._new or self.running >= self.at_once:
                await self._changed.wait()
                continue
            await self._company_comes()
            some = self._new[: self._scheduler.schedule.batch_size]
            if some:
                await self._look_at(some)

    def _give(self) -> None:
        while self._ordered and self.running < self.at_once:
            entry = self._ordered.popleft()
            if not entry.seat.done():  # it may have been given up a moment ago
                assert entry.batch
                self.running += 1
                entry.seat.set_result(entry.batch)

    async def _company_comes(self) -> None:
        """Wait until a micro-batch is there, or its first has waited long enough; nobody who gains nothing from it waits."""
        schedule = self._scheduler.schedule
        loop = asyncio.get_running_loop()
        while self._new and all(entry.groups for entry in self._new) and len(self._new) < schedule.micro_batch:
            left_s = self._new[0].came_s + schedule.max_wait_s - time.perf_counter()
            if left_s <= 0:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout_at(loop.time() + left_s):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def _look_at(self, some: Sequence[_Entry]) -> None:
        """Put these in order, similar ones together, and give each its micro-batch."""
        alone = [entry for entry in some if not entry.groups]
        together = [entry for entry in some if entry.groups]
        if len(together) == 1 or self._scheduler.schedule.micro_batch == 1:
            alone, together = list(some), []
        groups = [([entry], MicroBatch((entry.question,))) for entry in alone]
        if together:
            questions = [entry.question for entry in together]
            try:
                made = await asyncio.to_thread(self._scheduler.cut, questions, range(len(questions)))
            except Exception as error:  # whoever asks next may have more luck
                self._refuse(together, error)
                made = []
            groups += [([together[place] for place in batch.members], batch) for batch in made]
        for entries, batch in groups:
            # Some may have left while the others were compared; lookahead that nobody asks for ends with the batch.
            for entry in [entry for entry in entries if entry in self._new and not entry.seat.done()]:
                entry.batch = batch.__enter__()
                self._new.remove(entry)
                self._ordered.append(entry)

    def _refuse(self, entries: Sequence[_Entry], error: Exception) -> None:
        for entry in entries:
            if not entry.seat.done():
                entry.seat.set_exception(error)
