"""Everything worth knowing about telerag on a GPU, in one command and less than eight minutes.

    python scripts/gpu_check.py [--stages exactness,bandwidth] [--lookahead-data FOLDER] [--model GGUF] [-o RESULT.json]

exactness     searches of the cuda tier against Faiss on the CPU, bit for bit: all storage types and metrics, small and
large arenas,
              with lookahead and without, and with a link and a device that fail now and then
bandwidth     lists of 0.2 to 16 MB moved as lookahead moves them, against one copy of as many bytes
scoring       the scoring kernel against a copy within the device
end-to-end    HyDE replayed over a datastore in host memory: Faiss on all cores, no lookahead, by the question, refined;
and
              the join alone against Faiss and against moving everything
interference  decoding with lists on their way and without

Times of the LLM are those of a real llama.cpp model, whose weights may be random (--random-model); embeddings are
recorded ones if --lookahead-data names them, else random, and take no time. Results are written after each stage. Where
there is no GPU, --simulated runs the same code, small, on the processor; its times mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthetic_store import Block, Datastore, Material, make_material, packed, read_material, uniform
from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import CacheKind, Metric, Storage, format_bytes, parse_bytes
from telerag_cli.errors import ResourceError, TeleragError
from telerag_cli.files import write_json
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse, ListScorer, best, empty_ivf, flat
from telerag_cli.llm.models import resolve_model
from telerag_cli.prefetch.order import blend
from telerag_cli.prefetch.prefetcher import Prefetcher
from telerag_cli.retrieval.retriever import Found, Retriever
from telerag_cli.system import available_bytes, hardware
from telerag_cli.tiers.cuda import reference
from telerag_cli.tiers.cuda.copier import Copier
from telerag_cli.tiers.cuda.gpu import Copy, Event, Gpu, Stream, find_gpu
from telerag_cli.tiers.cuda.reference import Launch, decoding_error
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.tiers.rates import Rate
from telerag_cli.tiers.tier import FastTier, size_arena

REFINED_AT = (0.25, 0.5, 0.75)
K = 10
HUNG = 124
"""The exit status if a stage does not come back."""


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


@dataclass(frozen=True)
class Sizes:
    """How large everything is: for a GPU, or small enough for tests."""

    vectors: int
    searches: int
    widest: int
    """Queries of the largest search."""
    moved_bytes: int
    repeats: int
    scored_bytes: int
    list_bytes: int
    passage_tokens: int
    answer_tokens: int
    prompt_words: int
    questions: int


LARGE = Sizes(
    vectors=20_000,
    searches=12,
    widest=1500,
    moved_bytes=4 << 30,
    repeats=5,
    scored_bytes=4 << 30,
    list_bytes=10 << 20,
    passage_tokens=96,
    answer_tokens=48,
    prompt_words=600,
    questions=40,
)
SMALL = Sizes(
    vectors=1500,
    searches=3,
    widest=3,
    moved_bytes=32 << 20,
    repeats=2,
    scored_bytes=4 << 20,
    list_bytes=64 << 10,
    passage_tokens=12,
    answer_tokens=4,
    prompt_words=20,
    questions=2,
)
LIST_SIZES = (200_000, 500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000)


class Bench:
    """What stages share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.simulated = bool(options.simulated)
        self.gpu: Gpu = SimulatedGpu() if self.simulated else find_gpu(options.device)
        self.sizes = SMALL if self.simulated else LARGE
        self.material: Material = read_material(options.lookahead_data) if options.lookahead_data else make_material()
        self.ends_s: float = time.monotonic() + 60 * options.minutes
        self.stage_ends_s: float = self.ends_s

    @property
    def late(self) -> bool:
        """Whether the stage should come to its end."""
        return time.monotonic() > self.stage_ends_s

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.gpu.device.type == "cuda":
            torch.cuda.synchronize(self.gpu.device)

    @contextlib.contextmanager
    def locked(self, block: Block) -> Iterator[torch.Tensor]:
        """The block as a tensor, page-locked as long."""
        refused = self.gpu.lock(block.memory)
        if refused:
            raise ResourceError(
                f"{format_bytes(len(block.memory))} cannot be page-locked: {refused}.",
                remedy="Raise the limit of locked memory.",
            )
        try:
            yield torch.from_numpy(block.memory)
        finally:
            self.gpu.unlock(block.memory)

    @cached_property
    def llm(self) -> Llm:
        """The model, loaded when first asked for and before the arena takes its memory."""
        options = self.options
        return Llm(options.model, options.random_model, options.n_gpu_layers, self.gpu.device.index)


