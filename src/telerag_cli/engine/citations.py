"""Which passages an answer rests on: those it names, and those whose words it uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypedDict

from telerag_cli.corpus.passages import Retrieved

_MARKER = re.compile(r"\[(\d{1,3})\]")
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?:\s*\[\d{1,3}\])*(?=\s|\Z)|(?=\n)|\Z)")
"""Up to a full stop, with the markers right after it, or to the end of the line."""
_WORD = re.compile(r"\w{4,}")
SUPPORT = 0.6
"""Share of a sentence's longer words that a passage must hold to count as its source."""
MIN_WORDS = 3


class CitedSpan(TypedDict):
    """One passage behind one stretch of the answer: characters ``start`` to ``end``."""

    id: str
    rank: int
    by: Literal["marker", "overlap"]
    start: int
    end: int


def cite(answer: str, found: Sequence[Retrieved]) -> list[CitedSpan]:
    """Markers like ``[2]`` that name a passage; for a sentence without one, the passage with most of its words."""
    words = [set(_WORD.findall(hit.passage.embedded_text.lower())) for hit in found]
    citations: list[CitedSpan] = []
    for start, end in (match.span() for match in _SENTENCE.finditer(answer)):
        named = [int(mark) for mark in _MARKER.findall(answer, start, end)]
        ranks = list(dict.fromkeys(rank for rank in named if 1 <= rank <= len(found)))
        by: Literal["marker", "overlap"] = "marker"
        if not ranks:
            said = set(_WORD.findall(answer[start:end].lower()))
            shares = [len(said & have) / len(said) for have in words] if len(said) >= MIN_WORDS else []
            if shares and max(shares) >= SUPPORT:
                ranks, by = [shares.index(max(shares)) + 1], "overlap"
        citations += [
            CitedSpan(id=found[rank - 1].passage.id, rank=rank, by=by, start=start, end=end) for rank in ranks
        ]
    return citations
