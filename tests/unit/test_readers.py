"""Readers: every kind of source, and what is said about the lines that cannot be used."""

import errno
import gzip
import io
import json
import os
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from expect import fails
from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.readers import Chunker, blocks, count_passages, find_sources, read_passages
from telerag_cli.errors import InputError, ResourceError, UsageError


def read(*arguments, on_bad=None, chunker=None):
    return list(read_passages(find_sources([str(argument) for argument in arguments]), chunker, on_bad))


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="module")
def chunker():
    """Counts words: no model needed."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Chunker(tokenizer, 8)


def test_jsonl_takes_the_usual_names_and_keeps_the_rest(write):
    path = write(
        "c.jsonl",
        '\ufeff{"_id": "d1", "title": "T", "text": "one", "metadata": {"url": "u"}, "year": 1990}\r\n'
        '\n{"id": 7, "contents": "two", "title": ""}\n{"text": "three \\ud83d\\ude00"}',
    )
    assert read(path) == [
        Passage("d1", "one", {"title": "T", "url": "u", "year": 1990}),
        Passage("7", "two", {}),
        Passage("c.jsonl:4", "three 😀", {}),
    ]
    assert [passage.embedded_text for passage in read(path)] == ["T one", "two", "three 😀"]


def test_dpr_tsv_with_csv_quoting(write):
    rows = 'id\ttext\ttitle\n1\t"Aaron (""Ahron"")\tis"\tAaron\n2\tplain\t"A, B"\n'
    assert read(write("psgs_w100.tsv", rows)) == [
        Passage("1", 'Aaron ("Ahron")\tis', {"title": "Aaron"}),
        Passage("2", "plain", {"title": "A, B"}),
    ]


def test_csv_with_line_ends_in_cells_and_long_cells(write):
    long = "x" * 300_000
    path = write("c.csv", f'\ufeffid,text,lang\r\na,"one\r\ntwo",en\r\nb,{long},\r\n')
    assert read(path) == [Passage("a", "one\r\ntwo", {"lang": "en"}), Passage("b", long, {})]


def test_parquet_by_row_group_without_vectors(tmp_path):
    path = tmp_path / "c.parquet"
    table = pa.table(
        {
            "_id": [1, 2, None],
            "contents": ["a", "b", "c"],
            "year": [1, None, 3],
            "metadata": ['{"k": 1}', "{}", "no json"],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 6, pa.float32()), 2),
        }
    )
    pq.write_table(table, path, row_group_size=1)
    assert read(path) == [
        Passage("1", "a", {"k": 1, "year": 1}),
        Passage("2", "b", {}),
        Passage("c.parquet:3", "c", {"year": 3, "metadata": "no json"}),
    ]
    assert count_passages(find_sources([str(path)])) == 3


def test_gzip_and_standard_input(write, monkeypatch):
    line = b'{"text": "one"}\n'
    path = write("c.jsonl.gz", gzip.compress(line * 2))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
    assert [passage.id for passage in read(path, "-")] == ["c.jsonl.gz:1", "c.jsonl.gz:2", "<stdin>:1"]


def test_folder_is_walked_in_order_and_hidden_files_are_not_read(write, tmp_path, chunker):
    for name in ("b.txt", "a/z.md", "a.jsonl", ".git/x.txt", "a/.b.txt", "c.py"):
        write(f"in/{name}", '{"text": "t"}')
    assert [source.label for source in find_sources([str(tmp_path / "in")])] == ["a/z.md", "a.jsonl", "b.txt"]
    assert [passage.id for passage in read(tmp_path / "in", chunker=chunker)] == ["a/z.md#0", "a.jsonl:1", "b.txt#0"]


def test_equal_names_in_two_folders_keep_their_paths(write):
    paths = [write(f"{folder}/part.jsonl", '{"text": "t"}') for folder in "ab"]
    assert [passage.id for passage in read(*paths)] == [f"{path}:1" for path in paths]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "not JSON (Expecting value at column 1)"),
        (b'{"text": "a"', "not JSON"),
        (b'["a"]', "a JSON list where an object is expected"),
        (b'{"title": "a"}', "no text"),
        (b'{"text": 3}', "text is int, not a string"),
        (b'{"text": " "}', "the text is empty"),
        (b'{"text": "a", "id": [1]}', "the id is list"),
        (b'{"text": "a", "x": NaN}', "not JSON (NaN is no JSON value)"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b'{"text": "\\ud800"}', "not valid UTF-8"),
        (b'{"text": "a", "id": "\xff"}', "not valid UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_json_line_is_named_or_skipped(write, line, reason):
    path = write("c.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.message.startswith(f"c.jsonl:2: {reason}")
    errors = []
    assert [passage.text for passage in read(path, on_bad=errors.append)] == ["a", "b"]
    assert [error.message for error in errors] == [caught.value.message]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("c.csv", 'text,id\n"one\ntwo",1\nthree\n', "c.csv:4: 1 columns where the header has 2."),
        ("c.csv", 'text,id\n"one"x,1\n', "c.csv:2: not CSV"),
        ("c.tsv", 'id\ttext\n1\t"open\n2\tx\n', "c.tsv:2: not CSV (unexpected end of data)"),
        ("c.csv", b"text\n\xff\n", "c.csv:2: not valid UTF-8"),
        ("c.csv", "body,id\nx,1\n", "c.csv has the columns body, id and none named text or contents"),
        ("c.parquet", "PAR", "is not Parquet"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "not a whole gzip file"),
        ("c.jsonl.gz", "plain", "not a whole gzip file"),
        ("c.pdf", "x", "is of no kind that is read"),
        ("folder/c.pdf", "x", "has 1 files and none of a kind"),
    ],
)
def test_bad_files_are_named(write, name, content, reason):
    path = write(name, content)
    with pytest.raises(InputError) as caught:
        read(path.parent if path.parent.name == "folder" else path)
    assert reason in caught.value.message


def test_missing_source_and_stdin_twice(tmp_path):
    with fails(InputError, "none.jsonl"):
        read(tmp_path / "none.jsonl")
    with fails(UsageError):
        read("-", "-")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that fails to be read")
def test_source_that_fails_to_be_read(tmp_path):
    (tmp_path / "c.jsonl").symlink_to("/proc/self/mem")
    with fails(ResourceError, "c.jsonl", os.strerror(errno.EIO)):
        read(tmp_path / "c.jsonl")


WORDS = st.lists(st.sampled_from(["word", "été", "😀", ".", "\n", "\n\n", "# Title\n", "  ", "\r\n"]), max_size=120)


@given(words=WORDS, markdown=st.booleans())
@settings(max_examples=60, deadline=None)
def test_chunks_are_where_they_say_and_leave_only_blanks_out(chunker, words, markdown):
    text = " ".join(words)
    kept = [*range(len(text))]
    end = 0
    for start, chunk in chunker.chunks(io.StringIO(text, newline=""), markdown=markdown):
        assert text[start : start + len(chunk)] == chunk
        assert start >= end
        assert len(chunk.split()) <= 8 * 2
        end = start + len(chunk)
        kept = [index for index in kept if not start <= index < end]
    assert not "".join(text[index] for index in kept).strip()


@given(st.text(alphabet="ab \n", max_size=80), st.integers(2, 9))
def test_blocks_are_the_text(text, size):
    parts = list(blocks(io.StringIO(text, newline=""), size))
    assert "".join(block for _, block in parts) == text
    assert all(text[start : start + len(block)] == block for start, block in parts)
    assert all(len(block) <= 2 * size for _, block in parts)


def test_text_file_offsets_are_of_the_file(write, chunker):
    text = "One two three four five six seven.\r\n\r\nEight nine ten eleven twelve.\r\n"
    found = read(write("notes.txt", "\ufeff" + text), chunker=chunker)
    assert [passage.id for passage in found] == ["notes.txt#0", "notes.txt#1"]
    for passage in found:
        assert passage.metadata["source"] == "notes.txt"
        assert text[passage.metadata["start"] : passage.metadata["end"]] == passage.text


def test_text_file_that_is_not_utf8_is_named_by_line(write, chunker):
    with fails(InputError, "notes.txt:2"):
        read(write("notes.txt", b"one\ntwo \xff\n"), chunker=chunker)


def test_counting_lines_and_not_knowing(write, tmp_path):
    assert count_passages(find_sources([str(write("c.csv", "text\na\nb\n"))])) == 2
    assert count_passages(find_sources([str(write("c.jsonl", '{"text": "a"}\n' * 3))])) == 3
    assert count_passages(find_sources([str(write("c.txt", "a"))])) is None
    assert count_passages(find_sources(["-"])) is None


def test_metadata_is_json_whatever_parquet_held():
    import datetime

    assert json.loads(Passage("i", "t", {"when": datetime.date(2020, 1, 2)}).metadata_json) == {"when": "2020-01-02"}


@pytest.mark.parametrize("codec", ["snappy", "zstd", "none"])
def test_damaged_pages_of_parquet_are_told_by_file_and_row(tmp_path, codec):
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": [f"passage {n} " * 20 for n in range(2000)]}), path, compression=codec)
    whole = bytearray(path.read_bytes())
    whole[100:1100] = b"\xff" * 1000
    path.write_bytes(whole)
    with pytest.raises(InputError) as caught:
        read(path)
    assert re.search(r"c\.parquet cannot be read after row 0: [^.]+\.$", caught.value.message)
    assert caught.value.remedy == "Fetch it again."
