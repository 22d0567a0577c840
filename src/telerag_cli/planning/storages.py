"""Scoring rates of storage types that an index does not have, from small made-up lists."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from telerag_cli.arrays import ByteArray
from telerag_cli.config import PAGE_BYTES, Metric, Storage
from telerag_cli.errors import ResourceError
from telerag_cli.index.artifact import ID_BYTES, EmbedderInfo, Index, IndexPaths, Manifest, code_size, lay_out
from telerag_cli.index.scoring import Coarse
from telerag_cli.planning.lists import scoring_rates
from telerag_cli.planning.profile import ScoringRate
from telerag_cli.planning.timing import Effort
from telerag_cli.tiers.host import open_host_tier
from telerag_cli.tiers.tier import FastTier

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

NLIST = 64
LIST_BYTES = 1 << 20


class MadeLists:
    """A `HostLists` of made-up vectors."""

    def __init__(self, memory: ByteArray) -> None:
        self.memory = memory

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def make_index(root: Path, dimension: int, metric: Metric, storage: Storage) -> tuple[Index, MadeLists]:
    """Make up an index of 64 lists of about 1 MiB, of which nothing is written to its folder yet, and its lists."""
    random = np.random.default_rng(0)
    size = code_size(dimension, storage)
    count = LIST_BYTES // (size + ID_BYTES)
    table, nbytes = lay_out(np.full(NLIST, count, np.int64), size)
    memory = np.zeros(-(-nbytes // PAGE_BYTES) * PAGE_BYTES, np.uint8)
    vectors = random.standard_normal((count, dimension), np.float32) / np.float32(np.sqrt(dimension))
    codes = {
        Storage.FLOAT32: vectors,
        Storage.FLOAT16: vectors.astype(np.float16),
        Storage.INT8: random.integers(256, size=(count, dimension), dtype=np.uint8),
    }[storage]
    raw = np.ascontiguousarray(codes).view(np.uint8).ravel()
    for number, (_size, capacity, offset) in enumerate(table.tolist()):
        memory[offset : offset + len(raw)] = raw
        rows = np.arange(number * count, (number + 1) * count)
        ids = offset + capacity * size
        memory[ids : ids + count * ID_BYTES] = rows.view(np.uint8)
    trained = np.concatenate([np.full(dimension, -1.0), np.full(dimension, 2.0)]).astype(np.float32)
    manifest = Manifest(dimension, metric, storage, NLIST, NLIST * count, size, 0, EmbedderInfo(None), {})
    centroids = random.standard_normal((NLIST, dimension), np.float32)
    return (
        Index(IndexPaths(root), manifest, centroids, table, trained if storage is Storage.INT8 else None),
        MadeLists(memory),
    )


def storage_rates(
    gpu: Gpu | None, dimension: int, metric: Metric, storages: Iterable[Storage], effort: Effort
) -> list[ScoringRate]:
    """Measure storage types in a tier on this GPU, or in RAM; a type without room for its lists is left out."""
    found: list[ScoringRate] = []
    for storage in storages:
        with tempfile.TemporaryDirectory(prefix="telerag-profile-") as folder, contextlib.suppress(ResourceError):
            index, lists = make_index(Path(folder), dimension, metric, storage)
            with contextlib.closing(_tier_over(gpu, index, lists)) as tier:
                found += scoring_rates(index, tier, effort)
    return found


def _tier_over(gpu: Gpu | None, index: Index, lists: MadeLists) -> FastTier:
    coarse, nbytes = Coarse(index.centroids, index.manifest.metric), int(index.list_bytes.sum())
    if gpu is None:
        lists.memory.tofile(index.paths.lists)
        return open_host_tier(index, coarse, nbytes)
    from telerag_cli.tiers.cuda.tier import open_cuda_tier

    return open_cuda_tier(index, coarse, gpu, nbytes, lists=lists)
