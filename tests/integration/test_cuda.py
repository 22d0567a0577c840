"""The cuda tier over the simulated GPU, and over a real one where there is one."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from indexes import expected, make_index, make_vectors
from telerag_cli.config import PAGE_BYTES, Metric, Storage
from telerag_cli.errors import ArtifactError, ResourceError, UsageError
from telerag_cli.index.scoring import Coarse, ListScorer
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.cuda import reference
from telerag_cli.tiers.cuda.copier import Copier, coalesce
from telerag_cli.tiers.cuda.gpu import Gpu, find_gpu, gpu_number, translated
from telerag_cli.tiers.cuda.scoring import GpuScorer
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.tiers.rates import Rate
from telerag_cli.tiers.slow import SlowTier
from telerag_cli.tiers.transport import Move

HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def small(tmp_path):
    vectors = make_vectors(400, 16, 1)
    index, ivf = make_index(tmp_path, vectors, 20, Metric.IP, Storage.FLOAT32)
    return index, ivf, vectors


def open_over(index, gpu, arena_bytes=None, **options):
    coarse = Coarse(index.centroids, index.manifest.metric)
    tier = open_cuda_tier(index, coarse, gpu, arena_bytes, **options)
    return tier, Retriever(index, coarse, tier)


def check(retriever, ivf, queries, k, nprobe, ahead=None):
    found = retriever.search(queries, k, nprobe, ahead)
    scores, _rows, ordered = expected(ivf, retriever.index.manifest.metric, queries, k, nprobe)
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.rows, ordered)
    return found.report


# The link


def moves(*list_bytes):
    """Moves of one page each from and to these pages."""
    return [
        Move(number, PAGE_BYTES * source, PAGE_BYTES * target, PAGE_BYTES)
        for number, (source, target) in enumerate(list_bytes)
    ]


def test_neighbours_on_both_sides_are_one_copy():
    runs = coalesce(moves((0, 4), (1, 5), (2, 7), (3, 8), (9, 9)))
    assert [[move.list_no for move in run] for run in runs] == [[0, 1], [2, 3], [4]]
    assert coalesce([]) == []


class ObservedRag:
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


def open_copier(gpu, pages=16, **rate):
    source = torch.arange(pages, dtype=torch.uint8).repeat_interleave(PAGE_BYTES)
    arena = torch.full((pages * PAGE_BYTES,), 255, dtype=torch.uint8)
    return source, arena, Copier(gpu.stream(), source, arena, Rate(1e9, 1.0), PAGE_BYTES)


def test_every_list_comes_whole_and_once():
    _source, arena, copier = open_copier(SimulatedGpu(longest_s=0.002))
    told = ObservedRag()
    copier.submit(moves((0, 4), (1, 5), (9, 0)), told)
    copier.submit(moves((12, 1)), told)
    told.wait(4)
    copier.close()
    assert sorted(told.well) == [0, 0, 1, 2]
    view = arena.view(-1, PAGE_BYTES)
    assert [int(page[0]) for page in view[:6]] == [9, 12, 255, 255, 0, 1]
    assert (view == view[:, :1]).all()


def test_a_copy_that_fails_is_told_and_the_others_come():
    fails = iter([False, True, False])
    _source, arena, copier = open_copier(SimulatedGpu(copy_fails=lambda: next(fails)))
    told = ObservedRag()
    copier.submit(moves((0, 8), (5, 1), (7, 2)), told)
    told.wait(3)
    copier.close()
    assert (sorted(told.well), told.badly) == ([0, 2], [1])
    assert int(arena[2 * PAGE_BYTES]) == 7


def test_a_device_that_refuses_copies_is_told_from_the_links_thread():
    class Refusing:
        def copy(self, copies):
            raise ResourceError("no")

        def close(self):
            pass

    source = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    copier = Copier(Refusing(), source, source.clone(), Rate(1e9, 1.0), PAGE_BYTES)
    told = ObservedRag()
    copier.submit(moves((0, 0)), told)
    told.wait(1)
    assert told.badly == [0]
    copier.close()


def test_the_link_learns_its_rate_and_keeps_busy_for_a_while_ahead():
    _source, _arena, copier = open_copier(SimulatedGpu(bytes_per_s=4e6))
    assert copier.depth == 256
    told = ObservedRag()
    for number in range(10):
        copier.submit(moves((number, number)), told)
    told.wait(10)
    copier.close()
    seen = Rate(1e-9, 1e-18)  # of what was moved, without what it began with
    seen.observe(copier.rate._bytes - 1e9, copier.rate._took_s - 1.0)
    assert 2e5 < seen.bytes_per_s < 4.4e6


def test_a_rate_forgets_what_was_long_ago():
    rate = Rate(1000, 1.0)
    for _ in range(200):
        rate.observe(100 << 20, 0.01)
    assert rate.bytes_per_s == pytest.approx((100 << 20) / 0.01, rel=0.01)


# The slow tier


def child(index, code):
    """Another process of this user that runs code with `index` at hand; it prints a line and waits to be ended."""
    prelude = (
        "import sys, types, pathlib, numpy as np, time\n"
        "from telerag_cli.tiers.slow import SlowTier\n"
        "root = pathlib.Path(sys.argv[1])\n"
        f"paths = types.SimpleNamespace(lists=root / 'lists.bin')\n"
        f"index = types.SimpleNamespace(paths=paths, list_bytes=np.array({index.list_bytes.tolist()}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, str(index.paths.root)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def test_lists_are_read_whole_and_another_process_shares_them(small):
    index, _ivf, _vectors = small
    told = []
    slow = SlowTier(index, told.append)
    assert not slow.shared
    assert sum(told) == index.paths.lists.stat().st_size
    assert slow.memory.tobytes() == index.paths.lists.read_bytes()
    other = child(
        index, "slow = SlowTier(index); print(slow.shared, int(slow.memory.sum(dtype='int64')), flush=True); input()"
    )
    assert other.stdout.readline().split() == ["True", str(int(slow.memory.sum(dtype=np.int64)))]
    slow.memory[7] ^= 0xFF  # the very same pages, so the next one sees it
    third = child(index, "slow = SlowTier(index); print(int(slow.memory[7]), flush=True)")
    assert int(third.communicate()[0]) == slow.memory[7]
    slow.close()
    # The first has let go; who has it keeps it, and gives it on.
    again = SlowTier(index)
    assert again.shared
    again.close()
    other.communicate("\n")
    last = SlowTier(index)
    assert not last.shared
    last.close()


def test_a_reader_that_is_killed_leaves_nothing_half_read(small):
    index, _ivf, _vectors = small
    reader = child(index, "def stall(count):\n    print('reading', flush=True); time.sleep(60)\nSlowTier(index, stall)")
    assert reader.stdout.readline() == "reading\n"
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    slow = SlowTier(index)
    assert not slow.shared
    assert slow.memory.tobytes() == index.paths.lists.read_bytes()
    slow.close()


def test_another_index_in_its_place_is_not_taken_for_it(small):
    index, _ivf, _vectors = small
    slow = SlowTier(index)
    size = index.paths.lists.stat().st_size
    index.paths.lists.unlink()
    index.paths.lists.write_bytes(os.urandom(size))
    other = SlowTier(index)
    assert not other.shared
    assert other.memory.tobytes() == index.paths.lists.read_bytes()
    slow.close()
    other.close()


def test_a_file_too_short_is_an_error_and_nobody_finds_what_was_read(small):
    index, _ivf, _vectors = small
    whole = index.paths.lists.read_bytes()
    with index.paths.lists.open("r+b") as file:
        file.truncate(PAGE_BYTES)
    with pytest.raises(ArtifactError, match=r"lists\.bin ends at byte 4,096") as kept:
        SlowTier(index)
    child_sees = child(index, "try: SlowTier(index)\nexcept Exception as error: print(error, flush=True)")
    assert "ends at byte 4,096" in child_sees.communicate()[0]
    assert kept
    index.paths.lists.write_bytes(whole)
    slow = SlowTier(index)
    assert not slow.shared
    assert slow.memory.tobytes() == whole
    slow.close()


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


def test_ties_across_the_last_candidate_are_found_out(tmp_path):
    """More equal vectors than candidates come back: they are asked for until the order by row is certain."""
    vectors = np.repeat(make_vectors(4, 8, 1), 100, axis=0)
    index, ivf = make_index(tmp_path, vectors, 2, Metric.IP, Storage.FLOAT32)
    _tier, retriever = open_over(index, SimulatedGpu())
    for row in (0, 150, 399):
        ahead = retriever.prefetch(vectors[row][None], 2)
        while not ahead.idle:
            time.sleep(0.001)
        report = check(retriever, ivf, vectors[row][None], 5, 2, ahead)
        assert report.lists_hit == report.lists_wanted
    retriever.close()


# The tier


def test_what_lookahead_moved_is_hit_and_scored_on_the_device(small):
    index, ivf, vectors = small
    tier, retriever = open_over(index, SimulatedGpu())
    ahead = retriever.prefetch(vectors[:1], 6)
    while not ahead.idle:
        time.sleep(0.001)
    report = check(retriever, ivf, vectors[:1], 5, 6, ahead)
    assert (report.lists_hit, report.lists_in_place, report.lists_failed) == (report.lists_wanted, 0, 0)
    tier.check_integrity()
    assert tier.occupancy().references == 0
    retriever.close()


def test_misses_are_dealt_with_from_both_ends(tmp_path):
    vectors = make_vectors(20_000, 64, 1)
    index, ivf = make_index(tmp_path, vectors, 60, Metric.L2, Storage.FLOAT32)
    tier, retriever = open_over(index, SimulatedGpu())
    both = 0
    for ratio in (1.0, 1e6, 1e-6):  # of the processor's rate to the link's
        tier.in_place.link.__init__(1e9, 1.0)
        tier.in_place.scoring.__init__(1e9 * ratio, 1.0)
        tier.in_place.link.observe = tier.in_place.scoring.observe = lambda _bytes, _took_s: None
        tier.new_round(0.0)
        fresh, other = open_over(index, SimulatedGpu())
        fresh.in_place.link.__dict__.update(tier.in_place.link.__dict__)
        fresh.in_place.scoring.__dict__.update(tier.in_place.scoring.__dict__)
        report = check(other, ivf, vectors[:1] + 0.1, 5, 60)
        assert report.lists_missed == report.lists_wanted
        if ratio == 1.0:
            both = report.lists_in_place
            assert 5 <= both <= 55
        else:
            assert report.lists_in_place == (60 if ratio > 1 else 0)
        fresh.check_integrity()
        other.close()
    retriever.close()


@pytest.mark.parametrize(("copies", "works"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.3), (1.0, 1.0)])
def test_a_failing_device_costs_time_and_no_result(small, copies, works):
    index, ivf, vectors = small
    dice = random.Random(1)
    broken = {"copies": 0.0, "works": 0.0}
    gpu = SimulatedGpu(
        copy_fails=lambda: dice.random() < broken["copies"], work_fails=lambda: dice.random() < broken["works"]
    )
    tier, retriever = open_over(index, gpu)
    broken.update(copies=copies, works=works)
    failed = 0
    tier.in_place.scoring.observe(1 << 40, 1e6)  # so slow that the link gets everything
    for row in range(6):
        ahead = retriever.prefetch(vectors[row][None], 6)
        time.sleep(0.005)
        failed += check(retriever, ivf, vectors[row : row + 2], 5, 6, ahead).lists_failed
        tier.check_integrity()
        assert tier.occupancy().references == 0
    assert failed > 0
    retriever.close()


def test_a_device_that_is_lost_costs_time_and_no_result(small):
    """From some moment on it refuses every copy and all work."""
    index, ivf, vectors = small
    lost = threading.Event()

    class Losing(SimulatedGpu):
        def stream(self):
            stream = super().stream()

            class Refusing:
                def copy(self, copies):
                    if lost.is_set():
                        raise ResourceError("The GPU is lost.")
                    return stream.copy(copies)

                def close(self):
                    stream.close()

            return Refusing()

    gpu = Losing(work_fails=lost.is_set)
    tier, retriever = open_over(index, gpu)
    check(retriever, ivf, vectors[:1], 5, 6)
    lost.set()
    for row in range(4):
        ahead = retriever.prefetch(vectors[row][None], 20)
        while not ahead.idle:
            time.sleep(0.001)
        report = check(retriever, ivf, vectors[row][None], 5, 20, ahead)
        assert report.lists_moved == 0
        assert report.lists_failed >= ahead.failed > 0
        tier.check_integrity()
        assert tier.occupancy().references == 0
    retriever.close()
    assert not gpu.locked


def test_a_stream_of_a_lost_device_closes_quietly(monkeypatch):
    class Lost:
        def __init__(self, device):
            pass

        def synchronize(self):
            raise RuntimeError("CUDA error: the device was lost")

    monkeypatch.setattr(torch.cuda, "Stream", Lost)
    stream = Gpu.stream(SimpleNamespace(device=torch.device("cuda", 0)))
    stream.close()


def test_an_arena_too_small_for_all_misses_is_no_obstacle(small):
    index, ivf, vectors = small
    tier, retriever = open_over(index, SimulatedGpu(longest_s=0.001), int(index.list_bytes.max()))
    tier.in_place.scoring.observe(1 << 40, 1e6)
    report = check(retriever, ivf, vectors[:3], 5, 20)
    assert report.lists_in_place > 0, "what had no room was scored in place"
    retriever.close()


def test_a_refused_lock_is_said_loudly_or_refused(small):
    index, ivf, vectors = small
    tier, retriever = open_over(index, SimulatedGpu(lock_refused="out of memory"))
    assert len(tier.notes) == 1
    assert "cannot be page-locked for simulated GPU: out of memory" in tier.notes[0]
    check(retriever, ivf, vectors[:1], 5, 6)
    retriever.close()
    with pytest.raises(ResourceError, match="cannot be page-locked"):
        open_over(index, SimulatedGpu(lock_refused="out of memory"), require_pinned=True)


def test_locked_memory_is_unlocked_at_the_end(small):
    index, _ivf, _vectors = small
    gpu = SimulatedGpu()
    _tier, retriever = open_over(index, gpu)
    assert len(gpu.locked) == 1
    retriever.close()
    assert not gpu.locked


def test_memory_of_the_device(small):
    index, ivf, vectors = small
    # The arena takes no more than the index, so it is the workspace that does not fit.
    with pytest.raises(
        ResourceError, match=r"64.0 MiB do not fit simulated GPU, where .* Choose a smaller --gpu-memory"
    ):
        open_over(index, SimulatedGpu(memory_bytes=10 << 20), 50 << 40)
    with pytest.raises(UsageError, match=r"smaller than the largest list.*--gpu-memory"):
        open_over(index, SimulatedGpu(), PAGE_BYTES - 1)
    with pytest.raises(
        ResourceError, match=r"has 1\.00 GiB free, and the smallest arena with its reserve takes 1\.06 GiB"
    ):
        open_over(index, SimulatedGpu(memory_bytes=1 << 30))
    gpu = SimulatedGpu(memory_bytes=(1 << 30) + (65 << 20))
    tier, retriever = open_over(index, gpu)
    assert tier.arena_bytes <= 1 << 20
    check(retriever, ivf, vectors[:1], 5, 20)
    retriever.close()


@pytest.mark.parametrize(("name", "number"), [("auto", None), ("cuda", 0), ("cuda:3", 3)])
def test_names_of_gpus(name, number):
    assert gpu_number(name) == number


@pytest.mark.parametrize("name", ["cpu", "gpu", "cuda:", "cuda:x", ""])
def test_what_names_no_gpu(name):
    with pytest.raises(UsageError, match="names no GPU"):
        gpu_number(name)


def test_a_gpu_that_is_not_there():
    with pytest.raises(ResourceError, match=r"GPU 99 was asked for, and torch .* finds"):
        find_gpu("cuda:99")


def test_what_torch_says_of_the_device_is_ours_to_tell():
    with pytest.raises(ResourceError, match=r"ran out of memory while scoring"), translated("scoring"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    with (
        pytest.raises(ResourceError, match=r"failed while moving lists: CUDA error: misaligned"),
        translated("moving lists"),
    ):
        raise RuntimeError("CUDA error: misaligned\nmore")


# A real one


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("metric", Metric)
def test_on_a_gpu_the_results_are_faiss_s(tmp_path, metric, storage):
    vectors = make_vectors(30_000, 130, 1, 50)
    index, ivf = make_index(tmp_path, vectors, 64, metric, storage)
    tier, retriever = open_over(index, Gpu(0), int(index.list_bytes.sum()) // 2)
    for row in range(20):
        queries = vectors[row : row + 1 + row % 4] + np.float32(0.1)
        ahead = retriever.prefetch(queries, 16)
        time.sleep(0.002)
        check(retriever, ivf, queries, 10, 16, ahead)
        tier.check_integrity()
    retriever.close()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_on_a_gpu_memory_is_locked_and_given_back(small):
    index, ivf, vectors = small
    gpu = Gpu(0)
    free = gpu.free_bytes()
    tier, retriever = open_over(index, gpu, 64 << 20)
    assert tier.notes == []
    check(retriever, ivf, vectors[:2], 5, 20)
    retriever.close()
    del tier, retriever
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
