"""Public datasets: what is known of them, preparing them, checking them, and their questions for benchmarks."""

import hashlib
import json
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dataset_files as made
from dataset_files import description, failed, fetched
from expect import fails
from telerag_cli.cli import data
from telerag_cli.corpus.readers import read_passages
from telerag_cli.corpus.sources import find_sources
from telerag_cli.datasets import streams
from telerag_cli.datasets.cache import Cached
from telerag_cli.datasets.catalogue import DatasetKind, describe, names
from telerag_cli.datasets.questions import load_questions
from telerag_cli.errors import ArtifactError, InputError, UsageError

ROOT = Path(__file__).parents[2]

program = typer.Typer()
program.add_typer(data.app)

SETS = {
    "nq-open": ("nq.jsonl", made.NQ, {}),
    "hotpotqa": ("hotpot.json", json.dumps(made.HOTPOT, ensure_ascii=False, indent=1), {}),
    "triviaqa": (
        "trivia.tar.gz",
        made.packed_tar({"t/other.json": "{}", "t/test.json": json.dumps(made.TRIVIA, indent=2)}),
        {"members": {"test": "t/test.json"}},
    ),
    "flashrag": ("f.jsonl", made.FLASHRAG, {}),
}
QUESTIONS = {
    "nq-open": [
        ("test-1", "who keeps the lighthouse", ["Ada Pell", "Mrs Pell"]),
        ("test-2", "where do the boats sleep", ["in the shed"]),
    ],
    "hotpotqa": [
        ("h1", "Which hill is taller, Low or Mole?", ["Mole"]),
        ("h2", "Is the mill older than the inn?", ["yes"]),
    ],
    "triviaqa": [("tc_1", "What do bees make?", ["Honey", "Bee honey"]), ("tc_2", "What floats?", ["Cork"])],
    "flashrag": [("test_0", "Who baked it?", ["Ben", "Benjamin"]), ("test_1", "When was it baked?", ["at noon"])],
}


