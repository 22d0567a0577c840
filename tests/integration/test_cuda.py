"""The cuda tier over the simulated GPU, and over a real one where there is one."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expect import fails
from indexes import make_index, make_vectors
from searching import check_released, check_search, cuda_retriever, small_index
from telerag_cli.config import PAGE_BYTES, Metric, Storage
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.index.scoring import Coarse, ListScorer
from telerag_cli.tiers.cuda import reference
from telerag_cli.tiers.cuda.copier import Copier, coalesce
from telerag_cli.tiers.cuda.gpu import Gpu, find_gpu, gpu_number, translated
from telerag_cli.tiers.cuda.scoring import GpuScorer
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.rates import JoinRates, Rate
from telerag_cli.tiers.transport import Move

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def small(tmp_path):
    return small_index(tmp_path)


@pytest.fixture
def open_over():
    """Opens a retriever over an index and a device, and closes it."""
    made = []

    def opened(index, gpu=None, arena_bytes=None, **options):
        made.append(cuda_retriever(index, gpu or SimulatedGpu(), arena_bytes, **options))
        return made[-1]

    yield opened
    for retriever in made:
        retriever.close()


def moved_for(retriever, query, nprobe):
    """A prefetch for a query that has ended all its moves."""
    prefetch = retriever.prefetch(query, nprobe)
    while not prefetch.idle:
        time.sleep(0.001)
    return prefetch


class RefusingStream:
    """A stream that starts no copy once it is told so."""

    def __init__(self, refuses=lambda: True, stream=None):
        self.refuses, self.stream = refuses, stream

    def copy(self, copies):
        if self.refuses():
            raise ResourceError("The GPU is lost.")
        return self.stream.copy(copies)

    def close(self):
        if self.stream:
            self.stream.close()


# The link


def moves(*pages):
    """Moves of one page each from and to these pages."""
    return [
        Move(number, PAGE_BYTES * source, PAGE_BYTES * target, PAGE_BYTES)
        for number, (source, target) in enumerate(pages)
    ]


def test_neighbours_on_both_sides_are_one_copy():
    runs = coalesce(moves((0, 4), (1, 5), (2, 7), (3, 8), (9, 9)))
    assert [[move.list_no for move in run] for run in runs] == [[0, 1], [2, 3], [4]]
    assert coalesce([]) == []


class Arrivals:
    """Notes what arrives."""

    def __init__(self):
        self.well, self.badly, self.changed = [], [], threading.Condition()

    def __call__(self, ended, error):
        with self.changed:
            (self.badly if error else self.well).extend(move.list_no for move in ended)
            self.changed.notify()

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.well) + len(self.badly) >= count, 10)


def copied(stream, *submitted, rate=None):
    """What arrived of moves that were submitted together, and the arena after it, by pages."""
    source = torch.arange(16, dtype=torch.uint8).repeat_interleave(PAGE_BYTES)
    arena = torch.full((16 * PAGE_BYTES,), 255, dtype=torch.uint8)
    copier = Copier(stream, source, arena, rate or Rate(1e9, 1.0), PAGE_BYTES)
    arrivals = Arrivals()
    for some in submitted:
        copier.submit(some, arrivals)
    arrivals.wait(sum(map(len, submitted)))
    copier.close()
    assert copier.depth == 256
    return arrivals, arena.view(-1, PAGE_BYTES)


def test_every_list_comes_whole_and_once():
    stream = SimulatedGpu(longest_s=0.002).stream()
    arrivals, pages = copied(stream, moves((0, 4), (1, 5), (9, 0)), moves((12, 1)))
    assert sorted(arrivals.well) == [0, 0, 1, 2]
    assert pages[:6, 0].tolist() == [9, 12, 255, 255, 0, 1]
    assert (pages == pages[:, :1]).all()


def test_a_copy_that_fails_is_told_and_the_others_come():
    failing = iter([False, True, False])
    stream = SimulatedGpu(copy_fails=lambda: next(failing)).stream()
    arrivals, pages = copied(stream, moves((0, 8), (5, 1), (7, 2)))
    assert (sorted(arrivals.well), arrivals.badly) == ([0, 2], [1])
    assert int(pages[2, 0]) == 7


def test_a_device_that_refuses_copies_is_told_from_the_links_thread():
    assert copied(RefusingStream(), moves((0, 0)))[0].badly == [0]


def test_the_link_learns_its_rate():
    rate = Rate(PAGE_BYTES, PAGE_BYTES / 1e9)
    copied(SimulatedGpu(bytes_per_s=4e6).stream(), *(moves((number, number)) for number in range(10)), rate=rate)
    assert 2e5 < rate.bytes_per_s < 4.9e6


def test_a_rate_forgets_what_was_long_ago():
    rate = Rate(1000, 1.0)
    for _ in range(200):
        rate.observe(100 << 20, 0.01)
    assert rate.bytes_per_s == pytest.approx((100 << 20) / 0.01, rel=0.01)


# Scoring


def test_work_that_exceeds_the_workspace_is_done_in_parts(tmp_path):
    """Any number of lists and queries over a workspace that holds one list's bounds and little more."""
    random_ = np.random.default_rng(2)
    for metric in Metric:
        vectors = make_vectors(900, 12, 5, 30)
        index, _ivf = make_index(tmp_path / metric, vectors, 9, metric, Storage.FLOAT16)
        memory = np.fromfile(index.paths.lists, np.uint8)
        exact = ListScorer.over(memory, index, Coarse(index.centroids, metric))
        exact.table[:] = index.table
        for room in (int(index.sizes.max()), 400, 2000):
            gpu = SimulatedGpu()
            launches = []

            def launch(work, launches=launches):
                launches.append(work.bounds.shape)
                reference.launch(work)

            workspace = gpu.allocate(4 * max(room, int(index.sizes.max())), "")
            scorer = GpuScorer(gpu, index, torch.from_numpy(memory), exact, launch, workspace)
            scorer.table[:] = index.table
            queries = make_vectors(5, 12, 8)
            lists = np.stack([random_.permutation(9)[:6] for _ in queries])
            lists[random_.random(lists.shape) < 0.2] = -1
            for k in (1, 7, 700):
                found = scorer.score(queries, lists, k)
                wanted = exact.score(queries, lists, k)
                np.testing.assert_array_equal(found[0], wanted[0])
                np.testing.assert_array_equal(found[1], wanted[1])
            assert all(rows * width <= len(workspace) // 4 for rows, width in launches)
            assert len(launches) > 3 if room < 2000 else launches
        exact.close()


def test_ties_across_the_last_candidate_are_found_out(tmp_path, open_over):
    """More equal vectors than candidates come back: they are asked for until the order by row is certain."""
    vectors = np.repeat(make_vectors(4, 8, 1), 100, axis=0)
    index, ivf = make_index(tmp_path, vectors, 2, Metric.IP, Storage.FLOAT32)
    retriever = open_over(index)
    for row in (0, 150, 399):
        query = vectors[row][None]
        report = check_search(retriever, ivf, query, 5, 2, moved_for(retriever, query, 2))
        assert (report.lists_hit, report.lists_in_place, report.lists_failed) == (report.lists_wanted, 0, 0)
        check_released(retriever.tier)


# The tier


def test_misses_are_dealt_with_from_both_ends(tmp_path, open_over):
    vectors = make_vectors(20_000, 64, 1)
    index, ivf = make_index(tmp_path, vectors, 60, Metric.L2, Storage.FLOAT32)
    in_place = []
    for ratio in (1.0, 1e6, 1e-6):  # of the processor's rate to the link's
        retriever = open_over(index, rates=JoinRates(1e9, 1e9 * ratio, 1e9, 0.0))
        for rate in (retriever.tier.in_place.link, retriever.tier.in_place.scoring):
            rate.observe = lambda _nbytes, _took_s: None
        report = check_search(retriever, ivf, vectors[:1] + 0.1, 5, 60)
        assert report.lists_missed == report.lists_wanted
        in_place.append(report.lists_in_place)
        check_released(retriever.tier)
    assert 5 <= in_place[0] <= 55
    assert in_place[1:] == [60, 0]


@pytest.mark.parametrize(("copies", "works"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.3), (1.0, 1.0)])
def test_a_failing_device_costs_time_and_no_result(small, open_over, copies, works):
    index, ivf, vectors = small
    dice, failing = random.Random(1), [0.0, 0.0]
    gpu = SimulatedGpu(copy_fails=lambda: dice.random() < failing[0], work_fails=lambda: dice.random() < failing[1])
    retriever = open_over(index, gpu)
    failing[:] = copies, works
    failed = 0
    retriever.tier.in_place.scoring.observe(1 << 40, 1e6)  # so slow that the link gets everything
    for row in range(6):
        prefetch = retriever.prefetch(vectors[row][None], 6)
        time.sleep(0.005)
        failed += check_search(retriever, ivf, vectors[row : row + 2], 5, 6, prefetch).lists_failed
        check_released(retriever.tier)
    assert failed > 0


