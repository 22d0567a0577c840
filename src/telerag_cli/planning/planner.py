"""Expectations of a run, from a profile, its formulas, and what earlier runs showed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from telerag_cli.planning import formulas
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.profile import HitCurve, Profile, ScoringRate


@dataclass(frozen=True)
class ExpectedText:
    """Time that the LLM should need for one text."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Outlook:
    """A retrieval and the lookahead before it: as expected, or as it was."""

    window_s: float
    """Time in which lists can be moved before the query arrives."""
    budget_bytes: float
    """What the link can move in it."""
    bytes_moved: float
    hit_share: float
    """Share of the probed bytes in fast memory when the query arrives."""
    join_s: float


class Planner:
    """Puts the formulas together. It has no state but the averages, which it only reads."""

    def __init__(
        self, profile: Profile, averages: Averages, *, nprobe: int, arena_bytes: int, most_bytes: int | None = None
    ) -> None:
        """Plan with a profile.

        ``most_bytes`` is what the user allows lookahead to move before one retrieval.
        """
        self.profile = profile
        self.averages = averages
        self.nprobe = nprobe
        self.most_bytes = arena_bytes if most_bytes is None else min(arena_bytes, most_bytes)

    @property
    def probed_bytes(self) -> float:
        """Bytes that a query should probe."""
        assert self.profile.index is not None
        return formulas.probed_bytes(self.profile.index, self.nprobe)

    def text(self, prompt_tokens: float, known_tokens: float, tokens: float, width: float = 1) -> ExpectedText:
        """Expect reading a prompt, some tokens of it cached, and writing ``tokens`` in one of ``width`` texts."""
        llm = self.profile.llm
        assert llm is not None
        prefill_s = formulas.prefill_s(llm, max(prompt_tokens - known_tokens, 1))
        return ExpectedText(prefill_s, formulas.decode_s(llm, tokens, width, prompt_tokens))

    def window_s(self, texts: Sequence[ExpectedText], stage: str) -> float:
        """Expect the window that writing these leaves, by the profile and by this stage's earlier windows."""
        moving, embedding = self.profile.moving, self.profile.embedding
        assert moving is not None
        assert embedding is not None
        plain_s = formulas.window_s(
            sum(text.prefill_s for text in texts),
            sum(text.decode_s for text in texts),
            moving.decoding_slowed,
            embedding.query_s.value,
            embedding.sketch_s.value,
        )
        return plain_s * self.averages.get(stage, "window", 1.0)

    def outlook(
        self, window_s: float, lookahead: str, *, held_share: float = 0.0, rounds: int = 1, stage: str = ""
    ) -> Outlook:
        """Expect what lookahead of this kind does in a window of this stage, and the join after it.

        ``held_share`` of the bytes that the first order would probe are in fast memory already, and ``rounds``
        prefetches share the link, this one included.
        """
        rate = self.link_bytes_per_s(stage) / rounds
        budget = formulas.budget_bytes(rate, window_s, self.most_bytes)
        probed = self.probed_bytes
        absent = probed * (1 - held_share)
        share = budget / absent if absent else 0.0
        curve = self.hit_curve(lookahead)
        missed = absent * (1 - formulas.hit_share(curve, share))
        worth = absent * formulas.moved_share(curve, share) * self.averages.get(stage, "moved", 1.0)
        hit_share = 1 - missed / probed if probed else 1.0
        return Outlook(window_s, budget, min(worth, budget), hit_share, self.join_s(probed - missed, missed))

    def link_bytes_per_s(self, stage: str) -> float:
        """Expect the link's rate beside the LLM, by the profile and by this stage's earlier windows."""
        moving = self.profile.moving
        assert moving is not None
        return moving.while_decoding.value * self.averages.get(stage, "link", 1.0)

    def join_s(self, hit_bytes: float, missed_bytes: float) -> float:
        """Expect the join of a query with these hits and misses."""
        assert self.profile.joins is not None
        return formulas.join_s(self.profile.joins, hit_bytes, missed_bytes)

    def break_even_bytes(self) -> float | None:
        """See `formulas.break_even_bytes`; None where lists must be moved to be scored."""
        arena, in_place, moving = self.scoring("arena"), self.scoring("in place"), self.profile.moving
        if arena is None or in_place is None or moving is None:
            return None
        return formulas.break_even_bytes(moving.alone.value, arena, in_place)

    def scoring(self, place: str) -> ScoringRate | None:
        """Return the rate of the index's own storage type in a place; None where it is not scored there."""
        return next((rate for rate in self.profile.scoring if rate.place == place), None)

    def hit_curve(self, lookahead: str) -> HitCurve:
        """Return the curve of this kind of lookahead."""
        assert self.profile.index is not None
        return next(curve for curve in self.profile.index.hit_curves if curve.lookahead == lookahead)
