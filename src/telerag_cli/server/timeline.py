"""What is drawn under an answer: when the LLM wrote, when which list moved, and whether it was needed. Pure functions.

Only this request's own work is in it. What it shared with others, such as a batch of embeddings, is drawn as the time
it took.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from telerag_cli.engine.engine import Answered
from telerag_cli.engine.retrieval import Retrieval
from telerag_cli.retrieval.retriever import JoinReport
from telerag_cli.tracing import Span

MAX_LANES = 8
"""Of a kind. Where more than that overlap, a bar is drawn over others, in the lane that is free soonest."""
MAX_BARS = 2000
"""Of a kind. If there are more, those that begin in the same `SLICES`-th of the time and say the same become one."""
SLICES = 500
HIT, WASTED, MISSED = "hit", "wasted", "missed"
COUNTS = (
    "lists_hit",
    "lists_wanted",
    "lists_coming",
    "lists_moved",
    "lists_wasted",
    "lists_missed",
    "lists_in_place",
    "bytes_moved",
    "bytes_missed",
)
_NAMES = {"llm": "LLM", "link": "link", "scoring": "scoring", "embedding": "embedding"}
_FIND, _SCORE, _SCORE_IN_PLACE, _SCORE_AGAIN = "find lists", "score {}", "score {} in place", "score again"


@dataclass(frozen=True)
class _Bar:
    """One bar, from ``start_s`` to ``end_s`` on any clock."""

    start_s: float
    end_s: float
    says: str
    """The stage, what became of a list, or what was done to lists."""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Transfer:
    """A move as the link made it."""

    start_s: float
    end_s: float
    nbytes: int


class _Link:
    """The link's own time, from the spans of everybody's moves.

    A move is recorded from when it was asked for. On its way it is at most since the one before it had ended in the
    same lane, as a lane moves in turn; moves that end there at the same moment went together.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self._of: dict[int, list[_Transfer]] = {}
        free_s: dict[str, tuple[float, float]] = {}
        for span in sorted((span for span in spans if "list" in span.details), key=lambda span: span.end_s):
            before_s, last_s = free_s.get(span.lane, (float("-inf"), float("-inf")))
            if span.end_s > last_s:
                before_s, last_s = last_s, span.end_s
            free_s[span.lane] = before_s, last_s
            transfer = _Transfer(max(span.start_s, before_s), span.end_s, span.details["bytes"])
            self._of.setdefault(span.details["list"], []).append(transfer)

    def last(self, list_no: int, before_s: float, since_s: float = float("-inf")) -> _Transfer | None:
        """The last move of a list that ended between these times, if it was seen."""
        transfers = self._of.get(list_no, [])
        place = bisect_right(transfers, before_s, key=lambda transfer: transfer.end_s)
        return transfers[place - 1] if place and transfers[place - 1].end_s >= since_s else None


def timeline(answered: Answered, spans: Sequence[Span], began_s: float, ended_s: float) -> dict[str, Any]:
    """The timeline of one answered request, as JSON.

    The bars of the link need the spans of its moves, so whoever wants them listens to the tracer since before
    ``began_s``. Without them all else is there, and ``counts.lists_undrawn`` says how many moves are not.

    Args:
        answered: what was done.
        spans: of everybody's work while it was done.
        began_s: when it began, in ``time.perf_counter`` seconds: 0 on the axis.
        ended_s: when it ended.

    Returns:
        ``total_s``; ``lanes`` of bars that begin and end within it; ``marks`` in order of time; and ``counts`` of lists
        and bytes. A link's bar of several lists names the first; one that is ``wasted`` was not probed by the retrieval
        it was moved for.
    """
    axis = _Axis(began_s, ended_s)
    moves, undrawn = _moves(answered.joins, _Link(spans))
    bars = {
        "llm": list(_written(answered)),
        "link": _thinned(_gathered(moves), axis),
        "scoring": _thinned([bar for join in answered.joins for bar in _scored(join)], axis),
        "embedding": list(_embedded(answered.retrievals)),
    }
    counts = {name: sum(getattr(join, name) for join in answered.joins) for name in COUNTS}
    return {
        "total_s": axis.total_s,
        "lanes": [lane for kind, of_kind in bars.items() for lane in _lanes(kind, of_kind, axis)],
        "marks": sorted(_marks(answered.retrievals, axis), key=lambda mark: mark["at_s"]),
        "counts": counts | {"lists_undrawn": undrawn},
    }


class _Axis:
    """Seconds from the beginning, within the request, to a microsecond."""

    def __init__(self, began_s: float, ended_s: float) -> None:
        self._began_s = began_s
        self.total_s = round(max(ended_s - began_s, 0.0), 6)

    def at(self, moment_s: float) -> float:
        return round(min(max(moment_s - self._began_s, 0.0), self.total_s), 6)


def _written(answered: Answered) -> Iterator[_Bar]:
    for stage in answered.stages:
        made = stage.generation
        figures = {
            "stage": stage.name,
            "prompt_tokens": made.prompt_tokens,
            "cached_tokens": made.cached_tokens,
            "completion_tokens": made.completion_tokens,
            "queue_s": round(made.queue_s, 6),
            "prefill_s": round(made.prefill_s, 6),
            "decode_s": round(made.decode_s, 6),
        }
        yield _Bar(stage.began_s, stage.began_s + stage.took_s, stage.name, figures)


