"""Text files to chunks that fit the embedder, with exact offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

BLOCK_CHARACTERS = 1 << 20
"""Text held at a time, so that a file of any size can be read; chunks do not cross the end of a block."""

Split = Callable[[str], Iterable[tuple[int, str]]]
"""From a text to (offset in characters, chunk) pairs."""


class Chunker:
    """Cuts prose and Markdown at the largest boundary (heading, paragraph, sentence, word) that fits the embedder.

    It takes the embedder's ``tokenizers.Tokenizer``, without truncation, and its limit, special tokens included.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter

        capacity = max(1, max_tokens - tokenizer.num_special_tokens_to_add(False))
        self._prose: Split = TextSplitter.from_huggingface_tokenizer(tokenizer, capacity).chunk_indices
        self._markdown: Split = MarkdownSplitter.from_huggingface_tokenizer(tokenizer, capacity).chunk_indices

    def chunks(self, handle: IO[str], *, markdown: bool) -> Iterator[tuple[int, str]]:
        """Offsets in characters, and chunks: each equals ``text[offset : offset + len(chunk)]`` of the whole file."""
        split = self._markdown if markdown else self._prose
        for start, block in blocks(handle):
            for offset, chunk in split(block):
                yield start + offset, chunk


def blocks(handle: IO[str], characters: int = BLOCK_CHARACTERS) -> Iterator[tuple[int, str]]:
    """Offsets in characters, and blocks of about ``characters`` that end at a blank line, a line or anywhere."""
    start, held = 0, ""
    while read := handle.read(characters):
        held += read
        if len(read) < characters:
            continue
        cut = next((at + len(mark) for mark in ("\n\n", "\n", " ") if (at := held.rfind(mark)) > 0), len(held))
        yield start, held[:cut]
        start, held = start + cut, held[cut:]
    if held:
        yield start, held
