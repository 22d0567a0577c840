"""Policy and accounting by themselves: orders, queues, prefetches, arena, residency."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles import StubTier
from telerag_cli.config import PAGE_BYTES, CacheKind
from telerag_cli.prefetch.order import (
    CHECKPOINTS,
    PATIENT_CHECKPOINTS,
    blend,
    due,
    interleave,
    prefetch_depth,
    text_weight,
)
from telerag_cli.prefetch.prefetcher import Prefetcher
from telerag_cli.prefetch.queue import PrefetchQueue
from telerag_cli.tiers.arena import Arena
from telerag_cli.tiers.cache import make_policy
from telerag_cli.tiers.residency import ABSENT, MOVING, Residency


def none_of(count):
    return np.zeros(count, np.bool_)


def queue_of(count, kept=()):
    mask = none_of(count)
    mask[list(kept)] = True
    return PrefetchQueue(np.ones(count, np.int64), mask)


def prefetch_over(tier, depth):
    """A prefetch that moves the lists in order of their numbers."""
    (prefetch,) = Prefetcher(tier).start([np.arange(tier.nlist)], depth, depth, none_of(tier.nlist))
    return prefetch


def started(tier):
    return [number for number, _arrived in tier.started]


# Orders


def test_interleave_takes_everyones_first_choice_first():
    assert interleave([np.array([3, 1, 2, 0]), np.array([2, 3, 0, 1])]).tolist() == [3, 2, 1, 0]
    assert interleave([np.array([1, 0])]).tolist() == [1, 0]


@given(st.lists(st.permutations(range(9)), min_size=1, max_size=5))
def test_interleave_keeps_each_list_once_at_its_best_rank(rankings):
    merged = interleave([np.array(ranking) for ranking in rankings]).tolist()
    assert sorted(merged) == list(range(9))
    best = [min(ranking.index(number) for ranking in rankings) for number in merged]
    assert best == sorted(best)


def test_the_text_counts_more_as_it_grows():
    weights = [text_weight(fraction) for fraction in (0.0, *CHECKPOINTS, 1.0)]
    assert weights == sorted(weights)
    assert (weights[0], weights[-1]) == (0.0, 1.0)


def test_blend_goes_from_question_to_text():
    question, text = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(blend(question, text, 0.0), question)
    np.testing.assert_allclose(blend(question, text, 1.0), text)
    weight = text_weight(0.25)
    middle = np.array([1 - weight, weight]) / np.hypot(1 - weight, weight)
    np.testing.assert_allclose(blend(question, text, 0.25), middle, rtol=1e-6)
    assert np.linalg.norm(blend(question, 3 * text, 0.4)) == pytest.approx(3)


def test_a_new_order_is_due_once_a_checkpoint_and_seldom_when_the_link_is_idle():
    def looks(checkpoints):
        made = [0.0]
        for fraction in (tokens / 100 for tokens in range(1, 101)):
            if due(fraction, made[-1], checkpoints):
                made.append(fraction)
        return tuple(made[1:])

    assert looks(CHECKPOINTS) == CHECKPOINTS
    assert looks(PATIENT_CHECKPOINTS) == PATIENT_CHECKPOINTS
    assert set(PATIENT_CHECKPOINTS) < set(CHECKPOINTS)
    assert not due(0.99, 0.91, PATIENT_CHECKPOINTS)
    assert len(PATIENT_CHECKPOINTS) <= 3


def test_the_depth_grows_with_the_text():
    depths = [prefetch_depth(100, fraction, refining=True) for fraction in (0.0, *CHECKPOINTS)]
    assert depths == sorted(depths)
    assert depths[0] == 50
    assert depths[CHECKPOINTS.index(0.6) + 1] > 100  # in time for what the last order can no longer move
    assert depths[-1] < prefetch_depth(100, 0.0, refining=False) == 200


# Queues and prefetches


def test_a_queue_hands_out_the_best_absent_lists_within_its_depth():
    queue, absent = queue_of(6), ~none_of(6)
    assert queue.take(absent, 1) == []
    queue.reorder(np.array([5, 2, 0, 4, 1, 3]), 4)
    absent[2] = False
    handed = []
    while numbers := queue.take(absent, 1):
        handed += numbers
        absent[numbers] = False
    assert handed == [5, 0, 4]
    queue.reorder(np.array([1, 5, 3, 0, 2, 4]), 4)
    assert queue.take(absent, 1) == [1]


def test_what_ranks_before_a_list_or_is_kept_may_not_leave_for_it():
    queue = queue_of(5, kept=[3])
    queue.reorder(np.array([4, 0, 2, 1, 3]), 5)
    assert np.flatnonzero(queue.protected()(2)).tolist() == [0, 3, 4]
    assert (queue.priority.argmax(), queue.priority.argmin()) == (4, 3)


def test_a_prefetch_keeps_the_link_as_deep_as_it_wants_and_follows_new_orders():
    tier = StubTier(8, depth=2)
    prefetch = prefetch_over(tier, 8)
    assert started(tier) == [0, 1]
    tier.finish(0)
    assert started(tier) == [0, 1, 2]
    prefetch.follow(np.arange(8)[::-1], 8)
    tier.finish(1)
    assert started(tier) == [0, 1, 2, 7]
    prefetch.stop()
    tier.finish(2)
    prefetch.follow(np.arange(8), 8)
    assert len(tier.started) == 4
    assert prefetch.moved == [0, 1, 2]
    assert len(prefetch.orders) == 2
    assert prefetch.bytes_moved == prefetch.window.bytes_moved + PAGE_BYTES == 3 * PAGE_BYTES


def test_a_prefetch_is_idle_when_its_order_is_followed_to_the_end():
    tier = StubTier(8, depth=2)
    prefetch = prefetch_over(tier, 2)
    assert not prefetch.idle
    tier.finish(0)
    tier.finish(1)
    assert prefetch.idle
    assert len(tier.started) == 2
    prefetch.follow(np.arange(8), 3)
    assert not prefetch.idle


def test_a_full_arena_ends_an_order_and_a_new_one_tries_again():
    tier = StubTier(8, depth=2, full=True)
    prefetcher = Prefetcher(tier)
    (prefetch,) = prefetcher.start([np.arange(8)], 8, 8, none_of(8))
    tier.full = False
    prefetcher.fill()
    assert tier.started == []
    prefetch.follow(np.arange(8), 8)
    assert len(tier.started) == 2


def test_moves_may_end_in_many_threads():
    tier = StubTier(64, depth=4)
    prefetch = prefetch_over(tier, 64)
    with ThreadPoolExecutor(4) as threads:
        for first in range(0, 64, 4):  # each four that end start the next four
            list(threads.map(tier.finish, range(first, first + 4)))
    assert sorted(prefetch.moved) == list(range(64))


# Accounting


@settings(deadline=None, max_examples=200)
@given(
    pages=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    holes=st.sets(st.integers(0, 29)),
    wanted=st.integers(1, 8),
    count=st.integers(1, 6),
    fixed=st.sets(st.integers(0, 29)),
    data=st.data(),
)
def test_runs_make_room_apart_from_each_other(pages, holes, wanted, count, fixed, data):
    arena = Arena((sum(pages) + 2) * PAGE_BYTES)
    offsets = [arena.allocate(size * PAGE_BYTES, owner) for owner, size in enumerate(pages)]
    for owner in holes & set(range(len(pages))):
        arena.release(offsets[owner])
    arena.check_integrity()
    cost = np.array([np.inf if owner in fixed else data.draw(st.floats(0, 9)) for owner in range(len(pages))])
    while arena.allocate(wanted * PAGE_BYTES, len(cost)) is not None:  # until no gap is large enough
        cost = np.append(cost, 1.0)
    slots = arena.slots()
    runs = arena.cheapest_runs(wanted * PAGE_BYTES, cost, count)

    def gap(first, last):
        begin = sum(slots[first - 1][:2]) if first else 0
        return (slots[last + 1][0] if last + 1 < len(slots) else arena.nbytes) - begin

    def price(first):
        """Of the shortest run from this slot on that makes room."""
        enough = (last for last in range(first, len(slots)) if gap(first, last) >= wanted * PAGE_BYTES)
        last = next(enough, None)
        return np.inf if last is None else sum(cost[owner] for *_, owner in slots[first : last + 1])

    cheapest = min(map(price, range(len(slots))), default=np.inf)
    assert len(runs) <= count
    assert bool(runs) == (cheapest < np.inf)
    if runs:
        assert sum(cost[runs[0]]) == pytest.approx(cheapest)
    places = {owner: place for place, (*_, owner) in enumerate(slots)}
    held = [range(places[run[0]], places[run[-1]] + 1) for run in runs]
    for there, run in zip(held, runs, strict=True):
        assert [slots[place][2] for place in there] == run
        assert gap(there[0], there[-1]) >= wanted * PAGE_BYTES
        assert np.isfinite(cost[run]).all()
    taken = [place for there in held for place in there]
    assert len(set(taken)) == len(taken)
    for place in taken:
        arena.release(slots[place][0])
    for new in range(len(runs)):
        assert arena.allocate(wanted * PAGE_BYTES, len(cost) + new) is not None
    arena.check_integrity()


def test_room_is_made_for_several_lists_at_once_and_for_one_if_that_is_all():
    list_bytes, policy = np.full(12, PAGE_BYTES), make_policy(CacheKind.NONE, 12)
    residency = Residency(list_bytes, Arena(6 * PAGE_BYTES), policy, lambda _list_no: None)

    def absent():
        return set(np.flatnonzero(residency.state == ABSENT).tolist())

    assert len(residency.reserve(list(range(6)))) == 6
    residency.commit(np.arange(6))
    priority = np.arange(12) / 12  # the first are worth least
    assert len(residency.reserve([6, 7], priority=priority)) == 2
    residency.check_integrity()
    assert absent() & set(range(6)) == {0, 1}
    # For the last nothing may leave; the first still finds room.
    protected = {8: np.arange(12) != 2, 9: np.ones(12, np.bool_)}
    assert len(residency.reserve([8, 9], protected=lambda number: protected[number])) == 1
    assert 2 in absent()
    residency.check_integrity()


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=2, max_size=20),
    pages=st.integers(6, 40),
    kind=st.sampled_from(CacheKind),
    steps=st.lists(
        st.tuples(st.sampled_from(["reserve", "commit", "abort", "hold", "drop", "round", "used"]), st.integers(0, 19)),
        max_size=80,
    ),
)
def test_residency_never_loses_count(sizes, pages, kind, steps):
    list_bytes = np.array(sizes, np.int64) * PAGE_BYTES
    residency = Residency(list_bytes, Arena(pages * PAGE_BYTES), make_policy(kind, len(sizes)), lambda _list_no: None)
    held = dict.fromkeys(range(len(sizes)), 0)
    for step, which in steps:
        number = which % len(sizes)
        state = residency.state[number]
        if step == "reserve" and state == ABSENT:
            stuck = [n for n in held if held[n] or residency.state[n] == MOVING]
            if not residency.reserve([number]):
                assert any(list_bytes[n] for n in stuck), "an arena with nothing in use has room for any list"
            assert all(residency.state[n] != ABSENT for n in stuck), "a list in use was evicted"
        elif step in ("commit", "abort") and state == MOVING and not (step == "abort" and held[number]):
            getattr(residency, step)(np.array([number]))
        elif step == "hold" and state != ABSENT:
            residency.hold([number])
            held[number] += 1
        elif step == "drop" and held[number]:
            residency.drop([number])
            held[number] -= 1
        elif step == "round":
            kept = residency.new_round(0.5)
            assert list_bytes[kept].sum() <= 0.5 * pages * PAGE_BYTES
        elif step == "used":
            residency.policy.used(np.array([number]))
        residency.check_integrity()
