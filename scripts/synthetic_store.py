"""What is measured with where there is no index: vectors of questions, texts and passages, and lists in host memory."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.config import PAGE_BYTES, Metric, Storage
from telerag_cli.errors import ArtifactError
from telerag_cli.index.artifact import ID_BYTES, EmbedderInfo, Index, IndexPaths, Manifest, lay_out

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of a generated text, at which its embedding is known; the last is the query."""


@dataclass(frozen=True)
class Material:
    """What questions, texts and passages look like, as unit vectors."""

    base: FloatArray
    """(m, dimension): passages."""
    question: FloatArray
    """(n, dimension)."""
    written: dict[float, FloatArray]
    """By share of the text, (n, dimension)."""
    source: str
    """Where it is from."""


def read_material(folder: Path) -> Material:
    """Read ``background.npy``, and ``embeddings.npz`` with ``question`` and ``generated_25`` to ``generated_100``.

    Raises:
        ArtifactError: a file or an array is missing.
    """
    try:
        arrays = {name: array.astype(np.float32) for name, array in np.load(folder / "embeddings.npz").items()}
        base = np.load(folder / "background.npy").astype(np.float32)
        written = {share: arrays[f"generated_{round(100 * share)}"] for share in SHARES}
        return Material(unit(base), arrays["question"], written, f"recorded, {folder.name}")
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{folder} holds no recorded embeddings: {error}.",
            remedy="Name a folder with background.npy and embeddings.npz.",
        ) from error


def make_material(dimension: int = 64, questions: int = 64, seed: int = 0) -> Material:
    """Random clusters, and texts that lead from a question near a passage to that passage."""
    random = np.random.default_rng(seed)
    middles = random.standard_normal((200, dimension), np.float32)
    base = unit(middles[random.integers(200, size=8000)] + random.standard_normal((8000, dimension), np.float32))
    final = unit(base[:questions] + random.standard_normal((questions, dimension), np.float32) / dimension)
    question = unit(
        final + random.standard_normal((questions, dimension), np.float32) / np.sqrt(dimension, dtype=np.float32)
    )
    written = {share: unit((1 - share) * question + share * final) for share in SHARES}
    return Material(base, question, written, "random")


def unit(vectors: npt.NDArray[np.floating]) -> FloatArray:
    """Of length 1, float32."""
    scaled: FloatArray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return scaled


class Block:
    """Host memory in huge pages where there are any; `HostLists` by its shape."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, PAGE_BYTES))
        with contextlib.suppress(OSError):  # a kernel without huge pages still works
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory = np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Free it."""
        del self.memory
        with contextlib.suppress(BufferError):  # somebody still looks at it, and their end frees it
            self._map.close()


def uniform(list_bytes: int, count: int) -> Index:
    """An index of lists that all take as many bytes, for moving only."""
    code_bytes = PAGE_BYTES - ID_BYTES
    table, _total = lay_out(np.full(count, max(1, list_bytes // PAGE_BYTES)), code_bytes)
    manifest = Manifest(
        code_bytes // 4, Metric.IP, Storage.FLOAT32, count, count, code_bytes, 0, EmbedderInfo(None), {}
    )
    return Index(IndexPaths(Path("(memory)")), manifest, np.zeros((count, 1), np.float32), table, None)


def packed(ivf: faiss.IndexIVF, folder: Path, centroids: FloatArray, metric: Metric, storage: Storage) -> Index:
    """The lists of a Faiss index as an index folder's ``lists.bin``, and the index over them."""
    nlist = len(centroids)
    sizes: IntArray = np.array([ivf.invlists.list_size(number) for number in range(nlist)])
    table, total = lay_out(sizes, ivf.code_size)
    image = np.zeros(total, np.uint8)
    for number, (size, capacity, offset) in enumerate(table.astype(np.int64).tolist()):
        if size:
            codes = faiss.rev_swig_ptr(ivf.invlists.get_codes(number), size * ivf.code_size)
            rows = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)
            image[offset : offset + len(codes)] = codes
            begin = offset + capacity * ivf.code_size
            image[begin : begin + ID_BYTES * size].view(np.int64)[:] = rows
    paths = IndexPaths(folder)
    image.tofile(paths.lists)
    trained = faiss.vector_to_array(ivf.sq.trained).copy() if storage is Storage.INT8 else None
    manifest = Manifest(
        centroids.shape[1], metric, storage, nlist, int(ivf.ntotal), int(ivf.code_size), 0, EmbedderInfo(None), {}
    )
    return Index(paths, manifest, centroids, table, trained)
