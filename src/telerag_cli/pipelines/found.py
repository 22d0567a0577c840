"""What retrieval gives to a pipeline, and what a pipeline gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from telerag_cli.corpus.passages import Passage


@dataclass(frozen=True)
class Retrieved:
    """A passage that was found: its row in the index and its score (inner product, or squared L2 distance)."""

    passage: Passage
    row: int
    score: float


@dataclass(frozen=True)
class Answer:
    """A text and the passages that it was written from; ``[1]`` in the text is the first of them."""

    text: str
    found: Sequence[Retrieved] = ()


def merge(*found: Sequence[Retrieved]) -> list[Retrieved]:
    """Passages of several retrievals in one order: everyone's first, then everyone's second, each passage once."""
    depth = max(map(len, found), default=0)
    ranked = (hits[rank] for rank in range(depth) for hits in found if rank < len(hits))
    return list({hit.row: hit for hit in ranked}.values())
