import json
import subprocess
import sys
from pathlib import Path

import pytest

from expect import fails
from telerag_cli.corpus import pydocs
from telerag_cli.errors import InputError
from telerag_cli.evaluation.answers import contains, normalized
from telerag_cli.evaluation.records import read_gold

ROOT = Path(__file__).parents[2]
PYTHON_QA = ROOT / "datasets" / "python_qa.jsonl"
SOURCE = '''"""A module that says of itself what it is good for."""

def plain(a, *, b: int = 2) -> str:
    """Return something, as a function is expected to do."""

def _private():
    """This one is nobody's business and must not appear."""

def silent(): ...

def brief():
    """Too short."""

try:
    class Base(Exception):
        """Raised when a thing that should not happen happens."""

        async def method(self, x):
            """Return something, as a function is expected to do, but later."""
except ImportError:
    def fallback():
        """Stands in for something that cannot be imported here."""
'''


@pytest.fixture(scope="module")
def documentation():
    return list(pydocs.python_documentation())


def test_documentation_is_several_thousand_passages_of_bounded_size_each_once(documentation):
    assert len(documentation) > 4000
    bodies = [passage.text.split("\n", 1)[1] for passage in documentation]
    assert len({passage.id for passage in documentation}) == len(set(bodies)) == len(documentation)
    assert all(0 < len(body) <= pydocs.MAX_CHARS for body in bodies)
    assert all(set(passage.metadata) == {"title", "module", "kind"} for passage in documentation)
    assert {p.metadata["kind"] for p in documentation} == {"topic", "module", "class", "function", "method"}


def test_documentation_holds_what_the_quickstart_asks_for(documentation):
    by_id = {passage.id: passage for passage in documentation}
    assert by_id["json.dumps"].text.startswith("json.dumps(obj, *, skipkeys=False")
    assert "Serialize ``obj`` to a JSON formatted ``str``" in by_id["json.dumps"].text
    assert by_id["builtins.str.split"].metadata["kind"] == "method"
    assert by_id["decimal.Context.min_mag"].metadata["module"] == "decimal"
    assert any("context manager" in p.text for p in documentation if p.metadata["kind"] == "topic")


def test_documentation_is_the_same_each_time_and_leaves_tests_out(documentation):
    assert list(pydocs.python_documentation()) == documentation
    assert not [
        p.id for p in documentation if p.metadata["module"].split(".")[0] in ("test", "idlelib", "site-packages")
    ]


def test_docstrings_are_parsed_with_signatures_and_never_run(tmp_path):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""A package whose import would be noticed at once."""\nraise SystemExit("imported")\n'
    )
    (package / "mod.py").write_text(SOURCE)
    (package / "broken.py").write_text("def (")
    (package / "latin.py").write_bytes(
        b'# coding: utf-8\n"""\xff\xfe is no UTF-8 and this file has to be skipped."""\n'
    )
    (package / "_hidden.py").write_text(SOURCE)
    assert {passage.id: passage.text.split("\n")[0] for passage in pydocs.harvest([tmp_path])} == {
        "pack": "module pack",
        "pack.mod": "module pack.mod",
        "pack.mod.plain": "pack.mod.plain(a, *, b: int=2) -> str",
        "pack.mod.Base": "class pack.mod.Base(Exception)",
        "pack.mod.Base.method": "pack.mod.Base.method(self, x)",
        "pack.mod.fallback": "pack.mod.fallback()",
    }


def test_long_docstrings_are_cut_between_paragraphs_and_lose_nothing(tmp_path):
    paragraphs = [f"Paragraph {n} " + "word " * 60 for n in range(9)] + ["".join(map(str, range(800)))]
    (tmp_path / "long.py").write_text('"""' + "\n\n".join(paragraphs) + '"""\n')
    pieces = list(pydocs.harvest([tmp_path]))
    assert [piece.id for piece in pieces] == ["long", *(f"long#{n}" for n in range(2, len(pieces) + 1))]
    told = "".join(piece.text.removeprefix("module long\n") for piece in pieces)
    assert "".join(told.split()) == "".join("".join(paragraphs).split())


def test_a_missing_root_is_named(tmp_path):
    with fails(InputError, tmp_path / "absent"):
        pydocs.harvest([tmp_path / "absent"])


def test_harvest_script_writes_what_embed_reads(tmp_path):
    (tmp_path / "mod.py").write_text(SOURCE)
    script, output = ROOT / "scripts" / "harvest_docstrings.py", tmp_path / "corpus.jsonl"
    subprocess.run([sys.executable, script, tmp_path, "-o", output, "--limit", "3"], check=True, capture_output=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["mod", "mod.plain", "mod.Base"]
    assert {"id", "text", "title", "module", "kind"} == set(lines[0])
    done = subprocess.run([sys.executable, script, tmp_path / "no", "-o", output], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not a folder" in done.stderr


def test_questions_on_python_are_answered_by_their_passages(monkeypatch):
    """In every Python whose documentation they are written for: 3.11 to 3.13."""
    if sys.version_info >= (3, 14):
        pytest.skip("datasets/python_qa.jsonl is written for the documentation of Python 3.11 to 3.13")
    with PYTHON_QA.open("rb") as lines:
        asked = read_gold(lines, PYTHON_QA.name)
    assert len(asked) >= 40
    wanted = {key for each in asked.values() for key in each.passages}
    modules = {key.partition("#")[0] for key in wanted} | {key.rpartition(".")[0] for key in wanted}
    modules |= {key.rpartition(".")[0] for key in modules}  # of a method's class
    # Parsing the whole library takes seconds, and only these modules are asked about.
    source = pydocs._source
    monkeypatch.setattr(pydocs, "_source", lambda path, module: source(path, module) if module in modules else ())
    texts = {passage.id: passage.text for passage in pydocs.python_documentation() if passage.id in wanted}
    assert wanted - texts.keys() == set()
    for each in asked.values():
        gold = [normalized(answer) for answer in each.answers]
        assert each.passages, each.id
        assert [key for key in each.passages if not contains(normalized(texts[key]), gold)] == [], each.id
