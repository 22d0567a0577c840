"""Small embeddings files that several tests build from."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from telerag_cli.files import checksum, write_json


def contents(root):
    """The bytes of all files below a folder, by their paths in it."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def clustered(rows, dimension, seed=0, clusters=40):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dimension)).astype(np.float32)
    vectors = centres[rng.integers(0, clusters, rows)] + rng.standard_normal((rows, dimension)).astype(np.float32) / 2
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def vector_column(vectors, value=None):
    value = value or pa.from_numpy_dtype(vectors.dtype)
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), value), vectors.shape[1])


def write_parquet(path, vectors, *, text=True, group=1000, **columns):
    columns = {"embedding": vector_column(vectors)} | columns
    if text:
        columns = {
            "id": [f"p{i}" for i in range(len(vectors))],
            "text": [f"Passage {i}." for i in range(len(vectors))],
        } | columns
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def embeddings_folder(folder, vectors, shard_rows, **changes):
    folder.mkdir()
    about = {
        "format": "telerag-embeddings",
        "version": 1,
        "model": "m",
        "dimension": vectors.shape[1],
        "pooling": "mean",
        "normalized": True,
        "prompt": "query: ",
        "max_tokens": 256,
    }
    shards = []
    for number, low in enumerate(range(0, len(vectors), shard_rows)):
        part = vectors[low : low + shard_rows]
        table = pa.table(
            {
                "id": [f"p{low + i}" for i in range(len(part))],
                "text": [f"Text {low + i}" for i in range(len(part))],
                "metadata": [json.dumps({"title": f"T{low + i}"}) for i in range(len(part))],
                "embedding": vector_column(part),
            }
        )
        path = folder / f"shard-{number:05}.parquet"
        pq.write_table(table.replace_schema_metadata({"telerag": json.dumps(about)}), path)
        shards.append({"name": path.name, "rows": len(part), "bytes": path.stat().st_size, "checksum": checksum(path)})
    write_json(folder / "embeddings.json", about | {"complete": True, "rows": len(vectors), "shards": shards} | changes)
    return folder
