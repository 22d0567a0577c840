import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from expect import fails
from telerag_cli.cli.app import app
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import ArtifactError, InputError, ResourceError, TeleragError, UsageError
from telerag_cli.index.artifact import ID_BYTES, Index
from telerag_cli.index.build import BuildConfig, build_index, plan_build
from telerag_cli.index.partial import partial_of
from telerag_cli.index.passages import BATCH_ROWS, Passages
from telerag_cli.index.recall import NEIGHBOURS, Nearest
from telerag_cli.index.scoring import empty_ivf, flat
from telerag_cli.index.train import auto_nlist, draw_rows, find_gpu, plan_training
from vector_files import clustered, embeddings_folder, vector_column, write_parquet

KILLS = int(os.environ.get("TELERAG_KILLS", "5"))
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


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("metric", Metric)
def test_lists_are_those_of_faiss(tmp_path, metric, storage):
    vectors = clustered(35_000, 20)  # three blocks to assign; codes of 20 bytes ask for padded capacities
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", vectors))
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
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", vectors))
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
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", vectors))
    manifest = build_index(source, tmp_path / "index", BuildConfig(100, metric, Storage.INT8)).manifest
    index = Index.open(tmp_path / "index")
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
    at_once.update(0, vectors)
    for first in range(0, 5000, 700):
        in_blocks.update(first, vectors[first : first + 700])
    assert (in_blocks.rows == at_once.rows).all()
    assert not (in_blocks.rows == own[:, None]).any()
    distances = ((vectors[own][:, None] - vectors[None]) ** 2).sum(-1)
    assert (in_blocks.rows == np.argsort(distances, axis=1)[:, 1 : NEIGHBOURS + 1]).all()


def test_manifest_numbers(tmp_path):
    vectors = clustered(2000, 8)
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", vectors))
    index = build_index(source, tmp_path / "index", BuildConfig(16))
    sizes = index.sizes
    assert sizes.sum() == index.manifest.ntotal == 2000
    balance = index.manifest.balance
    assert (balance["min"], balance["max"], balance["empty"]) == (sizes.min(), sizes.max(), (sizes == 0).sum())
    reference = empty_ivf(flat(index.centroids, Metric.IP), 8, 16, Metric.IP, Storage.FLOAT32)
    reference.add(vectors)
    assert balance["imbalance"] == pytest.approx(reference.invlists.imbalance_factor(), abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "centroids.npy",
        "checksums.npy",
        "lists.bin",
        "manifest.json",
        "offsets.npy",
        "passages.arrow",
    ]
    assert not partial_of(tmp_path / "index").exists()
    assert str(tmp_path) not in (tmp_path / "index" / "manifest.json").read_text()


def test_empty_lists(tmp_path):
    vectors = np.repeat(np.eye(4, 8, dtype=np.float32), 30, axis=0)  # four places for twenty centroids
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", vectors))
    index = build_index(source, tmp_path / "index", BuildConfig(20, Metric.L2))
    assert index.manifest.balance["empty"] == (index.sizes == 0).sum() >= 16
    rows = np.concatenate([vectors_of(index, number)[1] for number in range(20)])
    assert sorted(rows.tolist()) == list(range(120))


@pytest.mark.parametrize("rows", [1, 2, 11])
def test_tiny_corpora(tmp_path, rows):
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(rows, 8)))
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
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(50, 8)))
    with pytest.raises(UsageError, match=r"51 lists .* 50 vectors"):
        plan_build(source, tmp_path / "index", BuildConfig(51))
    assert build_index(source, tmp_path / "index", BuildConfig(50)).manifest.nlist == 50


