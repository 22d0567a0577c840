"""The bounded queue before the workers: who is answered next, by which worker, and in which micro-batch.

Questions that come within a short time of each other are compared, and similar ones become a micro-batch. A run fills
whole batches, and a worker takes a micro-batch when it has room for all of it. A server is eager: it waits for no more
than one micro-batch, and members begin in order as seats become free, before any question that comes later.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from telerag_cli.arrays import BoolArray
from telerag_cli.engine.dispatch import ReplicaState
from telerag_cli.engine.engine import AskResult, Engine
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.questions import USUAL, AskOptions
from telerag_cli.engine.scheduler import Scheduler
from telerag_cli.pipelines.base import Pipeline


class Worker(Protocol):
    """Answers micro-batches; several, and all members of each, at once."""

    at_once: int
    """Questions that it answers at once."""

    async def answer(self, batch: MicroBatch, place: int, options: AskOptions = USUAL) -> AskResult:
        """Answer one question of a micro-batch; all are asked for at once.

        Raises:
            TeleragError: it cannot be answered.
        """

    def resident(self) -> BoolArray:
        """Which lists are in its arena or on their way, as far as is known, shape (nlist,)."""


@dataclass(eq=False)
class Local:
    """An engine of this process as a `Worker`; it stays the caller's."""

    engine: Engine
    at_once: int
    pipeline: Pipeline | None = None
    """How to answer, if not with the engine's own."""

    async def answer(self, batch: MicroBatch, place: int, options: AskOptions = USUAL) -> AskResult:
        """See `Worker`."""
        return await self.engine.aask(
            batch.questions[place],
            pipeline=options.pipeline or self.pipeline,
            turns=options.turns,
            batch=batch,
            settings=self.engine.answer_config(**options.settings),
        )

    def resident(self) -> BoolArray:
        """See `Worker`."""
        there: BoolArray = ~self.engine.retriever.tier.absent()
        return there


class QueueFullError(Exception):
    """As many questions wait as may."""


class Permit:
    """A question's place in the queue and, inside of its ``async with``, the right to be answered now."""

    batch: MicroBatch
    """What it is part of; this, ``place`` and ``worker`` are known inside of the block."""
    place: int
    """Its place among the questions of the micro-batch."""
    worker: int
    """The number of the worker that is to answer."""
    waited_s: float

    def __init__(self, queue: AdmissionQueue, question: str, *, groups: bool) -> None:
        loop = asyncio.get_running_loop()
        self.question = question
        self.groups = groups
        self.came_s = loop.time()
        self.admitted: asyncio.Future[None] = loop.create_future()
        self._queue = queue

    async def __aenter__(self) -> Self:
        try:
            await self.admitted
        except BaseException:
            self._queue.leave(self)
            raise
        self.waited_s = asyncio.get_running_loop().time() - self.came_s
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._queue.leave(self)


