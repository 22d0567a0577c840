"""Many questions at a time: their lines and their order, shared retrieval and lookahead, and what fails with one."""

import asyncio
import io
import json
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from animals import ANIMALS, WordHashes
from doubles import ChosenLink, StubTier, answer_in_order, answer_with
from expect import fails
from telerag_cli.config import Lookahead, PipelineName, ScheduleConfig, ScheduleName
from telerag_cli.engine.admission import Local
from telerag_cli.engine.batch import Outputs
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.questions import Question, read_questions
from telerag_cli.engine.scheduler import Schedule, scheduled
from telerag_cli.errors import ArtifactError, ModelError, ResourceError, UsageError
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.prefetch.prefetcher import Prefetcher
from telerag_cli.server.chat import read_batch_body
from telerag_cli.tracing import Tracer


class Taken:
    """Collects what a run writes and tells."""

    def __init__(self, record=False):
        self.lines, self.told, self.traces, self.advanced = [], [], [], 0
        record_line = self.traces.append if record else None
        self.outputs = Outputs(self.lines.append, record_line, self.tell, self.advance)

    def tell(self, name, error):
        self.told.append(f"{name}: {error}")

    def advance(self, count):
        self.advanced += count


def questions_of(*texts):
    return [Question(str(n), text) for n, text in enumerate(texts, 1)]


def answer(engine, questions, taken, *, name=PipelineName.HYDE, concurrency=4, answered=(), ordered=False):
    return answer_in_order(
        engine, name, questions, taken.outputs, concurrency=concurrency, answered=answered, ordered=ordered
    )


def echo(request):
    """The longer the question's number, the later its answer."""
    text = request.messages[-1].content
    if "passage that answers" in text:
        return "owls number 3 live in place 8"
    return "word " * (30 if "slow" in text else 3)


def test_as_many_as_asked_for_are_under_way_and_no_more(engine_of):
    busiest = 0

    def script(request):
        nonlocal busiest
        busiest = max(busiest, engine.generator.running)
        return echo(request)

    engine = engine_of(script, token_s=0.002)
    taken = Taken()
    summary = answer(engine, questions_of(*(f"Where do {animal} live?" for animal in ANIMALS)), taken, concurrency=3)
    assert sorted(line["id"] for line in taken.lines) == sorted(str(n) for n in range(1, 11))
    assert (summary.asked, summary.failed, taken.advanced) == (10, 0, 10)
    assert busiest == 3


def test_lines_come_as_they_are_done_or_in_order(engine_of):
    questions = questions_of("slow one", "quick", "quick")
    for ordered, expected in ((False, ["2", "3", "1"]), (True, ["1", "2", "3"])):
        taken = Taken()
        answer(engine_of(echo, token_s=0.002, max_tokens=30), questions, taken, ordered=ordered)
        assert [line["id"] for line in taken.lines] == expected


def test_one_that_fails_and_one_that_is_no_question_do_not_disturb_the_rest(engine_of):
    def script(request):
        if "broken" in request.messages[-1].content:
            raise ModelError("the model broke")
        return echo(request)

    taken = Taken(record=True)
    questions = [*questions_of("fine", "broken", "fine"), Question("4", "", problem="q.txt:4 is not JSON.")]
    summary = answer(engine_of(script), questions, taken, answered={("3", "fine")}, ordered=True)
    assert [(line["id"], "error" in line) for line in taken.lines] == [("1", False), ("2", True), ("4", True)]
    assert (summary.asked, summary.failed, summary.skipped) == (3, 2, 1)
    assert sorted(told.split(":")[0] for told in taken.told) == ["question 2", "question 4"]
    assert [line["id"] for line in taken.traces] == ["1"]


def test_an_output_that_cannot_be_written_ends_the_run(engine_of):
    engine = engine_of(echo, token_s=0.001)
    taken = Taken()

    def full(line):
        raise ResourceError("The disk is full.")

    with fails(ResourceError, "disk is full"):
        answer_in_order(
            engine, PipelineName.HYDE, questions_of(*["why"] * 8), Outputs(full, None, taken.tell, taken.advance)
        )
    assert engine.generator.running == 0


def test_a_bug_costs_the_question_that_meets_it(engine_of):
    def script(request):
        if "broken" in request.messages[-1].content:
            raise KeyError("nobody expected it")
        return echo(request)

    taken = Taken()
    summary = answer(engine_of(script), questions_of("fine", "broken", "fine"), taken, ordered=True)
    assert (summary.asked, summary.failed) == (3, 1)
    assert [line.get("error", {}).get("code") for line in taken.lines] == [None, "internal", None]
    assert "KeyError" in taken.lines[1]["error"]["message"]


