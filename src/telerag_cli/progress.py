"""What long work is given: a way to report progress, never a console, and maybe processes to run in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

Advance = Callable[[int], None]
"""Called with the number of units done since the last call."""


class Progress(Protocol):
    """Shows the stages of long work, as `telerag_cli.cli.console.progress` does."""

    def __call__(self, description: str, total: int | None, *, unit: str = "") -> AbstractContextManager[Advance]:
        """Begin a stage of ``total`` units; None if their number is unknown."""


@contextlib.contextmanager
def silent(description: str, total: int | None, *, unit: str = "") -> Iterator[Advance]:
    """A `Progress` that shows nothing."""
    yield lambda _count: None


class WorkerPool(Protocol):
    """Processes to work in, instead of this one."""

    @property
    def workers(self) -> int:
        """Number of processes."""

    @property
    def gpus_each(self) -> float:
        """GPUs of each, which may be a fraction; 0 without GPUs."""

    def __call__(self, items: Iterable[T], make_worker: Callable[[], Callable[[T], R]]) -> Generator[R]:
        """Yield results in the order of the items; each process calls ``make_worker``, which is pickled, once."""