def test_a_device_that_is_lost_costs_time_and_no_result(small):
    """From some moment on it refuses every copy and all work."""
    index, ivf, vectors = small
    lost = threading.Event()

    class Losing(SimulatedGpu):
        def stream(self):
            return RefusingStream(lost.is_set, super().stream())

    gpu = Losing(work_fails=lost.is_set)
    retriever = cuda_retriever(index, gpu)
    check_search(retriever, ivf, vectors[:1], 5, 6)
    assert len(gpu.locked) == 1
    lost.set()
    for row in range(4):
        query = vectors[row][None]
        prefetch = moved_for(retriever, query, 20)
        report = check_search(retriever, ivf, query, 5, 20, prefetch)
        assert report.lists_moved == 0
        assert report.lists_failed >= prefetch.failed > 0
        check_released(retriever.tier)
    retriever.close()
    assert not gpu.locked


def test_a_stream_of_a_lost_device_closes_quietly(monkeypatch):
    class Lost:
        def __init__(self, device):
            pass

        def synchronize(self):
            raise RuntimeError("CUDA error: the device was lost")

    monkeypatch.setattr(torch.cuda, "Stream", Lost)
    Gpu.stream(SimpleNamespace(device=torch.device("cuda", 0))).close()


def test_an_arena_too_small_for_all_misses_is_no_obstacle(small, open_over):
    index, ivf, vectors = small
    retriever = open_over(index, SimulatedGpu(longest_s=0.001), int(index.list_bytes.max()))
    retriever.tier.in_place.scoring.observe(1 << 40, 1e6)
    report = check_search(retriever, ivf, vectors[:3], 5, 20)
    assert report.lists_in_place > 0, "what had no room was scored in place"


