"""The ``host`` link: the index file on disk, an arena in RAM, scoring by Faiss over the arena."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from telerag_cli.arrays import ByteArray
from telerag_cli.config import CacheKind
from telerag_cli.files import HeldFile
from telerag_cli.index.artifact import Index
from telerag_cli.index.scoring import Coarse, ListScorer
from telerag_cli.tiers.tier import FastTier, size_arena
from telerag_cli.tiers.transport import CheckedLink, DirectReader, Move, Transport, allocate
from telerag_cli.tracing import Tracer

TransportFactory = Callable[[Path | HeldFile, ByteArray], Transport]


def open_host_tier(
    index: Index,
    coarse: Coarse,
    arena_bytes: int,
    *,
    cache: CacheKind = CacheKind.FREQUENCY,
    transport: TransportFactory = DirectReader,
    tracer: Tracer | None = None,
) -> FastTier:
    """Allocate an arena in RAM, of ``arena_bytes`` or what the index needs, and open the link to the disk.

    ``transport`` makes the link from ``lists.bin`` and the arena's memory; the rest is as in `FastTier`. A list is
    compared with its checksum when it arrives for the first time, at some 20 GB/s.

    Raises:
        UsageError: the arena is smaller than the largest list.
        ResourceError: there is not that much memory.
    """
    arena = size_arena(index, arena_bytes, "--fast-memory")
    memory = allocate(max(arena.nbytes, 4096))
    link = transport(index.held(index.paths.lists), memory)
    if index.checksums is not None:
        checked = np.zeros(index.manifest.nlist, np.bool_)

        def check(move: Move) -> None:
            if not checked[move.list_no]:
                index.check_list(move.list_no, memory[move.target : move.target + move.nbytes])
                checked[move.list_no] = True

        link = CheckedLink(link, check)
    return FastTier(index, arena, link, ListScorer.over(memory, index, coarse), cache=cache, tracer=tracer)
