"""A small index, and searches compared with what Faiss finds in it."""

import numpy as np

from indexes import expected, make_index, make_vectors
from telerag_cli.config import Metric, Storage
from telerag_cli.index.scoring import Coarse
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.tiers.host import open_host_tier


def small_index(folder):
    """400 vectors of 16 dimensions in 20 lists: our index, Faiss's, and the vectors."""
    vectors = make_vectors(400, 16, 1)
    return *make_index(folder, vectors, 20, Metric.IP, Storage.FLOAT32), vectors


def host_retriever(index, arena_bytes, **options):
    """A retriever over a host tier; the tier is its ``tier``."""
    coarse = Coarse(index.centroids, index.manifest.metric)
    return Retriever(index, coarse, open_host_tier(index, coarse, arena_bytes, **options))


def cuda_retriever(index, gpu, arena_bytes=None, **options):
    """A retriever over a cuda tier on this device."""
    coarse = Coarse(index.centroids, index.manifest.metric)
    return Retriever(index, coarse, open_cuda_tier(index, coarse, gpu, arena_bytes, **options))


def check_search(retriever, ivf, queries, k, nprobe, prefetch=None):
    """Search, and compare scores and rows with Faiss's, bit for bit; returns the report."""
    found = retriever.search(queries, k, nprobe, prefetch)
    scores, faiss_rows, ordered = expected(ivf, retriever.index.manifest.metric, queries, k, nprobe)
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.rows, ordered)
    for mine, theirs, row_scores in zip(found.rows, faiss_rows, scores, strict=True):
        alone = np.array([(row_scores == score).sum() == 1 for score in row_scores])
        alone[-1] = False  # the last may tie with one that was left out
        np.testing.assert_array_equal(mine[alone], theirs[alone])
    return found.report


def check_released(tier):
    """The accounts are in order, and nothing is referenced."""
    tier.check_integrity()
    assert tier.occupancy().references == 0
