"""One interface to every language model: messages in, text out, tokens streamed on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from telerag_cli.errors import ContextError
from telerag_cli.llm.shapes import Shape

QUICK_CHARACTERS = 50_000
"""A prompt shorter than this is tokenized in some milliseconds."""

FinishReason = Literal["stop", "length"]

OnText = Callable[[str, int], None]
"""Called as text grows, from any thread: all text so far, and the tokens it took. It must return quickly.

A text may begin anew, if a server broke it off.
"""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Request:
    """What to write. At temperature 0 the most likely token is taken each time, whatever the seed."""

    messages: Sequence[Message]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    shape: Shape | None = None
    """What the text must look like; see `telerag_cli.llm.shapes`."""
    logprobs: bool = False
    """Whether `Generation.tokens` is wanted."""
    ignore_eos: bool = False
    """Write ``max_tokens`` tokens in any case: for replaying a recorded text in its time."""


@dataclass(frozen=True)
class Token:
    """One token of a text: the characters ``start`` to ``end`` of it, and the natural logarithm of its probability.

    The probability is the model's own, before temperature, top-p and shape.
    """

    start: int
    end: int
    logprob: float


@dataclass(frozen=True)
class Generation:
    """What was written, why it ended, and what it took."""

    text: str
    """Without white space around it."""
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_s: float
    """From the end of waiting until the first token."""
    decode_s: float
    """From the first token to the last."""
    queue_s: float = 0.0
    """Until the model had room for it."""
    cached_tokens: int = 0
    """Tokens of the prompt that were computed for another request before."""
    stopped_by: str | None = None
    """Which of the request's ``stop`` texts ended it, if one did and the generator knows."""
    tokens: tuple[Token, ...] = ()
    """If they were asked for and the generator can tell."""


class Generator(Protocol):
    """A language model."""

    name: str
    context_tokens: int
    """Tokens that a prompt and its answer may have together."""
    parallel: int
    """Requests that it writes at once; more of them wait."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt, chat template included."""

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """Write. If cancelled, writing has ended, and nothing is held for it, when the cancellation comes through.

        Raises:
            InputError: the prompt and ``max_tokens`` exceed the context.
            ModelError: the model failed.
        """

    def forget(self) -> None:
        """Drop what is kept of earlier prompts, as far as that is ours to drop: for measuring."""

    def close(self) -> None:
        """Free the model."""


def is_quick(messages: Sequence[Message]) -> bool:
    """Whether a prompt is tokenized so quickly that an event loop can wait for it."""
    return sum(len(message.content) for message in messages) < QUICK_CHARACTERS


async def counted(generator: Generator, messages: Sequence[Message]) -> int:
    """Return the tokens of a prompt, as `Generator.count_tokens` does, without holding up the event loop."""
    if is_quick(messages):
        return generator.count_tokens(messages)
    return await asyncio.to_thread(generator.count_tokens, messages)


def context_exceeded(prompt_tokens: int, max_tokens: int, context_tokens: int) -> ContextError:
    """The error for a prompt and an answer that do not fit the context together."""
    return ContextError(
        f"The prompt has {prompt_tokens:,} tokens and the answer up to {max_tokens:,}; "
        f"the context holds {context_tokens:,}.",
        remedy="Shorten the question, lower --max-tokens or raise --ctx-size.",
    )


def find_stop(text: str, stop: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """Where the first of the ``stop`` texts begins at or after ``start``, and which it is; None if there is none."""
    found = [(place, mark) for mark in stop if (place := text.find(mark, start)) >= 0]
    return min(found, default=None)
