"""One answer as it comes from a server: its text, why it ended, and what the server says of its tokens and times."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from telerag_cli.llm.base import Generation, OnText, Request, find_stop
from telerag_cli.llm.detokenizer import Detokenizer, stripped
from telerag_cli.llm.reasoning import ReasoningFilter, unfinished_tag
from telerag_cli.text import repaired

_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
"""Where servers put reasoning that they keep apart."""
_REASONS = {
    **dict.fromkeys(("eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("max_tokens", "model_length", "max_length"), "length"),
}
"""Other servers' words for why an answer ended."""


class StreamedAnswer:
    """What has been received in one try."""

    def __init__(self, request: Request, on_text: OnText | None) -> None:
        self.request = request
        self.reply = ""
        """As the server wrote it, without reasoning."""
        self.text = ""
        """As the shape would have it, without stop texts."""
        self.pieces = 0
        """Tokens as far as is known before there is usage: pieces of text, or the tokens with probabilities."""
        self.refusal = ""
        self.reasoned = False
        """Whether the server sent reasoning."""
        self.finish: str | None = None
        self.cut = False
        """Whether the text ended at a stop text that the server did not see."""
        self._on_text = on_text
        self._filter = ReasoningFilter()
        self._half = ""
        self._shown = ""
        self._stopped_by: str | None = None
        self._logprobs: list[tuple[bytes, float]] = []
        self._usage: Mapping[str, Any] = {}
        self._started_s = self._last_s = time.perf_counter()
        self._first_s: float | None = None

    @property
    def shown(self) -> bool:
        """Whether text was passed on."""
        return bool(self._shown)

    @property
    def tokens(self) -> int:
        """How many tokens the answer and its reasoning took."""
        counted = _count(self._usage, "completion_tokens")
        return self.pieces if counted is None else counted

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take the next chunk, or a whole completion; what is not as OpenAI has it is passed over."""
        self._usage = _mapping(chunk.get("usage")) or self._usage
        choices = chunk.get("choices")
        choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
        delta = _mapping(choice.get("delta"))
        if not delta and not self._filter.whole:
            delta = _mapping(choice.get("message"))
        self._logprobs += _logprobs(_mapping(choice.get("logprobs")).get("content"))
        if refusal := delta.get("refusal"):
            self.refusal += repaired(str(refusal))
        content, thought = _content(delta.get("content"))
        thought = thought or any(_is_text(delta.get(name)) for name in _REASONING)
        if thought or content:
            self.reasoned = self.reasoned or thought
            self._grow(content)
        if (finish := choice.get("finish_reason")) and str(finish).lower() not in ("null", "none") and not self.cut:
            if self._half:
                self._update(self._half)
                self._half = ""
            self.finish = _REASONS.get(str(finish).lower(), str(finish).lower())
            if self._first_s is None:  # an empty answer takes the time of its end
                self._last_s = time.perf_counter()
            # vLLM tells the stop text; a number there is a token.
            said = choice.get("stop_reason")
            self._stopped_by = said if said in self.request.stop else None

    def has_shape(self) -> bool:
        """Whether the reply has the shape asked for, as far as it goes."""
        shape = self.request.shape
        return shape is None or self.cut or shape.fits(self.reply, whole=self.finish != "length")

    def generation(self, asked_s: float, estimated_tokens: int) -> Generation:
        """The result, if the answer is complete."""
        shape = self.request.shape
        spelled = Detokenizer(reasoning=True)
        for piece, logprob in self._logprobs:
            spelled.add(piece, logprob)
        # Where the tokens do not spell the text, or the text is not the reply, no place is sure.
        placed = spelled.text.startswith(self.text) and not (shape and shape.json_tokens())
        text, tokens = stripped(self.text, spelled.tokens if placed else ())
        prompt_tokens = _count(self._usage, "prompt_tokens")
        first_s = self._first_s or self._last_s
        return Generation(
            text,
            "length" if self.finish == "length" else "stop",
            prompt_tokens=estimated_tokens if prompt_tokens is None else prompt_tokens,
            completion_tokens=self.tokens,
            prefill_s=first_s - self._started_s,
            decode_s=self._last_s - first_s,
            queue_s=self._started_s - asked_s,
            cached_tokens=_count(_mapping(self._usage.get("prompt_tokens_details")), "cached_tokens") or 0,
            stopped_by=self._stopped_by,
            tokens=tokens,
        )

    def _grow(self, piece: str) -> None:
        """Take a piece of the reply, which is empty if it was reasoning that the server keeps apart."""
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s
        self.pieces = max(self.pieces + 1, len(self._logprobs))
        # Half of a pair waits for its other half.
        piece, self._half = self._half + piece, ""
        if "\ud800" <= piece[-1:] <= "\udbff":
            piece, self._half = piece[:-1], piece[-1]
        self._update(piece)

    def _update(self, piece: str) -> None:
        """Take a piece of the text, and show what is there."""
        shape = self.request.shape
        self._filter.add(repaired(piece))
        received = self._filter.split
        self.reply, self.reasoned = received.answer, self.reasoned or received.reasoned
        self.text = shape.plain(self.reply) if shape else self.reply
        if stop := find_stop(self.text, self.request.stop):
            self.text, self._stopped_by = self.text[: stop[0]], stop[1]
            self.finish, self.cut = "stop", True
        shown = self.text if self.cut or shape else self.text[: len(self.text) - unfinished_tag(self.text)]
        if self._on_text and shown and not self._shown.startswith(shown):
            self._shown = shown
            self._on_text(shown, self.pieces)


def _content(content: Any) -> tuple[str, bool]:
    """The text of a turn, which may be a list of parts, and whether some of these are reasoning."""
    if isinstance(content, str):
        return content, False
    parts = [_mapping(part) for part in content] if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts), any(part.get("thinking") for part in parts)


def _logprobs(content: Any) -> list[tuple[bytes, float]]:
    tokens = []
    for token in map(_mapping, content if isinstance(content, list) else ()):
        logprob, spelled = token.get("logprob"), token.get("bytes")
        try:
            piece = bytes(spelled) if isinstance(spelled, list) and spelled else str(token.get("token", "")).encode()
        except (TypeError, ValueError):
            piece = b"\xff"  # spells nothing, so that no place is sure
        if isinstance(logprob, int | float) and abs(logprob) <= sys.float_info.max:
            tokens.append((piece, float(logprob)))
    return tokens


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(counts: Mapping[str, Any], name: str) -> int | None:
    value = counts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _is_text(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)
