"""The stages of gpu_check.py that measure parts: each takes what all share and returns what it found out."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from make_synthetic import Datastore
from synthetic_store import Block, packed, uniform
from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import CacheKind, Metric, Storage
from telerag_cli.errors import ResourceError
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse, best, empty_ivf, flat
from telerag_cli.prefetch.prefetcher import Prefetcher
from telerag_cli.retrieval.retriever import Neighbours, Retriever
from telerag_cli.tiers.cuda import reference
from telerag_cli.tiers.cuda.copier import Copier
from telerag_cli.tiers.cuda.gpu import Copy, Event, Gpu, Stream
from telerag_cli.tiers.cuda.reference import Launch, decoding_error
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.tiers.rates import Rate
from telerag_cli.tiers.tier import FastTier, size_arena

if TYPE_CHECKING:
    from gpu_check import Bench

LIST_SIZES = (200_000, 500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000)


@dataclass(frozen=True)
class Row:
    """A figure, what it stands beside, and whether it is as it should be (None: nothing is asked of it)."""

    what: str
    value: str
    against: str = ""
    goal: str = ""
    good: bool | None = None


@dataclass
class Outcome:
    """What a stage found out."""

    setting: str = ""
    """What all its rows were measured with."""
    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    wrong: bool = False
    """Whether the software is at fault: results differ, or the kernel did not run."""


def median(values: Sequence[float]) -> float:
    """Return the median with five digits."""
    return float(f"{statistics.median(values):.5g}")


def timed(function: Callable[[], object], synchronise: Callable[[], None] = lambda: None) -> float:
    """Return the seconds that a call takes."""
    synchronise()
    started_s = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started_s


# Exactness


class _Dice:
    """Says yes now and then, once it is rolling."""

    def __init__(self, share: float) -> None:
        self._random = np.random.default_rng(0)
        self._share = share
        self._lock = threading.Lock()
        self.rolling = False

    def __call__(self) -> bool:
        with self._lock:
            return self.rolling and bool(self._random.random() < self._share)


class _FailingStream:
    """A stream that says of some copies that they failed."""

    def __init__(self, stream: Stream, dice: _Dice) -> None:
        self._stream, self._dice = stream, dice
        self.close = stream.close

    def copy(self, copies: Sequence[Copy]) -> Sequence[Event]:
        if self._dice():
            raise ResourceError("The copy failed.", remedy="It was told to.")
        return self._stream.copy(copies)


class _FailingGpu(Gpu):
    """A GPU that says of some launches that they failed."""

    def __init__(self, number: int, dice: _Dice) -> None:
        super().__init__(number)
        self._dice = dice

    def stream(self) -> Stream:
        return _FailingStream(super().stream(), self._dice)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        if self._dice():
            raise ResourceError("The launch failed.", remedy="It was told to.")
        with super().working():
            yield


def exactness(bench: Bench) -> Outcome:
    """Compare searches with Faiss's, bit for bit."""
    outcome = Outcome()
    random = np.random.default_rng(0)
    vectors = bench.material.base[: bench.sizes.vectors].copy()
    twins = len(vectors) // 50
    vectors[-twins:] = vectors[:twins]  # equal scores, to be ordered by row
    nlist = max(8, len(vectors) // 160)
    centroids = vectors[random.choice(len(vectors), nlist, replace=False)].copy()
    each: list[dict[str, Any]] = []
    for storage in Storage:
        for metric in Metric:
            ivf = empty_ivf(flat(centroids, metric), vectors.shape[1], nlist, metric, storage)
            if storage is Storage.INT8:
                ivf.train(vectors)
            ivf.add(vectors)
            ivf.parallel_mode = 1
            with tempfile.TemporaryDirectory() as folder:
                index = packed(ivf, Path(folder), centroids, metric, storage)
                for share, failing in ((0.1, 0.0), (0.5, 0.2), (1.0, 0.0)):
                    found = _compare(bench, ivf, index, share, failing, random)
                    outcome.wrong |= bool(found["notes"]) and not bench.simulated
                    each.append({"storage": storage.value, "metric": metric.value, "arena_share": share, **found})
            if bench.late:
                break
    names = ("searches", "equal", "lists_failed", "lists_in_place")
    totals = {name: sum(one[name] for one in each) for name in names}
    same = totals["equal"] == totals["searches"]
    outcome.wrong |= not same or not totals["lists_failed"]
    outcome.raw = {"each": each, **totals}
    failed = f"{len(each)} tiers: storage types, metrics, arenas; {totals['lists_failed']:,} lists failed on purpose"
    what, value = (
        "Searches whose scores and rows are Faiss's, bit for bit",
        f"{totals['equal']} of {totals['searches']}",
    )
    outcome.rows.append(Row(what, value, failed, "all", same))
    return outcome


def _compare(
    bench: Bench, ivf: Any, index: Index, share: float, failing: float, random: np.random.Generator
) -> dict[str, Any]:
    """Search with an arena of a share of the index, with lookahead and without, where some copies and launches fail."""
    dice = _Dice(failing)
    gpu: Gpu = (
        SimulatedGpu(copy_fails=dice, work_fails=dice)
        if bench.simulated
        else _FailingGpu(bench.gpu.device.index or 0, dice)
    )
    questions, texts = bench.material.question, bench.material.written
    coarse = Coarse(index.centroids, index.manifest.metric)
    arena_bytes = max(int(index.list_bytes.max()), int(share * index.list_bytes.sum()))
    tier = open_cuda_tier(index, coarse, gpu, arena_bytes)
    retriever = Retriever(index, coarse, tier)
    dice.rolling = True
    nlist = index.manifest.nlist
    counts = dict.fromkeys(("searches", "equal", "lists_failed", "lists_in_place"), 0)
    for number in range(bench.sizes.searches):
        n = int(random.choice([1, 2, 7, min(33, len(questions))]))
        k, nprobe = int(random.choice([1, 10, 100])), int(random.choice([1, nlist // 4, nlist]))
        if number == 0:
            n, nprobe = bench.sizes.widest, nlist
        rows = random.integers(len(questions), size=n)
        ahead = None
        if number % 3:
            ahead = retriever.prefetch(questions[rows], nprobe, refining=number % 3 == 2)
            if number % 3 == 2:
                retriever.refine(ahead, texts[0.5][rows], nprobe, 0.5)
        queries = texts[1.0][rows]
        found = retriever.search(queries, k, nprobe, ahead)
        ivf.nprobe = nprobe
        counts["searches"] += 1
        counts["equal"] += _same(ivf, found, queries, k, index.manifest.metric)
        counts["lists_failed"] += found.report.lists_failed
        counts["lists_in_place"] += found.report.lists_in_place
    retriever.close()
    return {"failing": bool(failing), "notes": tier.notes, **counts}


def _same(ivf: Any, found: Neighbours, queries: FloatArray, k: int, metric: Metric) -> bool:
    """Tell whether a search found what Faiss finds, equal scores ordered by row."""
    scores, _rows = ivf.search(queries, k)
    width = k
    while True:  # until all that tie with the last are among them
        width = min(4 * width, ivf.ntotal)
        wide, rows = ivf.search(queries, width)
        if width == ivf.ntotal or (wide[:, -1] != wide[:, k - 1]).all():
            break
    return np.array_equal(found.scores, scores) and np.array_equal(found.rows, best(wide, rows, k, metric)[1])


# Bandwidth


class _Unscored:
    """The scorer of a tier that only moves."""

    def __init__(self, nlist: int) -> None:
        self.table = np.zeros((nlist, 3), np.uint64)

    def score(self, queries: FloatArray, lists: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def bandwidth(bench: Bench) -> Outcome:
    """Move lists of several sizes as lookahead does, and each time as many bytes in one copy."""
    outcome = Outcome()
    total = min(bench.sizes.moved_bytes, bench.gpu.free_bytes() // 2)
    block = Block(total)
    block.memory[:] = 1  # pages that nobody wrote are one and the same
    arena = bench.gpu.allocate(total, "--arena")
    stream = bench.gpu.stream()

    def rate(copies: Sequence[Copy]) -> float:
        return sum(len(each.source) for each in copies) / timed(lambda: stream.copy(copies)[-1].wait()) / 1e9

    pageable = rate([Copy(torch.from_numpy(block.memory), arena)])
    large: list[float] = []
    with bench.locked(block) as source:
        rate([Copy(source, arena)])
        for list_bytes in LIST_SIZES:
            index = uniform(list_bytes, min(total // list_bytes, 20_000))
            moved = int(index.list_bytes.sum())
            order = np.random.default_rng(list_bytes).permutation(index.manifest.nlist)
            places = zip(index.offsets[order].tolist(), index.list_bytes[order].tolist(), strict=True)
            bare = [Copy(source[begin : begin + size], arena[begin : begin + size]) for begin, size in places]
            rates: dict[str, list[float]] = {"lookahead": [], "bare": [], "one": []}
            for _ in range(bench.sizes.repeats):
                rates["one"].append(rate([Copy(source[:moved], arena[:moved])]))
                rates["bare"].append(rate(bare))
                took_s = _moving_s(bench, index, order, source, arena, rates["one"][-1])
                rates["lookahead"].append(moved / took_s / 1e9)
            large += rates["one"]
            ratio = median([some / other for some, other in zip(rates["lookahead"], rates["one"], strict=True)])
            ahead, one = median(rates["lookahead"]), median(rates["one"])
            size = f"{list_bytes / 1e6:g} MB"
            outcome.raw[size] = {name: median(values) for name, values in rates.items()}
            outcome.raw[size] |= {"ratio": ratio, "lists": len(order)}
            goal, good = ("at least 90 %", ratio >= 0.9) if list_bytes >= 1_000_000 else ("", None)
            what, value = f"Moving lists of {size} by lookahead", f"{ahead:.3g} GB/s ({ratio:.0%})"
            outcome.rows.append(Row(what, value, f"one copy of as many bytes: {one:.3g} GB/s", goal, good))
            if bench.late:
                break
    stream.close()
    block.close()
    outcome.raw |= {"one_copy_gb_per_s": median(large), "pageable_gb_per_s": pageable}
    value, against = f"{median(large):.3g} GB/s", f"pageable: {pageable:.3g} GB/s"
    outcome.rows.append(Row("One large copy, page-locked", value, against))
    return outcome


def _moving_s(
    bench: Bench, index: Index, order: IntArray, source: torch.Tensor, arena: torch.Tensor, rate: float
) -> float:
    """Return the seconds that one prefetch takes to move all lists in this order."""
    copier = Copier(bench.gpu.stream(), source, arena, Rate(rate * 1e9, 1.0), float(index.list_bytes.mean()))
    accounts = size_arena(index, len(arena), "--arena")
    tier = FastTier(index, accounts, copier, _Unscored(index.manifest.nlist), cache=CacheKind.NONE)
    started_s = time.perf_counter()
    (prefetch,) = Prefetcher(tier).start([order], len(order), len(order), tier.new_round(0.0))
    while not prefetch.idle:
        time.sleep(0.0002)
    took_s = time.perf_counter() - started_s
    moved = len(prefetch.moved)
    prefetch.end()
    tier.close()
    if moved != len(order):
        raise ResourceError(f"{moved} of {len(order)} lists were moved.", remedy="See the device's own log.")
    return took_s


# Scoring


def scoring(bench: Bench) -> Outcome:
    """Score lists in device memory, and copy as many bytes within it."""
    outcome, gpu = Outcome(), bench.gpu
    launch = reference.launch
    if not bench.simulated:
        from telerag_cli.tiers.cuda import kernel

        launch = kernel.launch
    for storage in Storage:
        store_bytes = min(bench.sizes.scored_bytes, gpu.free_bytes() // 3)
        stored = Datastore.near(bench.material.base, store_bytes, 4 << 20, storage)
        arena, other = (gpu.allocate(len(stored.memory), "--arena") for _ in range(2))
        arena.copy_(torch.from_numpy(stored.memory))
        index = stored.index
        stored.close()
        for n in (1, 8):
            work = _work(gpu, index, arena, bench.material.written[1.0][:n])
            run, copy = partial(launch, work), partial(other.copy_, arena)
            run()  # compiled now, if it is compiled at all
            pairs = [
                (timed(run, bench.synchronise), timed(copy, bench.synchronise)) for _ in range(4 * bench.sizes.repeats)
            ]
            ours_s, copy_s = (median(times) for times in zip(*pairs, strict=True))
            nbytes = float(work.host_sizes.sum()) * index.manifest.code_size
            rate, traffic = nbytes / ours_s / 1e9, 2 * len(arena) / copy_s / 1e9
            figures = {"gb_per_s": rate, "copy_read_and_write_gb_per_s": traffic, "bytes": nbytes, "seconds": ours_s}
            outcome.raw[f"{storage}, {n} queries"] = figures
            asked = n == 1 and storage is not Storage.INT8
            goal, good = ("at least 60 %", rate / traffic >= 0.6) if asked else ("", None)
            what = f"Scoring {storage} lists, {n} quer{'y' if n == 1 else 'ies'}"
            against = f"copy within the device, read and written: {traffic:.4g} GB/s"
            outcome.rows.append(Row(what, f"{rate:.4g} GB/s ({rate / traffic:.0%})", against, goal, good))
        if bench.late:
            break
    return outcome


def _work(gpu: Gpu, index: Index, arena: torch.Tensor, queries: FloatArray) -> Launch:
    """Return a launch of all lists for all queries; the arena holds them as ``lists.bin`` would."""
    storage, device = index.manifest.storage, gpu.device
    kind = {Storage.FLOAT32: torch.float32, Storage.FLOAT16: torch.float16, Storage.INT8: torch.uint8}[storage]
    vectors = arena[: len(arena) // 4 * 4].view(kind)
    n, nlist = len(queries), index.manifest.nlist
    # Queries of one list side by side, as the scorer has them.
    sizes = np.repeat(index.sizes, n)
    first = np.repeat(index.offsets // vectors.element_size(), n)
    columns = np.repeat(np.cumsum(index.sizes) - index.sizes, n)
    pairs = np.stack([np.tile(np.arange(n), nlist), first, sizes, columns])[:, sizes > 0]
    asked = torch.from_numpy(queries).to(device)
    ranges = np.zeros((2, 1), np.float32) if index.trained is None else index.trained.reshape(2, -1)
    low, step = torch.from_numpy(ranges).to(device)
    absolute = decoding_error(asked, low, step, l2=False) if storage is Storage.INT8 else torch.zeros(n, device=device)
    bounds = torch.empty((n, int(index.sizes.sum())), device=device)
    return Launch(
        vectors, asked, low, step, torch.from_numpy(pairs).to(device), bounds, absolute, False, sizes[sizes > 0]
    )


# Interference


def interference(bench: Bench) -> Outcome:
    """Decode with lists on their way all the time, and without, in turn."""
    llm = bench.llm
    outcome = Outcome(llm.name)
    total = min(bench.sizes.moved_bytes, bench.gpu.free_bytes() // 2)
    block = Block(total)
    block.memory[:] = 1
    arena = bench.gpu.allocate(total, "--arena")
    index = uniform(8_000_000, total // 8_000_000)
    order = np.random.default_rng(0).permutation(index.manifest.nlist)
    tokens = 8 * bench.sizes.answer_tokens
    took: dict[str, list[float]] = {"quiet": [], "moving": []}
    moved = 0
    stop = threading.Event()
    llm.write("Write.", 4)
    with bench.locked(block) as source, ThreadPoolExecutor(1) as mover:
        rate = total / _moving_s(bench, index, order, source, arena, 10.0) / 1e9

        def move() -> int:
            rounds = 0
            while not stop.is_set():
                _moving_s(bench, index, order, source, arena, rate)
                rounds += 1
            return rounds

        for number in range(2 * bench.sizes.repeats):
            for name in ("quiet", "moving")[:: 1 if number % 2 else -1]:
                stop.clear()
                moving = mover.submit(move) if name == "moving" else None
                took[name].append(llm.write("Write on and on.", tokens))
                stop.set()
                moved += moving.result() * total if moving else 0
            if bench.late:
                break
    slower = median([one / other for one, other in zip(took["moving"], took["quiet"], strict=True)]) - 1
    rates = {name: (tokens - 1) / median(values) for name, values in took.items()}
    outcome.raw = {"slower": slower, "tokens_per_s": rates, "pairs": len(took["quiet"])}
    outcome.raw |= {"moved_bytes": moved, "link_gb_per_s": rate}
    value, against = (
        f"{rates['moving']:.4g} tokens/s ({slower:+.1%} time)",
        f"nothing moving: {rates['quiet']:.4g} tokens/s",
    )
    outcome.rows.append(Row("Decoding while lists move", value, against, "less than 3 % slower", slower < 0.03))
    block.close()
    return outcome
