"""The engine with a scripted LLM and an embedder made of word hashes: flows, refinement, citations, context, lines."""

import asyncio
import hashlib
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from indexes import make_index
from telerag_cli.config import Lookahead, Metric, Storage
from telerag_cli.corpus.embeddings import PASSAGE_SCHEMA
from telerag_cli.corpus.passages import Passage
from telerag_cli.engine.citations import cite
from telerag_cli.engine.engine import Engine, Settings
from telerag_cli.engine.lines import RunFile, answer_line, error_line
from telerag_cli.engine.prompt import fit
from telerag_cli.engine.questions import read_questions
from telerag_cli.engine.refiner import Refiner
from telerag_cli.errors import ArtifactError, InputError, ModelError
from telerag_cli.generation.scripted import ScriptedGenerator
from telerag_cli.index.passages import Passages, write_passages
from telerag_cli.index.scoring import Coarse
from telerag_cli.lookahead.order import CHECKPOINTS
from telerag_cli.lookahead.retriever import Retriever
from telerag_cli.pipelines.base import Retrieved
from telerag_cli.pipelines.registry import PIPELINES, PipelineName
from telerag_cli.tiers.host import HostTier
from telerag_cli.tracing import Tracer

DIMENSION = 24


class WordHashes:
    """An embedding that needs no model: texts with words in common are near."""

    def encode_queries(self, texts):
        out = np.zeros((len(texts), DIMENSION), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                digest = hashlib.blake2b(word.strip(".,?").encode(), digest_size=8).digest()
                out[row] += np.random.default_rng(int.from_bytes(digest)).standard_normal(DIMENSION)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    def sketch(self, text):
        return self.encode_queries([text])[0]


ANIMALS = ("cats", "dogs", "owls", "bees", "ants", "eels", "bats", "cows", "hens", "rats")
TEXTS = [
    f"{animal} number {n} live in place {n * 7 % 13} and eat food {n % 5}."
    for animal in ANIMALS
    for n in range(30)
]


@pytest.fixture
def engine_of(tmp_path):
    vectors = WordHashes().encode_queries(TEXTS)
    index, _ivf = make_index(tmp_path / "index", vectors, 20, Metric.IP, Storage.FLOAT32)
    columns = [[f"p{n}" for n in range(len(TEXTS))], TEXTS, ["{}"] * len(TEXTS)]
    rows = pa.record_batch(columns, schema=PASSAGE_SCHEMA)
    assert sum(write_passages([rows], index.paths.passages)) == len(TEXTS)
    opened = []

    def make(
        script,
        lookahead=Lookahead.REFINED,
        *,
        token_s=0.0,
        context_tokens=4096,
        tracer=None,
        arena=0.5,
        max_tokens=20,
    ):
        coarse = Coarse(index.centroids, Metric.IP)
        tier = HostTier(index, coarse, int(index.extents.sum() * arena), tracer=tracer)
        generator = ScriptedGenerator(script, token_s=token_s, context_tokens=context_tokens)
        retriever = Retriever(index, coarse, tier, tracer=tracer)
        engine = Engine(generator, WordHashes(), retriever, Passages.open(index.paths.passages),
                        Settings(3, 4, lookahead, max_tokens), tracer=tracer)  # fmt: skip
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        assert engine.retriever.tier.references() == 0
        engine.retriever.tier.check_integrity()
        engine.close()


def script(request):
    if "passage that answers" in request.messages[-1].content:
        return "owls number 3 live in place 8 and eat food 3, as is well known to all who have seen them at night"
    return "owls number 3 live in place 8. [1]"


def run(engine, pipeline, question="Where do owls live?"):
    return asyncio.run(engine.ask(PIPELINES[pipeline], question))


def test_hyde_writes_retrieves_and_answers(engine_of):
    answered = run(engine_of(script), PipelineName.HYDE)
    assert [stage.name for stage in answered.stages] == ["passage", "answer"]
    assert answered.found[0].passage.text.startswith("owls number")
    assert answered.answer.startswith("owls number 3")
    assert answered.citations[0]["id"] == answered.found[0].passage.id
    assert answered.citations[0]["by"] == "marker"
    assert len(answered.joins) == 1
    assert {
        "passage_s",
        "embed_s",
        "join_s",
        "retrieval_s",
        "answer_s",
        "llm_s",
        "total_s",
    } <= set(answered.timings)
    assert answered.timings["total_s"] >= answered.timings["llm_s"]


def test_naive_retrieves_with_the_question(engine_of):
    engine = engine_of(script)
    answered = run(engine, PipelineName.NAIVE, "bees number 4 live in place 2")
    assert [stage.name for stage in answered.stages] == ["answer"]
    assert answered.found[0].passage.text.startswith("bees number 4")
    assert "bees number 4" in engine.generator.requests[0].messages[-1].content


def test_answers_do_not_depend_on_lookahead(engine_of):
    lines = []
    for mode in Lookahead:
        engine = engine_of(script, mode, token_s=0.001)
        answered = [run(engine, PipelineName.HYDE, f"Where do {animal} live?") for animal in ANIMALS]
        lines.append([(item.answer, [(hit.row, hit.score) for hit in item.found]) for item in answered])
        moved = sum(item.joins[0].lists_moved for item in answered)
        orders = max(item.joins[0].orders for item in answered)
        assert (moved > 0) == (mode is not Lookahead.OFF)
        assert (orders > 1) == (mode is Lookahead.REFINED)
    assert lines[0] == lines[1] == lines[2]


def test_a_generator_that_fails_in_the_middle_leaves_nothing(engine_of):
    def failing(request):
        if "passage that answers" in request.messages[-1].content:
            raise ModelError("the model broke")
        return "never"

    engine = engine_of(failing)
    with pytest.raises(ModelError, match="the model broke"):
        run(engine, PipelineName.HYDE)
    before = len(engine.retriever.tier.moves_under_way())
    engine.generator = ScriptedGenerator(script)
    assert run(engine, PipelineName.HYDE).found
    assert before <= engine.retriever.tier.depth


def test_passages_that_do_not_fit_are_dropped_from_the_lowest_rank(engine_of):
    engine = engine_of(script, context_tokens=75, max_tokens=20)
    answered = run(engine, PipelineName.NAIVE)
    prompt = engine.generator.requests[-1].messages[-1].content
    assert answered.dropped_passages > 0
    assert "[1]" in prompt
    assert f"[{4 - answered.dropped_passages}]" not in prompt
    with pytest.raises(InputError, match="context has room for"):
        run(engine, PipelineName.NAIVE, "why " * 80)


def test_fit_keeps_everything_when_there_is_room():
    hits = [Retrieved(Passage(str(n), "text", {}), n, 1.0) for n in range(3)]
    assert fit("q", hits, 1000, lambda messages: sum(len(m.content.split()) for m in messages))[1] == 3


def test_refinement_comes_at_checkpoints_and_never_twice_at_once():
    refined = []
    gate = threading.Event()

    def refine(text, fraction):
        refined.append((text, fraction))
        gate.wait(5)

    first = int(CHECKPOINTS[0] * 100)
    with ThreadPoolExecutor(1) as executor:
        refiner = Refiner(refine, 100, executor)
        refiner.on_text("too early", first - 1)
        for tokens in range(first, 60):
            refiner.on_text(f"{tokens} tokens", tokens)  # the first is being embedded all the while
        gate.set()
        executor.submit(lambda: None).result()
        refiner.on_text("95 tokens", 95)
        executor.submit(lambda: None).result()
        refiner.on_text("99 tokens", 99)
    assert refined == [(f"{first} tokens", first / 100), ("95 tokens", 0.95)]


def test_a_refinement_that_comes_too_late_is_not_made():
    refined = []
    with ThreadPoolExecutor(1) as executor:
        gate = threading.Event()
        executor.submit(gate.wait, 5)
        refiner = Refiner(lambda text, fraction: refined.append(text), 10, executor)
        refiner.on_text("half", 5)
        refiner.end()
        gate.set()
    assert refined == []


def hits(*texts):
    return [Retrieved(Passage(f"p{n}", text, {}), n, 1.0) for n, text in enumerate(texts)]


def test_citations_by_marker_and_by_words():
    found = hits(
        "Generators yield values lazily from functions.", "Lists store several objects together in order."
    )
    text = "Lists store objects together in order. [2] Generators yield values lazily! Something unrelated entirely here."
    citations = cite(text, found)
    assert [(item["id"], item["by"]) for item in citations] == [("p1", "marker"), ("p0", "overlap")]
    assert text[citations[0]["start"] : citations[0]["end"]] == "Lists store objects together in order. [2]"
    assert text[citations[1]["start"] : citations[1]["end"]] == "Generators yield values lazily!"
    assert cite("No such passage [9].", found) == []
    assert cite("", found) == []


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
    assert "q.txt:8 is not UTF-8" in read[6].problem


def test_lines_answer_in_kind(engine_of):
    answered = run(engine_of(script), PipelineName.HYDE)
    source = b'Where?\n{"custom_id": "c", "body": {"messages": [{"role": "user", "content": "Where?"}]}}'
    plain, batch = read_questions(io.BytesIO(source), "q")
    line = json.loads(json.dumps(answer_line(plain, answered, PipelineName.HYDE, Lookahead.REFINED)))
    assert line["id"] == "1"
    assert line["passages"][0]["rank"] == 1
    assert line["lookahead"]["mode"] == "refined"
    counts = line["lookahead"]
    assert counts["lists_hit"] + counts["lists_coming"] + counts["lists_missed"] == counts["lists_wanted"]
    reply = answer_line(batch, answered, PipelineName.HYDE, Lookahead.REFINED)
    assert reply["custom_id"] == "c"
    assert reply["error"] is None
    body = reply["response"]["body"]
    assert body["choices"][0]["message"]["content"] == answered.answer
    generations = [stage.generation for stage in answered.stages]
    assert body["usage"]["total_tokens"] == sum(g.prompt_tokens + g.completion_tokens for g in generations)
    assert error_line(batch, "no")["error"]["message"] == "no"
    assert error_line(plain, "no") == {"id": "1", "question": "Where?", "error": {"message": "no"}}


def test_a_run_file_resumes_after_a_torn_line_and_tries_failures_again(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = [
        '{"id": "1", "answer": "a"}',
        '{"id": "2", "error": {"message": "x"}}',
        '{"id": "3", "answer": "c"}',
    ]
    path.write_text("\n".join([*whole, '{"id": "4", "ans']))
    with pytest.raises(ArtifactError, match="already holds"):
        RunFile(path, resume=False)
    with RunFile(path, resume=True) as file:
        assert file.answered == {"1", "3"}
        file.append({"id": "2", "answer": "b"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "3", "2"]
    path.write_text("not a run\n")
    with pytest.raises(ArtifactError, match="no line of a run"):
        RunFile(path, resume=True)
    assert path.read_text() == "not a run\n"


def test_the_trace_shows_moving_during_writing(engine_of, tmp_path):
    tracer = Tracer()
    engine = engine_of(script, token_s=0.004, tracer=tracer)
    run(engine, PipelineName.HYDE)
    tracer.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    writing = next(event for event in spans if event["cat"] == "LLM" and event["name"] == "passage")
    moves = [event for event in spans if event["cat"].startswith("link")]
    # The first may begin before the LLM does; without lookahead none would before it has ended.
    assert [move for move in moves if move["ts"] < writing["ts"] + writing["dur"]]
    assert {event["cat"] for event in spans} >= {"LLM", "embed", "join"}
