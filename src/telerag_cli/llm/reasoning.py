"""Reasoning within a text: what a model thinks aloud between tags is not its answer."""

from __future__ import annotations

import re
from typing import NamedTuple

from telerag_cli.errors import ReasoningError

_NAMES = ("think", "thinking", "thought", "reasoning", "seed:think")
_PAIRS = {
    **{f"<{name}>": f"</{name}>" for name in _NAMES},
    "[think]": "[/think]",
    "◁think▷": "◁/think▷",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|start_thinking|>": "<|end_thinking|>",
}
_ENDS = frozenset(_PAIRS.values())
_TAGS = (*_PAIRS, *_ENDS)
# A tag in quotation marks is one that the text is about.
TAG = re.compile(rf"""(?<![`'"])(?:{"|".join(map(re.escape, _TAGS))})""", re.IGNORECASE)
"""A tag that begins or ends reasoning."""
_LONGEST_TAG = max(map(len, _TAGS))
_FIRST = re.compile(f"[{re.escape(''.join({tag[0] for tag in _TAGS}))}]")


class Split(NamedTuple):
    """A text without its reasoning."""

    answer: str
    kept: tuple[tuple[int, int], ...]
    """Which characters of the whole text the answer has: from, to."""
    reasoned: bool
    """Whether there was reasoning."""
    inside: bool
    """Whether the text ends within reasoning."""

    def place(self, whole: int) -> int:
        """Return the place in the answer of a place in the whole text."""
        return sum(min(max(whole - start, 0), end - start) for start, end in self.kept)

    def longer(self, piece: str) -> Split:
        """Return the same for the text with a piece after it in which no tag ends."""
        if self.inside:
            return self._replace(reasoned=self.reasoned or bool(piece.strip()))
        *kept, (start, end) = self.kept
        return self._replace(answer=self.answer + piece, kept=(*kept, (start, end + len(piece))))


def split(text: str, *, inside: bool = False) -> Split:
    """Return what of a text is its answer; reasoning that has not ended reaches to its end.

    A tag that ends reasoning which nothing began ends what a prompt began: all before it is reasoning.

    Args:
        text: the text, or its beginning.
        inside: whether it begins within reasoning, as after a prompt that ends with the tag.
    """
    kept: list[tuple[int, int]] = []
    start, reasoned, opened = 0, False, inside
    for tag in TAG.finditer(text):
        before = text[start : tag.start()]
        ends = tag[0].lower() in _ENDS
        if ends and not opened:
            kept, inside = [], True
        if inside:
            reasoned = reasoned or bool(before.strip())
        else:
            kept.append((start, tag.start()))
        start, inside, opened = tag.end(), not ends, True
    if inside:
        reasoned = reasoned or bool(text[start:].strip())
    else:
        kept.append((start, len(text)))
    return Split("".join(text[begin:end] for begin, end in kept), tuple(kept), reasoned, inside)


class ReasoningFilter:
    """A text that grows, without its reasoning. A piece takes the same time however long the text is."""

    def __init__(self, *, inside: bool = False) -> None:
        """Begin, perhaps within reasoning; see `split`."""
        self.whole = ""
        """With its reasoning."""
        self._inside = inside
        self.split = split("", inside=inside)

    def add(self, piece: str) -> None:
        """Take the next piece."""
        start = len(self.whole)
        self.whole += piece
        if TAG.search(self.whole, max(0, start - _LONGEST_TAG)):
            self.split = split(self.whole, inside=self._inside)
        else:
            self.split = self.split.longer(piece)


def unfinished_tag(text: str) -> int:
    """Return how many characters at the end of a text may yet become a tag."""
    end = text[-_LONGEST_TAG:].lower()
    places = (place.start() for place in _FIRST.finditer(end))
    return next((len(end) - place for place in places if any(tag.startswith(end[place:]) for tag in _TAGS)), 0)


def is_beginning(tag: str) -> bool:
    """Whether a `TAG` begins reasoning."""
    return tag.lower() in _PAIRS


def only_reasoning(model: str, tokens: int) -> ReasoningError:
    """Return the error for an answer that has reasoning and nothing else."""
    return ReasoningError(
        f"{model} wrote {tokens:,} token{'s' * (tokens != 1)} of reasoning and no answer.",
        remedy="Raise --max-tokens, or choose a model or a setting of it that does not reason.",
    )
