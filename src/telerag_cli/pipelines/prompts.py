"""The prompt with which every pipeline answers, and what others are made from."""

from __future__ import annotations

from collections.abc import Sequence

from telerag_cli.corpus.passages import Retrieved
from telerag_cli.llm.base import Message

INSTRUCTION = (
    "Answer the question in one or two sentences, using only the numbered passages. "
    "After each statement name the passage it comes from, like [1]."
)
BRIEFLY = "Answer the question in one or two sentences."


def user(text: str) -> list[Message]:
    """A prompt that is one message of the user."""
    return [Message("user", text)]


def numbered(found: Sequence[Retrieved]) -> str:
    """Passages, each after its number."""
    return "\n\n".join(f"[{rank}] {hit.passage.embedded_text}" for rank, hit in enumerate(found, 1))


def answer_prompt(question: str, found: Sequence[Retrieved]) -> list[Message]:
    """Instruction, numbered passages, question; without passages, the question by itself."""
    if not found:
        return [Message("system", BRIEFLY), *user(question)]
    return [Message("system", INSTRUCTION), *user(f"{numbered(found)}\n\nQuestion: {question}")]
