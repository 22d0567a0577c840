"""What an engine tells a person while it opens and works, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from telerag_cli.cli import console
from telerag_cli.engine.memory_plan import Row
from telerag_cli.engine.opening import Reporter
from telerag_cli.progress import Advance


class ConsoleReporter(Reporter):
    """Prints through `console`; warnings can go elsewhere."""

    def __init__(self, warn: Callable[[str], None] = console.warn) -> None:
        self._warn = warn

    def warn(self, message: str) -> None:
        """See `Reporter`."""
        self._warn(message)

    def say(self, message: str) -> None:
        """See `Reporter`."""
        console.say(message)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """See `Reporter`."""
        console.table(title, columns, rows)

    def progress(self, description: str, total: int | None, *, unit: str = "") -> AbstractContextManager[Advance]:
        """See `Reporter`."""
        return console.progress(description, total, unit=unit)