def test_memory_is_bounded(tmp_path):
    """A build of 154 MB of vectors under --memory 128MiB grows by less than that over a tiny build."""
    small = write_parquet(tmp_path / "small.parquet", clustered(2000, 128))
    large = write_parquet(tmp_path / "large.parquet", clustered(300_000, 128), group=100_000)
    peaks = []
    for source in (small, large):
        code = (
            "import resource, sys\nfrom telerag_cli.cli.app import app\n"
            "try:\n    app(sys.argv[1:])\n"
            "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
        )
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                "build-index",
                source,
                "-o",
                tmp_path / f"{source.stem}.index",
                "--nlist",
                "64",
                "--memory",
                "128MiB",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert large.stat().st_size > 128 << 20
    assert peaks[1] - peaks[0] < 128 << 20


def test_too_little_memory_is_refused(tmp_path):
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(50, 8)))
    with pytest.raises(UsageError, match=r"--memory is 1.00 MiB, and .* need"):
        plan_build(source, tmp_path / "index", BuildConfig(memory_bytes=1 << 20))


# Where k-means runs


def library(gpus=None):
    """Stands in for ``faiss``: without support for GPUs, or with it and this many of them."""
    support = {} if gpus is None else {"StandardGpuResources": object, "get_num_gpus": lambda: gpus}
    return SimpleNamespace(__version__="1.2.3", **support)


@pytest.mark.parametrize(
    ("device", "gpus", "found"),
    [
        ("auto", None, None),
        ("auto", 0, None),
        ("auto", 2, 0),
        ("cpu", None, None),
        ("cpu", 2, None),
        ("cuda", 2, 0),
        ("cuda:0", 1, 0),
        ("cuda:1", 2, 1),
    ],
)
def test_the_gpu_that_is_found(device, gpus, found):
    assert find_gpu(device, library(gpus)) == found


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", None, r"cuda was asked for, and faiss-cpu 1\.2\.3 .* has no GPU support.*telerag-cli\[gpu\]"),
        ("cuda:1", 0, r"cuda:1 was asked for, and faiss-gpu 1\.2\.3 .* finds no GPU"),
        ("cuda:1", 1, r"cuda:1 was asked for, and Faiss finds 1 GPU, the last of which is cuda:0"),
        ("cuda:3", 2, r"cuda:3 was asked for, and Faiss finds 2 GPUs, the last of which is cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there_says_what_is(device, gpus, message):
    with pytest.raises(ResourceError, match=message):
        find_gpu(device, library(gpus))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda0", ""])
def test_what_is_no_device(device):
    with pytest.raises(UsageError, match=rf"'{device}' is not a device"):
        find_gpu(device, library(2))


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this Faiss supports GPUs")
def test_cuda_without_a_faiss_for_it(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    result = runner.invoke(app, ["build-index", str(file), "-o", str(tmp_path / "i"), "--device", "cuda"])
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert f"faiss-cpu {faiss.__version__} is installed, which has no GPU support" in said
    assert "pip uninstall faiss-cpu && pip install 'telerag-cli[gpu]'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["e.parquet"]


def test_a_build_does_not_go_on_on_another_device(tmp_path, monkeypatch):
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(500, 8)))
    assert build_index(source, tmp_path / "index", BuildConfig(4)).manifest.trained_on == "cpu"
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    with fails(ArtifactError, "training device cpu", "training device cuda"):
        build_index(source, tmp_path / "index", BuildConfig(4, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu("auto") is None, reason="Faiss finds no GPU, or has no support for them")
@pytest.mark.parametrize("metric", Metric)
def test_trained_on_a_gpu(tmp_path, metric):
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(20_000, 24)))
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
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", vectors))
    options = BuildConfig(16, storage=storage, keep_vectors=kept)
    plan = replace(plan_build(source, tmp_path / "index", options), place_rows=700)
    index = build_index(source, tmp_path / "index", options, plan=plan)
    assert index.manifest.kept_vectors == kept
    assert isinstance(index.vectors, np.memmap)
    assert index.vectors.dtype == kept
    np.testing.assert_array_equal(index.vectors, vectors.astype(kept))
    np.testing.assert_array_equal(np.load(index.paths.vectors, mmap_mode="r"), index.vectors)
    assert plan.vectors_bytes == index.paths.vectors.stat().st_size == index.manifest.files["vectors.npy"].bytes
    without = plan_build(source, tmp_path / "other", replace(options, keep_vectors=None))
    plan = plan_build(source, tmp_path / "other", options)
    assert plan.needed_bytes - without.needed_bytes == plan.vectors_bytes


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
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(64, 8)))
    index = build_index(source, tmp_path / "index", BuildConfig(2, storage=Storage.INT8, keep_vectors="float16"))
    right = np.array(index.vectors)
    for wrong, found in ((right.T.copy(), r"float16 \(8, 64\)"), (right.view(np.int16), r"int16 \(64, 8\)")):
        np.save(index.paths.vectors, wrong)
        with pytest.raises(
            ArtifactError, match=rf"vectors.npy is {found}, and the manifest asks for float16 \(64, 8\)"
        ):
            Index.open(index.paths.root)
    index.paths.vectors.unlink()
    with pytest.raises(ArtifactError, match=r"vectors\.npy is missing"):
        Index.open(index.paths.root)


