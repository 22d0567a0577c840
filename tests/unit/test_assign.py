"""Lists found in bfloat16 first are the nearest ones, as if all had been compared in float32."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telerag_cli.config import Metric
from telerag_cli.index import assign
from telerag_cli.index.assign import MAX_CANDIDATES, MIN_LISTS, Assigner
from telerag_cli.index.scoring import flat

DIMENSION = 16


class SpiedFlat:
    """Faiss's search of the lists, which the short type makes superfluous, counted."""

    def __init__(self, centroids, metric):
        self.index, self.calls = flat(centroids, metric), 0

    def search(self, vectors, k):
        self.calls += 1
        return self.index.search(vectors, k)


def assigner(centroids, metric):
    """With the short type even where the processor does not have it; and the search that it does without."""
    search = SpiedFlat(centroids, metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("telerag_cli.system.computes_bfloat16", lambda: True)
        patch.setattr(assign, "flat", lambda _centroids, _metric: search)
        return Assigner(centroids, metric), search


def nearness(vectors, centroids, metric):
    """In float64: the larger the nearer, (n, nlist)."""
    products = vectors.astype(np.float64) @ centroids.T.astype(np.float64)
    return products if metric is Metric.IP else products - (centroids.astype(np.float64) ** 2).sum(1) / 2


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    nlist=st.integers(MIN_LISTS, MIN_LISTS + 200),
    n=st.integers(1, 300),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6, 1e15]),
    offset=st.sampled_from([0.0, 0.3, 50.0]),
    metric=st.sampled_from(list(Metric)),
)
def test_no_list_is_nearer(seed, nlist, n, scale, offset, metric):
    random = np.random.default_rng(seed)
    centroids = (random.standard_normal((nlist, DIMENSION)) + offset).astype(np.float32) * np.float32(scale)
    vectors = (random.standard_normal((n, DIMENSION)) + offset).astype(np.float32) * np.float32(scale)
    near = nearness(vectors, centroids, metric)
    lists = assigner(centroids, metric)[0](vectors)
    lost = near.max(1) - near[np.arange(n), lists]
    # What float32 itself may lose in sums of this size.
    size = np.linalg.norm(vectors, axis=1) * np.linalg.norm(centroids, axis=1).max()
    if metric is Metric.L2:
        size = size + (centroids.astype(np.float64) ** 2).sum(1).max()
    assert (lost <= 1e-6 * DIMENSION * size).all()


def test_equally_near_lists_give_the_lowest():
    random = np.random.default_rng(0)
    once = random.standard_normal((MIN_LISTS, DIMENSION), np.float32)
    lists = assigner(np.concatenate([once, once]), Metric.IP)[0](once)
    assert (lists < MIN_LISTS).all()


@pytest.mark.parametrize("metric", list(Metric))
def test_the_short_type_is_what_found_them(metric):
    random = np.random.default_rng(1)
    centroids = random.standard_normal((MIN_LISTS + 1, DIMENSION), np.float32)
    vectors = random.standard_normal((100, DIMENSION), np.float32)
    made, search = assigner(centroids, metric)
    assert (made(vectors) >= 0).all()
    assert search.calls == 0


@pytest.mark.parametrize(
    ("metric", "near", "scale", "length"),
    [
        (Metric.IP, 1000, 1.0, 1.0),
        *((metric, 0, scale, 7e37) for metric in Metric for scale in (1.0, 1e30)),  # beyond float32's range
    ],
)
def test_scores_that_the_short_type_cannot_tell_go_to_faiss(metric, near, scale, length):
    random = np.random.default_rng(2)
    centroids = near + random.standard_normal((MIN_LISTS, DIMENSION), np.float32) * np.float32(scale)
    vectors = near + random.standard_normal((2 * MAX_CANDIDATES, DIMENSION), np.float32) * np.float32(length)
    made, search = assigner(centroids, metric)
    lists = made(vectors)
    assert search.calls == 1
    assert (lists == search.search(vectors, 1)[1][:, 0]).all()
