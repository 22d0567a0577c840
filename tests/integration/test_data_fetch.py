"""Fetching datasets: from a local server that fails in every way, and from copies."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dataset_files import description, failed, serving
from expect import fails
from telerag_cli.cli import data
from telerag_cli.datasets.cache import Cached
from telerag_cli.datasets.catalogue import describe
from telerag_cli.datasets.fetch import fetch_files
from telerag_cli.errors import InputError
from telerag_cli.progress import silent

BODY = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()

program = typer.Typer()
program.add_typer(data.app)


class Place:
    """A described dataset of one file, a cache for it, and the command."""

    def __init__(self, folder, server):
        self.folder, self.cache, self.base = folder, folder / "cache", server.base
        self.name = self.describe()
        self.file = self.cache / "small" / "a.jsonl"
        self.part, self.note = self.file.with_name("a.jsonl.part"), self.file.with_name("a.jsonl.part.json")

    def describe(self, **fields):
        self.name = description(self.folder, "small", "flashrag", [{"name": "a.jsonl", **fields}])
        return self.name

    def run(self, action, *arguments):
        command = ["data", action, self.name, "--cache-dir", str(self.cache), *map(str, arguments)]
        return CliRunner().invoke(program, command)

    def fetch(self, *arguments):
        return self.run("fetch", *(arguments or ("--from", self.base)))

    def holds(self, body):
        """The file is complete, nothing else is left, and what is noted agrees."""
        left = sorted(path.name for path in self.file.parent.iterdir() if path.name != ".lock")
        assert left == ["a.jsonl", "source.json"]
        assert self.file.read_bytes() == body
        noted = json.loads((self.cache / "small" / "source.json").read_text())["files"]["a.jsonl"]
        assert (noted["bytes"], noted["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
        return noted

    @property
    def cached(self):
        return Cached.of(describe(self.name), self.cache)


@pytest.fixture
def server():
    with serving(files={"a.jsonl": BODY}) as server:
        yield server


@pytest.fixture
def place(tmp_path, server):
    return Place(tmp_path, server)


def test_a_file_is_fetched_checked_noted_and_left_alone_afterwards(place, server):
    address = f"{server.base}/a.jsonl"
    place.describe(address=address, bytes=len(BODY), sha256=SHA256)
    result = place.run("fetch")
    assert (result.exit_code, result.stdout) == (0, f"{place.file}\n")
    assert "licence: ours" in result.stderr
    noted = place.holds(BODY)
    assert noted["address"] == address
    assert noted["date"].endswith("+00:00")
    again = place.run("fetch")
    assert (again.exit_code, again.stdout) == (0, f"{place.file}\n")
    assert len(server.asked) == 1


def test_an_interrupted_file_continues_where_it_stopped(place, server):
    server.drop_after = 100_000
    failed(place.fetch(), 1, server.base, "100,000 bytes", "512000")
    assert not place.file.exists()
    assert place.part.read_bytes() == BODY[:100_000]
    assert place.cached.state() == "partial 19%"
    failed(place.run("check"), 1, "a.jsonl", "100,000", "512,000")
    assert place.fetch().exit_code == 0
    place.holds(BODY)
    assert server.asked == [("/a.jsonl", None, None), ("/a.jsonl", "bytes=100000-", '"one"')]


DATE = "Mon, 02 Jan 2023 03:04:05 GMT"


@pytest.mark.parametrize(
    ("etag", "modified", "published", "asked"),
    [
        ('"one"', DATE, False, ("bytes=5000-", '"one"')),
        (None, DATE, False, ("bytes=5000-", DATE)),
        ('W/"weak"', None, True, ("bytes=5000-", None)),  # an ETag that If-Range does not take
        (None, None, True, ("bytes=5000-", None)),
        (None, None, False, (None, None)),  # nobody could tell if the file changed
    ],
)
def test_the_rest_is_requested_where_a_change_would_be_noticed(place, server, etag, modified, published, asked):
    if published:
        place.describe(sha256=SHA256)
    server.etag, server.modified, server.drop_after = etag, modified, 5000
    place.fetch()
    assert place.fetch().exit_code == 0
    assert server.asked[1] == ("/a.jsonl", *asked)
    place.holds(BODY)


def change(server):
    server.etag, server.files["a.jsonl"] = '"two"', BODY[::-1]


def shorten(server):
    server.etag, server.ignores_condition, server.files["a.jsonl"] = '"two"', True, BODY[:300]


def no_ranges(server):
    server.ranges = False


@pytest.mark.parametrize(("meanwhile", "body"), [(change, BODY[::-1]), (shorten, BODY[:300]), (no_ranges, BODY)])
def test_what_cannot_be_continued_is_fetched_anew(place, server, meanwhile, body):
    server.drop_after = 5000
    place.fetch()
    meanwhile(server)
    result = place.fetch()
    assert result.exit_code == 0
    assert "4.88 KiB" in result.stderr
    place.holds(body)


def test_what_came_from_elsewhere_is_not_continued(place, server):
    server.drop_after = 5000
    place.fetch()
    server.files["other/a.jsonl"] = BODY[::-1]
    result = place.fetch("--from", f"{server.base}/other")
    assert (result.exit_code, f"{server.base}/a.jsonl" in result.stderr) == (0, True)
    place.holds(BODY[::-1])


def test_a_complete_file_that_was_not_renamed_is_not_fetched_again(place, server):
    place.fetch()
    place.file.rename(place.part)
    place.note.write_text(json.dumps({"address": f"{server.base}/a.jsonl", "condition": '"one"', "bytes": len(BODY)}))
    assert place.fetch().exit_code == 0
    place.holds(BODY)
    assert len(server.asked) == 1


def test_a_torn_note_means_starting_over(place, server):
    server.drop_after = 5000
    place.fetch()
    place.note.write_text('{"addr')
    assert place.fetch().exit_code == 0
    place.holds(BODY)


@pytest.mark.parametrize(("name", "value"), [("sha256", SHA256), ("md5", MD5)])
def test_a_wrong_checksum_names_both_and_keeps_nothing(place, server, name, value):
    place.describe(**{name: value})
    server.files["a.jsonl"] = BODY[::-1]
    failed(place.fetch(), 1, name, hashlib.new(name, BODY[::-1]).hexdigest(), value)
    assert [path.name for path in place.file.parent.iterdir()] == [".lock"]
    server.files["a.jsonl"] = BODY
    assert place.fetch().exit_code == 0


def test_a_wrong_size_is_noticed_before_anything_is_fetched(place):
    place.describe(bytes=7)
    failed(place.fetch(), 1, f"{len(BODY):,} bytes", "should have 7")
    assert not place.part.exists()


def test_without_a_length_the_known_size_decides(place, server):
    place.describe(bytes=len(BODY))
    server.length, server.drop_after = False, 5000
    failed(place.fetch(), 1, "5,000 bytes", "512,000")
    assert place.fetch().exit_code == 0
    place.holds(BODY)


def test_a_published_file_without_a_checksum_says_so(place):
    assert SHA256 in place.fetch().stderr


@pytest.mark.parametrize(("status", "says"), [(None, "404 Not Found"), (503, "503 Service Unavailable")])
def test_a_refusal_names_the_address_and_the_answer(place, server, status, says):
    server.files.clear()
    server.status = status
    failed(place.fetch(), 1, f"{server.base}/a.jsonl", says)


def test_redirections_are_followed_and_circles_are_not(place, server):
    server.moved = {"/old/a.jsonl": "/a.jsonl", "/b/a.jsonl": "/b/a.jsonl"}
    assert place.fetch("--from", f"{server.base}/old/").exit_code == 0
    place.holds(BODY)
    place.file.unlink()
    failed(place.fetch("--from", f"{server.base}/b"), 1, f"{server.base}/b/a.jsonl", "redirects")


def test_nobody_listens(place):
    failed(place.run("fetch"), 1, "http://127.0.0.1:9/a.jsonl", "--mirror")  # no server is at that port


def test_a_silent_server_is_waited_for_so_long(place, server):
    server.stall = threading.Event()

    files = place.cached.dataset.files
    with fails(InputError, server.base, "0.2 s"):
        list(fetch_files(place.cached, files, server.base, progress=silent, notice=print, timeout_s=0.2))
    assert place.part.stat().st_size == len(BODY) // 2


def test_a_full_disk_is_noticed_with_both_sizes_before_anything_is_written(place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 9, 1024))
    failed(place.fetch(), 1, "a.jsonl", "500.0 KiB", "1.00 KiB")
    assert [path.name for path in place.file.parent.iterdir()] == [".lock"]


@pytest.mark.parametrize("how", ["file", "folder", "mirror", "address of the file", "mirror's address"])
def test_copies(place, server, tmp_path, how):
    copy = tmp_path / "copy" / "small" / "a.jsonl"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(BODY)
    server.files = {"m/small/a.jsonl": BODY}
    arguments = {
        "file": ("--from", copy),
        "folder": ("--from", copy.parent),
        "mirror": ("--mirror", tmp_path / "copy"),
        "address of the file": ("--from", f"{server.base}/m/small/a.jsonl"),
        "mirror's address": ("--mirror", f"{server.base}/m/"),
    }[how]
    place.describe(sha256=SHA256)
    assert place.fetch(*arguments).exit_code == 0
    assert str(place.holds(BODY)["address"]).endswith("small/a.jsonl")
    assert copy.read_bytes() == BODY


def test_a_copy_of_another_size_or_a_missing_one(place, tmp_path):
    place.describe(bytes=len(BODY))
    (tmp_path / "a.jsonl").write_bytes(b"short")
    failed(place.fetch("--from", tmp_path / "a.jsonl"), 1, "5 bytes", "512,000")
    failed(place.fetch("--from", tmp_path / "nowhere"), 1, "nowhere/a.jsonl")


def test_one_copy_of_several_files_is_that_file_only(tmp_path, server):
    files = [{"name": "dev.jsonl", "split": "dev"}, {"name": "test.jsonl", "split": "test"}]
    name = description(tmp_path, "two", "flashrag", files)
    server.files = {"test.jsonl": BODY, "dev.jsonl": BODY}
    cache = tmp_path / "cache"

    def fetch(*arguments):
        return CliRunner().invoke(program, ["data", "fetch", name, "--cache-dir", str(cache), *arguments])

    assert fetch("--from", f"{server.base}/test.jsonl").stdout == f"{cache / 'two' / 'test.jsonl'}\n"
    assert Cached.of(describe(name), cache).state() == "fetched (test)"
    assert fetch("--from", server.base, "--split", "dev").stdout == f"{cache / 'two' / 'dev.jsonl'}\n"
    assert Cached.of(describe(name), cache).state() == "fetched"
    other = tmp_path / "other.jsonl"
    other.write_bytes(BODY)
    failed(fetch("--from", str(other)), 2, other, "dev.jsonl, test.jsonl")


def test_two_at_once_are_kept_apart(place):
    with place.cached.locked():
        failed(place.fetch(), 1, place.cache)
    assert place.fetch().exit_code == 0


PROGRAM = "import typer\nfrom telerag_cli.cli import data\napp = typer.Typer()\napp.add_typer(data.app)\napp()\n"


def test_ctrl_c_leaves_what_arrived_and_the_next_time_continues(place, server):
    server.stall = threading.Event()
    arguments = ["data", "fetch", place.name, "--cache-dir", str(place.cache), "--from", server.base]
    source = str(Path(sys.modules["telerag_cli"].__file__).parent.parent)
    command, environment = [sys.executable, "-c", PROGRAM, *arguments], {**os.environ, "PYTHONPATH": source}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        end = time.monotonic() + 20
        while not (place.part.exists() and place.part.stat().st_size >= len(BODY) // 4) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, _told = process.communicate(timeout=20)
    assert (process.returncode, printed) == (130, "")
    arrived = place.part.stat().st_size
    assert 0 < arrived <= len(BODY) // 2
    assert place.part.read_bytes() == BODY[:arrived]
    server.stall.set()
    server.stall = None
    assert place.fetch().exit_code == 0
    assert server.asked[-1] == ("/a.jsonl", f"bytes={arrived}-", '"one"')
    place.holds(BODY)


@pytest.mark.parametrize(
    "fields", [{"bytes": len(BODY)}, {"about_bytes": len(BODY)}, {}], ids=["promised", "rounded", "unknown"]
)
def test_an_endless_body_is_not_followed(place, server, fields, monkeypatch):
    server.endless, server.length = True, False
    usage = namedtuple("usage", "total used free")
    left = iter(range(1 << 30, 0, -(128 << 20)))  # as if the disk filled up fast
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(0, 0, next(left) if not fields else 1 << 40))
    place.describe(**fields)
    failed(place.fetch(), 1, "a.jsonl")
    assert place.part.stat().st_size < 100 * len(BODY)
    assert not place.file.exists()


@pytest.mark.parametrize("linked", [SHA256, "0" * 64])
def test_a_checksum_that_the_server_gives_with_a_redirection_is_compared(place, server, linked):
    server.moved, server.linked = {"/from/a.jsonl": "/a.jsonl"}, f'"{linked}"'
    place.describe()
    result = place.fetch("--from", f"{server.base}/from")
    if linked == SHA256:
        place.holds(BODY)
    else:
        failed(result, 1, linked, SHA256)
        assert not place.file.exists()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../../x", ".hidden"])
def test_a_dataset_is_not_named_like_a_path(tmp_path, name):
    path = description(tmp_path, "small", "flashrag", [{"name": "a.jsonl"}])
    Path(path).write_text(Path(path).read_text().replace('name = "small"', f'name = "{name}"', 1))
    with fails(InputError, "name"):
        describe(path)