def test_a_manifest_of_before_there_were_devices_and_kept_vectors(tmp_path):
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(500, 8)))
    index = build_index(source, tmp_path / "index", BuildConfig(4))
    known = json.loads(index.paths.manifest.read_text())
    del known["trained_on"], known["kept_vectors"]
    index.paths.manifest.write_text(json.dumps(known))
    assert Index.open(index.paths.root).manifest == index.manifest
    assert plan_build(source, index.paths.root, BuildConfig(4)).finished()


# Passages


def test_passages_by_row(tmp_path):
    rows = 2 * BATCH_ROWS + 300
    file = write_parquet(
        tmp_path / "e.parquet",
        clustered(rows, 8),
        group=777,
        title=[f"T{i}" for i in range(rows)],
        year=[2000 + i if i % 2 else None for i in range(rows)],
    )
    build_index(Embeddings.open(file), tmp_path / "index", BuildConfig(4))
    passages = Passages.open(tmp_path / "index" / "passages.arrow")
    assert len(passages) == rows
    last = rows - 1
    assert passages[[last, 0, BATCH_ROWS]] == [
        Passage(f"p{last}", f"Passage {last}.", {"title": f"T{last}", "year": 2000 + last}),
        Passage("p0", "Passage 0.", {"title": "T0"}),
        Passage(f"p{BATCH_ROWS}", f"Passage {BATCH_ROWS}.", {"title": f"T{BATCH_ROWS}"}),
    ]
    with pytest.raises(IndexError):
        passages[[rows]]


def test_damaged_passages_are_named(tmp_path):
    build_index(
        Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(100, 8))), tmp_path / "index", BuildConfig(1)
    )
    path = tmp_path / "index" / "passages.arrow"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"passages.arrow is damaged"):
        Passages.open(path)


# Parquet of another make


@pytest.mark.parametrize("kind", ["fixed16", "fixed64", "list", "large_list"])
def test_foreign_parquet(tmp_path, kind):
    vectors = clustered(3000, 16)
    column = {
        "fixed16": lambda: vector_column(vectors.astype(np.float16), pa.float16()),
        "fixed64": lambda: vector_column(vectors.astype(np.float64)),
        "list": lambda: pa.array(list(vectors), pa.list_(pa.float32())),
        "large_list": lambda: pa.array(list(vectors), pa.large_list(pa.float32())),
    }[kind]()
    folder = tmp_path / "vectors"
    folder.mkdir()
    table = pa.table({"v": column})
    for part in range(3):
        pq.write_table(table.slice(part * 1000, 1000), folder / f"part-{part}.parquet", row_group_size=300)
    source = Embeddings.open(folder)
    assert (source.rows, source.dimension, source.column) == (3000, 16, "v")
    read = np.concatenate([block.copy() for _, block in source.batches(700, start=950)])
    np.testing.assert_allclose(read, vectors[950:], atol=1e-3)
    assert source.sample(np.array([0, 999, 1000, 2999]), lambda _count: None).tolist() == [
        next(block for _, block in source.batches(1, row))[0].tolist() for row in (0, 999, 1000, 2999)
    ]
    index = build_index(source, tmp_path / "index", BuildConfig(8))
    assert index.manifest.embedder.model is None
    assert Passages.open(index.paths.passages)[[2999]] == [Passage("2999", "", {})]


