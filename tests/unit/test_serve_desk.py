"""The bounded queue of the server: seats, company, and that nobody is lost."""

import asyncio
import contextlib
import random

import pytest

from telerag_cli.config import ScheduleName
from telerag_cli.engine.scheduler import Schedule, Scheduler
from telerag_cli.server.admission import AdmissionQueue, QueueFullError


def desk_over(engine, *, at_once=2, limit=100, micro_batch=2, max_wait_s=0.02, name=ScheduleName.SIMILAR):
    schedule = Schedule(name, batch_size=16, micro_batch=micro_batch, max_wait_s=max_wait_s)
    return AdmissionQueue(Scheduler.over(engine, schedule), at_once, limit)


@pytest.fixture
def engine(engine_of):
    return engine_of({})


async def sit(desk, question, release, *, groups=True, seen=None):
    async with desk.seat(question, groups=groups) as seat:
        if seen is not None:
            seen.append((question, seat))
        await release.wait()


async def ticks(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def test_no_more_sit_than_there_are_seats_and_all_get_one(engine):
    async def scenario():
        desk, release, most = desk_over(engine), asyncio.Event(), 0

        async def come(number):
            nonlocal most
            async with desk.seat(f"where do cats {number} live", groups=number % 2 == 0):
                most = max(most, desk.running)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(come(number) for number in range(20)))
        assert most == 2
        assert (desk.running, desk.waiting) == (0, 0)
        release.set()
        await desk.close()

    asyncio.run(scenario())


def test_similar_questions_that_come_together_share_a_company(engine):
    async def scenario():
        desk, release, seen = desk_over(engine, at_once=4), asyncio.Event(), []
        questions = ["cats number 3 live", "bees number 9 eat", "cats number 3 eat", "bees number 9 live"]
        tasks = [asyncio.create_task(sit(desk, each, release, seen=seen)) for each in questions]
        await until(lambda: len(seen) == 4)
        companies = {question: id(seat.batch) for question, seat in seen}
        assert companies[questions[0]] == companies[questions[2]]
        assert companies[questions[1]] == companies[questions[3]]
        assert len(set(companies.values())) == 2
        release.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_who_gains_nothing_from_company_waits_for_none(engine):
    async def scenario():
        desk, release, seen = desk_over(engine, max_wait_s=60.0), asyncio.Event(), []
        task = asyncio.create_task(sit(desk, "cats", release, groups=False, seen=seen))
        await ticks()
        assert len(seen) == 1
        release.set()
        await task

    asyncio.run(scenario())


def test_a_lone_question_waits_no_longer_than_the_bound(engine):
    async def scenario():
        desk, release, seen = desk_over(engine, max_wait_s=0.05), asyncio.Event(), []
        task = asyncio.create_task(sit(desk, "cats", release, seen=seen))
        await ticks()
        assert not seen
        await until(lambda: seen)
        assert 0.04 <= seen[0][1].waited_s < 2.0
        release.set()
        await task

    asyncio.run(scenario())


def test_more_than_may_wait_are_refused_and_the_others_are_not_harmed(engine):
    async def scenario():
        desk, release = desk_over(engine, at_once=1, limit=2, max_wait_s=0.0), asyncio.Event()
        tasks = [asyncio.create_task(sit(desk, f"cats {n}", release)) for n in range(3)]
        await until(lambda: desk.running == 1 and desk.waiting == 2)
        with pytest.raises(QueueFullError):
            async with desk.seat("one too many", groups=True):
                pass
        release.set()
        await asyncio.gather(*tasks)
        async with desk.seat("there is room again", groups=True):
            assert desk.running == 1

    asyncio.run(scenario())


def test_a_queue_of_none_still_fills_the_seats(engine):
    async def scenario():
        desk, release = desk_over(engine, at_once=2, limit=0, max_wait_s=0.0), asyncio.Event()
        tasks = [asyncio.create_task(sit(desk, f"cats {n}", release)) for n in range(2)]
        await until(lambda: desk.running == 2)
        with pytest.raises(QueueFullError):
            async with desk.seat("third", groups=True):
                pass
        release.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_nobody_overtakes_a_batch_that_was_looked_at(engine):
    async def scenario():
        desk, release, seen = desk_over(engine, at_once=1, max_wait_s=0.0), asyncio.Event(), []
        first = asyncio.create_task(sit(desk, "cats number 1", release, seen=seen))
        await until(lambda: desk.running == 1)
        early = [asyncio.create_task(sit(desk, f"bees number {n}", release, seen=seen)) for n in range(4)]
        await until(lambda: desk.waiting == 4)
        release.set()
        await asyncio.gather(first, *early)
        assert {question for question, _seat in seen[1:]} == {f"bees number {n}" for n in range(4)}
        assert (desk.running, desk.waiting) == (0, 0)

    asyncio.run(scenario())


def test_what_breaks_the_comparison_is_told_to_those_compared_and_to_nobody_else(engine, monkeypatch):
    async def scenario():
        desk, release = desk_over(engine, max_wait_s=0.01), asyncio.Event()
        release.set()

        def broken(*_arguments):
            raise RuntimeError("no embedding today")

        monkeypatch.setattr(desk._scheduler, "cut", broken)
        tasks = [asyncio.create_task(sit(desk, f"cats {n}", release)) for n in range(2)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["no embedding today"] * 2
        monkeypatch.undo()
        await asyncio.gather(*(sit(desk, f"cats {n}", release) for n in range(2)))
        assert (desk.running, desk.waiting) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_whoever_leaves_when_leaves_nothing_behind(engine, seed):
    async def scenario():
        choose = random.Random(seed)
        desk = desk_over(
            engine, at_once=choose.choice([1, 2, 3]), micro_batch=choose.choice([1, 2, 4]), max_wait_s=0.003
        )
        served = 0

        async def come(number):
            nonlocal served
            await asyncio.sleep(choose.random() * 0.05)
            async with desk.seat(f"cats number {number}", groups=choose.random() < 0.7):
                assert desk.running <= desk.at_once
                await asyncio.sleep(choose.random() * 0.003)
                served += 1

        tasks = [asyncio.create_task(come(number)) for number in range(60)]
        leaving = choose.sample(tasks, 25)
        for task in leaving:
            await asyncio.sleep(choose.random() * 0.004)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert served >= 60 - 25
        assert (desk.running, desk.waiting) == (0, 0)
        async with desk.seat("still open", groups=True):
            pass
        with contextlib.suppress(asyncio.CancelledError):
            await desk.close()

    asyncio.run(scenario())
