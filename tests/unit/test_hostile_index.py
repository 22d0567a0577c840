"""Index files that were damaged or made to do harm: refused, told, or without effect."""

import contextlib
import itertools
import json
import os
import shutil
import threading

import numpy as np
import pytest
import xxhash

from expect import fails
from telerag_cli.config import Metric, Storage
from telerag_cli.errors import ArtifactError
from telerag_cli.files import checksum, read_sealed_json, write_sealed_json
from telerag_cli.index.artifact import Index
from telerag_cli.index.build import BuildConfig, build_index
from telerag_cli.index.partial import publish
from telerag_cli.index.passages import Passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.index.verify import verify
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.host import open_host_tier
from vector_files import clustered, embeddings_folder, write_parquet

NLIST = 6


@pytest.fixture
def root(tmp_path):
    source = embeddings_folder(tmp_path / "embeddings", clustered(1500, 8), 500)
    options = BuildConfig(NLIST, storage=Storage.FLOAT16, keep_vectors="float32")
    return build_index(source, tmp_path / "index", options).paths.root


def reseal(root, **changes):
    """Change the manifest, bring its sizes and checksums of files up to date, and give it the right one of its own."""
    manifest = {**read_sealed_json(root / "manifest.json"), **changes}
    for name, info in manifest["files"].items() if isinstance(manifest["files"], dict) else ():
        if (root / name).is_file() and isinstance(info, dict):
            info.update(bytes=(root / name).stat().st_size, checksum=checksum(root / name))
    write_sealed_json(root / "manifest.json", manifest)


def flip(path, place, bits=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


def passages_of(index):
    return Passages.open(index.held(index.paths.passages), index.manifest.ntotal, index.batch_checksums)


def search(index, query, nprobe=NLIST):
    coarse = Coarse(index.centroids, index.manifest.metric)
    retriever = Retriever(index, coarse, open_host_tier(index, coarse, 1 << 20))
    try:
        return retriever.search(query[None], 5, nprobe)
    finally:
        retriever.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, 1 << 40), (0, 0), (1, 1 << 63), (1, 1 << 61), (1, 3), (2, 1 << 63), (2, 1 << 40), (2, 4097), (2, 0)],
)
def test_a_table_that_leads_elsewhere_is_refused(root, column, value):
    table = np.load(root / "offsets.npy")
    table[NLIST - 1, column] = value
    np.save(root / "offsets.npy", table)
    reseal(root)
    with fails(ArtifactError, "offsets.npy"):
        Index.open(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"dimension": 0},
        {"dimension": 1 << 40},
        {"dimension": 16},
        {"nlist": 10**9},
        {"nlist": -1},
        {"nlist": "6"},
        {"nlist": True},
        {"ntotal": 10**15},
        {"ntotal": 1.5},
        {"code_size": 1 << 50},
        {"metric": "cosine"},
        {"storage": "int8"},
        {"storage": []},
        {"kept_vectors": ""},
        {"kept_vectors": "object"},
        {"embedder": None},
        {"embedder": {"model": 3}},
        {"embedder": {"model": None, "command": "x"}},
        {"files": {}},
        {"files": []},
        {"files": {"../../etc/passwd": {"bytes": 1, "checksum": "xxh3:0000000000000000"}}},
        {"recall_at_10": {"many": 0.5}},
        {"balance": {"min": {}}},
        {"unknown": 1},
        {"version": 99},
        {"format": None},
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(root, changes):
    reseal(root, **changes)
    with fails(ArtifactError, "ma" if "dimension" not in changes else ""):
        Index.open(root)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"nlist": 1e400}', "\x00" * 100])
def test_a_manifest_that_is_not_one_is_refused(root, text):
    (root / "manifest.json").write_text(text)
    with fails(ArtifactError, "manifest.json"):
        Index.open(root)


def test_an_index_of_an_earlier_version_is_opened(root):
    manifest = read_sealed_json(root / "manifest.json")
    for name in ("passages.npy", "row_checksums.npy"):
        del manifest["files"][name]
        (root / name).unlink()
    (root / "manifest.json").write_text(json.dumps(manifest))
    index = Index.open(root)
    assert index.batch_checksums is None
    assert len(passages_of(index)[range(1500)]) == 1500
    assert not verify(index, lambda _count: None)


@pytest.mark.parametrize("array", [np.array([{}] * NLIST), np.zeros(NLIST, "S8"), np.zeros((1, NLIST), np.uint64)])
def test_an_array_of_another_kind_is_never_unpacked(root, array):
    np.save(root / "checksums.npy", array, allow_pickle=True)
    reseal(root)
    with fails(ArtifactError, "checksums.npy"):
        Index.open(root)


def test_a_header_that_promises_more_than_there_is_takes_no_memory(root):
    path = root / "checksums.npy"
    path.write_bytes(path.read_bytes().replace(b"(6,), ", b"(6000000000000,), ").replace(b"     \n", b"\n"))
    reseal(root)
    with fails(ArtifactError, "checksums.npy"):
        Index.open(root)


