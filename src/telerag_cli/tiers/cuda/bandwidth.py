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
class Passage:
    """Some transfers of one size in a row, and the seconds that they took each time."""

    way: str
    nbytes: int
    depth: int
    """Started before the first of them is waited for."""
    count: int
    took_s: list[float]


def passages(gpu: Gpu, sizes: Sequence[int], repeats: int) -> Iterator[Passage]:
    """Measure each way at each size, after one repeat that warms up.

    Args:
        gpu: the device.
        sizes: bytes of a transfer.
        repeats: how often.

    Raises:
        ResourceError: the device has no room, or failed.
    """
    largest = max(sizes)
    most = max(4 * largest, BATCH_BYTES)
    device = gpu.allocate(most, OPTION)
    stream = gpu.stream()
    try:
        for kind in ("pinned", "pageable"):
            memory = np.zeros(most, np.uint8)
            locked = kind == "pinned" and gpu.lock(memory) is None
            if kind == "pinned" and not locked:
                continue  # the tier says that it cannot
            host = torch.from_numpy(memory)
            try:
                for way, source, target in (
                    (f"{kind}, to the GPU", host, device),
                    (f"{kind}, from the GPU", device, host),
                ):
                    for nbytes in sizes:
                        copies = [
                            Copy(source[i * nbytes : (i + 1) * nbytes], target[i * nbytes : (i + 1) * nbytes])
                            for i in range(min(most // nbytes, MAX_COPIES))
                        ]
                        for depth in sorted({1, min(DEPTH, len(copies))}):
                            times = [_pass(stream, copies, depth) for _ in range(repeats + 1)]
                            yield Passage(way, nbytes, depth, len(copies), times[1:])
            finally:
                if locked:
                    gpu.unlock(memory)
    finally:
        stream.close()


def _pass(stream: Stream, copies: Sequence[Copy], depth: int) -> float:
    began_s = time.perf_counter()
    for start in range(0, len(copies), depth):
        for event in stream.copy(copies[start : start + depth]):
            event.wait()
    return time.perf_counter() - began_s
