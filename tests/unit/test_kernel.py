"""The scoring kernel against its reference and against Faiss; in Triton's interpreter where there is no GPU."""

import faiss
import numpy as np
import pytest
import torch

from indexes import make_vectors
from telerag_cli.config import Metric, Storage
from telerag_cli.index.scoring import empty_ivf, flat
from telerag_cli.tiers.cuda import kernel, reference
from telerag_cli.tiers.cuda.reference import Launch, decoding_error
from telerag_cli.tiers.cuda.scoring import NUMBERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOT = 4096


class Lists:
    """Lists of given sizes as Faiss encodes them, in an arena on the device, and Faiss's own scores."""

    def __init__(self, sizes, dimension, metric, storage, scale=1.0, duplicates=0):
        self.metric, self.storage, self.sizes = metric, storage, sizes
        total = sum(sizes)
        vectors = scale * make_vectors(max(total, 1), dimension, 3, min(duplicates, total))
        self.vectors = vectors[:total]
        ivf = empty_ivf(flat(vectors[:1].copy(), metric), dimension, 1, metric, storage)
        if storage is Storage.INT8:
            ivf.train(vectors)
        ivf.add(self.vectors)
        ivf.nprobe = 1
        self.ivf = ivf
        codes = faiss.rev_swig_ptr(ivf.invlists.get_codes(0), max(total, 1) * ivf.code_size)[: total * ivf.code_size]
        image, self.firsts = b"", []
        for size, begin in zip(sizes, np.cumsum([0, *sizes[:-1]]), strict=True):
            self.firsts.append(len(image))
            part = codes[begin * ivf.code_size : (begin + size) * ivf.code_size].tobytes()
            image += part + bytes(-len(part) % SLOT)
        image += bytes(SLOT)
        self.arena = torch.frombuffer(bytearray(image), dtype=torch.uint8).to(DEVICE).view(NUMBERS[storage])
        trained = faiss.vector_to_array(ivf.sq.trained) if storage is Storage.INT8 else np.zeros(2, np.float32)
        self.low, self.step = torch.from_numpy(trained.reshape(2, -1).copy()).to(DEVICE)

    def work(self, queries, pairs):
        """A launch for (query, list) pairs; lists lie in a query's row in the order of their numbers."""
        pairs = [pair for pair in pairs if self.sizes[pair[1]]]
        l2 = self.metric is Metric.L2
        asked = torch.from_numpy(queries).to(DEVICE)
        begins = np.cumsum([0, *self.sizes])
        size_of = np.array([self.sizes[number] for _query, number in pairs], np.int64)
        columns = [
            (query, self.firsts[number] // self.arena.element_size(), self.sizes[number], begins[number])
            for query, number in pairs
        ]
        told = torch.from_numpy(np.array(columns, np.int64).T.copy()).to(DEVICE)
        absolute = torch.zeros(len(queries), device=DEVICE)
        if self.storage is Storage.INT8:
            absolute = decoding_error(asked, self.low, self.step, l2=l2)
        bounds = torch.full((len(queries), sum(self.sizes)), -torch.inf, device=DEVICE)
        return Launch(self.arena, asked, self.low, self.step, told, bounds, absolute, l2, size_of)

    def faiss_scores(self, queries):
        """Larger is better, (n, total)."""
        total = sum(self.sizes)
        scores, rows = self.ivf.search(queries, total)
        out = np.empty_like(scores)
        np.put_along_axis(out, rows, scores, 1)
        return out if self.metric is Metric.IP else -out


def run(launch, lists, queries, pairs):
    work = lists.work(queries, pairs)
    launch(work)
    return work.bounds.cpu().numpy()


def check(lists, queries, pairs):
    """The kernel writes what the reference writes, and both are bounds, and tight ones, of Faiss's scores."""
    expected = run(reference.launch, lists, queries, pairs)
    found = run(kernel.launch, lists, queries, pairs)
    asked = np.zeros(expected.shape, bool)
    begins = np.cumsum([0, *lists.sizes])
    for query, number in pairs:
        asked[query, begins[number] : begins[number + 1]] = True
    exact = lists.faiss_scores(queries)
    size = np.abs(queries) @ np.abs(lists.vectors.T) if lists.metric is Metric.IP else np.abs(exact)
    slack = 1e-4 * size + 1e-4 * np.abs(queries).max() * np.abs(lists.vectors).max() * queries.shape[1]
    for bounds in (expected, found):
        assert np.isneginf(bounds[~asked]).all(), "something was written where no list was asked for"
        assert (bounds[asked] >= exact[asked]).all(), "a bound is below Faiss's score"
        assert (bounds[asked] <= (exact + slack)[asked]).all(), "a bound is far from Faiss's score"
    np.testing.assert_allclose(found[asked], expected[asked], atol=float(slack.max()))


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("dimension", [1, 3, 128, 130])
def test_the_kernel_against_reference_and_faiss(dimension, metric, storage):
    lists = Lists([33, 0, 1, 32, 31, 70], dimension, metric, storage, duplicates=20)
    queries = make_vectors(3, dimension, 9)
    check(lists, queries, [(0, 0), (0, 1), (0, 5), (1, 2), (2, 3), (2, 4), (2, 5), (1, 0)])


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("scale", [1e-12, 3e4])
def test_extremes(scale, storage):
    """As far as float16 goes up, and as small as makes its numbers nothing."""
    for metric in Metric:
        lists = Lists([5, 40, 1], 17, metric, storage, scale=scale / 4)
        check(lists, scale * make_vectors(2, 17, 4), [(0, 0), (0, 1), (1, 1)])
        check(lists, lists.vectors[-1:].copy(), [(0, 2)])  # one vector, and a query equal to it


def test_equal_vectors_have_equal_bounds_wherever_they_lie():
    vectors = make_vectors(1, 96, 1).repeat(65, axis=0)
    lists = Lists([65], 96, Metric.IP, Storage.FLOAT32)
    lists.arena[: 65 * 96] = torch.from_numpy(vectors.ravel()).to(DEVICE)
    bounds = run(kernel.launch, lists, make_vectors(1, 96, 2), [(0, 0)])
    assert len(np.unique(bounds)) == 1
