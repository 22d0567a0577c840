"""`telerag embed`'s work: passages to a folder of Parquet shards, resumable at each of them.

The folder holds ``shard-00000.parquet``, ... in the order of the corpus, and ``embeddings.json``, which is there from
the start and says at the end ``"complete": true``. A shard is whole or absent. A resumed run reads the whole corpus
again and compares it, by a running digest that each shard records, with what the shards were made of.

What is to be made of a shard, a `ShardTask`, is pickled easily, and `make_shard` needs an encoder beside it and no
more; so shards can be made elsewhere too (`Makers`). Which are made, and that the folder is whole, is decided here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from telerag_cli.arrays import FloatArray
from telerag_cli.corpus.embeddings import DESCRIPTION, FORMAT
from telerag_cli.corpus.passages import Passage
from telerag_cli.embedding.encoder import Encoder, Precision
from telerag_cli.errors import ArtifactError, InputError, ModelError, ResourceError
from telerag_cli.files import checksum, read_json, wrap_os_error, write_json, writing
from telerag_cli.progress import Advance

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


@dataclass(frozen=True)
class ShardTask:
    """A shard that is to be made."""

    path: Path
    rows: list[Passage]
    header: dict[str, Any]
    """What the shard records of its making: model, precision, dtype, rows and corpus among it."""


Makers = Callable[[Iterable[ShardTask]], Generator[int]]
"""Makes shards in other processes, which find the folder by the same path: the rows of each, in order, as it is there."""


def make_shard(task: ShardTask, encoder: Encoder, batch_size: int | None = None, advance: Advance | None = None) -> int:
    """Embed a shard's passages and write it; the number of them.

    Args:
        task: the shard.
        encoder: of the task's model; its precision is set.
        batch_size: as in `Encoder.encode`.
        advance: called with the number of passages embedded.

    Raises:
        ResourceError: the file cannot be written, or the GPU's memory does not hold a batch.
    """
    vectors = encoder.encode([row.embedded_text for row in task.rows], batch_size, advance)
    _write_shard(task.path, task.rows, vectors, task.header["dtype"], task.header)
    return len(task.rows)


@dataclass(frozen=True)
class ShardMaker:
    """Pickled, called once in a process, it returns what makes shards there; the model is loaded with the first."""

    model: str
    """As in `Encoder.load`; a folder is found by the same path."""
    device: str
    batch_size: int | None = None

    def __call__(self) -> Callable[[ShardTask], int]:
        """What makes a shard and returns its rows."""
        encoders: list[Encoder] = []

        def make(task: ShardTask) -> int:
            if not (task.path.parent / DESCRIPTION).exists():
                raise ResourceError(
                    f"A worker does not see {task.path.parent} with its {DESCRIPTION}.",
                    remedy="Choose an --output on a file system that all machines share.",
                )
            if not encoders:
                encoders.append(self._load(task.header))
            return make_shard(task, encoders[0], self.batch_size)

        return make

    def _load(self, header: dict[str, Any]) -> Encoder:
        encoder = Encoder.load(self.model, device=self.device, dtype=header["precision"])
        for name, value in asdict(encoder.info).items():
            if header[name] != value:
                raise ModelError(
                    f"The embedder '{self.model}' of a worker has {name} {value}, and this process's has {header[name]}.",
                    remedy="Give all machines the same model.",
                )
        return encoder


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
    makers: Makers | None = None,
) -> Report:
    """Embed a corpus into a folder, or finish what an earlier run of the same left.

    Batches never cross a shard, so an interrupted and resumed run writes the same bytes as one that was not.

    Args:
        passages: the corpus; one shard of it is held at a time, or as many as ``makers`` asks for before they are made.
        encoder: its precision, if still undecided, is the folder's or decided on the first passages.
        output: the folder, made if absent.
        source: names the corpus in errors.
        dtype: of the stored vectors.
        shard_rows: passages in a shard.
        batch_size: as in `Encoder.encode`.
        advance: called with the number of passages done, those of finished shards included.
        makers: what makes the shards; None: ``encoder``, here.

    Raises:
        InputError: the corpus is empty.
        ArtifactError: the folder holds, or another process now writes, embeddings of another make or corpus.
        ResourceError: the folder cannot be written; finished shards are kept.
    """
    with _locked(output):
        job = _Job(iter(passages), encoder, output, source, dtype, shard_rows, advance)
        job.begin()
        if makers is None:
            for task in job.missing():
                job.embedded += make_shard(task, encoder, batch_size, advance)
        else:
            with contextlib.closing(makers(job.missing())) as made:
                for rows in made:
                    job.embedded += rows
                    if advance:
                        advance(rows)
        return job.finish()


class _Job:
    """One run: what the folder is for, which shards it lacks, and that it is whole at the end."""

    def __init__(
        self,
        passages: Iterator[Passage],
        encoder: Encoder,
        output: Path,
        source: str,
        dtype: Dtype,
        shard_rows: int,
        advance: Advance | None,
    ) -> None:
        self._passages, self._encoder, self._output, self._source = passages, encoder, output, source
        self._dtype, self._shard_rows, self._advance = dtype, shard_rows, advance
        self._manifest = output / DESCRIPTION
        self._rows: list[Passage] = []
        self._complete = False
        self._total = self._number = 0
        self.embedded = 0
        """Passages embedded by this run."""

    def begin(self) -> None:
        """Read the first passages, settle the precision, and describe the folder or compare it with its description."""
        manifest = self._manifest
        recorded = read_json(manifest) if manifest.exists() else None
        if recorded is None and any(self._output.glob("shard-*.parquet")):
            raise ArtifactError(
                f"{self._output} holds shards and no {DESCRIPTION}, so what made them is not known.",
                remedy="Choose another --output.",
            )
        if recorded is not None and (not isinstance(recorded, dict) or recorded.get("format") != FORMAT):
            raise ArtifactError(f"{manifest} is not of the format {FORMAT}.", remedy="Choose another --output.")
        self._rows = list(islice(self._passages, self._shard_rows))
        if not self._rows:
            raise InputError(
                f"{self._source} holds no passage.", remedy="Name a source with at least one line of text."
            )
        if self._encoder.precision is None:
            if recorded and recorded.get("precision") in get_args(Precision):
                self._encoder.precision = recorded["precision"]
            else:
                self._encoder.decide([row.embedded_text for row in self._rows])
        self._header = _header(self._encoder, self._dtype, self._shard_rows)
        if recorded is None:
            self._describe(complete=False)
        else:
            _refuse_mixing(recorded, self._header, self._output)
            self._complete = bool(recorded.get("complete"))

    def missing(self) -> Iterator[ShardTask]:
        """Read the corpus to its end, and say which shards are not there."""
        digest = xxhash.xxh3_128()
        while self._rows:
            rows, path = self._rows, self._output / shard_name(self._number)
            before = digest.copy()
            _update(digest, rows)
            if not (path.exists() and _already_done(path, rows, before, digest, self._source)):
                if self._complete:  # the corpus has grown
                    self._describe(complete=False)
                made_of = {"rows": len(rows), "first_row": self._total, "corpus": _text(digest)}
                yield ShardTask(path, rows, {**self._header, **made_of})
            elif self._advance:
                self._advance(len(rows))
            self._total, self._number = self._total + len(rows), self._number + 1
            self._rows = list(islice(self._passages, self._shard_rows))

    def finish(self) -> Report:
        """Describe the whole folder."""
        output, number = self._output, self._number
        if (output / shard_name(number)).exists():
            raise ArtifactError(
                f"{output} holds {shard_name(number)}, and {self._source} ends after {self._total:,} passages.",
                remedy="Choose another --output for this corpus.",
            )
        if not self._complete:
            shards = [_describe(output / shard_name(index)) for index in range(number)]
            self._describe(complete=True, rows=self._total, shards=shards)
        assert self._encoder.precision is not None
        return Report(self._total, self.embedded, number, self._encoder.precision)

    def _describe(self, *, complete: bool, **more: Any) -> None:
        write_json(self._manifest, {**self._header, "complete": complete, **more})
        self._complete = complete


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
        raise wrap_os_error(error, output) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ArtifactError(f"{output} is being written by another process.", remedy="Wait for it to end.") from None
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
        raise wrap_os_error(error, path) from error


def _write_shard(path: Path, rows: list[Passage], vectors: FloatArray, dtype: Dtype, header: dict[str, Any]) -> None:
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
        raise wrap_os_error(error, path) from error