class Llm:
    """A llama.cpp model that writes so many tokens, whatever they are."""

    def __init__(self, model: str | None, random_size: str | None, gpu_layers: int | None, gpu: int | None) -> None:
        import llama_cpp

        from telerag_cli.llm.llama_model import LlamaModel
        from telerag_cli.llm.llamacpp import LlamaCpp

        path = resolve_model(model, None)
        if gpu_layers is None:
            gpu_layers = -1 if gpu is not None and llama_cpp.llama_supports_gpu_offload() else 0
        with contextlib.ExitStack() as undo:
            if random_size:
                from make_random_model import make

                made = Path(undo.enter_context(tempfile.TemporaryDirectory())) / f"random {random_size} q4_0.gguf"
                make(path, random_size, "q4_0", 0, made)
                path = made
            weights = LlamaModel(path, gpu_layers=gpu_layers, gpu=gpu)
            self._files = undo.pop_all()
        self.name = f"{weights.name} with {'all' if gpu_layers < 0 else gpu_layers} layers on the GPU"
        self._generator = LlamaCpp(weights, context_tokens=2048)
        self._runner = asyncio.Runner()

    def write(self, prompt: str, tokens: int, on_count: Callable[[int], None] = lambda _count: None) -> float:
        """Seconds of decoding ``tokens`` after the first one; a prompt is computed anew each time."""
        from telerag_cli.llm.base import Message, Request

        self._generator.forget()
        request = Request([Message("user", prompt)], tokens, ignore_eos=True)
        written = self._runner.run(self._generator.generate(request, lambda _text, count: on_count(count)))
        return written.decode_s

    def close(self) -> None:
        """Free it."""
        self._generator.close()
        self._runner.close()
        self._files.close()


def gb_per_s(nbytes: float, took_s: float) -> float:
    """Decimal gigabytes a second."""
    return nbytes / took_s / 1e9


def median(values: Sequence[float]) -> float:
    """Rounded to what is worth keeping."""
    return float(f"{statistics.median(values):.5g}")


# Exactness


class _Dice:
    """Says yes now and then, once it is told to begin."""

    def __init__(self, share: float) -> None:
        self._random = np.random.default_rng(0)
        self._share = share
        self._lock = threading.Lock()
        self.rolling = False

    def __call__(self) -> bool:
        with self._lock:
            return self.rolling and bool(self._random.random() < self._share)


class _Failing:
    """A stream of which some copies, and a GPU of which some launches, are said to have failed."""

    def __init__(self, stream: Stream, dice: _Dice) -> None:
        self._stream = stream
        self._dice = dice

    def copy(self, copies: Sequence[Copy]) -> list[Event]:
        if self._dice():
            raise ResourceError("The copy failed.", remedy="It was told to.")
        return self._stream.copy(copies)

    def close(self) -> None:
        self._stream.close()


