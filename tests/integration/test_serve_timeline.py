"""What is drawn under an answer: the LLM, the link, scoring and embedding of one request."""

import asyncio
import json
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexes import make_index, make_vectors
from telerag_cli.config import PAGE_BYTES, Lookahead, Metric, PipelineName, Storage
from telerag_cli.engine.engine import AskResult
from telerag_cli.engine.session import Stage
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generation, Message, Request
from telerag_cli.pipelines.hyde import PASSAGE_TOKENS
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.prefetch.prefetcher import FollowedOrder
from telerag_cli.retrieval.report import JoinReport, JoinTrace
from telerag_cli.retrieval.retriever import Retrieval, Retriever, Search
from telerag_cli.server.timeline import COUNTS, MAX_BARS, MAX_LANES, timeline
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.tiers.rates import JoinRates
from telerag_cli.tracing import Span, Tracer

PASSAGE = " ".join(["owls number 3 live in place 8 and eat food 3 as is well known to all who see them"] * 6)
ANSWER = "owls number 3 live in place 8. [1]"
QUESTION = "Where do owls live?"


def script(request):
    return PASSAGE if "passage that answers" in request.messages[-1].content else ANSWER


@pytest.fixture
def traced(engine_of):
    """Makes engines whose arena holds everything and whose tracer can be listened to."""
    return partial(engine_of, arena=1.0, tracer=Tracer(enabled=False))


async def ask(engine, name=PipelineName.HYDE, question=QUESTION):
    """An answer and its timeline."""
    with engine.tracer.listening() as spans:
        began_s = time.perf_counter()
        answered = await engine.aask(question, pipeline=make_pipeline(name))
        ended_s = time.perf_counter()
    return answered, timeline(answered, spans, began_s, ended_s)


def asked(engine, name=PipelineName.HYDE, question=QUESTION):
    return asyncio.run(ask(engine, name, question))


def bars_of(drawn, kind):
    return [bar for lane in drawn["lanes"] if lane["kind"] == kind for bar in lane["bars"]]


def lists_of(drawn, outcome):
    return sorted(bar["list"] for bar in bars_of(drawn, "link") if bar["outcome"] == outcome)


def spans_of(*moves):
    """Spans of the link: (lane, list, start, end), of five bytes each."""
    return [Span(lane, f"list {n}", start, end, {"list": n, "bytes": 5}) for lane, n, start, end in moves]


def check(drawn, joins):
    """What holds for every timeline."""
    json.dumps(drawn, allow_nan=False)
    total_s, counts = drawn["total_s"], drawn["counts"]
    for lane in drawn["lanes"]:
        assert lane["bars"]
        assert all(0 <= bar["start_s"] <= bar["end_s"] <= total_s and bar["label"] for bar in lane["bars"])
    moments_s = [mark["at_s"] for mark in drawn["marks"]]
    assert moments_s == sorted(moments_s)
    assert all(0 <= at_s <= total_s for at_s in moments_s)
    for name in COUNTS:
        assert counts[name] == sum(getattr(join, name) for join in joins)
    lists = Counter()
    for bar in bars_of(drawn, "link"):
        lists[bar["outcome"]] += bar["lists"]
    fetched = sum(len(join.trace.fetched) for join in joins)
    assert lists.total() + counts["lists_undrawn"] == counts["lists_moved"] + fetched
    if not counts["lists_undrawn"]:
        assert lists["wasted"] == counts["lists_wasted"]
        assert lists["hit"] == counts["lists_moved"] - counts["lists_wasted"]
        assert lists["missed"] == fetched <= counts["lists_missed"]
    assert max(Counter(lane["kind"] for lane in drawn["lanes"]).values(), default=0) <= MAX_LANES


