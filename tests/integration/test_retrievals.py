"""Searches of several depths beside each other find what they find alone."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from animals import ANIMALS, DIMENSION, TEXTS, WordHashes, World
from indexes import make_vectors
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.retrieval import retriever as retrieval
from telerag_cli.retrieval.retriever import Retrievals, Retriever
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tracing import Tracer

K, NPROBE = 3, 4
QUERIES = [f"{animal} number 3 live in place 8" for animal in ANIMALS]


class HeldUp(WordHashes):
    """Counts its calls, and can be held up."""

    def __init__(self):
        self.calls = 0
        self.gate = threading.Event()
        self.gate.set()

    def encode_queries(self, texts):
        self.calls += 1
        assert self.gate.wait(5)
        return super().encode_queries(texts)


class Finder(Retrievals):
    """Retrievals that note the ``k`` and the number of searches of each batch."""

    def __init__(self, index, **options):
        coarse = Coarse(index.centroids, index.manifest.metric)
        tier = open_host_tier(index, coarse, int(index.list_bytes.sum()))
        self.searcher = Retriever(index, coarse, tier, **options)
        self.embedder = HeldUp()
        self.batches = []
        search_batch = self.searcher.search_batch

        def noting(searches, k, nprobe):
            self.batches.append((k, len(searches)))
            return search_batch(searches, k, nprobe)

        self.searcher.search_batch = noting
        passages = Passages.open(index.paths.passages)
        super().__init__(self.embedder, self.searcher, passages, K, NPROBE, Tracer(enabled=False))

    def close(self):
        super().close()
        self.searcher.close()


@pytest.fixture
def index(tmp_path):
    return World(tmp_path / "index").index


@pytest.fixture
def finder(index):
    finder = Finder(index)
    yield finder
    finder.close()


def test_searches_of_several_depths_find_what_they_find_alone(finder):
    async def run():
        alone = [(await finder.find([text], []), await finder.rank([text], 40)) for text in QUERIES]
        finder.batches.clear()
        finder.embedder.gate.clear()
        calls = finder.embedder.calls
        first = asyncio.create_task(finder.find(["held up"], []))
        while finder.embedder.calls == calls:
            await asyncio.sleep(0.001)
        jobs = [job for text in QUERIES for job in (finder.find([text], []), finder.rank([text], 40))]
        tasks = list(map(asyncio.create_task, jobs))
        await asyncio.sleep(0.01)
        finder.embedder.gate.set()
        together = await asyncio.gather(*tasks)
        await first
        return alone, together

    alone, together = asyncio.run(run())
    assert finder.batches == [(K, 1), (K, len(QUERIES)), (40, len(QUERIES))]
    for (found, ranking), found_too, ranking_too in zip(alone, together[::2], together[1::2], strict=True):
        hits, hits_too = ([(hit.row, hit.score) for hit in each.found] for each in (found, found_too))
        assert hits == hits_too
        assert found.join.lists_wanted == found_too.join.lists_wanted
        np.testing.assert_array_equal(ranking.rows, ranking_too.rows)
        np.testing.assert_array_equal(ranking.scores, ranking_too.scores)
        assert [row for row, _score in hits] == ranking.rows[:K].tolist()


def test_a_deep_search_takes_few_queries_at_once_and_finds_the_same(finder, monkeypatch):
    vectors = WordHashes().encode_queries(QUERIES)
    found = finder.searcher.search(vectors, len(TEXTS), NPROBE)
    best = {}
    for score, row in zip(found.scores.ravel().tolist(), found.rows.ravel().tolist(), strict=True):
        if row >= 0:
            best[row] = max(score, best.get(row, score))
    expected = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    monkeypatch.setattr(retrieval, "MAX_HITS", 200)
    finder.batches.clear()
    ranking = asyncio.run(finder.rank(QUERIES, 90))
    assert len(finder.batches) == 5
    assert {searches for _k, searches in finder.batches} == {1}
    assert list(zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True)) == expected[:90]
    finder.batches.clear()
    assert asyncio.run(finder.rank(QUERIES, 10**9)).rows.tolist() == [row for row, _score in expected]
    assert max(k for k, _searches in finder.batches) <= len(TEXTS)


def test_ranking_keeps_what_scoring_again_finds(index):
    """With kept vectors, how many are scored again depends on k, so each depth is a batch of its own."""
    vectors = make_vectors(len(TEXTS), DIMENSION, seed=1)
    finder = Finder(dataclasses.replace(index, vectors=vectors), rescore=4)
    query = WordHashes().encode_queries(QUERIES[:1])

    async def run():
        depths = (2, 5, 2)
        return await asyncio.gather(*(finder.rank(QUERIES[:1], k) for k in depths), finder.find(QUERIES[:1], []))

    try:
        *rankings, found = asyncio.run(run())
        for k, ranking in zip((2, 5, 2), rankings, strict=True):
            np.testing.assert_array_equal(ranking.rows, finder.searcher.search(query, k, NPROBE).rows[0])
            np.testing.assert_allclose(ranking.scores, vectors[ranking.rows] @ query[0], rtol=1e-5)
        assert [hit.row for hit in found.found] == finder.searcher.search(query, K, NPROBE).rows[0].tolist()
        assert rankings[0].rows.tolist() != rankings[1].rows[:2].tolist()
    finally:
        finder.close()
