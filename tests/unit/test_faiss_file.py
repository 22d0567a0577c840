"""Reading Faiss's files: what cannot be represented, is damaged or lies elsewhere."""

import faiss
import numpy as np
import pytest

from expect import fails
from faiss_files import faiss_index, imported, same_results, write, write_on_disk, write_passages
from indexes import make_vectors
from telerag_cli.config import Metric, Storage
from telerag_cli.errors import InputError, TeleragError
from telerag_cli.index.faiss_file import read_faiss


def other(kind):
    vectors = make_vectors(400, 8, 0)

    def factory(text, metric=faiss.METRIC_L2):
        index = faiss.index_factory(8, text, metric)
        index.train(vectors)
        if text.startswith("IDMap"):
            index.add_with_ids(vectors, np.arange(400))
        else:
            index.add(vectors)
        return index

    if kind == "mixed":
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(8), 8, 4, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
    elif kind == "empty":
        index = factory("IVF4,Flat")
        index.reset()
    elif kind == "no lists":
        index = factory("IVF4,Flat")
        index.replace_invlists(None, False)
    elif kind == "untrained":
        index = faiss.index_factory(8, "IVF4,Flat")
    elif kind == "L1":
        quantizer = faiss.IndexFlat(8, faiss.METRIC_L1)
        quantizer.add(vectors[:4])
        index = faiss.IndexIVFFlat(quantizer, 8, 4, faiss.METRIC_L1)
        index.train(vectors)
        index.add(vectors)
        return index, quantizer
    else:
        index = factory(kind)
    return index, None


SUPPORTED = ("IndexIVFFlat", "IndexIVFScalarQuantizer")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("Flat", ("IndexFlat", *SUPPORTED)),
        ("HNSW8", ("IndexHNSW", *SUPPORTED)),
        ("IVF4,PQ2x4", ("IndexIVFPQ", *SUPPORTED)),
        ("PCA4,IVF4,Flat", ("IndexPreTransform", "inner.index")),
        ("IDMap,IVF4,Flat", ("IndexIDMap", "inner.index")),
        ("IVF4,SQ8", ("by_residual = True", "by_residual = False")),
        ("IVF4,SQfp16", ("by_residual = True", "by_residual = False")),
        ("IVF4,SQ4", ("4bit", "fp16", "8bit")),
        ("IVF4_HNSW4,Flat", ("IndexHNSW", "IndexFlat")),
        ("mixed", (Metric.L2, Metric.IP)),
        ("L1", ("metric 2",)),
        ("empty", ("vectors",)),
        ("no lists", ("lists",)),
        ("untrained", ("trained",)),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path, kind, values):
    index, _kept = other(kind)
    with fails(InputError, "f.index", *values):
        read_faiss(write(index, tmp_path / "f.index"))


@pytest.mark.parametrize("content", [None, b"", b"Iw", b"PK\3\4 and so on", b'{"a": 1}', b"IxZZ" + bytes(100)])
def test_what_is_not_a_faiss_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "f.index").write_bytes(content)
    with fails(InputError, tmp_path / "f.index"):
        read_faiss(tmp_path / "f.index")
    with fails(InputError, tmp_path):
        read_faiss(tmp_path)


@pytest.mark.parametrize("storage", [Storage.FLOAT32, Storage.INT8])
@pytest.mark.parametrize("written", [write, write_on_disk])
def test_a_file_cut_anywhere_is_refused(tmp_path, storage, written):
    ivf, _ = faiss_index(storage=storage, count=20, dimension=4, nlist=3)
    whole = written(ivf, tmp_path / "f.index").read_bytes()
    for length in (*range(4, len(whole) - 1, 5), len(whole) - 1):
        (tmp_path / "f.index").write_bytes(whole[:length])
        with fails(InputError, "f.index", f"{length:,}"):
            read_faiss(tmp_path / "f.index")
    (tmp_path / "f.index").write_bytes(whole)
    read_faiss(tmp_path / "f.index")


@pytest.mark.parametrize("written", [write, write_on_disk])
def test_damage_is_an_error_of_ours_or_harmless(tmp_path, written):
    """Numbers that cannot be are found before memory is taken for them, which Faiss's own reader does not do."""
    ivf, _ = faiss_index(storage=Storage.INT8, count=20, dimension=4, nlist=3)
    whole = written(ivf, tmp_path / "f.index").read_bytes()
    refused = 0
    for place in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[place] ^= 0x80
        (tmp_path / "f.index").write_bytes(damaged)
        try:
            read_faiss(tmp_path / "f.index")
        except TeleragError:
            refused += 1
    assert refused > 50


def test_a_data_file_is_looked_for_beside_the_index(tmp_path):
    ivf, vectors = faiss_index()
    (tmp_path / "old").mkdir()
    file = write_on_disk(ivf, tmp_path / "old" / "f.index")
    moved = (tmp_path / "old").rename(tmp_path / "new") / file.name
    passages = write_passages(tmp_path / "p.jsonl")
    same_results(imported(moved, passages, tmp_path / "index"), ivf, vectors)
    data = moved.with_suffix(".ivfdata")
    data.write_bytes(data.read_bytes()[:-5000])
    with fails(InputError, data, f"{data.stat().st_size:,}"):
        read_faiss(moved)
    data.unlink()
    with fails(InputError, "old/f.ivfdata", "new/f.ivfdata"):
        read_faiss(moved)
