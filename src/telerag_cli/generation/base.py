"""One interface to every language model: messages in, text out, tokens streamed on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from telerag_cli.errors import InputError

FinishReason = Literal["stop", "length"]

OnText = Callable[[str, int], None]
"""Called as text grows, from any thread: all text so far, and the tokens it took. It must return quickly."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Request:
    """What to write. At temperature 0 the most likely token is taken each time and the seed has no part."""

    messages: Sequence[Message]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""


@dataclass(frozen=True)
class Generation:
    """What was written, why it ended, and what it took."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_s: float
    """Until the first token."""
    decode_s: float
    """From the first token to the last."""


class Generator(Protocol):
    """A language model."""

    name: str
    context_tokens: int
    """Tokens that a prompt and its answer may have together."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt, chat template included."""

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """Write.

        Raises:
            InputError: the prompt and ``max_tokens`` exceed the context.
            ModelError: the model failed.
        """

    def close(self) -> None:
        """Free the model."""


def context_exceeded(prompt_tokens: int, max_tokens: int, context_tokens: int) -> InputError:
    """The error for a prompt and an answer that do not fit the context together."""
    return InputError(
        f"The prompt has {prompt_tokens:,} tokens and the answer up to {max_tokens:,}; the context holds {context_tokens:,}.",
        remedy="Shorten the question, lower --max-tokens or raise --ctx-size.",
    )


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first of the ``stop`` texts in it, or None if it holds none."""
    places = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(places)] if places else None
