"""The script that makes large data: an index is like those of build-index, with each vector in its place."""

import shutil
import sys

import numpy as np
import pytest

import make_synthetic as script
from expect import fails
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.errors import ArtifactError, UsageError
from telerag_cli.index.artifact import ID_BYTES, Index
from telerag_cli.index.partial import partial_of
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import flat, scalar_quantizer
from telerag_cli.index.verify import verify
from vector_files import clustered, embeddings_folder

BASE, DIMENSION = 300, 24


@pytest.fixture
def base(tmp_path):
    return embeddings_folder(tmp_path / "base", clustered(BASE, DIMENSION), 128)


@pytest.fixture
def make(base, monkeypatch):
    """Run the script's command line."""

    def make(output, *flags, kind="index", size=("--vectors", 5000)):
        arguments = [kind, "--base", base, *size, "-o", output, *flags]
        monkeypatch.setattr(sys, "argv", ["make_synthetic.py", *map(str, arguments)])
        script.main()
        return Index.open(output) if kind == "index" else Embeddings.open(output)

    return make


def held(index):
    """(rows, list numbers, vectors as they decode) of all lists."""
    manifest = index.manifest
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
    if manifest.storage is Storage.FLOAT32:
        vectors = codes.view(np.float32)
    else:
        vectors = scalar_quantizer(manifest.dimension, manifest.storage, index.trained).decode(codes)
    return np.concatenate(rows), np.concatenate(numbers), vectors


@pytest.mark.parametrize("storage", Storage)
def test_every_vector_is_a_noisy_copy_in_the_list_of_its_nearest_centroid(tmp_path, make, storage):
    index = make(tmp_path / "index", "--nlist", 40, "--storage", storage, size=("--vectors", 5000))
    assert not verify(index, lambda _count: None)
    manifest = index.manifest
    assert (manifest.ntotal, manifest.nlist, manifest.storage) == (5000, 40, storage)
    assert (manifest.embedder.model, manifest.embedder.pooling, manifest.embedder.normalized) == ("m", "mean", True)
    rows, numbers, vectors = held(index)
    assert sorted(rows.tolist()) == list(range(5000))
    clips = storage is Storage.INT8
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.1 if clips else 0.001)
    nearest = flat(index.centroids, Metric.IP).search(vectors, 1)[1][:, 0]
    assert (nearest == numbers).mean() > (0.95 if clips else 0.99)
    passages = Passages.open(index.paths.passages)
    copied = np.array([int(passage.id.split("-")[0]) for passage in passages[rows]])
    real = clustered(BASE, DIMENSION)
    near = np.einsum("ij,ij->i", vectors, real[copied])
    # A vector of length 1 and noise of length 0.5 across it, and again of length 1.
    assert abs(np.median(near) - 1 / np.sqrt(1.25)) < 0.03
    assert (np.einsum("ij,ij->i", vectors, real[np.roll(copied, 1)]) > near).mean() < 0.2


def test_lists_are_as_uneven_as_those_of_the_same_vectors_assigned(tmp_path, make):
    index = make(tmp_path / "index", "--nlist", 40, size=("--vectors", 20_000))
    drawn = script.noisy(clustered(BASE, DIMENSION)[np.arange(20_000) % BASE], 0.5, np.random.default_rng(5))
    sizes = np.bincount(flat(index.centroids, Metric.IP).search(drawn, 1)[1][:, 0], minlength=40)
    assert np.corrcoef(sizes, index.sizes)[0, 1] > 0.9
    assert index.manifest.balance["imbalance"] == pytest.approx(40 * (sizes**2).sum() / 20_000**2, rel=0.1)


def test_the_passages_are_those_of_the_base_rows_each_copy_with_its_number(tmp_path, make):
    found = Passages.open(make(tmp_path / "index", size=("--vectors", 2500)).paths.passages)[range(2500)]
    names = {passage.id for passage in found}
    assert len(names) == 2500
    for passage in found[::97]:
        row, copy = passage.id.split("-")
        assert (passage.text, passage.metadata) == (f"Text {row}", {"title": f"T{row}"})
        assert all(f"{row}-{earlier}" in names for earlier in range(int(copy)))


def test_equal_arguments_give_equal_bytes_and_another_seed_others(tmp_path, make):
    first, again, other = (
        make(tmp_path / str(number), "--storage", "float16", "--seed", seed) for number, seed in enumerate((0, 0, 1))
    )
    for name in first.manifest.files | {"manifest.json": None}:
        assert (first.paths.root / name).read_bytes() == (again.paths.root / name).read_bytes()
    assert other.manifest.files["lists.bin"] != again.manifest.files["lists.bin"]


def test_the_same_lists_in_memory(tmp_path, base, make):
    index = make(tmp_path / "index", "--nlist", 40, "--storage", "int8")
    lists = script.plan_lists(script.Base.load(base).vectors, 5000, 40, Storage.INT8, 0.5, 0)
    store = script.Datastore(lists)
    assert (store.index.table == index.table).all()
    assert (store.index.trained == index.trained).all()
    assert bytes(store.memory) == index.paths.lists.read_bytes()
    store.close()


def test_bytes_are_those_of_the_codes_and_long_passages_are_left_out(tmp_path, make, capsys):
    index = make(tmp_path / "index", "--longest", len("Text 9"), size=("--bytes", "100kB"))
    assert index.manifest.ntotal == -(-100_000 // (4 * DIMENSION))
    texts = {passage.text for passage in Passages.open(index.paths.passages)[range(1042)]}
    assert texts == {f"Text {n}" for n in range(10)}
    for flags in (["--longest", 3], ["--nlist", 5001]):
        with pytest.raises(SystemExit) as caught:
            make(tmp_path / "other", *flags)
        assert str(flags[1]) in caught.value.code.replace(",", "")


def test_what_is_there_is_kept_and_an_interruption_leaves_no_index(tmp_path, make, monkeypatch, capsys):
    output = tmp_path / "index"

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as here:
        here.setattr(script, "seal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(output)
        assert (output.exists(), partial_of(output).exists()) == (False, True)
    make(output)
    assert not partial_of(output).exists()
    with monkeypatch.context() as here:
        here.setattr(script, "plan_lists", interrupted)
        make(output)  # it is there already
    with pytest.raises(SystemExit) as caught:
        make(output, "--seed", 3)
    assert isinstance(caught.value.__context__, ArtifactError)
    assert make(output, "--seed", 3, "--overwrite").manifest.seed == 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(SystemExit) as caught:
        make(tmp_path / "no")
    assert "1000 B" in caught.value.code


def test_embeddings_are_noisy_copies_and_resume_at_the_shard(tmp_path, make, base, monkeypatch):
    monkeypatch.setattr(script, "SHARD_ROWS", 400)
    made = make(tmp_path / "a", kind="embeddings", size=("--vectors", 1000))
    assert (made.rows, len(made.shards), made.description["model"]) == (1000, 3, "m")
    vectors = np.concatenate([block.copy() for _, block in made.batches(100)])
    ids = [name for batch in made.passages() for name in batch.column(0).to_pylist()]
    assert len(set(ids)) == 1000
    near = (vectors * clustered(BASE, DIMENSION)[[int(name.split("-")[0]) for name in ids]]).sum(1)
    assert abs(np.median(near) - 1 / np.sqrt(1.25)) < 0.03
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    (tmp_path / "a" / "shard-00001.parquet").unlink()
    make(tmp_path / "a", kind="embeddings", size=("--vectors", 1000))
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    with fails(UsageError, 1000, 1001):
        script.make_embeddings(script.Base.load(base), 1001, 0.5, 0, tmp_path / "a")
