"""The script that makes large indexes: what it makes is an index like those of build-index, each vector in its place."""

import shutil
import sys
from argparse import Namespace

import numpy as np
import pyarrow as pa
import pytest

import make_synthetic_index as script
from telerag_cli.config import Metric, Storage
from telerag_cli.errors import ArtifactError, UsageError
from telerag_cli.index.artifact import ID_BYTES, Index, extent_bytes
from telerag_cli.index.partial import partial_of
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import empty_ivf, flat
from telerag_cli.index.verify import verify
from vector_files import clustered, embeddings_folder

BASE, DIMENSION = 300, 24


@pytest.fixture
def base(tmp_path):
    return embeddings_folder(tmp_path / "base", clustered(BASE, DIMENSION), 128)


def options(base, output, **changes):
    asked = {
        "base": base,
        "vectors": 5000,
        "bytes": None,
        "nlist": 40,
        "storage": "float32",
        "noise": 0.5,
        "longest": None,
        "seed": 0,
        "overwrite": False,
        "output": output,
    }
    return Namespace(**asked | changes)


def made(base, output, **changes):
    script.make(options(base, output, **changes))
    return Index.open(output)


def held(index):
    """(rows, list numbers, vectors as they decode) of all lists."""
    manifest = index.manifest
    ivf = empty_ivf(
        flat(index.centroids, Metric.IP), manifest.dimension, manifest.nlist, Metric.IP, manifest.storage, index.trained
    )
    rows, numbers, codes = [], [], []
    for number, (size, capacity, offset) in enumerate(index.table.astype(np.int64).tolist()):
        raw = np.fromfile(index.paths.lists, np.uint8, int(index.list_bytes[number]), offset=offset)
        codes.append(raw[: size * manifest.code_size].reshape(size, manifest.code_size))
        begin = capacity * manifest.code_size
        rows.append(raw[begin : begin + size * ID_BYTES].view(np.int64))
        numbers.append(np.full(size, number))
        assert not raw[size * manifest.code_size : begin].any()
        assert not raw[begin + size * ID_BYTES :].any()
    codes = np.concatenate(codes)
    vectors = codes.view(np.float32) if manifest.storage is Storage.FLOAT32 else ivf.sq.decode(codes)
    return np.concatenate(rows), np.concatenate(numbers), vectors.reshape(len(codes), -1)


@pytest.mark.parametrize("storage", Storage)
def test_every_vector_is_a_noisy_copy_in_the_list_of_its_nearest_centroid(tmp_path, base, storage):
    index = made(base, tmp_path / "index", storage=str(storage))
    assert not verify(index, lambda _count: None)
    manifest = index.manifest
    assert (manifest.ntotal, manifest.nlist, manifest.storage) == (5000, 40, storage)
    assert (manifest.embedder.model, manifest.embedder.pooling, manifest.embedder.normalized) == ("m", "mean", True)
    rows, numbers, vectors = held(index)
    assert sorted(rows.tolist()) == list(range(5000))
    np.testing.assert_allclose(
        np.linalg.norm(vectors, axis=1), 1, atol=0.1 if storage is Storage.INT8 else 0.001
    )  # int8 clips
    nearest = flat(index.centroids, Metric.IP).search(vectors, 1)[1][:, 0]
    assert (nearest == numbers).mean() > (0.99 if storage is not Storage.INT8 else 0.95)
    passages = Passages.open(index.paths.passages)
    copied = np.array([int(passage.id.split("-")[0]) for passage in passages[rows]])
    real = clustered(BASE, DIMENSION)
    near = np.einsum("ij,ij->i", vectors, real[copied])
    # A vector of length 1 and noise of length 0.5 across it, and again of length 1.
    assert abs(np.median(near) - 1 / np.sqrt(1.25)) < 0.03
    assert (np.einsum("ij,ij->i", vectors, real[np.roll(copied, 1)]) > near).mean() < 0.2


