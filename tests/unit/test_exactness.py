"""Lookahead never changes a result: whatever the arena holds, a search answers what Faiss answers."""

import functools
import random
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from doubles import ChosenLink
from indexes import expected, make_index, make_vectors
from telerag_cli.config import CacheKind, Metric, Storage
from telerag_cli.errors import ArtifactError, UsageError
from telerag_cli.index.scoring import Coarse
from telerag_cli.retrieval.retriever import Retriever, check_search
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tiers.transport import DirectReader


class Machine(RuleBasedStateMachine):
    """Lookahead, refinement, eviction and search in any order, over any index, arena, cache and link."""

    @initialize(
        dimension=st.integers(1, 40),
        count=st.integers(30, 600),
        nlist=st.integers(1, 24),
        seed=st.integers(0, 2**16),
        duplicates=st.integers(0, 25),
        metric=st.sampled_from(Metric),
        storage=st.sampled_from(Storage),
        room=st.floats(0, 1.1),
        cache=st.sampled_from(CacheKind),
        longest_s=st.sampled_from([0.0, 0.0005, 0.003]),
        link=st.sampled_from(["disk", "chosen", "cuda"]),
        fraction=st.floats(0, 1),
        copies_fail=st.sampled_from([0.0, 0.0, 0.2]),
        works_fail=st.sampled_from([0.0, 0.0, 0.2]),
    )
    def start(
        self,
        dimension,
        count,
        nlist,
        seed,
        duplicates,
        metric,
        storage,
        room,
        cache,
        longest_s,
        link,
        fraction,
        copies_fail,
        works_fail,
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.random = np.random.default_rng(seed)
        self.vectors = make_vectors(count, dimension, seed, duplicates)
        self.metric = metric
        index, self.ivf = make_index(Path(self.folder.name), self.vectors, nlist, metric, storage, seed)
        coarse = Coarse(index.centroids, metric)
        largest, total = int(index.list_bytes.max()), int(index.list_bytes.sum())
        arena_bytes = max(largest, int(room * total))
        if link == "cuda":
            dice = random.Random(seed)
            troubled = [0.0, 0.0]
            gpu = SimulatedGpu(
                longest_s=longest_s,
                seed=seed,
                copy_fails=lambda: dice.random() < troubled[0],
                work_fails=lambda: dice.random() < troubled[1],
            )
            self.tier = open_cuda_tier(index, coarse, gpu, arena_bytes, cache=cache)
            troubled[:] = copies_fail, works_fail
        else:
            chosen = functools.partial(ChosenLink, longest_s=longest_s, seed=seed)
            transport = DirectReader if link == "disk" else chosen
            self.tier = open_host_tier(index, coarse, arena_bytes, cache=cache, transport=transport)
        self.retriever = Retriever(index, coarse, self.tier, cache_fraction=fraction)
        self.rounds = []

    def query(self, near):
        row = self.vectors[near % len(self.vectors)]
        return (row + 0.2 * self.random.standard_normal(row.shape)).astype(np.float32)[None]

    @rule(near=st.integers(0, 600), nprobe=st.integers(1, 24), refining=st.booleans())
    def look_ahead(self, near, nprobe, refining):
        nprobe = min(nprobe, self.tier.nlist)
        self.rounds.append(self.retriever.prefetch(self.query(near), nprobe, refining=refining))

    @precondition(lambda self: self.rounds)
    @rule(near=st.integers(0, 600), nprobe=st.integers(1, 24), fraction=st.floats(0, 1))
    def refine(self, near, nprobe, fraction):
        self.retriever.refine(self.rounds[-1], self.query(near), min(nprobe, self.tier.nlist), fraction)

    @rule(pause_s=st.sampled_from([0.0, 0.0005, 0.002]))
    def wait(self, pause_s):
        time.sleep(pause_s)

    @rule(
        near=st.lists(st.integers(0, 600), min_size=1, max_size=4),
        k=st.integers(1, 40),
        nprobe=st.integers(1, 24),
        prepared=st.booleans(),
        exact_hit=st.booleans(),
    )
    def search(self, near, k, nprobe, prepared, exact_hit):
        rows = [self.vectors[row % len(self.vectors)][None] if exact_hit else self.query(row) for row in near]
        queries = np.concatenate(rows)
        nprobe, k = min(nprobe, self.tier.nlist), min(k, len(self.vectors))
        ahead = self.rounds.pop() if prepared and self.rounds else None
        found = self.retriever.search(queries, k, nprobe, ahead)
        scores, faiss_rows, ordered = expected(self.ivf, self.metric, queries, k, nprobe)
        np.testing.assert_array_equal(found.scores, scores)
        np.testing.assert_array_equal(found.rows, ordered)
        for mine, theirs, row_scores in zip(found.rows, faiss_rows, scores, strict=True):
            alone = np.array([(row_scores == score).sum() == 1 for score in row_scores])
            alone[-1] = False  # the last may tie with one that was left out
            np.testing.assert_array_equal(mine[alone], theirs[alone])
        report = found.report
        assert report.lists_hit + report.lists_coming + report.lists_missed == report.lists_wanted
        assert report.bytes_missed <= report.bytes_wanted
        assert report.lists_in_place <= report.lists_missed

    @invariant()
    def intact(self):
        if hasattr(self, "tier"):
            self.tier.check_integrity()
            assert self.tier.occupancy().references == 0

    def teardown(self):
        if hasattr(self, "tier"):
            for ahead in self.rounds:
                ahead.stop()
            self.retriever.close()
            self.tier.check_integrity()
            self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
def small(tmp_path):
    vectors = make_vectors(400, 16, 1)
    index, ivf = make_index(tmp_path, vectors, 20, Metric.IP, Storage.FLOAT32)
    return index, ivf, vectors


def open_over(index, arena_bytes, link=DirectReader):
    coarse = Coarse(index.centroids, index.manifest.metric)
    tier = open_host_tier(index, coarse, arena_bytes, transport=link)
    return tier, Retriever(index, coarse, tier)


def test_lists_that_cannot_be_read_are_an_error_and_leave_nothing_held(small):
    index, ivf, vectors = small
    query = vectors[:1]
    _scores, probes = Coarse(index.centroids, Metric.IP).probe(query, 8)
    broken = int(probes[0, 3])
    links = []

    def link(path, memory):
        links.append(ChosenLink(path, memory, broken=[broken]))
        return links[0]

    tier, retriever = open_over(index, int(index.list_bytes.sum()) // 2, link)
    ahead = retriever.prefetch(query, 8)
    time.sleep(0.02)
    assert ahead.failed >= 1
    with pytest.raises(ArtifactError, match=f"list {broken} cannot be read"):
        retriever.search(query, 5, 8, ahead)
    assert tier.occupancy().references == 0
    tier.check_integrity()
    # The link recovers: the same search is answered, so nothing of the torn read was kept.
    links[0].broken.clear()
    found = retriever.search(query, 5, 8)
    scores, _rows, ordered = expected(ivf, Metric.IP, query, 5, 8)
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.rows, ordered)
    retriever.close()


def test_a_useless_prediction_moves_little_after_the_query_arrives(small):
    index, _ivf, vectors = small
    links = []

    def link(path, memory):
        links.append(ChosenLink(path, memory, depth=2, longest_s=0.01))
        return links[0]

    tier, retriever = open_over(index, int(index.list_bytes.sum()), link)
    ahead = retriever.prefetch(-vectors[:1], 4)
    found = retriever.search(vectors[:1], 3, 4, ahead)
    wanted = set(np.flatnonzero(np.isin(np.arange(20), Coarse(index.centroids, Metric.IP).probe(vectors[:1], 4)[1])))
    unneeded = [move for move in links[0].moves if move.list_no not in wanted]
    assert len(unneeded) <= tier.depth
    assert found.report.lists_missed + found.report.lists_coming + found.report.lists_hit == len(wanted)
    retriever.close()


def test_the_second_search_finds_its_lists_in_fast_memory(small):
    index, _ivf, vectors = small
    _tier, retriever = open_over(index, int(index.list_bytes.sum()))
    first = retriever.search(vectors[:1], 3, 6).report
    second = retriever.search(vectors[:1], 3, 6).report
    assert first.lists_hit == 0
    assert first.lists_missed == first.lists_wanted
    assert second.lists_hit == second.lists_wanted
    assert second.bytes_missed == 0
    retriever.close()


@pytest.mark.parametrize(
    ("k", "nprobe", "message"),
    [(1, 21, "nprobe is 21 and the index has 20 lists"), (401, 1, "k is 401 and the index has 400 passages")],
)
def test_more_than_there_is(small, k, nprobe, message):
    index, _ivf, _vectors = small
    _tier, retriever = open_over(index, int(index.list_bytes.sum()))
    with pytest.raises(UsageError, match=message):
        check_search(index, k, nprobe)
    retriever.close()


def test_an_arena_below_the_largest_list_is_refused(small):
    index, _ivf, _vectors = small
    largest = int(index.list_bytes.max())
    with pytest.raises(UsageError, match="smaller than the largest list"):
        open_over(index, largest - 4096)
    _tier, retriever = open_over(index, largest)
    assert retriever.search(_vectors[:1], 3, 20).report.lists_missed == 20
    retriever.close()


def test_a_file_cut_short_while_in_use_is_named(small):
    index, _ivf, vectors = small
    tier, retriever = open_over(index, int(index.list_bytes.sum()))
    with index.paths.lists.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(ArtifactError, match=r"lists\.bin ends at byte 4,096"):
        retriever.search(vectors[:1], 3, 20)
    assert tier.occupancy().references == 0
    retriever.close()


def test_a_list_that_other_lookahead_brings_after_it_was_refused_counts_as_missed(small):
    index, ivf, vectors = small
    gates = {}

    class GatedLink(ChosenLink):
        """A move ends when its gate is opened."""

        def _work(self, move, arrived, delay_s):
            gates.setdefault(move.list_no, threading.Event()).wait(10)
            super()._work(move, arrived, delay_s)

    query = vectors[:1]
    order = Coarse(index.centroids, Metric.IP).rank(query[0])
    wanted = int(order[0])
    other = next(int(number) for number in order[::-1] if index.list_bytes[number] == index.list_bytes.max())
    # Room for one list: while the other is on its way, the wanted one is refused.
    tier, retriever = open_over(index, int(index.list_bytes.max()), GatedLink)
    nothing = np.zeros(20, np.bool_)
    started, _full = tier.prefetch([other], lambda _number: nothing, np.zeros(20), lambda _lists, _error: None)
    assert started == [other]
    gates.setdefault(wanted, threading.Event()).set()
    threading.Timer(0.05, gates.setdefault(other, threading.Event()).set).start()
    found = retriever.search(query, 3, 1)
    assert (found.report.lists_hit, found.report.lists_coming, found.report.lists_missed) == (0, 0, 1)
    scores, _rows, ordered = expected(ivf, Metric.IP, query, 3, 1)
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.rows, ordered)
    retriever.close()
