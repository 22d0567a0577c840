"""How library code reports progress: through callbacks that it is given, never through a console."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

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
