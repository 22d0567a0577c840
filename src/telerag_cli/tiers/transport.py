"""The disk link: bytes from ``lists.bin`` to the arena by a few threads. It knows how, never why."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np

from telerag_cli.arrays import ByteArray
from telerag_cli.config import PAGE_BYTES
from telerag_cli.errors import ArtifactError, ResourceError, TeleragError
from telerag_cli.files import HeldFile, wrap_os_error
from telerag_cli.progress import Advance
from telerag_cli.system import available_bytes, give_way
from telerag_cli.units import format_bytes

LINK_NICENESS = 10


@dataclass(frozen=True)
class Move:
    """Copy ``nbytes`` from byte ``source`` of the slow tier to byte ``target`` of the arena."""

    list_no: int
    source: int
    target: int
    nbytes: int


Arrived = Callable[[Sequence[Move], TeleragError | None], None]
"""Called from a transport's thread when moves have ended: all of them well, or all with this error."""


class Transport(Protocol):
    """A link between the tiers."""

    depth: int
    """Moves to keep under way; more only makes stopping slower."""
    note: str | None
    """What a user should know about how it moves, if it is not the best way."""

    def submit(self, moves: Sequence[Move], arrived: Arrived) -> None:
        """Start moves, in this order if they cannot all go at once; return without waiting for any."""

    def close(self) -> None:
        """Wait for moves under way, then let go of threads and files."""


class CheckedLink:
    """A link whose moves end well only if what arrived passes a check, which raises TeleragError otherwise."""

    def __init__(self, link: Transport, check: Callable[[Move], None]) -> None:
        """Check what ``link`` moves, in the thread in which it arrives."""
        self.depth, self.note = link.depth, link.note
        self._link, self._check = link, check

    def submit(self, moves: Sequence[Move], arrived: Arrived) -> None:
        """See `Transport`."""
        self._link.submit(moves, partial(self._arrived, arrived))

    def close(self) -> None:
        """See `Transport`."""
        self._link.close()

    def _arrived(self, arrived: Arrived, moves: Sequence[Move], error: TeleragError | None) -> None:
        if error is not None:
            arrived(moves, error)
            return
        good = []
        for move in moves:
            try:
                self._check(move)
            except TeleragError as wrong:
                arrived([move], wrong)
            else:
                good.append(move)
        if good:
            arrived(good, None)


def move_all(link: Transport, moves: Sequence[Move], advance: Advance = lambda _nbytes: None) -> None:
    """Start moves and wait for all of them; ``advance`` is called with bytes as they arrive.

    Raises:
        TeleragError: one of them failed; others may be under way still.
    """
    ended: SimpleQueue[tuple[Sequence[Move], TeleragError | None]] = SimpleQueue()
    link.submit(moves, lambda some, error: ended.put((some, error)))
    left = len(moves)
    while left:
        some, error = ended.get()
        if error is not None:
            raise error
        left -= len(some)
        advance(sum(move.nbytes for move in some))


def allocate(nbytes: int) -> ByteArray:
    """A page-aligned block of memory, touched now so that reads into it never wait for the kernel to find pages.

    Raises:
        ResourceError: there is not that much memory.
    """
    available = available_bytes()
    try:
        if nbytes > available:
            raise OSError(errno.ENOMEM, f"{format_bytes(available)} of memory are free")
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ResourceError(
            f"The arena of {format_bytes(nbytes)} does not fit: {error.strerror}.",
            remedy="Choose a smaller --fast-memory.",
        ) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages still works, with more page-table walks
        block.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(block, np.uint8)
    memory[::PAGE_BYTES] = 0
    return memory


def reads_directly(path: Path) -> bool:
    """Whether a file, or one in this folder, can be read past the page cache.

    Raises:
        ResourceError: nothing can be written to the folder to find out.
        ArtifactError: there is no such path.
    """
    if not path.is_dir():
        reader = DirectReader(path, np.empty(0, np.uint8), threads=0)
        reader.close()
        return reader.direct
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".telerag-") as file:
            file.write(bytes(PAGE_BYTES))
            file.flush()
            return reads_directly(Path(file.name))
    except OSError as error:
        raise wrap_os_error(error, path) from error


class DirectReader:
    """Reads a file into memory past the page cache (``O_DIRECT``), with one thread per read under way.

    The page cache would cost a copy and the CPU that the LLM needs, and evict what others keep there. File systems
    without ``O_DIRECT`` (tmpfs) are read through it; ``note`` then says so.
    """

    def __init__(self, path: Path | HeldFile, memory: ByteArray, *, threads: int = 2, direct: bool = True) -> None:
        """Open the file, to read ``threads`` parts of it at once into memory.

        ``direct`` is False only to measure what reading through the page cache takes.

        Raises:
            ArtifactError: there is no such file.
        """
        self.depth = threads
        self.note: str | None = None
        self._path = path
        self._memory = memoryview(memory)  # type: ignore[arg-type]
        self._file = self._open(direct)
        self._jobs: SimpleQueue[tuple[Move, Arrived] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"link {i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self.note is None

    def submit(self, moves: Sequence[Move], arrived: Arrived) -> None:
        """Queue reads; ``arrived`` is called for each, from the thread that did it."""
        for move in moves:
            self._jobs.put((move, arrived))

    def close(self, *, drop: bool = False) -> None:
        """Finish what is queued, or ``drop`` what has not begun; then stop the threads and close the file."""
        with contextlib.suppress(Empty):
            while drop:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._memory.release()
        os.close(self._file)

    def _open(self, direct: bool) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        file = -1
        try:
            file = os.open(self._path, flags)
            if direct:  # some file systems accept the flag and refuse the first read
                os.preadv(file, [mmap.mmap(-1, PAGE_BYTES)], 0)
            return file
        except OSError as error:
            if file >= 0:
                os.close(file)
            if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise wrap_os_error(error, self._path) from error
        folder = Path(str(self._path)).parent
        self.note = f"{folder} is on a file system without O_DIRECT; lists are read through the page cache."
        return self._open(direct=False)

    def _work(self) -> None:
        # A link thread sleeps in the kernel and needs a few per cent of a core. Without this, each time it wakes it
        # takes a core from the LLM, whose other threads then wait for that one at their next barrier.
        give_way(LINK_NICENESS)
        while (job := self._jobs.get()) is not None:
            move, arrived = job
            error: TeleragError | None = None
            try:
                self._read(move)
            except OSError as trouble:
                error = wrap_os_error(trouble, self._path)
            except TeleragError as trouble:
                error = trouble
            arrived([move], error)

    def _read(self, move: Move) -> None:
        done = 0
        while done < move.nbytes:
            target = self._memory[move.target + done : move.target + move.nbytes]
            count = os.preadv(self._file, [target], move.source + done)
            if count == 0:
                raise ArtifactError(
                    f"{self._path} ends at byte {move.source + done:,}, and list {move.list_no} reaches to byte "
                    f"{move.source + move.nbytes:,}.",
                    remedy="Restore the file or build the index again.",
                )
            done += count
