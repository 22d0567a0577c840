"""Passages of a corpus, streamed from JSON, TSV, CSV, Parquet and text files, folders of them, and standard input.

One bad line or file costs itself only. Given ``on_bad``, the readers hand it the error and go on. Without it they read
to the end of the corpus without yielding more, so that the one error they raise counts all that is to be corrected.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from telerag_cli import text
from telerag_cli.corpus.chunking import Chunker
from telerag_cli.corpus.fields import Columns
from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.rows import parquet, rows_of
from telerag_cli.corpus.sources import COMPRESSED, Source, SourceKind, Sources
from telerag_cli.errors import InputError, TeleragError
from telerag_cli.files import wrap_os_error
from telerag_cli.text import TextError

OnBad = Callable[[TeleragError], None]
DOCUMENTS = (SourceKind.TEXT, SourceKind.MARKDOWN)
BLOCK_BYTES = 1 << 20


def count_passages(sources: Sources) -> int | None:
    """Return about how many passages there are, from line ends and Parquet footers; None if only reading can tell."""
    total = 0
    for source in sources.files:
        path = source.path
        if path is None or not path.is_file() or path.suffix in COMPRESSED or source.kind in DOCUMENTS:
            return None
        if source.kind is SourceKind.PARQUET:
            try:
                total += parquet(path).metadata.num_rows
            except InputError:
                return None  # reading says it
            continue
        try:
            with path.open("rb", buffering=0) as handle:
                while block := handle.read(BLOCK_BYTES):
                    total += block.count(b"\n")
        except OSError as error:
            raise wrap_os_error(error, path) from error
        total -= source.kind is not SourceKind.JSON  # the header
    return max(total, 0)


def read_passages(
    sources: Sources, chunker: Chunker | None = None, on_bad: OnBad | None = None, columns: Columns | None = None
) -> Iterator[Passage]:
    """Yield all passages of the sources, one at a time; ``sources.notes`` grows meanwhile.

    A row without an id gets ``<label>:<line>``; the chunks of a text file get ``<label>#<n>``.

    Args:
        sources: what `find_sources` found.
        chunker: cuts text files; needed if there are any.
        on_bad: called with the error of each line or file that cannot be used; without it one is raised at the end.
        columns: names of the columns of text and id.

    Raises:
        TeleragError: lines or files cannot be used, and there is no ``on_bad``; of several it is an `InputError`.
    """
    notes, columns = sources.notes, columns or Columns()
    for source in sources.files:
        for passage in _passages(source, chunker, columns, sources, on_bad):
            if on_bad or not notes.bad:
                yield passage
    if not on_bad and notes.bad == 1:
        raise notes.troubles[0]
    if not on_bad and notes.bad:
        raise InputError(
            f"{notes.bad:,} lines or files cannot be used: {notes.examples()}",
            remedy="Correct them, or leave them out with --skip-bad.",
        )


def _passages(
    source: Source, chunker: Chunker | None, columns: Columns, sources: Sources, on_bad: OnBad | None
) -> Iterator[Passage]:
    """Yield the passages of one source; whatever is wrong with it becomes a trouble."""
    notes = sources.notes

    def trouble(error: TeleragError) -> None:
        notes.trouble(error)
        if on_bad:
            on_bad(error)

    def bad(line: int, reason: object) -> None:
        trouble(
            InputError(
                f"{source.label}:{line}: {reason}.", remedy="Correct it, or leave such lines out with --skip-bad."
            )
        )

    try:
        if source.kind in DOCUMENTS:
            assert chunker is not None, "text files need a chunker"
            for passage in _chunks(source, chunker, notes.assumed.append):
                notes.took(passage.id, "from file and chunk")
                yield passage
            return
        for line, row in rows_of(source, columns, bad, notes.assumed.append):
            try:
                passage, origin = columns.passage(row, f"{source.label}:{line}")
            except (TextError, RecursionError) as reason:
                bad(line, reason)
            else:
                notes.took(passage.id, origin)
                yield passage
    except TeleragError as error:
        trouble(error)
    except OSError as error:  # without a number it is what decompressors report
        trouble(wrap_os_error(error, source.path or Path(source.label)) if error.errno else _torn(source, error))
    except (EOFError, zlib.error) as error:
        trouble(_torn(source, error))
    except UnicodeError as error:
        trouble(InputError(f"{source.label} is cut off or damaged: {error}.", remedy="Convert it to UTF-8."))


def _torn(source: Source, error: Exception) -> InputError:
    return InputError(f"{source.label} is not a whole compressed file: {error}.", remedy="Fetch it again.")


def _chunks(source: Source, chunker: Chunker, assumed: Callable[[str], None]) -> Iterator[Passage]:
    """Yield the chunks of a document, whose encoding is known before the first of them."""
    with source.open() as data:
        encoding = document_encoding(data)
    if encoding == text.LATIN:
        assumed(f"{source.label} is not UTF-8 and was read as Windows-1252.")
    with source.open() as data, text.reading(data, encoding) as (handle, _encoding):
        checked = _Checked(handle, source.label)
        chunks = chunker.chunks(checked, markdown=source.kind is SourceKind.MARKDOWN)  # type: ignore[arg-type]
        for number, (start, chunk) in enumerate(chunks):
            yield Passage(
                f"{source.label}#{number}", chunk, {"source": source.label, "start": start, "end": start + len(chunk)}
            )


def document_encoding(data: IO[bytes]) -> str:
    """Return the encoding of a whole text: a byte that is not UTF-8 may be far from its start."""
    block = data.read(BLOCK_BYTES)
    if (encoding := text.encoding_of(block, whole=len(block) < BLOCK_BYTES)) != "utf-8":
        return encoding
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    broken = False
    while block:
        decoded = decoder.decode(block)
        if not decoded.isascii():
            foreign = [char for char in decoded if char > "\x7f"]
            if any(not "\udc80" <= char <= "\udcff" for char in foreign):
                return "utf-8"
            broken = True
        block = data.read(BLOCK_BYTES)
    return text.LATIN if broken or decoder.getstate()[0] else "utf-8"


class _Checked:
    """A text handle whose ``read`` names the line of the first character that cannot be used."""

    def __init__(self, handle: IO[str], label: str) -> None:
        self._handle, self._label, self._lines = handle, label, 1

    def read(self, characters: int) -> str:
        read = self._handle.read(characters)
        try:
            text.checked(read)
        except TextError as error:
            place = next(at for at, char in enumerate(read) if char == "\0" or "\ud800" <= char <= "\udfff")
            raise InputError(
                f"{self._label}:{self._lines + read.count(chr(10), 0, place)}: {error}.",
                remedy="Convert the file to UTF-8, or leave it out with --skip-bad.",
            ) from None
        self._lines += read.count("\n")
        return read
