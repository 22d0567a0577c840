"""A generator that answers from a script at a given pace: for tests and for timing without a model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from telerag_cli.errors import ModelError
from telerag_cli.llm.base import FinishReason, Generation, Message, OnText, Request, context_exceeded
from telerag_cli.llm.detokenizer import Detokenizer


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
        """Take the script: a function of the request; or a mapping, whose first key in the last message answers."""
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
        output = Detokenizer(request.stop)
        reason: FinishReason = "stop"
        for word in reply.text.split(" ") if reply.text else ():
            if output.count == request.max_tokens:
                reason = "length"
                break
            if self._token_s:
                await asyncio.sleep(self._token_s)
            if output.count == reply.fails_after:
                raise ModelError(f"The scripted model broke after {output.count} tokens.", remedy="Fix the script.")
            piece = f" {word}" if output.count else word
            output.add(piece.encode(), math.log(reply.doubtful.get(word.strip(".,?!"), 1.0)))
            if output.stopped_by is not None:
                break
            if on_text:
                on_text(output.text, output.count)
        text, tokens = output.finished()
        return Generation(
            text,
            reason,
            prompt_tokens,
            output.count,
            prefill_s=self._token_s,
            decode_s=self._token_s * max(output.count - 1, 0),
            stopped_by=output.stopped_by,
            tokens=tokens if request.logprobs else (),
        )

    def _reply(self, request: Request) -> Reply:
        if callable(self._script):
            answer = self._script(request)
            return answer if isinstance(answer, Reply) else Reply(answer)
        last = request.messages[-1].content
        for key, text in self._script.items():
            if key in last:
                return Reply(text)
        raise ModelError(f"The script has no answer to '{last[:60]}'.", remedy="Add one.")
