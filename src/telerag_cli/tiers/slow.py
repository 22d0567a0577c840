"""The slow tier of the ``cuda`` link: all of ``lists.bin`` in host memory, shared by this user's processes.

The memory is an anonymous file (memfd), so that another process finds it under ``/proc`` and maps the same pages; it is
gone with the last process that has it, however that ended. A lock on ``lists.bin`` lets one process read and the others
wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from telerag_cli.arrays import ByteArray
from telerag_cli.config import PAGE_BYTES
from telerag_cli.errors import ResourceError
from telerag_cli.files import HeldFile, wrap_os_error
from telerag_cli.index.artifact import Index
from telerag_cli.progress import Advance
from telerag_cli.system import available_bytes
from telerag_cli.tiers.transport import DirectReader, Move, move_all
from telerag_cli.units import format_bytes

READ_BYTES = 16 << 20
"""A read: large enough for any disk's full rate, small enough for a progress bar."""
READ_THREADS = 8
CHECKED_LISTS = 64
"""Lists that a thread compares with their checksums at a time."""
WHOLE = fcntl.F_SEAL_SHRINK
"""The seal on memory that has been read to its end and checked; without it nobody takes it for the lists."""


class HostLists(Protocol):
    """Lists in host memory."""

    memory: ByteArray
    """As they lie in ``lists.bin``, beginning on a page."""

    def close(self) -> None:
        """Let go of the memory."""


class SlowTier:
    """Lists in host memory, as they lie in ``lists.bin``."""

    def __init__(self, index: Index, advance: Advance = lambda _count: None) -> None:
        """Read the lists, or find them where another process has them.

        Raises:
            ResourceError: there is not that much memory.
            ArtifactError: the file cannot be read to its end, or a list is not as it was written.
        """
        self.nbytes = max(int(index.list_bytes.sum()), PAGE_BYTES)
        path = index.held(index.paths.lists)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(lock)
        except OSError as error:
            raise wrap_os_error(error, path) from error
        # The name of this very file's memory; another index in its place is another file.
        name = f"telerag-{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _find(name, self.nbytes)
            self.shared = found is not None
            """Whether another process had them."""
            self._file = self._make(name) if found is None else found
            self._map = mmap.mmap(self._file, self.nbytes)
            with contextlib.suppress(OSError):  # a kernel without huge pages still works, with more page-table walks
                self._map.madvise(mmap.MADV_HUGEPAGE)
            self.memory: ByteArray = np.frombuffer(self._map, np.uint8)
            if found is None:
                try:
                    self._read(path, int(index.list_bytes.sum()), advance)
                    self._check(index)
                except BaseException:
                    self.close()
                    raise
                fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, WHOLE)
            else:
                advance(self.nbytes)
        finally:
            os.close(lock)

    def close(self) -> None:
        """Let go of the memory; it is freed when nobody has it."""
        del self.memory
        with contextlib.suppress(BufferError):  # somebody still looks at it, and their end frees it
            self._map.close()
        os.close(self._file)

    def _make(self, name: str) -> int:
        available = available_bytes()
        if self.nbytes > available:
            raise ResourceError(
                f"The index's lists take {format_bytes(self.nbytes)} of host memory, and {format_bytes(available)} are "
                "free.",
                remedy="Use --tier host, which reads them from the disk.",
            )
        file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, self.nbytes)
        return file

    def _check(self, index: Index) -> None:
        if index.checksums is None:
            return

        def check(numbers: range) -> None:
            for number, begin, nbytes in zip(numbers, index.offsets[numbers], index.list_bytes[numbers], strict=True):
                index.check_list(number, self.memory[begin : begin + nbytes])

        starts = range(0, index.manifest.nlist, CHECKED_LISTS)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            some = [range(start, min(start + CHECKED_LISTS, index.manifest.nlist)) for start in starts]
            deque(pool.map(check, some), 0)

    def _read(self, path: Path | HeldFile, nbytes: int, advance: Advance) -> None:
        moves = [
            Move(number, begin, begin, min(READ_BYTES, nbytes - begin))
            for number, begin in enumerate(range(0, nbytes, READ_BYTES))
        ]
        reader = DirectReader(path, self.memory, threads=READ_THREADS)
        try:
            move_all(reader, moves, advance)
        finally:
            reader.close(drop=True)


def _find(name: str, nbytes: int) -> int | None:
    """A new descriptor of this user's memory of this name and size that is whole; None if no process has it."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # processes of others, and those that have just ended
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    # The whole link is compared: a file may be named like memory. So may memory of another user, whose
                    # processes root looks into as well.
                    if str(entry.readlink()).startswith(f"/memfd:{name} "):
                        file = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
                        status = os.fstat(file)
                        ours = status.st_uid == os.geteuid() and status.st_size == nbytes
                        if ours and fcntl.fcntl(file, fcntl.F_GET_SEALS) & WHOLE:
                            return file
                        os.close(file)
    return None
