"""How fast a file is read, past the page cache and through it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from telerag_cli.config import PAGE_BYTES
from telerag_cli.planning.profile import LinkPoint
from telerag_cli.planning.timing import Effort, rate, times_s
from telerag_cli.tiers.transport import DirectReader, Move, allocate, move_all

DIRECT = "O_DIRECT"
BUFFERED = "page cache, cold"
CACHED = "page cache, no O_DIRECT here"
BATCH_BYTES = 16 << 20
"""Read in one repeat, and at least two transfers for each that may be under way."""


def disk_points(path: Path, sizes: Sequence[int], depths: Sequence[int], effort: Effort) -> Iterator[LinkPoint]:
    """The link by size and depth, and through the page cache at the largest of both.

    Args:
        path: a file to read from, whose pages may leave the cache.
        sizes: bytes of a transfer.
        depths: transfers under way.
        effort: how long.

    Raises:
        TeleragError: it cannot be read.
    """
    most = path.stat().st_size // PAGE_BYTES * PAGE_BYTES
    fitting = sorted({min(size, most) for size in sizes if min(size, most)})
    memory = allocate(max(2 * max(depths) * max(fitting), BATCH_BYTES))
    random = np.random.default_rng(0)
    for depth in depths:
        reader = DirectReader(path, memory, threads=depth)
        way = DIRECT if reader.direct else CACHED
        try:
            for nbytes in fitting:
                yield _point(path, reader, way, nbytes, depth, most, random, effort)
        finally:
            reader.close()
    reader = DirectReader(path, memory, threads=max(depths), direct=False)
    try:
        yield _point(path, reader, BUFFERED, fitting[-1], max(depths), most, random, effort)
    finally:
        reader.close()


def _point(
    path: Path,
    reader: DirectReader,
    way: str,
    nbytes: int,
    depth: int,
    most: int,
    random: np.random.Generator,
    effort: Effort,
) -> LinkPoint:
    count = max(2 * depth, BATCH_BYTES // nbytes)
    slots = max(2 * depth, 1)

    def batch() -> None:
        places = random.integers((most - nbytes) // PAGE_BYTES + 1, size=count) * PAGE_BYTES
        move_all(reader, [Move(i, int(place), i % slots * nbytes, nbytes) for i, place in enumerate(places)])

    if way != BUFFERED:
        return LinkPoint("disk", way, nbytes, depth, rate(count * nbytes, times_s(batch, effort)))
    times = []
    for _ in range(effort.repeats):
        forget(path)
        times += times_s(batch, Effort(0.0, 1, 1, 0.0))[:1]
    return LinkPoint("disk", way, nbytes, depth, rate(count * nbytes, times))


def forget(path: Path) -> None:
    """Have the kernel drop a file's pages, so that what is read next comes from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
