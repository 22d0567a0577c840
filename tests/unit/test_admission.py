"""The bounded queue before the workers: seats, micro-batches, and that no question is lost."""

import asyncio
import random
from contextlib import asynccontextmanager

import pytest

from animals import WordHashes
from telerag_cli.config import ScheduleName
from telerag_cli.engine.admission import AdmissionQueue, Local, QueueFullError
from telerag_cli.engine.scheduler import Schedule, Scheduler


@pytest.fixture
def opening(engine_of):
    """Runs a scenario with a server's queue over an engine; at the end nothing may be left in it."""
    engine = engine_of({})

    def run(scenario, *, at_once=2, limit=100, micro_batch=2, max_wait_s=0.02, embedder=None):
        engine.embedder = embedder or engine.embedder
        schedule = Schedule(ScheduleName.SIMILAR, batch_size=16, micro_batch=micro_batch, max_wait_s=max_wait_s)

        @asynccontextmanager
        async def opened():
            scheduler = Scheduler.over(engine, schedule)
            queue = AdmissionQueue(scheduler, [Local(engine, at_once)], limit, eager=True)
            yield Guests(queue)
            await asyncio.sleep(0)
            assert (queue.running, queue.waiting) == (0, 0)
            await queue.close()

        async def whole():
            async with opened() as guests:
                await scenario(guests)

        asyncio.run(whole())

    return run


class Guests:
    """Questions that keep their seats until they are released."""

    def __init__(self, queue):
        self.queue = queue
        self.seen = []
        self._release = asyncio.Event()
        self._tasks = []

    def come(self, *questions, groups=True):
        self._tasks += [asyncio.create_task(self._sit(question, groups)) for question in questions]

    async def _sit(self, question, groups):
        async with self.queue.submit(question, groups=groups) as permit:
            self.seen.append(permit)
            await self._release.wait()

    async def until(self, *, running=0, waiting=0):
        async with asyncio.timeout(5):
            while (self.queue.running, self.queue.waiting) != (running, waiting):
                await asyncio.sleep(0.002)
        await asyncio.sleep(0)  # those with a new seat notice it

    async def all_go(self):
        self._release.set()
        await asyncio.gather(*self._tasks)


def test_no_more_run_than_there_are_seats_and_all_get_one(opening):
    async def scenario(guests):
        most = 0

        async def come(number):
            nonlocal most
            async with guests.queue.submit(f"where do cats {number} live", groups=number % 2 == 0):
                most = max(most, guests.queue.running)
                await asyncio.sleep(0.001)

        await asyncio.gather(*map(come, range(20)))
        assert most == 2

    opening(scenario)


def test_similar_questions_that_come_together_share_a_micro_batch(opening):
    async def scenario(guests):
        questions = ["cats number 3 live", "bees number 9 eat", "cats number 3 eat", "bees number 9 live"]
        guests.come(*questions)
        await guests.until(running=4)
        batches = {permit.question: permit.batch for permit in guests.seen}
        assert all(permit.batch.questions[permit.place] == permit.question for permit in guests.seen)
        assert batches[questions[0]] is batches[questions[2]]
        assert batches[questions[1]] is batches[questions[3]]
        assert len(set(batches.values())) == 2
        await guests.all_go()

    opening(scenario, at_once=4)


def test_a_question_that_gains_nothing_from_others_does_not_wait(opening):
    async def scenario(guests):
        guests.come("cats", groups=False)
        await guests.until(running=1)
        await guests.all_go()

    opening(scenario, max_wait_s=60.0)


def test_a_lone_question_waits_no_longer_than_the_bound(opening):
    async def scenario(guests):
        guests.come("cats")
        await guests.until(running=1)
        assert 0.04 <= guests.seen[0].waited_s < 2.0
        await guests.all_go()

    opening(scenario, max_wait_s=0.05)


@pytest.mark.parametrize("limit", [0, 2])
def test_more_than_may_wait_are_refused_and_the_others_are_not_harmed(opening, limit):
    async def scenario(guests):
        guests.come(*(f"cats {n}" for n in range(limit + 1)))
        await guests.until(running=1, waiting=limit)
        with pytest.raises(QueueFullError):
            guests.queue.submit("one too many")
        await guests.all_go()
        async with guests.queue.submit("there is room again"):
            assert guests.queue.running == 1

    opening(scenario, at_once=1, limit=limit, max_wait_s=0.0)


def test_no_question_overtakes_a_batch_that_was_put_together(opening):
    async def scenario(guests):
        guests.come("cats number 1")
        await guests.until(running=1)
        guests.come(*(f"bees number {n}" for n in range(4)))
        await guests.until(running=1, waiting=4)
        await guests.all_go()
        numbers = [permit.batch.number for permit in guests.seen]
        assert numbers == sorted(numbers)

    opening(scenario, at_once=1, max_wait_s=0.0)


def test_an_embedder_that_fails_fails_those_compared_and_no_others(opening):
    class Moody(WordHashes):
        fails = True

        def encode_queries(self, texts):
            if self.fails:
                raise RuntimeError("no embedding today")
            return super().encode_queries(texts)

    embedder = Moody()

    async def scenario(guests):
        guests.come("cats 1", "cats 2")
        with pytest.raises(RuntimeError):
            await guests.all_go()
        await guests.until()
        embedder.fails = False
        async with guests.queue.submit("cats 1"), guests.queue.submit("cats 2"):
            pass

    opening(scenario, max_wait_s=0.01, embedder=embedder)


@pytest.mark.parametrize("seed", range(6))
def test_whoever_leaves_when_leaves_nothing_behind(opening, seed):
    choose = random.Random(seed)

    async def scenario(guests):
        served = 0

        async def come(number):
            nonlocal served
            await asyncio.sleep(choose.random() * 0.05)
            async with guests.queue.submit(f"cats number {number}", groups=choose.random() < 0.7):
                assert guests.queue.running <= guests.queue.at_once
                await asyncio.sleep(choose.random() * 0.003)
                served += 1

        tasks = [asyncio.create_task(come(number)) for number in range(60)]
        leaving = choose.sample(tasks, 25)
        for task in leaving:
            await asyncio.sleep(choose.random() * 0.004)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert served >= 60 - 25
        async with guests.queue.submit("still open"):
            pass

    opening(scenario, at_once=choose.choice([1, 2, 3]), micro_batch=choose.choice([1, 2, 4]), max_wait_s=0.003)
