"""Sources of passages, streamed: JSONL, TSV, CSV, Parquet, text files, folders of them, standard input.

A line that cannot be used is an `InputError` that names file and line. Given ``on_bad``, the readers hand it the error
and go on; what concerns a whole file (missing, not Parquet, without a text column) is always raised.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import InputError, UsageError
from telerag_cli.files import wrap_os_error

STDIN = "-"
PARQUET_ROWS = 1024
BLOCK_CHARACTERS = 1 << 20
"""Text held at a time, so that a file of any size can be read; chunks do not cross the end of a block."""
TEXT_KEYS = ("text", "contents")
ID_KEYS = ("id", "_id")

OnBad = Callable[[InputError], None]


class SourceKind(Enum):
    """How a source is read."""

    JSONL = auto()
    CSV = auto()
    TSV = auto()
    PARQUET = auto()
    TEXT = auto()
    MARKDOWN = auto()


KINDS = {
    ".jsonl": SourceKind.JSONL,
    ".ndjson": SourceKind.JSONL,
    ".csv": SourceKind.CSV,
    ".tsv": SourceKind.TSV,
    ".parquet": SourceKind.PARQUET,
    ".txt": SourceKind.TEXT,
    ".md": SourceKind.MARKDOWN,
}


@dataclass(frozen=True)
class Source:
    """One file, or standard input; ``label`` names it in ids and messages wherever it lies."""

    path: Path | None
    kind: SourceKind
    label: str


class Chunker:
    """Cuts prose and Markdown at the largest boundary (heading, paragraph, sentence, word) that fits the embedder.

    It takes the embedder's ``tokenizers.Tokenizer``, without truncation, and its limit, special tokens included.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter

        capacity = max(1, max_tokens - tokenizer.num_special_tokens_to_add(False))
        self._prose = TextSplitter.from_huggingface_tokenizer(tokenizer, capacity)
        self._markdown = MarkdownSplitter.from_huggingface_tokenizer(tokenizer, capacity)

    def chunks(self, handle: IO[str], *, markdown: bool) -> Iterator[tuple[int, str]]:
        """Offsets in characters, and chunks: each equals ``text[offset : offset + len(chunk)]`` of the whole file."""
        splitter = self._markdown if markdown else self._prose
        for start, block in blocks(handle):
            for offset, chunk in splitter.chunk_indices(block):
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


class _BadRowError(ValueError):
    """Why a row cannot be used."""


