"""The library as docs/library.md shows it: every example runs, and says what the commands say."""

import asyncio
import json
import re
from pathlib import Path

import pytest

import telerag_cli
from expect import fails
from telerag_cli import AskResult, Delta, Engine, EngineConfig, TeleragError, build_index, embed
from telerag_cli.corpus.pydocs import python_documentation
from telerag_cli.errors import ArtifactError, UsageError

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "library.md").read_text(), re.DOTALL
)
QUESTION = "How do I find the median of a list of numbers?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as ``telerag quickstart`` leaves it, with fewer and shorter passages, which the LLM reads sooner."""
    root = tmp_path_factory.mktemp("library")
    (root / "quickstart").mkdir()
    lines = [
        json.dumps({"id": passage.id, "text": passage.text[:160], **passage.metadata})
        for number, passage in enumerate(python_documentation())
        if number % 30 == 0 or passage.id.startswith("statistics.")
    ]
    (root / "quickstart" / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    embed(root / "quickstart" / "corpus.jsonl", root / "quickstart" / "embeddings")
    build_index(root / "quickstart" / "embeddings", root / "quickstart" / "index")
    return root


@pytest.fixture(scope="module")
def engine(folder):
    config = EngineConfig(
        index=folder / "quickstart" / "index", pipeline="naive", k=3, max_tokens=16, profile="none", concurrency=2
    )
    with Engine.open(config) as opened:
        yield opened


@pytest.mark.model
@pytest.mark.parametrize("example", EXAMPLES, ids=range(5))
def test_the_examples_of_the_document_run(folder, example, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(example, "docs/library.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_every_public_name_is_there():
    assert all(getattr(telerag_cli, name) for name in telerag_cli.__all__)
    with pytest.raises(AttributeError):
        _ = telerag_cli.nothing


@pytest.mark.model
def test_ask_stream_and_many_say_the_same(engine):
    answered = engine.ask(QUESTION)
    *deltas, last = engine.stream(QUESTION)
    assert {type(delta) for delta in deltas} == {Delta}
    assert "".join(delta.text for delta in deltas if delta.stage == "answer").strip() == last.answer == answered.answer
    first, second = engine.ask_many([QUESTION, "What is a generator?"])
    assert isinstance(first, AskResult)
    assert (first.question, second.question) == (QUESTION, "What is a generator?")
    assert first.answer == answered.answer
    assert [hit.row for hit in engine.search(QUESTION).found] == [hit.row for hit in answered.found]
    assert asyncio.run(engine.shared.retrievals.find((QUESTION,), [])).found == answered.found


@pytest.mark.model
def test_one_question_may_differ_in_what_belongs_to_it(engine):
    assert engine.ask(QUESTION, max_tokens=2).finish_reason == "length"
    assert engine.config.max_tokens == 16
    with fails(UsageError, "fast_memory"):
        engine.ask(QUESTION, fast_memory="1GiB")
    with fails(UsageError, "--max-tokens", 0):
        engine.ask(QUESTION, max_tokens=0)


@pytest.mark.model
def test_a_question_that_fails_costs_only_itself(engine):
    good, bad = engine.ask_many([QUESTION, "word " * 5000])
    assert isinstance(good, AskResult)
    assert isinstance(bad, TeleragError)
    assert bad.code == "context_length"


@pytest.mark.parametrize(
    ("changed", "values"),
    [
        ({"k": 0}, ("-k", 0)),
        ({"pipeline": "hide"}, ("--pipeline", "hide", "hyde")),
        ({"fast_memory": "much"}, ("much",)),
        ({"top_p": 2.0}, ("--top-p", 2.0)),
    ],
)
def test_settings_are_checked_when_they_are_made(changed, values):
    with fails(UsageError, *values):
        EngineConfig(index="index", **changed)


def test_what_is_missing_is_said(tmp_path):
    with fails(ArtifactError, tmp_path / "none"), Engine.open(EngineConfig(index=tmp_path / "none")):
        pass
