"""Embedding a corpus: passages to a folder of Parquet shards, resumable at each of them.

The folder holds ``shard-00000.parquet``, ... in the order of the corpus, and ``embeddings.json``, which is there from
the start and says at the end ``"complete": true``. A shard is whole or absent. A resumed run reads the whole corpus
again and compares it, by a running digest that each shard records, with what the shards were made of.

A `ShardTask` is pickled easily, and `make_shard` needs nothing but an encoder beside it; so shards can be made by other
processes too. Which are made, and that the folder is whole, is decided here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

import xxhash

from telerag_cli.build_config import EmbedConfig, Precision
from telerag_cli.corpus.chunking import Chunker
from telerag_cli.corpus.description import DESCRIPTION, FORMAT, check_description
from telerag_cli.corpus.fields import Columns
from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.readers import OnBad, count_passages, read_passages
from telerag_cli.corpus.sources import Sources, find_sources
from telerag_cli.embedding.encoder import Encoder
from telerag_cli.embedding.shards import already_done, describe_shard, digest_text, is_whole, update_digest, write_shard
from telerag_cli.errors import ArtifactError, InputError, ModelError, ResourceError
from telerag_cli.files import read_sealed_json, wrap_os_error, write_sealed_json
from telerag_cli.progress import Advance, Progress, WorkerPool, silent

VERSION = 1

REMEDIES = {
    "model": "Name the folder's model with --model, or choose another --output.",
    "dtype": "Use the folder's --dtype, or choose another --output.",
    "precision": "Leave out --precision to go on with the folder's, or choose another --output.",
    "shard_rows": "Use the folder's --shard-rows, or choose another --output.",
}
OTHER_MODEL = "The model is not the one that the folder was begun with: choose another --output."


@dataclass(frozen=True)
class EmbedReport:
    """What a run did."""

    rows: int
    """Passages in the folder."""
    embedded: int
    """Passages embedded by this run."""
    shards: int
    precision: str
    """Type that the vectors were computed in."""
    device: str
    seconds: float
    """Time that reading and embedding took, without loading the model."""
    notes: list[str]
    """Sentences about what was left out of the corpus, how ids were chosen, and what was assumed."""


@dataclass(frozen=True)
class ShardTask:
    """A shard that is to be made."""

    path: Path
    rows: list[Passage]
    header: dict[str, Any]
    """What the shard records of its making: model, precision, dtype, rows and corpus among it."""


def embed(
    sources: str | Path | Sequence[str | Path] | Sources | Iterable[Passage],
    output: Path | str,
    config: EmbedConfig | None = None,
    *,
    encoder: Encoder | None = None,
    pool: WorkerPool | None = None,
    progress: Progress = silent,
    on_bad: OnBad | None = None,
) -> EmbedReport:
    """Embed a corpus into a folder, or finish what an earlier run of the same left.

    Batches never cross a shard, so an interrupted and resumed run writes the same bytes as one that was not.

    ``sources`` are files and folders that `telerag_cli.corpus.readers` reads, ``-`` for standard input; or the passages
    themselves, of which one shard is held at a time, or as many as ``pool`` asks for. The pool's processes find the
    folder and the config's model by the same paths. ``encoder`` is a loaded model instead of the config's. ``on_bad``
    is called with the error of each line or file that cannot be used; without it one error names them all.

    Raises:
        InputError: the corpus is empty, or lines or files of it cannot be used.
        ArtifactError: the folder holds, or another process now writes, embeddings of another make or corpus.
        ModelError: the model cannot be had or is not a text encoder.
        ResourceError: the folder cannot be written, or a device lacks memory; finished shards are kept.
    """
    config, output = config or EmbedConfig(), Path(output)
    if isinstance(sources, str | Path):
        sources = [sources]
    if isinstance(sources, Sequence) and isinstance(next(iter(sources), None), str | Path):
        sources = find_sources(list(map(str, sources)), output)  # before a model is loaded
    files = sources if isinstance(sources, Sources) else None
    if encoder is None:
        # With a pool this process only counts tokens, and settles the precision.
        device = "auto" if pool and config.device == "cuda" else config.device
        encoder = Encoder.load(config.model, device=device, precision=config.precision)
    if files is None:
        name, total, passages = "the given corpus", None, iter(cast("Iterable[Passage]", sources))
    else:
        name, total = files.name, count_passages(files)
        files.notes.assumed += encoder.doubts
        chunker = Chunker(encoder.tokenizer, encoder.info.max_tokens)
        passages = read_passages(files, chunker, on_bad, Columns(config.text_column, config.id_column))
    if config.limit is not None:
        total = config.limit if total is None else min(total, config.limit)
    began_s, embedded = time.perf_counter(), 0
    with _locked(output), progress("Embedding", total, unit="passages") as advance:
        folder = _Folder(output, name, islice(passages, config.limit), config.shard_rows)
        folder.begin(encoder, config)
        with contextlib.closing(_made(folder.missing(advance), encoder, config, pool, advance)) as made:
            for rows in made:
                embedded += rows
        folder.finish()
    assert encoder.precision is not None
    seconds, notes = time.perf_counter() - began_s, files.notes.lines() if files else []
    if folder.remade:
        notes.append(f"Made again, because they were not as they are written: {folder.remade:,} shards.")
    return EmbedReport(folder.rows, embedded, folder.shards, encoder.precision, encoder.device, seconds, notes)


def _made(
    tasks: Iterator[ShardTask], encoder: Encoder, config: EmbedConfig, pool: WorkerPool | None, advance: Advance
) -> Generator[int]:
    """Make the shards, here or by the processes of a pool, and yield the rows of each as it is there."""
    if pool is None:
        for task in tasks:
            yield make_shard(task, encoder, config.batch_size, advance)
        return
    if config.device == "cuda" and not pool.gpus_each:
        raise ResourceError("cuda was asked for and Ray finds no GPU on its machines.", remedy="Use --device cpu.")
    folder = Path(config.model).expanduser()
    model = str(folder.resolve()) if folder.is_dir() else config.model
    maker = ShardMaker(model, "cuda" if pool.gpus_each else "cpu", config.batch_size)
    # Workers need not have this process's working folder.
    with contextlib.closing(pool((replace(task, path=task.path.absolute()) for task in tasks), maker)) as made:
        for rows in made:
            advance(rows)
            yield rows


def make_shard(task: ShardTask, encoder: Encoder, batch_size: int | None = None, advance: Advance | None = None) -> int:
    """Embed a shard's passages and write it; return the number of them. The encoder's precision is set.

    Raises:
        ResourceError: the file cannot be written, or the GPU's memory does not hold a batch.
    """
    vectors = encoder.encode([row.embedded_text for row in task.rows], batch_size, advance)
    write_shard(task.path, task.rows, vectors, task.header)
    return len(task.rows)


@dataclass(frozen=True)
class ShardMaker:
    """Pickled, called once in a process, it returns what makes shards there; the model is loaded with the first."""

    model: str
    """As in `Encoder.load`; a folder is found by the same path."""
    device: str
    batch_size: int | None = None

    def __call__(self) -> Callable[[ShardTask], int]:
        """Return what makes a shard and returns its rows."""
        encoder: Encoder | None = None

        def make(task: ShardTask) -> int:
            nonlocal encoder
            if not (task.path.parent / DESCRIPTION).exists():
                raise ResourceError(
                    f"A worker does not see {task.path.parent} with its {DESCRIPTION}.",
                    remedy="Choose an --output on a file system that all machines share.",
                )
            if encoder is None:
                loaded = Encoder.load(self.model, device=self.device, precision=task.header["precision"])
                for name, value in asdict(loaded.info).items():
                    if task.header[name] != value:
                        raise ModelError(
                            f"The embedder '{self.model}' of a worker has {name} {value}, "
                            f"and this process's has {task.header[name]}.",
                            remedy="Give all machines the same model.",
                        )
                encoder = loaded
            return make_shard(task, encoder, self.batch_size)

        return make


class _Folder:
    """The folder of one run: what it is for, which shards it lacks, and that it is whole at the end."""

    def __init__(self, path: Path, source: str, passages: Iterator[Passage], shard_rows: int) -> None:
        self._path, self._source = path, source
        self._shards = iter(lambda: list(islice(passages, shard_rows)), [])
        self._first: list[Passage] = []
        self._complete = False
        self._checksums: dict[str, str] = {}
        """Of the shards of a folder that was finished, by name."""
        self.rows = self.shards = self.remade = 0

    def begin(self, encoder: Encoder, config: EmbedConfig) -> None:
        """Settle the precision, and describe the folder or compare it with its description."""
        manifest = self._path / DESCRIPTION
        recorded = read_sealed_json(manifest) if manifest.exists() else None
        if recorded is None and any(self._path.glob("shard-*.parquet")):
            raise ArtifactError(
                f"{self._path} holds shards and no {DESCRIPTION}, so what made them is not known.",
                remedy="Choose another --output.",
            )
        if recorded is not None and (not isinstance(recorded, dict) or recorded.get("format") != FORMAT):
            raise ArtifactError(f"{manifest} is not of the format {FORMAT}.", remedy="Choose another --output.")
        self._first = next(self._shards, [])
        if not self._first:
            raise InputError(
                f"There is no passage in {self._source}.", remedy="Name a source with at least one line of text."
            )
        if encoder.precision is None and recorded and recorded.get("precision") in get_args(Precision):
            encoder.precision = recorded["precision"]
        encoder.decide([row.embedded_text for row in self._first])
        self._header = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(encoder.info),
            "precision": encoder.precision,
            "dtype": config.dtype,
            "shard_rows": config.shard_rows,
        }
        if recorded is None:
            self._describe(complete=False)
            return
        for key in ("model", *self._header):
            if recorded.get(key) != self._header[key]:
                raise ArtifactError(
                    f"{self._path} was begun with {key} {recorded.get(key)}, "
                    f"and this run has {key} {self._header[key]}.",
                    remedy=REMEDIES.get(key, OTHER_MODEL),
                )
        self._complete = bool(recorded.get("complete"))
        if self._complete:
            check_description(recorded, manifest)
            self._checksums = {shard["name"]: shard["checksum"] for shard in recorded["shards"]}

    def missing(self, advance: Advance) -> Iterator[ShardTask]:
        """Read the corpus to its end, and yield the shards that are not there."""
        digest = xxhash.xxh3_128()
        rows = self._first
        while rows:
            path, before = self._shard(self.shards), digest.copy()
            update_digest(digest, rows)
            made_of = {"rows": len(rows), "first_row": self.rows, "corpus": digest_text(digest)}
            task = ShardTask(path, rows, {**self._header, **made_of})
            done = path.exists() and already_done(path, rows, before, digest, self._source)
            if done and not is_whole(path, rows, task.header, self._checksums.get(path.name)):
                done, self.remade = False, self.remade + 1
            if done:
                advance(len(rows))
            else:
                if self._complete:  # the corpus has grown, or a shard is damaged
                    self._describe(complete=False)
                yield task
            self.rows, self.shards = self.rows + len(rows), self.shards + 1
            rows = next(self._shards, [])

    def finish(self) -> None:
        """Describe the whole folder."""
        beyond = self._shard(self.shards)
        if beyond.exists():
            raise ArtifactError(
                f"{self._path} holds {beyond.name}, and {self._source} ends after {self.rows:,} passages.",
                remedy="Choose another --output for this corpus.",
            )
        if not self._complete:
            shards = [describe_shard(self._shard(number)) for number in range(self.shards)]
            self._describe(complete=True, rows=self.rows, shards=shards)

    def _shard(self, number: int) -> Path:
        return self._path / f"shard-{number:05d}.parquet"

    def _describe(self, *, complete: bool, **more: Any) -> None:
        write_sealed_json(self._path / DESCRIPTION, {**self._header, "complete": complete, **more})
        self._complete = complete


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
