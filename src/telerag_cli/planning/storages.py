"""Small made-up indexes in memory, to know how fast each storage type is scored on a machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from telerag_cli.arrays import ByteArray
from telerag_cli.config import Metric, Storage
from telerag_cli.index.artifact import ID_BYTES, EmbedderInfo, Index, IndexPaths, Manifest, code_size, lay_out

NLIST = 64
LIST_BYTES = 1 << 20


class MadeLists:
    """A `HostLists` of vectors that nobody will search for."""

    def __init__(self, memory: ByteArray) -> None:
        self.memory = memory

    def close(self) -> None:
        """Nothing to let go of."""


def make_index(root: Path, dimension: int, metric: Metric, storage: Storage) -> tuple[Index, MadeLists]:
    """An index of 64 lists of about 1 MiB, of which nothing is written to its folder yet, and its lists."""
    random = np.random.default_rng(0)
    size = code_size(dimension, storage)
    count = LIST_BYTES // (size + ID_BYTES)
    table, nbytes = lay_out(np.full(NLIST, count, np.int64), size)
    memory = np.zeros(-(-nbytes // 4096) * 4096, np.uint8)
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
