"""Writers of one file, what killed ones leave, files held open, and JSON with its own checksum."""

import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from expect import fails
from telerag_cli.errors import ArtifactError, ResourceError
from telerag_cli.files import (
    HeldFile,
    HeldFolder,
    exclusive,
    read_json,
    read_sealed_json,
    replacing,
    write_sealed_json,
    writing,
)
from telerag_cli.index.partial import publish
from telerag_cli.planning.averages import Averages

fork = multiprocessing.get_context("fork")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_second_writer_is_refused_and_the_first_wins_whole(tmp_path):
    path = tmp_path / "out"
    with writing(path) as temporary:
        temporary.write_text("first")
        with fails(ResourceError, "out"), writing(path):
            pytest.fail("two writers")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_of_several_that_replace_a_file_the_last_wins_whole(tmp_path):
    path = tmp_path / "out"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_who_waits_for_a_hold_comes_second(tmp_path):
    order, entered = [], threading.Event()

    def second():
        entered.set()
        with exclusive(tmp_path / "out", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive(tmp_path / "out"):
        thread.start()
        entered.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not names(tmp_path)


def _killed_while_writing(path):
    with writing(path) as temporary:
        temporary.write_text("half")
        os._exit(9)


def test_what_a_killed_writer_leaves_goes_with_the_next_one(tmp_path):
    path = tmp_path / "out"
    child = fork.Process(target=_killed_while_writing, args=(path,))
    child.start()
    child.join()
    assert any(name.endswith(".partial") for name in names(tmp_path))
    (tmp_path / ".out.partial").touch()  # of an earlier version
    (tmp_path / ".other.1234.partial").touch()
    with writing(path) as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == [".other.1234.partial", "out"]


def test_a_link_in_the_place_of_a_file_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in ("out", ".out.partial"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    with writing(tmp_path / "out") as temporary:
        temporary.write_text("mine")
    assert ((tmp_path / "out").is_symlink(), (tmp_path / "out").read_text()) == (False, "mine")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "victim")
    with fails(ResourceError), exclusive(tmp_path / "out"):
        pytest.fail("a link was followed")
    assert (tmp_path / "victim").read_text() == "precious"


def _observe(path, count):
    averages = Averages(path)
    for _ in range(count):
        averages.observe("stage", "tokens", 5.0)
        averages.save()


def test_no_writer_of_averages_loses_what_another_saved(tmp_path):
    path = tmp_path / "cache" / "averages.json"
    writers = [fork.Process(target=_observe, args=(path, 25)) for _ in range(4)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert [each.exitcode for each in writers] == [0] * 4
    assert read_json(path)["averages"] == {"stage tokens": [5.0, 100]}
    assert names(path.parent) == ["averages.json"]


def test_a_held_file_stays_the_same_when_another_gets_its_name(tmp_path):
    path = tmp_path / "file"
    path.write_text("first")
    held = HeldFile(path)
    path.unlink()
    path.write_text("another")
    assert (Path(held).read_text(), held.size, str(held)) == ("first", 5, str(path))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_not_a_regular_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "file")
    with fails(ArtifactError, "file"):
        HeldFile(tmp_path / "file")


def test_publishing_leaves_no_moment_without_the_folder(tmp_path):
    root, stop, absent = tmp_path / "index", threading.Event(), []
    root.mkdir()

    def look():
        while not stop.is_set():
            if not root.exists():
                absent.append(True)

    watcher = threading.Thread(target=look)
    watcher.start()
    for number in range(200):
        made = tmp_path / "made"
        made.mkdir()
        (made / "number").write_text(str(number))
        held = HeldFolder(root)
        publish(made, root)
        assert held.replaced()
        assert (root / "number").read_text() == str(number)
    stop.set()
    watcher.join()
    assert not absent
    assert names(tmp_path) == ["index"]


def test_publishing_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr("telerag_cli.index.partial._exchange", lambda _one, _other: False)
    for name in ("index", "made"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish(tmp_path / "made", tmp_path / "index")
    assert (tmp_path / "index" / "file").read_text() == "made"
    assert names(tmp_path) == ["index"]


def test_every_changed_byte_of_sealed_json_is_refused(tmp_path):
    path = tmp_path / "sealed.json"
    value = {"a": 0.1, "text": "ä", "list": [1, None, True]}
    write_sealed_json(path, value)
    assert read_sealed_json(path) == value
    whole = path.read_bytes()
    for place in range(len(whole)):
        for change in (1, 0x20, 0x2A):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            try:
                found = read_sealed_json(path)
            except ArtifactError:
                continue
            # The name of the checksum itself was hit: whoever knows the keys refuses this one.
            assert set(found) - set(value)
    path.write_text(json.dumps(value))  # by a version without checksums
    assert read_sealed_json(path) == value


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": 1e400}', '{"a": NaN}', b"\xed\xa0\x80"])
def test_json_that_is_not_strict_is_an_error(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with fails(ArtifactError, "file.json"):
        read_json(path)
