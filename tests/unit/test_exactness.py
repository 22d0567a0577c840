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
from expect import fails
from indexes import make_index, make_vectors
from searching import check_released, check_search, host_retriever, small_index
from telerag_cli.config import CacheKind, Metric, Storage
from telerag_cli.errors import ArtifactError, UsageError
from telerag_cli.index.scoring import Coarse
from telerag_cli.retrieval import retriever as retrieval
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tiers.transport import DirectReader
from telerag_cli.units import format_bytes

WHOLE = 1 << 40
rows = st.integers(0, 600)
probes = st.integers(1, 24)


class Machine(RuleBasedStateMachine):
    """Lookahead, refinement, eviction and search in any order, over any index, arena, cache and link."""

    @initialize(
        shape=st.tuples(st.integers(30, 600), st.integers(1, 40)),
        nlist=probes,
        seed=st.integers(0, 2**16),
        duplicates=st.integers(0, 25),
        metric=st.sampled_from(Metric),
        storage=st.sampled_from(Storage),
        room=st.floats(0, 1.1),
        cache=st.sampled_from(CacheKind),
        longest_s=st.sampled_from([0.0, 0.0005, 0.003]),
        link=st.sampled_from(["disk", "chosen", "cuda"]),
        fraction=st.floats(0, 1),
        failures=st.tuples(*[st.sampled_from([0.0, 0.0, 0.2])] * 2),
    )
    def start(self, shape, nlist, seed, duplicates, metric, storage, room, cache, longest_s, link, fraction, failures):
        self.folder = tempfile.TemporaryDirectory()
        self.random = np.random.default_rng(seed)
        self.vectors = make_vectors(*shape, seed, duplicates)
        index, self.ivf = make_index(Path(self.folder.name), self.vectors, nlist, metric, storage, seed)
        coarse = Coarse(index.centroids, metric)
        arena_bytes = max(int(index.list_bytes.max()), int(room * index.list_bytes.sum()))
        if link == "cuda":
            dice, failing = random.Random(seed), [0.0, 0.0]
            gpu = SimulatedGpu(
                longest_s=longest_s,
                seed=seed,
                copy_fails=lambda: dice.random() < failing[0],
                work_fails=lambda: dice.random() < failing[1],
            )
            self.tier = open_cuda_tier(index, coarse, gpu, arena_bytes, cache=cache)
            failing[:] = failures
        else:
            chosen = functools.partial(ChosenLink, longest_s=longest_s, seed=seed)
            transport = DirectReader if link == "disk" else chosen
            self.tier = open_host_tier(index, coarse, arena_bytes, cache=cache, transport=transport)
        self.retriever = retrieval.Retriever(index, coarse, self.tier, cache_fraction=fraction)
        self.prefetches = []

    def query(self, near):
        row = self.vectors[near % len(self.vectors)]
        return (row + 0.2 * self.random.standard_normal(row.shape)).astype(np.float32)[None]

    @rule(near=rows, nprobe=probes, refining=st.booleans())
    def look_ahead(self, near, nprobe, refining):
        nprobe = min(nprobe, self.tier.nlist)
        self.prefetches.append(self.retriever.prefetch(self.query(near), nprobe, refining=refining))

    @precondition(lambda self: self.prefetches)
    @rule(near=rows, nprobe=probes, fraction=st.floats(0, 1))
    def refine(self, near, nprobe, fraction):
        self.retriever.refine(self.prefetches[-1], self.query(near), min(nprobe, self.tier.nlist), fraction)

    @rule(pause_s=st.sampled_from([0.0, 0.0005, 0.002]))
    def wait(self, pause_s):
        time.sleep(pause_s)

    @rule(
        near=st.lists(rows, min_size=1, max_size=4),
        k=st.integers(1, 40),
        nprobe=probes,
        prepared=st.booleans(),
        exact_hit=st.booleans(),
    )
    def search(self, near, k, nprobe, prepared, exact_hit):
        vectors, nprobe = self.vectors, min(nprobe, self.tier.nlist)
        queries = [vectors[row % len(vectors)][None] if exact_hit else self.query(row) for row in near]
        prefetch = self.prefetches.pop() if prepared and self.prefetches else None
        k = min(k, len(vectors))
        report = check_search(self.retriever, self.ivf, np.concatenate(queries), k, nprobe, prefetch)
        assert report.lists_hit + report.lists_coming + report.lists_missed == report.lists_wanted
        assert report.bytes_missed <= report.bytes_wanted
        assert report.lists_in_place <= report.lists_missed

    @invariant()
    def intact(self):
        if hasattr(self, "tier"):
            check_released(self.tier)

    def teardown(self):
        if hasattr(self, "tier"):
            for prefetch in self.prefetches:
                prefetch.stop()
            self.retriever.close()
            self.tier.check_integrity()
            self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
