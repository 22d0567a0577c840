"""Building an index: its lists are those of Faiss, its numbers are right, and what cannot be built is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from typer.testing import CliRunner

from expect import fails
from telerag_cli.cli.app import app
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.errors import ArtifactError, ResourceError, UsageError
from telerag_cli.index.artifact import ID_BYTES, Index
from telerag_cli.index.build import BuildConfig, build_index, norms_note, plan_build
from telerag_cli.index.partial import partial_of
from telerag_cli.index.recall import NEIGHBOURS, Nearest
from telerag_cli.index.scoring import empty_ivf, flat
from telerag_cli.index.train import auto_nlist, draw_rows, find_gpu, plan_training
from vector_files import clustered, write_parquet

runner = CliRunner()


def vectors_of(index, number):
    """Codes (size, code_size) and row numbers of one list, read from the file by the documented layout."""
    size, capacity, offset = (int(value) for value in index.table[number])
    code = index.manifest.code_size
    raw = np.fromfile(index.paths.lists, np.uint8, int(index.list_bytes[number]), offset=offset)
    rows = raw[capacity * code : capacity * (code + ID_BYTES)].view(np.int64)
    assert not rows[size:].any()
    assert not raw[size * code : capacity * code].any()
    assert not raw[capacity * (code + ID_BYTES) :].any()
    return raw[: size * code].reshape(size, code), rows[:size]


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("metric", Metric)
def test_lists_are_those_of_faiss(tmp_path, metric, storage):
    vectors = clustered(35_000, 20)  # three blocks to assign; codes of 20 bytes ask for padded capacities
    source = write_parquet(tmp_path / "e.parquet", vectors)
    index = build_index(source, tmp_path / "index", BuildConfig(64, metric, storage))
    quantizer = flat(index.centroids, metric)
    reference = empty_ivf(quantizer, 20, 64, metric, storage, index.trained)
    reference.add(vectors)
    for number in range(64):
        codes, rows = vectors_of(index, number)
        size = reference.invlists.list_size(number)
        assert rows.tolist() == faiss.rev_swig_ptr(reference.invlists.get_ids(number), size).tolist()
        expected = faiss.rev_swig_ptr(reference.invlists.get_codes(number), size * index.manifest.code_size)
        assert codes.ravel().tolist() == expected.tolist()


def test_int8_ranges_are_those_faiss_trains(tmp_path):
    vectors = clustered(3000, 16)
    source = write_parquet(tmp_path / "e.parquet", vectors)
    options = BuildConfig(8, Metric.L2, Storage.INT8)
    index = build_index(source, tmp_path / "index", options)
    training, held_out = draw_rows(3000, plan_training(3000, 16, 8, 1 << 20), options.seed)
    assert not set(training) & set(held_out)
    reference = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatL2(16), 16, 8, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2, False
    )
    reference.train(vectors[training])
    assert faiss.vector_to_array(reference.sq.trained).tolist() == index.trained.tolist()


@pytest.mark.parametrize("metric", Metric)
def test_recall_in_the_manifest_is_what_faiss_finds(tmp_path, metric):
    vectors = clustered(20_000, 24)
    source = write_parquet(tmp_path / "e.parquet", vectors)
    index = build_index(source, tmp_path / "index", BuildConfig(100, metric, Storage.INT8))
    manifest = index.manifest
    _, held_out = draw_rows(20_000, plan_training(20_000, 24, 100, 1 << 30), 0)
    exact = faiss.IndexFlat(24, faiss.METRIC_INNER_PRODUCT if metric is Metric.IP else faiss.METRIC_L2)
    exact.add(vectors)
    searched = empty_ivf(flat(index.centroids, metric), 24, 100, metric, Storage.INT8, index.trained)
    searched.add(vectors)

    def found(engine):
        return [
            [row for row in line if row != own][:NEIGHBOURS]
            for own, line in zip(held_out, engine.search(vectors[held_out], NEIGHBOURS + 1)[1], strict=True)
        ]

    truth = found(exact)
    assert set(manifest.recall_at_10) == {"1", "4", "16", "32", "64", "100"}
    for nprobe, recall in manifest.recall_at_10.items():
        searched.nprobe = int(nprobe)
        hits = sum(len(set(a) & set(b)) for a, b in zip(truth, found(searched), strict=True))
        assert recall == pytest.approx(hits / (len(held_out) * NEIGHBOURS), abs=2e-3)
    assert manifest.recall_at_10["1"] < manifest.recall_at_10["32"]
    assert manifest.recall_queries == len(held_out) == 256


def test_nearest_in_blocks_is_nearest_at_once():
    vectors = clustered(5000, 8)
    own = np.array([3, 1999, 2000, 4999])
    in_blocks, at_once = (Nearest(vectors[own], own, Metric.L2) for _ in range(2))
    at_once.merge(at_once.found(0, vectors, at_once.least))
    for first in range(0, 5000, 700):
        in_blocks.merge(in_blocks.found(first, vectors[first : first + 700], in_blocks.least))
    assert (in_blocks.rows == at_once.rows).all()
    assert not (in_blocks.rows == own[:, None]).any()
    distances = ((vectors[own][:, None] - vectors[None]) ** 2).sum(-1)
    assert (in_blocks.rows == np.argsort(distances, axis=1)[:, 1 : NEIGHBOURS + 1]).all()


def test_manifest_numbers(tmp_path):
    vectors = clustered(2000, 8)
    source = write_parquet(tmp_path / "e.parquet", vectors)
    index = build_index(source, tmp_path / "index", BuildConfig(16))
    sizes = index.sizes
    assert sizes.sum() == index.manifest.ntotal == 2000
    balance = index.manifest.balance
    assert (balance["min"], balance["max"], balance["empty"]) == (sizes.min(), sizes.max(), (sizes == 0).sum())
    reference = empty_ivf(flat(index.centroids, Metric.IP), 8, 16, Metric.IP, Storage.FLOAT32)
    reference.add(vectors)
    assert balance["imbalance"] == pytest.approx(reference.invlists.imbalance_factor(), abs=1e-3)
    files = {path.name for path in (tmp_path / "index").iterdir()}
    assert files == {
        "centroids.npy",
        "checksums.npy",
        "lists.bin",
        "manifest.json",
        "offsets.npy",
        "passages.arrow",
        "passages.npy",
    }
    assert not partial_of(tmp_path / "index").exists()
    assert str(tmp_path) not in (tmp_path / "index" / "manifest.json").read_text()


def test_empty_lists(tmp_path):
    vectors = np.repeat(np.eye(4, 8, dtype=np.float32), 30, axis=0)  # four places for twenty centroids
    source = write_parquet(tmp_path / "e.parquet", vectors)
    index = build_index(source, tmp_path / "index", BuildConfig(20, Metric.L2))
    assert index.manifest.balance["empty"] == (index.sizes == 0).sum() >= 16
    rows = np.concatenate([vectors_of(index, number)[1] for number in range(20)])
    assert sorted(rows.tolist()) == list(range(120))


@pytest.mark.parametrize("rows", [1, 2, 11])
def test_tiny_corpora(tmp_path, rows):
    source = write_parquet(tmp_path / "e.parquet", clustered(rows, 8))
    index = build_index(source, tmp_path / "index", BuildConfig())
    assert (index.manifest.nlist, index.manifest.ntotal) == (1, rows)
    assert vectors_of(index, 0)[1].tolist() == list(range(rows))
    assert index.manifest.recall_at_10 == ({"1": 1.0} if rows == 11 else {})


def test_auto_nlist():
    assert [auto_nlist(n) for n in (1, 77, 78, 5000, 100_000, 5_200_000)] == [1, 1, 2, 128, 1024, 8192]
    for n in (10**3, 10**5, 10**7):
        assert plan_training(n, 4, None, 1 << 30).training_rows >= 39 * auto_nlist(n) or n < 10**4
    small = plan_training(10**7, 1024, None, 16 << 20)
    assert small.training_rows * 4096 <= 16 << 20
    assert small.nlist == 64  # 4096 vectors fit the memory: at least 39 for each of 64


def test_more_lists_than_vectors_names_both(tmp_path):
    source = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    with fails(UsageError, 51, 50):
        plan_build(source, tmp_path / "index", BuildConfig(51))
    assert build_index(source, tmp_path / "index", BuildConfig(50)).manifest.nlist == 50


def test_memory_is_bounded(tmp_path):
    """A build of 154 MB of vectors under --memory 128MiB grows by less than that over a tiny build."""
    small = write_parquet(tmp_path / "small.parquet", clustered(2000, 128))
    large = write_parquet(tmp_path / "large.parquet", clustered(300_000, 128), group=100_000)
    peaks = []
    code = (
        "import resource, sys\nfrom telerag_cli.cli.app import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    options = ["--nlist", "64", "--memory", "128MiB"]
    for source in (small, large):
        command = [sys.executable, "-c", code, "build-index", source, "-o", source.with_suffix(".index"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert large.stat().st_size > 128 << 20
    assert peaks[1] - peaks[0] < 128 << 20


def test_too_little_memory_is_refused(tmp_path):
    source = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    with fails(UsageError, "--memory", "1.00 MiB"):
        plan_build(source, tmp_path / "index", BuildConfig(memory_bytes=1 << 20))


# Where k-means runs


def library(gpus=None):
    """Stands in for ``faiss``: without support for GPUs, or with it and this many of them."""
    support = {} if gpus is None else {"StandardGpuResources": object, "get_num_gpus": lambda: gpus}
    return SimpleNamespace(__version__="1.2.3", **support)


def test_the_gpu_that_is_found():
    assert [find_gpu("auto", library(gpus)) for gpus in (None, 0, 2)] == [None, None, 0]
    assert [find_gpu("cpu", library(gpus)) for gpus in (None, 2)] == [None, None]
    assert [find_gpu(device, library(2)) for device in ("cuda", "cuda:0", "cuda:1")] == [0, 0, 1]


@pytest.mark.parametrize(
    ("device", "gpus", "values"),
    [
        ("cuda", None, ("faiss-cpu 1.2.3", "pip uninstall faiss-cpu && pip install 'telerag-cli[gpu]'")),
        ("cuda:1", 0, ("faiss-gpu 1.2.3",)),
        ("cuda:1", 1, ("1 GPU,", "cuda:0")),
        ("cuda:3", 2, ("2 GPUs,", "cuda:1")),
    ],
)
def test_a_gpu_that_is_not_there_says_what_is(device, gpus, values):
    with fails(ResourceError, device, *values):
        find_gpu(device, library(gpus))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda0", ""])
def test_what_is_no_device(device):
    with fails(UsageError, f"'{device}'"):
        find_gpu(device, library(2))


def test_a_build_does_not_go_on_on_another_device(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "e.parquet", clustered(500, 8))
    assert build_index(source, tmp_path / "index", BuildConfig(4)).manifest.trained_on == "cpu"
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    with fails(ArtifactError, "training device cpu", "training device cuda"):
        build_index(source, tmp_path / "index", BuildConfig(4, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu("auto") is None, reason="Faiss finds no GPU, or has no support for them")
@pytest.mark.parametrize("metric", Metric)
def test_trained_on_a_gpu(tmp_path, metric):
    source = write_parquet(tmp_path / "e.parquet", clustered(20_000, 24))
    options = BuildConfig(64, metric)
    reference = build_index(source, tmp_path / "cpu", options).manifest
    index = build_index(source, tmp_path / "cuda", replace(options, device="cuda"))
    assert (index.manifest.trained_on, index.sizes.sum()) == ("cuda", 20_000)
    for nprobe, recall in index.manifest.recall_at_10.items():
        assert recall == pytest.approx(reference.recall_at_10[nprobe], abs=0.05)


# Vectors kept in row order


@pytest.mark.parametrize("kept", ["float16", "float32"])
@pytest.mark.parametrize("storage", [Storage.FLOAT16, Storage.INT8])
def test_kept_vectors_are_those_of_the_embeddings(tmp_path, storage, kept):
    vectors = clustered(5000, 20)
    source = write_parquet(tmp_path / "e.parquet", vectors)
    options = BuildConfig(16, storage=storage, keep_vectors=kept)
    plan = replace(plan_build(source, tmp_path / "index", options), place_rows=700)
    index = build_index(source, tmp_path / "index", options, plan=plan)
    assert index.manifest.kept_vectors == kept
    assert index.vectors.dtype == kept
    np.testing.assert_array_equal(index.vectors[np.arange(len(vectors))], vectors.astype(kept))
    np.testing.assert_array_equal(np.load(index.paths.vectors), vectors.astype(kept))
    assert plan.vectors_bytes == index.paths.vectors.stat().st_size == index.manifest.files["vectors.npy"].bytes
    without = plan_build(source, tmp_path / "other", replace(options, keep_vectors=None))
    plan = plan_build(source, tmp_path / "other", options)
    assert plan.needed_bytes - without.needed_bytes == plan.vectors_bytes + 8 * len(vectors)  # and their checksums


def test_vectors_are_kept_if_asked_for(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(500, 8))
    arguments = ["build-index", str(file), "--nlist", "4", "--storage", "int8"]
    plain = runner.invoke(app, [*arguments, "-o", str(tmp_path / "plain")])
    assert plain.exit_code == 0
    index = Index.open(tmp_path / "plain")
    assert (index.vectors, index.manifest.kept_vectors, index.paths.vectors.exists()) == (None, "", False)
    kept = runner.invoke(app, [*arguments, "-o", str(tmp_path / "kept"), "--keep-vectors", "float16"])
    assert kept.exit_code == 0
    in_plan = [line.split() for line in kept.stderr.splitlines() if line.split()[:3] == ["kept", "vectors", "disk"]]
    assert [line[3:] for line in in_plan] == [["7.94", "KiB"]]  # 500 * 8 * 2 and the header
    assert not [line for line in plain.stderr.splitlines() if line.split()[:3] == ["kept", "vectors", "disk"]]


def test_lists_of_float32_hold_the_vectors_already(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    result = runner.invoke(app, ["build-index", str(file), "-o", str(tmp_path / "i"), "--keep-vectors", "float16"])
    assert result.exit_code == 2
    assert "--keep-vectors float16 was asked for with --storage float32" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["e.parquet"]


def test_kept_vectors_of_another_shape_or_type_are_refused(tmp_path):
    source = write_parquet(tmp_path / "e.parquet", clustered(64, 8))
    index = build_index(source, tmp_path / "index", BuildConfig(2, storage=Storage.INT8, keep_vectors="float16"))
    right = np.load(index.paths.vectors)
    for wrong, found in ((right.T.copy(), "float16 (8, 64)"), (right.view(np.int16), "int16 (64, 8)")):
        np.save(index.paths.vectors, wrong)
        with fails(ArtifactError, "vectors.npy", found, "float16 (64, 8)"):
            Index.open(index.paths.root)
    index.paths.vectors.unlink()
    with fails(ArtifactError, "vectors.npy"):
        Index.open(index.paths.root)


def test_a_manifest_of_before_there_were_devices_and_kept_vectors(tmp_path):
    source = write_parquet(tmp_path / "e.parquet", clustered(500, 8))
    index = build_index(source, tmp_path / "index", BuildConfig(4))
    known = json.loads(index.paths.manifest.read_text())
    del known["trained_on"], known["kept_vectors"], known["checksum"]
    index.paths.manifest.write_text(json.dumps(known))
    assert Index.open(index.paths.root).manifest == index.manifest
    assert plan_build(source, index.paths.root, BuildConfig(4)).finished()


def test_usage_errors(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    for flags in (
        ["--nlist", "many"],
        ["--nlist", "0"],
        ["--memory", "lots"],
        ["--metric", "cos"],
        ["--device", "gpu"],
        ["--keep-vectors", "int8"],
    ):
        result = runner.invoke(app, ["build-index", str(file), "-o", str(tmp_path / "i"), *flags])
        assert result.exit_code == 2, flags
    assert [Path(path).name for path in tmp_path.iterdir()] == ["e.parquet"]


@pytest.mark.parametrize(
    ("metric", "stretch", "noted"), [(Metric.IP, 1, False), (Metric.IP, 3, True), (Metric.L2, 3, False)]
)
def test_vectors_of_different_lengths_under_inner_product_are_noted(tmp_path, metric, stretch, noted):
    vectors = clustered(200, 8)
    vectors[::2] *= stretch
    note = norms_note(Embeddings.open(write_parquet(tmp_path / "v.parquet", vectors)), metric)
    assert bool(note) == noted
    assert not noted or "lengths from 1 to 3" in note