def test_a_batch_line_is_answered_as_the_server_would(engine_of):
    asked = []

    def script(request):
        asked.append(request)
        return "an answer X and more"

    body = {
        "model": "telerag-hyde",
        "max_tokens": 7,
        "temperature": 0.9,
        "seed": 3,
        "stop": ["X"],
        "messages": [
            {"role": "system", "content": "Say ZEBRA."},
            {"role": "user", "content": "My cat is Tom."},
            {"role": "assistant", "content": "Nice."},
            {"role": "user", "content": [{"type": "text", "text": "Where do owls live?"}]},
        ],
    }
    lines = [{"custom_id": "a", "body": body}, {"custom_id": "b", "body": {**body, "temperature": 9}}]
    source = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    taken = Taken()
    engine = engine_of(script)
    questions = list(read_questions(source, "q", partial(read_batch_body, engine.config)))
    assert "temperature" in questions[1].problem
    answer(engine, questions, taken, name=PipelineName.NAIVE, ordered=True)
    completion = taken.lines[0]["response"]["body"]
    assert completion["model"] == "telerag-hyde"  # the pipeline that ran, not the run's
    assert completion["choices"][0]["message"]["content"] == "an answer"
    assert taken.lines[1]["error"]["code"] == "input"
    last = asked[-1]
    assert (last.max_tokens, last.temperature, last.seed, last.stop) == (7, 0.9, 3, ("X",))
    assert any("ZEBRA" in message.content for message in last.messages)
    assert [stage["name"] for stage in completion["telerag"]["stages"]] == ["rewrite", "passage", "answer"]


def test_questions_are_read_as_they_are_needed_and_their_trouble_is_told(engine_of):
    read = []

    def source():
        for n in range(100):
            read.append(n)
            yield Question(str(n), "why")
            if n == 5:
                raise ArtifactError("The questions end in the middle.")

    with fails(ArtifactError, "end in the middle"):
        answer(engine_of(echo), source(), Taken(), concurrency=2)
    assert read == [0, 1, 2, 3, 4, 5]


class Watched(WordHashes):
    """Notes what is embedded exactly, and what roughly."""

    def __init__(self):
        self.exact, self.rough = [], []

    def encode_queries(self, texts):
        self.exact.extend(texts)
        return super().encode_queries(texts)

    def embed_approx(self, texts):
        self.rough.extend(texts)
        return super().encode_queries(texts)


MIXED = [f"{animal} {animal} {animal} {how}?" for how in ("live", "eat") for animal in ("bees", "cows", "eels")]


def test_similar_questions_run_together_and_every_question_once(engine_of):
    embedder = Watched()
    engine = engine_of(echo)
    engine.embedder = embedder
    batches = []
    usual = engine.aask

    def ask(question, *, batch, **how):
        batches.append(batch)
        return usual(question, batch=batch, **how)

    engine.aask = ask
    taken = Taken()
    schedule = Schedule(ScheduleName.SIMILAR, micro_batch=2)
    summary = answer_with(engine, PipelineName.HYDE, questions_of(*MIXED), taken.outputs, schedule, concurrency=2)
    assert sorted(line["question"] for line in taken.lines) == sorted(MIXED)
    assert (summary.asked, summary.failed) == (6, 0)
    groups = {tuple(sorted(batch.questions)) for batch in batches}
    assert groups == {tuple(sorted((MIXED[n], MIXED[n + 3]))) for n in range(3)}
    # The scheduler's embeddings serve lookahead too.
    assert sorted(embedder.exact) == sorted(MIXED)
    assert not set(MIXED) & set(embedder.rough)


def test_a_micro_batch_is_one_round_and_its_first_moves_are_planned_together(engine_of):
    engine = engine_of(echo, Lookahead.QUESTION, token_s=0.005)
    retriever, tier = engine.retriever, engine.retriever.tier
    rounds, started = [], []
    usual_round, usual_start = tier.new_round, retriever.prefetch_batch

    def new_round(fraction):
        rounds.append(fraction)
        return usual_round(fraction)

    def prefetch_batch(searches, nprobe, *, refining):
        started.append(len(searches))
        return usual_start(searches, nprobe, refining=refining)

    tier.new_round, retriever.prefetch_batch = new_round, prefetch_batch
    answer_with(
        engine,
        PipelineName.HYDE,
        questions_of(*MIXED[:4]),
        Taken().outputs,
        Schedule(ScheduleName.ARRIVAL, micro_batch=4),
        concurrency=4,
    )
    assert started == [4]
    assert len(rounds) == 1


def test_lookahead_that_a_member_never_asks_for_ends_with_its_batch(engine_of):
    engine = engine_of(echo, Lookahead.QUESTION)

    async def other_question(rag, question):
        if "owls" in question:
            raise ModelError("not today")
        async with rag.lookahead(question):
            found = await rag.retrieve([question])
        async with rag.lookahead("something else"):
            pass
        async with rag.lookahead(question):  # a second time
            pass
        return await rag.answer(question, found)

    worker = Local(engine, 3, Pipeline("other_question", other_question))
    batch = MicroBatch(("Where do cats live?", "Where do owls live?", "Where do cats live?"))

    async def all_members():
        return await asyncio.gather(*(worker.answer(batch, place) for place in range(3)), return_exceptions=True)

    results = asyncio.run(all_members())
    assert [isinstance(result, ModelError) for result in results] == [False, True, False]
    assert results[0].answer == results[2].answer
    deadline_s = time.monotonic() + 5
    while engine.retriever.prefetches and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert engine.retriever.prefetches == 0