def small(tmp_path):
    return small_index(tmp_path)


@pytest.fixture
def open_over(small):
    """Opens a retriever over the small index, with an arena for all of it by default, and closes it."""
    made = []

    def opened(arena_bytes=None, **options):
        made.append(host_retriever(small[0], WHOLE if arena_bytes is None else arena_bytes, **options))
        return made[-1]

    yield opened
    for retriever in made:
        retriever.close()


@pytest.fixture
def links():
    return []


def chosen(links, kind=ChosenLink, **how):
    """Makes a link whose troubles are chosen, and keeps it."""

    def link(path, memory):
        links.append(kind(path, memory, **how))
        return links[-1]

    return link


def test_lists_that_cannot_be_read_are_an_error_and_leave_nothing_held(small, open_over, links):
    index, ivf, vectors = small
    query = vectors[:1]
    broken = int(Coarse(index.centroids, Metric.IP).nearest(query, 8)[0, 3])
    retriever = open_over(int(index.list_bytes.sum()) // 2, transport=chosen(links, broken=[broken]))
    prefetch = retriever.prefetch(query, 8)
    time.sleep(0.02)
    assert prefetch.failed >= 1
    with fails(ArtifactError, broken):
        retriever.search(query, 5, 8, prefetch)
    check_released(retriever.tier)
    # The link recovers: the same search is answered, so nothing of the torn read was kept.
    links[0].broken.clear()
    check_search(retriever, ivf, query, 5, 8)


def test_a_useless_prediction_moves_little_after_the_query_arrives(small, open_over, links):
    index, _ivf, vectors = small
    retriever = open_over(transport=chosen(links, depth=2, longest_s=0.01))
    prefetch = retriever.prefetch(-vectors[:1], 4)
    before = len(links[0].moves)
    report = retriever.search(vectors[:1], 3, 4, prefetch).report
    wanted = set(Coarse(index.centroids, Metric.IP).nearest(vectors[:1], 4)[0].tolist())
    assert sum(move.list_no not in wanted for move in links[0].moves[before:]) <= retriever.tier.depth
    assert report.lists_missed + report.lists_coming + report.lists_hit == len(wanted)


def test_the_second_search_finds_its_lists_in_fast_memory(small, open_over):
    retriever = open_over()
    first, second = (retriever.search(small[2][:1], 3, 6).report for _ in range(2))
    assert (first.lists_hit, first.lists_missed) == (0, first.lists_wanted)
    assert (second.lists_hit, second.bytes_missed) == (second.lists_wanted, 0)


@pytest.mark.parametrize(("k", "nprobe", "values"), [(1, 21, ("nprobe", 21, 20)), (401, 1, ("k is", 401, 400))])
def test_more_than_there_is(small, k, nprobe, values):
    with fails(UsageError, *values):
        retrieval.check_search(small[0], k, nprobe)


def test_an_arena_below_the_largest_list_is_refused(small, open_over):
    index, _ivf, vectors = small
    largest = int(index.list_bytes.max())
    with fails(UsageError, format_bytes(largest), f"--fast-memory at least {largest}"):
        open_over(largest - 4096)
    assert open_over(largest).search(vectors[:1], 3, 20).report.lists_missed == 20


def test_a_file_cut_short_while_in_use_is_named(small, open_over):
    index, _ivf, vectors = small
    retriever = open_over()
    with index.paths.lists.open("r+b") as file:
        file.truncate(4096)
    with fails(ArtifactError, "lists.bin", "4,096"):
        retriever.search(vectors[:1], 3, 20)
    check_released(retriever.tier)


def test_a_list_that_other_lookahead_brings_after_it_was_refused_counts_as_missed(small, open_over, links):
    index, ivf, vectors = small
    gates = {number: threading.Event() for number in range(20)}

    class GatedLink(ChosenLink):
        """A move ends when its gate is opened."""

        def work(self, move, arrived, delay_s):
            gates[move.list_no].wait(10)
            super().work(move, arrived, delay_s)

    query = vectors[:1]
    order = Coarse(index.centroids, Metric.IP).rank(query[0]).tolist()
    wanted, largest = order[0], int(index.list_bytes.max())
    other = next(number for number in reversed(order) if index.list_bytes[number] == largest)
    # Room for one list: while the other is on its way, the wanted one is refused.
    retriever = open_over(largest, transport=chosen(links, GatedLink))
    none = np.zeros(20, np.bool_)
    started, _full = retriever.tier.prefetch([other], lambda _list_no: none, np.zeros(20), lambda _lists, _error: None)
    assert started == [other]
    gates[wanted].set()
    threading.Timer(0.05, gates[other].set).start()
    report = check_search(retriever, ivf, query, 3, 1)
    assert (report.lists_hit, report.lists_coming, report.lists_missed) == (0, 0, 1)
