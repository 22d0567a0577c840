"""Small indexes for tests, and Faiss's own answer to compare with."""

from pathlib import Path

import numpy as np

from synthetic_store import packed
from telerag_cli.config import Metric, Storage
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
    root.mkdir(parents=True, exist_ok=True)
    ivf.parallel_mode = 1
    return packed(ivf, root, centroids, metric, storage), ivf


def expected(ivf, metric: Metric, queries, k, nprobe):
    """Faiss's scores, and the only order of rows that is right when equal scores are ordered by row."""
    ivf.nprobe = nprobe
    scores, rows = ivf.search(queries, k)
    everything = ivf.search(queries, int(ivf.ntotal))
    ordered = best(*everything, k, metric)
    return scores, rows, ordered[1]
