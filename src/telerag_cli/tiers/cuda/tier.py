"""Opening the ``cuda`` link: lists into host memory and page-locked, an arena on the GPU, both ends measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np
import torch

from telerag_cli.arrays import ByteArray, IntArray
from telerag_cli.config import CacheKind
from telerag_cli.errors import ResourceError
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse, ListScorer
from telerag_cli.progress import Advance
from telerag_cli.tiers.cuda import reference
from telerag_cli.tiers.cuda.copier import Copier
from telerag_cli.tiers.cuda.gpu import Copy, Gpu, Stream
from telerag_cli.tiers.cuda.scoring import GpuScorer, workspace_bytes
from telerag_cli.tiers.rates import InPlace, JoinRates, Rate
from telerag_cli.tiers.slow import HostLists, SlowTier
from telerag_cli.tiers.tier import FastTier, size_arena
from telerag_cli.tracing import Tracer
from telerag_cli.units import format_bytes

OPTION = "--gpu-memory"
RESERVE_BYTES = 1 << 30
"""Left free by ``auto``: for passing needs of the embedder and the top-k, and for others on the device."""
TRIAL_BYTES = 64 << 20
"""Moved and scored at the start to know how fast that goes."""
MAX_LISTS_TRIED = 256


def open_cuda_tier(
    index: Index,
    coarse: Coarse,
    gpu: Gpu,
    arena_bytes: int | None,
    *,
    require_pinned: bool = False,
    cache: CacheKind = CacheKind.FREQUENCY,
    advance: Advance = lambda _count: None,
    lists: HostLists | None = None,
    rates: JoinRates | None = None,
    tracer: Tracer | None = None,
) -> FastTier:
    """Read the index into host memory, take the arena, and measure link and scoring.

    ``arena_bytes`` is by default what is free on the device, less a reserve; an index smaller than that takes only what
    it needs. ``require_pinned`` refuses host memory that is not page-locked. ``lists`` are in host memory already, and
    are closed with the tier. ``rates`` were measured before: a profile's many repeats are better than one trial.

    Raises:
        UsageError: the arena is smaller than the largest list.
        ResourceError: host or device have too little memory, or page-locking is refused and required.
        ArtifactError: the lists cannot be read.
    """
    accounts = size_arena(index, free_for_arena(gpu, index) if arena_bytes is None else arena_bytes, OPTION)
    with contextlib.ExitStack() as undo:
        # Before minutes of reading: whether the device takes it, and whether pages can be locked at all.
        arena = gpu.allocate(max(accounts.nbytes, 4096), OPTION)
        workspace = gpu.allocate(workspace_bytes(index), OPTION)
        probe = np.zeros(1 << 20, np.uint8)
        notes = _lock(gpu, probe, require_pinned)
        if not notes:
            gpu.unlock(probe)
        slow = lists or SlowTier(index, advance)
        undo.callback(slow.close)
        if not notes:
            notes = _lock(gpu, slow.memory, require_pinned)
            if not notes:
                undo.callback(gpu.unlock, slow.memory)
        exact = ListScorer.over(slow.memory, index, coarse)
        undo.callback(exact.close)
        exact.table[:] = index.table
        stream = gpu.stream()
        undo.callback(stream.close)
        source = torch.from_numpy(slow.memory)
        trial = _Trial(index, min(TRIAL_BYTES, len(arena)))
        link = trial.move(stream, source, arena)
        scorer, note = _open_scorer(gpu, index, arena, exact, workspace, trial)
        if rates is None:
            place = InPlace(exact.score, trial.score_in_place(exact), link, *trial.score_moved(scorer))
        else:
            place = rates.in_place_by(exact.score)
        copier = Copier(stream, source, arena, place.link, index.list_bytes.mean())
        closing = undo.pop_all().close
    del source, arena, workspace  # theirs alone, so that closing frees them
    return FastTier(
        index, accounts, copier, scorer, cache=cache, in_place=place, notes=notes + note, closing=closing, tracer=tracer
    )


def free_for_arena(gpu: Gpu, index: Index) -> int:
    """Bytes for an arena that takes what is free, less scoring's workspace and a reserve.

    Raises:
        ResourceError: that is less than the largest list.
    """
    free, largest, beside = gpu.free_bytes(), int(index.list_bytes.max(initial=0)), workspace_bytes(index)
    left = free - RESERVE_BYTES - beside
    if left < largest:
        raise ResourceError(
            f"{gpu.name} has {format_bytes(free)} free, and the smallest arena with its reserve takes "
            f"{format_bytes(largest + RESERVE_BYTES + beside)}.",
            remedy=f"Free some of it, or give {OPTION}, which has no reserve.",
        )
    return left


def _lock(gpu: Gpu, memory: ByteArray, required: bool) -> list[str]:
    """Page-lock memory; what to say if that is refused."""
    refused = gpu.lock(memory)
    if refused is None:
        return []
    what = f"{format_bytes(memory.nbytes)} of host memory cannot be page-locked for {gpu.name}: {refused}."
    if required:
        raise ResourceError(what, remedy="Raise the limit of locked memory, or leave out --require-pinned.")
    return [f"{what} Lists move at a fraction of the link's speed."]


def _open_scorer(
    gpu: Gpu, index: Index, arena: torch.Tensor, exact: ListScorer, workspace: torch.Tensor, trial: _Trial
) -> tuple[GpuScorer, list[str]]:
    """A scorer that has scored: by the kernel where it runs, else by its reference, with a word about it.

    The kernel is compiled now, and not while the first question waits; compiling needs a C compiler, which may be
    missing.
    """
    note = []
    if gpu.device.type == "cuda":
        try:
            from telerag_cli.tiers.cuda import kernel

            scorer = GpuScorer(gpu, index, arena, exact, kernel.launch, workspace)
            trial.score_moved(scorer)
            return scorer, []
        except Exception as error:  # whatever Triton says: there is another way
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            note = [f"The scoring kernel does not run ({reason}), so torch scores the lists one by one."]
    return GpuScorer(gpu, index, arena, exact, reference.launch, workspace), note


class _Trial:
    """Lists that are moved and scored at the start, to know how fast that goes; the second of two times counts."""

    def __init__(self, index: Index, most_bytes: int) -> None:
        """Choose lists that are not empty, as they lie; at least one if there is one."""
        lists = np.flatnonzero(index.list_bytes > 0)[:MAX_LISTS_TRIED]
        ends = np.cumsum(index.list_bytes[lists])
        self._lists: IntArray = lists[: max(1, int(np.searchsorted(ends, most_bytes, side="right")))]
        self._list_bytes = index.list_bytes[self._lists]
        self._targets: IntArray = np.cumsum(self._list_bytes) - self._list_bytes
        self._nbytes = max(1.0, float(self._list_bytes.sum()))
        self._index = index

    def move(self, stream: Stream, source: torch.Tensor, arena: torch.Tensor) -> Rate:
        """Move them to the arena's beginning, as lookahead would."""
        columns = (self._index.offsets[self._lists].tolist(), self._targets.tolist(), self._list_bytes.tolist())
        copies = [
            Copy(source[begin : begin + nbytes], arena[target : target + nbytes])
            for begin, target, nbytes in zip(*columns, strict=True)
        ]

        def move() -> None:
            for event in stream.copy(copies):
                event.wait()

        return Rate(self._nbytes, _second_s(move))

    def score_in_place(self, scorer: ListScorer) -> Rate:
        """Score them where they lie."""
        return Rate(self._nbytes, _second_s(lambda: self._score(scorer, len(self._lists))))

    def score_moved(self, scorer: GpuScorer) -> tuple[Rate, float]:
        """Score them where they were moved to: the rate without the latency, and the latency (of one list) in s."""
        scorer.table[self._lists, :2] = self._index.table[self._lists, :2]
        scorer.table[self._lists, 2] = self._targets
        latency_s = _second_s(lambda: self._score(scorer, 1))
        all_s = _second_s(lambda: self._score(scorer, len(self._lists)))
        scorer.table[self._lists] = 0
        return Rate(self._nbytes, max(all_s - latency_s, all_s / 100)), latency_s

    def _score(self, scorer: ListScorer | GpuScorer, count: int) -> None:
        if len(self._lists):
            scorer.score(self._index.centroids[:1], self._lists[None, :count], 1)


def _second_s(function: Callable[[], object]) -> float:
    function()
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s
