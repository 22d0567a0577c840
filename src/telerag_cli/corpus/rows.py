"""Rows of a source: JSON lines or an array, CSV, TSV and Parquet, one mapping at a time.

A row that cannot be used goes to ``bad`` with its line and the reason, and the next one is read. What concerns the
whole file is an `InputError`.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from telerag_cli import text
from telerag_cli.corpus.fields import Columns
from telerag_cli.corpus.sources import Source, SourceKind
from telerag_cli.errors import InputError
from telerag_cli.files import wrap_os_error
from telerag_cli.text import TextError
from telerag_cli.units import format_bytes

PARQUET_ROWS = 1024
MAX_RECORD_LINES = 10_000
"""Lines that one quoted CSV record may have; a quote that is never closed does not take the rest of the file."""
MAX_ARRAY_BYTES = 1 << 30
"""An array is parsed whole."""
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

Bad = Callable[[int, object], None]
Row = tuple[int, Mapping[str, Any]]


def rows_of(source: Source, columns: Columns, bad: Bad, assumed: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of a source with their numbers.

    Args:
        source: what is read; not a text document.
        columns: names of the columns of text and id.
        bad: called with the number of each row that cannot be used, and why.
        assumed: called with a sentence about what was guessed.

    Raises:
        InputError: the file as a whole cannot be used.
    """
    if source.kind is SourceKind.PARQUET:
        yield from _parquet_rows(source, columns)
        return
    may_be_latin = source.kind is not SourceKind.JSON
    with source.open() as data, text.reading(data, may_be_latin=may_be_latin) as (handle, encoding):
        if encoding == text.LATIN:
            assumed(f"{source.label} is not UTF-8 and was read as Windows-1252.")
        if source.kind is SourceKind.JSON:
            yield from _json_rows(source, handle, bad)
        elif source.kind is SourceKind.TSV:
            yield from _tsv_rows(source, handle, columns, bad, assumed)
        else:
            yield from _csv_rows(source, handle, columns, bad)


def json_object(value: str) -> dict[str, Any]:
    """Return the object of a JSON text.

    Raises:
        TextError: it is not JSON, or not an object.
    """
    try:
        row = text.parse_json(text.checked(value))
    except TextError as error:
        raise TextError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise TextError(f"a JSON {type(row).__name__} where an object is expected")
    return row


def _json_rows(source: Source, handle: Iterator[str], bad: Bad) -> Iterator[Row]:
    for line, value in enumerate(handle, 1):
        if line == 1 and value.lstrip().startswith("["):
            yield from _array_rows(source, value, handle, bad)
            return
        if value.strip():
            try:
                yield line, json_object(value)
            except TextError as reason:
                bad(line, reason)


def _array_rows(source: Source, first: str, handle: Iterator[str], bad: Bad) -> Iterator[Row]:
    parts, size = [first], len(first)
    for line in handle:
        parts.append(line)
        size += len(line)
        if size > MAX_ARRAY_BYTES:
            raise InputError(
                f"{source.label} is one JSON array of more than {format_bytes(MAX_ARRAY_BYTES)}.",
                remedy="Make it JSON lines: jq -c '.[]' FILE.",
            )
    try:
        values = text.parse_json(text.checked("".join(parts)))
    except TextError as error:
        raise InputError(
            f"{source.label} begins with [ and is not a JSON array: {error}.",
            remedy="Correct it, or make it JSON lines.",
        ) from None
    for number, value in enumerate(values, 1):
        if isinstance(value, dict):
            yield number, value
        else:
            bad(number, f"a JSON {type(value).__name__} where an object is expected")


def _tsv_rows(
    source: Source, handle: Iterator[str], columns: Columns, bad: Bad, assumed: Callable[[str], None]
) -> Iterator[Row]:
    """One line is one row, whatever quotes it holds."""
    names: Sequence[str] | None = None
    for line, value in enumerate(handle, 1):
        value = value.rstrip("\r\n")
        if not value:
            continue
        cells = _unquoted(value.split("\t"))
        if names is None:
            names = cells
            if columns.text_name(names) is None and len(cells) == 2 and not columns.known(names):
                names = columns.headerless()
                assumed(f"{source.label} has no header: its columns were taken for id and text.")
            else:
                columns.need_text(source.label, names)
                continue
        if len(cells) != len(names) and '"' in value:
            cells = next(csv.reader([value], delimiter="\t"), cells)  # a tab within quotes
        if len(cells) == len(names):
            yield line, columns.row(names, cells)
        else:
            bad(line, f"{len(cells)} columns where the header has {len(names)}")


def _unquoted(cells: list[str]) -> list[str]:
    """Undo quotes where all cells that begin with one are quoted as CSV quotes them; elsewhere they are text."""
    quoted = [cell for cell in cells if cell.startswith('"')]
    if not quoted or not all(_QUOTED.fullmatch(cell) for cell in quoted):
        return cells
    return [cell[1:-1].replace('""', '"') if cell.startswith('"') else cell for cell in cells]


class _Lines:
    """Lines for ``csv.reader``, of which those of a record that went wrong can be given back."""

    def __init__(self, handle: Iterator[str]) -> None:
        self._handle, self._again = handle, deque[str]()
        self.record: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self.record) >= MAX_RECORD_LINES:
            raise csv.Error(f"a quoted cell of more than {MAX_RECORD_LINES:,} lines")
        line = self._again.popleft() if self._again else next(self._handle)
        self.record.append(line)
        return line

    def give_back(self) -> None:
        """Read all lines of the record but its first again."""
        self._again.extendleft(reversed(self.record[1:]))


def _csv_rows(source: Source, handle: Iterator[str], columns: Columns, bad: Bad) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a field of 128 KiB
    lines = _Lines(handle)
    reader = csv.reader(lines, strict=True)
    names: list[str] | None = None
    line = 1
    while True:
        lines.record = []
        reason = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason, cells = f"not CSV: {error}", []
        if cells and names is None:
            names = cells
            columns.need_text(source.label, names)
        elif cells and names is not None and len(cells) != len(names):
            reason = f"{len(cells)} columns where the header has {len(names)}"
        elif cells and names is not None:
            yield line, columns.row(names, cells)
        if reason:
            bad(line, reason)
            lines.give_back()
            del lines.record[1:]
        line += len(lines.record)


def _parquet_rows(source: Source, columns: Columns) -> Iterator[Row]:
    import pyarrow as pa

    assert source.path is not None
    file = parquet(source.path)
    schema = file.schema_arrow
    columns.need_text(source.label, schema.names)
    wanted = [field.name for field in schema if not is_vector(field.type)]
    row = 0
    try:
        for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
            for values in batch.to_pylist():
                row += 1
                yield row, {name: value for name, value in values.items() if value is not None}
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(
            error, source.path, f"{source.label} cannot be read after row {row}", "Fetch it again."
        ) from error


def is_vector(kind: Any) -> bool:
    """Whether an Arrow type is a list of floats, of any of the three kinds of list."""
    from pyarrow import types

    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(lists and types.is_floating(kind.value_type))


def parquet(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        InputError: it is not one.
        ResourceError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(error, path, f"{path} is not Parquet", "Fetch it again or name another file.") from error


def _unreadable(error: Exception, path: Path, what: str, remedy: str) -> Exception:
    """Arrow reports damaged bytes as an ``OSError`` too, then without the system's number."""
    if isinstance(error, OSError) and error.errno is not None:
        return wrap_os_error(error, path)
    return InputError(f"{what}: {' '.join(str(error).split()).rstrip('.')}.", remedy=remedy)
