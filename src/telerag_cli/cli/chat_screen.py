"""What a chat shows: answers as they are written, their sources, and where a turn's time went."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import IO

from rich.cells import cell_len, set_cell_size

from telerag_cli.corpus.passages import Retrieved
from telerag_cli.engine.engine import SKETCH, AskResult
from telerag_cli.engine.session import LLM
from telerag_cli.retrieval.report import JOIN, JoinReport
from telerag_cli.retrieval.retriever import EMBED
from telerag_cli.tracing import Span
from telerag_cli.units import format_bytes

UNKNOWN_WIDTH = 80
WIDEST = 100
"""Columns of running text; longer lines are hard to read."""
_PIECE = re.compile(r"\n|[^\S\n]+|\S+")
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if code != 10} | {9: "    "}
"""What a terminal would obey instead of showing it."""
_LANES = (LLM, "link", SKETCH, EMBED, JOIN)
_DIM, _RED, _YELLOW = "2", "31", "33"


class Wrapping:
    """Breaks text into lines between words, as it comes."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._space = ""
        self._word = ""

    def feed(self, text: str) -> str:
        """What can be written now; the last word may still grow and is kept back."""
        pieces = _PIECE.findall(self._word + text)
        self._word = pieces.pop() if pieces and not pieces[-1].isspace() else ""
        return "".join(map(self._place, pieces))

    def end(self) -> str:
        """The rest."""
        word, self._word = self._word, ""
        return self._place(word) if word else ""

    def _place(self, piece: str) -> str:
        if piece == "\n":
            self._column, self._space = 0, ""
            return piece
        if piece.isspace():
            self._space += piece
            return ""
        space, self._space = self._space, ""
        if self._column and self._column + cell_len(space + piece) > self._width:
            space, self._column = "\n", 0
        self._column += cell_len(space + piece)
        return space + piece


class Pane:
    """A stream. A terminal gets colours, whole words and no control characters; a file or a pipe gets the text."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.terminal = stream.isatty()
        self._coloured = self.terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"

    @property
    def width(self) -> int:
        """Columns."""
        with contextlib.suppress(OSError, ValueError):  # no descriptor, or not that of a terminal
            return os.get_terminal_size(self._stream.fileno()).columns or UNKNOWN_WIDTH
        return UNKNOWN_WIDTH

    def clean(self, text: str) -> str:
        """The text as it may be shown here."""
        return text.translate(_CONTROL) if self.terminal else text

    def wrapping(self) -> Wrapping | None:
        """For running text, if lines have a width here."""
        return Wrapping(min(self.width, WIDEST)) if self.terminal else None

    def put(self, text: str) -> None:
        """Write as it is, at once."""
        self._stream.write(text)
        self._stream.flush()

    def line(self, text: str, style: str = "", *, whole: bool = True) -> None:
        """Write a line, wrapped; or if it need not be ``whole``, cut."""
        text = self.clean(text)
        if self.terminal and whole:
            text = "\n".join(wrapped(text, self.width))
        elif self.terminal and cell_len(text) > self.width:
            text = f"{set_cell_size(text, self.width - 1)}…"
        self.put(f"\x1b[{style}m{text}\x1b[0m\n" if style and self._coloured else f"{text}\n")

    def status(self, text: str) -> None:
        """Put this in the place of the line that is being shown; an empty text takes it away."""
        if self._coloured:
            self.put(f"\r\x1b[{_DIM}m{text[: self.width - 1]}\x1b[0m\x1b[K" if text else "\r\x1b[K")


class Screen:
    """Answers, and what a command asks for, go to stdout; all talk goes to stderr."""

    def __init__(self, out: IO[str], talk: IO[str], *, apart: bool) -> None:
        """Take the streams; ``apart`` puts an empty line between answers, where nothing else parts them."""
        self._out = Pane(out)
        self._talk = Pane(talk)
        self._apart = apart
        self._begun = False
        self._written: str | None = None
        """Of the answer that is being written: what is shown of it, ``None`` before its first word."""
        self._wrapping: Wrapping | None = None

    @property
    def width(self) -> int:
        """Columns for what a command asks for."""
        return self._out.width

    def stage(self, text: str) -> None:
        """Say what goes on, until something else is shown."""
        if self._written is None:
            self._talk.status(text)

    def note(self, text: str) -> None:
        """Say something by the way."""
        self.end_line()
        self._talk.line(text, _DIM)

    def warn(self, text: str) -> None:
        """Say something to keep in mind."""
        self.end_line()
        self._talk.line(f"warning: {text}", _YELLOW)

    def fail(self, text: str) -> None:
        """Say what went wrong."""
        self.end_line()
        self._talk.line(f"error: {text}", _RED)

    def show(self, lines: Sequence[str]) -> None:
        """Answer a command, with whole lines."""
        self.end_line()
        self._separate()
        for line in lines:
            self._out.put(f"{self._out.clean(line)}\n")

    def writing(self, answer: str) -> None:
        """Show more of an answer: all of it so far."""
        answer = self._out.clean(answer).strip()  # so that white space is shown when a word follows it
        shown = self._written or ""
        if not answer or not answer.startswith(shown):
            return  # written anew: what is final comes with `answered`
        if self._written is None:
            self._talk.status("")
            self._separate()
            self._wrapping = self._out.wrapping()
        new = answer[len(shown) :]
        self._out.put(self._wrapping.feed(new) if self._wrapping else new)
        self._written = answer

    def answered(self, answered: AskResult) -> None:
        """Show the rest of an answer, and what it rests on. If it is not the one that was being written, it says so."""
        if not self._out.clean(answered.answer).strip().startswith(self._written or ""):
            self.end_line()
            self._out.line("That was a draft. The answer is:", _DIM)
            self._written, self._wrapping = "", self._out.wrapping()
        self.writing(answered.answer)
        self.end_line()
        for line, used in source_lines(answered):
            self._out.line(line, "" if used else _DIM, whole=False)
        if not answered.answer:
            self.note("The model wrote nothing.")
        if not answered.found:
            self.note("No passages were looked up for this.")
        if answered.dropped_passages:
            self.note(f"Passages that did not fit the context: {answered.dropped_passages}.")
        if failed := sum(join.lists_failed for join in answered.joins):
            self.note(JoinReport.failures(failed))

    def end_line(self) -> None:
        """Leave the cursor at the beginning of an empty line, whatever was being written."""
        if self._written is None:
            self._talk.status("")
            return
        self._out.put((self._wrapping.end() if self._wrapping else "") + "\n")
        self._written = self._wrapping = None

    def _separate(self) -> None:
        if self._apart and self._begun:
            self._out.put("\n")
        self._begun = True


def source_lines(answered: AskResult) -> Iterator[tuple[str, bool]]:
    """A line for each passage that an answer was written from, and whether it is cited."""
    cited = {citation["rank"] for citation in answered.citations}
    for rank, hit in enumerate(answered.found, 1):
        yield f"  [{rank}] {hit.passage.name}{'  (cited)' if rank in cited else ''}", rank in cited


def whole_source(rank: int, hit: Retrieved, width: int) -> list[str]:
    """A passage with its score, id and text."""
    name = hit.passage.name
    lines = [f"[{rank}] {hit.score:.4f}  {name}{'' if name == hit.passage.id else f'  ({hit.passage.id})'}"]
    for text in hit.passage.text.splitlines():
        indent = " " * (4 + len(text) - len(text.lstrip()))
        lines += [f"{indent}{line}".rstrip() for line in wrapped(text.strip(), width - len(indent))]
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of so many columns."""
    wrapping = Wrapping(max(min(width, WIDEST), 20))
    return (wrapping.feed(text) + wrapping.end()).split("\n")


