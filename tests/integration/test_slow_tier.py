"""The lists in host memory: read whole, shared between processes, and never taken for what they are not."""

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from expect import fails
from searching import small_index
from telerag_cli.config import PAGE_BYTES
from telerag_cli.errors import ArtifactError
from telerag_cli.index.artifact import Index
from telerag_cli.index.build import BuildConfig, build_index
from telerag_cli.tiers.slow import SlowTier
from vector_files import clustered, write_parquet


@pytest.fixture
def index(tmp_path):
    return small_index(tmp_path)[0]


def child(index, code):
    """Another process of this user that runs code with `index` at hand; its input and output are pipes."""
    prelude = (
        "import sys, types, pathlib, numpy as np, time\n"
        "from telerag_cli.tiers.slow import SlowTier\n"
        "paths = types.SimpleNamespace(lists=pathlib.Path(sys.argv[1]))\n"
        f"nbytes = np.array({index.list_bytes.tolist()})\n"
        "index = types.SimpleNamespace(paths=paths, list_bytes=nbytes, held=lambda path: path, checksums=None)\n"
    )
    command = [sys.executable, "-c", prelude + code, str(index.paths.lists)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def check_whole(index, *, shared):
    with closing(SlowTier(index)) as slow:
        assert slow.shared == shared
        assert slow.memory.tobytes() == index.paths.lists.read_bytes()


def test_lists_are_read_whole_and_another_process_shares_them(index):
    read = []
    with closing(SlowTier(index, read.append)) as slow:
        assert not slow.shared
        assert sum(read) == index.paths.lists.stat().st_size
        assert slow.memory.tobytes() == index.paths.lists.read_bytes()
        total = int(slow.memory.sum(dtype=np.int64))
        other = child(
            index, "slow = SlowTier(index); print(slow.shared, slow.memory.sum(dtype='int64'), flush=True); input()"
        )
        assert other.stdout.readline().split() == ["True", str(total)]
        slow.memory[7] ^= 0xFF  # the very same pages, so the next one sees it
        third = child(index, "print(int(SlowTier(index).memory[7]), flush=True)")
        assert int(third.communicate()[0]) == slow.memory[7]
        slow.memory[7] ^= 0xFF
    # The first has let go; who has it keeps it, and gives it on.
    check_whole(index, shared=True)
    other.communicate("\n")
    check_whole(index, shared=False)


def test_a_reader_that_is_killed_leaves_nothing_half_read(index):
    reader = child(index, "def stall(count):\n    print('reading', flush=True); time.sleep(60)\nSlowTier(index, stall)")
    assert reader.stdout.readline() == "reading\n"
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    check_whole(index, shared=False)


def test_another_index_in_its_place_is_not_taken_for_it(index):
    with closing(SlowTier(index)):
        size = index.paths.lists.stat().st_size
        index.paths.lists.unlink()
        index.paths.lists.write_bytes(os.urandom(size))
        check_whole(index, shared=False)


def test_a_file_too_short_is_an_error_and_nobody_finds_what_was_read(index):
    whole = index.paths.lists.read_bytes()
    os.truncate(index.paths.lists, PAGE_BYTES)
    with fails(ArtifactError, "lists.bin", "4,096") as kept:
        SlowTier(index)
    seen = child(index, "try: SlowTier(index)\nexcept Exception as error: print(error, flush=True)").communicate()[0]
    assert "4,096" in seen
    assert kept  # what failed is still referenced
    index.paths.lists.write_bytes(whole)
    check_whole(index, shared=False)


@pytest.mark.parametrize("change", ["size", "owner", "unsealed"])
def test_memory_that_is_not_this_users_own_is_not_taken_for_the_lists(index, change):
    if change == "owner" and os.geteuid():
        pytest.skip("only root sees the memory of others")
    status, nbytes = index.paths.lists.stat(), int(index.list_bytes.sum())
    name = f"telerag-{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"
    memory = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, nbytes + PAGE_BYTES * (change == "size"))
        if change == "owner":
            os.fchown(memory, 65534, 65534)
        if change != "unsealed":
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        check_whole(index, shared=False)
    finally:
        os.close(memory)


def test_a_damaged_list_is_named_before_the_tier_is_there(tmp_path):
    source = write_parquet(tmp_path / "e.parquet", clustered(500, 8))
    index = build_index(source, tmp_path / "index", BuildConfig(4))
    with index.paths.lists.open("r+b") as file:
        file.seek(int(index.offsets[2]) + 1)
        file.write(b"\xff\xff")
    with fails(ArtifactError, "List 2"):
        SlowTier(Index.open(index.paths.root))
    with fails(ArtifactError, "List 2"):  # nobody has kept it
        SlowTier(Index.open(index.paths.root))
