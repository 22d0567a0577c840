"""The shards of an embeddings folder as files: written, described, and compared with what they should hold."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from telerag_cli.arrays import FloatArray
from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import ArtifactError
from telerag_cli.files import checksum, replacing, wrap_os_error

METADATA_KEY = b"telerag"
ROW_GROUP_ROWS = 2048


def update_digest(digest: xxhash.xxh3_128, rows: Iterable[Passage]) -> None:
    """Add passages to the digest of a corpus."""
    for row in rows:
        for text in (row.id, row.text, row.metadata_json):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)


def digest_text(digest: xxhash.xxh3_128) -> str:
    """The digest as shards record it."""
    return f"xxh3_128:{digest.hexdigest()}"


def already_done(path: Path, rows: list[Passage], before: xxhash.xxh3_128, after: xxhash.xxh3_128, source: str) -> bool:
    """Whether a shard holds exactly these rows; False if it holds only the first of them, as the last shard may.

    Raises:
        ArtifactError: it holds other rows.
    """
    corpus, first, count = _read_shard_header(path)
    if count == len(rows) and corpus == digest_text(after):
        return True
    if count < len(rows):
        update_digest(before, rows[:count])
        if corpus == digest_text(before):
            return False
    raise ArtifactError(
        f"{path} holds rows {first:,} to {first + count - 1:,} of another corpus than {source}.",
        remedy="Choose another --output for this corpus, or name the sources as before.",
    )


def is_whole(path: Path, rows: list[Passage], header: dict[str, Any], wanted: str | None) -> bool:
    """Whether a shard of these rows is as it was written.

    It is compared with its checksum; where that is not ``wanted`` yet, with what would be written of the vectors in it,
    whose pages have checksums of their own.
    """
    try:
        if wanted is not None:
            return checksum(path) == wanted
        table = pq.read_table(path, columns=["embedding"], page_checksum_verification=True)
        vectors = table.column(0).combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
        return _shard_bytes(rows, vectors, header) == path.read_bytes()
    except (pa.ArrowException, OSError, ValueError):
        return False


def _read_shard_header(path: Path) -> tuple[str, int, int]:
    """Digest of the corpus up to the shard's end, number of its first row, and its rows."""
    try:
        file = pq.ParquetFile(path)
        recorded = json.loads(file.schema_arrow.metadata[METADATA_KEY])
        return recorded["corpus"], recorded["first_row"], file.metadata.num_rows
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, and not Arrow's
            raise wrap_os_error(error, path) from error
        raise ArtifactError(
            f"{path} is damaged: {error}.", remedy="Remove it and run again; it is made anew."
        ) from error


def _shard_bytes(rows: list[Passage], vectors: FloatArray, header: dict[str, Any]) -> bytes:
    flat = pa.array(vectors.astype(header["dtype"], copy=False).ravel())
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "text": pa.array([row.text for row in rows], pa.string()),
        "metadata": pa.array([row.metadata_json for row in rows], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(header, sort_keys=True)})
    codecs = {"id": "zstd", "text": "zstd", "metadata": "zstd", "embedding.list.element": "none"}
    made = io.BytesIO()
    pq.write_table(
        table,
        made,
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=False,
        compression=codecs,
        write_statistics=["id"],
        write_page_checksum=True,
    )
    return made.getvalue()


def write_shard(path: Path, rows: list[Passage], vectors: FloatArray, header: dict[str, Any]) -> None:
    """Write a shard, atomically; raises ResourceError if that is not possible."""
    with replacing(path) as temporary:
        temporary.write_bytes(_shard_bytes(rows, vectors, header))


def describe_shard(path: Path) -> dict[str, Any]:
    """What the folder's description says of a shard; raises TeleragError if it cannot be read."""
    try:
        rows = _read_shard_header(path)[-1]
        return {"name": path.name, "rows": rows, "bytes": path.stat().st_size, "checksum": checksum(path)}
    except OSError as error:
        raise wrap_os_error(error, path) from error
