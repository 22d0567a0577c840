"""A text as it grows out of a model's tokens: characters that span tokens, stop texts, and the tokens' places."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from telerag_cli.llm.base import Token, find_stop


class Detokenizer:
    """The text of one answer. Bytes that are not UTF-8 become U+FFFD; an unfinished character is not there yet."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.count = 0
        """Tokens it took."""
        self.stopped_by: str | None = None
        """Which of the ``stop`` texts ended it; they are not part of it."""
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens: list[Token] = []
        """Those that came with a probability."""

    def add(self, piece: bytes, logprob: float | None = None) -> None:
        """Take a token's bytes, and the logarithm of its probability if the tokens are to be kept."""
        before = len(self.text)
        self.text += self._utf8.decode(piece)
        self.count += 1
        if logprob is not None:
            self.tokens.append(Token(before, len(self.text), logprob))
        # What was there before has been searched.
        if found := find_stop(self.text, self._stop, max(0, before - self._longest + 1)):
            place, self.stopped_by = found
            self.text = self.text[:place]

    @property
    def shown(self) -> str:
        """The text without an end that may turn out to begin a ``stop`` text."""
        if self.stopped_by is None:
            for length in range(min(self._longest - 1, len(self.text)), 0, -1):
                tail = self.text[-length:]
                if any(mark.startswith(tail) and mark != tail for mark in self._stop):
                    return self.text[:-length]
        return self.text

    def finished(self) -> tuple[str, tuple[Token, ...]]:
        """The text without white space around it, and its tokens."""
        return stripped(self.text, self.tokens)


def stripped(text: str, tokens: Sequence[Token]) -> tuple[str, tuple[Token, ...]]:
    """The text without white space around it, and the tokens of what is left of it."""
    lead = len(text) - len(text.lstrip())
    bare = text.strip()
    kept = (Token(max(token.start - lead, 0), min(token.end - lead, len(bare)), token.logprob) for token in tokens)
    return bare, tuple(token for token in kept if token.start < token.end)
