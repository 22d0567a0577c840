"""Micro-batches hold each query once, replicas get each micro-batch once, and nobody waits for ever."""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telerag_cli.config import PlacementName
from telerag_cli.engine import grouping
from telerag_cli.engine.dispatch import (
    LOOKED_AT,
    MAX_WAITS,
    CacheAware,
    Dispatcher,
    Greedy,
    Offer,
    ReplicaState,
    RoundRobin,
    make_placement,
)
from telerag_cli.engine.grouping import arrival, likely, similar
from telerag_cli.engine.micro_batch import MicroBatch

NLIST = 12


# Micro-batches


def vectors_of(kind, count, seed=0, dimension=8):
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, dimension)).astype(np.float32)
    if kind == "identical":
        vectors[:] = vectors[:1]
    elif kind == "zero":
        vectors[:] = 0
    elif kind == "some zero":
        vectors[::2] = 0
    elif kind == "few":
        vectors = vectors[random.integers(0, max(count // 4, 1), count)] if count else vectors
    return vectors


def topics(count, each, seed=0):
    """Vectors around ``count`` directions, shuffled, and which is which."""
    random = np.random.default_rng(seed)
    centres = np.eye(count, 16, dtype=np.float32)
    topic = random.permutation(np.repeat(np.arange(count), each))
    return centres[topic] + random.normal(0, 0.05, (len(topic), 16)).astype(np.float32), topic


def worth(vectors, batches):
    """What `similar` should make large: cosines within and between micro-batches, fading with the distance."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    place = np.empty(len(vectors), int)
    for number, batch in enumerate(batches):
        place[batch] = number
    apart = np.abs(place[:, None] - place)
    closeness = np.where(apart <= grouping.HORIZON, grouping.FADING**apart, 0)
    return float(((unit @ unit.T) * closeness).sum())


@given(
    kind=st.sampled_from(["any", "identical", "zero", "some zero", "few"]),
    count=st.integers(0, 40),
    size=st.integers(1, 9),
    ran=st.integers(0, 12),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=150)
def test_each_query_is_in_one_micro_batch_and_all_but_the_last_are_full(kind, count, size, ran, seed):
    vectors, before = vectors_of(kind, count, seed), vectors_of("any", ran, seed + 1)
    for batches in (arrival(count, size), similar(vectors, size), similar(vectors, size, before)):
        assert sorted(place for batch in batches for place in batch.tolist()) == list(range(count))
        assert all(len(batch) == size for batch in batches[:-1])
        assert all(batch.dtype == np.int64 and len(batch) for batch in batches)
        assert len(batches) == -(-count // size)
    assert list(map(list, batches)) == list(map(list, similar(vectors.copy(), size, before)))


def test_queries_of_a_topic_run_together_and_their_micro_batches_follow_each_other():
    vectors, topic = topics(4, 12, seed=2)
    assert all(len(set(topic[batch])) == 1 for batch in similar(vectors, 4))
    order = [int(topic[batch[0]]) for batch in similar(vectors, 4)]
    assert sum(one != other for one, other in pairwise(order)) == 3


def test_a_batch_goes_on_where_the_one_before_it_ended():
    vectors, topic = topics(4, 8)
    for last in range(4):
        before = np.eye(4, 16, dtype=np.float32)[[(last + 1) % 4] * 4 + [last] * 4]
        assert topic[similar(vectors, 4, before)[0]].tolist() == [last] * 4


def test_no_exchange_of_two_queries_would_be_better():
    vectors = vectors_of("any", 24, 5)
    batches = similar(vectors, 4)
    best = worth(vectors, batches)
    order = np.concatenate(batches)
    for one, other in combinations(range(24), 2):
        tried = order.copy()
        tried[[one, other]] = tried[[other, one]]
        assert worth(vectors, tried.reshape(-1, 4)) <= best + 1e-3


def test_windows_and_blocks_are_as_good_as_everything_at_once(monkeypatch):
    vectors, _topic = topics(12, 20, seed=1)
    whole = worth(vectors, similar(vectors, 4))
    monkeypatch.setattr(grouping, "TOGETHER", 16)
    assert worth(vectors, similar(vectors, 4)) > 0.97 * whole
    monkeypatch.setattr(grouping, "MOST", 100)
    batches = similar(vectors, 4)
    assert sorted(np.concatenate(batches)) == list(range(240))
    assert all(set(batch // 100) == {batch[0] // 100} for batch in batches)


def test_many_queries_are_put_together_quickly():
    import time

    vectors = vectors_of("any", 2048, dimension=64)
    began_s = time.process_time()
    similar(vectors, 4)
    assert time.process_time() - began_s < 3  # a tenth of it here; any loop over pairs takes longer


def test_likely_lists_are_compared_by_their_bytes():
    list_bytes = np.array([4096, 8192, 4096, 0])
    vectors = likely(np.array([[0, 1], [1, 2], [3, 2]]), 1, list_bytes)
    assert vectors.shape == (3, 4)
    products = vectors @ vectors.T
    assert products[0, 1] == pytest.approx(8192 * 0.5)  # one ranks it first, the other second
    assert products[0, 2] == 0
    assert products[0, 0] == pytest.approx(4096 + 8192 * 0.25)


# Dispatch


def batch_of(number, lists=()):
    mask = np.zeros(NLIST, np.bool_)
    mask[list(lists)] = True
    return MicroBatch(number=number, members=(number,), lists=mask)


def mask_of(*lists):
    return batch_of(0, lists).lists


def dispatcher(name=PlacementName.CACHE_AWARE):
    return Dispatcher(np.full(NLIST, 4096), make_placement(name))


@dataclass
class _Alive:
    """What a replica has in hand, and what it last said."""

    said: np.ndarray
    in_hand: list


@pytest.mark.parametrize("name", list(PlacementName))
@given(
    count=st.integers(0, 40),
    replicas=st.integers(1, 5),
    most_free=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_each_micro_batch_runs_once_whatever_happens(name, count, replicas, most_free, density, seed):
    random = np.random.default_rng(seed)
    queue = dispatcher(name)
    coming = [batch_of(number, np.flatnonzero(random.random(NLIST) < density)) for number in range(count)]
    alive = {number: _Alive(mask_of(), []) for number in range(replicas)}
    left, done = Counter(), set()
    order, passed = [], Counter()  # what waits, and how often each was passed over
    while len(done) < count:
        some = int(random.integers(0, len(coming) + 1))
        queue.add(coming[:some])
        order += [batch.number for batch in coming[:some]]
        del coming[:some]
        states = [
            ReplicaState(number, int(random.integers(0, most_free + 1)), each.said, tuple(each.in_hand))
            for number, each in alive.items()
        ]
        waited = queue.waiting
        given_now = queue.assign(states)
        assert queue.waiting == waited - len(given_now)
        assert queue.waiting == 0 or len(given_now) == sum(state.free for state in states)
        for state in states:
            assert sum(replica == state.replica for replica, _batch in given_now) <= state.free
        for replica, batch in given_now:
            left[batch.number] += 1
            alive[replica].in_hand.append(batch)
            place = order.index(batch.number)
            passed.update(order[:place])
            del order[place], passed[batch.number]
        # In so many rounds at most, in each of which every replica takes one at most.
        assert all(each <= MAX_WAITS * replicas for each in passed.values())
        for each in alive.values():
            if random.random() < 0.5 and each.in_hand:
                ended = each.in_hand.pop(0)
                done.add(ended.number)
                each.said = each.said | ended.lists
    assert queue.waiting == 0
    assert left == Counter(range(count))


AWARE, GREEDY, IN_TURN = PlacementName.CACHE_AWARE, PlacementName.GREEDY, PlacementName.ROUND_ROBIN


@pytest.mark.parametrize(
    ("name", "waiting", "replicas", "expected"),
    [
        # Where their lists are, or where they come.
        (AWARE, [[0, 1], [4, 5], [8, 9]], {5: (1, [8, 9]), 6: (1, [0, 1]), 7: (1, [4])}, [(5, 2), (6, 0), (7, 1)]),
        (AWARE, [[0, 1], [4, 5]], {0: (1, [], [4, 5]), 1: (1, [], [0, 1])}, [(0, 1), (1, 0)]),
        # What is given in the same call counts too.
        (AWARE, [[0, 1], [7], [0, 1], [7]], {0: (2, [7]), 1: (2, [])}, [(0, 1), (0, 3), (1, 0), (1, 2)]),
        # What suits a busy replica is left for it, unless nothing else is left.
        (AWARE, [[0, 1, 2], [5]], {0: (0, [0, 1, 2]), 1: (1, [])}, [(1, 1)]),
        (AWARE, [[0, 1, 2]], {0: (0, [0, 1, 2]), 1: (1, [])}, [(1, 0)]),
        # A replica keeps to the order of its share.
        (AWARE, [[0, 3], [0, 1], [0, 1, 2]], {0: (3, [0, 1, 2])}, [(0, 0), (0, 1), (0, 2)]),
        # The first takes the place that the second needs more, which cache-aware does better.
        (GREEDY, [[0], [0, 1, 2], [7]], {0: (1, [5]), 1: (1, [0, 1, 2])}, [(0, 1), (1, 0)]),
        (AWARE, [[0], [0, 1, 2]], {0: (1, [5]), 1: (1, [0, 1, 2])}, [(0, 0), (1, 1)]),
        (IN_TURN, [[7], [0]], {0: (1, [0]), 1: (0, []), 2: (1, [7])}, [(0, 0), (2, 1)]),
        *((name, [[1, 2]] * 3, dict.fromkeys(range(3), (1, [])), [(0, 0), (1, 1), (2, 2)]) for name in PlacementName),
        *((name, [[1]], {0: (0, [])}, []) for name in PlacementName),
        *((name, [], {0: (3, [])}, []) for name in PlacementName),
    ],
)
def test_each_placement(name, waiting, replicas, expected):
    queue = dispatcher(name)
    queue.add(batch_of(number, lists) for number, lists in enumerate(waiting))
    states = [
        ReplicaState(number, free, mask_of(*resident), tuple(batch_of(90, lists) for lists in under_way))
        for number, (free, resident, *under_way) in replicas.items()
    ]
    given_now = [(replica, batch.number) for replica, batch in queue.assign(states)]
    assert sorted(given_now) == expected
    if len(replicas) == 1:
        assert given_now == expected


def test_round_robin_goes_on_after_the_last_that_got_one():
    turns = RoundRobin()
    free = np.array([True, True, True])
    offer = Offer(np.zeros((3, 1)), np.zeros(3), free, 0)
    assert [turns.choose(offer) for _ in range(4)] == [[(0, 0)], [(1, 0)], [(2, 0)], [(0, 0)]]


def test_nobody_waits_for_ever():
    queue = dispatcher()
    unwanted = batch_of(0, [7, 8, 9, 10, 11])
    queue.add([unwanted])
    order = []
    # The replica that it suits never gets free, and others suit the one that does better.
    busy = ReplicaState(0, 0, unwanted.lists)
    queue.add([batch_of(1, [0, 1])])
    for number in range(2, MAX_WAITS + 3):
        queue.add([batch_of(number, [0, 1])])
        order += [batch.number for _replica, batch in queue.assign([busy, ReplicaState(1, 1, mask_of(0, 1))])]
    assert order == [*range(1, MAX_WAITS + 1), 0]


@given(
    cost=st.integers(1, 5).flatmap(
        lambda count: st.lists(
            st.lists(st.integers(0, 9), min_size=count, max_size=count), min_size=count, max_size=count
        )
    )
)
@settings(deadline=None, max_examples=80)
def test_cache_aware_moves_the_fewest_bytes_when_all_are_free(cost):
    to_move = np.array(cost, np.float64)
    count = len(to_move)
    offer = Offer(to_move, np.zeros(count), np.ones(count, np.bool_), 0)
    least = min(sum(to_move[row, column] for row, column in enumerate(each)) for each in permutations(range(count)))
    assert sum(to_move[pair] for pair in CacheAware().choose(offer)) == least
    assert sum(to_move[pair] for pair in Greedy().choose(offer)) >= least


def test_the_least_loaded_gets_more_of_what_suits_all():
    offer = Offer(np.full((3, 2), 10.0), np.array([5.0, 0.0, 1.0]), np.ones(3, np.bool_), 0)
    assert sorted(replica for replica, _batch in CacheAware().choose(offer)) == [1, 2]
    assert [replica for replica, _batch in Greedy().choose(offer)] == [1, 2]


class Chosen:
    """A placement that answers what a test says, and keeps what it was offered."""

    def __init__(self, *pairs):
        self.pairs, self.offered = list(pairs), []

    def choose(self, offer):
        self.offered.append(offer.to_move.shape)
        return self.pairs


def test_only_the_oldest_are_looked_at():
    placement = Chosen((0, 0))
    queue = Dispatcher(np.full(NLIST, 4096), placement)
    queue.add(batch_of(number, [0]) for number in range(LOOKED_AT + 1))
    queue.assign([ReplicaState(0, 1, mask_of(1))])
    assert placement.offered == [(1, LOOKED_AT)]
