import contextlib
import fcntl
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from expect import fails
from indexes import make_index, make_vectors
from telerag_cli import files
from telerag_cli.bench import lance
from telerag_cli.bench.baselines import FaissMemory
from telerag_cli.bench.lance import open_lance
from telerag_cli.config import Metric, Storage
from telerag_cli.engine.opening import OpenedIndex
from telerag_cli.errors import ArtifactError, ResourceError, UsageError
from telerag_cli.files import checksum
from telerag_cli.index.artifact import FileInfo
from telerag_cli.index.scoring import Coarse
from telerag_cli.progress import silent

NLIST, DIMENSION = 12, 24


@pytest.fixture(autouse=True)
def no_other_datasets(monkeypatch):
    """Where tests run, libraries take the folder `datasets` for the package, and Lance looks for what they took."""
    monkeypatch.delitem(sys.modules, "datasets", raising=False)


@pytest.fixture
def lancedb():
    pytest.importorskip("lance")
    return pytest.importorskip("lancedb")


def an_index(root, metric=Metric.IP, storage=Storage.FLOAT32, count=400):
    """An index whose lists are not those of their centroids: who assigns anew finds others. One is empty."""
    vectors = make_vectors(count, DIMENSION, seed=1)
    vectors[:NLIST] *= 5
    index, _ivf = make_index(root, vectors, NLIST, metric, storage)
    centroids = np.concatenate([index.centroids[::-1], make_vectors(1, DIMENSION, seed=2) * 3])
    table = np.concatenate([index.table, [[0, 0, index.paths.lists.stat().st_size]]]).astype(np.uint64)
    np.save(index.paths.centroids, centroids)
    np.save(index.paths.offsets, table)
    files = {
        path.name: FileInfo(path.stat().st_size, checksum(path))
        for path in (index.paths.centroids, index.paths.offsets, index.paths.lists)
    }
    return replace(
        index, centroids=centroids, table=table, manifest=replace(index.manifest, nlist=NLIST + 1, files=files)
    )


def opened(index, progress=silent):
    """What `open_lance` makes; it takes no more of what was opened than the index."""
    return open_lance(OpenedIndex(index, None, None), progress)


def mapped(index):
    searcher, _configuration, _files = opened(index)
    searcher.map()
    return searcher


def same(ours, theirs):
    """The same scores, and the same rows save where scores are a rounding apart."""
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    apart = np.abs(np.diff(theirs[0].astype(np.float64), axis=1)) > 1e-5
    known = np.pad(apart, ((0, 0), (1, 0)), constant_values=True)
    known &= np.pad(apart, ((0, 0), (0, 1)), constant_values=True)
    known |= theirs[1] < 0
    assert known.mean() > 0.9
    np.testing.assert_array_equal(ours[1][known], theirs[1][known])


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("storage", [Storage.FLOAT32, Storage.FLOAT16])
def test_finds_what_faiss_finds(tmp_path, lancedb, metric, storage):
    index = an_index(tmp_path / "index", metric, storage)
    faiss = FaissMemory(index, Coarse(index.centroids, metric), lambda _bytes: None)
    searcher = mapped(index)
    queries = make_vectors(5, DIMENSION, seed=3)
    for nprobe in (1, 4, NLIST + 1):
        for asked in (queries, queries[:1]):
            same(searcher.find(asked, 7, nprobe), faiss.find(asked, 7, nprobe))
    wider = searcher.find(queries, 7, 100)
    np.testing.assert_array_equal(wider[1], searcher.find(queries, 7, NLIST + 1)[1])


def test_places_without_a_passage(tmp_path, lancedb):
    index = an_index(tmp_path / "index")
    searcher = mapped(index)
    coarse = Coarse(index.centroids, Metric.IP)
    queries = index.centroids[[NLIST, 0, NLIST, 5]]
    expected = index.sizes[coarse.probe(queries, 1)[1][:, 0]]
    assert expected[0] == expected[2] == 0
    scores, rows = searcher.find(queries, 200, 1)
    np.testing.assert_array_equal((rows >= 0).sum(axis=1), expected)
    for found, count, score in zip(rows, expected, scores, strict=True):
        assert len(set(found[:count].tolist())) == count
        assert (found[count:] == -1).all()
        assert (score[count:] == np.finfo(np.float32).min).all()
    scores, rows = searcher.find(queries[:1], 3, 1)
    assert (rows == -1).all()


