"""Opening the ``cuda`` link: lists into host memory and page-locked, an arena on the GPU, both ends measured."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch

from telerag_cli.config import format_bytes
from telerag_cli.errors import ResourceError
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse, ListScorer
from telerag_cli.tiers.base import InPlace, Rate
from telerag_cli.tiers.cache import CacheKind
from telerag_cli.tiers.cuda import reference
from telerag_cli.tiers.cuda.copier import Copier
from telerag_cli.tiers.cuda.gpu import Bytes, Copy, CudaGpu, Gpu, Stream
from telerag_cli.tiers.cuda.scoring import GpuScorer, workspace_bytes
from telerag_cli.tiers.slow import Advance, HostLists, SlowTier
from telerag_cli.tiers.tier import ArenaTier, size_arena
from telerag_cli.tracing import Tracer

OPTION = "--gpu-memory"
RESERVE_BYTES = 1 << 30
"""Left free by ``auto``: for the embedder's and the top-k's passing needs, and what others on the device may ask for."""
TRIAL_BYTES = 64 << 20
"""Moved and scored at the start to know how fast that goes."""
MOST_LISTS_TRIED = 256


def open_cuda_tier(index: Index, coarse: Coarse, gpu: Gpu, arena_bytes: int | None, *, require_pinned: bool = False,
                   cache: CacheKind = CacheKind.HOTNESS, advance: Advance = lambda _count: None,
                   lists: HostLists | None = None, tracer: Tracer | None = None) -> ArenaTier:  # fmt: skip
    """Read the index into host memory, take the arena, and measure link and scoring.

    Args:
        index: the opened index.
        coarse: its coarse quantizer.
        gpu: the device.
        arena_bytes: size of the arena; None for what is free on the device, less a reserve. An index smaller than that takes
            only what it needs.
        require_pinned: refuse to go on with host memory that is not page-locked.
        cache: what stays between queries.
        advance: told of bytes as they are read.
        lists: the lists, if they are in host memory already; they are closed with the tier.
        tracer: where moves are recorded.

    Raises:
        UsageError: the arena is smaller than the largest list.
        ResourceError: host or device have too little memory, or page-locking is refused and required.
        ArtifactError: the lists cannot be read.
    """
    accounts = size_arena(index, what_is_left(gpu, index) if arena_bytes is None else arena_bytes, OPTION)
    with contextlib.ExitStack() as undo:
        # Before minutes of reading: whether the device takes it, and whether pages can be locked at all.
        arena = gpu.allocate(max(accounts.nbytes, 4096), OPTION)
        workspace = gpu.allocate(workspace_bytes(index), OPTION)
        trial = np.zeros(1 << 20, np.uint8)
        notes = _lock(gpu, trial, require_pinned)
        if not notes:
            gpu.unlock(trial)
        slow = lists or SlowTier(index, advance)
        undo.callback(slow.close)
        if not notes:
            notes = _lock(gpu, slow.memory, require_pinned)
            if not notes:
                undo.callback(gpu.unlock, slow.memory)
        in_place = ListScorer.over(slow.memory, index, coarse)
        undo.callback(in_place.close)
        in_place.table[:] = index.table
        stream = gpu.stream()
        undo.callback(stream.close)
        source = torch.from_numpy(slow.memory)
        link, scoring = _try_link(index, stream, source, arena), _try_scoring(index, in_place)
        scorer, note = _open_scorer(gpu, index, arena, in_place, workspace)
        copier = Copier(stream, source, arena, link, index.extents.mean())
        closing = undo.pop_all().close
    del source, arena, workspace  # theirs alone, so that closing frees them
    return ArenaTier(index, accounts, copier, scorer, cache=cache, in_place=InPlace(in_place.score, scoring, link),
                     notes=[*notes, *note], closing=closing, tracer=tracer)  # fmt: skip


def _lock(gpu: Gpu, memory: Bytes, required: bool) -> list[str]:
    """Page-lock memory; what to say if that is refused."""
    refused = gpu.lock(memory)
    if refused is None:
        return []
    what = f"{format_bytes(memory.nbytes)} of host memory cannot be page-locked for {gpu.name}: {refused}."
    if required:
        raise ResourceError(what, remedy="Raise the limit of locked memory, or leave out --require-pinned.")
    return [f"{what} Lists move at a fraction of the link's speed."]


def what_is_left(gpu: Gpu, index: Index) -> int:
    """Bytes for an arena that takes what is free, less scoring's workspace and a reserve.

    Raises:
        ResourceError: that is less than the largest list.
    """
    free, largest = gpu.free_bytes(), int(index.extents.max(initial=0))
    left = free - RESERVE_BYTES - workspace_bytes(index)
    if left < largest:
        needed = largest + RESERVE_BYTES + workspace_bytes(index)
        raise ResourceError(f"{gpu.name} has {format_bytes(free)} free, and the smallest arena with its reserve takes "
                            f"{format_bytes(needed)}.", remedy=f"Free some of it, or give {OPTION}, which has no reserve.")  # fmt: skip
    return left


def _open_scorer(
    gpu: Gpu, index: Index, arena: torch.Tensor, exact: ListScorer, workspace: torch.Tensor
) -> tuple[GpuScorer, list[str]]:
    """A scorer that has scored: by the kernel where it runs, else by its reference, with a word about it.

    The lists of `_try_link` are in the arena. The kernel is compiled now, and not while the first question waits; compiling
    needs a C compiler, which may be missing.
    """
    reason = ""
    if isinstance(gpu, CudaGpu):
        try:
            from telerag_cli.tiers.cuda import kernel

            return _tried(GpuScorer(gpu, index, arena, exact, kernel.launch, workspace), index), []
        except Exception as error:  # whatever Triton says: there is another way
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    note = (
        [f"The scoring kernel does not run ({reason}), so torch scores the lists one by one."]
        if reason
        else []
    )
    return _tried(GpuScorer(gpu, index, arena, exact, reference.launch, workspace), index), note


def _tried(scorer: GpuScorer, index: Index) -> GpuScorer:
    """Score the first list of the arena."""
    for list_no in _some_lists(index, 1):
        scorer.table[list_no, :2] = index.table[list_no, :2]  # it lies at the arena's beginning
        scorer.score(index.centroids[:1], np.array([[list_no]]), 1)
        scorer.table[list_no] = 0
    return scorer


def _some_lists(index: Index, nbytes: int) -> list[int]:
    """Lists that are not empty, as they lie, up to so many bytes and at least one if there is one."""
    lists = np.flatnonzero(index.extents > 0)[:MOST_LISTS_TRIED]
    ends = np.cumsum(index.extents[lists])
    return [int(list_no) for list_no in lists[: max(1, int(np.searchsorted(ends, nbytes, side="right")))]]


def _try_link(index: Index, stream: Stream, source: torch.Tensor, arena: torch.Tensor) -> Rate:
    """Move some lists as lookahead would; the second time counts."""
    lists = _some_lists(index, min(TRIAL_BYTES, len(arena)))
    if not lists:
        return Rate(1.0, 1e-9)
    copies, target = [], 0
    for list_no in lists:
        begin, nbytes = int(index.offsets[list_no]), int(index.extents[list_no])
        copies.append(Copy(source[begin : begin + nbytes], arena[target : target + nbytes]))
        target += nbytes
    stream.copy(copies)[-1].wait()
    started_s = time.perf_counter()
    stream.copy(copies)[-1].wait()
    return Rate(target, time.perf_counter() - started_s)


def _try_scoring(index: Index, in_place: ListScorer) -> Rate:
    """Score some lists where they lie; the second time counts."""
    lists = _some_lists(index, TRIAL_BYTES)
    if not lists:
        return Rate(1.0, 1e-9)
    query, keys = index.centroids[:1], np.array([lists], np.int64)
    in_place.score(query, keys, 1)
    started_s = time.perf_counter()
    in_place.score(query, keys, 1)
    return Rate(float(index.extents[lists].sum()), time.perf_counter() - started_s)
