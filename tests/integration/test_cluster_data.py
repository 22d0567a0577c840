"""Work spread over processes by Ray: the same bytes, whatever happens to the workers, and Ray left as it was found."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from expect import fails
from telerag_cli.cli.app import app
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.corpus.passages import Passage
from telerag_cli.distributed.data import MAX_TRIES, RayPool
from telerag_cli.distributed.session import Cluster, cause, joined
from telerag_cli.embedding.encoder import EncoderInfo
from telerag_cli.embedding.job import EmbedConfig, embed, make_shard
from telerag_cli.errors import InputError, ResourceError, UsageError
from telerag_cli.index.build import BuildConfig, build_index
from telerag_cli.index.recall import Nearest
from telerag_cli.index.stages import ASSIGN_ROWS
from vector_files import clustered, contents, write_parquet

ray = pytest.importorskip("ray")

POOL = RayPool(2, 1, 0.0, {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def cluster():
    """One for all tests here; afterwards nothing of it may be left in this process."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    before = dict(os.environ), signal.getsignal(signal.SIGTERM), sys.excepthook
    with joined(cpus=2) as found:
        assert signal.getsignal(signal.SIGTERM) == before[1]
        assert (found.nodes, found.cpus, found.local) == (1, 2, True)
        yield found
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM), sys.excepthook) == before
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Squares:
    """A worker of numbers; it kills itself at the first item that says so, and refuses one that is no number."""

    marker: Path | None = None

    def __call__(self):
        def work(item):
            if item == "die" and not self.marker.exists():
                self.marker.touch()
                item = "fatal"
            if item == "fatal":
                os.kill(os.getpid(), signal.SIGKILL)
            if item == "bad":
                raise InputError("c.jsonl:4: not a number.", remedy="Write one.")
            return (0 if item == "die" else item * item), os.getpid()

        return work


def test_results_come_in_order_and_a_killed_worker_loses_nothing(cluster, tmp_path):
    items = [*range(6), "die", *range(7, 20)]
    read = []

    def source():
        for item in items:
            read.append(item)
            yield item

    results = []
    for result in POOL(source(), Squares(tmp_path / "died")):
        results.append(result)
        assert len(read) - len(results) < 5
    assert (tmp_path / "died").exists()
    assert [square for square, _pid in results] == [0 if item == "die" else item * item for item in items]
    assert len({pid for _square, pid in results}) >= 2


def test_what_a_worker_raises_is_raised_as_it_was(cluster):
    with fails(InputError, "c.jsonl:4"):
        list(POOL([1, 2, 3, "bad", 5], Squares()))


def test_what_kills_every_worker_ends(cluster):
    with fails(ResourceError, MAX_TRIES):
        list(RayPool(1)(["fatal"], Squares()))


def test_what_the_items_raise_comes_after_the_results_of_those_before(cluster):
    def source():
        yield from (1, 2, 3)
        raise InputError("line 4 is bad")

    results = []
    with fails(InputError, "line 4"):
        results.extend(square for square, _pid in POOL(source(), Squares()))
    assert results == [1, 4, 9]


