"""A question that leans on earlier ones is first rewritten to stand by itself; then any pipeline answers it.

The rewriting is generation before retrieval, so lookahead runs behind it whatever the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from telerag_cli.llm.base import Generator, Message, counted
from telerag_cli.llm.shapes import Lines
from telerag_cli.pipelines.base import Rag
from telerag_cli.pipelines.prompts import user

MAX_TURNS = 3
"""Earlier turns that a question may lean on."""
MAX_CHARACTERS = 400
"""What is kept of an earlier question, and of an earlier answer."""
REWRITE_TOKENS = 64
STANDALONE = Lines(1)
INSTRUCTION = "Write the follow-up question again as one complete question."
EXAMPLES = (
    ("Q: What is the capital of France?\nA: Paris.", "How many people live there?", "How many people live in Paris?"),
    (
        "Q: Who invented the telephone?\nA: Alexander Graham Bell, in 1876.",
        "And when did he die?",
        "When did Alexander Graham Bell die?",
    ),
)
"""What was said, a follow-up question, and what it means."""


@dataclass(frozen=True)
class Turn:
    """A question as it was asked, and its answer."""

    question: str
    answer: str


def standalone_prompt(turns: Sequence[Turn], question: str) -> list[Message]:
    """The prompt for a question that says all that it means; small models need the examples."""
    examples = [
        message
        for said, follow_up, rewritten in EXAMPLES
        for message in (*_asked(said, follow_up), Message("assistant", rewritten))
    ]
    said = "\n".join(f"Q: {_short(turn.question)}\nA: {_short(turn.answer)}" for turn in turns)
    return [Message("system", INSTRUCTION), *examples, *_asked(said, question)]


async def recent_turns(turns: Sequence[Turn], question: str, generator: Generator) -> Sequence[Turn]:
    """The turns that a question is rewritten with: the last `MAX_TURNS`, or as many of them as the context holds."""
    recent = turns[-MAX_TURNS:]
    room = generator.context_tokens - REWRITE_TOKENS
    while recent and await counted(generator, standalone_prompt(recent, question)) > room:
        recent = recent[1:]
    return recent


async def rewrite(rag: Rag, turns: Sequence[Turn], question: str) -> str:
    """What the question means after these turns; without any, the question itself."""
    if not turns:
        return question
    prompt = standalone_prompt(turns, question)
    async with rag.lookahead(question) as ahead:
        written = await rag.generate("rewrite", prompt, max_tokens=REWRITE_TOKENS, shape=STANDALONE, refining=ahead)
    return STANDALONE.first(written.text, question)


def _asked(said: str, question: str) -> list[Message]:
    return user(f"{said}\n\nFollow-up: {' '.join(question.split())}\nComplete question:")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"
