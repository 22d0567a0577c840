import json

import numpy as np
import pytest
from typer.testing import CliRunner

from expect import fails
from telerag_cli.cli.app import app
from telerag_cli.config import Storage
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.errors import ArtifactError
from telerag_cli.index.artifact import Index
from telerag_cli.index.build import BuildConfig, build_index
from telerag_cli.index.partial import partial_of
from vector_files import clustered, embeddings_folder, write_parquet

runner = CliRunner()


def inspect(*arguments):
    return runner.invoke(app, ["inspect", *map(str, arguments)])


def flip(path, position):
    with path.open("r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ 1]))


@pytest.fixture
def folder(tmp_path):
    return embeddings_folder(tmp_path / "embeddings", clustered(600, 8), 250)


@pytest.fixture
def index(tmp_path, folder):
    return build_index(Embeddings.open(folder), tmp_path / "index", BuildConfig(12))


def test_index(index):
    result = inspect(index.paths.root, "--verify")
    assert result.exit_code == 0
    assert "every byte is as it was written" in " ".join(result.stdout.split())
    for part in ("telerag index", "600 of 8 dimensions", "12, seed 0", "held-out"):
        assert part in result.stdout


def test_index_as_json(index):
    answer = json.loads(inspect(index.paths.root, "--json").stdout)
    assert (answer["kind"], answer["nlist"], answer["ntotal"]) == ("telerag index", 12, 600)
    assert answer["metric"] == "ip"
    assert answer["files"]["lists.bin"]["bytes"] == index.paths.lists.stat().st_size
    assert (answer["verified"], answer["damage"]) == (False, [])


@pytest.mark.parametrize("where", ["code", "row", "padding"])
def test_flipped_lists_are_named(index, where):
    damaged = [2, 7]
    for number in damaged:
        size, capacity, offset = (int(value) for value in index.table[number])
        used = capacity * (index.manifest.code_size + 8)
        flip(
            index.paths.lists,
            offset
            + {"code": 5, "row": used - 8 * (capacity - size) - 3, "padding": int(index.list_bytes[number]) - 1}[where],
        )
    assert inspect(index.paths.root).exit_code == 0  # sizes are right; only --verify reads the bytes
    result = inspect(index.paths.root, "--verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["damage"] == ["lists.bin does not match its checksum", "2 of 12 lists: 2, 7"]
    assert "2 of 12 lists: 2, 7" in " ".join(result.stderr.split())


def test_damaged_passages_are_named(index):
    flip(index.paths.passages, index.paths.passages.stat().st_size - 1)
    result = inspect(index.paths.root, "--verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["damage"] == ["passages.arrow does not match its checksum"]


def test_kept_vectors(tmp_path, folder):
    options = BuildConfig(12, storage=Storage.INT8, keep_vectors="float16")
    index = build_index(Embeddings.open(folder), tmp_path / "index", options)
    result = inspect(index.paths.root, "--verify")
    assert result.exit_code == 0
    for part in ("float16, in row order", "vectors.npy 9.50 KiB"):
        assert part in " ".join(result.stdout.split())
    flip(index.paths.vectors, index.paths.vectors.stat().st_size // 2)
    assert inspect(index.paths.root).exit_code == 0
    result = inspect(index.paths.root, "--verify", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert (answer["kept_vectors"], answer["damage"]) == ("float16", ["vectors.npy does not match its checksum"])


def test_truncated_lists_are_refused_on_opening(index):
    size = index.paths.lists.stat().st_size
    with index.paths.lists.open("r+b") as handle:
        handle.truncate(size - 1)
    with fails(ArtifactError, "lists.bin", f"{size - 1:,}", f"{size:,}"):
        Index.open(index.paths.root)
    assert inspect(index.paths.root, "--verify").exit_code == 1


def test_embeddings(folder):
    result = inspect(folder, "--verify")
    assert result.exit_code == 0
    for part in ("telerag embeddings", "600 of 8 dimensions, float,", "3 files", "query: "):
        assert part in result.stdout
    answer = json.loads(inspect(folder, "--json").stdout)
    assert (answer["rows"], answer["shards"], answer["description"]["model"]) == (600, 3, "m")


def test_damaged_shards_are_named(folder):
    shard = folder / "shard-00001.parquet"
    flip(shard, shard.stat().st_size // 2)
    result = inspect(folder, "--verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["damage"] == ["1 of 3 shards: shard-00001.parquet"]


def test_parquet_of_another_make(tmp_path):
    vectors = clustered(600, 8)
    good = inspect(write_parquet(tmp_path / "good.parquet", vectors), "--verify")
    assert good.exit_code == 0
    assert "Parquet with vectors" in good.stdout
    vectors[17] = np.nan
    bad = inspect(write_parquet(tmp_path / "bad.parquet", vectors), "--verify")
    assert bad.exit_code == 1
    assert "row 17" in bad.stderr


def test_what_is_nothing_is_an_error(tmp_path, index):
    (tmp_path / "empty").mkdir()
    index.paths.manifest.unlink()
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "empty", "holds no Parquet file"),
        (index.paths.root, "no manifest.json"),
    ):
        result = inspect(path)
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())


def test_an_unfinished_build_is_said_to_be_one(tmp_path, folder):
    class Stop(BaseException):
        pass

    def progress(_description, _total, *, unit=""):
        raise Stop

    with pytest.raises(Stop):
        build_index(Embeddings.open(folder), tmp_path / "index", BuildConfig(12), progress=progress)
    result = inspect(partial_of(tmp_path / "index"))
    assert result.exit_code == 1
    assert "unfinished build" in result.stderr