def test_a_stream_that_is_not_read_to_its_end_stops_its_workers(cluster):
    results = POOL(iter(range(10_000)), Squares())
    _square, pid = next(results)
    results.close()
    ends = time.monotonic() + 20
    while alive(pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Letters:
    """Stands in for an encoder: counts letters, or has no room for a text."""

    too_much: str = ""
    precision: str = "float32"
    device = "cpu"
    info = EncoderInfo("letters", 4, "mean", True, None, 16, "xxh3:0")

    def decide(self, texts):
        return self.precision

    def encode(self, texts, batch_size=None, advance=None):
        if self.too_much in texts:
            raise ResourceError("It does not fit.", remedy="Use less.")
        return np.array([[text.count(letter) for letter in "abcd"] for text in texts], np.float32)


@dataclass
class LetterPool:
    """Workers that make shards with `Letters`."""

    too_much: str = ""
    workers, gpus_each = 2, 0.0

    def __call__(self, tasks, make_worker):
        return POOL(tasks, lambda: partial(make_shard, encoder=Letters(self.too_much)))


def test_embeddings_are_the_same_bytes_and_go_on_from_each_other(cluster, tmp_path):
    rows = [Passage(str(index), "a" * index + "b", {"n": index}) for index in range(30)]
    here, there, config = tmp_path / "here", tmp_path / "there", EmbedConfig(shard_rows=4)
    embed(rows, here, config, encoder=Letters())
    with fails(ResourceError, "It does not fit"):
        embed(rows, there, config, encoder=Letters(), pool=LetterPool(rows[22].text))
    left = {path.name for path in there.glob("*.parquet")}
    assert "shard-00005.parquet" not in left
    report = embed(rows, there, config, encoder=Letters(), pool=LetterPool())
    assert contents(there) == contents(here)
    assert (report.rows, report.shards) == (30, 8)
    # A worker may have ended another shard before it was killed.
    assert 0 < report.embedded <= 30 - sum(2 if name == "shard-00007.parquet" else 4 for name in left)
    (there / "shard-00003.parquet").unlink()
    embed(rows, there, config, encoder=Letters())
    assert contents(there) == contents(here)


class StopError(Exception):
    pass


def until(stage):
    """A progress that ends the build where a stage begins."""

    @contextlib.contextmanager
    def progress(description, _total, *, unit=""):
        if description.startswith(stage):
            raise StopError
        yield lambda count: None

    return progress


@pytest.mark.parametrize("first", [None, POOL], ids=["begun here", "begun there"])
def test_an_index_is_the_same_bytes_and_goes_on_from_each_other(cluster, tmp_path, first):
    vectors = clustered(2 * ASSIGN_ROWS + 1000, 8)
    source = Embeddings.open(write_parquet(tmp_path / "e.parquet", vectors))
    options = BuildConfig(16, Metric.L2, Storage.INT8, keep_vectors="float16")
    build_index(source, tmp_path / "here", options)
    with pytest.raises(StopError):
        build_index(source, tmp_path / "there", options, pool=first, progress=until("Placing"))
    build_index(source, tmp_path / "there", options, pool=POOL if first is None else None)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_answers_found_with_what_was_known_earlier_are_the_same():
    vectors = np.round(clustered(6000, 8), 2)  # with equal scores among them
    own = np.array([3, 1999, 5999])
    at_once, stale = (Nearest(vectors[own], own, Metric.IP) for _ in range(2))
    known = [stale.least] * 3
    for first in range(0, 6000, 500):
        at_once.merge(at_once.found(first, vectors[first : first + 500], at_once.least))
        stale.merge(stale.found(first, vectors[first : first + 500], known.pop(0)))
        known.append(stale.least)
    assert (stale.rows == at_once.rows).all()
    assert (stale.scores == at_once.scores).all()


@pytest.mark.parametrize(
    ("cluster_has", "options", "workers", "cpus", "gpus"),
    [
        (Cluster(1, 8, 0, True, 8), {}, 8, 1, 0),
        (Cluster(1, 8, 0, True, 8), {"workers": 3}, 3, 2, 0),
        (Cluster(1, 2, 0, True, 2), {"workers": 4}, 4, 0.5, 0),
        (Cluster(2, 16, 2, False, 8), {"gpus": True}, 2, 1, 1),
        (Cluster(2, 16, 2, False, 8), {"gpus": True, "workers": 3}, 3, 1, 0.5),
        (Cluster(2, 16, 2, False, 8), {}, 16, 1, 0),
        (Cluster(2, 16, 0, False, 8), {"threads": 8}, 2, 8, 0),
        (Cluster(2, 16, 0, False, 8), {"threads": 32}, 2, 8, 0),  # no machine has 32
    ],
)
def test_shares_of_workers(cluster_has, options, workers, cpus, gpus):
    pool = RayPool.of(cluster_has, options.pop("workers", None), **{"gpus": False, **options})
    assert (pool.workers, pool.cpus_each, pool.gpus_each) == (workers, cpus, gpus)
    threads = options.get("threads")
    assert pool.environment == (threads and {"OMP_NUM_THREADS": str(threads)})


def test_without_ray_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with fails(ResourceError, "telerag-cli[ray]"), joined():
        pass


@pytest.mark.parametrize("address", ["here", "host:port", "host:0", ":6379", "ray://host:10001"])
def test_what_is_no_address(address):
    with fails(UsageError, "--ray-address", address), joined(address):
        pass


def test_nobody_at_the_address_is_found_out_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with fails(ResourceError, address, os.strerror(errno.ECONNREFUSED)), joined(address):
            pass


def test_a_lost_worker_is_a_sentence():
    assert isinstance(cause(ray.exceptions.WorkerCrashedError()), ResourceError)


def telerag(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["embed", "build-index"])
def test_workers_without_ray_are_refused(tmp_path, command):
    write_parquet(tmp_path / "e.parquet", clustered(100, 8))
    result = telerag(command, tmp_path / "e.parquet", "-o", tmp_path / "out", "--workers", 2)
    assert result.exit_code == 2
    assert "--workers is 2" in result.stderr
    assert not (tmp_path / "out").exists()


def test_ray_chooses_the_gpu(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n')
    result = telerag("embed", tmp_path / "c.jsonl", "-o", tmp_path / "e", "--ray", "--device", "cuda:1")
    assert result.exit_code == 2
    assert "--device is cuda:1" in result.stderr


def test_a_running_cluster_is_joined_and_goes_on(cluster):
    code = (
        "import sys\n"
        "from telerag_cli.distributed.session import joined\n"
        "with joined(sys.argv[1]) as found: print(found)\n"
    )
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, check=False)
    assert done.stdout == "Cluster(nodes=1, cpus=2, gpus=0, local=False, node_cpus=2)\n", done.stderr
    assert done.stderr == ""
    assert ray.get(ray.put(1)) == 1


@pytest.fixture
def commands(cluster, tmp_path, monkeypatch):
    """Runs a command once alone and once with Ray, and says that both left the same."""

    @contextlib.contextmanager
    def here(address=None, *, cpus=None):
        yield cluster

    monkeypatch.setattr("telerag_cli.distributed.session.joined", here)
    monkeypatch.chdir(tmp_path)

    def both(*arguments):
        assert telerag(*arguments, "-o", "alone").exit_code == 0
        result = telerag(*arguments, "-o", "spread", "--ray", "--workers", 1)
        assert (result.exit_code, result.stdout) == (0, "spread\n"), result.stderr
        return contents(tmp_path / "alone") == contents(tmp_path / "spread")

    return both


@pytest.mark.model
def test_embed_with_ray(commands, tmp_path):
    lines = "".join(f'{{"text": "{"word " * n}{n}"}}\n' for n in range(1, 13))
    (tmp_path / "c.jsonl").write_text(lines)
    assert commands("embed", "c.jsonl", "--device", "cpu", "--shard-rows", 5)


def test_build_index_with_ray(commands, tmp_path):
    write_parquet(tmp_path / "e.parquet", clustered(2000, 8))
    assert commands("build-index", "e.parquet", "--nlist", 16, "--storage", "float16")
