"""How fast bytes pass between host memory and a GPU, page-locked and not, in both directions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from telerag_cli.tiers.cuda.gpu import Copy, Gpu, Stream

BATCH_BYTES = 16 << 20
MAX_COPIES = 256
DEPTH = 32
OPTION = "--gpu-memory"


@dataclass(frozen=True)
class Transfers:
    """Some transfers of one size in a row, and the seconds that they took each time."""

    way: str
    nbytes: int
    depth: int
    """How many are started before the first of them is waited for."""
    count: int
    took_s: list[float]


def transfers(gpu: Gpu, sizes: Sequence[int], repeats: int) -> Iterator[Transfers]:
    """Measure each way at each size (bytes of a transfer), ``repeats`` times after one that warms up.

    Raises:
        ResourceError: the device has no room, or failed.
    """
    most = max(4 * max(sizes), BATCH_BYTES)
    device = gpu.allocate(most, OPTION)
    stream = gpu.stream()
    try:
        for kind in ("pinned", "pageable"):
            memory = np.zeros(most, np.uint8)
            if kind == "pinned" and gpu.lock(memory) is not None:
                continue  # the tier says that it cannot
            host = torch.from_numpy(memory)
            try:
                yield from _each_size(stream, f"{kind}, to the GPU", host, device, sizes, repeats)
                yield from _each_size(stream, f"{kind}, from the GPU", device, host, sizes, repeats)
            finally:
                if kind == "pinned":
                    gpu.unlock(memory)
    finally:
        stream.close()


def _each_size(
    stream: Stream, way: str, source: torch.Tensor, target: torch.Tensor, sizes: Sequence[int], repeats: int
) -> Iterator[Transfers]:
    for nbytes in sizes:
        count = min(len(source) // nbytes, MAX_COPIES)
        copies = [Copy(*(end[i * nbytes : (i + 1) * nbytes] for end in (source, target))) for i in range(count)]
        for depth in sorted({1, min(DEPTH, count)}):
            times = [_copy_all_s(stream, copies, depth) for _ in range(repeats + 1)]
            yield Transfers(way, nbytes, depth, count, times[1:])


def _copy_all_s(stream: Stream, copies: Sequence[Copy], depth: int) -> float:
    began_s = time.perf_counter()
    for start in range(0, len(copies), depth):
        for event in stream.copy(copies[start : start + depth]):
            event.wait()
    return time.perf_counter() - began_s
