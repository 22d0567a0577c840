"""The passages of an index: one Arrow file, addressed by row.

Nothing is mapped: a file that is cut short while it is open is an error, not the end of the process. Arrow says where
the columns of a batch lie when a row of it is first wanted, and the batch is compared with its checksum then. Rows are
read from there, each within the bounds of its batch.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from telerag_cli.arrays import TableArray
from telerag_cli.corpus.embeddings import PASSAGE_SCHEMA
from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import ArtifactError
from telerag_cli.files import HeldFile, read_exactly, wrap_os_error
from telerag_cli.index.artifact import BATCH_ROWS
from telerag_cli.text import TextError, parse_json

REMEDY = "Check it with telerag inspect --verify, and build the index again."


class _BatchFile(io.RawIOBase):
    """The file as Arrow reads it, which notes what was read; no read takes more memory than there is to read."""

    def __init__(self, path: Path | HeldFile) -> None:
        self.held = path if isinstance(path, HeldFile) else HeldFile(path)
        self.noted: list[tuple[int, bytes]] = []
        self._place = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to another place."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.held.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Read what is asked for, or what there is of it."""
        left = self.held.size - self._place if self._place >= 0 else 0
        count = left if size < 0 else min(size, left)
        data = os.pread(self.held.descriptor, count, self._place) if count > 0 else b""
        self.noted.append((self._place, data))
        self._place += len(data)
        return data

    def checksum(self) -> int:
        """xxh3-64 of what was noted."""
        digest = xxhash.xxh3_64()
        for _, data in sorted(self.noted):
            digest.update(data)
        return int(digest.intdigest())

    def place_of(self, buffer: pa.Buffer) -> int:
        """Where in the file a buffer lies that Arrow has made of what was noted."""
        for begin, data in self.noted:
            offset = int(buffer.address - pa.py_buffer(data).address)
            if offset >= 0 and offset + buffer.size <= len(data):
                return begin + offset
        raise ValueError("a column is not stored as it is")


@dataclass(frozen=True)
class _Strings:
    """Where a column of a batch lies in the file: the places of its texts, and the texts."""

    rows: int
    places: int
    begin: int
    nbytes: int


@dataclass(frozen=True)
class _Choices:
    """A column of a batch that names few texts many times."""

    numbers: npt.NDArray[Any]
    texts: pa.StringArray


_Column = _Strings | _Choices


def _values(metadata: str) -> Any:
    """The metadata of a passage; NaN and infinities, written before JSON was checked, are null."""
    try:
        return parse_json(metadata)
    except TextError:
        values = json.loads(metadata, parse_constant=lambda _name: None, parse_float=_finite)
        parse_json(json.dumps(values))  # what nests too deep is not written to any output
        return values


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


