"""The engine with a scripted LLM and an embedder made of word hashes: flows, refinement, citations, context, lines."""

import asyncio
import io
import json
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from animals import ANIMALS
from expect import fails
from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.corpus.passages import Passage, Retrieved
from telerag_cli.engine.citations import cite
from telerag_cli.engine.lines import answer_line, error_line
from telerag_cli.engine.questions import read_questions
from telerag_cli.engine.refinement import RefinementEmbedder, Refiner
from telerag_cli.errors import ContextError, InputError
from telerag_cli.llm.shapes import Lines
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.prefetch.order import CHECKPOINTS, PATIENT_CHECKPOINTS
from telerag_cli.tracing import Tracer


def script(request):
    if "passage that answers" in request.messages[-1].content:
        return "owls number 3 live in place 8 and eat food 3, as is well known to all who have seen them at night"
    return "owls number 3 live in place 8. [1]"


def run(engine, pipeline, question="Where do owls live?"):
    return asyncio.run(engine.aask(question, pipeline=make_pipeline(pipeline)))


def test_hyde_writes_retrieves_and_answers(engine_of):
    answered = run(engine_of(script), PipelineName.HYDE)
    assert [stage.name for stage in answered.stages] == ["passage", "answer"]
    assert answered.found[0].passage.text.startswith("owls number")
    assert answered.answer.startswith("owls number 3")
    assert answered.citations[0]["id"] == answered.found[0].passage.id
    assert answered.citations[0]["by"] == "marker"
    assert len(answered.joins) == 1
    assert {"passage_s", "embed_s", "join_s", "retrieval_s", "answer_s", "llm_s", "total_s"} <= set(answered.timings)
    assert answered.timings["total_s"] >= answered.timings["llm_s"]


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


def test_passages_that_do_not_fit_are_dropped_from_the_lowest_rank(engine_of):
    engine = engine_of(script, context_tokens=75, max_tokens=20)
    answered = run(engine, PipelineName.NAIVE)
    prompt = engine.generator.requests[-1].messages[-1].content
    assert answered.dropped_passages > 0
    assert "[1]" in prompt
    assert f"[{4 - answered.dropped_passages}]" not in prompt
    with fails(ContextError, "--ctx-size"):
        run(engine, PipelineName.NAIVE, "why " * 80)


def test_only_passages_of_the_prompt_are_cited(engine_of):
    kept = set()
    for context in [*range(40, 60), 200]:
        try:
            answered = run(engine_of(script, context_tokens=context, max_tokens=20), PipelineName.NAIVE)
        except ContextError:
            continue
        in_prompt = len(answered.found) - answered.dropped_passages
        kept.add(in_prompt)
        assert all(cited["rank"] <= in_prompt for cited in answered.citations)
        assert bool(answered.citations) == (in_prompt > 0)  # the answer names the first and uses its words
    assert {0, 3} <= kept


class StubPrefetch:
    question = np.ones(2, np.float32)

    def __init__(self, idle):
        self.idle = idle


class StubRetriever:
    def __init__(self):
        self.refined, self.wanted = [], []

    def refine(self, ahead, queries, nprobe, fraction):
        self.refined.append((len(queries), fraction))
        self.wanted.append(nprobe)


class Sketches:
    """Vectors of length one, each call noted and held back until the gate opens."""

    def __init__(self):
        self.texts = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, texts):
        self.texts.append(list(texts))
        self.gate.wait(5)
        return np.ones((len(texts), 2), np.float32)


@pytest.fixture
def sketches():
    made = Sketches()
    made.refinement_embedder = RefinementEmbedder(made, share=1.0, allowance_s=10.0)
    yield made
    made.gate.set()
    made.refinement_embedder.close()


def refiner_of(sketches, expected_tokens, expect=None, *, idle=False):
    prefetch = Future()
    prefetch.set_result(StubPrefetch(idle))
    retriever = StubRetriever()
    return Refiner(prefetch, retriever, 4, expected_tokens, sketches.refinement_embedder, expect), retriever


def settled(sketches):
    """Wait until everything submitted before was served."""

    class Last:
        urgent = False

        def __init__(self):
            self.taken = threading.Event()

        def take(self):
            self.taken.set()
            return []

    # The first may be taken together with what is waited for, the second comes after it.
    for last in (Last(), Last()):
        sketches.refinement_embedder.submit(last)
        assert last.taken.wait(5)


def test_refinement_comes_at_checkpoints_and_looks_at_the_newest_text(sketches):
    refiner, retriever = refiner_of(sketches, 100)
    first = int(CHECKPOINTS[0] * 100)
    sketches.gate.clear()
    refiner("too early", first - 1)
    assert sketches.texts == []
    refiner(f"{first} tokens", first)
    while not sketches.texts:
        time.sleep(0.001)
    for tokens in range(first + 1, 60):
        refiner(f"{tokens} tokens", tokens)  # the first is being embedded all the while
    sketches.gate.set()
    settled(sketches)
    assert sketches.texts == [[f"{first} tokens"], ["59 tokens"]]
    assert retriever.refined == [(1, first / 100), (1, 0.59)]


def test_each_finished_query_is_followed_at_once(sketches):
    refiner, retriever = refiner_of(sketches, 1000, Lines(3).finished)
    for text in ("one", "one\nt", "one\ntwo", "one\ntwo\nth", "one\ntwo\nthree\n"):
        refiner(text, 200 + len(text))
        settled(sketches)
    assert sketches.texts == [["one", "two"], ["one", "two", "three"]]
    assert [count for count, _fraction in retriever.refined] == [1, 2, 3]  # the first is the start's own
    assert retriever.wanted == [8, 8, 12]


