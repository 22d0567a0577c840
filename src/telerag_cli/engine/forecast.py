"""What one question's lookahead is expected to do, beside what it did; and what is learned from the difference."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from telerag_cli.config import Lookahead
from telerag_cli.llm.base import Generation
from telerag_cli.planning.averages import Averages, Quantity
from telerag_cli.planning.planner import ExpectedText, Outlook, Planner
from telerag_cli.retrieval.report import JoinReport


@dataclass(frozen=True)
class Prediction:
    """A retrieval's lookahead: as expected when it began, and as it was."""

    stage: str
    """The last text written before the retrieval; its windows are averaged together."""
    predicted: Outlook
    measured: Outlook
    join_of_these_lists_s: float
    """What the profile says of a join with the hits and misses that there were."""


class Forecast:
    """Follows one question through its pipeline."""

    def __init__(self, averages: Averages, planner: Planner | None, pipeline: str) -> None:
        """Begin.

        Stages of the same name in different pipelines are different. Without a planner there are no expectations, and
        the averages are taught all the same.
        """
        self._averages = averages
        self._planner = planner
        self._pipeline = pipeline
        self._texts: list[ExpectedText] | None = None
        self._stage = ""

    def expected_tokens(self, stage: str, max_tokens: int) -> float:
        """How long a stage's text will probably be: as earlier ones, at first as long as it may."""
        return min(self._averages.get(self._key(stage), "tokens", max_tokens), max_tokens)

    def lookahead_begins(self) -> None:
        """Texts from here on make the window."""
        if self._texts is None:
            self._texts = []

    async def writes(
        self, stage: str, prompt_tokens: Callable[[], Awaitable[int]], max_tokens: int, width: int
    ) -> None:
        """The LLM begins a text, beside ``width - 1`` others; the tokens of its prompt are asked for if they matter."""
        if self._planner is None or self._texts is None:
            return
        key = self._key(stage)
        tokens = await prompt_tokens()
        known = min(self._averages.get(key, "cached", 0.0), tokens - 1)
        self._texts.append(self._planner.text(tokens, known, self.expected_tokens(stage, max_tokens), width))
        self._stage = key

    def wrote(self, stage: str, generation: Generation, width: int) -> ExpectedText | None:
        """It has; what the profile says of a text of that very length."""
        key = self._key(stage)
        self._averages.observe(key, "tokens", generation.completion_tokens)
        self._averages.observe(key, "cached", generation.cached_tokens)
        self._averages.observe(key, "prompt", generation.prompt_tokens)
        if self._planner is None:
            return None
        return self._planner.text(
            generation.prompt_tokens, generation.cached_tokens, generation.completion_tokens, width
        )

    def retrieved(self, report: JoinReport, lookahead: Lookahead) -> Prediction | None:
        """The query has come, and the window has ended; None where there was no lookahead to plan."""
        texts, self._texts = self._texts, None
        window, planner = report.window, self._planner
        if planner is None or window is None or not texts:
            return None
        expected_s = planner.window_s(texts, self._stage)
        predicted = planner.outlook(
            expected_s, lookahead.value, held_share=window.held_share, rounds=window.prefetches, stage=self._stage
        )
        hit_bytes = report.bytes_wanted - report.bytes_missed
        pace = window.bytes_moved / window.moving_s if window.moving_s else 0.0
        measured = Outlook(
            window.window_s,
            min(pace * window.window_s, planner.most_bytes),
            report.bytes_moved,
            hit_bytes / report.bytes_wanted if report.bytes_wanted else 1.0,
            report.join_s,
        )
        self._learn("window", expected_s, window.window_s)
        if window.bytes_moved:
            self._learn("link", planner.link_bytes_per_s(self._stage) / window.prefetches, pace)
            self._learn("moved", predicted.bytes_moved, report.bytes_moved)
        return Prediction(self._stage, predicted, measured, planner.join_s(hit_bytes, report.bytes_missed))

    def _learn(self, quantity: Quantity, expected: float, measured: float) -> None:
        """Keep how much more there was than the profile says; what was expected has the average in it already."""
        kept = self._averages.get(self._stage, quantity, 1.0)
        if expected > 0 and kept > 0:
            self._averages.observe(self._stage, quantity, measured / (expected / kept))

    def _key(self, stage: str) -> str:
        return f"{self._pipeline}/{stage}"