def test_a_list_moved_ahead_is_a_hit_or_wasted(traced):
    engine = traced(script, token_s=0.001)
    answered, drawn = asked(engine)
    check(drawn, answered.joins)
    trace = answered.joins[0].trace
    assert lists_of(drawn, "hit") == sorted(set(trace.wanted) & set(trace.moved))
    assert lists_of(drawn, "wasted") == sorted(set(trace.moved) - set(trace.wanted))
    assert lists_of(drawn, "hit")
    assert lists_of(drawn, "wasted")
    assert lists_of(drawn, "missed") == sorted(trace.fetched)
    assert drawn["counts"]["lists_undrawn"] == 0
    list_bytes = engine.retriever.tier.list_bytes
    assert all(bar["bytes"] == list_bytes[bar["list"]] for bar in bars_of(drawn, "link"))
    passage, answer = bars_of(drawn, "llm")
    assert (passage["stage"], answer["stage"]) == ("passage", "answer")
    assert passage["completion_tokens"] == PASSAGE_TOKENS < len(PASSAGE.split())
    kinds = [mark["kind"] for mark in drawn["marks"]]
    assert kinds[0] == "lookahead"
    assert kinds[-1] == "query"
    assert kinds.count("refinement") == answered.joins[0].orders - 1 > 0
    assert all(mark["label"].endswith(" % of the text") for mark in drawn["marks"] if mark["kind"] == "refinement")
    query_s = drawn["marks"][-1]["at_s"]
    assert passage["end_s"] <= query_s <= answer["start_s"]
    # Moved while the passage was written, scored once the query was there.
    assert min(bar["end_s"] for bar in bars_of(drawn, "link")) < passage["end_s"]
    assert all(query_s <= bar["start_s"] <= bar["end_s"] <= answer["start_s"] for bar in bars_of(drawn, "scoring"))
    assert sum(bar.get("lists", 0) for bar in bars_of(drawn, "scoring")) == answered.joins[0].lists_wanted
    assert [bar["end_s"] for bar in bars_of(drawn, "embedding")] == [query_s]
    assert [lane["name"] for lane in drawn["lanes"] if lane["kind"] == "llm"] == ["LLM"]


def test_without_lookahead_every_list_is_missed_once_and_then_it_is_there(traced):
    engine = traced(script, Lookahead.OFF)
    answered, drawn = asked(engine)
    check(drawn, answered.joins)
    assert lists_of(drawn, "missed") == answered.joins[0].trace.wanted.tolist()
    assert not lists_of(drawn, "hit")
    assert not lists_of(drawn, "wasted")
    assert [mark["kind"] for mark in drawn["marks"]] == ["query"]
    arrived_s = drawn["marks"][0]["at_s"]
    assert all(bar["start_s"] >= arrived_s for bar in bars_of(drawn, "link"))
    answered, drawn = asked(engine)
    check(drawn, answered.joins)
    assert not bars_of(drawn, "link")
    assert drawn["counts"]["lists_hit"] == drawn["counts"]["lists_wanted"] > 0


def test_requests_beside_each_other_see_their_own_moves_only(traced):
    engine = traced(script, Lookahead.QUESTION, token_s=0.002)

    async def together():
        questions = ("Where do owls live?", "What do bees eat?", "Where do rats live?", "What do eels eat?")
        return await asyncio.gather(*(ask(engine, question=question) for question in questions))

    results = asyncio.run(together())
    seen = []
    for answered, drawn in results:
        check(drawn, answered.joins)
        assert [bar["stage"] for bar in bars_of(drawn, "llm")] == ["passage", "answer"]
        assert len([mark for mark in drawn["marks"] if mark["kind"] == "query"]) == 1
        scored = sum(bar.get("lists", 0) for bar in bars_of(drawn, "scoring"))
        assert scored == answered.joins[0].lists_wanted
        seen += lists_of(drawn, "hit") + lists_of(drawn, "wasted")
    # The arena holds everything, so each list was moved once, for one of them.
    assert len(seen) == len(set(seen))
    assert sum(drawn["counts"]["lists_moved"] for _answered, drawn in results) == len(seen)


def test_moves_that_nobody_listened_to_are_counted_as_undrawn(traced):
    engine = traced(script, token_s=0.001)
    began_s = time.perf_counter()
    answered = asyncio.run(engine.aask(QUESTION, pipeline=make_pipeline(PipelineName.HYDE)))
    drawn = timeline(answered, [], began_s, time.perf_counter())
    check(drawn, answered.joins)
    assert not bars_of(drawn, "link")
    moved = drawn["counts"]["lists_moved"] + len(answered.joins[0].trace.fetched)
    assert drawn["counts"]["lists_undrawn"] == moved > 0
    assert len(bars_of(drawn, "llm")) == 2


def test_a_search_knows_its_own_lists_of_a_join_that_both_ends_dealt_with(tmp_path):
    vectors = make_vectors(600, 16, 1)
    index, _ivf = make_index(tmp_path, vectors, 30, Metric.IP, Storage.FLOAT32)
    coarse = Coarse(index.centroids, Metric.IP)
    tier = open_cuda_tier(
        index,
        coarse,
        SimulatedGpu(),
        int(index.list_bytes.sum()),
        tracer=(tracer := Tracer(enabled=False)),
        rates=JoinRates(1e9, 1e9, 1e12, 0.0),
    )
    retriever = Retriever(index, coarse, tier)
    try:
        with tracer.listening() as spans:
            began_s = time.perf_counter()
            searches = [Search(vectors[:1]), Search(vectors[300:303])]
            found = retriever.search_batch(searches, 3, 6)
            ended_s = time.perf_counter()
    finally:
        retriever.close()
    for search, each in zip(searches, found, strict=True):
        report, trace = each.report, each.report.trace
        alone = np.unique(coarse.probe(search.queries, 6)[1])
        assert trace.wanted.tolist() == alone[index.list_bytes[alone] > 0].tolist()
        assert trace.scored.sum() == report.lists_wanted == report.lists_missed
        assert trace.scored[trace.scored_in_place].sum() == report.lists_in_place
        assert set(trace.fetched) <= set(trace.wanted)
        assert len(trace.fetched) == report.lists_missed - report.lists_in_place
        assert (trace.scored > 0).all()
        drawn = timeline(answered_of([], [Retrieval(("q",), [], report, 0.0)]), spans, began_s, ended_s)
        check(drawn, [report])
        assert drawn["counts"]["lists_undrawn"] == 0
    both = sum(each.report.lists_in_place for each in found)
    assert 0 < both < sum(each.report.lists_missed for each in found)