class _FailingGpu(Gpu):
    def __init__(self, number: int, dice: _Dice) -> None:
        super().__init__(number)
        self._dice = dice

    def stream(self) -> Stream:
        return _Failing(super().stream(), self._dice)

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
    vectors[-len(vectors) // 50 :] = vectors[: len(vectors) // 50 + 1][: len(vectors[-len(vectors) // 50 :])]
    questions, texts = bench.material.question, bench.material.written
    nlist = max(8, len(vectors) // 160)
    centroids = vectors[random.choice(len(vectors), nlist, replace=False)].copy()
    compared = equal = failed = in_place = 0
    each = []
    for storage in Storage:
        for metric in Metric:
            ivf = empty_ivf(flat(centroids, metric), vectors.shape[1], nlist, metric, storage)
            if storage is Storage.INT8:
                ivf.train(vectors)
            ivf.add(vectors)
            ivf.parallel_mode = 1
            with tempfile.TemporaryDirectory() as folder:
                index = packed(ivf, Path(folder), centroids, metric, storage)
                coarse = Coarse(centroids, metric)
                for share, dice in ((0.1, _Dice(0.0)), (0.5, _Dice(0.2)), (1.0, _Dice(0.0))):
                    gpu = _with_failures(bench, dice)
                    arena_bytes = max(int(index.list_bytes.max()), int(share * index.list_bytes.sum()))
                    tier = open_cuda_tier(index, coarse, gpu, arena_bytes)
                    outcome.wrong |= bool(tier.notes) and not bench.simulated
                    retriever = Retriever(index, coarse, tier)
                    dice.rolling = True
                    here, same, notes = 0, 0, tier.notes
                    for number in range(bench.sizes.searches):
                        n = int(random.choice([1, 2, 7, min(33, len(questions))]))
                        k, nprobe = (int(random.choice([1, 10, 100])), int(random.choice([1, nlist // 4, nlist])))
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
                        here += 1
                        same += _same(ivf, found, queries, k, metric)
                        failed += found.report.lists_failed
                        in_place += found.report.lists_in_place
                    retriever.close()
                    compared, equal = compared + here, equal + same
                    each.append(
                        {
                            "storage": storage.value,
                            "metric": metric.value,
                            "arena_share": share,
                            "failing": share == 0.5,
                            "searches": here,
                            "equal": same,
                            "notes": notes,
                        }
                    )
            if bench.late:
                break
    outcome.wrong |= equal != compared or not failed
    outcome.raw = {
        "each": each,
        "searches": compared,
        "equal": equal,
        "lists_failed": failed,
        "lists_in_place": in_place,
    }
    outcome.rows.append(
        Row(
            "Searches whose scores and rows are Faiss's, bit for bit",
            f"{equal} of {compared}",
            f"{len(each)} tiers: storage types, metrics, arenas; {failed:,} lists failed on purpose",
            "all",
            equal == compared,
        )
    )
    return outcome


def _with_failures(bench: Bench, dice: _Dice) -> Gpu:
    if bench.simulated:
        return SimulatedGpu(copy_fails=dice, work_fails=dice)
    return _FailingGpu(bench.gpu.device.index, dice)


def _same(ivf: Any, found: Found, queries: FloatArray, k: int, metric: Metric) -> bool:
    """Whether a search found what Faiss finds, equal scores ordered by row."""
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
    """Of a tier that only moves."""

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
    pageable = _copies_gb_per_s(stream, [Copy(torch.from_numpy(block.memory), arena)])
    large: list[float] = []
    with bench.locked(block) as source:
        _copies_gb_per_s(stream, [Copy(source, arena)])
        for list_bytes in LIST_SIZES:
            index = uniform(list_bytes, min(total // list_bytes, 20_000))
            moved = int(index.list_bytes.sum())
            order = np.random.default_rng(list_bytes).permutation(index.manifest.nlist)
            places = zip(index.offsets[order].tolist(), index.list_bytes[order].tolist(), strict=True)
            bare = [Copy(source[begin : begin + size], arena[begin : begin + size]) for begin, size in places]
            one: list[float] = []
            one_by_one: list[float] = []
            ahead: list[float] = []
            for _ in range(bench.sizes.repeats):
                one.append(_copies_gb_per_s(stream, [Copy(source[:moved], arena[:moved])]))
                one_by_one.append(_copies_gb_per_s(stream, bare))
                ahead.append(gb_per_s(moved, _moving_s(bench, index, order, source, arena, one[-1])))
            large += one
            ratio = median([some / other for some, other in zip(ahead, one, strict=True)])
            size = f"{list_bytes / 1e6:g} MB"
            rates = {"lookahead": median(ahead), "bare": median(one_by_one), "one": median(one)}
            outcome.raw[size] = rates | {"ratio": ratio, "lists": len(order)}
            asked = list_bytes >= 1_000_000
            outcome.rows.append(
                Row(
                    f"Moving lists of {size} by lookahead",
                    f"{median(ahead):.3g} GB/s ({ratio:.0%})",
                    f"one copy of as many bytes: {median(one):.3g} GB/s",
                    "at least 90 %" if asked else "",
                    ratio >= 0.9 if asked else None,
                )
            )
            if bench.late:
                break
    stream.close()
    block.close()
    outcome.raw |= {"one_copy_gb_per_s": median(large), "pageable_gb_per_s": pageable}
    outcome.rows.append(
        Row("One large copy, page-locked", f"{median(large):.3g} GB/s", f"pageable: {pageable:.3g} GB/s")
    )
    return outcome


def _copies_gb_per_s(stream: Stream, copies: Sequence[Copy]) -> float:
    """The rate of copies that are started all at once."""
    return gb_per_s(sum(len(each.source) for each in copies), _timed(lambda: stream.copy(copies)[-1].wait()))


def _timed(function: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


def _moving_s(
    bench: Bench, index: Index, order: IntArray, source: torch.Tensor, arena: torch.Tensor, rate: float
) -> float:
    """Seconds that a round of lookahead takes to move all lists in this order."""
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
    outcome = Outcome()
    for storage in Storage:
        _score_stored(bench, storage, outcome)
        if bench.late:
            break
    return outcome


def _score_stored(bench: Bench, storage: Storage, outcome: Outcome) -> None:
    gpu = bench.gpu
    launch = reference.launch
    if not bench.simulated:
        from telerag_cli.tiers.cuda import kernel

        launch = kernel.launch
    store = Datastore(bench.material, min(bench.sizes.scored_bytes, gpu.free_bytes() // 3), 4 << 20, storage)
    index = store.index
    arena = gpu.allocate(len(store.memory), "--arena")
    other = gpu.allocate(len(store.memory), "--arena")
    arena.copy_(torch.from_numpy(store.memory))
    store.close()
    for n in (1, 8):
        work = _work(gpu, index, arena, bench.material.written[1.0][:n])
        run, copy = partial(launch, work), partial(other.copy_, arena)
        run()  # compiled now, if it is compiled at all
        ours, copies = [], []
        for _ in range(4 * bench.sizes.repeats):
            ours.append(_device_s(bench, run))
            copies.append(_device_s(bench, copy))
        nbytes = float(work.host_sizes.sum()) * index.manifest.code_size
        rate, traffic = gb_per_s(nbytes, median(ours)), gb_per_s(2 * len(arena), median(copies))
        asked = n == 1 and storage is not Storage.INT8
        outcome.raw[f"{storage}, {n} queries"] = {
            "gb_per_s": rate,
            "copy_read_and_write_gb_per_s": traffic,
            "bytes": nbytes,
            "seconds": median(ours),
        }
        outcome.rows.append(
            Row(
                f"Scoring {storage} lists, {n} quer{'y' if n == 1 else 'ies'}",
                f"{rate:.4g} GB/s ({rate / traffic:.0%})",
                f"copy within the device, read and written: {traffic:.4g} GB/s",
                "at least 60 %" if asked else "",
                rate / traffic >= 0.6 if asked else None,
            )
        )


def _work(gpu: Gpu, index: Index, arena: torch.Tensor, queries: FloatArray) -> Launch:
    """A launch of all lists for all queries; the arena holds them as ``lists.bin`` would."""
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


def _device_s(bench: Bench, function: Callable[[], object]) -> float:
    bench.synchronise()
    started_s = time.perf_counter()
    function()
    bench.synchronise()
    return time.perf_counter() - started_s


# End to end


class FaissInMemory:
    """Faiss over the same lists in host memory, all cores, ``parallel_mode=1``: its best."""

    def __init__(self, store: Datastore) -> None:
        self._coarse = store.coarse
        self._scorer = ListScorer.over(store.memory, store.index, store.coarse)
        self._scorer.table[:] = store.index.table
        self.close = self._scorer.close

    def search(self, queries: FloatArray, nprobe: int) -> tuple[FloatArray, IntArray]:
        """Scores and rows, (n, k)."""
        return self._scorer.score(queries, self._coarse.probe(queries, nprobe)[1], K)


def end_to_end(bench: Bench) -> Outcome:
    """Replay HyDE by several systems in turn, and compare joins."""
    llm = bench.llm  # before the arena takes its memory
    store = _store(bench)
    index, coarse, gpu = store.index, store.coarse, bench.gpu
    nprobe = bench.options.nprobe or max(1, index.manifest.nlist // 16)
    texts = bench.material.written[1.0][:32]
    probed = np.median([index.list_bytes[coarse.probe(text[None], nprobe)[1][0]].sum() for text in texts])
    arena_bytes = bench.options.arena or min(len(store.memory) // 4, gpu.free_bytes() * 3 // 4)
    tier = open_cuda_tier(index, coarse, gpu, arena_bytes, cache=CacheKind.NONE, lists=store)
    retriever, in_memory = Retriever(index, coarse, tier), FaissInMemory(store)
    try:
        outcome = Outcome(
            f"{nprobe} of {index.manifest.nlist:,} lists of {format_bytes(len(store.memory))} {index.manifest.storage}, "
            f"{format_bytes(int(probed))} probed, arena {format_bytes(tier.arena_bytes)}, {bench.material.source} "
            f"embeddings, {llm.name}"
        )
        outcome.raw = {"setting": outcome.setting, "notes": tier.notes}
        _joins(bench, retriever, in_memory, nprobe, outcome)
        _hyde(bench, retriever, in_memory, nprobe, outcome)
    finally:
        in_memory.close()
        retriever.close()
    return outcome


def _store(bench: Bench) -> Datastore:
    asked = bench.options.bytes
    if asked is None:
        asked = SMALL.moved_bytes if bench.simulated else min(60 * 10**9, available_bytes() // 2)
    done = 0
    told_s = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, told_s
        done += count
        if time.monotonic() - told_s > 5:
            told_s = time.monotonic()
            print(f"  {format_bytes(done)} of {format_bytes(asked)} made", file=sys.stderr, flush=True)

    return Datastore(bench.material, asked, bench.sizes.list_bytes, Storage(bench.options.storage), advance=advance)


def _joins(bench: Bench, retriever: Retriever, in_memory: FaissInMemory, nprobe: int, outcome: Outcome) -> None:
    """The join with nothing in the arena, beside its two extremes."""
    in_memory_s, move_all_s, join_s, in_place = [], [], [], []
    place = retriever.tier.in_place
    queries = bench.material.written[1.0]
    until_s = time.monotonic() + 0.3 * (bench.stage_ends_s - time.monotonic())
    for number in range(4 * bench.sizes.questions):
        query = queries[number % len(queries)][None]
        in_memory_s.append(_timed(partial(in_memory.search, query, nprobe)))
        retriever.tier.in_place = None
        move_all_s.append(retriever.search(query, K, nprobe).report.join_s)
        retriever.tier.in_place = place
        report = retriever.search(query, K, nprobe).report
        join_s.append(report.join_s)
        in_place.append(report.lists_in_place / max(report.lists_wanted, 1))
        if time.monotonic() > until_s:
            break
    took = {"faiss": median(in_memory_s), "move-all": median(move_all_s), "join": median(join_s)}
    ratio = took["join"] / min(took["faiss"], took["move-all"])
    outcome.raw["joins"] = took | {
        "in_place_share": median(in_place),
        "searches": len(join_s),
        "ratio_to_better": ratio,
    }
    outcome.rows.append(
        Row(
            f"Join with nothing in the arena, p50 of {len(join_s)}",
            f"{took['join'] * 1e3:.3g} ms ({ratio:.2f} x the better)",
            f"Faiss on all cores: {took['faiss'] * 1e3:.3g} ms; moving everything: {took['move-all'] * 1e3:.3g} ms",
            "at most 1.05 x",
            ratio <= 1.05,
        )
    )


SYSTEMS = ("faiss", "off", "question", "refined")


def _hyde(bench: Bench, retriever: Retriever, in_memory: FaissInMemory, nprobe: int, outcome: Outcome) -> None:
    """Passage, retrieval, answer: each question by every system, in an order that rotates."""
    sizes, material, llm = bench.sizes, bench.material, bench.llm
    took: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    retrieval: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    hits: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    same = True
    passages = "What was found says this and that. " * (sizes.prompt_words // 7)
    llm.write("Warm up.", 4)
    with ThreadPoolExecutor(1) as refinement_embedder:
        for number in range(min(sizes.questions, len(material.question))):
            final = material.written[1.0][number][None]
            answers = []
            for name in SYSTEMS[number % len(SYSTEMS) :] + SYSTEMS[: number % len(SYSTEMS)]:
                started_s = time.perf_counter()
                ahead = None
                sketched: list[Future[None]] = []
                due = list(REFINED_AT) if name == "refined" else []
                question = material.question[number]
                if name in ("question", "refined"):
                    ahead = retriever.prefetch(question[None], nprobe, refining=name == "refined")

                def on_count(
                    count: int,
                    due: list[float] = due,
                    ahead: Any = ahead,
                    question: FloatArray = question,
                    row: int = number,
                    sketched: list[Future[None]] = sketched,
                ) -> None:
                    while due and count >= due[0] * sizes.passage_tokens:
                        share = due.pop(0)
                        query = blend(question, material.written[share][row], share)[None]
                        sketched.append(refinement_embedder.submit(retriever.refine, ahead, query, nprobe, share))

                llm.write(f"Write a passage that answers question {number}.", sizes.passage_tokens, on_count)
                arrived_s = time.perf_counter()
                if name == "faiss":
                    scores, rows = in_memory.search(final, nprobe)
                    hits[name].append(0.0)
                else:
                    found = retriever.search(final, K, nprobe, ahead)
                    scores, rows = found.scores, found.rows
                    hits[name].append(found.report.lists_hit / max(found.report.lists_wanted, 1))
                retrieval[name].append(time.perf_counter() - arrived_s)
                llm.write(f"{passages} Answer question {number}.", sizes.answer_tokens)
                took[name].append(time.perf_counter() - started_s)
                for each in sketched:
                    each.result()
                answers.append((scores.tobytes(), rows.tobytes()))
            same &= len(set(answers)) == 1
            if bench.late:
                break
    count = len(took["faiss"])
    outcome.wrong |= not same
    outcome.raw["hyde"] = {
        name: {"total_s": median(took[name]), "retrieval_s": median(retrieval[name]), "hit_share": median(hits[name])}
        for name in SYSTEMS
    } | {
        "questions": count,
        "same_results": same,
        "passage_tokens": sizes.passage_tokens,
        "answer_tokens": sizes.answer_tokens,
    }
    for name in SYSTEMS[1:]:
        whole = median([one / other for one, other in zip(took["faiss"], took[name], strict=True)])
        part = median([one / other for one, other in zip(retrieval["faiss"], retrieval[name], strict=True)])
        label = {"off": "no lookahead", "question": "lookahead by the question", "refined": "refined lookahead"}[name]
        retrieval_ms = {each: 1e3 * median(retrieval[each]) for each in ("faiss", name)}
        outcome.rows.append(
            Row(
                f"HyDE, {label}, p50 of {count}",
                f"retrieval {retrieval_ms[name]:.3g} ms ({part:.2f} x), whole {median(took[name]):.3g} s ({whole:.2f} x), "
                f"{median(hits[name]):.0%} of the lists there",
                f"Faiss on all cores: {retrieval_ms['faiss']:.3g} ms, {median(took['faiss']):.3g} s",
            )
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
    llm.write("Write.", 4)
    with bench.locked(block) as source:
        rate = gb_per_s(total, _moving_s(bench, index, order, source, arena, 10.0))
        for number in range(2 * bench.sizes.repeats):
            for name in ("quiet", "moving")[:: 1 if number % 2 else -1]:
                stop = threading.Event()

                def move(stop: threading.Event = stop) -> int:
                    rounds = 0
                    while not stop.is_set():
                        _moving_s(bench, index, order, source, arena, rate)
                        rounds += 1
                    return rounds

                with ThreadPoolExecutor(1) as mover:
                    moving = mover.submit(move) if name == "moving" else None
                    took[name].append(llm.write("Write on and on.", tokens))
                    stop.set()
                    moved += moving.result() * total if moving else 0
            if bench.late:
                break
    slower = median([one / other for one, other in zip(took["moving"], took["quiet"], strict=True)]) - 1
    rates = {name: (tokens - 1) / median(values) for name, values in took.items()}
    outcome.raw = {
        "slower": slower,
        "tokens_per_s": rates,
        "pairs": len(took["quiet"]),
        "moved_bytes": moved,
        "link_gb_per_s": rate,
    }
    outcome.rows.append(
        Row(
            "Decoding while lists move",
            f"{rates['moving']:.4g} tokens/s ({slower:+.1%} time)",
            f"nothing moving: {rates['quiet']:.4g} tokens/s",
            "less than 3 % slower",
            slower < 0.03,
        )
    )
    block.close()
    return outcome


STAGES: dict[str, tuple[Callable[[Bench], Outcome], float]] = {
    "exactness": (exactness, 2.0),
    "bandwidth": (bandwidth, 1.0),
    "scoring": (scoring, 1.5),
    "end-to-end": (end_to_end, 4.0),
    "interference": (interference, 1.0),
}
"""Each with its share of the time."""


def nbytes(text: str) -> int:
    """A size such as 8GiB, for argparse."""
    try:
        return parse_bytes(text)
    except TeleragError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Run the stages, write after each, print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, with commas between")
    parser.add_argument("--simulated", action="store_true", help="the processor in the GPU's place, and small")
    parser.add_argument("--device", default="auto", help="cuda:N [default: the first]")
    parser.add_argument("--bytes", type=nbytes, help="of the datastore [default: 60 GB, or half of the free memory]")
    parser.add_argument("--arena", type=nbytes, help="bytes of it [default: a quarter of the datastore]")
    parser.add_argument("--nprobe", type=int, help="[default: a sixteenth of the lists]")
    parser.add_argument(
        "--storage", choices=[Storage.FLOAT32.value, Storage.FLOAT16.value], default=Storage.FLOAT32.value
    )
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="stages are cut short to end in so many [default: 7]"
    )
    parser.add_argument("--lookahead-data", type=Path, help="folder of recorded embeddings [default: random ones]")
    parser.add_argument("--model", help="GGUF file [default: the bundled model]")
    parser.add_argument("--random-model", metavar="SIZE", help="random weights in the GGUF file's place, such as 8B")
    parser.add_argument("--n-gpu-layers", type=int, help="of the model on the GPU [default: all, if llama.cpp can]")
    parser.add_argument("-o", "--output", type=Path, help="[default: in benchmarks/results, named by the GPU]")
    options = parser.parse_args()
    chosen = options.stages.split(",")
    if unknown := [name for name in chosen if name not in STAGES]:
        parser.error(f"there is no stage '{unknown[0]}'; the stages are {', '.join(STAGES)}")
    if options.random_model:
        from make_random_model import SHAPES

        if options.random_model not in SHAPES:
            parser.error(f"there is no model of the size '{options.random_model}'; the sizes are {', '.join(SHAPES)}")
    try:
        if {"end-to-end", "interference"} & set(chosen):  # rather now than after minutes
            resolve_model(options.model, None)
        bench = Bench(options)
    except TeleragError as error:
        sys.exit(f"error: {error}")
    output = options.output
    if output is None and not options.simulated:
        name = "".join(letter if letter.isalnum() else "_" for letter in bench.gpu.name.lower())
        output = Path(__file__).parent.parent / "benchmarks" / "results" / f"gpu_check_{name}.json"
    watchdog = threading.Timer(60 * options.minutes + 50, _hung)
    watchdog.daemon = True
    watchdog.start()

    stages: dict[str, dict[str, Any]] = {}
    found: list[Outcome] = []
    failed = False
    for place, name in enumerate(chosen):
        run, share = STAGES[name]
        left_s = max(0.0, bench.ends_s - time.monotonic())
        bench.stage_ends_s = time.monotonic() + left_s * share / sum(STAGES[each][1] for each in chosen[place:])
        print(f"{name} ...", file=sys.stderr, flush=True)
        began_s = time.monotonic()
        try:
            outcome = run(bench)
            stages[name] = {"wrong": outcome.wrong, **outcome.raw}
            failed |= outcome.wrong
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            stages[name] = {"error": what}
            outcome = Outcome(rows=[Row(name, f"failed: {what.splitlines()[0]}", good=False)])
            failed = True
        found.append(outcome)
        stages[name]["seconds"] = round(time.monotonic() - began_s, 1)
        print(f"{name}: {stages[name]['seconds']} s", file=sys.stderr, flush=True)
        if output:
            _write(output, bench, stages, found)
    if "llm" in vars(bench):
        bench.llm.close()
    watchdog.cancel()
    print_table(found)
    if output:
        print(output)
    sys.exit(1 if failed else 0)


def _hung() -> None:
    print("error: a stage did not come back; what the others found was written.", file=sys.stderr, flush=True)
    os._exit(HUNG)


def _write(output: Path, bench: Bench, stages: dict[str, Any], found: Sequence[Outcome]) -> None:
    figures = [
        {
            "what": f"{row.what}, {outcome.setting}" if outcome.setting else row.what,
            "value": row.value,
            "against": row.against,
            "goal": row.goal,
        }
        for outcome in found
        for row in outcome.rows
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = {} if bench.simulated else {"figures": figures}  # a simulation is no figure
    about = {"command": shlex.join(["python", *sys.argv]), "hardware": hardware()}
    write_json(output, about | {"gpu": bench.gpu.name, "simulated": bench.simulated, "stages": stages, **kept})


def print_table(found: Sequence[Outcome]) -> None:
    """A line or two for each figure."""
    for outcome in found:
        if outcome.setting:
            print(f"     {outcome.setting}:")
        for row in outcome.rows:
            mark = {True: "ok", False: "MISS", None: ""}[row.good]
            goal = f" [{row.goal}]" if row.goal else ""
            print(f"{mark:4} {row.what}: {row.value}{goal}")
            if row.against:
                print(f"         against {row.against}")


if __name__ == "__main__":
    main()