def mapped_or_open(folder):
    """What this process has open, or mapped, of a folder."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    held = []
    for link in links:
        with contextlib.suppress(OSError):
            held.append(os.readlink(link))  # noqa: PTH115
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return [name for name in [*held, *maps] if str(folder) in name]


def test_lets_go_of_everything(tmp_path, lancedb):
    index = an_index(tmp_path / "index", count=2000)
    searcher, configuration, files = opened(index)
    assert searcher.session is None
    queries = make_vectors(3, DIMENSION, seed=3)
    cached = []
    for _ in range(2):
        searcher.map()
        before, session = searcher.session.size_bytes, searcher.session
        searcher.map()
        assert searcher.session is session
        searcher.find(queries, 5, NLIST)
        cached.append((before, session.size_bytes))
        del session
        searcher.unmap()
        assert searcher.session is None
        assert mapped_or_open(tmp_path) == []
    lists = 2000 * DIMENSION * 4
    assert all(before < lists < after for before, after in cached)
    assert {path for path in (tmp_path / "index.lancedb").rglob("*") if path.is_file()} - set(files) == {
        tmp_path / "index.lancedb" / "made.json"
    }
    assert sum(path.stat().st_size for path in files) > 2 * lists
    assert (configuration["lancedb"], configuration["partitions"]) == (lancedb.__version__, NLIST + 1)
    table = lancedb.connect(tmp_path / "index.lancedb").open_table("vectors")
    kind = table.index_stats("lists")
    assert (kind.index_type, kind.distance_type, kind.num_unindexed_rows) == (
        configuration["index_type"],
        configuration["metric"],
        0,
    )


class Recorder:
    """A `Progress` that keeps what it was told, and stops in the middle of a stage if asked."""

    def __init__(self, stop_in=None):
        self.stop_in = stop_in
        self.stages = {}

    @contextlib.contextmanager
    def __call__(self, description, total, *, unit=""):
        told = []

        def advance(count):
            told.append(count)
            if self.stop_in == description:
                raise KeyboardInterrupt

        yield advance
        self.stages[description] = (total, sum(told))


def test_is_made_once_for_the_same_lists(tmp_path, lancedb):
    index = an_index(tmp_path / "index")
    recorder = Recorder()
    opened(index, recorder)
    list_bytes = int(index.list_bytes.sum())
    assert recorder.stages == {
        "Copying lists to LanceDB": (list_bytes, list_bytes),
        "Building LanceDB's index": (None, 0),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"index", "index.lancedb"}
    made = tmp_path / "index.lancedb" / "made.json"
    first = made.stat().st_mtime_ns
    searcher, _configuration, files = opened(index)
    searcher.map()
    searcher.find(make_vectors(1, DIMENSION, seed=3), 1, 1)
    searcher.unmap()
    opened(index)
    assert made.stat().st_mtime_ns == first

    max(files, key=lambda path: path.stat().st_size).write_bytes(b"torn")
    opened(index)
    second = made.stat().st_mtime_ns
    assert second > first

    other = replace(index.manifest.files["lists.bin"], checksum="xxh3:0123456789abcdef")
    changed = replace(index.manifest, files=index.manifest.files | {"lists.bin": other})
    opened(replace(index, manifest=changed))
    assert made.stat().st_mtime_ns > second


def test_is_made_whole_or_not_at_all(tmp_path, lancedb):
    index = an_index(tmp_path / "index")
    with pytest.raises(KeyboardInterrupt):
        opened(index, Recorder("Copying lists to LanceDB"))
    assert {path.name for path in tmp_path.iterdir()} == {"index"}
    searcher = mapped(index)
    assert (searcher.find(make_vectors(1, DIMENSION, seed=3), 5, NLIST)[1] >= 0).all()


def test_other_lists_than_those_of_the_index_are_refused(tmp_path, lancedb, monkeypatch):
    index = an_index(tmp_path / "index")
    whole = lance._partitions

    def shifted(index, dataset):
        for batch in whole(index, dataset):
            moved = (batch["partition"].to_numpy() + 1) % (NLIST + 1)
            yield batch.set_column(1, "partition", pa.array(moved.astype(np.uint32)))

    monkeypatch.setattr(lance, "_partitions", shifted)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with fails(ResourceError, 13, 400):
        opened(index)
    assert {path.name for path in tmp_path.iterdir()} == {"index"}
    assert os.environ["TMPDIR"] == str(tmp_path)


def test_one_process_makes_it(tmp_path, lancedb):
    index = an_index(tmp_path / "index")
    folder = tmp_path / "index.lancedb.partial"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with fails(ResourceError, "index.lancedb.partial"):
            opened(index)


def test_other_things_are_left_alone(tmp_path, lancedb):
    index = an_index(tmp_path / "index")
    other = tmp_path / "index.lancedb"
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    with fails(ArtifactError, "index.lancedb"):
        opened(index)
    assert (other / "mine.txt").read_text() == "kept"


def test_a_disk_too_small_is_refused(tmp_path, lancedb, monkeypatch):
    index = an_index(tmp_path / "index")
    monkeypatch.setattr(files, "free_bytes", lambda _path: 1000)
    with fails(ResourceError, "index.lancedb", "121.9 KiB", "1000 B"):
        opened(index)
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


def test_int8_is_refused(tmp_path):
    index, _ivf = make_index(tmp_path / "index", make_vectors(50, DIMENSION, 1), 2, Metric.IP, Storage.INT8)
    with fails(UsageError, "int8", "--storage float32"):
        opened(index)


@pytest.mark.parametrize(("module", "package"), [("lancedb", "lancedb"), ("lance", "pylance")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, package):
    if module == "lance":
        pytest.importorskip("lancedb")
    monkeypatch.setitem(sys.modules, module, None)
    with fails(ResourceError, package, "pip install 'lancedb[pylance]'"):
        opened(an_index(tmp_path / "index"))
    assert {path.name for path in tmp_path.iterdir()} == {"index"}
