"""Public datasets: what is known of them, preparing them, checking them, and their questions for benchmarks."""

import json
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dataset_files as made
from dataset_files import description, fetched
from telerag_cli.cli import data
from telerag_cli.corpus.readers import find_sources, read_passages
from telerag_cli.datasets import streams
from telerag_cli.datasets.cache import Cached
from telerag_cli.datasets.catalogue import Kind, describe, names
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
        assert (each.split is None) == (each.kind is Kind.PASSAGES), each.name
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
    assert "2 in questions.jsonl" in result.stderr
    wanted = [{"id": key, "question": text, "answers": answers} for key, text, answers in QUESTIONS[parser]]
    assert sets.rows("small") == wanted
    assert Cached.of(describe(path), sets.cache).state() == "prepared (test)"
    assert sets.run("prepare", path, "--limit", 1).exit_code == 0
    assert sets.rows("small") == wanted[:1]
    assert Cached.of(describe(path), sets.cache).state() == "prepared (test, first 1)"


def test_splits_lie_in_files_or_in_members(sets):
    files = [{"name": "a.jsonl", "split": "test"}, {"name": "b.jsonl", "split": "dev"}]
    path = description(sets.folder, "two", "flashrag", files)
    fetched(sets.cache, path, {"a.jsonl": made.FLASHRAG})
    assert sets.run("prepare", path).exit_code == 0
    missing = sets.run("prepare", path, "--split", "dev")
    assert missing.exit_code == 1
    assert "b.jsonl of two is not in" in missing.stderr
    assert "telerag data fetch two --split dev." in missing.stderr
    unknown = sets.run("prepare", path, "--split", "train")
    assert (unknown.exit_code, "has the splits test, dev, and not 'train'" in unknown.stderr) == (2, True)
    file, content, fields = SETS["triviaqa"]
    packed = sets.add("packed", "triviaqa", file, content, **fields)
    refused = sets.run("prepare", packed, "--split", "train")
    assert (refused.exit_code, "has the splits test, and not 'train'" in refused.stderr) == (2, True)


def test_beir(sets):
    path = sets.add("small", "beir", "small.zip", made.beir(), kind="both")
    result = sets.run("prepare", path)
    assert result.exit_code == 0
    assert "1 passage has no text and is left out" in result.stderr
    assert "3 in corpus.jsonl, 2 in questions.jsonl, 3 in qrels.tsv" in result.stderr
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
    refused = sets.run("prepare", path, "--split", "dev")
    assert (refused.exit_code, "has the splits test, train, and not 'dev'" in refused.stderr) == (2, True)


def test_passages_of_dpr_are_read_as_they_are_or_converted(sets):
    path = sets.add("wiki", "dpr-passages", "psgs.tsv.gz", made.gz(made.WIKIPEDIA), "passages", None)
    result = sets.run("prepare", path)
    assert (result.exit_code, result.stdout) == (0, f"{sets.cache / 'wiki' / 'psgs.tsv.gz'}\n")
    assert "telerag embed reads psgs.tsv.gz as it is" in result.stderr
    out = sets.folder / "out"
    assert sets.run("prepare", path, "-o", out, "--limit", 2).stdout == f"{out}\n"
    assert [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()] == [
        {"_id": "1", "title": "Oat", "text": 'Oats ("Avena") grow'},
        {"_id": "2", "title": "Rye", "text": "Rye is sown in autumn"},
    ]
    refused = sets.run("prepare", path, "-o", out, "--split", "dev")
    assert (refused.exit_code, "which have no splits" in refused.stderr) == (2, True)


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
    (
        "flashrag",
        b'{"id": "a", "question": "Q?", "golden_answers": "A"}\nnot json\n',
        "2: not JSON (Expecting value at column 1)",
    ),
    ("flashrag", b'{"id": "a", "question": " ", "golden_answers": []}\n', "1: no text in 'question'"),
    ("flashrag", b'{"id": "a", "question": "Q?", "golden_answers": [1]}\n', "1: the answers are [1]"),
    ("flashrag", b'{"question": "Q?", "golden_answers": []}\n', "1: 'id' is None, and no id"),
    ("flashrag", b'\n{"id": "a", "question": "\xff"}\n', "2: not UTF-8"),
    ("flashrag", b'{"id": "a", "question": "\\ud800", "golden_answers": []}\n', "1: not valid UTF-8 text"),
    ("flashrag", b"[1]\n", "1: a JSON list where an object is expected"),
    ("hotpotqa", b'[{"_id": "a", "question": "Q?",\n"answer": "A"},\n {"_id": "b"}]', "3: no text in 'question'"),
    ("hotpotqa", b"[\n\n3]", "3: a JSON int where an object is expected"),
    ("nq-open", b'{"question": "Q?"}\n', "1: the answers are None"),
]


