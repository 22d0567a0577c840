"""The study's quick arena is the product's, and its comparisons are right."""

import json

import numpy as np
import pytest

import schedule_study as study
from telerag_cli.config import CacheKind

NLIST = 40


@pytest.fixture(scope="module")
def material():
    random = np.random.default_rng(0)
    topics = np.repeat(np.arange(study.TOPICS), 2)
    random.shuffle(topics)
    centres = random.standard_normal((study.TOPICS, 8))
    lists = random.standard_normal((NLIST, 8))
    questions, texts = (
        (centres[topics] + random.normal(0, 0.3, (len(topics), 8))).astype(np.float32) for _ in range(2)
    )
    predicted, real = (np.argsort(-vectors @ lists.T, axis=1) for vectors in (questions, texts))
    # Of equal length, so that there are no fragments.
    return study.Material(questions, predicted, real, np.full(NLIST, 8192), topics)


@pytest.mark.parametrize("cache", [CacheKind.HOTNESS, CacheKind.FREQUENCY, CacheKind.LRU])
@pytest.mark.parametrize("budget", [0.0, 0.3])
def test_the_quick_arena_is_the_products(material, cache, budget):
    work = study.Work(material, 6, 32, 4)
    batches = study.WAYS["similar"](work)
    quick, exact = (
        study.follow(kind(material.extents, 0.6, cache), work, batches, budget)
        for kind in (study.Arena, study.Product)
    )
    assert quick.bytes == pytest.approx(exact.bytes, rel=0.1)  # among equally cold lists another one leaves
    assert quick.hits == pytest.approx(exact.hits, abs=0.03)
    assert 0 < quick.hits < 1
    assert (quick.ahead > 0) == (budget > 0)


def test_an_arena_holds_no_more_than_it_can(material):
    work = study.Work(material, 10, 32, 8)
    arena = study.Arena(material.extents, 0.3, CacheKind.HOTNESS)
    for places in study.WAYS["arrival"](work):
        probed = material.probed(material.real, 10)[places]
        moved_ahead, late, hits, wanted = arena.run(material.predicted[places, :20], probed, 50_000.0)
        assert material.extents[arena.resident].sum() <= 0.3 * material.extents.sum()
        assert moved_ahead <= 50_000
        assert 0 <= hits <= wanted == probed.sum() * 8192
        assert late <= probed.any(0).sum() * 8192


def test_all_ways_schedule_each_question_and_none_beats_the_floor(material):
    row = study.Batches(6, 32, 4, 0.25, CacheKind.HOTNESS, tuple(study.WAYS), exact=True)
    found = study.run_batches(row, material)
    json.dumps(found)
    study.check(found | {"by_the_product": {"curves": found["curves"]}})
    for curve in found["curves"].values():
        assert all(each["bytes"] >= found["floor"] for each in curve)
    saved = {name: each["0.125"]["bytes_saved"] for name, each in found["against_arrival"].items()}
    assert saved["perfect knowledge"] > 0
    off = {"curves": {name: [{**each, "bytes": each["bytes"] + 1} for each in curve]
                      for name, curve in found["curves"].items()}}  # fmt: skip
    with pytest.raises(SystemExit, match="the product"):
        study.check(found | {"by_the_product": off})


def test_curves_are_compared_where_they_reach():
    curve = [study.Outcome(1.0, 0.0, 0.2), study.Outcome(2.0, 1.0, 0.4), study.Outcome(3.0, 2.0, 0.3)]
    assert study.compare(study.Outcome(2.0, 0.0, 0.3), curve) == {"bytes_saved": 0.25, "hits_gained": 0.1}
    assert study.compare(study.Outcome(0.5, 0.0, 0.5), curve) == {"bytes_saved": None, "hits_gained": None}
    assert study.compare(study.Outcome(2.0, 0.0, 0.1), curve)["bytes_saved"] == 0.5


def test_a_fleet_answers_all_by_every_placement(material, monkeypatch):
    monkeypatch.setattr(study, "ASKED", 96)
    row = study.Fleet(6, 3, 1.0, seed=1, batch=32, variants=True)
    trace = study.draw_trace(row, material.topics)
    assert len(trace) == 96
    assert np.array_equal(trace, study.draw_trace(row, material.topics))
    found = study.run_fleet(row, material)
    json.dumps(found)
    assert set(found["placements"]) == {*study.PLACEMENTS, *study.VARIANTS}
    for outcome in found["placements"].values():
        assert 0 < outcome["hits"] < 1
        assert 1 <= outcome["questions_imbalance"] < 1.5
    table = study.ratios([found])["nprobe 6, 3 replicas, variants"]
    placed = found["placements"]
    assert table["least over round-robin"] == pytest.approx(
        placed["cache-aware"]["hits"] / placed["round-robin"]["hits"], abs=1e-3
    )
