"""A prompt with passages, made to fit the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from telerag_cli.errors import ContextError
from telerag_cli.llm.base import Message
from telerag_cli.pipelines.base import Prompt
from telerag_cli.pipelines.found import Retrieved


def fit(
    question: str,
    found: Sequence[Retrieved],
    prompt: Prompt,
    room: int,
    count_tokens: Callable[[Sequence[Message]], int],
) -> tuple[Sequence[Message], int]:
    """The prompt with as many of the best passages as fit.

    Args:
        question: the question.
        found: passages, best first.
        prompt: makes the messages.
        room: tokens that the prompt may have.
        count_tokens: tokens of a prompt.

    Returns:
        The prompt, and how many passages it holds.

    Raises:
        ContextError: not even the question fits.
    """
    kept = len(found)
    while True:
        messages = prompt(question, found[:kept])
        tokens = count_tokens(messages)
        if tokens <= room:
            return messages, kept
        if not kept:
            raise ContextError(
                f"The question takes {tokens:,} tokens and the context has room for {room:,}.",
                remedy="Shorten it, lower --max-tokens or raise --ctx-size.",
            )
        kept -= 1
