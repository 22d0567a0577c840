"""Expectations of a run, from a profile, its formulas, and what earlier runs showed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from telerag_cli.planning import formulas
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.profile import HitCurve, Profile, ScoringRate


@dataclass(frozen=True)
class ExpectedText:
    """What the LLM should need for one text; seconds."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Outlook:
    """A retrieval and the lookahead before it: as expected, or as it was."""

    window_s: float
    """In which lists can be moved before the query is there."""
    budget_bytes: float
    """That the link can move in it."""
    bytes_moved: float
    hit_share: float
    """Of the bytes probed, in fast memory when the query arrives."""
    join_s: float


@dataclass(frozen=True)
class Circumstances:
    """What is known when lookahead begins."""

    held_share: float = 0.0
    """Of the bytes that the first order would probe, in fast memory already."""
    rounds: int = 1
    """Rounds of lookahead that share the link, this one included."""
    stage: str = ""
    """Whose window it is."""


class Planner:
    """Puts the formulas together. Holds no state but the averages, which it reads; who measures teaches them."""

    def __init__(
        self, profile: Profile, averages: Averages, *, nprobe: int, arena_bytes: int, most_bytes: int | None = None
    ) -> None:
        """Get ready.

        Args:
            profile: of this machine, index and model.
            averages: of earlier runs.
            nprobe: lists probed per query.
            arena_bytes: size of the fast tier.
            most_bytes: what the user allows lookahead to move in one round.
        """
        self.profile = profile
        self.averages = averages
        self.nprobe = nprobe
        self.most_bytes = arena_bytes if most_bytes is None else min(arena_bytes, most_bytes)

    @property
    def probed_bytes(self) -> float:
        """That a query should probe."""
        assert self.profile.index is not None
        return formulas.probed_bytes(self.profile.index, self.nprobe)

    def text(self, prompt_tokens: float, known_tokens: float, tokens: float, width: float = 1) -> ExpectedText:
        """Reading a prompt, some of whose tokens are known, and writing so many, beside ``width - 1`` other texts."""
        llm = self.profile.llm
        assert llm is not None
        prefill_s = formulas.prefill_s(llm, max(prompt_tokens - known_tokens, 1))
        return ExpectedText(prefill_s, formulas.decode_s(llm, tokens, width, prompt_tokens))

    def window_s(self, texts: Sequence[ExpectedText], stage: str) -> float:
        """The window that writing these leaves, as the profile has it and as windows of this stage turned out before."""
        profile = self.profile
        assert profile.embedding is not None
        assert profile.moving is not None
        plain_s = formulas.window_s(
            sum(text.prefill_s for text in texts),
            sum(text.decode_s for text in texts),
            profile.moving.decoding_slowed,
            profile.embedding.query_s.value,
            profile.embedding.sketch_s.value,
        )
        return plain_s * self.averages.get(window_key(stage), 1.0)

    def outlook(self, window_s: float, lookahead: str, known: Circumstances = Circumstances()) -> Outlook:
        """What lookahead of this kind should do in a window, and the join after it."""
        rate = self.link_bytes_per_s(known.stage) / known.rounds
        budget = formulas.budget_bytes(rate, window_s, self.most_bytes)
        probed = self.probed_bytes
        absent = probed * (1 - known.held_share)
        share = budget / absent if absent else 0.0
        curve = self.hit_curve(lookahead)
        missed = absent * (1 - formulas.hit_share(curve, share))
        worth = absent * formulas.moved_share(curve, share) * self.averages.get(moved_key(known.stage), 1.0)
        moved = min(worth, budget)
        return Outlook(
            window_s, budget, moved, 1 - missed / probed if probed else 1.0, self.join_s(probed - missed, missed)
        )

    def link_bytes_per_s(self, stage: str) -> float:
        """The link beside the LLM, as the profile has it and as it turned out in this stage's windows before."""
        moving = self.profile.moving
        assert moving is not None
        return formulas.link_bytes_per_s(moving, decoding=True) * self.averages.get(link_key(stage), 1.0)

    def join_s(self, hit_bytes: float, missed_bytes: float) -> float:
        """The join of a query that finds so much in fast memory and misses so much."""
        assert self.profile.joins is not None
        return formulas.join_s(self.profile.joins, hit_bytes, missed_bytes)

    def break_even_bytes(self) -> float | None:
        """See `formulas.break_even_bytes`; None where lists must be moved to be scored."""
        arena, in_place, moving = self.scoring("arena"), self.scoring("in place"), self.profile.moving
        if arena is None or in_place is None or moving is None:
            return None
        return formulas.break_even_bytes(formulas.link_bytes_per_s(moving, decoding=False), arena, in_place)

    def scoring(self, place: str) -> ScoringRate | None:
        """How fast the index's own storage type is scored there; None where it is not."""
        return next((rate for rate in self.profile.scoring if rate.place == place), None)

    def hit_curve(self, lookahead: str) -> HitCurve:
        """Of this kind of lookahead."""
        assert self.profile.index is not None
        return next(curve for curve in self.profile.index.hit_curves if curve.lookahead == lookahead)


def window_key(stage: str) -> str:
    """The average of how much longer windows before a retrieval were than expected, by the stage they end with."""
    return f"{stage} window"


def link_key(stage: str) -> str:
    """The average of how much faster lists moved in a stage's windows than expected."""
    return f"{stage} link"


def moved_key(stage: str) -> str:
    """The average of how much more was moved in a stage's windows than expected."""
    return f"{stage} moved"


def tokens_key(stage: str) -> str:
    """The average length of a stage's texts."""
    return f"{stage} tokens"


def cached_key(stage: str) -> str:
    """The average of prompt tokens of a stage that were known from earlier requests."""
    return f"{stage} cached"


def prompt_key(stage: str) -> str:
    """The average length of a stage's prompts."""
    return f"{stage} prompt"
