"""How fast the link moves and both tiers score: measured, and learned from what is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from telerag_cli.arrays import FloatArray, IntArray

ScoreLists = Callable[[FloatArray, IntArray, int], tuple[FloatArray, IntArray]]
"""The ``k`` best (score, row) of lists (n, m), -1 to skip, for queries (n, dimension); see `ListScorer.score`."""


class Rate:
    """How many bytes a second something does: an average in which old work fades by half with each ``HALF_BYTES``."""

    HALF_BYTES = 1 << 30

    def __init__(self, nbytes: float, took_s: float) -> None:
        """Begin with a first measurement."""
        self._bytes = float(nbytes)
        self._took_s = took_s

    @property
    def bytes_per_s(self) -> float:
        """The rate."""
        return self._bytes / max(self._took_s, 1e-9)

    def observe(self, nbytes: float, took_s: float) -> None:
        """Learn from work done."""
        kept = 0.5 ** (nbytes / self.HALF_BYTES)
        self._bytes = kept * self._bytes + nbytes
        self._took_s = kept * self._took_s + took_s


@dataclass(frozen=True)
class JoinRates:
    """What a join between two tiers goes by, in bytes of lists a second, where it was measured before."""

    link: float
    in_place: float
    moved: float
    latency_s: float
    slowdown: float = 1.0
    """How much longer both ends take side by side than these rates say."""

    WEIGHT_BYTES = 1 << 28
    """Weight of these rates at the start: what joins show soon counts more."""

    def in_place_by(self, score: ScoreLists) -> InPlace:
        """Scoring in place that begins with these rates."""
        link, scoring, moved = (
            Rate(self.WEIGHT_BYTES, self.WEIGHT_BYTES / each) for each in (self.link, self.in_place, self.moved)
        )
        return InPlace(score, scoring, link, moved, self.latency_s, self.slowdown)


@dataclass(frozen=True)
class InPlace:
    """Scoring lists where they lie in the slow tier, as an alternative to moving them; and how fast is either."""

    score: ScoreLists
    scoring: Rate
    """Bytes of lists scored in place a second, counted for each query."""
    link: Rate
    """Bytes that the link moves a second."""
    scoring_moved: Rate
    """Bytes of lists scored in the fast tier a second, counted for each query, without the latency."""
    latency_s: float
    """What scoring in the fast tier takes at least."""
    slowdown: float = 1.0
    """How much longer both ends take side by side than these rates say, as far as that is known at the start."""