def test_several_vector_columns_need_a_choice(tmp_path):
    vectors = clustered(100, 8)
    file = write_parquet(tmp_path / "e.parquet", vectors, other=vector_column(vectors[:, :4]))
    with pytest.raises(UsageError, match=r"2 vector columns: embedding, other\..*--column"):
        Embeddings.open(file)
    with pytest.raises(UsageError, match=r"no vector column 'third'; its vector columns are: embedding, other"):
        Embeddings.open(file, "third")
    assert Embeddings.open(file, "other").dimension == 4


def test_no_vector_column(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"no column of float lists; its columns are: text"):
        Embeddings.open(tmp_path / "t.parquet")


def test_wrong_dimension_names_the_file_and_both(tmp_path):
    write_parquet(tmp_path / "a.parquet", clustered(10, 8))
    write_parquet(tmp_path / "b.parquet", clustered(10, 12))
    with pytest.raises(ArtifactError, match=r"b\.parquet holds vectors of dimension 12, and a\.parquet of 8"):
        Embeddings.open(tmp_path)


def test_ragged_lists_name_the_row(tmp_path):
    pq.write_table(
        pa.table({"v": pa.array([[1.0, 2.0]] * 5 + [[1.0]], pa.list_(pa.float32()))}), tmp_path / "r.parquet"
    )
    with pytest.raises(ArtifactError, match=r"Row 5 of .*r\.parquet has dimension 1, and the first has 2"):
        build_index(Embeddings.open(tmp_path / "r.parquet"), tmp_path / "index", BuildConfig())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_no_numbers_name_the_row(tmp_path, bad):
    vectors = clustered(3000, 8)
    vectors[2345, 3] = bad
    file = write_parquet(tmp_path / "e.parquet", vectors)
    with pytest.raises(InputError, match=rf"row 2,345 of .*e\.parquet holds {bad}"):
        build_index(Embeddings.open(file), tmp_path / "index", BuildConfig())


def test_missing_vectors_name_the_row(tmp_path):
    pq.write_table(pa.table({"v": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))}), tmp_path / "m.parquet")
    with pytest.raises(InputError, match=r"Row 1 of .* has no vector"):
        build_index(Embeddings.open(tmp_path / "m.parquet"), tmp_path / "index", BuildConfig())


@pytest.mark.parametrize(
    "options", [BuildConfig(storage=Storage.FLOAT16), BuildConfig(storage=Storage.INT8, keep_vectors="float16")]
)
def test_too_large_for_float16(tmp_path, options):
    vectors = clustered(300, 8)
    vectors[123] *= 1e6
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", vectors))
    with pytest.raises(InputError, match=r"row 123 .* float16 ends at 65504"):
        build_index(source, tmp_path / "index", options)


def test_no_rows(tmp_path):
    write_parquet(tmp_path / "e.parquet", np.empty((0, 8), np.float32))
    with pytest.raises(InputError, match="holds no vectors"):
        Embeddings.open(tmp_path / "e.parquet")


