"""Answering many questions, each with its line, whatever becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from telerag_cli.engine.engine import Answered, Engine
from telerag_cli.engine.lines import answer_line, error_line
from telerag_cli.engine.questions import Question
from telerag_cli.errors import InputError, TeleragError
from telerag_cli.pipelines.registry import PIPELINES, PipelineName


@dataclass
class Summary:
    """What a run came to; seconds are sums over the questions answered."""

    asked: int = 0
    failed: int = 0
    skipped: int = 0
    total_s: float = 0.0
    llm_s: float = 0.0
    retrieval_s: float = 0.0
    lists_hit: int = 0
    lists_wanted: int = 0

    def add(self, answered: Answered) -> None:
        """Count an answer."""
        self.total_s += answered.timings["total_s"]
        self.llm_s += answered.timings.get("llm_s", 0.0)
        self.retrieval_s += answered.timings.get("retrieval_s", 0.0)
        self.lists_hit += sum(join.lists_hit for join in answered.joins)
        self.lists_wanted += sum(join.lists_wanted for join in answered.joins)

    def lines(self) -> list[str]:
        """In words, for the person who waited."""
        words = []
        count = self.asked - self.failed
        if count:
            words.append(
                f"{count} answered: mean {self.total_s / count:.2f} s, of which LLM {self.llm_s / count:.2f} s and "
                f"retrieval {self.retrieval_s / count:.3f} s; {self.lists_hit / max(self.lists_wanted, 1):.0%} of "
                f"{self.lists_wanted:,} probed lists were in fast memory."
            )
        if self.failed:
            words.append(f"{self.failed} failed; their lines say why.")
        if self.skipped:
            words.append(f"{self.skipped} skipped: already answered in the output.")
        return words


def answer_all(
    engine: Engine,
    pipeline: PipelineName,
    questions: Iterable[Question],
    *,
    answered: set[str],
    write: Callable[[dict[str, Any]], None],
    tell: Callable[[str], None],
    advance: Callable[[int], None],
) -> Summary:
    """Answer questions in order and write each one's line as soon as it is there.

    Args:
        engine: what answers.
        pipeline: how.
        questions: from any source, read as they come.
        answered: ids to skip.
        write: takes an output line.
        tell: takes what went wrong with a question; the rest go on.
        advance: called after each question.
    """
    summary = Summary()
    with asyncio.Runner() as runner:
        for question in questions:
            if question.id in answered:
                summary.skipped += 1
                continue
            summary.asked += 1
            try:
                if question.problem is not None:
                    raise InputError(question.problem)
                result = runner.run(engine.ask(PIPELINES[pipeline], question.text))
            except TeleragError as error:
                summary.failed += 1
                tell(f"question {question.id}: {error}")
                write(error_line(question, str(error)))
            else:
                summary.add(result)
                write(answer_line(question, result, pipeline, engine.settings.lookahead))
            advance(1)
    return summary