def find_sources(arguments: Sequence[str]) -> list[Source]:
    """The files that the arguments name, folders walked in sorted order without hidden files.

    Raises:
        InputError: a path does not exist, is of no known kind, or is a folder without any file of a known kind.
        UsageError: standard input is named twice.
    """
    if list(arguments).count(STDIN) > 1:
        raise UsageError("Standard input (-) is named twice.", remedy="Name it once.")
    found: list[tuple[Source, str]] = []
    for argument in arguments:
        if argument == STDIN:
            found.append((Source(None, SourceKind.JSONL, "<stdin>"), "<stdin>"))
            continue
        root = Path(argument)
        if root.is_dir():
            members = [(path, path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
            members = [(path, name) for path, name in members if not any(part.startswith(".") for part in name.parts)]
            known = sorted((name.parts, path, kind) for path, name in members if (kind := _kind(path)))
            if not known:
                raise InputError(
                    f"{root} has {len(members)} files and none of a kind that is read ({', '.join(KINDS)}).",
                    remedy="Name the folder that holds the corpus.",
                )
            found += [(Source(path, kind, "/".join(parts)), str(path)) for parts, path, kind in known]
        elif not root.exists():
            raise InputError(f"{root} does not exist.", remedy="Check the path.")
        else:
            # A pipe such as <(zcat corpus.gz) has no name to judge by.
            kind = _kind(root) if root.is_file() else SourceKind.JSONL
            if kind is None:
                raise InputError(
                    f"{root} is of no kind that is read ({', '.join(KINDS)}, .gz of the text ones).",
                    remedy="Rename it, or pipe it as JSONL into '-'.",
                )
            found.append((Source(root, kind, root.name), str(root)))
    uses = Counter(source.label for source, _ in found)
    return [source if uses[source.label] == 1 else Source(source.path, source.kind, full) for source, full in found]


def _kind(path: Path) -> SourceKind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        kind = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind is SourceKind.PARQUET else kind
    return KINDS.get(suffixes[-1]) if suffixes else None


def count_passages(sources: Sequence[Source]) -> int | None:
    """About how many passages there are, from line ends and Parquet footers, or None if only reading can tell."""
    total = 0
    for source in sources:
        path = source.path
        if (
            path is None
            or not path.is_file()
            or path.suffix == ".gz"
            or source.kind in (SourceKind.TEXT, SourceKind.MARKDOWN)
        ):
            return None
        if source.kind is SourceKind.PARQUET:
            total += _parquet(path).metadata.num_rows
            continue
        try:
            with path.open("rb", buffering=0) as handle:
                while block := handle.read(1 << 20):
                    total += block.count(b"\n")
        except OSError as error:
            raise wrap_os_error(error, path) from error
        total -= source.kind is not SourceKind.JSONL  # the header
    return max(total, 0)


def read_passages(
    sources: Sequence[Source], chunker: Chunker | None = None, on_bad: OnBad | None = None
) -> Iterator[Passage]:
    """All passages of the sources, one at a time.

    A row without an id gets ``<label>:<line>``; the chunks of a text file get ``<label>#<n>``. ``on_bad`` is called
    with the error of each line that cannot be used; without it the first one is raised.

    Raises:
        InputError: a source or a line of it cannot be used.
        ResourceError: a source cannot be read.
    """

    def bad(source: Source, line: int, reason: object) -> None:
        error = InputError(
            f"{source.label}:{line}: {reason}.", remedy="Correct it, or leave such lines out with --skip-bad."
        )
        if on_bad is None:
            raise error
        on_bad(error)

    for source in sources:
        try:
            if source.kind in (SourceKind.TEXT, SourceKind.MARKDOWN):
                assert chunker is not None, "text files need a chunker"
                yield from _read_text(source, chunker)
                continue
            for line, row in _rows(source, bad):
                try:
                    yield _passage(row, f"{source.label}:{line}")
                except _BadRowError as reason:
                    bad(source, line, reason)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{source.label} is not a whole gzip file: {error}.", remedy="Fetch it again.") from error
        except OSError as error:
            raise wrap_os_error(error, source.path or Path(source.label)) from error


def _rows(source: Source, bad: Callable[[Source, int, object], None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if source.kind is SourceKind.PARQUET:
        yield from _parquet_rows(source)
        return
    with _open(source) as handle:
        if source.kind is SourceKind.JSONL:
            yield from _json_rows(source, handle, bad)
        else:
            yield from _csv_rows(source, handle, bad)


def _open(source: Source) -> IO[str]:
    if source.path is None:
        data: IO[bytes] = sys.stdin.buffer
    elif source.path.suffix.lower() == ".gz":
        data = cast("IO[bytes]", gzip.GzipFile(source.path))
    else:
        data = source.path.open("rb")
    # Bytes that are no UTF-8 come through as lone surrogates, which `_passage` refuses with the line's number.
    return io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _json_rows(
    source: Source, handle: IO[str], bad: Callable[[Source, int, object], None]
) -> Iterator[tuple[int, Any]]:
    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON value")

    for line, text in enumerate(handle, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, parse_constant=no_constant)
        except json.JSONDecodeError as error:
            bad(source, line, f"not JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:
            bad(source, line, f"not JSON ({error})")
        else:
            if isinstance(row, dict):
                yield line, row
            else:
                bad(source, line, f"a JSON {type(row).__name__} where an object is expected")


def _csv_rows(source: Source, handle: IO[str], bad: Callable[[Source, int, object], None]) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a field of 128 KiB
    reader = csv.reader(handle, delimiter="\t" if source.kind is SourceKind.TSV else ",", strict=True)
    columns: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad(source, line, f"not CSV ({error})")
            continue
        if not cells:
            continue
        if columns is None:
            columns = cells
            _need_text_column(source, columns)
        elif len(cells) != len(columns):
            bad(source, line, f"{len(cells)} columns where the header has {len(columns)}")
        else:
            yield (line, {name: cell for name, cell in zip(columns, cells, strict=True) if cell or name in TEXT_KEYS})


def _parquet_rows(source: Source) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa

    from telerag_cli.corpus.embeddings import is_vector

    assert source.path is not None
    file = _parquet(source.path)
    schema = file.schema_arrow
    _need_text_column(source, schema.names)
    columns = [field.name for field in schema if not is_vector(field)]
    row = 0
    try:
        for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
            for values in batch.to_pylist():
                row += 1
                yield row, {name: value for name, value in values.items() if value is not None}
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(
            error, source.path, f"{source.label} cannot be read after row {row}", "Fetch it again."
        ) from error


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(error, path, f"{path} is not Parquet", "Fetch it again or name another file.") from error


def _unreadable(error: Exception, path: Path, what: str, remedy: str) -> Exception:
    """Arrow tells of damaged bytes as an ``OSError`` too, then without the system's number."""
    if isinstance(error, OSError) and error.errno is not None:
        return wrap_os_error(error, path)
    return InputError(f"{what}: {' '.join(str(error).split()).rstrip('.')}.", remedy=remedy)


def _need_text_column(source: Source, columns: Sequence[str]) -> None:
    if not set(TEXT_KEYS) & set(columns):
        raise InputError(
            f"{source.label} has the columns {', '.join(columns)} and none named {' or '.join(TEXT_KEYS)}.",
            remedy="Name the column that holds the passages so.",
        )


def _passage(row: Mapping[str, Any], where: str) -> Passage:
    rest = dict(row)
    text = next((rest.pop(key) for key in TEXT_KEYS if key in rest), None)
    if not isinstance(text, str):
        raise _BadRowError("no text" if text is None else f"text is {type(text).__name__}, not a string")
    if not text.strip():
        raise _BadRowError("the text is empty")
    name = next((rest.pop(key) for key in ID_KEYS if rest.get(key) is not None), where)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise _BadRowError(f"the id is {type(name).__name__}, not a string or a number")
    if not rest.get("title", True):
        del rest["title"]
    nested = rest.get("metadata")
    if isinstance(nested, str):  # what our own embeddings hold
        try:
            nested = json.loads(nested)
        except ValueError:
            nested = None
    if isinstance(nested, dict):
        rest = {**nested, **{key: value for key, value in rest.items() if key != "metadata"}}
    passage = Passage(str(name), text, rest)
    try:  # what is not UTF-8 came through `_open` as surrogates
        f"{passage.id}{passage.text}{passage.metadata_json}".encode()
    except UnicodeEncodeError:
        raise _BadRowError("not valid UTF-8 text") from None
    return passage


def _read_text(source: Source, chunker: Chunker) -> Iterator[Passage]:
    with _open(source) as handle:
        checked = _Checked(handle, source.label)
        chunks = chunker.chunks(checked, markdown=source.kind is SourceKind.MARKDOWN)  # type: ignore[arg-type]
        for number, (start, chunk) in enumerate(chunks):
            yield Passage(
                f"{source.label}#{number}", chunk, {"source": source.label, "start": start, "end": start + len(chunk)}
            )


class _Checked:
    """A text handle whose ``read`` names the line of the first byte that is no UTF-8."""

    def __init__(self, handle: IO[str], label: str) -> None:
        self._handle, self._label, self._lines = handle, label, 1

    def read(self, characters: int) -> str:
        text = self._handle.read(characters)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            line = self._lines + text.count("\n", 0, error.start)
            raise InputError(
                f"{self._label}:{line}: not valid UTF-8 text.", remedy="Convert the file to UTF-8."
            ) from None
        self._lines += text.count("\n")
        return text
