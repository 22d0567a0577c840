"""A generator that says what it is told to say, at the pace it is told: for tests and for timing without a model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from telerag_cli.errors import ModelError
from telerag_cli.llm.base import FinishReason, Generation, Message, OnText, Request, Token, context_exceeded, find_stop


@dataclass(frozen=True)
class Reply:
    """A scripted answer in detail."""

    text: str
    doubtful: Mapping[str, float] = field(default_factory=dict)
    """Words and their probabilities; all others have 1."""
    fails_after: int | None = None
    """The model breaks after so many tokens."""


Script = Mapping[str, str] | Callable[[Request], str | Reply]


class ScriptedGenerator:
    """Answers from a script; a token is a word with the space before it."""

    name = "scripted"
    parallel = 1000

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
        self.running = 0
        """Requests that are being answered now."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Words of all messages."""
        return sum(len(message.content.split()) for message in messages)

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """See `Generator`; raises ModelError when the script has no answer or says that the model breaks."""
        self.requests.append(request)
        prompt_tokens = self.count_tokens(request.messages)
        if prompt_tokens + request.max_tokens > self.context_tokens:
            raise context_exceeded(prompt_tokens, request.max_tokens, self.context_tokens)
        self.running += 1
        try:
            return await self._write(request, prompt_tokens, on_text)
        finally:
            self.running -= 1

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing to free."""

    async def _write(self, request: Request, prompt_tokens: int, on_text: OnText | None) -> Generation:
        reply = self._reply(request)
        text, count, stopped_by = "", 0, None
        tokens: list[Token] = []
        reason: FinishReason = "stop"
        for word in reply.text.split(" ") if reply.text else ():
            if count == request.max_tokens:
                reason = "length"
                break
            if self._token_s:
                await asyncio.sleep(self._token_s)
            if count == reply.fails_after:
                raise ModelError(f"The scripted model broke after {count} tokens.", remedy="Mend the script.")
            start, text = len(text), f"{text} {word}" if count else word
            count += 1
            tokens.append(Token(start, len(text), math.log(reply.doubtful.get(word.strip(".,?!"), 1.0))))
            if stop := find_stop(text, request.stop):
                text, stopped_by = text[: stop[0]], stop[1]
                break
            if on_text:
                on_text(text, count)
        kept = tuple(
            Token(token.start, min(token.end, len(text)), token.logprob) for token in tokens if token.start < len(text)
        )
        return Generation(
            text,
            reason,
            prompt_tokens,
            count,
            prefill_s=self._token_s,
            decode_s=self._token_s * max(count - 1, 0),
            stopped_by=stopped_by,
            tokens=kept if request.logprobs else (),
        )

    def _reply(self, request: Request) -> Reply:
        answer = self._script(request) if callable(self._script) else self._look_up(self._script, request)
        return answer if isinstance(answer, Reply) else Reply(answer)

    @staticmethod
    def _look_up(script: Mapping[str, str], request: Request) -> str:
        last = request.messages[-1].content
        for key, answer in script.items():
            if key in last:
                return answer
        raise ModelError(f"The script has no answer to '{last[:60]}'.", remedy="Add one.")
