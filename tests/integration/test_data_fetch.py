"""Fetching datasets: from a server on this machine that fails in every way, and from copies."""

import contextlib
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

from dataset_files import description, serving
from telerag_cli.cli import data
from telerag_cli.datasets.cache import Cached
from telerag_cli.datasets.catalogue import describe
from telerag_cli.datasets.fetch import Copies, fetch_files
from telerag_cli.errors import InputError

BODY = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()

program = typer.Typer()
program.add_typer(data.app)


class Place:
    """A described dataset of one file, a cache for it, and the command."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        self.name = self.describe()

    def describe(self, **fields):
        self.name = description(self.folder, "small", "flashrag", [{"name": "a.jsonl", **fields}])
        return self.name

    def run(self, action, *arguments):
        command = ["data", action, self.name, "--cache-dir", str(self.cache), *map(str, arguments)]
        return CliRunner().invoke(program, command)

    def fetch(self, *arguments):
        return self.run("fetch", *arguments)

    @property
    def cached(self):
        return Cached.of(describe(self.name), self.cache)

    @property
    def file(self):
        return self.cache / "small" / "a.jsonl"

    @property
    def part(self):
        return self.cache / "small" / "a.jsonl.part"

    @property
    def source(self):
        return json.loads((self.cache / "small" / "source.json").read_text())["files"]["a.jsonl"]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def server():
    with serving(files={"a.jsonl": BODY}) as server:
        yield server


def leftovers(place):
    return sorted(path.name for path in place.file.parent.iterdir() if path.name != ".lock")


def test_a_file_is_fetched_checked_noted_and_left_alone_afterwards(place, server):
    address = f"{server.base}/a.jsonl"
    place.describe(address=address, bytes=len(BODY), sha256=SHA256)
    result = place.fetch()
    assert (result.exit_code, result.stdout) == (0, f"{place.file}\n")
    assert "licence: ours" in result.stderr
    assert "its checksum is the one published" in result.stderr
    assert place.file.read_bytes() == BODY
    assert {**place.source, "date": ""} == {
        "address": address,
        "bytes": len(BODY),
        "sha256": SHA256,
        "md5": None,
        "date": "",
        "etag": '"one"',
        "last_modified": None,
    }
    assert place.source["date"].endswith("+00:00")
    assert leftovers(place) == ["a.jsonl", "source.json"]
    again = place.fetch()
    assert (again.exit_code, again.stdout) == (0, f"{place.file}\n")
    assert "is there already" in again.stderr
    assert len(server.asked) == 1


def test_an_interrupted_file_goes_on_where_it_stopped(place, server):
    server.drop_after = 100_000
    first = place.fetch("--from", server.base)
    assert first.exit_code == 1
    assert "stopped before its end" in first.stderr
    assert "Run the same command again" in first.stderr
    assert not place.file.exists()
    assert place.part.read_bytes() == BODY[:100_000]
    assert place.cached.state() == "partial 19%"
    second = place.fetch("--from", server.base)
    assert second.exit_code == 0
    assert place.file.read_bytes() == BODY
    assert server.asked == [("/a.jsonl", None, None), ("/a.jsonl", "bytes=100000-", '"one"')]
    assert leftovers(place) == ["a.jsonl", "source.json"]


@pytest.mark.parametrize(
    ("etag", "modified", "condition"),
    [
        (None, "Mon, 02 Jan 2023 03:04:05 GMT", "Mon, 02 Jan 2023 03:04:05 GMT"),
        ('W/"weak"', None, None),  # an ETag that If-Range does not take
        (None, None, None),
    ],
)
def test_what_a_server_tells_decides_how_the_rest_is_asked_for(place, server, etag, modified, condition):
    server.etag, server.modified, server.drop_after = etag, modified, 5000
    place.fetch("--from", server.base)
    assert place.fetch("--from", server.base).exit_code == 0
    assert server.asked[1] == ("/a.jsonl", "bytes=5000-", condition)
    assert place.file.read_bytes() == BODY


@pytest.mark.parametrize("weak", [False, True])
def test_a_file_that_changed_meanwhile_is_fetched_anew(place, server, weak):
    mark = "W/" if weak else ""
    server.etag, server.drop_after = f'{mark}"one"', 5000
    place.fetch("--from", server.base)
    server.etag, server.files["a.jsonl"] = f'{mark}"two"', BODY[::-1]
    result = place.fetch("--from", server.base)
    assert result.exit_code == 0
    assert "it has changed at its source" in " ".join(result.stderr.split())
    assert place.file.read_bytes() == BODY[::-1]
    assert place.source["etag"] == f'{mark}"two"'


def test_a_file_that_became_shorter_is_fetched_anew(place, server):
    server.etag, server.drop_after = None, 5000
    place.fetch("--from", server.base)
    server.files["a.jsonl"] = BODY[:300]
    assert place.fetch("--from", server.base).exit_code == 0
    assert place.file.read_bytes() == BODY[:300]


def test_a_server_without_ranges_sends_all_of_it_again(place, server):
    server.ranges, server.drop_after = False, 5000
    place.fetch("--from", server.base)
    result = place.fetch("--from", server.base)
    assert result.exit_code == 0
    assert "cannot send a part of it" in " ".join(result.stderr.split())
    assert place.file.read_bytes() == BODY


def test_what_came_from_elsewhere_is_not_gone_on_with(place, server):
    server.drop_after = 5000
    place.fetch("--from", server.base)
    server.files["other/a.jsonl"] = BODY[::-1]
    result = place.fetch("--from", f"{server.base}/other")
    assert result.exit_code == 0
    assert "it came from" in result.stderr
    assert place.file.read_bytes() == BODY[::-1]


def test_all_bytes_had_come_before_the_name_was_given(place, server):
    place.fetch("--from", server.base)
    place.file.rename(place.part)
    note = {"address": f"{server.base}/a.jsonl", "etag": '"one"', "last_modified": None, "bytes": len(BODY)}
    (place.part.parent / "a.jsonl.part.json").write_text(json.dumps(note))
    assert place.fetch("--from", server.base).exit_code == 0
    assert place.file.read_bytes() == BODY
    assert len(server.asked) == 1


def test_a_torn_note_means_beginning_anew(place, server):
    server.drop_after = 5000
    place.fetch("--from", server.base)
    (place.part.parent / "a.jsonl.part.json").write_text('{"addr')
    assert place.fetch("--from", server.base).exit_code == 0
    assert place.file.read_bytes() == BODY


@pytest.mark.parametrize(("name", "value"), [("sha256", SHA256), ("md5", MD5)])
def test_a_wrong_checksum_names_both_and_keeps_nothing(place, server, name, value):
    place.describe(**{name: value})
    server.files["a.jsonl"] = BODY[::-1]
    result = place.fetch("--from", server.base)
    found = hashlib.new(name, BODY[::-1]).hexdigest()
    assert result.exit_code == 1
    assert f"its {name} is {found}, and {value} is expected" in result.stderr
    assert leftovers(place) == []
    server.files["a.jsonl"] = BODY
    assert place.fetch("--from", server.base).exit_code == 0


def test_a_wrong_size_is_told_before_anything_is_fetched(place, server):
    place.describe(bytes=7)
    result = place.fetch("--from", server.base)
    assert result.exit_code == 1
    assert f"has {len(BODY):,} bytes, and a.jsonl should have 7" in result.stderr
    assert not place.part.exists()


def test_a_server_that_tells_no_length_is_judged_by_the_size_that_is_known(place, server):
    place.describe(bytes=len(BODY))
    server.length, server.drop_after = False, 5000
    result = place.fetch("--from", server.base)
    assert result.exit_code == 1
    assert "stopped before its end: 5,000 of 512,000 bytes came" in result.stderr
    assert place.fetch("--from", server.base).exit_code == 0
    assert place.file.read_bytes() == BODY


def test_a_published_file_without_a_checksum_says_so(place, server):
    assert f"there is no published checksum, it has sha256 {SHA256}" in place.fetch("--from", server.base).stderr


@pytest.mark.parametrize(("status", "says"), [(None, "404 Not Found"), (503, "503 Service Unavailable")])
def test_a_refusal_names_the_address_and_the_answer(place, server, status, says):
    server.files.clear()
    server.status = status
    result = place.fetch("--from", server.base)
    assert result.exit_code == 1
    assert f"{server.base}/a.jsonl answers {says}." in result.stderr


def test_redirections_are_followed_and_circles_are_not(place, server):
    server.moved = {"/old/a.jsonl": "/a.jsonl", "/b/a.jsonl": "/b/a.jsonl"}
    assert place.fetch("--from", f"{server.base}/old/").exit_code == 0
    assert place.file.read_bytes() == BODY
    place.file.unlink()
    result = place.fetch("--from", f"{server.base}/b")
    assert result.exit_code == 1
    assert "redirects" in result.stderr


def test_nobody_listens(place):
    result = place.fetch()  # the description names a port where nothing is
    assert result.exit_code == 1
    assert "http://127.0.0.1:9/a.jsonl cannot be reached" in result.stderr
    assert "--mirror" in result.stderr


def test_a_silent_server_is_waited_for_so_long(place, server):
    server.stall = threading.Event()

    def no_bar(_description, _total):
        return contextlib.nullcontext(lambda _count: None)

    copies = Copies(server.base)
    with pytest.raises(InputError, match=r"no answer within 0\.2 s") as caught:
        list(
            fetch_files(
                place.cached, place.cached.dataset.files, copies, progress=no_bar, notice=pytest.fail, timeout_s=0.2
            )
        )
    assert "Run the same command again" in caught.value.remedy
    assert place.part.stat().st_size == len(BODY) // 2


def test_a_full_disk_is_told_with_both_sizes_before_anything_is_written(place, server, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 9, 1024))
    result = place.fetch("--from", server.base)
    assert result.exit_code == 1
    assert "a.jsonl needs 500.0 KiB more, and 1.00 KiB are free" in result.stderr
    assert leftovers(place) == []


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
    result = place.fetch(*arguments)
    assert result.exit_code == 0
    assert place.file.read_bytes() == BODY
    assert place.source["sha256"] == SHA256
    assert str(place.source["address"]).endswith("small/a.jsonl")
    assert copy.read_bytes() == BODY


def test_a_copy_of_another_size_or_a_missing_one(place, tmp_path):
    place.describe(bytes=len(BODY))
    (tmp_path / "a.jsonl").write_bytes(b"short")
    result = place.fetch("--from", tmp_path / "a.jsonl")
    assert (result.exit_code, "has 5 bytes, and a.jsonl should have 512,000" in result.stderr) == (1, True)
    result = place.fetch("--from", tmp_path / "nowhere")
    assert (result.exit_code, "nowhere/a.jsonl does not exist" in result.stderr) == (1, True)


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
    refused = fetch("--from", str(other))
    assert (refused.exit_code, "is one file, and two has dev.jsonl, test.jsonl" in refused.stderr) == (2, True)


def test_two_at_once_are_kept_apart(place, server):
    with place.cached.locked():
        result = place.fetch("--from", server.base)
    assert (result.exit_code, "Another telerag is at work" in result.stderr) == (1, True)
    assert place.fetch("--from", server.base).exit_code == 0


PROGRAM = "import typer\nfrom telerag_cli.cli import data\napp = typer.Typer()\napp.add_typer(data.app)\napp()\n"


def test_ctrl_c_leaves_what_came_and_the_next_time_goes_on(place, server):
    server.stall = threading.Event()
    arguments = ["data", "fetch", place.name, "--cache-dir", str(place.cache), "--from", server.base]
    source = str(Path(sys.modules["telerag_cli"].__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        end = time.monotonic() + 20
        while not (place.part.exists() and place.part.stat().st_size >= len(BODY) // 4) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=20)
    assert (process.returncode, printed) == (130, "")
    assert "what was finished is kept" in told
    come = place.part.stat().st_size
    assert 0 < come <= len(BODY) // 2
    assert place.part.read_bytes() == BODY[:come]
    server.stall.set()
    server.stall = None
    assert place.fetch("--from", server.base).exit_code == 0
    assert server.asked[-1] == ("/a.jsonl", f"bytes={come}-", '"one"')
    assert place.file.read_bytes() == BODY


def test_check_says_how_far_it_came(place, server):
    server.drop_after = 5000
    place.fetch("--from", server.base)
    result = place.run("check")
    assert (result.exit_code, "only 5,000 of 512,000 bytes have come" in result.stderr) == (1, True)
