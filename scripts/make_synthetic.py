"""Make a large embeddings folder from a small one: noisy copies of real vectors, in shuffled order.

Each vector is a base vector plus ``--noise`` times a random unit vector, normalised again; its passage is that of the
base row, with the id ``<row>-<copy>``. Every shard has its own random stream, so a killed run resumes at the first
shard that is missing, and equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from telerag_cli.arrays import FloatArray
from telerag_cli.config import format_bytes, parse_bytes
from telerag_cli.corpus.embeddings import DESCRIPTION, FORMAT, Embeddings
from telerag_cli.errors import TeleragError, UsageError
from telerag_cli.files import checksum, read_json, write_json, writing

SHARD_ROWS = 65536
DICTIONARY_BYTES = 256 << 20


def load(path: Path) -> tuple[FloatArray, pa.Array, pa.Array, dict[str, Any]]:
    """Base vectors, texts, metadata, and what made the vectors."""
    if path.suffix == ".npy":
        vectors = np.load(path).astype(np.float32)
        texts = pa.array([f"Synthetic passage {row}." for row in range(len(vectors))])
        return vectors, texts, pa.array(["{}"] * len(vectors)), {"model": None}
    source = Embeddings.open(path)
    vectors = np.concatenate([block.copy() for _, block in source.batches(SHARD_ROWS)])
    passages = pa.Table.from_batches(list(source.passages())).combine_chunks()
    made_by = {key: source.description.get(key) for key in ("model", "pooling", "normalized", "prompt", "max_tokens")}
    return vectors, passages["text"].combine_chunks(), passages["metadata"].combine_chunks(), made_by


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description="Noisy copies of real embeddings, as many as asked for.")
    parser.add_argument("--base", type=Path, required=True, help="embeddings (folder or Parquet) or a .npy of vectors")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--vectors", type=int, help="how many to make")
    size.add_argument("--bytes", help="as many float32 vectors as take this, e.g. 8GB")
    parser.add_argument("--noise", type=float, default=0.5, help="length of what is added to each unit vector")
    parser.add_argument("--longest", type=int, help="leave out base passages of more characters than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        make(options)
    except TeleragError as error:
        sys.exit(f"error: {error}")


def make(options: argparse.Namespace) -> None:
    """Write what is missing of the folder."""
    base, texts, metadata, made_by = load(options.base)
    if options.longest is not None:
        short = np.array([len(text) <= options.longest for text in texts.to_pylist()])
        base, texts, metadata = base[short], texts.filter(pa.array(short)), metadata.filter(pa.array(short))
    count, dimension = base.shape
    total = options.vectors or -(-parse_bytes(options.bytes) // (4 * dimension))
    digest = xxhash.xxh3_64(base.tobytes()).hexdigest()
    about = {
        "format": FORMAT,
        "version": 1,
        "dimension": dimension,
        **made_by,
        "normalized": True,
        "synthetic": {
            "base": f"xxh3:{digest}",
            "base_rows": count,
            "noise": options.noise,
            "seed": options.seed,
            "vectors": total,
        },
    }
    options.output.mkdir(parents=True, exist_ok=True)
    description = options.output / DESCRIPTION
    if description.exists():
        found = {
            key: value for key, value in read_json(description).items() if key not in ("complete", "rows", "shards")
        }
        if found != about:
            raise UsageError(
                f"{options.output} holds {found.get('synthetic')}, and this asks for {about['synthetic']}.",
                remedy="Choose another output.",
            )
    else:
        write_json(description, about | {"complete": False})
    order = np.random.default_rng(options.seed).permutation(total)
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("text", pa.string()),
            ("metadata", pa.string()),
            ("embedding", pa.list_(pa.float32(), dimension)),
        ],
        {"telerag": json.dumps(about, sort_keys=True)},
    )

    def shard(number: int) -> dict[str, Any]:
        path = options.output / f"shard-{number:05}.parquet"
        chosen = order[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
        if not path.exists():
            rows, copies = chosen % count, chosen // count
            vectors = np.random.default_rng([options.seed, number]).standard_normal((len(rows), dimension), np.float32)
            vectors *= options.noise / np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors += base[rows]
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            names = [f"{row}-{copy}" for row, copy in zip(rows.tolist(), copies.tolist(), strict=True)]
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dimension)
            table = pa.table(
                [pa.array(names), texts.take(pa.array(rows)), metadata.take(pa.array(rows)), embedding], schema
            )
            with writing(path) as temporary:
                pq.write_table(
                    table,
                    temporary,
                    compression="none",
                    use_dictionary=["text", "metadata"],
                    write_statistics=False,
                    dictionary_pagesize_limit=DICTIONARY_BYTES,
                )
        return {"name": path.name, "rows": len(chosen), "bytes": path.stat().st_size, "checksum": checksum(path)}

    shards, began = [], time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(shard, range(-(-total // SHARD_ROWS))):
            shards.append(done)
            rows = sum(part["rows"] for part in shards)
            print(
                f"\r{rows:,} of {total:,} vectors, {rows / (time.monotonic() - began):,.0f}/s", end="", file=sys.stderr
            )
    write_json(description, about | {"complete": True, "rows": total, "shards": shards})
    size = format_bytes(sum(part["bytes"] for part in shards))
    print(f"\n{size} in {len(shards)} shards, {time.monotonic() - began:.1f} s.", file=sys.stderr)
    print(options.output)


if __name__ == "__main__":
    main()