def test_not_parquet(tmp_path):
    (tmp_path / "x.parquet").write_text("hello")
    for path in (tmp_path, tmp_path / "x.parquet"):
        with pytest.raises(ArtifactError, match=r"x\.parquet cannot be read as Parquet"):
            Embeddings.open(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        Embeddings.open(tmp_path / "absent")


# Resuming and refusing


def telerag(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "telerag_cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(80_000, 32), group=20_000)
    arguments = ("build-index", file, "--nlist", "256", "--storage", "int8", "--keep-vectors", "float16")
    began = time.monotonic()
    whole = telerag(*arguments, "-o", tmp_path / "whole")
    assert whole.communicate()[0] == f"{tmp_path / 'whole'}\n"
    took_s = time.monotonic() - began
    rng, killed, seen = random.Random(7), 0, set()
    output = tmp_path / "killed"
    for _ in range(KILLS * 4):
        if killed == KILLS:
            break
        process = telerag(*arguments, "-o", output)
        try:
            # Moments over the whole of a run, and, as resuming shortens it, many after its start-up.
            process.wait(rng.uniform(0.1, 1.0) * took_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        seen |= {path.name for path in partial_of(output).rglob("*")} if partial_of(output).exists() else set()
        if output.exists():
            assert contents(output) == contents(tmp_path / "whole")
            shutil.rmtree(output)
    process = telerag(*arguments, "-o", output)
    _, talk = process.communicate()
    assert process.returncode == 0, talk
    assert killed == KILLS
    assert {"centroids.npy", "assignments.i32"} <= seen
    assert contents(output) == contents(tmp_path / "whole")
    assert not partial_of(output).exists()


class Stop(BaseException):
    """Raised in the middle of a stage, as Ctrl-C would be."""


@pytest.mark.parametrize("stage", ["Sampling", "Training", "Assigning", "Placing", "Writing", "Checking"])
def test_stopped_in_each_stage_the_bytes_are_the_same(tmp_path, stage):
    import contextlib

    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(20_000, 8)))
    options = BuildConfig(32, storage=Storage.INT8, keep_vectors="float32")
    build_index(source, tmp_path / "whole", options)
    advanced = []

    @contextlib.contextmanager
    def progress(description, _total, *, unit=""):
        def advance(count):
            advanced.append((description, count))
            if description.startswith(stage) and count:
                raise Stop

        if description.startswith(stage) and not unit:
            raise Stop
        yield advance

    # Several blocks to place, of another size than in the uninterrupted build.
    plan = replace(plan_build(source, tmp_path / "index", options), place_rows=3000)
    with pytest.raises(Stop):
        build_index(source, tmp_path / "index", options, progress=progress, plan=plan)
    assert not (tmp_path / "index").exists()
    if stage == "Assigning":  # with another file the build is another
        other = Embeddings.open(write_parquet(tmp_path / "other.parquet", clustered(20_000, 8, seed=1)))
        with pytest.raises(
            ArtifactError, match=r"was begun with embeddings xxh3:\w+, and this asks for embeddings xxh3:"
        ):
            build_index(other, tmp_path / "index", options)
        with pytest.raises(ArtifactError, match=r"was begun with nlist 32, .* and this asks for nlist 16, "):
            build_index(source, tmp_path / "index", replace(options, nlist=16))
        with pytest.raises(ArtifactError, match="begun with kept vectors float32, and this asks for kept vectors none"):
            build_index(source, tmp_path / "index", replace(options, keep_vectors=None))
    advanced.clear()
    build_index(source, tmp_path / "index", options)
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")


def test_a_finished_index_is_kept(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(500, 8))
    arguments = ["build-index", str(file), "-o", str(tmp_path / "index"), "--nlist", "4"]
    first = runner.invoke(app, arguments)
    assert (first.exit_code, first.stdout) == (0, f"{tmp_path / 'index'}\n")
    stamp = (tmp_path / "index" / "lists.bin").stat().st_mtime_ns
    again = runner.invoke(app, arguments)
    assert again.exit_code == 0
    assert "already built" in again.stderr
    other = runner.invoke(app, [*arguments, "--metric", "l2"])
    assert other.exit_code == 1
    assert "was built with metric ip, and this asks for metric l2" in " ".join(other.stderr.split())
    assert (tmp_path / "index" / "lists.bin").stat().st_mtime_ns == stamp
    replaced = runner.invoke(app, [*arguments, "--metric", "l2", "--overwrite"])
    assert replaced.exit_code == 0
    assert Index.open(tmp_path / "index").manifest.metric is Metric.L2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "index"]