def timeline(spans: Sequence[Span], width: int) -> list[str]:
    """Lanes over one axis of seconds, drawn with characters; LLM stages by name."""
    if not spans:
        return []
    lanes = sorted({span.lane for span in spans}, key=_lane_order)
    label = max(map(len, lanes)) + 2
    columns = max(width - label, 20)
    start_s = min(span.start_s for span in spans)
    total_s = max(span.end_s for span in spans) - start_s or 1e-9
    rows = [f"{'':{label}}{_axis(total_s, columns)}"]
    for lane in lanes:
        row = [" "] * columns
        for span in (span for span in spans if span.lane == lane):
            first = min(int((span.start_s - start_s) / total_s * columns), columns - 1)
            end = max(int((span.end_s - start_s) / total_s * columns), first + 1)
            row[first:end] = _bar(span, end - first)
        rows.append(f"{lane:{label}}{''.join(row)}".rstrip())
    return rows


def seconds(answered: AskResult, width: int) -> list[str]:
    """Seconds by stage, and what the joins found in fast memory."""
    timings = answered.timings
    parts = [f"{stage} {timings[f'{stage}_s']:.2f}" for stage in dict.fromkeys(s.name for s in answered.stages)]
    if not answered.joins:
        return wrapped(f"Seconds: {', '.join(parts)}; total {timings['total_s']:.2f}.", width)
    parts += [f"embedding {timings['embed_s']:.3f}", f"join {timings['join_s']:.3f}"]
    total = {name: sum(getattr(join, name) for join in answered.joins) for name in JoinReport.count_names()}
    return [
        *wrapped(f"Seconds: {', '.join(parts)}; total {timings['total_s']:.2f}.", width),
        f"Lists in fast memory at the join: {total['lists_hit']} of {total['lists_wanted']}, "
        f"{total['lists_coming']} on their way.",
        f"Moved ahead: {format_bytes(total['bytes_moved'])}; "
        f"missing at the join: {format_bytes(total['bytes_missed'])}.",
    ]


def _lane_order(lane: str) -> tuple[int, str]:
    return next((rank for rank, kind in enumerate(_LANES) if lane.startswith(kind)), len(_LANES)), lane


def _bar(span: Span, cells: int) -> str:
    if not span.lane.startswith(LLM):
        return "█" * cells
    return f"{span.name[: cells - 1] if cells > 2 else '':─<{cells - 1}}┤" if cells > 1 else "┤"


def _axis(total_s: float, columns: int) -> str:
    """Labels at round numbers of seconds, not too near to each other."""
    least = total_s * 10 / columns
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    axis = ""
    for tick in range(int(total_s / step) + 1):
        place = int(tick * step / total_s * columns)
        mark = f"|{tick * step:.{digits}f}{'' if tick else ' s'}"
        if place + len(mark) <= columns:
            axis = f"{axis:{place}}{mark}"
    return axis
