"""Vectors and passages from Parquet, of our own folders and of others, and what cannot be used of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expect import fails
from telerag_cli.config import Storage
from telerag_cli.corpus.embeddings import Embeddings
from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import ArtifactError, InputError, UsageError
from telerag_cli.index.artifact import BATCH_ROWS
from telerag_cli.index.build import BuildConfig, build_index
from telerag_cli.index.passages import Passages
from vector_files import clustered, embeddings_folder, vector_column, write_parquet


def test_passages_by_row(tmp_path):
    rows = 2 * BATCH_ROWS + 300
    file = write_parquet(
        tmp_path / "e.parquet",
        clustered(rows, 8),
        group=777,
        title=[f"T{i}" for i in range(rows)],
        year=[2000 + i if i % 2 else None for i in range(rows)],
    )
    build_index(file, tmp_path / "index", BuildConfig(4))
    passages = Passages.open(tmp_path / "index" / "passages.arrow")
    assert len(passages) == rows
    last = rows - 1
    assert passages[[last, 0, BATCH_ROWS]] == [
        Passage(f"p{last}", f"Passage {last}.", {"title": f"T{last}", "year": 2000 + last}),
        Passage("p0", "Passage 0.", {"title": "T0"}),
        Passage(f"p{BATCH_ROWS}", f"Passage {BATCH_ROWS}.", {"title": f"T{BATCH_ROWS}"}),
    ]
    with fails(ArtifactError, f"row {rows:,}"):
        passages[[rows]]


def test_damaged_passages_are_named(tmp_path):
    build_index(write_parquet(tmp_path / "e.parquet", clustered(100, 8)), tmp_path / "index", BuildConfig(1))
    path = tmp_path / "index" / "passages.arrow"
    path.write_bytes(path.read_bytes()[:-20])
    with fails(ArtifactError, "passages.arrow"):
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


def test_several_vector_columns_need_a_choice_and_none_is_an_error(tmp_path):
    vectors = clustered(100, 8)
    file = write_parquet(tmp_path / "e.parquet", vectors, other=vector_column(vectors[:, :4]))
    with fails(UsageError, 2, "embedding, other", "--column"):
        Embeddings.open(file)
    with fails(UsageError, "'third'", "embedding, other"):
        Embeddings.open(file, "third")
    assert Embeddings.open(file, "other").dimension == 4
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    with fails(UsageError, "t.parquet", ": text."):
        Embeddings.open(tmp_path / "t.parquet")


def test_wrong_dimension_names_the_file_and_both(tmp_path):
    write_parquet(tmp_path / "a.parquet", clustered(10, 8))
    write_parquet(tmp_path / "b.parquet", clustered(10, 12))
    with fails(ArtifactError, "b.parquet", 12, "a.parquet", 8):
        Embeddings.open(tmp_path)


def with_one(changed):
    """3,000 vectors, one of which is another."""
    vectors = clustered(3000, 8)
    changed(vectors[2345])
    return vector_column(vectors)


@pytest.mark.parametrize(
    ("column", "config", "error", "values"),
    [
        (
            pa.array([[1.0, 2.0]] * 5 + [[1.0]], pa.list_(pa.float32())),
            {},
            ArtifactError,
            ("Row 5 ", "dimension 1,", 2),
        ),
        (pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)), {}, InputError, ("Row 1 ", "v.parquet")),
        (with_one(lambda row: row.fill(np.nan)), {}, InputError, ("2,345", "v.parquet", np.nan)),
        (with_one(lambda row: row.fill(np.inf)), {}, InputError, ("2,345", "v.parquet", np.inf)),
        (with_one(lambda row: row.fill(1e6)), {"storage": Storage.FLOAT16}, InputError, ("2,345", "float16", 65504)),
        (
            with_one(lambda row: row.fill(1e6)),
            {"storage": Storage.INT8, "keep_vectors": "float16"},
            InputError,
            ("2,345", "float16", 65504),
        ),
        (
            with_one(lambda row: row.fill(1e30)),
            {"metric": "l2", "nlist": 2, "seed": 1},
            InputError,
            ("2,345", "e+30", "float32"),
        ),
    ],
    ids=["ragged", "missing", "nan", "inf", "float16", "kept float16", "distances"],
)
def test_vectors_that_cannot_be_used_are_named_by_row(tmp_path, column, config, error, values):
    pq.write_table(pa.table({"v": column}), tmp_path / "v.parquet")
    with fails(error, *values):
        build_index(tmp_path / "v.parquet", tmp_path / "index", BuildConfig(**config))


def test_no_rows_and_not_parquet(tmp_path):
    with fails(InputError, "e.parquet"):
        Embeddings.open(write_parquet(tmp_path / "e.parquet", np.empty((0, 8), np.float32)))
    (tmp_path / "e.parquet").unlink()
    (tmp_path / "x.parquet").write_text("hello")
    for path in (tmp_path, tmp_path / "x.parquet"):
        with fails(ArtifactError, "x.parquet"):
            Embeddings.open(path)
    with fails(ArtifactError, tmp_path / "absent"):
        Embeddings.open(tmp_path / "absent")


# Our own folders


def test_our_folder(tmp_path):
    vectors = clustered(250, 8)
    source = Embeddings.open(embeddings_folder(tmp_path / "e", vectors, 100))
    index = build_index(source, tmp_path / "index", BuildConfig(2))
    embedder = index.manifest.embedder
    assert (embedder.model, embedder.pooling, embedder.normalized, embedder.prompt) == ("m", "mean", True, "query: ")
    assert Passages.open(index.paths.passages)[[249]] == [Passage("p249", "Text 249", {"title": "T249"})]


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"complete": False}, ("resumes",)),
        ({"version": 2}, ("version 2", "version 1")),
        ({"format": "other"}, ("embeddings.json",)),
        ({"rows": 251}, (250, 8, "embeddings.json", 251)),
        ({"dimension": 9}, (250, 8, "embeddings.json", 9)),
    ],
)
def test_our_folder_must_be_what_it_says(tmp_path, changes, values):
    folder = embeddings_folder(tmp_path / "e", clustered(250, 8), 100, **changes)
    with fails(ArtifactError, *values):
        Embeddings.open(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = embeddings_folder(tmp_path / "e", clustered(250, 8), 100)
    (folder / "shard-00001.parquet").unlink()
    with fails(ArtifactError, "shard-00001.parquet"):
        Embeddings.open(folder)