def _moves(joins: Iterable[JoinReport], link: _Link) -> tuple[list[_Bar], int]:
    """What was moved ahead for these retrievals and by them, and how many moves were not seen."""
    bars: list[_Bar] = []
    undrawn = 0
    for course in (join.course for join in joins if join.course):
        wanted = set(course.wanted.tolist())
        ahead = [
            (number, HIT if number in wanted else WASTED, link.last(number, at_s))
            for number, at_s in zip(course.moved.tolist(), course.moved_s.tolist(), strict=True)
        ]
        late = [
            (number, MISSED, link.last(number, course.ended_s, course.arrived_s)) for number in course.fetched.tolist()
        ]
        for number, outcome, transfer in ahead + late:
            if transfer is None:
                undrawn += 1
                continue
            figures = {"list": number, "lists": 1, "bytes": transfer.nbytes, "outcome": outcome}
            bars.append(_Bar(transfer.start_s, transfer.end_s, outcome, figures))
    return bars, undrawn


def _scored(join: JoinReport) -> Iterator[_Bar]:
    course = join.course
    if course is None:
        return
    yield _Bar(course.arrived_s, course.arrived_s + join.coarse_s, _FIND)
    for (start_s, end_s), lists, in_place in zip(
        course.scored_s.tolist(), course.scored.tolist(), course.scored_in_place.tolist(), strict=True
    ):
        yield _Bar(start_s, end_s, _SCORE_IN_PLACE if in_place else _SCORE, {"lists": lists})
    if course.again_s:
        yield _Bar(course.ended_s - course.again_s, course.ended_s, _SCORE_AGAIN)


def _embedded(retrievals: Iterable[Retrieval]) -> Iterator[_Bar]:
    for retrieval in retrievals:
        if course := retrieval.join.course:
            # A retrieval embeds right before it searches.
            yield _Bar(
                course.arrived_s - retrieval.embed_s,
                course.arrived_s,
                "embed the query" if len(retrieval.queries) == 1 else f"embed {len(retrieval.queries)} queries",
            )


def _marks(retrievals: Sequence[Retrieval], axis: _Axis) -> Iterator[dict[str, Any]]:
    for number, retrieval in enumerate(retrievals, 1):
        course = retrieval.join.course
        if course is None:
            continue
        which = f" {number}" if len(retrievals) > 1 else ""
        for order in course.orders:
            if order.fraction:
                yield _mark(axis, order.at_s, "refinement", f"{100 * order.fraction:.0f} % of the text")
            else:
                yield _mark(axis, order.at_s, "lookahead", f"lookahead{which} begins")
        asked = "query arrives" if len(retrieval.queries) == 1 else f"{len(retrieval.queries)} queries arrive"
        yield _mark(axis, course.arrived_s, "query", f"retrieval{which}: {asked}" if which else asked)


def _mark(axis: _Axis, moment_s: float, kind: str, label: str) -> dict[str, Any]:
    return {"at_s": axis.at(moment_s), "kind": kind, "label": label}


def _gathered(moves: Iterable[_Bar]) -> list[_Bar]:
    """Moves of one outcome that began and ended together, as one: a link that copies many lists at a time tells of all at once."""
    together: dict[tuple[str, float, float], list[_Bar]] = {}
    for bar in moves:
        together.setdefault((bar.says, bar.start_s, bar.end_s), []).append(bar)
    return [_merged(bars) for bars in together.values()]


def _thinned(bars: Sequence[_Bar], axis: _Axis) -> list[_Bar]:
    """At most `MAX_BARS`, as there are at most four things to say of lists in each slice of the time."""
    if len(bars) <= MAX_BARS:
        return list(bars)
    near: dict[tuple[str, int], list[_Bar]] = {}
    for bar in bars:
        slice_no = min(int(axis.at(bar.start_s) / max(axis.total_s, 1e-9) * SLICES), SLICES - 1)
        near.setdefault((bar.says, slice_no), []).append(bar)
    return [_merged(of_slice) for of_slice in near.values()]


def _merged(bars: Sequence[_Bar]) -> _Bar:
    """Bars that say the same as one: of all their lists and bytes, named after the first."""
    first = min(bars, key=lambda bar: bar.start_s)
    sums = {name: sum(bar.figures[name] for bar in bars) for name in ("lists", "bytes") if name in first.figures}
    return _Bar(first.start_s, max(bar.end_s for bar in bars), first.says, first.figures | sums)


def _lanes(kind: str, bars: Iterable[_Bar], axis: _Axis) -> list[dict[str, Any]]:
    """The bars in as many lanes as overlap."""
    lanes: list[list[_Bar]] = []
    ends_s: list[float] = []
    for bar in sorted(bars, key=lambda bar: (bar.start_s, bar.end_s)):
        free = next((lane for lane, end_s in enumerate(ends_s) if end_s <= bar.start_s), None)
        if free is None and len(lanes) < MAX_LANES:
            free = len(lanes)
            lanes.append([])
            ends_s.append(bar.end_s)
        elif free is None:
            free = ends_s.index(min(ends_s))
        lanes[free].append(bar)
        ends_s[free] = max(ends_s[free], bar.end_s)
    return [
        {
            "name": _NAMES[kind] if number == 1 else f"{_NAMES[kind]} {number}",
            "kind": kind,
            "bars": [
                {"start_s": axis.at(bar.start_s), "end_s": axis.at(bar.end_s), "label": _label(bar), **bar.figures}
                for bar in lane
            ],
        }
        for number, lane in enumerate(lanes, 1)
    ]


def _label(bar: _Bar) -> str:
    lists = bar.figures.get("lists")
    if lists is None:
        return bar.says
    count = "1 list" if lists == 1 else f"{lists:,} lists"
    if "list" not in bar.figures:
        return bar.says.format(count)
    return f"list {bar.figures['list']}" if lists == 1 else count
