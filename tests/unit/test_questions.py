"""Questions from all the forms that people keep them in, and the file of a run that goes on."""

import io
import json
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expect import fails
from fuzz import EXAMPLES, fuzzed
from telerag_cli.config import EngineConfig
from telerag_cli.engine.lines import RunFile, error_line
from telerag_cli.engine.questions import Question, read_questions
from telerag_cli.errors import ArtifactError, InputError
from telerag_cli.server.chat import read_batch_body


def test_questions_come_as_text_json_and_batch_lines():
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "From a batch?"}]
    batch = {
        "custom_id": "b1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": turns},
    }
    lines = [
        "plain question",
        "",
        '{"id": 7, "question": "as json"}',
        '{"query": "no id"}',
        "{broken",
        '{"id": "x", "answer": 1}',
    ]
    text = "\n".join([*lines, json.dumps(batch)])
    read = list(read_questions(io.BytesIO(b"\xef\xbb\xbf" + text.encode() + b"\n\xff\xfe"), "q.txt"))
    assert [(question.id, question.text) for question in read[:3]] == [
        ("1", "plain question"),
        ("7", "as json"),
        ("4", "no id"),
    ]
    assert "q.txt:5 is not JSON" in read[3].problem
    assert "q.txt:6 has ['answer', 'id'] and not one of question" in read[4].problem
    assert (read[5].id, read[5].text, read[5].batch["model"]) == ("b1", "From a batch?", "m")
    assert "q.txt:8 cannot be used: the byte 0xFF" in read[6].problem


def test_a_run_file_resumes_after_a_torn_line_and_tries_failures_again(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = [
        '{"id": "1", "question": "q", "answer": "a"}',
        '{"id": "2", "question": "q", "error": {"message": "x"}}',
        '{"id": "3", "question": "q", "answer": "c"}',
    ]
    path.write_text("\n".join([*whole, '{"id": "4", "ans']))
    with fails(ArtifactError, path, path.stat().st_size):
        RunFile(path, resume=False)
    with RunFile(path, resume=True) as file:
        assert file.answered == {("1", "q"), ("3", "q")}
        file.append({"id": "2", "question": "q", "answer": "b"})
        with fails(ArtifactError, path):
            RunFile(path, resume=True)  # another process holds it
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "3", "2"]


@pytest.mark.parametrize(
    "content", ["not a run\n", '{"id": "1", "question": "q"}\n', '{"id": "1", "question": "q"}', "A question?", "[1]\n"]
)
def test_a_file_that_is_not_a_run_is_not_touched(tmp_path, content):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with fails(ArtifactError, f"{path}:1"):
        RunFile(path, resume=True)
    assert path.read_text() == content


def test_a_recording_keeps_lines_that_have_an_answer(tmp_path):
    path = tmp_path / "record.jsonl"
    lines = [json.dumps({"id": name, "question": "q", "answer": "a"}) + "\n" for name in "12"]
    path.write_text("".join(lines))
    with RunFile(path, resume=True, only={("1", "q")}):
        assert path.read_text() == lines[0]


def test_resuming_tells_questions_by_id_and_text():
    bodies = [{"a": 1, "b": 2}, {"a": 2}]
    different = [Question("x", "one"), Question("x", "two"), *(Question("x", "", body) for body in bodies)]
    assert len({question.key for question in different}) == 4
    assert Question("x", "", {"b": 2, "a": 1}).key == different[2].key


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b"q1\tWhat?\nq2\tWhy?", [("q1", "What?"), ("q2", "Why?")]),
        ("What é?\nWhy?".encode("utf-16"), [("1", "What é?"), ("2", "Why?")]),
        (b'[{"id": "a", "question": "What?"}, "Why?"]', [("a", "What?"), ("2", "Why?")]),
        (b'[\n {"id": "a",\n "question": "What?"}\n]', [("a", "What?")]),
        (b'{"query_id": "7", "query": "What?", "positive_passages": []}', [("7", "What?")]),
        (b'{"id": 3.0, "question": "What?", "golden_answers": ["x"]}', [("3", "What?")]),
        (b"[edit] What is that?", [("1", "[edit] What is that?")]),
        (
            b'{"custom_id": "b", "body": {"messages": [{"role": "user", '
            b'"content": [{"type": "text", "text": "What?"}]}]}}',
            [("b", "What?")],
        ),
    ],
)
def test_usual_forms_of_questions_are_read(content, asked):
    found = list(read_questions(io.BytesIO(content), "q"))
    assert [(question.id, question.text, question.problem) for question in found] == [(*each, None) for each in asked]


@pytest.mark.parametrize(
    "line",
    [
        b"caf\xe9?",
        b"a\tb\tc",
        b'{"id": "broken", "question": "\\ud83d"}',
        b'{"id": "broken", "question": NaN}',
        b'{"id": "\\ud83d", "question": "q"}',
        b'{"question": "a\\u0000"}',
        b'{"id": [1], "question": "q"}',
        b'{"question": ' + b"[" * 100_000,
        b'{"question": 1e999}',
        b'{"body": 5}',
        b'{"body": {"messages": 5}}',
        b'{"body": {"messages": [5, {"role": "user", "content": [{"type": "image_url"}]}]}}',
        b'{"url": "/v1/embeddings", "body": {"input": "x"}}',
    ],
)
def test_a_bad_question_costs_its_own_line(line):
    first, bad, last = read_questions(io.BytesIO(b"one\n" + line + b"\nthree"), "q.txt")
    assert (first.text, last.text, first.problem, last.problem) == ("one", "three", None, None)
    assert bad.problem.startswith("q.txt:2")
    assert bad.id == ("broken" if b'"broken"' in line else "2")
    bad.problem.encode()
    json.dumps(error_line(bad, InputError(bad.problem)), ensure_ascii=False).encode()


@given(st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=5))
@fuzzed
def test_any_line_is_a_question_or_a_problem(lines):
    for question in read_questions(io.BytesIO(b"\n".join([b"first", *lines, b"last"])), "q"):
        assert question.problem or question.text
        f"{question.id}{question.text}{question.problem}".encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
USUAL = {"messages": [{"role": "user", "content": "What is a set?"}], "temperature": 0.5, "stop": ["x"]}
NAMES = "model messages max_tokens temperature top_p seed stop response_format stream n other"
KEYS = st.sampled_from(NAMES.split())
SCHEMAS = st.dictionaries(
    st.sampled_from(["type", "properties", "enum", "items", "pattern", "$ref", "allOf", "oneOf", "not", "minLength"]),
    JSON,
    max_size=4,
).map(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", **schema}}})


def asked_with(changed):
    """The outcome of a Batch line whose body is the usual one with these changes."""
    line = json.dumps({"custom_id": "a", "body": {**USUAL, **changed}}).encode()
    (question,) = read_questions(io.BytesIO(line), "q", partial(read_batch_body, EngineConfig(index="index")))
    json.dumps(error_line(question, InputError(question.problem or "")), ensure_ascii=False).encode()
    return question


@given(st.dictionaries(KEYS, JSON, max_size=3))
@fuzzed
def test_any_request_is_a_question_or_an_error_of_its_line(changed):
    question = asked_with(changed)
    assert question.problem or question.text.strip()


@given(SCHEMAS)
@settings(fuzzed, max_examples=max(10, EXAMPLES // 100))  # each is looked at in a process of its own
def test_any_schema_is_kept_or_an_error_of_its_line(form):
    question = asked_with({"response_format": form})
    assert question.problem or question.options.settings["shape"]
