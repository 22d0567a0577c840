"""Make a large index straight away: lists as k-means cuts noisy copies of real vectors, filled with more such copies.

Every vector is a base vector plus noise of length ``--noise``, of length 1 again, and its passage is that of the base
row, with the id ``<row>-<copy>``; as `make_synthetic.py` makes them, and `telerag build-index` would put them into
lists. But nothing is assigned: the lists come first, and each is filled on its own.

1. A sample of noisy copies is drawn, the centroids are trained on a part of it, and all of it is assigned. How many
fall to
   a list says how large it will be; which, of what base rows its vectors are copies.
2. For each vector of a list, a new copy of the base row of one of its samples is drawn. If another centroid is nearer
to it, it
   is pulled towards the sample, to over the border: lists are cut from the sphere by planes, so the way there is known.

A plane for each of the nearest ``WALLS`` centroids is looked at, not one for each centroid; so the share of vectors
that lie in the list of their nearest centroid is measured at the end. Equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from make_synthetic import load
from synthetic_store import Block, unit
from telerag_cli.arrays import ByteArray, FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage, format_bytes, parse_bytes
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.files import write_at, writing
from telerag_cli.index.artifact import (
    ID_BYTES,
    EmbedderInfo,
    Index,
    IndexPaths,
    Manifest,
    code_size,
    extent_bytes,
    lay_out,
)
from telerag_cli.index.assign import Assigner
from telerag_cli.index.partial import Draft, save_array, seal
from telerag_cli.index.passages import BATCH_ROWS, write_passages
from telerag_cli.index.scoring import flat
from telerag_cli.index.stages import Encode, encoder
from telerag_cli.index.train import auto_nlist, train_centroids, train_ranges

SAMPLES_PER_LIST = 64
TRAINED_PER_LIST = 24
"""Fewer than `telerag build-index` takes: half the time, and lists that are hardly less even."""
WALLS = 64
"""Nearest other centroids that a vector is compared with."""
BLOCK_ROWS = 1024
"""Vectors made at a time; they stay in the cache."""
LEAST_PULL = 0.5
"""Of the way to the border, at which a vector that was pulled back lies at least, seen from its sample."""
LISTS_UNDER_WAY = 6
CHECKED_VECTORS = 16384
TEXTS = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", TEXTS, nullable=False),
        pa.field("metadata", TEXTS, nullable=False),
    ]
)


def noisy(vectors: FloatArray, noise: float, random: np.random.Generator) -> FloatArray:
    """The vectors (n, dimension) plus normal noise, which is about ``noise`` long, of length 1 again."""
    drawn = random.standard_normal(vectors.shape, np.float32)
    drawn *= np.float32(noise / np.sqrt(vectors.shape[1]))
    drawn += vectors
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


@dataclass(frozen=True)
class Lists:
    """What the lists of an index hold, to be made one by one, in any order, on any thread, in memory or for a file."""

    base: FloatArray
    """(m, dimension): real vectors of length 1."""
    noise: float
    seed: int
    storage: Storage
    centroids: FloatArray
    """(nlist, dimension), of length 1."""
    walls: IntArray
    """(nlist, up to `WALLS`): the nearest other centroids."""
    samples: FloatArray
    """(s, dimension): noisy copies that are in the list they belong to, list by list."""
    sample_rows: IntArray
    """(s,): the base rows that they are copies of."""
    sample_starts: IntArray
    """(nlist + 1,): where each list's begin."""
    table: TableArray
    """Of the lists in ``lists.bin``."""
    total_bytes: int
    rows: IntArray
    """(ntotal,): row numbers, list by list, increasing in each."""
    trained: FloatArray | None
    encode: Encode

    @property
    def starts(self) -> IntArray:
        """(nlist + 1,): where each list's row numbers begin in ``rows``."""
        return np.concatenate([[0], np.cumsum(self.table[:, 0].astype(np.int64))])

    def copied(self) -> IntArray:
        """(ntotal,) the base row that the vector in each row is a copy of."""
        found = np.empty(len(self.rows), np.int64)
        for number, (low, high) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            if high > low:
                own = self.sample_rows[self.sample_starts[number] : self.sample_starts[number + 1]]
                found[self.rows[low:high]] = np.resize(own, high - low)
        return found

    def vectors(self, number: int) -> Iterator[tuple[int, FloatArray]]:
        """The vectors of one list, a block at a time, with the place of each block's first."""
        low, high = self.sample_starts[number : number + 2].tolist()
        samples, own_rows = self.samples[low:high], self.sample_rows[low:high]
        walls = (self.centroids[number] - self.centroids[self.walls[number]]).T
        inside = np.maximum(samples @ walls, 0)  # how far they are from each wall; not less, but for rounding
        random = np.random.default_rng([self.seed, number])
        size = int(self.table[number, 0])
        for start in range(0, size, BLOCK_ROWS):
            which = np.arange(start, min(start + BLOCK_ROWS, size)) % len(samples)
            block = noisy(self.base[own_rows[which]], self.noise, random)
            distance = block @ walls
            out = np.flatnonzero((distance < 0).any(axis=1))
            if len(out):
                home, kept, lost = samples[which[out]], inside[which[out]], distance[out]
                with np.errstate(divide="ignore", invalid="ignore"):  # where it is not behind the wall
                    way = np.where(lost < 0, kept / (kept - lost), 1).min(axis=1)
                way *= random.uniform(LEAST_PULL, 1, len(out))
                block[out] = unit(home + way[:, None] * (block[out] - home))
            yield start, block

    def fill(self, number: int, out: ByteArray) -> None:
        """Write one list as it stands in ``lists.bin``; ``out`` has the bytes that it takes there."""
        size, capacity, _ = self.table[number].tolist()
        code_bytes = code_size(self.base.shape[1], self.storage)
        codes = out[: size * code_bytes].reshape(size, code_bytes)
        for start, block in self.vectors(number) if size else ():
            codes[start : start + len(block)] = self.encode(block)
        rows_at = capacity * code_bytes
        out[size * code_bytes : rows_at] = 0
        first = int(self.starts[number])
        rows = self.rows[first : first + size].view(np.uint8)
        out[rows_at : rows_at + len(rows)] = rows
        out[rows_at + len(rows) :] = 0

    def in_memory(self) -> tuple[Block, Index]:
        """All of them in memory, and the index over them, which has no files."""
        block = Block(self.total_bytes)
        list_bytes = extent_bytes(self.table[:, 1], code_size(self.base.shape[1], self.storage))

        def fill(number: int) -> None:
            offset = int(self.table[number, 2])
            self.fill(number, block.memory[offset : offset + int(list_bytes[number])])

        with _workers() as pool:
            list(pool.map(fill, range(len(self.table))))
        manifest = self.manifest(EmbedderInfo(None), "")
        return block, Index(IndexPaths(Path("(memory)")), manifest, self.centroids, self.table, self.trained)

    def manifest(self, embedder: EmbedderInfo, source: str) -> Manifest:
        """What the index is, but for its files."""
        nlist, dimension = self.centroids.shape
        by = f"make_synthetic_index.py: noise {self.noise:g} on {len(self.base):,} vectors"
        return Manifest(
            dimension,
            Metric.IP,
            self.storage,
            nlist,
            len(self.rows),
            code_size(dimension, self.storage),
            self.seed,
            embedder,
            {},
            training_rows=_trained_rows(len(self.samples), nlist),
            source=source,
            created_by=by,
        )

    def share_in_place(self) -> float:
        """The share of vectors that are in the list of their nearest centroid, of some spread over all lists."""
        assign = Assigner(self.centroids, Metric.IP)
        filled = np.flatnonzero(self.table[:, 0])
        step = max(1, len(filled) * BLOCK_ROWS // CHECKED_VECTORS)
        right = seen = 0
        for number in filled[::step].tolist():
            _, block = next(self.vectors(number))
            right += int((assign(block) == number).sum())
            seen += len(block)
        return right / seen


def _trained_rows(samples: int, nlist: int) -> int:
    return min(samples, TRAINED_PER_LIST * nlist)


def plan_lists(
    base: FloatArray,
    vectors: int,
    nlist: int,
    storage: Storage,
    noise: float,
    seed: int,
    say: Callable[[str], None] = lambda _text: None,
) -> Lists:
    """Work out what every list holds.

    Args:
        base: real vectors, (m, dimension).
        vectors: how many to make.
        nlist: lists to put them into.
        storage: how they are kept.
        noise: length of what is added to each base vector of length 1.
        seed: of all that is drawn.
        say: told what is done.

    Raises:
        UsageError: there are fewer vectors than lists.
    """
    if not 1 <= nlist <= vectors:
        raise UsageError(
            f"{nlist:,} lists were asked for, and {vectors:,} vectors.", remedy="Choose fewer lists or more vectors."
        )
    base = unit(base)
    random = np.random.default_rng(seed)
    count = min(vectors, SAMPLES_PER_LIST * nlist)
    copied = random.permutation(count) % len(base)
    samples = np.empty((count, base.shape[1]), np.float32)
    for low in range(0, count, BLOCK_ROWS):
        samples[low : low + BLOCK_ROWS] = noisy(base[copied[low : low + BLOCK_ROWS]], noise, random)
    learnt = _trained_rows(count, nlist)
    say(f"Training {nlist:,} lists on {learnt:,} vectors.")
    centroids = train_centroids(samples[:learnt], nlist, Metric.IP, seed)
    say(f"Assigning {count:,} vectors to them.")
    lists = Assigner(centroids, Metric.IP)(samples)
    order = np.argsort(lists, kind="stable")
    sample_ends = np.cumsum(np.bincount(lists, minlength=nlist))
    ends = sample_ends * vectors // count  # rounded so that the sum is right
    sizes = np.diff(ends, prepend=0)
    table, total_bytes = lay_out(sizes, code_size(base.shape[1], storage))
    rows = random.permutation(vectors)
    for low, high in zip(ends - sizes, ends, strict=True):
        rows[low:high].sort()
    trained = train_ranges(samples) if storage is Storage.INT8 else None
    nearest = flat(centroids, Metric.IP).search(centroids, min(nlist, WALLS + 1))[1]
    return Lists(
        base,
        noise,
        seed,
        storage,
        centroids,
        nearest[:, 1:],
        samples[order],
        copied[order],
        np.concatenate([[0], sample_ends]),
        table,
        total_bytes,
        rows,
        trained,
        encoder(base.shape[1], storage, trained),
    )


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as cores, each of which fills a list of its own: what multiplies and encodes starts no more of them."""
    with (
        threadpool_limits(1, "blas"),
        ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=partial(faiss.omp_set_num_threads, 1)) as pool,
    ):
        yield pool


def write_lists(lists: Lists, path: Path, advance: Callable[[int], None]) -> tuple[TableArray, str]:
    """Write ``lists.bin``, past the page cache if the file system lets us: twice as fast, and it evicts nothing.

    Returns:
        What `telerag_cli.index.verify.scan_lists` of it would: the checksum of each list, and of the file.
    """
    list_bytes = extent_bytes(lists.table[:, 1], code_size(lists.base.shape[1], lists.storage))
    sums, whole = np.empty(len(list_bytes), np.uint64), xxhash.xxh3_64()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # tmpfs, say
        descriptor = os.open(path, flags, 0o644)
    buffers = [Block(int(list_bytes.max())) for _ in range(LISTS_UNDER_WAY)]
    under_way: deque[tuple[int, Block, Future[None]]] = deque()

    def make(number: int, out: ByteArray) -> None:
        lists.fill(number, out)
        sums[number] = xxhash.xxh3_64_intdigest(out.data)
        write_at(descriptor, out.data, int(lists.table[number, 2]))

    def end_oldest() -> None:
        number, buffer, future = under_way.popleft()
        future.result()
        whole.update(buffer.memory[: list_bytes[number]].data)
        buffers.append(buffer)
        advance(int(list_bytes[number]))

    try:
        with _workers() as pool:
            for number in np.flatnonzero(list_bytes).tolist():
                if not buffers:
                    end_oldest()
                buffer = buffers.pop()
                under_way.append((number, buffer, pool.submit(make, number, buffer.memory[: list_bytes[number]])))
            while under_way:
                end_oldest()
        sums[list_bytes == 0] = xxhash.xxh3_64_intdigest(b"")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sums, f"xxh3:{whole.hexdigest()}"


def passages_of(copied: IntArray, texts: pa.Array, metadata: pa.Array) -> Iterator[pa.RecordBatch]:
    """The passages of all rows: the texts are in the file once each, and named by their numbers."""
    order = np.argsort(copied, kind="stable")
    counts = np.bincount(copied, minlength=len(texts))
    copies = np.empty(len(copied), np.int64)
    copies[order] = np.arange(len(copied)) - np.repeat(np.cumsum(counts) - counts, counts)
    for low in range(0, len(copied), BATCH_ROWS):
        rows = copied[low : low + BATCH_ROWS]
        numbers = (pa.array(part).cast(pa.string()) for part in (rows, copies[low : low + BATCH_ROWS]))
        ids = pc.binary_join_element_wise(*numbers, "-")
        indices = pa.array(rows.astype(np.int32))
        columns = [ids, *(pa.DictionaryArray.from_arrays(indices, values) for values in (texts, metadata))]
        yield pa.record_batch(columns, schema=SCHEMA)


def make(options: argparse.Namespace) -> None:
    """Make the index folder."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr)

    base, texts, metadata, made_by = load(options.base)
    if options.longest is not None:
        short = np.array([len(text) <= options.longest for text in texts.to_pylist()])
        base, texts, metadata = base[short], texts.filter(pa.array(short)), metadata.filter(pa.array(short))
    if not len(base):
        raise UsageError(
            f"{options.base} has no passage of at most {options.longest} characters.", remedy="Raise --longest."
        )
    storage = Storage(options.storage)
    code_bytes = code_size(base.shape[1], storage)
    vectors = options.vectors or -(-parse_bytes(options.bytes) // code_bytes)
    nlist = options.nlist or auto_nlist(vectors)
    digest = xxhash.xxh3_64(base.tobytes())
    for part in (
        *texts.to_pylist(),
        *metadata.to_pylist(),
        *made_by.values(),
        nlist,
        vectors,
        storage,
        options.noise,
        options.seed,
    ):
        digest.update(f"{part}\0".encode())
    source = f"synthetic xxh3:{digest.hexdigest()}"
    needed = vectors * (code_bytes + ID_BYTES + 32) + nlist * 4096 + 2 * texts.nbytes
    draft = Draft(options.output, {"source": source}, needed)
    if draft.finished(overwrite=options.overwrite):
        print(f"{options.output} is there already, of the same.", file=sys.stderr)
        return
    paths = draft.paths
    with draft.claimed(overwrite=options.overwrite, remedy="Free space, choose another output, or make less."):
        lists = plan_lists(base, vectors, nlist, storage, options.noise, options.seed, say)
        save_array(paths.centroids, lists.centroids)
        save_array(paths.offsets, lists.table)
        if lists.trained is not None:
            save_array(paths.quantizer, lists.trained)
        say(f"Writing {vectors:,} passages.")
        with writing(paths.passages) as temporary:
            for _ in write_passages(passages_of(lists.copied(), texts, metadata), temporary, SCHEMA):
                pass
        say(f"Writing {format_bytes(lists.total_bytes)} of lists.")
        written = 0

        def advance(count: int) -> None:
            nonlocal written
            written += count
            if sys.stderr.isatty():
                print(f"\r{format_bytes(written)}", end="\r", file=sys.stderr)

        sums, whole = write_lists(lists, paths.lists, advance)
        embedder = EmbedderInfo(made_by["model"], made_by.get("pooling"), True, made_by.get("prompt"))
        seal(paths, lists.manifest(embedder, source), sums, whole)
    share = lists.share_in_place()
    say(f"Done; {share:.2%} of vectors are in the list of their nearest centroid.")
    print(options.output)


def main() -> None:
    """Make the index that the command line asks for."""
    parser = argparse.ArgumentParser(description="An index of any size, of noisy copies of real embeddings.")
    parser.add_argument("--base", type=Path, required=True, help="embeddings (folder or Parquet) or a .npy of vectors")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--vectors", type=int, help="how many to make")
    size.add_argument("--bytes", help="as many vectors as take this in the lists, e.g. 8GB")
    parser.add_argument("--nlist", type=int, help="lists; as many as telerag build-index takes")
    parser.add_argument("--storage", choices=[str(kind) for kind in Storage], default=str(Storage.FLOAT32))
    parser.add_argument("--noise", type=float, default=0.5, help="length of what is added to each unit vector")
    parser.add_argument("--longest", type=int, help="leave out base passages of more characters than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an index made otherwise")
    parser.add_argument("-o", "--output", type=Path, required=True, help="index folder to make")
    options = parser.parse_args()
    try:
        make(options)
    except TeleragError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