class Sets:
    """Described datasets that lie in the cache as if they had been fetched."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"

    def add(self, name, parser, file, content, kind="questions", split="test", **fields):
        path = description(self.folder, name, parser, [{"name": file, **fields}], kind, split)
        fetched(self.cache, path, {file: content})
        return path

    def run(self, action, *arguments):
        return CliRunner().invoke(program, ["data", action, "--cache-dir", str(self.cache), *map(str, arguments)])

    def rows(self, name, file="questions.jsonl"):
        text = (self.cache / name / "prepared" / file).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def sets(tmp_path):
    return Sets(tmp_path)


def test_every_description_can_be_read_and_tells_what_it_knows():
    found = [describe(name) for name in names()]
    assert {"nq-open", "hotpotqa", "triviaqa", "dpr-wikipedia", "beir-nfcorpus", "flashrag-nq"} <= {
        each.name for each in found
    }
    for each in found:
        assert each.homepage.startswith(("http://", "https://")), each.name
        assert (each.split is None) == (each.kind is DatasetKind.PASSAGES), each.name
        assert each.split in (None, *each.splits), each.name
        assert len({file.name for file in each.files}) == len(each.files), each.name
        for file in each.files:
            assert file.address.startswith(("http://", "https://")), each.name
            assert file.sha256 is None or len(file.sha256) == 64, each.name
            assert file.md5 is None or len(file.md5) == 32, each.name
            whole = file.bytes is not None and (file.sha256 or file.md5)
            assert whole or "checksum" in each.unknown, each.name
            assert each.split is None or file.split or file.members or each.parser == "beir", each.name


def test_descriptions_lie_in_datasets_and_are_packed_with_the_program():
    packed = ROOT / "src" / "telerag_cli" / "datasets" / "descriptions"
    assert packed.resolve() == ROOT / "datasets"
    assert sorted(path.stem for path in (ROOT / "datasets").glob("*.toml")) == names()
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert options["telerag_cli.datasets"] == ["descriptions/*.toml"]


def test_list_as_a_table_and_as_json(sets):
    sets.add("small", "nq-open", "nq.jsonl", made.NQ)
    shown = sets.run("list")
    assert shown.exit_code == 0
    for part in ("nq-open", "8.50 MiB", "CC BY-SA 3.0", "absent", "unknown", "about"):
        assert part in shown.stdout
    listed = {each["name"]: each for each in json.loads(sets.run("list", "--json").stdout)}
    assert sorted(listed) == names()
    assert listed["nq-open"]["bytes"] == 391_316 + 8_522_298
    assert (listed["nq-open"]["state"], listed["flashrag-nq"]["exact"]) == ("absent", False)
    only = json.loads(sets.run("list", "--json", sets.folder / "small.toml").stdout)
    assert [(each["name"], each["state"]) for each in only] == [("small", "fetched")]


@pytest.mark.parametrize("parser", SETS)
def test_questions_of_every_form(sets, parser):
    file, content, fields = SETS[parser]
    path = sets.add("small", parser, file, content, **fields)
    result = sets.run("prepare", path)
    assert (result.exit_code, result.stdout) == (0, f"{sets.cache / 'small' / 'prepared'}\n")
    wanted = [{"id": key, "question": text, "answers": answers} for key, text, answers in QUESTIONS[parser]]
    assert sets.rows("small") == wanted
    assert Cached.of(describe(path), sets.cache).state() == "prepared (test)"
    assert sets.run("prepare", path, "--limit", 1).exit_code == 0
    assert sets.rows("small") == wanted[:1]
    assert Cached.of(describe(path), sets.cache).state() == "prepared (test, first 1)"


def test_splits_are_in_files_or_in_members(sets):
    files = [{"name": "a.jsonl", "split": "test"}, {"name": "b.jsonl", "split": "dev"}]
    path = description(sets.folder, "two", "flashrag", files)
    fetched(sets.cache, path, {"a.jsonl": made.FLASHRAG})
    assert sets.run("prepare", path).exit_code == 0
    failed(sets.run("prepare", path, "--split", "dev"), 1, "b.jsonl", "telerag data fetch two --split dev.")
    failed(sets.run("prepare", path, "--split", "train"), 2, "test, dev", "'train'")
    file, content, fields = SETS["triviaqa"]
    packed = sets.add("packed", "triviaqa", file, content, **fields)
    failed(sets.run("prepare", packed, "--split", "train"), 2, "test", "'train'")


def test_beir(sets):
    path = sets.add("small", "beir", "small.zip", made.beir(), kind="both")
    result = sets.run("prepare", path)
    assert result.exit_code == 0
    assert "3 in corpus.jsonl, 2 in questions.jsonl, 3 in qrels.tsv" in result.stderr
    assert json.loads((sets.cache / "small" / "prepared" / "prepared.json").read_text())["left_out"] == 1
    prepared = sets.cache / "small" / "prepared"
    passages = list(read_passages(find_sources([str(prepared / "corpus.jsonl")])))  # as telerag embed reads it
    assert [(each.id, each.text, each.metadata) for each in passages] == [
        ("d1", "Oats grow.", {"title": "Oat", "url": "u"}),
        ("d2", "A title alone", {}),
        ("d4", "Rye.", {}),
    ]
    assert [each["id"] for each in sets.rows("small")] == ["q1", "q3"]
    assert (prepared / "qrels.tsv").read_text() == made.QRELS["test"]
    assert sets.run("prepare", path, "--split", "train").exit_code == 0
    assert [each["id"] for each in sets.rows("small")] == ["q2"]
    assert sets.run("prepare", path, "--limit", 1).exit_code == 0
    assert [each["id"] for each in sets.rows("small")] == ["q1"]
    assert (prepared / "qrels.tsv").read_text().count("\n") == 3
    assert len(sets.rows("small", "corpus.jsonl")) == 3
    failed(sets.run("prepare", path, "--split", "dev"), 2, "test, train", "'dev'")


def test_passages_of_dpr_are_read_as_they_are_or_converted(sets):
    path = sets.add("wiki", "dpr-passages", "psgs.tsv.gz", made.gz(made.WIKIPEDIA), "passages", None)
    result = sets.run("prepare", path)
    assert (result.exit_code, result.stdout) == (0, f"{sets.cache / 'wiki' / 'psgs.tsv.gz'}\n")
    out = sets.folder / "out"
    assert sets.run("prepare", path, "-o", out, "--limit", 2).stdout == f"{out}\n"
    assert [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()] == [
        {"_id": "1", "title": "Oat", "text": 'Oats ("Avena") grow'},
        {"_id": "2", "title": "Rye", "text": "Rye is sown in autumn"},
    ]
    failed(sets.run("prepare", path, "-o", out, "--split", "dev"), 2, "wiki", "'dev'")


def test_passages_of_flashrag(sets):
    packed = made.packed_zip({"wiki.jsonl": made.FLASHRAG_WIKIPEDIA})
    fields = {"members": {"all": "wiki.jsonl"}}
    path = sets.add("wiki", "flashrag-passages", "wiki.zip", packed, "passages", None, **fields)
    assert sets.run("prepare", path).exit_code == 0
    assert sets.rows("wiki", "corpus.jsonl") == [
        {"_id": "0", "title": "Oat", "text": "Oats grow"},
        {"_id": "1", "title": "Rye", "text": "Rye is sown"},
    ]


BAD = [
    ("flashrag", b'{"id": "a", "question": "Q?", "golden_answers": "A"}\nnot json\n', "2: ", "line 1 column 2"),
    ("flashrag", b'{"id": "a", "question": " ", "golden_answers": []}\n', "1: ", "'question'"),
    ("flashrag", b'{"id": "a", "question": "Q?", "golden_answers": [1]}\n', "1: ", "[1]"),
    ("flashrag", b'{"question": "Q?", "golden_answers": []}\n', "1: ", "'id' is None"),
    ("flashrag", b'\n{"id": "a", "question": "\xff"}\n', "2: ", "UTF-8"),
    ("flashrag", b'{"id": "a", "question": "\\ud800", "golden_answers": []}\n', "1: ", "JSON"),
    ("flashrag", b"[1]\n", "1: ", "list"),
    ("hotpotqa", b'[{"_id": "a", "question": "Q?",\n"answer": "A"},\n {"_id": "b"}]', "3: ", "'question'"),
    ("hotpotqa", b"[\n\n3]", "3: ", "int"),
    ("nq-open", b'{"question": "Q?"}\n', "1: ", "the answers"),
]


@pytest.mark.parametrize(("parser", "content", "line", "says"), BAD)
def test_a_bad_entry_is_named_and_nothing_is_lost(sets, parser, content, line, says):
    path = sets.add("small", parser, "f.jsonl", SETS[parser][1])
    assert sets.run("prepare", path).exit_code == 0
    before = sets.rows("small")
    fetched(sets.cache, path, {"f.jsonl": content})
    failed(sets.run("prepare", path), 1, f"f.jsonl:{line}", says)
    assert sets.rows("small") == before
    left = sorted(path.name for path in (sets.cache / "small" / "prepared").iterdir())
    assert left == ["prepared.json", "questions.jsonl"]
    skipped = sets.run("prepare", path, "--skip-bad")
    assert skipped.exit_code == 0
    assert f"1: f.jsonl:{line}" in skipped.stderr


@pytest.mark.parametrize("line", ["q1\td1", "q1\td1\tmuch", "q1 0 d1 1"])
def test_a_bad_judgement_is_named(sets, line):
    qrels = {"test": made.QRELS["test"] + line + "\n"}
    path = sets.add("small", "beir", "small.zip", made.beir(qrels=qrels), kind="both")
    failed(sets.run("prepare", path), 1, "small.zip:small/qrels/test.tsv:5: ", "query-id, corpus-id, score")
    assert not (sets.cache / "small" / "prepared" / "corpus.jsonl").exists()
    assert sets.run("prepare", path, "--skip-bad").exit_code == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ["1: the end", " [ "]),
        (b'[{"_id": "a", "question": "Q?", "answer": "A"}', ["1: the end", ", or ]"]),
        (b'[{"_id": "a", "question": "Q?", "answer": "A"},\n{"_id": "b", "que', ["2: not JSON"]),
        (b'[{"_id": "a", "question": "Q?", "answer": "A"}\n{}]', ["2: { ", ", or ]"]),
        (b'{"_id": "a"}', ["1: { ", " [ "]),
        (b'[\n{"_id":\n\n}]', ["2: not JSON"]),
        (b'["\xff"]', ["1: not UTF-8"]),
    ],
)
def test_a_torn_array_is_an_error_even_if_bad_entries_are_skipped(sets, content, says):
    path = sets.add("small", "hotpotqa", "h.json", content)
    failed(sets.run("prepare", path, "--skip-bad"), 1, f"h.json:{says[0]}", *says[1:])


@pytest.mark.parametrize("cut", [40, 200])
@pytest.mark.parametrize(
    ("parser", "file"), [("triviaqa", "t.tar.gz"), ("beir", "b.zip"), ("dpr-passages", "p.tsv.gz")]
)
def test_a_damaged_archive_is_told(sets, parser, file, cut):
    whole = {"triviaqa": SETS["triviaqa"][1], "beir": made.beir(), "dpr-passages": made.gz(made.WIKIPEDIA * 40)}[parser]
    kind = {"triviaqa": "questions", "beir": "both", "dpr-passages": "passages"}[parser]
    fields = {"members": {"test": "t/test.json"}} if parser == "triviaqa" else {}
    split = None if kind == "passages" else "test"
    path = sets.add("small", parser, file, whole[: min(cut, len(whole) // 2)], kind, split, **fields)
    failed(sets.run("prepare", path, "-o", sets.folder / "out"), 1, file)
    assert list((sets.folder / "out").glob("*")) == []


def test_a_member_that_is_not_there_is_named(sets):
    path = sets.add("small", "triviaqa", "t.tar.gz", made.packed_tar({"a": ""}), members={"test": "b"})
    failed(sets.run("prepare", path), 1, "t.tar.gz", " b.")
    path = sets.add("other", "beir", "b.zip", made.packed_zip({"a": ""}), kind="both")
    failed(sets.run("prepare", path), 1, "b.zip", " 0 ", "corpus.jsonl")


@pytest.mark.parametrize("buffer", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_are_read_as_they_come_wherever_the_buffer_ends(monkeypatch, tmp_path, buffer, indent):
    monkeypatch.setattr(streams, "BUFFER_CHARACTERS", buffer)
    value = {"Count": 12.5, "Skipped": [{"é": 1}], "Data": [*made.HOTPOT, {"n": -1e-7, "t": "\u2028 ] }"}], "More": 3}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8-sig")
    with streams.opened(path) as handle:
        found = list(streams.json_array(handle, "a.json", pytest.fail, "Data"))
    assert [row for _line, row in found] == value["Data"]
    text = path.read_text(encoding="utf-8-sig").split("\n")
    assert all("{" in text[line - 1] for line, _row in found)
    with streams.opened(path) as handle, fails(InputError, "a.json", "'Absent'"):
        list(streams.json_array(handle, "a.json", pytest.fail, "Absent"))


def test_an_array_is_never_held_whole(monkeypatch):
    monkeypatch.setattr(streams, "BUFFER_CHARACTERS", 100)
    rows = [{"n": n, "text": "x" * 50} for n in range(1000)]

    class Counting:
        def __init__(self, data):
            self.data, self.at = data, 0

        def read(self, count):
            self.at += count
            return self.data[self.at - count : self.at]

    handle = Counting(json.dumps(rows).encode())
    reader = streams.json_array(handle, "a.json", pytest.fail)
    for n, (_line, row) in zip(range(10), reader, strict=False):
        assert row["n"] == n
    assert handle.at < 2000


def test_check_finds_what_changed(sets):
    path = sets.add("small", "nq-open", "nq.jsonl", made.NQ)
    failed(sets.run("check", "nq-open"), 1, "NQ-open.dev.jsonl", "NQ-open.train.jsonl")
    sets.run("prepare", path)
    file, prepared = sets.cache / "small" / "nq.jsonl", sets.cache / "small" / "prepared" / "questions.jsonl"
    complete = sets.run("check", path, "--json")
    assert complete.exit_code == 0
    assert [each["file"] for each in json.loads(complete.stdout)] == ["nq.jsonl", str(prepared)]
    file.write_bytes(file.read_bytes().replace(b"lighthouse", b"lightHouse"))
    before, after = (hashlib.sha256(text).hexdigest() for text in (made.NQ.encode(), file.read_bytes()))
    failed(sets.run("check", path), 1, "nq.jsonl", before, after)
    file.write_bytes(b"short")
    failed(sets.run("check", path), 1, "nq.jsonl", "5 bytes", f"{len(made.NQ)} ")
    file.unlink()
    failed(sets.run("check", path), 1, "nq.jsonl", "source.json")
    fetched(sets.cache, path, {"nq.jsonl": made.NQ + "\n"})
    failed(sets.run("check", path), 1, prepared.parent, before)
    fetched(sets.cache, path, {"nq.jsonl": made.NQ})
    assert sets.run("check", path).exit_code == 0
    text = prepared.read_text()
    prepared.write_text(text.replace("boats", "goats"))
    failed(sets.run("check", path), 1, prepared, "xxh3:")
    prepared.write_text(text[:-3])
    failed(sets.run("check", path), 1, prepared, f"{len(text) - 3:,} bytes", f"{len(text):,} ")
    prepared.unlink()
    failed(sets.run("check", path), 1, prepared)


def test_damaged_notes_are_told_and_do_not_hide_other_datasets(sets):
    path = sets.add("small", "nq-open", "nq.jsonl", made.NQ)
    (sets.cache / "small" / "source.json").write_text('{"files": 3}')
    failed(sets.run("prepare", path), 1, "source.json")
    (sets.cache / "nq-open").mkdir()
    (sets.cache / "nq-open" / "source.json").write_text("{")
    listed = json.loads(sets.run("list", "--json").stdout)
    assert [each["name"] for each in listed if each["state"] == "damaged"] == ["nq-open"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fetch"], ["NAME"]),
        (["fetch", "nqopen"], ["'nqopen'", "nq-open"]),
        (["fetch", "nq-open", "--limit", "3"], ["--limit"]),
        (["check", "nq-open", "triviaqa", "-o", "x"], ["--output", "2"]),
        (["fetch", "nq-open", "triviaqa", "--from", "x"], ["--from", "2"]),
        (["prepare", "nq-open", "triviaqa", "-o", "x"], ["--output", "2"]),
        (["fetch", "dpr-wikipedia", "--split", "dev"], ["--split", "'dev'"]),
    ],
)
def test_usage(sets, arguments, says):
    failed(CliRunner().invoke(program, ["data", *arguments, "--cache-dir", str(sets.cache)]), 2, *says)
    assert not sets.cache.exists()


@pytest.mark.parametrize("text", ["name = ", 'name = "own"', "colour = 3"])
def test_a_file_that_is_not_a_description(tmp_path, text):
    (tmp_path / "own.toml").write_text(text)
    with fails(InputError, tmp_path / "own.toml"):
        describe(str(tmp_path / "own.toml"))


def test_a_description_cannot_name_files_elsewhere(tmp_path):
    for field, value in (("name", "../a.jsonl"), ("address", "file:///etc/passwd")):
        path = description(tmp_path, "own", "flashrag", [{"name": "a.jsonl", field: value}])
        with fails(InputError, path, f"files.0.{field}"):
            describe(path)
    (tmp_path / "b.toml").write_text(Path(description(tmp_path, "own", "flashrag", [{"name": "a"}])).read_text())
    with fails(InputError, "b.toml", "'own'"):
        describe(str(tmp_path / "b.toml"))
    with fails(ArtifactError, tmp_path / "absent.toml"):
        describe(str(tmp_path / "absent.toml"))


def test_questions_of_a_dataset_for_a_benchmark(sets):
    cached = Cached.of(describe("nq-open"), sets.cache)
    with fails(ArtifactError, "nq-open") as caught:
        load_questions("nq-open", sets.cache)
    assert caught.value.remedy == "Run telerag data fetch nq-open --split dev, then telerag data prepare nq-open."
    cached.root.mkdir(parents=True)
    text = "".join(json.dumps({"question": f"Question {n}?", "answer": ["A"]}) + "\n" for n in range(50))
    fetched(sets.cache, "nq-open", {"NQ-open.dev.jsonl": text})
    with fails(ArtifactError, "nq-open") as caught:
        load_questions("nq-open", sets.cache)
    assert caught.value.remedy == "Run telerag data prepare nq-open."
    assert sets.run("prepare", "nq-open").exit_code == 0
    every = load_questions("nq-open", sets.cache)
    assert [(each.id, each.text) for each in every] == [(f"dev-{n + 1}", f"Question {n}?") for n in range(50)]
    drawn = load_questions("nq-open", sets.cache, limit=10, seed=1)
    assert drawn == load_questions("nq-open", sets.cache, limit=20, seed=1)[:10]
    assert len({each.id for each in drawn}) == 10
    assert drawn != load_questions("nq-open", sets.cache, limit=10, seed=2)
    assert drawn != every[:10]
    assert len(load_questions("nq-open", sets.cache, limit=99)) == 50


def test_questions_of_a_file_for_a_benchmark(tmp_path):
    path = tmp_path / "q.txt"
    path.write_text('What is it?\n\n{"id": "a", "question": "Why?", "answers": ["so"]}\n')
    assert [(each.id, each.text) for each in load_questions(path)] == [("1", "What is it?"), ("a", "Why?")]
    assert load_questions(str(path)) == load_questions(path)
    path.write_text('{"no": 1}\n')
    with fails(InputError, "q.txt:1", "['no']"):
        load_questions(path)
    path.write_text("")
    with fails(InputError, "q.txt"):
        load_questions(path)
    with fails(InputError, tmp_path / "absent"):
        load_questions(tmp_path / "absent")
    with fails(UsageError, "dpr-wikipedia"):
        load_questions("dpr-wikipedia", tmp_path)


def test_an_archive_that_unpacks_to_far_more_than_it_is_ends_early(sets, monkeypatch):
    monkeypatch.setattr("telerag_cli.datasets.streams.MAX_ENTRY_CHARACTERS", 100_000)
    body = made.lines(made.CORPUS) + (" " * 9_999 + "\n") * 2000
    path = sets.add("small", "beir", "small.zip", made.beir(corpus=body), kind="both")
    failed(sets.run("prepare", path), 1, "small.zip", "200 times")


def test_a_line_that_is_too_long_costs_itself(sets, monkeypatch):
    monkeypatch.setattr("telerag_cli.datasets.streams.MAX_ENTRY_CHARACTERS", 1000)
    long = json.dumps({"_id": "long", "title": "", "text": "x" * 5000}) + "\n"
    path = sets.add("small", "beir", "small.zip", made.beir(corpus=long + made.lines(made.CORPUS)), kind="both")
    failed(sets.run("prepare", path), 1, "corpus.jsonl:1", "1000 B")
    result = sets.run("prepare", path, "--skip-bad")
    assert result.exit_code == 0


@pytest.mark.parametrize(("flag", "method"), [(1, 8), (0, 99)], ids=["encrypted", "unknown"])
def test_archives_that_cannot_be_unpacked_are_named(sets, flag, method):
    """Both headers of each member are rewritten: flags and method are at 6 and 8, or 8 and 10 in the directory."""
    packed = bytearray(made.beir())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = packed.find(mark)
        while place >= 0:
            packed[place + at] |= flag
            packed[place + at + 2] = method
            place = packed.find(mark, place + 1)
    path = sets.add("small", "beir", "small.zip", bytes(packed), kind="both")
    failed(sets.run("prepare", path), 1, "small.zip")
