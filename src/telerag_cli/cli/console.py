"""The one place that writes: data to stdout, talk to stderr.

Library code reports through the callbacks it is given (`Progress`), never through a console.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from telerag_cli.progress import Advance
from telerag_cli.text import printable, repaired

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200
"""Columns of a table that goes to a file or a pipe, which has no width to keep to."""


def _stderr() -> Console:
    from rich.console import Console

    class Stderr(Console):
        def on_broken_pipe(self) -> None:
            # Nobody reads the talk any more, and the work goes on; rich would end the program.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    return Stderr(stderr=True, highlight=False)


_reserved: IO[str] | None = None
"""Where data goes while stdout is reserved for it."""


def _stdout() -> IO[str]:
    return _reserved or sys.stdout


_as_json = False
"""Whether talk is one JSON object a line, for programs that collect logs."""


@contextlib.contextmanager
def talking(*, as_json: bool) -> Iterator[None]:
    """Choose how talk on stderr looks in the block: text, or JSON lines with ``time``, ``level`` and ``event``."""
    global _as_json
    before, _as_json = _as_json, as_json
    try:
        yield
    finally:
        _as_json = before


def _log(level: str, event: str, **said: Any) -> None:
    """A JSON line on stderr."""
    from datetime import UTC, datetime

    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(json.dumps({"time": now, "level": level, "event": event, **said}, default=str) + "\n")
        sys.stderr.flush()


def _talk(level: str, message: str, style: str) -> None:
    if _as_json:
        _log(level, "message", message=message)
    else:
        prefix = "" if level == "info" else f"{level}: "
        _stderr().print(f"{prefix}{printable(message)}", style=style or None, markup=False, soft_wrap=True)


def say(message: str) -> None:
    """A line of talk on stderr."""
    _talk("info", message, "")


def warn(message: str) -> None:
    """A warning on stderr."""
    _talk("warning", message, "yellow")


def fail(message: str) -> None:
    """An error on stderr."""
    _talk("error", message, "red")


def emit(text: str) -> None:
    """A line of data on stdout, flushed, so that the next stage of a pipeline sees it now."""
    out = _stdout()
    out.write((printable(text) if out.isatty() else repaired(text)) + "\n")
    out.flush()


def emit_json(value: Any, *, indent: int | None = None) -> None:
    """A value as JSON on stdout."""
    emit(json.dumps(value, ensure_ascii=False, indent=indent))


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, data: bool = False, width: int = WIDE
) -> None:
    """A table: to stdout if it is the command's answer (``data``), else to stderr. Numbers align right."""
    if _as_json and not data:
        named = [dict(zip(columns, map(str, row), strict=True)) for row in rows]
        _log("info", "table", title=title, rows=named)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Stdout(Console):
        def on_broken_pipe(self) -> None:
            raise  # as what else writes to stdout does; rich would exit with 1

    grid = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) for row in rows) and bool(rows)
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        # As Text, so that a bracket in a cell is a bracket and no markup.
        grid.add_row(*(Text(_cell(cell)) for cell in row))
    console = Stdout(file=_stdout(), highlight=False) if data else _stderr()
    if not console.is_terminal:
        console.width = width
    console.print(grid, markup=False)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@contextlib.contextmanager
def progress(description: str, total: int | None, *, unit: str = "") -> Iterator[Advance]:
    """A bar on stderr with rate and remaining time; silent when stderr is not a terminal.

    Yields:
        A function to call with the number of units done since the last call.
    """
    from rich import progress as bars

    console = _stderr()
    if not console.is_terminal or _as_json:
        yield lambda _count: None
        return
    description_column, rate = bars.TextColumn("{task.description}"), bars.TextColumn("{task.fields[rate]}")
    times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    columns = description_column, bars.BarColumn(), bars.MofNCompleteColumn(), rate, *times
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "")

        yield advance


@contextlib.contextmanager
def stdout_reserved() -> Iterator[IO[str]]:
    """Keep libraries off stdout: what they write meanwhile, to file descriptor 1 or to ``sys.stdout``, lands on stderr.

    Yields:
        The real stdout, for the command's data; the functions of this module write there by themselves.
    """
    global _reserved
    original, before = sys.stdout, _reserved
    original.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.ExitStack() as closed:
            # If somebody captures sys.stdout itself, data goes to them.
            own = _is_descriptor_1(original)
            data = closed.enter_context(os.fdopen(os.dup(saved), "w", encoding="utf-8")) if own else original
            _reserved, sys.stdout = data, sys.stderr
            yield data
    finally:
        _reserved, sys.stdout = before, original
        os.dup2(saved, 1)
        os.close(saved)


def _is_descriptor_1(stream: IO[str]) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, AttributeError):
        return False
