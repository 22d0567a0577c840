"""`telerag embed`'s work: passages to a folder of Parquet shards, resumable at each of them.

The folder holds ``shard-00000.parquet``, ... in the order of the corpus, and ``embeddings.json``, which is there from the
start and says at the end ``"complete": true``. A shard is whole or absent. A resumed run reads the whole corpus again and
compares it, by a running digest that each shard records, with what the shards were made of.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from telerag_cli.corpus.embeddings import DESCRIPTION, FORMAT
from telerag_cli.corpus.passages import Passage
from telerag_cli.embedding.encoder import Advance, Encoder, FloatArray, Precision
from telerag_cli.errors import ArtifactError, InputError
from telerag_cli.files import checksum, explain, read_json, write_json, writing

VERSION = 1
METADATA_KEY = b"telerag"
DEFAULT_SHARD_ROWS = 8192
ROW_GROUP_ROWS = 2048

REMEDIES = {
    "model": "Name the folder's model with --model, or choose another --output.",
    "dtype": "Use the folder's --dtype, or choose another --output.",
    "precision": "Leave out --precision to go on with the folder's, or choose another --output.",
    "shard_rows": "Use the folder's --shard-rows, or choose another --output.",
}
OTHER_MODEL = "The model is not the one that the folder was begun with: choose another --output."


Dtype = Literal["float32", "float16"]
"""How vectors are stored."""


@dataclass(frozen=True)
class Report:
    """What a run did: rows in the folder, rows embedded by this run, and the type they were computed in."""

    rows: int
    embedded: int
    shards: int
    precision: str


def embed_passages(
    passages: Iterable[Passage],
    encoder: Encoder,
    output: Path,
    *,
    source: str = "the source",
    dtype: Dtype = "float32",
    shard_rows: int = DEFAULT_SHARD_ROWS,
    batch_size: int | None = None,
    advance: Advance | None = None,
) -> Report:
    """Embed a corpus into a folder, or finish what an earlier run of the same left.

    Batches never cross a shard, so an interrupted and resumed run writes the same bytes as one that was not.

    Args:
        passages: the corpus; one shard of it is held at a time.
        encoder: its precision, if still undecided, is the folder's or decided on the first passages.
        output: the folder, made if absent.
        source: names the corpus in errors.
        dtype: of the stored vectors.
        shard_rows: passages in a shard.
        batch_size: as in `Encoder.encode`.
        advance: called with the number of passages done, those of finished shards included.

    Raises:
        InputError: the corpus is empty.
        ArtifactError: the folder holds, or another process now writes, embeddings of another make or corpus.
        ResourceError: the folder cannot be written; finished shards are kept.
    """
    with _locked(output):
        return _embed(iter(passages), encoder, output, source, dtype, shard_rows, batch_size, advance)


def _embed(
    passages: Iterator[Passage],
    encoder: Encoder,
    output: Path,
    source: str,
    dtype: Dtype,
    shard_rows: int,
    batch_size: int | None,
    advance: Advance | None,
) -> Report:
    manifest = output / DESCRIPTION
    recorded = read_json(manifest) if manifest.exists() else None
    if recorded is None and any(output.glob("shard-*.parquet")):
        raise ArtifactError(
            f"{output} holds shards and no {DESCRIPTION}, so what made them is not known.",
            remedy="Choose another --output.",
        )
    if recorded is not None and (not isinstance(recorded, dict) or recorded.get("format") != FORMAT):
        raise ArtifactError(f"{manifest} is not of the format {FORMAT}.", remedy="Choose another --output.")

    rows = list(islice(passages, shard_rows))
    if not rows:
        raise InputError(
            f"{source} holds no passage.", remedy="Name a source with at least one line of text."
        )
    if encoder.precision is None:
        if recorded and recorded.get("precision") in get_args(Precision):
            encoder.precision = recorded["precision"]
        else:
            encoder.decide([row.embedded_text for row in rows])
    header = _header(encoder, dtype, shard_rows)
    if recorded is None:
        write_json(manifest, {**header, "complete": False})
    else:
        _refuse_mixing(recorded, header, output)

    digest = xxhash.xxh3_128()
    total = embedded = number = 0
    while rows:
        path = output / shard_name(number)
        before = digest.copy()
        _update(digest, rows)
        if not (path.exists() and _already_done(path, rows, before, digest, source)):
            if recorded and recorded.get("complete"):  # the corpus has grown
                write_json(manifest, {**header, "complete": False})
                recorded = None
            vectors = encoder.encode([row.embedded_text for row in rows], batch_size, advance)
            made_of = {"rows": len(rows), "first_row": total, "corpus": _text(digest)}
            _write_shard(path, rows, vectors, dtype, {**header, **made_of})
            embedded += len(rows)
        elif advance:
            advance(len(rows))
        total, number = total + len(rows), number + 1
        rows = list(islice(passages, shard_rows))

    if (output / shard_name(number)).exists():
        raise ArtifactError(
            f"{output} holds {shard_name(number)}, and {source} ends after {total:,} passages.",
            remedy="Choose another --output for this corpus.",
        )
    if not (recorded and recorded.get("complete")):
        shards = [_describe(output / shard_name(index)) for index in range(number)]
        write_json(manifest, {**header, "complete": True, "rows": total, "shards": shards})
    assert encoder.precision is not None
    return Report(total, embedded, number, encoder.precision)


def shard_name(number: int) -> str:
    """``shard-00012.parquet``."""
    return f"shard-{number:05d}.parquet"


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Make the folder and hold it against a second writer; the lock ends with the process, however it ends.

    A folder made here in which nothing was written is removed again.
    """
    new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK | os.X_OK):
            raise PermissionError(13, os.strerror(13))
        handle = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except FileExistsError:
        raise ArtifactError(
            f"{output} is a file, and embeddings are a folder.", remedy="Choose another --output."
        ) from None
    except OSError as error:
        raise explain(error, output) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ArtifactError(
            f"{output} is being written by another process.", remedy="Wait for it to end."
        ) from None
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # it is not empty, and so of use
                output.rmdir()
        raise
    finally:
        os.close(handle)