def test_a_refused_lock_is_said_loudly_or_refused(small, open_over):
    index, ivf, vectors = small
    retriever = open_over(index, SimulatedGpu(lock_refused="out of memory"))
    (note,) = retriever.tier.notes
    assert "simulated GPU: out of memory" in note
    check_search(retriever, ivf, vectors[:1], 5, 6)
    with fails(ResourceError, "out of memory", "--require-pinned"):
        open_over(index, SimulatedGpu(lock_refused="out of memory"), require_pinned=True)


def test_memory_of_the_device(small, open_over):
    index, ivf, vectors = small
    # The arena takes no more than the index, so it is the workspace that does not fit.
    with fails(ResourceError, "64.0 MiB", "simulated GPU", "--gpu-memory"):
        open_over(index, SimulatedGpu(memory_bytes=10 << 20), 50 << 40)
    with fails(UsageError, "--gpu-memory"):
        open_over(index, arena_bytes=PAGE_BYTES - 1)
    with fails(ResourceError, "1.00 GiB", "1.06 GiB"):
        open_over(index, SimulatedGpu(memory_bytes=1 << 30))
    retriever = open_over(index, SimulatedGpu(memory_bytes=(1 << 30) + (65 << 20)))
    assert retriever.tier.arena_bytes <= 1 << 20
    check_search(retriever, ivf, vectors[:1], 5, 20)


def test_names_of_gpus():
    assert [gpu_number(name) for name in ("auto", "cuda", "cuda:3")] == [None, 0, 3]
    for name in ("cpu", "gpu", "cuda:", "cuda:x", ""):
        with fails(UsageError, f"'{name}'"):
            gpu_number(name)
    with fails(ResourceError, "GPU 99", torch.__version__):
        find_gpu("cuda:99")


def test_what_torch_says_of_the_device_is_ours_to_tell():
    with fails(ResourceError, "scoring", "--gpu-memory"), translated("scoring"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    with fails(ResourceError, "moving lists", "CUDA error: misaligned") as caught, translated("moving lists"):
        raise RuntimeError("CUDA error: misaligned\nmore")
    assert "more" not in str(caught.value)


# A real one


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("storage", Storage)
    @pytest.mark.parametrize("metric", Metric)
    def test_the_results_are_faiss_s(self, tmp_path, open_over, metric, storage):
        vectors = make_vectors(30_000, 130, 1, 50)
        index, ivf = make_index(tmp_path, vectors, 64, metric, storage)
        retriever = open_over(index, Gpu(0), int(index.list_bytes.sum()) // 2)
        for row in range(20):
            queries = vectors[row : row + 1 + row % 4] + np.float32(0.1)
            prefetch = retriever.prefetch(queries, 16)
            time.sleep(0.002)
            check_search(retriever, ivf, queries, 10, 16, prefetch)
            retriever.tier.check_integrity()

    def test_memory_is_locked_and_given_back(self, small):
        index, ivf, vectors = small
        gpu = Gpu(0)
        free = gpu.free_bytes()
        retriever = cuda_retriever(index, gpu, 64 << 20)
        assert retriever.tier.notes == []
        check_search(retriever, ivf, vectors[:2], 5, 20)
        retriever.close()
        del retriever
        assert gpu.free_bytes() >= free - (16 << 20)


# The kernel


def test_the_kernel_compiles_for_gpus_with_wide_loads_and_without_spills():
    """For Ampere and Hopper, neither of which need be here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).parents[1] / "support" / "compile_kernel.py"
    ran = subprocess.run(
        [sys.executable, program, "80,90"], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == 2 * 2 * 3 * 2
    for each in found:
        assert each["spilled_bytes"] == each["spills"] == 0, each
        assert 0 < each["registers"] <= 255, each
        if each["dimension"] % 16 == 0:
            assert each["loads_of_16_bytes"] > 0, each
    assert "warn" not in ran.stderr.lower(), "what the compiler says would reach the user"
