"""A GPU made of threads and host memory: the same tier, link and scoring without the device.

``--tier simulated`` uses it, and so do tests, which choose its delays and failures. It shows what the cuda tier does,
not how fast it does it.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import torch

from telerag_cli.arrays import ByteArray
from telerag_cli.errors import ResourceError
from telerag_cli.system import available_bytes
from telerag_cli.tiers.cuda.gpu import Copy, Gpu, Stream
from telerag_cli.units import format_bytes

Fails = Callable[[], bool]


class SimulatedGpu(Gpu):
    """A `Gpu` on the CPU."""

    def __init__(
        self,
        *,
        memory_bytes: int | None = None,
        bytes_per_s: float | None = None,
        longest_s: float = 0.0,
        seed: int = 0,
        copy_fails: Fails = lambda: False,
        work_fails: Fails = lambda: False,
        lock_refused: str | None = None,
    ) -> None:
        """A device whose troubles are chosen.

        It has by default the memory that the host has free, and a link as fast as a copy in memory. Copies take at
        random, by ``seed``, up to ``longest_s`` longer. A copy that fails arrives torn. ``lock_refused`` is why
        page-locking is refused.
        """
        self.device = torch.device("cpu")
        self.name = "simulated GPU" + (f", its link {format_bytes(bytes_per_s)}/s" if bytes_per_s else "")
        self._memory_bytes = memory_bytes
        self._taken_bytes = 0
        self._pace = (bytes_per_s, longest_s, random.Random(seed))
        self._copy_fails = copy_fails
        self._work_fails = work_fails
        self._lock_refused = lock_refused
        self.locked: set[int] = set()

    def free_bytes(self) -> int:
        """See `Gpu`."""
        return available_bytes() if self._memory_bytes is None else self._memory_bytes - self._taken_bytes

    def allocate(self, nbytes: int, option: str) -> torch.Tensor:
        """See `Gpu`."""
        memory = super().allocate(nbytes, option)
        self._taken_bytes += nbytes
        return memory

    def lock(self, memory: ByteArray) -> str | None:
        """See `Gpu`."""
        if self._lock_refused is None:
            self.locked.add(memory.ctypes.data)
        return self._lock_refused

    def unlock(self, memory: ByteArray) -> None:
        """See `Gpu`."""
        self.locked.remove(memory.ctypes.data)

    def stream(self) -> Stream:
        """See `Gpu`."""
        return _ThreadStream(*self._pace, self._copy_fails)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """See `Gpu`."""
        if self._work_fails():
            raise ResourceError("The simulated GPU failed while scoring.", remedy="It was told to.")
        yield


class _ThreadEvent:
    def __init__(self) -> None:
        self.ended = threading.Event()
        self.error: ResourceError | None = None

    def passed(self) -> bool:
        ended = self.ended.is_set()
        if ended and self.error:
            raise self.error
        return ended

    def wait(self) -> None:
        self.ended.wait()
        self.passed()


class _ThreadStream:
    """One thread that copies in order."""

    def __init__(self, bytes_per_s: float | None, longest_s: float, dice: random.Random, fails: Fails) -> None:
        self._bytes_per_s, self._longest_s, self._dice, self._fails = bytes_per_s, longest_s, dice, fails
        self._jobs: SimpleQueue[tuple[Copy, _ThreadEvent] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="simulated link", daemon=True)
        self._thread.start()

    def copy(self, copies: Sequence[Copy]) -> list[_ThreadEvent]:
        jobs = [(each, _ThreadEvent()) for each in copies]
        for job in jobs:
            self._jobs.put(job)
        return [event for _each, event in jobs]

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            each, event = job
            started_s = time.perf_counter()
            count = len(each.target)
            if self._fails():
                count //= 2
                event.error = ResourceError("The simulated GPU failed while moving lists.", remedy="It was told to.")
            each.target[:count].copy_(each.source[:count])
            wanted_s = self._dice.random() * self._longest_s
            if self._bytes_per_s:
                wanted_s += count / self._bytes_per_s
            time.sleep(max(0.0, started_s + wanted_s - time.perf_counter()))
            event.ended.set()