class Passages:
    """Passages by row number; the file is never loaded."""

    def __init__(self, path: Path | HeldFile, checksums: TableArray | None) -> None:
        """See `open`."""
        self._path, self._checksums = path, checksums
        self._file = _BatchFile(path)
        self._reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))
        self._known: dict[int, list[_Column]] = {}
        self._lock = threading.Lock()
        self.batches: int = self._reader.num_record_batches
        first, last = (self._rows_of(number) if self.batches else 0 for number in (0, self.batches - 1))
        if self._reader.schema.names != PASSAGE_SCHEMA.names or (self.batches > 1 and first != BATCH_ROWS):
            raise ArtifactError(
                f"{path} holds {self._reader.schema.names} in batches of {first:,}, not {PASSAGE_SCHEMA.names} in "
                f"batches of {BATCH_ROWS:,}.",
                remedy="Build the index again.",
            )
        self._rows: int = max(0, self.batches - 1) * BATCH_ROWS + last

    @classmethod
    def open(cls, path: Path | HeldFile, rows: int | None = None, checksums: TableArray | None = None) -> Passages:
        """Open the file, of which ``rows`` are expected; ``checksums`` are those of its batches, if there are any.

        Raises:
            ArtifactError: it is missing, damaged or not cut into batches as it should be, or has other rows.
        """
        try:
            passages = cls(path, checksums)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system's, and not Arrow's
                raise wrap_os_error(error, path) from error
            raise ArtifactError(f"{path} is damaged: {error}.", remedy="Build the index again.") from error
        if rows is not None and len(passages) != rows:
            raise ArtifactError(
                f"{path} holds {len(passages):,} passages, and the index has {rows:,} vectors.", remedy=REMEDY
            )
        return passages

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: Iterable[int]) -> list[Passage]:
        """The passages of these rows, in the order asked for; raises ArtifactError if a row's bytes are damaged."""
        return [self._passage(int(row)) for row in rows]

    def _passage(self, row: int) -> Passage:
        if not 0 <= row < self._rows:
            raise ArtifactError(f"{self._path} has {self._rows:,} passages, and row {row:,} was found.", remedy=REMEDY)
        try:
            number, place = divmod(row, BATCH_ROWS)
            name, text, metadata = (self._text(column, place) for column in self._columns(number))
            values = _values(metadata)
            if not isinstance(values, dict):
                raise ValueError("its metadata is not an object")
            return Passage(name, text, values)
        except (pa.ArrowException, OSError, ValueError, IndexError, RecursionError) as error:
            raise ArtifactError(f"Row {row:,} of {self._path} is damaged: {error}.", remedy=REMEDY) from error

    def _columns(self, number: int) -> list[_Column]:
        with self._lock:
            if number not in self._known:
                batch = self._read(number)
                if self._checksums is not None and self._file.checksum() != int(self._checksums[number]):
                    raise ValueError(f"the checksum of batch {number:,} is not the one that was written")
                self._known[number] = [self._column(column) for column in batch.columns]
                self._file.noted.clear()
            return self._known[number]

    def _read(self, number: int) -> pa.RecordBatch:
        self._file.noted.clear()
        return self._reader.get_batch(number)

    def _rows_of(self, number: int) -> int:
        rows: int = self._read(number).num_rows
        self._file.noted.clear()
        return rows

    def _column(self, column: pa.Array) -> _Column:
        if column.null_count or column.offset:
            raise ValueError("a text is missing")
        if pa.types.is_dictionary(column.type):
            column.validate(full=True)
            texts = column.dictionary.cast(pa.string())
            return _Choices(column.indices.to_numpy(zero_copy_only=False).copy(), texts)
        if column.type != pa.string():
            raise ValueError(f"a column is of the type {column.type}")
        _, places, texts = column.buffers()
        if places is None or places.size < 4 * (len(column) + 1):
            raise ValueError("a column is shorter than its batch")
        begin = self._file.place_of(texts) if texts is not None and texts.size else 0
        return _Strings(len(column), self._file.place_of(places), begin, texts.size if texts is not None else 0)

    def _text(self, column: _Column, place: int) -> str:
        if isinstance(column, _Choices):
            return str(column.texts[column.numbers[place]].as_py())
        if place >= column.rows:
            raise ValueError("its batch is short")
        begin, end = struct.unpack("<ii", self._bytes(column.places + 4 * place, 8))
        if not 0 <= begin <= end <= column.nbytes:
            raise ValueError(f"a text lies from byte {begin:,} to {end:,} of {column.nbytes:,}")
        return self._bytes(column.begin + begin, end - begin).decode()

    def _bytes(self, begin: int, count: int) -> bytes:
        return read_exactly(self._file.held.descriptor, count, begin, self._path)


def batch_checksums(path: Path) -> TableArray:
    """xxh3-64 of each record batch of a file of passages, uint64 (batches,)."""
    passages = Passages.open(path)
    sums = np.empty(passages.batches, np.uint64)
    for number in range(passages.batches):
        passages._read(number)
        sums[number] = passages._file.checksum()
    return sums


def write_passages(batches: Iterable[pa.RecordBatch], path: Path, schema: pa.Schema = PASSAGE_SCHEMA) -> Iterator[int]:
    """Write the Arrow file; yields how many more rows were written. Drain it: the file is whole only at the end.

    The columns ``id``, ``text`` and ``metadata`` may also be dictionaries of strings, the same in all batches, which
    `Passages` reads as it reads strings: where few texts stand in many rows.
    """
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            waiting.append(batch)
            count = sum(len(part) for part in waiting)
            if count >= BATCH_ROWS:
                table = pa.Table.from_batches(waiting).combine_chunks()
                whole = count // BATCH_ROWS * BATCH_ROWS
                writer.write_table(table.slice(0, whole), max_chunksize=BATCH_ROWS)
                waiting = table.slice(whole).to_batches()
                yield whole
        if waiting:
            rest = pa.Table.from_batches(waiting).combine_chunks()
            writer.write_table(rest)
            yield len(rest)