class AdmissionQueue:
    """Gives out the seats of some workers. For one event loop."""

    def __init__(self, scheduler: Scheduler, workers: Sequence[Worker], limit: int, *, eager: bool) -> None:
        """Begin with an empty queue.

        ``limit`` questions may wait for a seat. An ``eager`` queue, a server's, begins as soon as one can; a run's
        fills batches.
        """
        self.limit = limit
        self.at_once = sum(worker.at_once for worker in workers)
        self._scheduler = scheduler
        self._workers = workers
        self._eager = eager
        self._new: list[Permit] = []
        """Not in a micro-batch yet, in order of arrival."""
        self._members: dict[int, list[Permit]] = {}
        """Those in a micro-batch that have not left, by its number."""
        self._under_way: list[dict[int, MicroBatch]] = [{} for _ in workers]
        self._next: list[deque[Permit]] = [deque() for _ in workers]
        """Members of what a worker has taken that wait for its seats."""
        self._running = [0 for _ in workers]
        self._ended = False
        self._changed = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    @property
    def groups(self) -> bool:
        """Whether questions run together at all."""
        return self._scheduler.schedule.micro_batch > 1

    @property
    def running(self) -> int:
        """Questions with a seat."""
        return sum(self._running)

    @property
    def waiting(self) -> int:
        """Questions without a seat."""
        return len(self._new) + sum(map(len, self._members.values())) - self.running

    def submit(self, question: str, *, groups: bool = True) -> Permit:
        """Let a question wait for a seat; enter the permit to wait, and leave it to give the seat back.

        ``groups`` says whether it gains from running beside similar questions.

        Raises:
            QueueFullError: too many wait already.
        """
        # A seat that is free is not a place in the queue, though taking it takes a moment.
        if self.waiting - max(self.at_once - self.running, 0) >= self.limit:
            raise QueueFullError
        permit = Permit(self, question, groups=groups)
        self._new.append(permit)
        self._wake()
        return permit

    def end(self) -> None:
        """No more questions come, so none waits for others to be compared with."""
        self._ended = True
        self._wake()

    async def close(self) -> None:
        """End the task that gives out seats; nobody holds or wants one any more."""
        if self._working:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    def leave(self, permit: Permit) -> None:
        """Forget a question that was answered or given up, wherever it had come to."""
        seated = permit.admitted.done() and not permit.admitted.cancelled() and not permit.admitted.exception()
        permit.admitted.cancel()
        if permit in self._new:
            self._new.remove(permit)
        else:
            members = self._members[permit.batch.number]
            members.remove(permit)
            permit.batch.__exit__()
            if not members:
                del self._members[permit.batch.number]
                for batches in self._under_way:
                    batches.pop(permit.batch.number, None)
        if seated:
            self._running[permit.worker] -= 1
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        if self.waiting and (self._working is None or self._working.done()):
            self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Give out seats until nobody waits."""
        try:
            while self.waiting:
                self._changed.clear()
                self._give_seats()
                left_s = self._gathering_s()
                if left_s is not None and left_s <= 0:
                    await self._make_batches()
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._changed.wait()
        except Exception as error:  # a bug; no question may wait for ever because of it
            _refuse([*self._new, *(permit for members in self._members.values() for permit in members)], error)
            raise

    def _give_seats(self) -> None:
        """Have workers take micro-batches, and admit their members, as far as there is room."""
        while True:
            for number, coming in enumerate(self._next):
                while coming and self._running[number] < self._workers[number].at_once:
                    permit = coming.popleft()
                    if not permit.admitted.done():  # else it was given up a moment ago
                        permit.admitted.set_result(None)
                        self._running[number] += 1
            queue = self._scheduler.queue
            if not queue.waiting or not any(map(self._room, range(len(self._workers)))):
                return
            states = [
                ReplicaState(number, self._room(number), worker.resident(), tuple(self._under_way[number].values()))
                for number, worker in enumerate(self._workers)
            ]
            for number, batch in queue.assign(states):
                members = self._members.get(batch.number, [])
                if members:  # else all have left
                    self._under_way[number][batch.number] = batch
                for permit in members:
                    permit.worker = number
                self._next[number].extend(members)

    def _room(self, number: int) -> int:
        """Micro-batches that a worker can take now."""
        free = self._workers[number].at_once - self._running[number]
        if self._eager:
            return int(free > 0 and not self._next[number])
        return free // self._scheduler.schedule.micro_batch

    def _gathering_s(self) -> float | None:
        """Seconds for which new questions still wait for others; None while it is not their turn."""
        schedule = self._scheduler.schedule
        new = [permit for permit in self._new if not permit.admitted.done()]
        if self._eager:
            turn = not self._scheduler.queue.waiting and any(map(self._room, range(len(self._workers))))
        else:  # one batch is compared while what waits still fills the workers
            turn = self._scheduler.queue.waiting < len(self._workers)
        if not new or not turn:
            return None
        wanted = schedule.micro_batch if self._eager else schedule.batch_size
        if self._ended or len(new) >= wanted or not all(permit.groups for permit in new):
            return 0.0
        return new[0].came_s + schedule.max_wait_s - asyncio.get_running_loop().time()

    async def _make_batches(self) -> None:
        """Put new questions in micro-batches; one that gains nothing from others is alone and goes first."""
        some = [permit for permit in self._new if not permit.admitted.done()][: self._scheduler.schedule.batch_size]
        for permit in some:
            if not permit.groups:
                self._enter([permit], self._scheduler.cut([permit.question], compare=False))
        together = [permit for permit in some if permit.groups]
        if not together:
            return
        try:
            made = await asyncio.to_thread(self._scheduler.cut, [permit.question for permit in together])
        except Exception as error:  # the next ones may have more luck
            _refuse(together, error)
            return
        self._enter(together, made)

    def _enter(self, permits: Sequence[Permit], batches: Iterable[MicroBatch]) -> None:
        for batch in batches:
            members = []
            for place, number in enumerate(batch.members):
                permit = permits[number]
                if permit in self._new and not permit.admitted.done():  # some may have left meanwhile
                    self._new.remove(permit)
                    permit.batch, permit.place = batch.__enter__(), place
                    members.append(permit)
            if members:
                self._members[batch.number] = members
                self._scheduler.queue.add([batch])


def _refuse(permits: Iterable[Permit], error: Exception) -> None:
    for permit in permits:
        if not permit.admitted.done():
            permit.admitted.set_exception(error)