def test_a_folder_that_is_no_index_is_never_touched(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for flags in ([], ["--overwrite"]):
        result = runner.invoke(app, ["build-index", str(file), "-o", str(tmp_path / "mine"), *flags])
        assert result.exit_code == 1
        assert "is not an index" in result.stderr
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    (tmp_path / "mine").rename(partial_of(tmp_path / "other"))
    with pytest.raises(ArtifactError, match="is not an unfinished index"):
        build_index(Embeddings.open(file), tmp_path / "other", BuildConfig(), overwrite=True)


def test_two_builds_of_one_index_at_once(tmp_path):
    import contextlib

    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(500, 8)))
    seen = []

    @contextlib.contextmanager
    def progress(description, _total, *, unit=""):
        with pytest.raises(ResourceError, match="Another telerag is building"):
            build_index(source, tmp_path / "index", BuildConfig())
        seen.append(description)
        yield lambda _count: None

    build_index(source, tmp_path / "index", BuildConfig(), progress=progress)
    assert seen


def test_a_full_disk_is_a_sentence_and_the_build_resumes(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(40_000, 32))
    code = (
        "import resource, sys\nfrom telerag_cli.cli.app import app\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, resource.RLIM_INFINITY))\napp(sys.argv[1:])\n"
    )
    arguments = ["build-index", file, "-o", tmp_path / "index", "--nlist", "16"]
    full = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "File too large" in full.stderr
    assert not (tmp_path / "index").exists()
    assert (partial_of(tmp_path / "index") / "centroids.npy").exists()
    source = Embeddings.open(file)
    build_index(source, tmp_path / "whole", BuildConfig(16))
    build_index(source, tmp_path / "index", BuildConfig(16))
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")


def test_not_enough_room_is_refused_with_numbers(tmp_path, monkeypatch):
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", clustered(5000, 32)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    with pytest.raises(ResourceError, match=r"needs \d.* MiB of disk, and 1\.00 MiB are free"):
        build_index(source, tmp_path / "index", BuildConfig())
    assert list(tmp_path.iterdir()) == [tmp_path / "e.parquet"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_output(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(TeleragError, match="cannot be written"):
        build_index(Embeddings.open(file), tmp_path / "closed" / "index", BuildConfig())


def test_output_under_a_file(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    result = runner.invoke(app, ["build-index", str(file), "-o", str(file / "index")])
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr


def test_vectors_whose_distances_exceed_float32(tmp_path):
    vectors = clustered(200, 8)
    vectors[123] *= 1e30
    file = write_parquet(tmp_path / "e.parquet", vectors)
    options = BuildConfig(2, Metric.L2, seed=1)
    with pytest.raises(InputError, match=r"row 123 is .*e\+30 long.*exceeds float32"):
        build_index(Embeddings.open(file), tmp_path / "index", options)


# Our own folders


def test_our_folder(tmp_path):
    vectors = clustered(250, 8)
    source = Embeddings.open(embeddings_folder(tmp_path / "e", vectors, 100))
    index = build_index(source, tmp_path / "index", BuildConfig(2))
    embedder = index.manifest.embedder
    assert (embedder.model, embedder.pooling, embedder.normalized, embedder.prompt) == ("m", "mean", True, "query: ")
    assert Passages.open(index.paths.passages)[[249]] == [Passage("p249", "Text 249", {"title": "T249"})]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "is not finished.*resumes"),
        ({"version": 2}, "version 2, and this telerag reads version 1"),
        ({"format": "other"}, "does not describe"),
        ({"rows": 251}, "holds 250 vectors of dimension 8, and its embeddings.json says 251 of 8"),
        ({"dimension": 9}, "250 vectors of dimension 8, and its embeddings.json says 250 of 9"),
    ],
)
def test_our_folder_must_be_what_it_says(tmp_path, changes, message):
    folder = embeddings_folder(tmp_path / "e", clustered(250, 8), 100, **changes)
    with pytest.raises(ArtifactError, match=message):
        Embeddings.open(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = embeddings_folder(tmp_path / "e", clustered(250, 8), 100)
    (folder / "shard-00001.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001\.parquet is missing"):
        Embeddings.open(folder)


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
