"""Readers: every kind of source, and what is said about the lines that cannot be used."""

import errno
import gzip
import io
import json
import os
import re
import sys
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from expect import fails
from fuzz import fuzzed
from telerag_cli.corpus.chunking import Chunker, blocks
from telerag_cli.corpus.fields import Columns
from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.readers import count_passages, read_passages
from telerag_cli.corpus.sources import find_sources
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
    assert [source.label for source in find_sources([str(tmp_path / "in")]).files] == ["a/z.md", "a.jsonl", "b.txt"]
    assert [passage.id for passage in read(tmp_path / "in", chunker=chunker)] == ["a/z.md#0", "a.jsonl:1", "b.txt#0"]


def test_equal_names_in_two_folders_keep_their_paths(write):
    paths = [write(f"{folder}/part.jsonl", '{"text": "t"}') for folder in "ab"]
    assert [passage.id for passage in read(*paths)] == [f"{path}:1" for path in paths]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "not JSON: expected"),
        (b'{"text": "a"', "not JSON"),
        (b'["a"]', "a JSON list where an object is expected"),
        (b'{"title": "a"}', "no text"),
        (b'{"text": 3}', "text is int, not a string"),
        (b'{"text": " "}', "the text is empty"),
        (b'{"text": "a", "id": [1]}', "the id is list"),
        (b'{"text": "a", "x": NaN}', "not JSON"),
        (b'{"text": "a", "x": 1e400}', "not JSON: it holds a number"),
        (b'{"text": "\xff"}', "not JSON: the byte 0xFF"),
        (b'{"text": "\\ud800"}', "not JSON"),
        (b'{"text": "a\\u0000"}', "it holds a NUL"),
        (b'{"text": "a", "id": "\xff"}', "not JSON: the byte 0xFF"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "a", "x": ' + b"[" * 600 + b"]" * 600 + b"}", "not JSON"),
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
        ("c.csv", 'text,id\n"open,1\na,2\n', "c.csv:2: not CSV: unexpected end of data"),
        ("c.tsv", "id\ttext\n1\tx\ty\n", "c.tsv:2: 3 columns where the header has 2."),
        ("c.csv", "é\n".encode() + b"text\n\xff\n", "none named text"),
        ("c.csv", "text\né\n".encode() + b"\xff\n", "c.csv:3: the byte 0xFF"),
        ("c.csv", "words,id\nx,1\n", "c.csv has the columns words, id and none named text or contents"),
        ("c.json", '[{"text": "a"}', "is not a JSON array"),
        ("c.parquet", "PAR", "is not Parquet"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "not a whole compressed file"),
        ("c.jsonl.gz", "plain", "not a whole compressed file"),
        ("c.jsonl.bz2", "plain", "not a whole compressed file"),
        ("c.pdf", "x", "is not of a kind that is read"),
        ("folder/c.pdf", "x", "holds nothing of a kind that is read"),
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
        read(write("notes.txt", "one é\ntwo ".encode() + b"\xff\n"), chunker=chunker)


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


LINES = '{"id": "a", "text": "café"}\r\n{"id": "b", "text": "two"}\r\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_are_detected(write, encoding):
    assert [passage.text for passage in read(write("c.jsonl", LINES.encode(encoding)))] == ["café", "two"]


@pytest.mark.parametrize("name", ["c.txt", "c.csv"])
def test_latin_1_is_read_and_noted(write, chunker, name):
    sources = find_sources([str(write(name, "text\nUn café près du lac.\n".encode("latin-1")))])
    passages = list(read_passages(sources, chunker))
    assert "café près" in passages[-1].text
    assert sources.notes.assumed == [f"{name} is not UTF-8 and was read as Windows-1252."]


def test_a_line_of_tsv_is_a_row_whatever_quotes_it_holds(write):
    rows = 'id\ttext\n1\t"Stay, she said.\n2\t15"\n3\t"a ""b"""\n4\t"x" y\n'
    texts = [passage.text for passage in read(write("c.tsv", rows))]
    assert texts == ['"Stay, she said.', '15"', 'a "b"', '"x" y']


def test_an_open_quote_of_csv_costs_its_own_line(write):
    errors = []
    path = write("c.csv", 'id,text\n1,a\n2,"open\n3,"two\nlines"\n4,d\n')
    assert [passage.text for passage in read(path, on_bad=errors.append)] == ["a", "two\nlines", "d"]
    assert [error.message.split(": ")[0] for error in errors] == ["c.csv:3"]


def test_two_columns_without_a_header_are_id_and_text(write):
    assert read(write("c.tsv", "0\tone\n1\ttwo\n")) == [Passage("0", "one"), Passage("1", "two")]


@pytest.mark.parametrize("column", ["contents", "page_content", "body"])
@pytest.mark.parametrize(("given", "taken"), [(1.0, "1"), (7, "7"), ("x", "x"), (1.5, "1.5")])
def test_usual_columns_and_ids_are_taken(write, column, given, taken):
    sources = find_sources([str(write("c.jsonl", json.dumps({"docid": given, column: "t"})))])
    assert [(passage.id, passage.text) for passage in read_passages(sources)] == [(taken, "t")]
    assert sources.notes.lines() == ["Ids: from column docid."]


def test_ids_of_bytes_and_vectors_in_large_lists(tmp_path):
    key = uuid.UUID("12345678-1234-5678-1234-567812345678")
    table = pa.table(
        {
            "id": pa.array([key.bytes, b"plain"], pa.binary()),
            "text": ["a", "b"],
            "embedding": pa.array([[0.5], [1.0]], pa.large_list(pa.float32())),
        }
    )
    pq.write_table(table, tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet") == [Passage(str(key), "a"), Passage("plain", "b")]


def test_named_columns_come_first(write):
    path = write("c.jsonl", '{"id": 1, "key": "k", "text": "no", "words": "yes"}')
    assert list(read_passages(find_sources([str(path)]), columns=Columns("words", "key"))) == [
        Passage("k", "yes", {"id": 1, "text": "no"})
    ]


def test_what_a_folder_holds_beside_the_corpus_is_counted(write, tmp_path, chunker):
    for name, content in {
        "in/a.jsonl": '{"id": "x", "text": "t"}\n{"id": "x", "text": "u"}',
        "in/b.pdf": "x",
        "in/c.pdf": "x",
        "in/README": "x",
        "in/package.json": '{"name": "x"}',
        "in/number.json": "5",
        "in/nothing.json": "null",
        "in/answers.jsonl": '{"id": "1", "question": "q", "answer": "a", "passages": [], "timings": {}}',
        "in/emb/embeddings.json": '{"format": "telerag-embeddings"}',
        "in/emb/shard-00000.parquet": "PAR",
        "in/new/x.jsonl": '{"text": "t"}',
        "elsewhere/linked.txt": "linked",
    }.items():
        write(name, content)
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "in")
    sources = find_sources([str(tmp_path / "in")], output=tmp_path / "in/new")
    assert [passage.id for passage in read_passages(sources, chunker)] == ["x", "x", "link/linked.txt#0"]
    left_out = dict.fromkeys(["no suffix", "answers of a run", "embeddings", "the output"], 1)
    assert sources.notes.files == {".pdf": 2, ".json of one object": 3, **left_out}
    assert sources.notes.repeated == 1
    assert sources.notes.lines()[0].startswith("Left out: 9 files (.json of one object 3, .pdf 2, ")


def test_every_trouble_is_named_in_one_pass(write, tmp_path, chunker):
    write("in/a.jsonl", '{"text": "t"}\nbad\n{"text": ""}\n')
    write("in/b.parquet", "PAR")
    write("in/c.txt", "fine")
    with fails(InputError, "3 lines or files", "a.jsonl:2", "a.jsonl:3", "b.parquet"):
        read(tmp_path / "in", chunker=chunker)
    errors = []
    assert [passage.text for passage in read(tmp_path / "in", chunker=chunker, on_bad=errors.append)] == ["t", "fine"]
    assert len(errors) == 3
    with fails(InputError, "2 of 3 sources", "none-1", "none-2"):
        find_sources([str(tmp_path / "none-1"), str(tmp_path / "in"), str(tmp_path / "none-2")])


def test_names_that_are_not_utf8_become_text(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_bytes(b'{"text": "t"}')
    (passage,) = read(path)
    assert passage.id == "caf\\xe9.jsonl:1"


@given(
    st.lists(
        st.one_of(st.binary(max_size=30), st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass"))),
        max_size=6,
    ),
    st.sampled_from([".jsonl", ".csv", ".tsv", ".txt", ".json"]),
)
@fuzzed
def test_any_bytes_leave_the_good_lines(chunker, tmp_path_factory, lines, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"c{suffix}"
    good = {".jsonl": b'{"text": "good"}', ".json": b'{"text": "good"}'}.get(suffix, b"good")
    head = b"" if "json" in suffix else b"text\n"
    bad = [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
    path.write_bytes(head + b"\n".join([good, *bad, good]) + b"\n")
    errors = []
    passages = read(path, on_bad=errors.append, chunker=chunker)
    if suffix != ".txt" and not any(b'"' in line for line in bad):
        assert [passage.text for passage in passages].count("good") >= 2
    for passage in passages:
        f"{passage.id}{passage.text}{passage.metadata_json}".encode()
