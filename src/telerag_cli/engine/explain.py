"""The plan of a run in words and numbers, before it starts."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from telerag_cli.config import Lookahead
from telerag_cli.corpus.passages import Retrieved
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.memory_plan import Row
from telerag_cli.llm.base import Generation, Message, Token
from telerag_cli.pipelines.base import ANSWER, Ahead, Answer, Pipeline, Prompt
from telerag_cli.pipelines.prompts import answer_prompt
from telerag_cli.planning.planner import Planner
from telerag_cli.system import available_bytes
from telerag_cli.units import format_bytes

QUESTION = "How do I find the median of some numbers, and which module has it?"
DOUBTFUL = -10.0
"""A logarithm of a probability that makes any pipeline look things up."""


@dataclass(frozen=True)
class PlannedText:
    """A text that the LLM would write."""

    stage: str
    messages: Sequence[Message]
    max_tokens: int


class _RetrievedAheadError(Exception):
    """The dry run has seen what it wanted."""


@dataclass
class DryRunRag:
    """A `Rag` with no LLM and no index."""

    max_tokens: int
    texts: list[PlannedText] = field(default_factory=list)
    ahead: bool = False

    @contextlib.asynccontextmanager
    async def lookahead(self, query: str) -> AsyncIterator[Ahead]:
        """See `Rag`."""
        if not self.ahead:
            self.texts.clear()  # what came before is not part of the window
        self.ahead = True
        yield Ahead()

    async def generate(self, stage: str, messages: Sequence[Message], *, max_tokens: int, **_how: Any) -> Generation:
        """See `Rag`."""
        self.texts.append(PlannedText(stage, messages, max_tokens))
        return Generation(QUESTION, "stop", 1, max_tokens, 0.0, 0.0, tokens=(Token(0, len(QUESTION), DOUBTFUL),))

    async def retrieve(self, queries: Sequence[str]) -> list[Retrieved]:
        """See `Rag`."""
        if self.ahead:
            raise _RetrievedAheadError
        return []

    async def answer(
        self,
        question: str,
        found: Sequence[Retrieved],
        *,
        stage: str = ANSWER,
        prompt: Prompt = answer_prompt,
        max_tokens: int | None = None,
        **_how: Any,
    ) -> Answer:
        """See `Rag`."""
        written = await self.generate(stage, prompt(question, found), max_tokens=max_tokens or self.max_tokens)
        return Answer(written.text, found)


def written_ahead(pipeline: Pipeline, max_tokens: int) -> list[PlannedText]:
    """The texts of the first window, for a question of usual length; none if nothing is written before a retrieval."""

    async def dry_run() -> None:
        await pipeline.run(rag, QUESTION)

    rag = DryRunRag(max_tokens)
    try:
        asyncio.run(dry_run())
    except _RetrievedAheadError:
        return rag.texts
    return []


def explain(engine: Engine, planner: Planner, pipeline: Pipeline) -> list[Row]:
    """(what, how much, why) for a question of usual length, asked alone."""
    name = pipeline.name
    config, averages = engine.config, planner.averages
    rows: list[Row] = []
    texts = written_ahead(pipeline, config.max_tokens)
    window_s, mode, key = 0.0, config.lookahead, ""
    if mode is Lookahead.OFF or not texts:
        why = "--lookahead off" if texts else f"{name} writes nothing before it retrieves"
        rows.append(("window", "none", why))
        mode = Lookahead.QUESTION
    else:
        expected = []
        for text in texts:
            key = f"{name}/{text.stage}"
            counted = engine.generator.count_tokens(text.messages)
            prompt, known = averages.get(key, "prompt", counted), averages.get(key, "cached", 0.0)
            tokens = min(averages.get(key, "tokens", text.max_tokens), text.max_tokens)
            expected.append(planner.text(prompt, known, tokens))
            rows.append(
                (
                    f"LLM: {text.stage}",
                    f"{expected[-1].prefill_s + expected[-1].decode_s:.2f} s",
                    f"{prompt - known:.0f} tokens read, {tokens:.0f} written",
                )
            )
        key = f"{name}/{texts[-1].stage}"
        window_s = planner.window_s(expected, key)
        times = averages.get(key, "window", math.nan)
        why = "as the profile has it" if math.isnan(times) else f"{times:.2f} times the profile's, as in earlier runs"
        rows.append(("window", f"{window_s:.2f} s", why))
    return [*rows, *outlook_rows(planner, window_s, mode, key)]


def outlook_rows(planner: Planner, window_s: float, lookahead: Lookahead, stage: str = "") -> list[Row]:
    """What follows from a window."""
    outlook = planner.outlook(window_s, lookahead.value, stage=stage)
    link = planner.link_bytes_per_s(stage)
    bound = "" if outlook.budget_bytes < planner.most_bytes else ", bounded by the arena or --prefetch-budget"
    rows: list[Row] = [
        ("budget", format_bytes(outlook.budget_bytes), f"{link / 1e9:.2f} GB/s while the LLM decodes{bound}"),
        ("bytes probed", format_bytes(planner.probed_bytes), f"nprobe {planner.nprobe:,}"),
        (
            "bytes moved ahead",
            format_bytes(outlook.bytes_moved),
            "what is worth moving of the budget, from an empty arena",
        ),
        ("in fast memory", f"{outlook.hit_share:.0%}", "of the bytes probed, when the query is there"),
        (
            "join",
            f"{1e3 * outlook.join_s:.0f} ms",
            f"{1e3 * planner.join_s(0, planner.probed_bytes):.0f} ms without lookahead",
        ),
    ]
    even = planner.break_even_bytes()
    if even is None:
        rows.append(("misses", "moved", "the disk cannot be scored in place"))
    else:
        words = format_bytes(even) if math.isfinite(even) else "never"
        rows.append(("misses", "both ends", f"moving alone is as quick as in place from: {words}"))
    rows.append(("memory left", format_bytes(available_bytes()), "RAM, after all of this was taken"))
    return rows
