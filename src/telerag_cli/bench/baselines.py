"""What telerag is compared with: Faiss as it comes, other stores, and no retrieval at all. Each at its best."""

from __future__ import annotations

import ctypes
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import faiss
import numpy as np

from telerag_cli.arrays import ByteArray, FloatArray, IntArray
from telerag_cli.corpus.passages import Retrieved
from telerag_cli.errors import ModelError, ResourceError
from telerag_cli.index.artifact import ID_BYTES, Index
from telerag_cli.index.scoring import Coarse, empty_ivf
from telerag_cli.prefetch.prefetcher import Prefetch
from telerag_cli.progress import Advance
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.retrieval.retriever import Neighbours, Retrieval, Search


def plain_join(took_s: float) -> JoinReport:
    """Return the report of a search without a fast tier, which has no lists to count."""
    counts: dict[str, Any] = dict.fromkeys(JoinReport.count_names(), 0)
    return JoinReport(**counts, coarse_s=0.0, score_s=0.0, join_s=took_s)


class Plain(ABC):
    """Searches that nothing prepares: one after the other, each timed."""

    def __init__(self, index: Index) -> None:
        self.index = index

    @abstractmethod
    def find(self, queries: FloatArray, k: int, nprobe: int) -> tuple[FloatArray, IntArray]:
        """Scores and rows, (n, k), best first."""

    def search_batch(self, searches: Sequence[Search], k: int, nprobe: int) -> list[Neighbours]:
        """See `Searcher`."""
        found = []
        for search in searches:
            began_s = time.perf_counter()
            scores, rows = self.find(np.ascontiguousarray(search.queries), k, nprobe)
            found.append(Neighbours(scores, rows, plain_join(time.perf_counter() - began_s)))
        return found


class FaissIvf(Plain):
    """A ``faiss.IndexIVF`` that probes its lists on all cores, ``parallel_mode`` 1, whatever holds the lists."""

    ivf: Any = None

    def find(self, queries: FloatArray, k: int, nprobe: int) -> tuple[FloatArray, IntArray]:
        """See `Plain`."""
        self.ivf.nprobe = nprobe
        scores, rows = self.ivf.search(queries, k)
        return scores, rows

    def _empty(self, coarse: Coarse) -> Any:
        manifest = self.index.manifest
        ivf = empty_ivf(
            coarse.index, manifest.dimension, manifest.nlist, manifest.metric, manifest.storage, self.index.trained
        )
        ivf.parallel_mode = 1
        return ivf


class FaissOnDisk(FaissIvf):
    """Faiss's ``OnDiskInvertedLists`` over the very ``lists.bin``, mapped into memory."""

    def __init__(self, index: Index, coarse: Coarse) -> None:
        super().__init__(index)
        self._coarse = coarse
        self._lists: Any = None

    def unmap(self) -> None:
        """Close the mapping: the kernel drops no pages that are mapped."""
        self.ivf = self._lists = None

    def map(self) -> None:
        """Map the file, read-only, unless it is mapped."""
        if self.ivf is not None:
            return
        manifest = self.index.manifest
        lists = faiss.OnDiskInvertedLists()
        lists.nlist, lists.code_size, lists.read_only = manifest.nlist, manifest.code_size, True
        lists.filename = os.fspath(self.index.paths.lists)
        lists.totsize = self.index.paths.lists.stat().st_size
        lists.lists.resize(manifest.nlist)
        words = (ctypes.c_uint64 * (3 * manifest.nlist)).from_address(int(lists.lists.data().this))
        np.ctypeslib.as_array(words).reshape(-1, 3)[:] = self.index.table
        lists.do_mmap()
        ivf = self._empty(self._coarse)
        ivf.replace_invlists(lists, False)
        ivf.ntotal = manifest.ntotal
        self.ivf, self._lists = ivf, lists


def read_lists(index: Index, advance: Advance) -> Iterator[tuple[int, ByteArray, IntArray]]:
    """Yield number, codes (bytes, end to end) and rows of each list that has any; ``advance`` gets the bytes read."""
    code_size = index.manifest.code_size
    with index.paths.lists.open("rb", buffering=0) as file:
        for number, (size, capacity, offset) in enumerate(index.table.astype(np.int64).tolist()):
            if size:
                length = capacity * (code_size + ID_BYTES)
                data = np.fromfile(file, np.uint8, length, offset=offset - file.tell())
                rows = np.ascontiguousarray(data[capacity * code_size :].view(np.int64)[:size])
                yield number, data[: size * code_size], rows
                advance(int(index.list_bytes[number]))


class FaissMemory(FaissIvf):
    """Faiss's own lists in RAM, all of them."""

    def __init__(self, index: Index, coarse: Coarse, advance: Advance) -> None:
        super().__init__(index)
        manifest = index.manifest
        self.ivf = self._empty(coarse)
        for number, codes, rows in read_lists(index, advance):
            self.ivf.invlists.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(codes))
        self.ivf.ntotal = manifest.ntotal


class FaissGpu(FaissIvf):
    """A copy of Faiss's index on a GPU; making one raises ResourceError if Faiss has no such GPU."""

    def __init__(self, memory: FaissMemory, device: int) -> None:
        super().__init__(memory.index)
        if not hasattr(faiss, "StandardGpuResources"):
            raise ResourceError(
                "The Faiss installed here was built without GPUs, and faiss-gpu needs one.",
                remedy="Install the extra gpu in place of cpu, or leave out --system faiss-gpu.",
            )
        if device >= faiss.get_num_gpus():
            raise ResourceError(
                f"faiss-gpu needs GPU {device}, and Faiss sees {faiss.get_num_gpus()}.",
                remedy="Name another --device, or leave out --system faiss-gpu.",
            )
        self._resources = faiss.StandardGpuResources()
        self.ivf = faiss.index_cpu_to_gpu(self._resources, device, memory.ivf)


class Recalled:
    """Passages that another system has found for the same queries, at no cost: what the LLM alone takes."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], list[Retrieved]] = {}

    def remember(self, retrievals: Sequence[Retrieval]) -> None:
        """Keep what was found."""
        self._found |= {each.queries: each.found for each in retrievals}

    async def find(self, queries: Sequence[str], rounds: Sequence[Prefetch]) -> Retrieval:
        """See `Finder`; raises ModelError if no other system had that query, as the LLM has written other texts."""
        found = self._found.get(tuple(queries))
        if found is None:
            raise ModelError(
                f"llm-only has no passages for {list(queries)!r:.80}: no other system had that query.",
                remedy="Use weights whose texts do not depend on what runs beside them, or --trace.",
            )
        return Retrieval(tuple(queries), found, plain_join(0.0), 0.0)

    def close(self) -> None:
        """Nothing is held."""