def test_an_idle_link_waits_for_later_checkpoints_but_not_for_queries(sketches):
    text, followed = refiner_of(sketches, 100, idle=True)
    lines, listed = refiner_of(sketches, 100, Lines(3).finished, idle=True)
    early, late = (round(100 * share) for share in (CHECKPOINTS[0], PATIENT_CHECKPOINTS[0]))
    for tokens in range(1, late + 1):
        text("word " * tokens, tokens)
        lines("one\n" if tokens < early + 2 else "one\ntwo\n", tokens)
        settled(sketches)
    assert followed.refined == [(1, late / 100)]
    assert listed.refined == [(2, (early + 2) / 100)]


def test_a_refinement_that_comes_too_late_is_not_made(sketches):
    sketches.gate.clear()
    busy, _retriever = refiner_of(sketches, 10)
    busy("busy", 9)
    while not sketches.texts:
        time.sleep(0.001)
    refiner, retriever = refiner_of(sketches, 10)
    refiner("half", 5)
    refiner.end()
    sketches.gate.set()
    settled(sketches)
    assert retriever.refined == []


def test_what_goes_wrong_in_a_refinement_is_told(sketches):
    refiner, retriever = refiner_of(sketches, 10)
    retriever.refine = None
    refiner("half", 5)
    settled(sketches)
    with pytest.raises(TypeError):
        refiner.end()


def test_sketching_takes_no_more_than_its_share():
    calls = []

    def slow(texts):
        calls.append((time.perf_counter(), len(texts)))
        began_s = time.thread_time()
        while time.thread_time() - began_s < 0.02:  # sleeping would cost nobody anything
            pass
        return np.ones((len(texts), 2), np.float32)

    class Wish:
        def __init__(self, urgent):
            self.urgent = urgent
            self.done = threading.Event()

        def take(self):
            return ["text"]

        def give(self, vectors):
            self.done.set()

    refinement_embedder = RefinementEmbedder(slow, share=0.1, allowance_s=0.01)
    wishes = [Wish(False) for _ in range(3)]
    refinement_embedder.submit(wishes[0])
    assert wishes[0].done.wait(5)
    refinement_embedder.submit(wishes[1])
    refinement_embedder.submit(wishes[2])
    urgent = Wish(True)
    refinement_embedder.submit(urgent)
    assert urgent.done.wait(5)
    assert not wishes[1].done.is_set()  # 10 ms too many were used
    assert wishes[1].done.wait(5)
    assert wishes[2].done.wait(5)
    refinement_embedder.close()
    assert [count for _at, count in calls] == [1, 1, 2]
    assert calls[2][0] - calls[0][0] > 0.1


def hits(*texts):
    return [Retrieved(Passage(f"p{n}", text, {}), n, 1.0) for n, text in enumerate(texts)]


def test_citations_by_marker_and_by_words():
    found = hits("Generators yield values lazily from functions.", "Lists store several objects together in order.")
    text = (
        "Lists store objects together in order. [2] Generators yield values lazily! Something unrelated entirely here."
    )
    citations = cite(text, found)
    assert [(item["id"], item["by"]) for item in citations] == [("p1", "marker"), ("p0", "overlap")]
    assert text[citations[0]["start"] : citations[0]["end"]] == "Lists store objects together in order. [2]"
    assert text[citations[1]["start"] : citations[1]["end"]] == "Generators yield values lazily!"
    assert cite("No such passage [9].", found) == []
    assert cite("", found) == []


def test_lines_answer_in_kind(engine_of):
    answered = run(engine_of(script), PipelineName.HYDE)
    source = b'Where?\n{"custom_id": "c", "body": {"messages": [{"role": "user", "content": "Where?"}]}}'
    plain, batch = read_questions(io.BytesIO(source), "q")
    line = json.loads(json.dumps(answer_line(plain, answered)))
    assert line["id"] == "1"
    assert line["passages"][0]["rank"] == 1
    assert line["lookahead"]["mode"] == "refined"
    counts = line["lookahead"]
    assert counts["lists_hit"] + counts["lists_coming"] + counts["lists_missed"] == counts["lists_wanted"]
    reply = answer_line(batch, answered)
    assert reply["custom_id"] == "c"
    assert reply["error"] is None
    body = reply["response"]["body"]
    assert body["choices"][0]["message"]["content"] == answered.answer
    generations = [stage.generation for stage in answered.stages]
    assert body["usage"]["total_tokens"] == sum(g.prompt_tokens + g.completion_tokens for g in generations)
    assert body["model"] == "telerag-hyde"
    failed = {"code": "input", "message": "no"}
    assert error_line(batch, InputError("no"))["error"] == failed
    assert error_line(plain, InputError("no")) == {"id": "1", "question": "Where?", "error": failed}


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


@pytest.mark.parametrize("question", ["caf\udce9?", "half \ud83d", "a\0b"])
def test_a_question_that_no_model_can_read_is_refused(engine_of, question):
    engine = engine_of(script)
    with fails(InputError, "character"):
        run(engine, PipelineName.NAIVE, question)
    with fails(InputError, "character"):
        asyncio.run(engine.asearch(question))
