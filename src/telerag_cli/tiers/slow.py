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
from pathlib import Path
from typing import Protocol

import numpy as np

from telerag_cli.arrays import ByteArray
from telerag_cli.config import PAGE_BYTES
from telerag_cli.errors import ResourceError
from telerag_cli.files import wrap_os_error
from telerag_cli.index.artifact import Index
from telerag_cli.progress import Advance
from telerag_cli.system import available_bytes
from telerag_cli.tiers.transport import DirectReader, Move, move_all
from telerag_cli.units import format_bytes

READ_BYTES = 16 << 20
"""A read: large enough for any disk's full rate, small enough for a progress bar."""
READ_THREADS = 8
WHOLE = fcntl.F_SEAL_SHRINK
"""The seal on memory that has been read to its end; without it nobody takes it for the lists."""


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
            ArtifactError: the file cannot be read to its end.
        """
        self.nbytes = max(int(index.list_bytes.sum()), PAGE_BYTES)
        path = index.paths.lists
        try:
            status = path.stat()
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise wrap_os_error(error, path) from error
        # The name of this very file's memory; another index in its place is another file.
        name = f"telerag-{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _find(name)
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

    def _read(self, path: Path, nbytes: int, advance: Advance) -> None:
        moves = [
            Move(number, begin, begin, min(READ_BYTES, nbytes - begin))
            for number, begin in enumerate(range(0, nbytes, READ_BYTES))
        ]
        reader = DirectReader(path, self.memory, threads=READ_THREADS)
        try:
            move_all(reader, moves, advance)
        finally:
            reader.close(drop=True)


def _find(name: str) -> int | None:
    """A new descriptor of memory of this name that some process has and that is whole; None if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # processes of others, and those that have just ended
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if entry.readlink().name.startswith(f"memfd:{name} "):
                        file = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
                        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & WHOLE:
                            return file
                        os.close(file)
    return None
