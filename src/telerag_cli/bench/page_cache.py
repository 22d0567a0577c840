"""Keeping the page cache out of a measurement, or filling it, and checking which of both it was."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from telerag_cli.errors import ResourceError
from telerag_cli.files import CHUNK_BYTES

HOW = (
    "Before each question every system lets go of its mappings, and the kernel is told to drop the pages of lists.bin "
    "(posix_fadvise, POSIX_FADV_DONTNEED); mincore then says what share of the file is still there."
)


def drop(path: Path) -> None:
    """Have the kernel write a file's pages and drop them, except those that some process has mapped."""
    with path.open("rb") as file:
        os.fsync(file)  # only clean pages are dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(path: Path) -> None:
    """Read a file, so that its pages are there as far as memory holds them."""
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def share(path: Path) -> float:
    """Return which part of a file's pages is in the page cache; raises ResourceError if the kernel does not say."""
    size = path.stat().st_size
    if not size:
        return 0.0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as view:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        held = np.frombuffer(view, np.uint8)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(held.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        )
        del held  # or the mapping could not be closed
    if failed:
        raise ResourceError(
            f"The kernel does not say what of {path} is in the page cache: {os.strerror(ctypes.get_errno())}.",
            remedy="Measure as the owner of the file, or with --pages warm.",
        )
    return float((pages & 1).mean())