@pytest.mark.parametrize(("parser", "content", "says"), BAD)
def test_a_bad_entry_is_named_and_nothing_is_lost(sets, parser, content, says):
    good = SETS[parser][1]
    path = sets.add("small", parser, "f.jsonl", good)
    assert sets.run("prepare", path).exit_code == 0
    before = sets.rows("small")
    fetched(sets.cache, path, {"f.jsonl": content})
    result = sets.run("prepare", path)
    assert result.exit_code == 1
    assert f"f.jsonl:{says}" in result.stderr
    assert sets.rows("small") == before
    assert sorted(path.name for path in (sets.cache / "small" / "prepared").iterdir()) == [
        "prepared.json",
        "questions.jsonl",
    ]
    skipped = sets.run("prepare", path, "--skip-bad")
    assert skipped.exit_code == 0
    assert "left out 1 bad entry: f.jsonl:" in skipped.stderr


@pytest.mark.parametrize("line", ["q1\td1", "q1\td1\tmuch", "q1 0 d1 1"])
def test_a_bad_judgement_is_named(sets, line):
    qrels = {"test": made.QRELS["test"] + line + "\n"}
    path = sets.add("small", "beir", "small.zip", made.beir(qrels=qrels), kind="both")
    result = sets.run("prepare", path)
    assert result.exit_code == 1
    assert "small.zip:small/qrels/test.tsv:5: " in result.stderr
    assert "where query-id, corpus-id, score are expected" in result.stderr
    assert not (sets.cache / "small" / "prepared" / "corpus.jsonl").exists()
    assert sets.run("prepare", path, "--skip-bad").exit_code == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "h.json:1: the end where [ is expected"),
        (b'[{"_id": "a", "question": "Q?", "answer": "A"}', "h.json:1: the end where , or ] is expected"),
        (
            b'[{"_id": "a", "question": "Q?", "answer": "A"},\n{"_id": "b", "que',
            "h.json:2: not JSON (Unterminated string",
        ),
        (b'[{"_id": "a", "question": "Q?", "answer": "A"}\n{}]', "h.json:2: '{' where , or ] is expected"),
        (b'{"_id": "a"}', "h.json:1: '{' where [ is expected"),
        (b'[\n{"_id":\n\n}]', "h.json:2: not JSON (Expecting value at line 4)."),
        (b'["\xff"]', "h.json:1: not UTF-8"),
    ],
)
def test_a_torn_array_is_named_even_if_bad_entries_may_be_left_out(sets, content, says):
    path = sets.add("small", "hotpotqa", "h.json", content)
    result = sets.run("prepare", path, "--skip-bad")
    assert result.exit_code == 1
    assert says in result.stderr
    assert "Fetch it again" in result.stderr


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
    result = sets.run("prepare", path, "-o", sets.folder / "out")
    assert result.exit_code == 1
    assert "etch it again" in result.stderr
    assert list((sets.folder / "out").glob("*")) == []


def test_a_member_that_is_not_there_is_told(sets):
    path = sets.add("small", "triviaqa", "t.tar.gz", made.packed_tar({"a": ""}), members={"test": "b"})
    result = sets.run("prepare", path)
    assert (result.exit_code, "t.tar.gz has no b." in result.stderr) == (1, True)
    path = sets.add("other", "beir", "b.zip", made.packed_zip({"a": ""}), kind="both")
    result = sets.run("prepare", path)
    assert (result.exit_code, "has 0 files corpus.jsonl" in result.stderr) == (1, True)


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
    with streams.opened(path) as handle, pytest.raises(InputError, match="an object without 'Absent'"):
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
    absent = sets.run("check", "nq-open")
    assert (absent.exit_code, "nq-open: NQ-open.dev.jsonl has not been fetched" in absent.stderr) == (1, True)
    sets.run("prepare", path)
    whole = sets.run("check", path, "--json")
    assert whole.exit_code == 0
    assert [each["says"] for each in json.loads(whole.stdout)] == [
        "agrees with what was fetched; its publisher gives no checksum",
        "whole, 2 entries",
    ]
    file, prepared = sets.cache / "small" / "nq.jsonl", sets.cache / "small" / "prepared" / "questions.jsonl"
    file.write_bytes(file.read_bytes().replace(b"lighthouse", b"lightHouse"))
    result = sets.run("check", path)
    assert (result.exit_code, "and was" in result.stderr) == (1, True)
    file.write_bytes(b"short")
    assert f"has 5 bytes, and {len(made.NQ)} were fetched" in sets.run("check", path).stderr
    file.unlink()
    assert "nq.jsonl is noted in source.json, and missing" in sets.run("check", path).stderr
    fetched(sets.cache, path, {"nq.jsonl": made.NQ + "\n"})
    assert "was made of nq.jsonl with sha256" in sets.run("check", path).stderr
    fetched(sets.cache, path, {"nq.jsonl": made.NQ})
    assert sets.run("check", path).exit_code == 0
    text = prepared.read_text()
    prepared.write_text(text.replace("boats", "goats"))
    assert "questions.jsonl its checksum is xxh3:" in sets.run("check", path).stderr
    prepared.write_text(text[:-3])
    assert f"and {len(text):,} were written" in sets.run("check", path).stderr
    prepared.unlink()
    assert "questions.jsonl is missing" in sets.run("check", path).stderr