# A request made up of numbers.

NLIST = 12
moments = st.floats(-0.5, 2.0, allow_nan=False)


@st.composite
def requests(draw):
    """(answered, spans, began_s, ended_s): retrievals whose moves have spans, and spans of others around them."""
    began_s = draw(st.floats(0.0, 1e6, allow_nan=False))
    retrievals, spans = [], []
    for _ in range(draw(st.integers(0, 3))):
        arrived_s = began_s + draw(moments)
        ended_s = arrived_s + draw(st.floats(0.0, 0.5))
        wanted = sorted(draw(st.sets(st.integers(0, NLIST - 1), min_size=1)))
        fetched = sorted(draw(st.sets(st.sampled_from(wanted))))
        moved, moved_s = [], []
        for number in draw(st.lists(st.integers(0, NLIST - 1), max_size=20)):
            arrival_s = min(arrived_s - 1e-3, began_s + draw(moments))
            spans.append(link_span(draw, number, arrival_s))
            moved.append(number)
            moved_s.append(arrival_s + draw(st.floats(0.0, 1e-4)))
        spans += [link_span(draw, number, draw(st.floats(arrived_s, ended_s))) for number in fetched]
        trace = trace_of(arrived_s, ended_s, wanted, moved, moved_s, fetched)
        retrievals.append(retrieval_of(trace))
    for _ in range(draw(st.integers(0, 5))):
        spans.append(link_span(draw, NLIST + 1, began_s + draw(moments)))
        spans.append(Span("LLM", "another's", began_s, began_s + 1.0, {"prompt_tokens": 1}))
    stages = [stage_of(began_s + draw(moments), draw(st.floats(0.0, 1.0))) for _ in range(draw(st.integers(0, 12)))]
    spans = draw(st.permutations(spans))
    return answered_of(stages, retrievals), spans, began_s, began_s + draw(st.floats(0.0, 2.0))


def link_span(draw, number, end_s):
    lane = draw(st.sampled_from(["link 0", "link 1"]))
    return Span(lane, f"list {number}", end_s - draw(st.floats(0.0, 0.3)), end_s, {"list": number, "bytes": PAGE_BYTES})


def trace_of(arrived_s, ended_s, wanted, moved, moved_s, fetched=()):
    scored_s = np.array([[arrived_s, ended_s]])
    orders = (FollowedOrder(arrived_s - 1.0, 0.0), FollowedOrder(arrived_s - 0.5, 0.3))
    return JoinTrace(
        arrived_s,
        ended_s,
        orders,
        np.array(wanted, np.int64),
        np.array(moved, np.int64),
        np.array(moved_s, np.float64),
        np.array(fetched, np.int64),
        scored_s,
        np.array([len(wanted)]),
        np.array([False]),
        0.0,
    )


def retrieval_of(trace):
    counts = dict.fromkeys(JoinReport.count_names(), 0) | {
        "lists_wanted": len(trace.wanted),
        "lists_hit": len(trace.wanted) - len(trace.fetched),
        "lists_missed": len(trace.fetched),
        "lists_moved": len(trace.moved),
        "lists_wasted": int((~np.isin(trace.moved, trace.wanted)).sum()),
        "bytes_moved": PAGE_BYTES * len(trace.moved),
        "bytes_missed": PAGE_BYTES * len(trace.fetched),
    }
    return Retrieval(("q",), [], JoinReport(**counts, coarse_s=0.0, score_s=0.0, join_s=0.0, trace=trace), 0.01)


def stage_of(began_s, took_s):
    generation = Generation("text", "stop", 3, 4, 0.1, 0.2)
    return Stage("answer", Request([Message("user", "x")], 4), generation, began_s, took_s, None)


def answered_of(stages, retrievals):
    return AskResult("x", "hyde", Lookahead.REFINED, "text", [], [], stages, retrievals, [], 0, {})


