"""A build that is stopped anywhere goes on to the same bytes, and touches nothing that is not its own."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from expect import fails
from telerag_cli.cli.app import app
from telerag_cli.config import Metric, Storage
from telerag_cli.errors import ArtifactError, ResourceError, TeleragError
from telerag_cli.index.artifact import Index
from telerag_cli.index.build import BuildConfig, build_index, plan_build
from telerag_cli.index.partial import partial_of
from vector_files import clustered, contents, write_parquet

KILLS = int(os.environ.get("TELERAG_KILLS", "5"))
runner = CliRunner()


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
    source = write_parquet(tmp_path / "e.parquet", clustered(20_000, 8))
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
        other = write_parquet(tmp_path / "other.parquet", clustered(20_000, 8, seed=1))
        with fails(ArtifactError, "embeddings xxh3:"):
            build_index(other, tmp_path / "index", options)
        with fails(ArtifactError, "nlist 32", "nlist 16"):
            build_index(source, tmp_path / "index", replace(options, nlist=16))
        with fails(ArtifactError, "kept vectors float32", "kept vectors none"):
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
    with fails(ArtifactError, partial_of(tmp_path / "other")):
        build_index(file, tmp_path / "other", BuildConfig(), overwrite=True)


def test_two_builds_of_one_index_at_once(tmp_path):
    source = write_parquet(tmp_path / "e.parquet", clustered(500, 8))
    seen = []

    @contextlib.contextmanager
    def progress(description, _total, *, unit=""):
        with fails(ResourceError, tmp_path / "index"):
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
    build_index(file, tmp_path / "whole", BuildConfig(16))
    build_index(file, tmp_path / "index", BuildConfig(16))
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")


def test_not_enough_room_is_refused_with_numbers(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "e.parquet", clustered(5000, 32))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    with fails(ResourceError, tmp_path / "index", "1.00 MiB"):
        build_index(source, tmp_path / "index", BuildConfig())
    assert list(tmp_path.iterdir()) == [tmp_path / "e.parquet"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_output(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(TeleragError):
        build_index(file, tmp_path / "closed" / "index", BuildConfig())


def test_output_under_a_file(tmp_path):
    file = write_parquet(tmp_path / "e.parquet", clustered(50, 8))
    result = runner.invoke(app, ["build-index", str(file), "-o", str(file / "index")])
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
