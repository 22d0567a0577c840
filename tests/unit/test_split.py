"""Who deals with misses: the split of a row of lists between link and processor."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telerag_cli.retrieval.split import ContentionEstimate, Ends, Misses, ends_by_share_s

times = st.lists(st.floats(1e-6, 1.0), min_size=0, max_size=12)


@given(link=times, busy=st.tuples(st.floats(0, 2), st.floats(0, 2)), data=st.data())
def test_when_both_ends_are_done_with_every_share_of_the_link(link, busy, data):
    place = data.draw(st.lists(st.floats(1e-6, 1.0), min_size=len(link), max_size=len(link)))

    def ends(count):
        return max(busy[0] + sum(link[:count]), busy[1] + sum(place[count:]))

    found = ends_by_share_s(np.array(link), np.array(place), *busy)
    assert found.tolist() == pytest.approx([ends(count) for count in range(len(link) + 1)])


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
    best_s = min(link_s.sum(), place_s.sum())
    assert took_s <= 1.05 * best_s + link_s.max()


def test_many_equal_lists_are_split_by_the_rates():
    link_s, place_s = np.full(100, 1.0), np.full(100, 3.0)
    took_s, took = finish(Misses(list(range(100)), link_s, place_s, 1), link_s, place_s, 4)
    assert took_s <= 1.05 * 75
    assert 22 <= len(took["place"]) <= 28


def test_what_many_queries_share_is_moved_and_what_one_wants_is_scored_in_place():
    link_s, place_s = np.full(4, 1.0), np.array([1.0, 4.0, 1.0, 4.0])
    misses = Misses([10, 11, 12, 13], link_s, place_s, 1)
    assert misses.for_link(1) == [11]
    assert misses.in_place() == [12]


@pytest.mark.parametrize(
    "place_s", [0.5, 3.0, 20.0]
)  # the processor faster than the link, about as fast, and much slower
@pytest.mark.parametrize("slowdown", [0.9, 1.0, 1.3, 4.0])
def test_ends_that_slow_each_other_are_soon_told_apart_and_tried_again_now_and_then(slowdown, place_s):
    together, lists = ContentionEstimate(), list(range(100))
    link_s, place_s = np.full(100, 1.0), np.full(100, place_s)
    took_s, ends = [], []
    for _ in range(200):
        misses = Misses(lists, link_s, place_s, 1, slowdown=together.slowdown)
        ends.append(misses.ends)
        if misses.ends is Ends.BOTH:
            took_s.append(slowdown * misses.expected_s)
            together.observe(misses.expected_s, took_s[-1])
        else:
            took_s.append((link_s if misses.ends is Ends.LINK else place_s).sum())
            together.fade()
    best_s = min(link_s.sum(), place_s.sum(), slowdown * misses.expected_s)
    assert np.median(took_s) <= 1.05 * best_s
    assert np.mean(took_s) <= 1.05 * best_s
    if slowdown == 4.0:
        assert 2 <= ends.count(Ends.BOTH) <= 12


def test_an_end_that_is_alone_takes_all_at_once_but_what_fails_or_finds_no_room():
    link_s, place_s = np.full(10, 1.0), np.full(10, 0.9)
    misses = Misses(list(range(10)), link_s, place_s, 1, slowdown=3.0)
    assert misses.ends is Ends.IN_PLACE
    assert misses.for_link(10) == []
    assert sorted(misses.in_place()) == list(range(10))
    misses = Misses(list(range(10)), link_s, 2 * place_s, 1, slowdown=3.0)
    assert misses.ends is Ends.LINK
    assert misses.in_place() == []
    assert len(misses.for_link(4)) == 4
    misses.refused(misses.for_link(6)[2:])
    misses.failed([0])
    rest = misses.in_place() + misses.in_place() + misses.in_place()
    assert len(rest) == len(set(rest)) == 5


def test_those_refused_may_lie_anywhere_among_what_the_link_took():
    misses = Misses([5, 3, 8, 1], np.array([1.0, 2.0, 3.0, 4.0]), np.full(4, 1e3), 1)
    assert misses.for_link(4) == [5, 3, 8, 1]
    misses.refused([3, 1])
    assert sorted(misses.in_place() + misses.in_place()) == [1, 3]
    assert not len(misses)


def test_what_finds_no_room_is_scored_in_place_until_there_is_room():
    misses = Misses([1, 2, 3, 4], np.full(4, 1.0), np.full(4, 100.0), 1)
    taken = misses.for_link(4)
    misses.refused(taken[1:])
    assert misses.for_link(4) == []
    assert len(misses.in_place()) == 2
    misses.room()
    assert len(misses) == 1
    assert len(misses.for_link(4)) == 1


def test_what_cannot_be_moved_is_scored_in_place():
    misses = Misses([1, 2], np.full(2, 1.0), np.full(2, 1e9), 1)
    assert misses.for_link(2) == [1, 2]
    misses.failed([2])
    assert len(misses) == 1
    assert misses.in_place() == [2]
    assert misses.in_place() == []


def test_a_link_that_could_not_begin_in_time_gets_nothing_and_the_processor_all_at_once():
    misses = Misses(list(range(10)), np.full(10, 0.01), np.full(10, 0.1), 1, latency_s=2.0)
    assert misses.for_link(10) == []
    assert misses.in_place() == list(range(10))
    patient = Misses(list(range(10)), np.full(10, 0.01), np.full(10, 0.1), 1, latency_s=0.25)
    assert len(patient.for_link(10)) == 7  # 0.25 + 7 * 0.01 s beside 3 * 0.1 s
    assert len(patient.in_place()) == 2
