"""Cache policies by themselves, in the accounting, in the study that compares them, and in ``bench cache``."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from animals import TEXTS, bench_setup
from expect import fails
from telerag_cli.bench.answering import Ask
from telerag_cli.bench.caching import cache, sequence
from telerag_cli.bench.suites import SUITES, SuiteName, SystemName
from telerag_cli.cli.app import app
from telerag_cli.config import PAGE_BYTES, CacheKind, PipelineName
from telerag_cli.errors import EXIT_USAGE, UsageError
from telerag_cli.llm.scripted import ScriptedGenerator
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.tiers.arena import Arena
from telerag_cli.tiers.cache import Frequency, make_policy
from telerag_cli.tiers.residency import ABSENT, RESIDENT, Residency

KEEPING = [kind for kind in CacheKind if kind is not CacheKind.NONE]


def residency_of(kind, lists, pages):
    """Lists of a page each."""
    list_bytes = np.full(lists, PAGE_BYTES)
    return Residency(list_bytes, Arena(pages * PAGE_BYTES), make_policy(kind, lists), lambda _list_no: None)


def probe(residency, *lists):
    """A round without lookahead."""
    residency.new_round(0.5)
    absent = [number for number in lists if residency.state[number] == ABSENT]
    assert len(residency.reserve(absent)) == len(absent)
    residency.commit(np.array(absent, np.int64))
    residency.policy.used(np.array(lists))


def there(residency):
    return np.flatnonzero(residency.state == RESIDENT).tolist()


@pytest.mark.parametrize(("kind", "leaves"), [(CacheKind.FREQUENCY, 1), (CacheKind.HOTNESS, 0), (CacheKind.LRU, 0)])
def test_frequency_remembers_what_the_others_have_forgotten(kind, leaves):
    residency = residency_of(kind, 9, 2)
    for _ in range(3):
        probe(residency, 0)
    for _ in range(6):
        residency.new_round(0.5)
    probe(residency, 1)
    residency.new_round(0.5)
    residency.reserve([2])
    assert residency.state[leaves] == ABSENT
    assert residency.state[1 - leaves] == RESIDENT


def test_what_was_moved_in_vain_leaves_first():
    residency = residency_of(CacheKind.FREQUENCY, 9, 3)
    probe(residency, 0)
    for number in (1, 2):  # lookahead moved them later, and nothing probed them
        residency.new_round(0.5)
        residency.reserve([number])
        residency.commit(np.array([number]))
    for number in (3, 4):
        residency.reserve([number])
    assert residency.state[[1, 2]].tolist() == [ABSENT] * 2
    assert residency.state[0] == RESIDENT


def test_a_list_that_comes_again_is_as_hot_as_its_uses_were():
    residency = residency_of(CacheKind.FREQUENCY, 9, 1)
    for _ in range(4):
        probe(residency, 0)
    probe(residency, 1)
    assert there(residency) == [1]
    probe(residency, 0)
    decay = Frequency.decay
    assert residency.policy.heat[0] == pytest.approx(1 + sum(decay**age for age in (2, 3, 4, 5)))
    assert residency.policy.heat[0] > residency.policy.heat[1] == pytest.approx(decay)


def test_only_hotness_keeps_lists_from_lookahead():
    kept = {}
    for kind in CacheKind:
        residency = residency_of(kind, 9, 4)
        for _ in range(5):
            probe(residency, 3)
        kept[kind] = np.flatnonzero(residency.new_round(1.0)).tolist()
    assert kept == {CacheKind.NONE: [], CacheKind.LRU: [], CacheKind.HOTNESS: [3], CacheKind.FREQUENCY: []}


def test_the_uses_of_all_rounds_stay_finite():
    policy = Frequency(1)
    for _ in range(5000):
        policy.new_round()
        policy.used(np.array([0]))
    assert policy.heat[0] == pytest.approx(1 / (1 - Frequency.decay))


def test_a_skew_draws_the_first_questions_more_often():
    assert sequence(7, 0.0, 3) == list(range(7))
    drawn = sequence(500, 1.0, 3)
    assert len(drawn) == 500
    assert drawn == sequence(500, 1.0, 3) != sequence(500, 1.0, 4)
    counts = np.bincount(drawn, minlength=500)
    assert counts[0] > counts[9] > counts[200:].mean()
    assert counts[0] / 500 == pytest.approx(1 / np.sum(1 / np.arange(1, 501)), rel=0.35)
    assert len(set(sequence(500, 2.0, 3))) < len(set(drawn)) < 500


QUESTIONS = (
    "Where do owls live?",
    "Where do bees live?",
    "What do ants eat?",
    "What do cows eat?",
    "Where do eels live?",
    "What do hens eat?",
)


def written(request):
    """The first passage about an animal that was asked about."""
    asked = request.messages[-1].content.lower().split()
    return next(text for text in TEXTS if text.split()[0] in asked)


@pytest.fixture
def ask(tmp_path):
    """Six questions over an arena of half the lists, without warming up."""
    setup = bench_setup(tmp_path / "index", ScriptedGenerator(written))
    return Ask(
        setup,
        (SystemName.FETCH,),
        {"animals": QUESTIONS},
        [make_pipeline(PipelineName.HYDE)],
        num_warmups=0,
        repeats=1,
        seed=0,
        detailed=False,
        counting=lambda _what, total: nullcontext(lambda _count: None),
    )


def hits_of(outcome):
    return {(cell.system, cell.key["skew"]): cell.values["hit_share"] for cell in outcome.cells}


def test_every_skew_begins_with_empty_arenas_and_has_cells_of_its_own(ask):
    both = cache(ask, list(CacheKind), [0.5], 0.0, 0.0, [0.0, 2.0])
    alone = cache(ask, list(CacheKind), [0.5], 0.0, 0.0, [2.0])
    assert set(hits_of(both)) == {(kind.value, skew) for kind in CacheKind for skew in (0.0, 2.0)}
    assert all(set(cell.key) == set(SUITES[SuiteName.CACHE].axes) for cell in both.cells)
    assert {key: share for key, share in hits_of(both).items() if key[1] == 2.0} == hits_of(alone)
    assert all(hits_of(both)["none", skew] == 0 for skew in (0.0, 2.0))
    assert all(hits_of(both)[kind.value, 2.0] > hits_of(both)[kind.value, 0.0] for kind in KEEPING)
    distinct = {cell.key["skew"]: cell.values["distinct_questions"] for cell in both.cells}
    assert distinct == {0.0: 6, 2.0: len(set(sequence(6, 2.0, 0)))}
    compared = {(each.under, each.key["skew"]) for each in both.ratios}
    assert compared == {(kind.value, skew) for kind in KEEPING for skew in (0.0, 2.0)}
    for skew in (0.0, 2.0):
        assert len({cell.values["bytes_wanted"] for cell in both.cells if cell.key["skew"] == skew}) == 1


def test_only_hotness_is_measured_for_every_share(ask):
    outcome = cache(ask, list(CacheKind), [0.5, 0.25], 0.5, 0.0)
    places = [(cell.system, cell.key["cache_fraction"]) for cell in outcome.cells]
    assert {each.over for each in outcome.ratios} == {"none"}
    assert sorted(places) == [("frequency", 0.5), ("hotness", 0.25), ("hotness", 0.5), ("lru", 0.5), ("none", 0.5)]


@pytest.mark.parametrize(
    ("pipelines", "values"),
    [((PipelineName.HYDE, PipelineName.NAIVE), ("cache", 2)), ((PipelineName.NAIVE,), ("cache", "naive", 1))],
)
def test_what_cache_cannot_compare_is_refused(ask, pipelines, values):
    asked = replace(ask, pipelines=[make_pipeline(name) for name in pipelines])
    with fails(UsageError, *values):
        cache(asked, list(CacheKind), [0.5], 0.0, 0.0)


def test_a_skew_below_nothing_is_refused():
    refused = CliRunner().invoke(app, ["bench", "cache", "nowhere", "--skew", "-1"])
    assert refused.exit_code == EXIT_USAGE
    assert "--skew" in refused.stderr
