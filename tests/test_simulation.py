"""Simulated replicas against what can be worked out by hand, and against what must hold for any of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from telerag_cli.bench.simulating.clocks import Device
from telerag_cli.bench.simulating.deployment import Bottleneck, Deployment, simulate
from telerag_cli.bench.simulating.rates import Host, Rates
from telerag_cli.bench.simulating.replica import Tier
from telerag_cli.bench.simulating.work import Ahead, Follow, Lookup, Question, Text, copies
from telerag_cli.config import CacheKind, Metric, Storage
from telerag_cli.engine.placement import PlacementName
from telerag_cli.index.artifact import EmbedderInfo, Index, IndexPaths, Manifest, code_size, lay_out
from telerag_cli.planning.profile import DecodePoint, LlmRates, Measured, PrefillPoint

LIST = 4 * 4096
"""Bytes of each list of `index`."""
STEP_S, TOKEN_S = 0.01, 0.001
"""A step of decoding, and a token of a prompt."""


def index(nlist=16, vectors=4):
    """Lists of the same length; none of their bytes exist."""
    dimension = 1022  # so that a vector and its number are 4 KiB
    code = code_size(dimension, Storage.FLOAT32)
    table, _nbytes = lay_out(np.full(nlist, vectors), code)
    manifest = Manifest(dimension, Metric.IP, Storage.FLOAT32, nlist, nlist * vectors, code, 0, EmbedderInfo(None), {})
    return Index(IndexPaths(Path()), manifest, np.zeros((nlist, dimension), np.float32), table, None)


def exactly(value):
    return Measured(value, value, value, 1)


LLM = LlmRates(
    prefill=(PrefillPoint(100, exactly(100 * TOKEN_S)), PrefillPoint(200, exactly(200 * TOKEN_S))),
    decode=(DecodePoint(1, exactly(STEP_S)), DecodePoint(8, exactly(STEP_S))),
    decode_context=0,
    context_step_s=0.0,
)
RATES = Rates(
    llm=LLM,
    slots=8,
    chunk=512,
    llm_apart=True,
    link_bytes_per_s=1000 * LIST,
    beside_llm=1.0,
    transfer_s=0.0,
    decoding_slowed=1.0,
    scored_bytes_per_s=100 * LIST,
    another_query=1.0,
    in_place_bytes_per_s=0.0,
    join_s=0.002,
    query_s=0.003,
    sketch_s=0.0,
)
FREE = replace(RATES, join_s=0.0, query_s=0.0, scored_bytes_per_s=1e18)
"""Nothing takes time but the LLM and the link."""
ALONE = Host(1, 1e18)
TIER = Tier(16 * LIST, depth=2)


def text(picks, prompt=100, follows=()):
    return Text("text", prompt, 0, picks, follows)


def order(first, nlist=16):
    """All lists, these first."""
    first = list(first)
    return np.array([*first, *(each for each in range(nlist) if each not in first)], np.int64)


def question(number, steps, likely=(), nlist=16):
    mask = np.zeros(nlist, np.bool_)
    mask[list(likely)] = True
    return Question(number, order(likely, nlist), mask, tuple(steps))


def lookup(lists):
    return (Lookup((np.array(lists, np.int64),)),)


def hyde(number, lists, picks=11, ahead=None):
    """Write, look up these lists, answer; lookahead expects ``ahead``, or them."""
    expected = lists if ahead is None else ahead
    first = Ahead(order(expected), len(expected), True)
    return question(number, [first, (text(picks),), lookup(lists), (text(picks),)], expected)


def deployment(**changes):
    return replace(Deployment(index(), 1, RATES, ALONE, TIER), **changes)


def run(questions, size=1, **changes):
    groups = [list(range(start, min(start + size, len(questions)))) for start in range(0, len(questions), size)]
    return simulate(deployment(**{"at_once": size, **changes}), questions, [groups])


def written_s(picks=11, prompt=100):
    return prompt * TOKEN_S + (picks - 1) * STEP_S


def test_one_question_without_misses_takes_the_sum_of_its_stages():
    found = run([hyde(0, [3, 5, 7])])
    join_s = RATES.query_s + RATES.join_s + 3 * LIST / RATES.scored_bytes_per_s
    assert found.took_s == pytest.approx(2 * written_s() + join_s)
    assert (found.lists_wanted, found.lists_hit, found.bytes_missed, found.bytes_moved) == (3, 3, 0, 3 * LIST)
    assert found.bottleneck is Bottleneck.LLM


def test_what_lookahead_did_not_expect_is_waited_for():
    found = run([hyde(0, [3, 5, 7], ahead=[3])], rates=replace(FREE, link_bytes_per_s=LIST))
    # One list moved while the text was written, which took longer than a fifth of the list: it is waited for first.
    assert found.took_s == pytest.approx(max(written_s(), 1.0) + 2.0 + written_s())
    assert (found.lists_hit, found.bytes_missed) == (0, 2 * LIST)
    assert found.bottleneck is Bottleneck.LINK


def test_a_link_that_is_all_there_is_gives_its_rate():
    lists = [[4 * (number % 4) + place for place in range(4)] for number in range(12)]
    rates = replace(FREE, link_bytes_per_s=2 * LIST)
    questions = [question(number, [lookup(some)], some) for number, some in enumerate(lists)]
    tier = replace(TIER, cache=CacheKind.NONE)
    found = run(questions, rates=rates, tier=tier)
    assert found.bytes_linked == found.bytes_missed == 48 * LIST
    assert found.took_s == pytest.approx(24.0)
    assert found.bottleneck is Bottleneck.LINK
    assert found.used.link == pytest.approx(1.0)


def test_an_arena_that_holds_everything_moves_each_list_once():
    questions = [question(number, [lookup([0, 1, 2])], [0, 1, 2]) for number in range(5)]
    found = run(questions, rates=FREE)
    assert found.bytes_linked == 3 * LIST
    assert (found.lists_wanted, found.lists_hit) == (15, 12)


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_replicas_that_share_nothing_scale_by_their_number(replicas):
    questions = [hyde(number, [number % 16]) for number in range(32)]
    one, many = (run(questions, replicas=count) for count in (1, replicas))
    assert many.questions_per_s == pytest.approx(replicas * one.questions_per_s, rel=0.02)
    assert many.micro_batches == (32 // replicas,) * replicas


def test_a_disk_that_a_host_shares_gives_no_more_than_its_rate():
    rates = replace(FREE, link_bytes_per_s=4 * LIST)
    questions = [question(number, [lookup([number % 16])], [number % 16]) for number in range(64)]
    tier = replace(TIER, cache=CacheKind.NONE)
    host = Host(8, 8 * LIST)
    by_count = {count: run(questions, rates=rates, tier=tier, host=host, replicas=count) for count in (1, 2, 4, 8)}
    assert by_count[1].took_s == pytest.approx(64 / 4)
    assert by_count[2].took_s == pytest.approx(64 / 8)
    assert by_count[4].took_s == pytest.approx(64 / 8)
    assert by_count[8].took_s == pytest.approx(64 / 8)
    assert by_count[1].bottleneck is Bottleneck.LINK
    assert by_count[8].bottleneck is Bottleneck.SLOW_TIER
    # As many again on a host of their own have a disk of their own.
    assert run(questions, rates=rates, tier=tier, host=host, replicas=16).took_s == pytest.approx(64 / 16)


def test_scoring_that_a_host_shares_gives_no_more_than_its_rate():
    rates = replace(FREE, scored_bytes_per_s=10 * LIST, link_bytes_per_s=1e12 * LIST)
    questions = [question(number, [lookup([0, 1, 2, 3, 4])], [0]) for number in range(32)]
    host = Host(8, 1e18, scored_bytes_per_s=20 * LIST)
    found = run(questions, rates=rates, host=host, replicas=8)
    assert found.took_s == pytest.approx(32 * 5 / 20)
    assert found.bottleneck is Bottleneck.SHARED_SCORING


def test_a_slow_scheduler_is_what_everybody_waits_for():
    questions = [question(number, [(text(2, prompt=10),)]) for number in range(40)]
    found = run(questions, replicas=8, assign_s=0.5)
    assert found.took_s == pytest.approx(40 * 0.5 + written_s(2, 10))
    assert found.bottleneck is Bottleneck.SCHEDULER


def test_handing_over_delays_but_does_not_keep_the_scheduler():
    questions = [question(number, [(text(11),)]) for number in range(8)]
    found = run(questions, replicas=8, handing_s=0.25)
    assert found.took_s == pytest.approx(0.25 + written_s())


def test_too_few_questions_and_a_last_one_are_told_apart():
    questions = [question(number, [(text(11),)]) for number in range(3)]
    assert run(questions, replicas=16).bottleneck is Bottleneck.QUESTIONS
    long = [*questions, question(3, [(text(400),)])]
    assert run(long, replicas=4).bottleneck is Bottleneck.IMBALANCE


def test_texts_are_written_together_and_no_more_of_them_than_there_are_slots():
    questions = [question(number, [(text(101, prompt=1),)]) for number in range(8)]
    together, in_turns = (run(questions, 8, rates=replace(FREE, slots=slots)) for slots in (8, 4))
    assert together.took_s == pytest.approx(1.0, rel=0.05)
    assert in_turns.took_s == pytest.approx(2.0, rel=0.05)


def test_an_llm_on_the_processor_that_scores_is_slowed_by_it():
    lists = [0, 1, 2, 3, 4]
    asks = question(0, [lookup(lists)], lists)
    writes = question(1, [(text(101, prompt=1),)])
    rates = replace(FREE, scored_bytes_per_s=10 * LIST, link_bytes_per_s=1e12 * LIST)
    apart = run([asks, writes], 2, rates=rates)
    beside = run([asks, writes], 2, rates=replace(rates, llm_apart=False))
    assert apart.took_s == pytest.approx(1.01)
    assert beside.took_s == pytest.approx(1.51)


def test_misses_are_scored_in_place_while_the_link_moves_others():
    lists = list(range(12))
    rates = replace(FREE, link_bytes_per_s=LIST, in_place_bytes_per_s=3 * LIST, llm_apart=True)
    found = run([question(0, [lookup(lists)], lists)], rates=rates)
    assert found.took_s == pytest.approx(3.0)
    assert found.bytes_linked == 3 * LIST
    assert found.bytes_missed == 12 * LIST


def test_refinement_moves_what_the_question_did_not_say():
    follow = Follow(5, 0.5, order([8, 9]), 2)
    steps = [Ahead(order([0, 1]), 2, True), (text(11, follows=(follow,)),), lookup([8, 9])]
    assert run([question(0, steps)]).lists_hit == 2
    assert run([question(0, [steps[0], (text(11),), steps[2]])]).lists_hit == 0


def test_lookahead_that_has_not_begun_when_the_query_comes_moves_nothing():
    late = question(0, [Ahead(order([0]), 1, False), (text(2, prompt=1),), lookup([1])])
    found = run([late], rates=replace(RATES, sketch_s=10.0))
    assert (found.bytes_moved, found.bytes_linked) == (0, LIST)


def test_a_micro_batch_moves_what_its_members_share_once():
    questions = [hyde(number, [0, 1, 2]) for number in range(4)]
    found = run(questions, 4, tier=replace(TIER, cache=CacheKind.NONE))
    assert found.bytes_linked == 3 * LIST
    assert found.lists_hit == 12


def test_placement_by_what_arenas_hold_moves_less_than_turns():
    topics = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    random = np.random.default_rng(0)
    questions = [hyde(number, topics[random.integers(4)]) for number in range(64)]
    moved = {
        name: run(questions, replicas=4, placement=name, tier=Tier(6 * LIST, 2)).bytes_linked
        for name in (PlacementName.CACHE_AWARE, PlacementName.ROUND_ROBIN)
    }
    assert moved[PlacementName.CACHE_AWARE] < 0.7 * moved[PlacementName.ROUND_ROBIN]


@st.composite
def cases(draw):
    random = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    count, size, replicas = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    questions = []
    for number in range(count):
        real, expected = (random.permutation(16)[: random.integers(1, 8)].tolist() for _ in range(2))
        questions.append(hyde(number, real, int(random.integers(1, 30)), expected))
    changes = {
        "replicas": replicas,
        "at_once": draw(st.integers(1, 2)) * size,
        "assign_s": draw(st.sampled_from([0.0, 0.01])),
        "placement": draw(st.sampled_from(PlacementName)),
        "host": Host(draw(st.integers(1, 3)), 40 * LIST),
        "tier": Tier(
            draw(st.sampled_from([2, 9, 16])) * LIST, draw(st.integers(1, 4)), draw(st.sampled_from(CacheKind))
        ),
        "rates": replace(
            RATES,
            link_bytes_per_s=30 * LIST,
            slots=draw(st.integers(1, 8)),
            llm_apart=draw(st.booleans()),
            in_place_bytes_per_s=draw(st.sampled_from([0.0, 50.0 * LIST])),
        ),
    }
    return questions, size, changes


@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_question_is_answered_once_and_every_byte_is_accounted_for(case):
    questions, size, changes = case
    found, again = (run(questions, size, **changes) for _ in range(2))
    assert found == again, "two runs of the same differ"
    assert len(found.answered_s) == len(questions)
    assert max(found.answered_s) == found.took_s
    assert sum(found.micro_batches) == -(-len(questions) // size)
    probed = sum(len(call.probes[0]) for each in questions for call in each.calls if isinstance(call, Lookup))
    assert found.lists_wanted == probed
    assert found.bytes_wanted == probed * LIST
    assert 0 <= found.lists_hit <= found.lists_wanted
    in_place = changes["rates"].in_place_bytes_per_s > 0
    if changes["at_once"] == 1 and not in_place:
        # One retrieval at a time: what passes the link is what lookahead moved and what was missed, and no more than a
        # list or two on their way when a question came.
        on_the_way = found.bytes_linked - found.bytes_missed - found.bytes_moved
        assert 0 <= on_the_way <= changes["tier"].depth * len(questions) * LIST
    for share in vars(found.used).values():
        assert -1e-9 <= share <= 1 + 1e-9


def test_bytes_over_the_link_are_the_misses_where_nothing_is_expected():
    random = np.random.default_rng(1)
    questions = [question(number, [(text(3),), lookup(random.permutation(16)[:5].tolist())]) for number in range(20)]
    found = run(questions, replicas=3, tier=Tier(7 * LIST, 2))
    assert found.bytes_linked == found.bytes_missed > 0


def test_copies_have_the_same_lengths_on_other_lists():
    first = [hyde(0, [1, 2, 3]), hyde(1, [2, 3, 4])]
    list_bytes = index().list_bytes
    made = copies(first, 7, list_bytes, seed=0)
    assert [each.number for each in made] == list(range(7))
    assert made[0].steps is first[0].steps
    probes = [next(call.probes[0] for call in each.calls if isinstance(call, Lookup)) for each in made]
    assert len(np.intersect1d(probes[2], probes[3])) == 2, "copies of one turn share what the originals share"
    assert not np.array_equal(probes[0], probes[2])
    assert all(each.likely.sum() == 3 for each in made)
    again = copies(first, 7, list_bytes, seed=0)
    assert all(np.array_equal(one.likely, other.likely) for one, other in zip(made, again, strict=True))


def test_a_device_shares_its_rate_and_gives_one_no_more_than_it_can_use():
    env = simpy.Environment()
    device, ended = Device(env, 10.0, most=4.0), {}

    def one(name, amount, wait_s):
        yield env.timeout(wait_s)
        yield device.serve(amount)
        ended[name] = env.now

    for each in (("a", 8.0, 0.0), ("b", 20.0, 0.0), ("c", 10.0, 1.0)):
        env.process(one(*each))
    env.run()
    # a and b at 4 until c comes; then each a third of 10, until a is done; then 4 each.
    assert ended["a"] == pytest.approx(1 + 4 / (10 / 3))
    assert ended["c"] == pytest.approx(ended["a"] + 6 / 4)
    assert ended["b"] == pytest.approx(ended["a"] + 12 / 4)
    assert device.units == pytest.approx(38)


@pytest.mark.parametrize(
    ("contexts", "parts", "expected_s"),
    [
        ([50], [], STEP_S),
        ([50] * 4, [], STEP_S),
        ([], [(0, 100)], 0.1),
        ([], [(100, 100)], 0.1),
        ([50] * 4, [(0, 100)], STEP_S + 0.1),
        ([50], [(0, 1)], STEP_S + TOKEN_S),
    ],
)
def test_a_step_takes_what_its_texts_and_prompts_take(contexts, parts, expected_s):
    assert RATES.step_s(contexts, parts) == pytest.approx(expected_s)


def test_a_longer_context_makes_a_step_longer():
    llm = replace(LLM, decode_context=40, context_step_s=1e-5)
    assert replace(RATES, llm=llm).step_s([140, 240], []) == pytest.approx(STEP_S + 300e-5)
