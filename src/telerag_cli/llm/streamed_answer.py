"""The answer of an OpenAI-compatible server, put together from the chunks of its stream."""

from __future__ import annotations

import time
from typing import Any

from openai.types.chat import ChatCompletionChunk

from telerag_cli.llm.base import Generation, OnText, Request, find_stop
from telerag_cli.llm.detokenizer import Detokenizer, stripped


class StreamedAnswer:
    """What has been received in one try."""

    def __init__(self, request: Request, on_text: OnText | None) -> None:
        self.request = request
        self.reply = ""
        """As the server wrote it."""
        self.text = ""
        """As the shape would have it, without stop texts."""
        self.pieces = 0
        """Tokens as far as is known before there is usage: pieces of text, or the tokens with probabilities."""
        self.refusal = ""
        self.finish: str | None = None
        self.cut = False
        """Whether the text ended at a stop text that the server did not see."""
        self.shown = False
        """Whether text was passed on, so that there is no way back."""
        self._on_text = on_text
        self._stopped_by: str | None = None
        self._logprobs: list[tuple[bytes, float]] = []
        self._usage: Any = None
        self._started_s = self._last_s = time.perf_counter()
        self._first_s: float | None = None

    def add(self, chunk: ChatCompletionChunk) -> None:
        """Take the next chunk."""
        self._usage = chunk.usage or self._usage
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.logprobs and choice.logprobs.content:
            self._logprobs += [
                (bytes(token.bytes) if token.bytes else token.token.encode(), token.logprob)
                for token in choice.logprobs.content
            ]
        if choice.delta:
            self.refusal += choice.delta.refusal or ""
            if choice.delta.content:
                self._grow(choice.delta.content)
        if choice.finish_reason and not self.cut:
            self.finish = choice.finish_reason
            if self._first_s is None:  # an empty answer takes the time of its end
                self._last_s = time.perf_counter()
            # vLLM tells the stop text; a number there is a token.
            said = (choice.model_extra or {}).get("stop_reason")
            self._stopped_by = said if said in self.request.stop else None

    def has_shape(self) -> bool:
        """Whether the reply has the shape asked for, as far as it goes."""
        shape = self.request.shape
        return shape is None or self.cut or shape.fits(self.reply, whole=self.finish != "length")

    def generation(self, asked_s: float, estimated_tokens: int) -> Generation:
        """The result, if the answer is complete."""
        shape, usage = self.request.shape, self._usage
        spelled = Detokenizer()
        for piece, logprob in self._logprobs:
            spelled.add(piece, logprob)
        # Where the tokens do not spell the text, or the text is not the reply, no place is sure.
        placed = spelled.text.startswith(self.text) and not (shape and shape.json_tokens())
        text, tokens = stripped(self.text, spelled.tokens if placed else ())
        details = usage.prompt_tokens_details if usage else None
        first_s = self._first_s or self._last_s
        return Generation(
            text,
            "length" if self.finish == "length" else "stop",
            prompt_tokens=usage.prompt_tokens if usage else estimated_tokens,
            completion_tokens=usage.completion_tokens if usage else self.pieces,
            prefill_s=first_s - self._started_s,
            decode_s=self._last_s - first_s,
            queue_s=self._started_s - asked_s,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            stopped_by=self._stopped_by,
            tokens=tokens,
        )

    def _grow(self, piece: str) -> None:
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s
        self.reply += piece
        self.pieces = max(self.pieces + 1, len(self._logprobs))
        before, shape = self.text, self.request.shape
        self.text = shape.plain(self.reply) if shape else self.reply
        if stop := find_stop(self.text, self.request.stop):
            self.text, self._stopped_by = self.text[: stop[0]], stop[1]
            self.finish, self.cut = "stop", True
        if self._on_text and len(self.text) > len(before):
            self.shown = True
            self._on_text(self.text, self.pieces)
