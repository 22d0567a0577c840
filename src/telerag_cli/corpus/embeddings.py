"""Reading vectors and passages from Parquet: our embeddings folders and anybody's files with a vector column."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.corpus.description import DESCRIPTION, read_description
from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.rows import is_vector
from telerag_cli.errors import ArtifactError, InputError, UsageError
from telerag_cli.files import checksum, ends_of, wrap_os_error

READ_ROWS = 8192
"""Rows asked of Parquet at a time."""
MAX_DIMENSION = 1 << 16
BUFFER_BYTES = 1 << 20
"""Column chunks are read through a buffer of this size, so that a large row group is never held whole."""
PASSAGE_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("id", "text", "metadata")])

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One Parquet file: its place in the row order, and where its row groups begin."""

    path: Path
    start: int
    rows: int
    group_rows: tuple[int, ...]


@dataclass(frozen=True)
class Embeddings:
    """Vectors and passages on disk, in row order; nothing is held in memory."""

    path: Path
    column: str
    dimension: int
    dtype: str
    shards: tuple[Shard, ...]
    description: dict[str, Any]
    """What `embeddings.json` says; empty for Parquet of another make."""

    @classmethod
    def open(cls, path: Path, column: str | None = None) -> Embeddings:
        """Open a folder made by ``telerag embed``, a Parquet file, or a folder of Parquet files (by name, recursively).

        The vector column must be named only if there are several.

        Raises:
            ArtifactError: missing or incomplete, a damaged file, or files of several dimensions.
            UsageError: no vector column, several, or none of the name given.
            InputError: no rows.
        """
        description: dict[str, Any] = {}
        if (path / DESCRIPTION).exists():
            description = read_description(path)
            files = [path / str(shard["name"]) for shard in description["shards"]]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
            if not files:
                raise ArtifactError(
                    f"{path} holds no Parquet file and no {DESCRIPTION}.",
                    remedy="Name a folder made by telerag embed, or Parquet with a vector column.",
                )
        else:
            files = [path]
        shards: list[Shard] = []
        dimension, dtype, start = 0, "", 0
        for file in files:
            with open_parquet(file) as parquet:
                column = _vector_column(parquet.schema_arrow, file, column)
                groups = tuple(parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))
                shard = Shard(file, start, sum(groups), groups)
                if not shard.rows:
                    continue
                found = _dimension(parquet, column, file)
                dtype = dtype or str(parquet.schema_arrow.field(column).type.value_type)
            dimension = dimension or found
            if found != dimension:
                raise ArtifactError(
                    f"{file} holds vectors of dimension {found}, and {files[0].name} of {dimension}.",
                    remedy="Use files of one embedder.",
                )
            shards.append(shard)
            start += shard.rows
        if column is None or not shards:
            raise InputError(f"{path} holds no vectors.", remedy="Embed a corpus with at least one passage.")
        if description and (description.get("dimension"), description.get("rows")) != (dimension, start):
            raise ArtifactError(
                f"{path} holds {start:,} vectors of dimension {dimension}, and its {DESCRIPTION} says "
                f"{description.get('rows'):,} of {description.get('dimension')}.",
                remedy="Restore its shards or embed again.",
            )
        return cls(path, column, dimension, dtype, tuple(shards), description)

    @property
    def rows(self) -> int:
        """Vectors in all shards."""
        return self.shards[-1].start + self.shards[-1].rows

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.path.stat().st_size for shard in self.shards)

    def fingerprint(self) -> str:
        """A digest that other vectors would not have, without reading all of them.

        For our own folders it is of the shards' checksums; for other Parquet, of each file's name, size, first and last
        MiB (the footer with its statistics among them).
        """
        digest = xxhash.xxh3_64(f"{self.column} {self.dimension} {self.rows}".encode())
        if self.description:
            digest.update(json.dumps(self.description["shards"], sort_keys=True).encode())
            return f"xxh3:{digest.hexdigest()}"
        for shard in self.shards:
            size, ends = ends_of(shard.path)
            digest.update(f"{shard.path.name} {size}".encode() + ends)
        return f"xxh3:{digest.hexdigest()}"

    def batches(self, rows: int, start: int = 0) -> Iterator[tuple[int, FloatArray]]:
        """All vectors from ``start`` on, in blocks of ``rows`` (the last may be shorter).

        Yields:
            The number of the block's first row, and the vectors as float32 (n, dimension). The array is used again for
            the next block.

        Raises:
            InputError: a vector is missing or holds NaN or infinity.
            ArtifactError: a file is damaged, or a vector has another dimension.
        """
        block = np.empty((min(rows, self.rows - start), self.dimension), np.float32)
        filled, first = 0, start
        for row, batch in self._stream([self.column], start, self.rows):
            vectors = self._vectors(batch.column(0), row)
            taken = 0
            while taken < len(vectors):
                step = min(len(block) - filled, len(vectors) - taken)
                block[filled : filled + step] = vectors[taken : taken + step]
                filled, taken = filled + step, taken + step
                if filled == len(block):
                    yield first, block
                    first, filled = first + filled, 0
        if filled:
            yield first, block[:filled]

    def sample(self, rows: IntArray, advance: Callable[[int], None]) -> FloatArray:
        """The vectors of these rows (increasing), float32 (len(rows), dimension); reads, and so checks, all vectors."""
        chosen = np.empty((len(rows), self.dimension), np.float32)
        done = 0
        for first, block in self.batches(READ_ROWS):
            end = int(np.searchsorted(rows, first + len(block)))
            chosen[done:end] = block[rows[done:end] - first]
            done = end
            advance(len(block))
        return chosen

    def passages(self) -> Iterator[pa.RecordBatch]:
        """Batches of ``id``, ``text``, ``metadata`` (JSON object), all strings, in row order.

        A missing id is the row number, a missing text is empty, and other scalar columns become metadata.
        """
        for shard in self.shards:
            with open_parquet(shard.path) as parquet:
                schema = parquet.schema_arrow
            scalar = [field.name for field in schema if field.name == "metadata" or not pa.types.is_nested(field.type)]
            names = [name for name in scalar if name != self.column]
            if not names:
                for low in range(0, shard.rows, READ_ROWS):
                    count = min(READ_ROWS, shard.rows - low)
                    yield self._passages(pa.table({}), shard.start + low, count)
                continue
            for row, batch in self._stream(names, shard.start, shard.start + shard.rows):
                yield self._passages(pa.Table.from_batches([batch]), row, len(batch))

    def passage_bytes(self, probes: int = 8) -> int:
        """Bytes the passages will take, estimated from a few batches spread over the shards."""
        shards = self.shards[:: max(1, len(self.shards) // probes)][:probes]
        batches = [next(self.passages_of(shard)) for shard in shards]
        used = sum(batch.nbytes for batch in batches) / sum(map(len, batches))
        return int(used * self.rows * 1.02) + READ_ROWS

    def passages_of(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """`passages` of one shard."""
        return replace(self, shards=(shard,)).passages()

    def _stream(self, columns: list[str], start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        for shard in self.shards:
            if shard.start + shard.rows <= start or shard.start >= stop:
                continue
            bounds = shard.start + np.concatenate([[0], np.cumsum(shard.group_rows)])
            group = int(np.searchsorted(bounds, start, side="right")) - 1 if start > shard.start else 0
            row = int(bounds[group])
            groups = list(range(group, len(shard.group_rows)))
            with open_parquet(shard.path) as parquet:
                try:
                    read = parquet.iter_batches(READ_ROWS, groups, columns, use_threads=False)
                    # Closed before the file is, also when the caller stops in the middle.
                    with contextlib.closing(_ahead(read)) as batches:
                        for batch in batches:
                            skip = min(max(0, start - row), len(batch))
                            if skip < len(batch):
                                yield row + skip, batch.slice(skip)
                            row += len(batch)
                except (OSError, pa.ArrowException) as error:
                    raise _damaged(shard.path, error) from error

    def _passages(self, table: pa.Table, row: int, count: int) -> pa.RecordBatch:
        """A table's scalar columns as id, text and metadata."""
        names = list(table.column_names)

        def take(*known: str) -> pa.Array:
            name = next((name for name in known if name in names), None)
            if name is None:
                return pa.nulls(count, pa.string())
            names.remove(name)
            return table.column(name).cast(pa.string()).combine_chunks()

        ids, text = take("id", "_id"), take("text", "contents").fill_null("")
        if ids.null_count:
            ids = pa.array(
                [str(row + i) if name is None else name for i, name in enumerate(ids.to_pylist())], pa.string()
            )
        if self.description and names == ["metadata"]:
            metadata = table.column("metadata").combine_chunks()  # ours: JSON already
        elif names:
            metadata = pa.array([_metadata(values) for values in table.select(names).to_pylist()], pa.string())
        else:
            metadata = pa.repeat(pa.scalar("{}"), count)
        return pa.record_batch([ids, text, metadata], schema=PASSAGE_SCHEMA)

    def _vectors(self, column: pa.Array, row: int) -> npt.NDArray[Any]:
        """A batch of the vector column as (n, dimension)."""
        if column.null_count:
            missing = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise InputError(f"Row {row + missing:,} of {self.path} has no vector.", remedy="Drop it or embed it.")
        if not pa.types.is_fixed_size_list(column.type):
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            odd = np.flatnonzero(lengths != self.dimension)
            if len(odd):
                shard = next(s for s in self.shards if row < s.start + s.rows)
                raise ArtifactError(
                    f"Row {row + odd[0]:,} of {shard.path} has dimension {lengths[odd[0]]}, and the "
                    f"first has {self.dimension}.",
                    remedy="Use vectors of one embedder.",
                )
        values = column.flatten()
        if values.null_count:
            place = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // self.dimension
            raise InputError(
                f"The vector in row {row + place:,} of {self.path} has a null in it.",
                remedy="Drop it or embed it again.",
            )
        vectors: npt.NDArray[Any] = values.to_numpy(zero_copy_only=True).reshape(-1, self.dimension)
        # float64 may exceed float32, and that shows as infinity too.
        with np.errstate(over="ignore"):
            vectors = vectors.astype(np.float32, copy=False)
        finite = np.isfinite(vectors)
        if not finite.all():
            odd_row, place = np.argwhere(~finite)[0]
            raise InputError(
                f"The vector in row {row + odd_row:,} of {self.path} holds {vectors[odd_row, place]}.",
                remedy="Embed that passage again or drop it.",
            )
        return vectors


def check_shards(embeddings: Embeddings, advance: Callable[[int], None]) -> None:
    """Make sure that the shards of one of our folders are as they were written.

    Raises:
        ArtifactError: one is not.
    """
    if damaged := damaged_shards(embeddings, advance):
        raise ArtifactError(
            f"{embeddings.path} is damaged: {', '.join(damaged)} differs from its checksum.",
            remedy="Run the same telerag embed again, which makes such a shard anew, or restore it.",
        )


def damaged_shards(embeddings: Embeddings, advance: Callable[[int], None]) -> list[str]:
    """Names of the shards of one of our folders whose bytes are not those that were written."""
    damaged = []
    for shard in embeddings.description["shards"]:
        if checksum(embeddings.path / shard["name"]) != shard["checksum"]:
            damaged.append(shard["name"])
        advance(shard["bytes"])
    return damaged


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; its pages' checksums, if any, are verified as they are read.

    Raises:
        ArtifactError: missing or not Parquet.
    """
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _ahead(items: Iterator[T]) -> Generator[T]:
    """Yield the items, each made on a thread while the one before is used, so that disk and decoder need not wait."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return wrap_os_error(error, path)
    return ArtifactError(
        f"{path} cannot be read as Parquet: {' '.join(str(error).split())}.",
        remedy="Restore the file or make it again.",
    )


def _vector_column(schema: pa.Schema, path: Path, wanted: str | None) -> str:
    names = [field.name for field in schema if is_vector(field.type)]
    if wanted is not None:
        if wanted not in names:
            have = ", ".join(names) or "none"
            raise UsageError(
                f"{path} has no vector column '{wanted}'; its vector columns are: {have}.",
                remedy="Name one with --column.",
            )
        return wanted
    if not names:
        raise UsageError(
            f"{path} has no column of float lists; its columns are: {', '.join(schema.names)}.",
            remedy="Store each vector as a fixed-size list of float16, float32 or float64.",
        )
    if len(names) > 1:
        raise UsageError(f"{path} has {len(names)} vector columns: {', '.join(names)}.", remedy="Choose with --column.")
    chosen: str = names[0]
    return chosen


def _dimension(parquet: pq.ParquetFile, column: str, path: Path) -> int:
    kind = parquet.schema_arrow.field(column).type
    if pa.types.is_fixed_size_list(kind):
        size = int(kind.list_size)
    else:
        first = next(parquet.iter_batches(1, columns=[column])).column(0)
        size = int(first.value_lengths()[0].as_py() or 0)
    if not 0 < size <= MAX_DIMENSION:
        raise InputError(
            f"The vectors of {path} have {size:,} dimensions, and 1 to {MAX_DIMENSION:,} are possible.",
            remedy="Name another column with --column.",
        )
    return size


def _metadata(values: dict[str, Any]) -> str:
    inner = values.pop("metadata", None)
    if isinstance(inner, str):
        parsed = None
        with contextlib.suppress(ValueError):
            parsed = json.loads(inner)
        inner = parsed if isinstance(parsed, dict) else {"metadata": inner}
    merged = {key: value for key, value in {**values, **(inner or {})}.items() if value is not None}
    return Passage("", "", merged).metadata_json
