"""Speed of the links alone: a disk past the page cache and through it, and PCIe beside what its slot can carry."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from telerag_cli.config import PAGE_BYTES
from telerag_cli.files import HeldFile, wrap_os_error
from telerag_cli.planning.profile import LinkPoint, Pcie
from telerag_cli.planning.timing import Effort, rate, times_s
from telerag_cli.tiers.transport import DirectReader, Move, allocate, move_all

if TYPE_CHECKING:
    from telerag_cli.tiers.cuda.gpu import Gpu

DIRECT = "O_DIRECT"
BUFFERED = "page cache, cold"
CACHED = "page cache, no O_DIRECT here"
BATCH_BYTES = 16 << 20
"""Read in one repeat, and at least two transfers for each that may be in flight."""
SCRATCH_BYTES = 256 << 20
"""Size of a file to read from where there is no index."""
GIGABYTES_PER_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""Gigabytes per second in one direction, without the encoding; source: the PCI Express base specifications."""


def link_points(
    gpu: Gpu | None, lists: Path | HeldFile, sizes: Sequence[int], depths: Sequence[int], effort: Effort
) -> Iterator[LinkPoint]:
    """Measure the links from these lists: of the GPU, if there is one, and of the disk."""
    if gpu is not None:
        from telerag_cli.tiers.cuda.bandwidth import transfers

        for each in transfers(gpu, sizes, effort.repeats):
            yield LinkPoint("PCIe", each.way, each.nbytes, each.depth, rate(each.count * each.nbytes, each.took_s))
    yield from disk_points(lists, sizes, depths, effort)


def disk_points(
    path: Path | HeldFile, sizes: Sequence[int], depths: Sequence[int], effort: Effort
) -> Iterator[LinkPoint]:
    """Measure a disk by size and depth, and through the page cache at the largest of both.

    The file's pages may leave the cache. ``sizes`` are bytes of a transfer, ``depths`` transfers in flight.

    Raises:
        TeleragError: it cannot be read.
    """
    most = path.stat().st_size // PAGE_BYTES * PAGE_BYTES
    fitting = sorted({min(size, most) for size in sizes if min(size, most)})
    deepest, largest = max(depths), fitting[-1]
    memory = allocate(max(2 * deepest * largest, BATCH_BYTES))
    random = np.random.default_rng(0)

    def reads(reader: DirectReader, nbytes: int, depth: int) -> tuple[int, Callable[[], None]]:
        """Bytes of a batch of reads from random places, and the batch."""
        count, slots = max(2 * depth, BATCH_BYTES // nbytes), 2 * depth

        def batch() -> None:
            places = random.integers((most - nbytes) // PAGE_BYTES + 1, size=count) * PAGE_BYTES
            move_all(reader, [Move(i, int(place), i % slots * nbytes, nbytes) for i, place in enumerate(places)])

        return count * nbytes, batch

    for depth in depths:
        with contextlib.closing(DirectReader(path, memory, threads=depth)) as reader:
            way = DIRECT if reader.direct else CACHED
            for nbytes in fitting:
                total, batch = reads(reader, nbytes, depth)
                yield LinkPoint("disk", way, nbytes, depth, rate(total, times_s(batch, effort)))
    with contextlib.closing(DirectReader(path, memory, threads=deepest, direct=False)) as reader:
        total, batch = reads(reader, largest, deepest)
        cold = []
        for _ in range(effort.repeats):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cold += times_s(batch, Effort(0.0, 1, 1, 0.0))[:1]
        yield LinkPoint("disk", BUFFERED, largest, deepest, rate(total, cold))


@contextlib.contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """Keep a file to read from while the block runs.

    Raises:
        ResourceError: it cannot be written there.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".telerag-profile-") as file:
            block = np.random.default_rng(0).bytes(16 << 20)
            for _ in range(SCRATCH_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as error:
        raise wrap_os_error(error, folder) from error


def slot_of(gpu: Gpu | None) -> Pcie | None:
    """Ask the driver for a GPU's slot; None without nvidia-ml-py, a driver or such a GPU.

    An idle GPU may report a lower generation than it uses under load, so ask right after a transfer.
    """
    if gpu is None or gpu.device.type != "cuda":
        return None
    try:
        import pynvml
    except ModuleNotFoundError:  # it is part of the extra gpu
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(gpu.device.index or 0)
        return Pcie(
            pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
            pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
            pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def slot_bytes_per_s(slot: Pcie) -> float | None:
    """Return what the slot can carry in one direction: ``lanes * rate per lane``; None for an unknown generation."""
    lane = GIGABYTES_PER_LANE.get(slot.generation)
    return None if lane is None else lane * 1e9 * slot.width