def test_questions_that_come_soon_after_each_other_are_compared_and_others_not_waited_for(engine_of):
    engine = engine_of(echo)
    gate = threading.Event()
    taken = Taken()

    class Counted(WordHashes):
        batches = []

        def encode_queries(self, texts):
            if "number" not in texts[0]:  # else they are a retrieval's queries
                self.batches.append(len(texts))
            return super().encode_queries(texts)

    def source():
        yield from questions_of("one", "two")
        assert gate.wait(5), "the first answers waited for the third question"
        yield from questions_of("three", "four", "five", "six", "seven")

    def write(line):
        taken.lines.append(line)
        gate.set()

    engine.embedder = Counted()
    schedule = Schedule(ScheduleName.SIMILAR, batch_size=3, max_wait_s=0.05)
    outputs = Outputs(write, None, taken.tell, taken.advance)
    answer_with(engine, PipelineName.HYDE, source(), outputs, schedule, concurrency=2)
    assert Counted.batches == [2, 3, 2]
    assert len(taken.lines) == 7


@pytest.mark.parametrize(
    ("given", "at_once", "arena", "size"),
    [(None, 16, 1 << 30, 4), (None, 4, 1 << 30, 2), (None, 1, 1 << 30, 1), (None, 16, 2 << 20, 2), (8, 8, 1, 8)],
)
def test_the_size_of_a_micro_batch_is_bounded_by_llm_and_arena(given, at_once, arena, size):
    index = SimpleNamespace(list_bytes=np.full(8, 1 << 18))
    schedule = scheduled(ScheduleConfig(micro_batch=given, batch_size=1), at_once, arena, index, 4)
    assert (schedule.micro_batch, schedule.batch_size) == (size, size)
    with fails(UsageError, "--micro-batch", at_once + 1, at_once):
        scheduled(ScheduleConfig(micro_batch=at_once + 1), at_once, arena, index, 4)


def test_a_damaged_list_fails_those_who_need_it_and_nobody_else(engine_of):
    links = []

    def link(path, memory):
        links.append(ChosenLink(path, memory))
        return links[0]

    engine = engine_of(echo, link=link)
    texts = [f"{animal} number 3 live in place 8" for animal in ANIMALS]
    probes = [set(each.tolist()) for each in engine.retriever.nearest(WordHashes().encode_queries(texts), 4)]
    broken = next(number for number in probes[0] if any(number not in others for others in probes[1:]))
    links[0].broken.add(broken)

    async def find(text):
        try:
            return (await engine.shared.retrievals.find([text], [])).found
        except ArtifactError as error:
            return str(error)

    async def find_all():
        return await asyncio.gather(*map(find, texts))

    for needed, result in zip(probes, asyncio.run(find_all()), strict=True):
        assert isinstance(result, str) == (broken in needed)
    links[0].broken.clear()


def test_prefetches_share_the_link_and_take_turns():
    tier = StubTier(8, depth=2)
    prefetcher = Prefetcher(tier)
    (first,) = prefetcher.start([np.arange(8)], 8, 8, np.zeros(8, np.bool_))
    (second,) = prefetcher.start([np.arange(8)[::-1]], 8, 8, np.zeros(8, np.bool_))
    assert [number for number, _ in tier.started] == [0, 1]
    tier.finish(0)
    tier.finish(1)
    assert len(tier.started) == 4  # two under way, whoever they are for
    assert {number for number, _ in tier.started[2:]} == {2, 7}
    first.end()
    tier.finish(2)
    tier.finish(3)
    assert [number for number, _ in tier.started[4:]] == [6, 5]
    assert prefetcher.count == 1
    second.end()
    second.end()
    assert prefetcher.count == 0


def test_what_one_prefetch_moves_another_does_not_evict():
    tier = StubTier(6, depth=1)
    stays = []
    usual = tier.prefetch

    def prefetch(lists, protected, priority, arrived):
        stays.extend((list_no, set(np.flatnonzero(protected(list_no)).tolist())) for list_no in lists)
        return usual(lists, protected, priority, arrived)

    tier.prefetch = prefetch
    prefetcher = Prefetcher(tier)
    first, _second = prefetcher.start([np.arange(6), np.arange(6)[::-1]], 2, 2, np.zeros(6, np.bool_))
    tier.finish(0)
    assert stays == [(0, {4, 5}), (5, {0, 1})]
    first.end()
    tier.finish(1)
    assert stays[-1] == (4, {5})


def test_lanes_are_not_shared_while_they_are_in_use():
    tracer = Tracer()
    with tracer.lane("LLM") as first, tracer.lane("LLM") as second:
        assert (first, second) == ("LLM", "LLM 2")
    with tracer.lane("LLM") as again:
        assert again == "LLM"