def test_lists_are_as_uneven_as_those_of_the_same_vectors_assigned(tmp_path, base):
    index = made(base, tmp_path / "index", vectors=20_000)
    random = np.random.default_rng(5)
    real = script.unit(clustered(BASE, DIMENSION))
    drawn = script.noisy(real[np.arange(20_000) % BASE], 0.5, random)
    sizes = np.bincount(flat(index.centroids, Metric.IP).search(drawn, 1)[1][:, 0], minlength=40)
    assert np.corrcoef(sizes, index.sizes)[0, 1] > 0.9
    assert index.manifest.balance["imbalance"] == pytest.approx(40 * (sizes**2).sum() / 20_000**2, rel=0.1)


def test_the_passages_are_those_of_the_base_rows_each_copy_with_its_number(tmp_path, base):
    index = made(base, tmp_path / "index", vectors=2500)
    passages = Passages.open(index.paths.passages)
    found = passages[range(2500)]
    names = {passage.id for passage in found}
    assert len(names) == 2500
    for passage in found[::97]:
        row, copy = passage.id.split("-")
        assert passage.text == f"Text {row}"
        assert passage.metadata == {"title": f"T{row}"}
        assert all(f"{row}-{earlier}" in names for earlier in range(int(copy)))


def test_equal_arguments_give_equal_bytes_and_another_seed_others(tmp_path, base):
    first = made(base, tmp_path / "a", storage="float16")
    again = made(base, tmp_path / "b", storage="float16")
    for name in first.manifest.files | {"manifest.json": None}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = made(base, tmp_path / "c", storage="float16", seed=1)
    assert other.manifest.files["lists.bin"] != again.manifest.files["lists.bin"]


def test_the_same_lists_in_memory(tmp_path, base):
    index = made(base, tmp_path / "index", storage="int8")
    vectors = script.load(base)[0]
    block, view = script.plan_lists(vectors, 5000, 40, Storage.INT8, 0.5, 0).in_memory()
    assert (view.table == index.table).all()
    assert (view.trained == index.trained).all()
    assert bytes(block.memory[: extent_bytes(view.table[:, 1], DIMENSION).sum()]) == index.paths.lists.read_bytes()
    block.close()


def test_bytes_are_those_of_the_codes_and_long_passages_are_left_out(tmp_path, base):
    index = made(base, tmp_path / "index", vectors=None, bytes="100kB", nlist=None, longest=len("Text 9"))
    assert index.manifest.ntotal == -(-100_000 // (4 * DIMENSION))
    assert {passage.text for passage in Passages.open(index.paths.passages)[range(1042)]} == {
        f"Text {n}" for n in range(10)
    }
    with pytest.raises(UsageError, match="no passage of at most 3 characters"):
        made(base, tmp_path / "other", longest=3)
    with pytest.raises(UsageError, match="50 lists were asked for, and 49 vectors"):
        made(base, tmp_path / "other", vectors=49, nlist=50)


def test_what_is_there_is_kept_and_an_interruption_leaves_no_index(tmp_path, base, monkeypatch, capsys):
    output = tmp_path / "index"
    write = script.write_lists

    def interrupted(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as here:
        here.setattr(script, "write_lists", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(base, output)
    assert not output.exists()
    assert partial_of(output).exists()
    made(base, output)
    assert not partial_of(output).exists()
    with monkeypatch.context() as here:
        here.setattr(script, "write_lists", lambda *_arguments: pytest.fail("it is there already"))
        made(base, output)
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match=r"was built with source synthetic .* --overwrite"):
        made(base, output, seed=3)
    assert made(base, output, seed=3, overwrite=True).manifest.seed == 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    monkeypatch.setattr(sys, "argv", ["make", "--base", str(base), "--vectors", "500", "-o", str(tmp_path / "no")])
    with pytest.raises(SystemExit, match=r"error: .*no needs .* of disk, and 1000 B are free"):
        script.main()


def test_passages_may_be_dictionaries(tmp_path):
    texts = pa.array(["a", "b"])
    list(
        script.write_passages(
            script.passages_of(np.array([1, 0, 1]), texts, pa.array(["{}", '{"n": 1}'])),
            tmp_path / "p.arrow",
            script.SCHEMA,
        )
    )
    found = Passages.open(tmp_path / "p.arrow")[[2, 1, 0]]
    assert [(p.id, p.text, dict(p.metadata)) for p in found] == [
        ("1-1", "b", {"n": 1}),
        ("0-0", "a", {}),
        ("1-0", "b", {"n": 1}),
    ]