@settings(deadline=None, max_examples=60)
@given(requests())
def test_any_timeline_keeps_its_bounds_and_its_counts(made):
    answered, spans, began_s, ended_s = made
    drawn = timeline(answered, spans, began_s, ended_s)
    check(drawn, answered.joins)
    assert drawn["counts"]["lists_undrawn"] == 0
    assert len(bars_of(drawn, "llm")) == len(answered.stages)
    counts = drawn["counts"]
    assert sum(bar["bytes"] for bar in bars_of(drawn, "link")) == counts["bytes_moved"] + counts["bytes_missed"]
    assert NLIST + 1 not in {bar["list"] for bar in bars_of(drawn, "link")}


def test_a_lane_moves_in_turn_and_what_arrived_together_is_one_bar():
    another = ("link", 9, 1.0, 1.5)  # which these had to wait for
    waited = [("link", number, 1.1, 1.7) for number in (1, 2, 3)]
    spans = spans_of(("link", 0, 1.0, 1.2), another, *waited, ("link 2", 4, 1.1, 1.6))
    trace = trace_of(2.0, 2.1, [0, 1, 2, 4], [0, 1, 2, 3, 4], [1.2, 1.7, 1.7, 1.7, 1.6])
    drawn = timeline(answered_of([], [retrieval_of(trace)]), spans, 1.0, 3.0)
    check(drawn, [retrieval_of(trace).join])
    names = ("label", "outcome", "start_s", "end_s", "bytes")
    assert {tuple(bar[name] for name in names) for bar in bars_of(drawn, "link")} == {
        ("list 0", "hit", 0.0, 0.2, 5),
        ("2 lists", "hit", 0.5, 0.7, 10),
        ("list 3", "wasted", 0.5, 0.7, 5),
        ("list 4", "hit", 0.1, 0.6, 5),
    }


def test_scoring_says_what_is_done_and_where():
    trace = trace_of(2.0, 2.5, [0, 1, 2], [], [])
    trace = replace(
        trace,
        scored_s=np.array([[2.1, 2.2], [2.15, 2.3]]),
        scored=np.array([1, 2]),
        scored_in_place=np.array([False, True]),
        again_s=0.1,
    )
    retrieval = retrieval_of(trace)
    retrieval = replace(retrieval, queries=("a", "b"), join=replace(retrieval.join, coarse_s=0.05))
    drawn = timeline(answered_of([], [retrieval] * 2), [], 1.0, 3.0)
    shown = [
        (lane["name"], [(bar["label"], bar["start_s"], bar["end_s"]) for bar in lane["bars"]])
        for lane in timeline(answered_of([], [retrieval]), [], 1.0, 3.0)["lanes"]
    ]
    assert shown == [
        ("scoring", [("find lists", 1.0, 1.05), ("score 1 list", 1.1, 1.2), ("score again", 1.4, 1.5)]),
        ("scoring 2", [("score 2 lists in place", 1.15, 1.3)]),
        ("embedding", [("embed 2 queries", 0.99, 1.0)]),
    ]
    assert [mark["label"] for mark in drawn["marks"] if mark["kind"] == "query"] == [
        "retrieval 1: 2 queries arrive",
        "retrieval 2: 2 queries arrive",
    ]


def test_a_list_moved_twice_and_by_another_meanwhile_has_its_own_two_bars():
    spans = spans_of(*(("link", 0, end_s - 0.1, end_s) for end_s in (1.2, 1.4, 1.6, 1.8)))
    trace = trace_of(2.0, 2.1, [0], [0, 0], [1.4, 1.8])
    drawn = timeline(answered_of([], [retrieval_of(trace)]), spans, 1.0, 3.0)
    assert [bar["end_s"] for bar in bars_of(drawn, "link")] == [0.4, 0.8]


def test_many_moves_become_fewer_bars_that_lose_no_list():
    count = 9000
    ends_s = np.linspace(0.1, 1.0, count)
    spans = spans_of(*((f"link {n % 3}", n, end_s - 1e-4, end_s) for n, end_s in enumerate(ends_s.tolist())))
    wanted = list(range(0, count, 3))
    retrieval = retrieval_of(trace_of(1.0, 1.2, wanted, list(range(count)), ends_s))
    drawn = timeline(answered_of([], [retrieval]), spans, 0.0, 1.3)
    check(drawn, [retrieval.join])
    bars = bars_of(drawn, "link")
    assert len(bars) <= MAX_BARS
    assert sum(bar["bytes"] for bar in bars) == 5 * count
    assert max(bar["end_s"] - bar["start_s"] for bar in bars) < 2 * 1.3 / 500


def test_what_overlaps_too_much_shares_a_lane():
    answered = answered_of([stage_of(0.1 * n, 5.0) for n in range(11)], [])
    drawn = timeline(answered, [], 0.0, 7.0)
    assert [len(lane["bars"]) for lane in drawn["lanes"]] == [2, 2, 2, 1, 1, 1, 1, 1]