def _header(encoder: Encoder, dtype: Dtype, shard_rows: int) -> dict[str, Any]:
    """What must be equal for two runs to write into one folder."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **asdict(encoder.info),
        "precision": encoder.precision,
        "dtype": dtype,
        "shard_rows": shard_rows,
    }


def _refuse_mixing(recorded: dict[str, Any], header: dict[str, Any], output: Path) -> None:
    for key in ("model", *header):
        if recorded.get(key) != header[key]:
            raise ArtifactError(
                f"{output} was begun with {key} {recorded.get(key)}, and this run has {key} {header[key]}.",
                remedy=REMEDIES.get(key, OTHER_MODEL),
            )


def _update(digest: xxhash.xxh3_128, rows: Iterable[Passage]) -> None:
    for row in rows:
        for text in (row.id, row.text, row.metadata_json):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)


def _text(digest: xxhash.xxh3_128) -> str:
    return f"xxh3_128:{digest.hexdigest()}"


def _already_done(
    path: Path, rows: list[Passage], before: xxhash.xxh3_128, after: xxhash.xxh3_128, source: str
) -> bool:
    """Whether a shard holds exactly these rows; False if it holds only the first of them, as the last shard may.

    Raises:
        ArtifactError: it holds other rows.
    """
    recorded, count = _read_shard_header(path)
    if count == len(rows) and recorded["corpus"] == _text(after):
        return True
    if count < len(rows):
        _update(before, rows[:count])
        if recorded["corpus"] == _text(before):
            return False
    first = recorded["first_row"]
    raise ArtifactError(
        f"{path} holds rows {first:,} to {first + count - 1:,} of another corpus than {source}.",
        remedy="Choose another --output for this corpus, or name the sources as before.",
    )


def _read_shard_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        file = pq.ParquetFile(path)
        recorded = json.loads(file.schema_arrow.metadata[METADATA_KEY])
        return {"corpus": recorded["corpus"], "first_row": recorded["first_row"]}, file.metadata.num_rows
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}.", remedy="Remove it and run again; it is made anew."
        ) from error
    except OSError as error:
        raise explain(error, path) from error


def _write_shard(
    path: Path, rows: list[Passage], vectors: FloatArray, dtype: Dtype, header: dict[str, Any]
) -> None:
    flat = pa.array(vectors.astype(dtype, copy=False).ravel())
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "text": pa.array([row.text for row in rows], pa.string()),
        "metadata": pa.array([row.metadata_json for row in rows], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(header, sort_keys=True)})
    codecs = {"id": "zstd", "text": "zstd", "metadata": "zstd", "embedding.list.element": "none"}
    # Through a handle of Python's own, whose errors say what the system said and no more.
    with writing(path) as temporary, temporary.open("wb") as handle:
        pq.write_table(
            table,
            handle,
            row_group_size=ROW_GROUP_ROWS,
            use_dictionary=False,
            compression=codecs,
            write_statistics=["id"],
        )


def _describe(path: Path) -> dict[str, Any]:
    try:
        return {
            "name": path.name,
            "rows": _read_shard_header(path)[1],
            "bytes": path.stat().st_size,
            "checksum": checksum(path),
        }
    except OSError as error:
        raise explain(error, path) from error
