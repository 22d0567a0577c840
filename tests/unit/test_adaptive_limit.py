"""The limit on requests at once: it is kept, it falls, and cancelled ones leave nothing behind."""

import asyncio
import random

from telerag_cli.llm.concurrency import AdaptiveLimit


def test_at_most_so_many_run_and_the_first_come_first():
    async def run():
        limit, running, most, order = AdaptiveLimit(2), 0, 0, []

        async def work(number):
            nonlocal running, most
            async with limit.place():
                running, most = running + 1, max(most, running + 1)
                order.append(number)
                await asyncio.sleep(0)
                running -= 1

        await asyncio.gather(*map(work, range(7)))
        return most, order

    assert asyncio.run(run()) == (2, list(range(7)))


def test_it_falls_once_for_those_who_ran_together():
    async def run():
        limit, told = AdaptiveLimit(8), []

        async def refused():
            async with limit.place() as began:
                await asyncio.sleep(0)
                told.append((limit.fall(began), limit.most))

        await asyncio.gather(*(refused() for _ in range(6)))
        assert told == [(True, 3)] * 6
        async with limit.place() as began:
            assert not limit.fall(began)  # it was alone: there is nothing that fewer would change
        return limit.most

    assert asyncio.run(run()) == 3


def test_whoever_is_cancelled_leaves_no_place_behind():
    async def run(seed):
        rng, limit = random.Random(seed), AdaptiveLimit(3)
        running = 0

        async def work():
            nonlocal running
            async with limit.place() as began:
                running += 1
                assert running <= 3
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                    if rng.random() < 0.1:
                        limit.fall(began)
                finally:
                    running -= 1

        tasks = [asyncio.create_task(work()) for _ in range(30)]
        for _ in range(20):
            await asyncio.sleep(0)
            rng.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(1), limit.place():
            return running

    assert [asyncio.run(run(seed)) for seed in range(30)] == [0] * 30
