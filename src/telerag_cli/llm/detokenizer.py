"""A text as it grows out of a model's tokens: characters that span tokens, stop texts, and the tokens' places."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from telerag_cli.llm.base import Token, find_stop
from telerag_cli.llm.reasoning import ReasoningFilter, unfinished_tag


class Detokenizer:
    """The text of one answer.

    Bytes that are not UTF-8, and NULs, become U+FFFD; an unfinished character is not there yet.
    """

    def __init__(self, stop: Sequence[str] = (), *, reasoning: bool = False, inside: bool = False) -> None:
        """Begin an empty text that ends at the first of the ``stop`` texts.

        With ``reasoning``, what the model thinks aloud is left out; ``inside`` says that it has begun to already.
        """
        self.text = ""
        """Without reasoning."""
        self.count = 0
        """Tokens it took."""
        self.stopped_by: str | None = None
        """Which of the ``stop`` texts ended it; they are not part of it."""
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._filter = ReasoningFilter(inside=inside) if reasoning else None
        self._characters = 0
        self._tokens: list[Token] = []

    def add(self, piece: bytes, logprob: float | None = None) -> None:
        """Take a token's bytes, and the logarithm of its probability if the tokens are to be kept."""
        before, start = len(self.text), self._characters
        new = self._utf8.decode(piece).replace("\0", "\ufffd")
        self._characters += len(new)
        self.count += 1
        if logprob is not None:
            self._tokens.append(Token(start, self._characters, logprob))
        if self._filter:
            self._filter.add(new)
            self.text = self._filter.split.answer
        else:
            self.text += new
        # What was there before has been searched.
        searched = before - self._longest + 1 if before <= len(self.text) else 0
        if found := find_stop(self.text, self._stop, max(0, searched)):
            place, self.stopped_by = found
            self.text = self.text[:place]

    @property
    def tokens(self) -> list[Token]:
        """Those that came with a probability."""
        if not self._filter:
            return self._tokens
        place = self._filter.split.place
        return [Token(place(token.start), place(token.end), token.logprob) for token in self._tokens]

    @property
    def only_reasoned(self) -> bool:
        """Whether there is reasoning and no answer."""
        return bool(self._filter and self._filter.split.reasoned and not self.text.strip())

    @property
    def shown(self) -> str:
        """The text without an end that may turn out to begin a ``stop`` text or reasoning."""
        if self.stopped_by is not None:
            return self.text
        text = self.text[: len(self.text) - unfinished_tag(self.text)] if self._filter else self.text
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(mark.startswith(tail) and mark != tail for mark in self._stop):
                return text[:-length]
        return text

    def finished(self) -> tuple[str, tuple[Token, ...]]:
        """The text without white space around it, and its tokens."""
        return stripped(self.text, self.tokens)


def stripped(text: str, tokens: Sequence[Token]) -> tuple[str, tuple[Token, ...]]:
    """The text without white space around it, and the tokens of what is left of it."""
    lead = len(text) - len(text.lstrip())
    bare = text.strip()
    kept = (Token(max(token.start - lead, 0), min(token.end - lead, len(bare)), token.logprob) for token in tokens)
    return bare, tuple(token for token in kept if token.start < token.end)
