"""Which passages an answer rests on: those it names, and those whose words it uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict

from telerag_cli.pipelines.base import Retrieved

_MARKER = re.compile(r"\[(\d{1,3})\]")
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+(?=\s|\Z|\[)|\n|\Z)")
_WORD = re.compile(r"\w{4,}")
SUPPORT = 0.6
"""Share of a sentence's longer words that a passage must hold to count as its source."""
MIN_WORDS = 3


class Citation(TypedDict):
    """One passage behind one stretch of the answer: characters ``start`` to ``end``."""

    id: str
    rank: int
    by: Literal["marker", "overlap"]
    start: int
    end: int


def cite(answer: str, found: Sequence[Retrieved]) -> list[Citation]:
    """Markers like ``[2]`` that name a passage; for a sentence without one, the passage that holds most of its words."""
    words = [set(_WORD.findall(hit.passage.embedded_text.lower())) for hit in found]
    citations: list[Citation] = []
    for start, end in _sentences(answer):
        named = [int(mark) for mark in _MARKER.findall(answer, start, end)]
        ranks = list(dict.fromkeys(rank for rank in named if 1 <= rank <= len(found)))
        by: Literal["marker", "overlap"] = "marker"
        if not ranks:
            said = set(_WORD.findall(answer[start:end].lower()))
            shares = [len(said & have) / len(said) for have in words] if len(said) >= MIN_WORDS else []
            if shares and max(shares) >= SUPPORT:
                ranks, by = [shares.index(max(shares)) + 1], "overlap"
        citations += [
            Citation(id=found[rank - 1].passage.id, rank=rank, by=by, start=start, end=end) for rank in ranks
        ]
    return citations


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Spans of sentences; a marker right after the full stop belongs to the sentence before it."""
    spans: list[list[int]] = []
    for match in _SENTENCE.finditer(text):
        piece = match.group()
        if not piece.strip():
            continue
        lead = len(piece) - len(piece.lstrip())
        if spans and not _MARKER.sub("", piece).strip(" .\n"):
            spans[-1][1] = match.end()
        else:
            spans.append([match.start() + lead, match.end()])
    return ((start, end - (len(text[start:end]) - len(text[start:end].rstrip()))) for start, end in spans)
