"""The prompt that asks for an answer from passages, made to fit the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from telerag_cli.errors import InputError
from telerag_cli.generation.base import Message
from telerag_cli.pipelines.base import Retrieved

INSTRUCTION = (
    "Answer the question in one or two sentences, using only the numbered passages. "
    "After each statement name the passage it comes from, like [1]."
)


def answer_prompt(question: str, found: Sequence[Retrieved]) -> list[Message]:
    """Instruction, numbered passages, question."""
    passages = "\n\n".join(f"[{rank}] {hit.passage.embedded_text}" for rank, hit in enumerate(found, 1))
    return [
        Message("system", INSTRUCTION),
        Message("user", f"{passages}\n\nQuestion: {question}" if found else question),
    ]


def fit(
    question: str, found: Sequence[Retrieved], room: int, count_tokens: Callable[[Sequence[Message]], int]
) -> tuple[list[Message], int]:
    """The prompt with as many of the best passages as fit.

    Args:
        question: the question.
        found: passages, best first.
        room: tokens that the prompt may have.
        count_tokens: tokens of a prompt.

    Returns:
        The prompt, and how many passages it holds.

    Raises:
        InputError: not even the question fits.
    """
    kept = len(found)
    while True:
        prompt = answer_prompt(question, found[:kept])
        tokens = count_tokens(prompt)
        if tokens <= room:
            return prompt, kept
        if not kept:
            raise InputError(f"The question takes {tokens:,} tokens and the context has room for {room:,}.",
                             remedy="Shorten it, lower --max-tokens or raise --ctx-size.")  # fmt: skip
        kept -= 1
