"""Small indexes for tests, and Faiss's own answer to compare with."""

from pathlib import Path

import faiss
import numpy as np

from telerag_cli.config import Metric, Storage
from telerag_cli.index.artifact import EmbedderInfo, Index, IndexPaths, Manifest, lay_out
from telerag_cli.index.scoring import best, empty_ivf, flat


def make_vectors(count, dimension, seed, duplicates=0):
    """Random vectors, of which the last ``duplicates`` repeat the first ones: equal scores."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, dimension)).astype(np.float32)
    for position in range(duplicates):
        vectors[count - 1 - position] = vectors[position % max(1, count // 4)]
    return vectors


def make_index(root: Path, vectors, nlist, metric: Metric, storage: Storage, seed=0):
    """An index folder's lists as Faiss fills them, opened by us, and the Faiss index they came from."""
    dimension = vectors.shape[1]
    centroids = vectors[np.random.default_rng(seed).choice(len(vectors), nlist, replace=False)].copy()
    ivf = empty_ivf(flat(centroids, metric), dimension, nlist, metric, storage)
    if storage is Storage.INT8:
        ivf.train(vectors)
    ivf.add(vectors)
    sizes = np.array([ivf.invlists.list_size(number) for number in range(nlist)])
    table, total = lay_out(sizes, ivf.code_size)
    image = np.zeros(total, np.uint8)
    for number, (size, capacity, offset) in enumerate(table.tolist()):
        if size:
            codes = faiss.rev_swig_ptr(ivf.invlists.get_codes(number), size * ivf.code_size)
            rows = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size).view(np.uint8)
            image[offset : offset + len(codes)] = codes
            start = offset + capacity * ivf.code_size
            image[start : start + len(rows)] = rows
    root.mkdir(parents=True, exist_ok=True)
    image.tofile(root / "lists.bin")
    trained = faiss.vector_to_array(ivf.sq.trained).copy() if storage is Storage.INT8 else None
    manifest = Manifest(
        dimension, metric, storage, nlist, len(vectors), ivf.code_size, seed, EmbedderInfo(None), {}
    )
    ivf.parallel_mode = 1
    return Index(IndexPaths(root), manifest, centroids, table, trained), ivf


def expected(ivf, metric: Metric, queries, k, nprobe):
    """Faiss's scores, and the only order of rows that is right when equal scores are ordered by row."""
    ivf.nprobe = nprobe
    scores, rows = ivf.search(queries, k)
    everything = ivf.search(queries, int(ivf.ntotal))
    ordered = best(*everything, k, metric)
    return scores, rows, ordered[1]
