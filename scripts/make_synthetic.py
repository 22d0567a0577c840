"""Make large embeddings, or a large index straight away, of noisy copies of real vectors.

Every vector is a base vector plus noise of length ``--noise``, of length 1 again, and its passage is that of the base
row, with the id ``<row>-<copy>``. Equal arguments give equal bytes. Embeddings are made shard by shard, each with its
own random stream, and a killed run resumes. For an index nothing is assigned: the lists come first.

1. A sample of noisy copies is drawn, the centroids are trained on a part of it, and all of it is assigned. How many
   fall to a list says how large it will be; which, of what base rows its vectors are copies.
2. For each vector of a list, a new copy of the base row of one of its samples is drawn. If another centroid is nearer
   to it, it is pulled towards the sample, to over the border: lists are cut from the sphere by planes, so the way there
   is known.

A plane for each of the nearest ``WALLS`` centroids is looked at, not one for each centroid; so the share of vectors
that lie in the list of their nearest centroid is measured at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from synthetic_store import Block, unit
from telerag_cli.arrays import ByteArray, FloatArray, IntArray, TableArray
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.description import DESCRIPTION, FORMAT
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.files import checksum, read_json, sized, write_at, write_json, writing
from telerag_cli.index.artifact import (
    BATCH_ROWS,
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
from telerag_cli.index.passages import write_passages
from telerag_cli.index.scoring import Coarse, flat
from telerag_cli.index.stages import Encode, encoder
from telerag_cli.index.train import auto_nlist, train_centroids, train_ranges
from telerag_cli.index.verify import scan_lists
from telerag_cli.units import parse_bytes

SHARD_ROWS = 65536
SAMPLES_PER_LIST = 64
TRAINED_PER_LIST = 24
"""Fewer than `telerag build-index` takes: half the time, and lists that are hardly less even."""
WALLS = 64
"""Nearest other centroids that a vector is compared with."""
BLOCK_ROWS = 1024
"""Vectors made at a time; they stay in the cache."""
MIN_PULL = 0.5
"""Of the way to the border, at which a vector that was pulled back lies at least, seen from its sample."""
CHECKED_VECTORS = 16384
NOISE = 0.5
TEXTS = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [pa.field(n, t, nullable=False) for n, t in (("id", pa.string()), ("text", TEXTS), ("metadata", TEXTS))]
)


@dataclass(frozen=True)
class Base:
    """Real vectors (m, dimension) of length 1, their texts and metadata, and what made them."""

    vectors: FloatArray
    texts: pa.Array
    metadata: pa.Array
    made_by: dict[str, Any]

    @classmethod
    def load(cls, path: Path, longest: int | None = None) -> Base:
        """Read embeddings, or the vectors of a ``.npy``, without passages of more characters than ``longest``."""
        if path.suffix == ".npy":
            vectors = np.load(path)
            texts, metadata = ([text] * len(vectors) for text in ("Synthetic passage.", "{}"))
            return cls(unit(vectors), pa.array(texts), pa.array(metadata), {"model": None})
        source = Embeddings.open(path)
        vectors = np.concatenate([block.copy() for _, block in source.batches(SHARD_ROWS)])
        passages = pa.Table.from_batches(list(source.passages())).combine_chunks()
        keep = pc.less_equal(pc.utf8_length(passages["text"]), longest or sys.maxsize).combine_chunks()
        if not keep.true_count:
            raise UsageError(f"{path} has no passage of at most {longest} characters.", remedy="Raise --longest.")
        told = {key: source.description.get(key) for key in ("model", "pooling", "prompt", "max_tokens")}
        passages = passages.filter(keep).combine_chunks()
        texts, metadata = (passages[name].combine_chunks() for name in ("text", "metadata"))
        return cls(unit(vectors[keep.to_numpy(zero_copy_only=False)]), texts, metadata, told)


def noisy(vectors: FloatArray, noise: float, random: np.random.Generator) -> FloatArray:
    """Add normal noise that is about ``noise`` long to vectors (n, dimension), and make them of length 1 again."""
    drawn = random.standard_normal(vectors.shape, np.float32)
    drawn *= np.float32(noise / np.sqrt(vectors.shape[1]))
    drawn += vectors
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def make_embeddings(base: Base, total: int, noise: float, seed: int, output: Path) -> None:
    """Write what is missing of an embeddings folder; raises UsageError if it holds something else."""
    count, dimension = base.vectors.shape
    digest = f"xxh3:{xxhash.xxh3_64(base.vectors.tobytes()).hexdigest()}"
    synthetic = {"base": digest, "base_rows": count, "noise": noise, "seed": seed, "vectors": total}
    about = {"format": FORMAT, "version": 1, "dimension": dimension, **base.made_by, "normalized": True}
    about["synthetic"] = synthetic
    output.mkdir(parents=True, exist_ok=True)
    description = output / DESCRIPTION
    if description.exists() and (found := read_json(description).get("synthetic")) != synthetic:
        raise UsageError(f"{output} holds {found}, and this asks for {synthetic}.", remedy="Choose another output.")
    write_json(description, about | {"complete": False})
    order = np.random.default_rng(seed).permutation(total)
    fields = [
        *((name, pa.string()) for name in ("id", "text", "metadata")),
        ("embedding", pa.list_(pa.float32(), dimension)),
    ]
    schema = pa.schema(fields, {"telerag": json.dumps(about, sort_keys=True)})

    def shard(number: int) -> dict[str, Any]:
        path = output / f"shard-{number:05}.parquet"
        chosen = order[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
        if not path.exists():
            rows, copies = chosen % count, chosen // count
            vectors = noisy(base.vectors[rows], noise, np.random.default_rng([seed, number]))
            names = [f"{row}-{copy}" for row, copy in zip(rows.tolist(), copies.tolist(), strict=True)]
            texts, metadata = (column.take(pa.array(rows)) for column in (base.texts, base.metadata))
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dimension)
            with writing(path) as temporary:
                table = pa.table([pa.array(names), texts, metadata, embedding], schema)
                pq.write_table(table, temporary, compression="none", use_dictionary=["text", "metadata"])
        return {"name": path.name, "rows": len(chosen), "bytes": path.stat().st_size, "checksum": checksum(path)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shards = list(pool.map(shard, range(-(-total // SHARD_ROWS))))
    write_json(description, about | {"complete": True, "rows": total, "shards": shards})


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
    """(s, dimension): noisy copies that are in the list they belong to, list by list, each list's beginning at
    ``sample_starts`` (nlist + 1,); ``sample_rows`` (s,) are the base rows that they are copies of."""
    sample_rows: IntArray
    sample_starts: IntArray
    table: TableArray
    rows: IntArray
    """(ntotal,): row numbers, list by list, increasing in each."""
    trained: FloatArray | None
    encode: Encode
    code_bytes: int
    """Bytes of one stored vector."""

    @property
    def list_bytes(self) -> IntArray:
        """Bytes each list takes in ``lists.bin``, (nlist,)."""
        return extent_bytes(self.table[:, 1], self.code_bytes)

    @property
    def starts(self) -> IntArray:
        """(nlist + 1,): where each list's row numbers begin in ``rows``."""
        return np.concatenate([[0], np.cumsum(self.table[:, 0].astype(np.int64))])

    def copied(self) -> IntArray:
        """Return the base row that the vector in each row is a copy of, (ntotal,)."""
        found = np.empty(len(self.rows), np.int64)
        for number, (low, high) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            if high > low:
                own = self.sample_rows[self.sample_starts[number] : self.sample_starts[number + 1]]
                found[self.rows[low:high]] = np.resize(own, high - low)
        return found

    def vectors(self, number: int) -> Iterator[tuple[int, FloatArray]]:
        """Yield the vectors of one list, a block at a time, with the place of each block's first."""
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
                way *= random.uniform(MIN_PULL, 1, len(out))
                block[out] = unit(home + way[:, None] * (block[out] - home))
            yield start, block

    def fill(self, number: int, out: ByteArray) -> None:
        """Write one list as it stands in ``lists.bin``; ``out`` has the bytes that it takes there."""
        size, capacity, _ = self.table[number].tolist()
        out[:] = 0
        codes = out[: size * self.code_bytes].reshape(size, self.code_bytes)
        for start, block in self.vectors(number) if size else ():
            codes[start : start + len(block)] = self.encode(block)
        first, rows_at = int(self.starts[number]), capacity * self.code_bytes
        out[rows_at : rows_at + ID_BYTES * size] = self.rows[first : first + size].view(np.uint8)

    def manifest(self, embedder: EmbedderInfo, source: str = "") -> Manifest:
        """What the index is, but for its files."""
        nlist, dimension = self.centroids.shape
        return Manifest(
            dimension,
            Metric.IP,
            self.storage,
            nlist,
            len(self.rows),
            self.code_bytes,
            self.seed,
            embedder,
            {},
            training_rows=min(len(self.samples), TRAINED_PER_LIST * nlist),
            source=source,
            created_by=f"make_synthetic.py: noise {self.noise:g} on {len(self.base):,} vectors",
        )

    def share_in_place(self) -> float:
        """The share of vectors that are in the list of their nearest centroid, of some spread over all lists."""
        assign = Assigner(self.centroids, Metric.IP)
        filled = np.flatnonzero(self.table[:, 0])
        step = max(1, len(filled) * BLOCK_ROWS // CHECKED_VECTORS)
        right = [assign(next(self.vectors(number))[1]) == number for number in filled[::step].tolist()]
        return float(np.concatenate(right).mean())


def plan_lists(base: FloatArray, vectors: int, nlist: int, storage: Storage, noise: float, seed: int) -> Lists:
    """Work out what every list holds, of noisy copies of ``base`` (m, dimension), which has real vectors of length 1.

    Raises:
        UsageError: there are fewer vectors than lists.
    """
    if not 1 <= nlist <= vectors:
        raise UsageError(
            f"{nlist:,} lists were asked for, and {vectors:,} vectors.", remedy="Choose fewer lists or more vectors."
        )
    random = np.random.default_rng(seed)
    count = min(vectors, SAMPLES_PER_LIST * nlist)
    copied = random.permutation(count) % len(base)
    samples = np.empty((count, base.shape[1]), np.float32)
    for low in range(0, count, BLOCK_ROWS):
        samples[low : low + BLOCK_ROWS] = noisy(base[copied[low : low + BLOCK_ROWS]], noise, random)
    centroids = train_centroids(samples[: TRAINED_PER_LIST * nlist], nlist, Metric.IP, seed)
    lists = Assigner(centroids, Metric.IP)(samples)
    order = np.argsort(lists, kind="stable")
    sample_ends = np.cumsum(np.bincount(lists, minlength=nlist))
    ends = sample_ends * vectors // count  # rounded so that the sum is right
    sizes = np.diff(ends, prepend=0)
    rows = random.permutation(vectors)
    for low, high in zip(ends - sizes, ends, strict=True):
        rows[low:high].sort()
    trained = train_ranges(samples) if storage is Storage.INT8 else None
    return Lists(
        base,
        noise,
        seed,
        storage,
        centroids,
        flat(centroids, Metric.IP).search(centroids, min(nlist, WALLS + 1))[1][:, 1:],
        samples[order],
        copied[order],
        np.concatenate([[0], sample_ends]),
        lay_out(sizes, code_size(base.shape[1], storage))[0],
        rows,
        trained,
        encoder(base.shape[1], storage, trained),
        code_size(base.shape[1], storage),
    )


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as cores, each of which fills a list of its own: what multiplies and encodes starts no more."""
    cores, one = len(os.sched_getaffinity(0)), partial(faiss.omp_set_num_threads, 1)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores, initializer=one) as pool:
        yield pool


class Datastore(Block):
    """Lists in host memory, and the index over them, which has no files."""

    def __init__(self, lists: Lists) -> None:
        super().__init__(int(lists.list_bytes.sum()))
        self.coarse = Coarse(lists.centroids, Metric.IP)
        manifest = lists.manifest(EmbedderInfo(None))
        self.index = Index(IndexPaths(Path("(memory)")), manifest, lists.centroids, lists.table, lists.trained)

        list_bytes = lists.list_bytes

        def fill(number: int) -> None:
            offset = int(lists.table[number, 2])
            lists.fill(number, self.memory[offset : offset + list_bytes[number]])

        with _workers() as pool:
            deque(pool.map(fill, range(len(lists.table))), 0)

    @classmethod
    def near(cls, base: FloatArray, nbytes: int, list_bytes: int, storage: Storage) -> Datastore:
        """Lists of about so many bytes in all, and on average, of vectors near those of ``base`` (m, dimension)."""
        vectors = nbytes // (code_size(base.shape[1], storage) + ID_BYTES)
        return cls(plan_lists(base, vectors, max(1, nbytes // list_bytes), storage, NOISE, 0))


def write_lists(lists: Lists, path: Path) -> None:
    """Write ``lists.bin``."""
    list_bytes = lists.list_bytes
    with sized(path, int(list_bytes.sum())) as file, _workers() as pool:

        def write(number: int) -> None:
            out = np.empty(list_bytes[number], np.uint8)
            lists.fill(number, out)
            write_at(file, out.data, int(lists.table[number, 2]))

        deque(pool.map(write, range(len(list_bytes))), 0)
        os.fsync(file)


def passages_of(copied: IntArray, texts: pa.Array, metadata: pa.Array) -> Iterator[pa.RecordBatch]:
    """Yield the passages of all rows: the texts are in the file once each, and named by their numbers."""
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


def make_index(base: Base, total: int, nlist: int, options: argparse.Namespace) -> None:
    """Make an index folder; an interrupted one is made from the start again."""
    storage, code_bytes = Storage(options.storage), code_size(base.vectors.shape[1], Storage(options.storage))
    digest = xxhash.xxh3_64(base.vectors.tobytes())
    asked = (nlist, total, storage, options.noise, options.seed)
    for part in (*base.texts.to_pylist(), *base.metadata.to_pylist(), *base.made_by.values(), *asked):
        digest.update(f"{part}\0".encode())
    source = f"synthetic xxh3:{digest.hexdigest()}"
    needed = total * (code_bytes + ID_BYTES + 32) + nlist * 4096 + 2 * base.texts.nbytes
    draft = Draft(options.output, {"source": source}, needed)
    if draft.finished(overwrite=options.overwrite):
        print(f"{options.output} is there already, of the same.", file=sys.stderr)
        return
    paths, remedy = draft.paths, "Free space, choose another output, or make less."
    with draft.claimed(overwrite=options.overwrite, remedy=remedy):
        lists = plan_lists(base.vectors, total, nlist, storage, options.noise, options.seed)
        save_array(paths.centroids, lists.centroids)
        save_array(paths.offsets, lists.table)
        if lists.trained is not None:
            save_array(paths.quantizer, lists.trained)
        with writing(paths.passages) as temporary:
            deque(write_passages(passages_of(lists.copied(), base.texts, base.metadata), temporary, SCHEMA), 0)
        write_lists(lists, paths.lists)
        embedder = EmbedderInfo(base.made_by["model"], base.made_by.get("pooling"), True, base.made_by.get("prompt"))
        sums = scan_lists(paths.lists, lists.table, code_bytes, lambda _count: None)
        seal(paths, lists.manifest(embedder, source), *sums)
    print(f"{lists.share_in_place():.2%} of vectors are in the list of their nearest centroid.", file=sys.stderr)


def main() -> None:
    """Read arguments and make it."""
    parser = argparse.ArgumentParser(description="Noisy copies of real embeddings, as many as asked for.")
    parser.add_argument("kind", choices=["embeddings", "index"], help="what to make")
    parser.add_argument("--base", type=Path, required=True, help="embeddings (folder or Parquet) or a .npy of vectors")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--vectors", type=int, help="how many to make")
    size.add_argument("--bytes", help="as many vectors as take this, stored so, e.g. 8GB")
    parser.add_argument("--nlist", type=int, help="lists; as many as telerag build-index takes")
    parser.add_argument("--storage", choices=[str(kind) for kind in Storage], default=str(Storage.FLOAT32))
    parser.add_argument("--noise", type=float, default=NOISE, help="length of what is added to each unit vector")
    parser.add_argument("--longest", type=int, help="leave out base passages of more characters than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an index made otherwise")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    options = parser.parse_args()
    try:
        base = Base.load(options.base, options.longest)
        total = options.vectors or -(
            -parse_bytes(options.bytes) // code_size(base.vectors.shape[1], Storage(options.storage))
        )
        if options.kind == "embeddings":
            make_embeddings(base, total, options.noise, options.seed, options.output)
        else:
            make_index(base, total, options.nlist or auto_nlist(total), options)
    except TeleragError as error:
        sys.exit(f"error: {error}")
    print(options.output)


if __name__ == "__main__":
    main()
