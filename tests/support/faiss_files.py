"""Faiss's files and passages for them, importing them, and comparing what both find."""

import contextlib
import json

import faiss
import numpy as np

from indexes import expected, make_vectors
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.sources import find_sources
from telerag_cli.index.faiss_file import read_faiss
from telerag_cli.index.faiss_import import import_index, plan_import
from telerag_cli.index.scoring import Coarse, empty_ivf, flat
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.host import open_host_tier

DIMENSION, COUNT, NLIST = 12, 300, 9


def faiss_index(
    metric=Metric.IP, storage=Storage.FLOAT32, *, count=COUNT, dimension=DIMENSION, nlist=NLIST, seed=0, ids=None
):
    vectors = make_vectors(count, dimension, seed, duplicates=count // 20)
    ivf = empty_ivf(flat(vectors[:nlist], metric), dimension, nlist, metric, storage)
    if storage is Storage.INT8:
        ivf.train(vectors)
    ivf.add_with_ids(vectors, np.random.default_rng(seed).permutation(count) if ids is None else ids)
    return ivf, vectors


def write(ivf, path):
    faiss.write_index(ivf, str(path))
    return path


def write_on_disk(ivf, path):
    """With `OnDiskInvertedLists`, filled a little at a time, which leaves room in some lists."""
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, str(path.with_suffix(".ivfdata")))
    for number in range(ivf.nlist):
        size = ivf.invlists.list_size(number)
        if not size:
            continue
        ids = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size).copy()
        codes = faiss.rev_swig_ptr(ivf.invlists.get_codes(number), size * ivf.code_size).copy()
        for low in range(0, size, 20):
            part = codes[low * ivf.code_size :]
            lists.add_entries(number, min(20, size - low), faiss.swig_ptr(ids[low:]), faiss.swig_ptr(part))
    copy = faiss.deserialize_index(faiss.serialize_index(ivf))
    copy.replace_invlists(lists, False)
    return write(copy, path)


def write_passages(path, count=COUNT):
    lines = [json.dumps({"id": f"p{n}", "text": f"Passage {n}.", "title": f"T{n}"}) for n in range(count)]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def imported(file, passages, root, embedder=None, **options):
    return import_index(plan_import(read_faiss(file), find_sources([str(passages)]), root, embedder), **options)


def search(index, queries, k, nprobe):
    coarse = Coarse(index.centroids, index.manifest.metric)
    tier = open_host_tier(index, coarse, int(index.list_bytes.sum()))
    with contextlib.closing(Retriever(index, coarse, tier)) as retriever:
        found = retriever.search(queries, k, nprobe)
    return found.scores, found.rows


def same_results(index, ivf, vectors, k=20):
    queries = vectors[:6] + np.float32(0.1)
    for nprobe in {1, min(4, ivf.nlist), ivf.nlist}:
        found_scores, found_rows = search(index, queries, k, nprobe)
        scores, faiss_rows, ordered = expected(ivf, index.manifest.metric, queries, k, nprobe)
        np.testing.assert_array_equal(found_scores, scores)
        np.testing.assert_array_equal(found_rows, ordered)
        alone = np.array([[(line == score).sum() == 1 for score in line[:-1]] for line in scores])
        np.testing.assert_array_equal(found_rows[:, :-1][alone], faiss_rows[:, :-1][alone])