def test_damaged_notes_are_told_and_do_not_hide_other_datasets(sets):
    path = sets.add("small", "nq-open", "nq.jsonl", made.NQ)
    (sets.cache / "small" / "source.json").write_text('{"files": 3}')
    result = sets.run("prepare", path)
    assert (result.exit_code, "source.json is damaged" in result.stderr) == (1, True)
    (sets.cache / "nq-open").mkdir()
    (sets.cache / "nq-open" / "source.json").write_text("{")
    listed = json.loads(sets.run("list", "--json").stdout)
    assert [each["name"] for each in listed if each["state"] == "damaged"] == ["nq-open"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fetch"], "Missing argument 'NAME'"),
        (["fetch", "nqopen"], "There is no dataset 'nqopen'; the nearest is nq-open."),
        (["fetch", "nq-open", "--limit", "3"], "No such option"),
        (["check", "nq-open", "triviaqa", "-o", "x"], "--output is for one dataset, and 2 are named"),
        (["fetch", "nq-open", "triviaqa", "--from", "x"], "--from is for one dataset, and 2 are named"),
        (["prepare", "nq-open", "triviaqa", "-o", "x"], "--output is for one dataset, and 2 are named"),
        (["fetch", "dpr-wikipedia", "--split", "dev"], "which have no splits, and --split is 'dev'"),
    ],
)
def test_usage(sets, arguments, says):
    result = CliRunner().invoke(program, ["data", *arguments, "--cache-dir", str(sets.cache)])
    assert result.exit_code == 2
    assert says in result.stderr
    assert not sets.cache.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "is no TOML"),
        ('name = "own"', "is no description of a dataset: title"),
        ("colour = 3", "is no description of a dataset: "),
    ],
)
def test_a_description_of_ones_own_that_is_none(tmp_path, text, says):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(InputError, match=says):
        describe(str(tmp_path / "own.toml"))


def test_a_description_cannot_name_files_elsewhere(tmp_path):
    with pytest.raises(InputError, match="no plain file name"):
        describe(description(tmp_path, "own", "flashrag", [{"name": "../a.jsonl"}]))
    (tmp_path / "b.toml").write_text(Path(description(tmp_path, "own", "flashrag", [{"name": "a"}])).read_text())
    with pytest.raises(InputError, match="describes 'own'"):
        describe(str(tmp_path / "b.toml"))
    with pytest.raises(ArtifactError, match="does not exist"):
        describe(str(tmp_path / "absent.toml"))


def test_questions_of_a_dataset_for_a_benchmark(sets):
    cached = Cached.of(describe("nq-open"), sets.cache)
    with pytest.raises(ArtifactError, match="are not prepared") as caught:
        load_questions("nq-open", sets.cache)
    assert caught.value.remedy == "Run telerag data fetch nq-open --split dev, then telerag data prepare nq-open."
    cached.root.mkdir(parents=True)
    text = "".join(json.dumps({"question": f"Question {n}?", "answer": ["A"]}) + "\n" for n in range(50))
    fetched(sets.cache, "nq-open", {"NQ-open.dev.jsonl": text})
    with pytest.raises(ArtifactError) as caught:
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
    with pytest.raises(InputError, match=r"q\.txt:1 has \['no'\]"):
        load_questions(path)
    path.write_text("")
    with pytest.raises(InputError, match="holds no question"):
        load_questions(path)
    with pytest.raises(InputError, match="is neither a file nor a dataset"):
        load_questions(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds passages and no questions"):
        load_questions("dpr-wikipedia", tmp_path)