@pytest.mark.parametrize("name", ["lists.bin", "manifest.json", "passages.arrow"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(root, name):
    (root / name).unlink()
    os.mkfifo(root / name)
    with fails(ArtifactError, name):
        Index.open(root)


def test_a_damaged_list_fails_only_who_needs_it(root):
    whole = Index.open(root)
    query = clustered(1500, 8)[3]
    near = Coarse(whole.centroids, Metric.IP).rank(query).tolist()
    flip(whole.paths.lists, int(whole.table[near[1], 2]) + 3)
    assert search(whole, query, 1)
    with fails(ArtifactError, f"List {near[1]}"):
        search(Index.open(root), query, 2)


def test_a_row_that_is_not_there_is_refused_though_its_checksum_is_right(root):
    index = Index.open(root)
    size, capacity, offset = map(int, index.table[0])
    assert size
    data = bytearray(index.paths.lists.read_bytes())
    begin = offset + capacity * index.manifest.code_size
    data[begin : begin + 8] = (1500).to_bytes(8, "little")
    index.paths.lists.write_bytes(data)
    sums = np.load(index.paths.checksums)
    end = offset + int(index.list_bytes[0])
    sums[0] = xxhash.xxh3_64_intdigest(bytes(data[offset:end]))
    np.save(index.paths.checksums, sums)
    reseal(root)
    with fails(ArtifactError, "row 1,500", "1,500"):
        search(Index.open(root), clustered(1500, 8)[0])


@pytest.mark.parametrize("summed", [True, False])
def test_a_damaged_batch_of_passages_is_told_where_it_is_read(root, summed):
    whole = Passages.open(root / "passages.arrow")[range(1500)]
    path, random = root / "passages.arrow", np.random.default_rng(0)
    data = path.read_bytes()
    told = 0
    for place in random.integers(len(data), size=300).tolist():
        flip(path, place, 0x80)
        try:
            index = Index.open(root)
            sums = index.batch_checksums if summed else None
            found = Passages.open(index.held(path), 1500, sums)[range(1500)]
        except ArtifactError:
            told += 1
        else:  # the file's footer and padding say what is not needed; without sums, a letter may be another
            assert found == whole or not summed
        path.write_bytes(data)
    assert told > 200 if summed else told


def test_passages_cut_short_while_they_are_open_are_an_error(root):
    index = Index.open(root)
    passages = passages_of(index)
    assert passages[[0, 1499]]
    os.truncate(index.paths.passages, 100)
    for rows in ([0], [1030]):
        with fails(ArtifactError, "passages.arrow"):
            passages[rows]


def test_kept_vectors_cut_short_while_they_are_open_are_an_error(root):
    index = Index.open(root)
    os.truncate(index.paths.vectors, 200)
    with fails(ArtifactError, "vectors.npy"):
        search(index, clustered(1500, 8)[0])


def test_a_damaged_kept_vector_is_told_where_it_is_used(root):
    index = Index.open(root)
    rows = np.arange(1500)
    whole = index.vectors[rows]
    flip(index.paths.vectors, index.paths.vectors.stat().st_size - 5)
    np.testing.assert_array_equal(index.vectors[rows[:-1]], whole[:-1])
    with fails(ArtifactError, "Row 1,499"):
        index.vectors[rows]


@pytest.mark.parametrize("name", ["centroids.npy", "offsets.npy", "checksums.npy", "passages.npy"])
def test_what_is_read_when_an_index_is_opened_is_compared_with_its_checksum(root, name):
    flip(root / name, (root / name).stat().st_size - 1)
    with fails(ArtifactError, name, "xxh3:"):
        Index.open(root)


def test_verify_finds_a_flipped_byte_in_every_file(root):
    for path in sorted(root.iterdir()):
        data = path.read_bytes()
        for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            flip(path, place)
            with contextlib.suppress(ArtifactError):
                assert verify(Index.open(root), lambda _count: None), (path.name, place)
            path.write_bytes(data)
    assert not verify(Index.open(root), lambda _count: None)


def test_what_is_opened_while_it_is_replaced_is_of_one_index(tmp_path):
    """The indexes differ in everything; what is opened is one of them, and there is always one."""
    texts, stop = {}, threading.Event()
    for number in range(2):
        vectors = clustered(1500, 8, seed=number)
        source = write_parquet(tmp_path / f"{number}.parquet", vectors, note=[f"of {number}"] * 1500)
        made = build_index(source, tmp_path / str(number), BuildConfig(NLIST))
        texts[made.manifest.source] = (number, made.centroids.tobytes())

    def swap():
        for number in itertools.cycle([0, 1]):
            if stop.is_set():
                return
            shutil.copytree(tmp_path / str(number), tmp_path / "next")
            publish(tmp_path / "next", tmp_path / "index")

    shutil.copytree(tmp_path / "0", tmp_path / "index")
    publisher = threading.Thread(target=swap)
    publisher.start()
    seen = set()
    try:
        for _ in range(150):
            index = Index.open(tmp_path / "index")
            number, centroids = texts[index.manifest.source]
            assert index.centroids.tobytes() == centroids
            assert search(index, index.centroids[0]).report.lists_missed == NLIST
            assert passages_of(index)[[1499]][0].metadata == {"note": f"of {number}"}
            seen.add(number)
    finally:
        stop.set()
        publisher.join()
    assert seen == {0, 1}
