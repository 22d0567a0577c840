"""The passages of an index: one memory-mapped Arrow file, addressed by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from telerag_cli.corpus.embeddings import PASSAGE_SCHEMA
from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import ArtifactError
from telerag_cli.files import wrap_os_error
from telerag_cli.text import parse_json

BATCH_ROWS = 1024
"""Rows of every record batch but the last, so that a row's place is a division."""


@dataclass(frozen=True)
class Passages:
    """Passages by row number; the file is mapped, never loaded."""

    path: Path
    rows: int
    _reader: pa.RecordBatchFileReader

    @classmethod
    def open(cls, path: Path) -> Passages:
        """Map the file; raises ArtifactError if it is missing, damaged or not cut into batches as it should be."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = reader.num_record_batches
            last = reader.get_batch(batches - 1).num_rows if batches else 0
            first = reader.get_batch(0).num_rows if batches > 1 else BATCH_ROWS
        except OSError as error:
            raise wrap_os_error(error, path) from error
        except pa.ArrowException as error:
            raise ArtifactError(f"{path} is damaged: {error}.", remedy="Build the index again.") from error
        if first != BATCH_ROWS or reader.schema.names != PASSAGE_SCHEMA.names:
            raise ArtifactError(
                f"{path} holds {reader.schema.names} in batches of {first}, not {PASSAGE_SCHEMA.names} "
                f"in batches of {BATCH_ROWS}.",
                remedy="Build the index again.",
            )
        return cls(path, max(0, batches - 1) * BATCH_ROWS + last, reader)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Iterable[int]) -> list[Passage]:
        """The passages of these rows, in the order asked for; raises ArtifactError if a row's bytes are damaged."""
        return [self._passage(int(row)) for row in rows]

    def _passage(self, row: int) -> Passage:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        try:
            batch = self._reader.get_batch(row // BATCH_ROWS)
            name, text, metadata = (column[row % BATCH_ROWS].as_py() for column in batch.columns)
            return Passage(name, text, parse_json(metadata))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ArtifactError(
                f"Row {row:,} of {self.path} is damaged: {error}.",
                remedy="Check it with telerag inspect --verify, and build the index again.",
            ) from error


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
