"""Who deals with misses: the split of a row of lists between link and processor."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telerag_cli.retrieval.split import ContentionEstimate, Ends, Misses, ends_by_share_s

times = st.lists(st.floats(1e-6, 1.0), min_size=0, max_size=12)


def row(link_s, place_s, count=10, **how):
    """Lists 0, 1, ... of equal times for each end, one at a time in place."""
    return Misses(list(range(count)), np.full(count, link_s), np.full(count, place_s), 1, **how)


@given(link=times, busy=st.tuples(st.floats(0, 2), st.floats(0, 2)), data=st.data())
def test_when_both_ends_are_done_with_every_share_of_the_link(link, busy, data):
    place = data.draw(st.lists(st.floats(1e-6, 1.0), min_size=len(link), max_size=len(link)))
    found = ends_by_share_s(np.array(link), np.array(place), *busy)
    shares = range(len(link) + 1)
    assert found == pytest.approx([max(busy[0] + sum(link[:n]), busy[1] + sum(place[n:])) for n in shares])


def finish(misses, link_s, place_s, depth):
    """Run both ends to their end in made-up time, the link one list after the other; when, and who took what."""
    now, link_free, under_way, took = 0.0, 0.0, 0, {"link": [], "place": []}
    events = []
    scoring = False
    while True:
        if not scoring and (lists := misses.in_place()):
            scoring = True
            took["place"] += lists
            heapq.heappush(events, (now + sum(place_s[number] for number in lists), 1, "place"))
        while under_way < depth and (lists := misses.for_link(depth - under_way)):
            took["link"] += lists
            for number in lists:
                link_free = max(link_free, now) + link_s[number]
                heapq.heappush(events, (link_free, 0, "link"))
                under_way += 1
        if not events:
            return now, took
        now, _order, who = heapq.heappop(events)
        if who == "link":
            under_way -= 1
            misses.moved(busy=under_way > 0)
        else:
            scoring = False


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=60),
    faster=st.floats(0.02, 50.0),
    depth=st.integers(1, 16),
    grain=st.integers(1, 4),
    queries=st.lists(st.integers(1, 4), min_size=60, max_size=60),
    slowdown=st.sampled_from([0.8, 1.0, 1.5, 100.0]),
)
def test_two_ends_take_everything_once_and_no_longer_than_the_better_alone(
    sizes, faster, depth, grain, queries, slowdown
):
    link_s = np.array(sizes)
    place_s = link_s * faster * np.array(queries[: len(sizes)])
    misses = Misses(list(range(len(sizes))), link_s, place_s, grain, slowdown=slowdown)
    assert misses.ends is not Ends.BOTH or slowdown < 100
    took_s, took = finish(misses, link_s, place_s, depth)
    assert sorted(took["link"] + took["place"]) == list(range(len(sizes)))
    assert not len(misses)
    # Both ends take whole lists, and some at a time: that much either may be behind.
    assert took_s <= 1.05 * min(link_s.sum(), place_s.sum()) + link_s.max()


def test_many_equal_lists_are_split_by_the_rates():
    took_s, took = finish(row(1.0, 3.0, 100), np.full(100, 1.0), np.full(100, 3.0), 4)
    assert took_s <= 1.05 * 75
    assert 22 <= len(took["place"]) <= 28


def test_what_many_queries_share_is_moved_and_what_one_wants_is_scored_in_place():
    misses = Misses([10, 11, 12, 13], np.full(4, 1.0), np.array([1.0, 4.0, 1.0, 4.0]), 1)
    assert (misses.for_link(1), misses.in_place()) == ([11], [12])


@pytest.mark.parametrize(
    "place_s", [0.5, 3.0, 20.0]
)  # the processor faster than the link, about as fast, and much slower
@pytest.mark.parametrize("slowdown", [0.9, 1.0, 1.3, 4.0])
def test_ends_that_slow_each_other_are_soon_told_apart_and_tried_again_now_and_then(slowdown, place_s):
    contention = ContentionEstimate()
    alone_s = {Ends.LINK: 100.0, Ends.IN_PLACE: 100 * place_s}
    took_s, ends = [], []
    for _ in range(200):
        misses = row(1.0, place_s, 100, slowdown=contention.slowdown)
        ends.append(misses.ends)
        both_s = slowdown * misses.expected_s
        took_s.append(alone_s.get(misses.ends, both_s))
        if misses.ends is Ends.BOTH:
            contention.observe(misses.expected_s, both_s)
        else:
            contention.fade()
    best_s = min(*alone_s.values(), both_s)
    assert np.median(took_s) <= 1.05 * best_s
    assert np.mean(took_s) <= 1.05 * best_s
    if slowdown == 4.0:
        assert 2 <= ends.count(Ends.BOTH) <= 12


def test_an_end_that_is_alone_takes_all_at_once_but_what_fails_or_finds_no_room():
    misses = row(1.0, 0.9, slowdown=3.0)
    assert misses.ends is Ends.IN_PLACE
    assert misses.for_link(10) == []
    assert sorted(misses.in_place()) == list(range(10))
    misses = row(1.0, 1.8, slowdown=3.0)
    assert misses.ends is Ends.LINK
    assert misses.in_place() == []
    assert len(misses.for_link(4)) == 4
    misses.refused(misses.for_link(6)[2:])
    misses.failed([0])
    rest = misses.in_place() + misses.in_place() + misses.in_place()
    assert len(rest) == len(set(rest)) == 5


def test_what_finds_no_room_is_scored_in_place_until_there_is_room():
    misses = Misses([5, 3, 8, 1], np.array([1.0, 2.0, 3.0, 4.0]), np.full(4, 1e3), 1)
    assert misses.for_link(4) == [5, 3, 8, 1]
    misses.refused([3, 1])  # they may lie anywhere among what the link took
    assert misses.for_link(4) == []
    assert misses.in_place() in ([3], [1])
    misses.room()
    assert len(misses) == 1
    assert misses.for_link(4) in ([3], [1])
    assert not len(misses)


def test_what_cannot_be_moved_is_scored_in_place():
    misses = row(1.0, 1e9, 2)
    assert misses.for_link(2) == [0, 1]
    misses.failed([1])
    assert len(misses) == 1
    assert (misses.in_place(), misses.in_place()) == ([1], [])


def test_a_link_that_could_not_begin_in_time_gets_nothing_and_the_processor_all_at_once():
    misses = row(0.01, 0.1, latency_s=2.0)
    assert (misses.for_link(10), misses.in_place()) == ([], list(range(10)))
    patient = row(0.01, 0.1, latency_s=0.25)
    assert len(patient.for_link(10)) == 7  # 0.25 + 7 * 0.01 s beside 3 * 0.1 s
    assert len(patient.in_place()) == 2
