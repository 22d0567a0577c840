"""A text as it grows out of a model's tokens: characters that span tokens, texts that end it, and who said what."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from telerag_cli.llm.base import Token, find_stop, stripped


class Writing:
    """The text of one answer. Bytes that are no UTF-8 become U+FFFD; a character that is not finished is not there yet."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Begin.

        Args:
            stop: texts that end it and are no part of it.
        """
        self.text = ""
        self.count = 0
        """Tokens it took."""
        self.stopped_by: str | None = None
        """Which of the ``stop`` texts ended it."""
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens: list[Token] = []

    def add(self, piece: bytes, logprob: float | None = None) -> None:
        """Take a token's bytes, and the logarithm of its probability if the tokens are to be kept."""
        before = len(self.text)
        self.text += self._utf8.decode(piece)
        self.count += 1
        if logprob is not None:
            self._tokens.append(Token(before, len(self.text), logprob))
        # What was there before has been searched.
        found = find_stop(self.text, self._stop, max(0, before - self._longest + 1))
        if found:
            place, self.stopped_by = found
            self.text = self.text[:place]

    @property
    def shown(self) -> str:
        """The text without an end that may turn out to be a ``stop`` text's beginning."""
        if self.stopped_by is None:
            for length in range(min(self._longest - 1, len(self.text)), 0, -1):
                tail = self.text[-length:]
                if any(mark.startswith(tail) and mark != tail for mark in self._stop):
                    return self.text[:-length]
        return self.text

    def finished(self) -> tuple[str, tuple[Token, ...]]:
        """The text without white space around it, and its tokens."""
        return stripped(self.text, self._tokens)
