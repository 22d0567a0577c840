"""A generator that says what it is told to say, at the pace it is told: for tests and for timing without a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from telerag_cli.errors import ModelError
from telerag_cli.generation.base import (
    FinishReason,
    Generation,
    Message,
    OnText,
    Request,
    context_exceeded,
    cut_at_stop,
)

Script = Mapping[str, str] | Callable[[Request], str]


class ScriptedGenerator:
    """Answers from a script; a token is a word with the space before it."""

    name = "scripted"

    def __init__(self, script: Script, *, token_s: float = 0.0, context_tokens: int = 4096) -> None:
        """Take the script.

        Args:
            script: a function of the request; or a mapping in which the first key found in the last message gives the
                answer.
            token_s: seconds a token takes.
            context_tokens: tokens that prompt and answer may have together.
        """
        self._script = script
        self._token_s = token_s
        self.context_tokens = context_tokens
        self.requests: list[Request] = []
        """What was asked, in order."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Words of all messages."""
        return sum(len(message.content.split()) for message in messages)

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """See `Generator`; raises ModelError when the script has no answer."""
        self.requests.append(request)
        prompt_tokens = self.count_tokens(request.messages)
        if prompt_tokens + request.max_tokens > self.context_tokens:
            raise context_exceeded(prompt_tokens, request.max_tokens, self.context_tokens)
        words = self._answer(request).split()
        written = ""
        count = 0
        for count, word in enumerate(words[: request.max_tokens], 1):
            if self._token_s:
                await asyncio.sleep(self._token_s)
            written = f"{written} {word}" if written else word
            cut = cut_at_stop(written, request.stop)
            if cut is not None:
                return Generation(
                    cut, "stop", prompt_tokens, count, self._token_s, self._token_s * (count - 1)
                )
            if on_text:
                on_text(written, count)
        reason: FinishReason = "length" if len(words) > request.max_tokens else "stop"
        return Generation(
            written, reason, prompt_tokens, count, self._token_s, self._token_s * max(count - 1, 0)
        )

    def close(self) -> None:
        """Nothing to free."""

    def _answer(self, request: Request) -> str:
        if callable(self._script):
            return self._script(request)
        last = request.messages[-1].content
        for key, answer in self._script.items():
            if key in last:
                return answer
        raise ModelError(f"The script has no answer to '{last[:60]}'.", remedy="Add one.")
