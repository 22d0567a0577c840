"""What the server counts, read back from the text that Prometheus would read."""

import asyncio
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from animals import World
from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.engine.engine import Answered
from telerag_cli.engine.session import Stage
from telerag_cli.engine.snapshot import Snapshot, snapshot
from telerag_cli.llm.base import Generation, Request
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.server.metrics import HIT_WINDOW_S, MAX_KEPT, Metrics, State

MODEL = "telerag-hyde"
VLLM = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
)
SNAPSHOT = Snapshot(
    slots=4,
    running=3,
    waiting=2,
    computed_tokens=100,
    cached_tokens=50,
    written_tokens=25,
    arena_bytes=1000,
    resident_bytes=600,
    moving_bytes=200,
    lists_resident=6,
    lists_moving=2,
    references=5,
    rounds=1,
)


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


def read(metrics):
    """Each sample: (name, sorted labels) to its value."""
    text, content_type = metrics.exposition()
    assert content_type.startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return samples


def value(metrics, name, **labels):
    return read(metrics)[(f"telerag_{name}", *sorted(labels.items()))]


def join(**counts):
    names = dict.fromkeys(JoinReport.count_names(), 0)
    return JoinReport(**(names | counts), coarse_s=0.001, score_s=0.002, join_s=0.02)


def stage(name, text, **numbers):
    known = {"prompt_tokens": 10, "completion_tokens": 5, "prefill_s": 0.1, "decode_s": 0.4} | numbers
    generation = Generation(text, "stop", **known)
    return Stage(name=name, request=Request([], 10), generation=generation, began_s=0.0, took_s=0.5, expected=None)


class Retrieved:
    def __init__(self, report):
        self.join = report


def answer(stages, joins=(), text="It is so."):
    return Answered(
        "Is it so?",
        "hyde",
        Lookahead.REFINED,
        text,
        [],
        [],
        list(stages),
        [Retrieved(report) for report in joins],
        [],
        0,
        {},
    )


def count(metrics, answered, **how):
    known = {"waited_s": 0.25, "first_token_s": 0.5, "took_s": 2.0, "finish_reason": "stop"} | how
    metrics.answered(MODEL, answered, **known)


def test_an_answer_is_counted_under_vllms_names():
    metrics = Metrics("1.2.3")
    stages = [
        stage(
            "passage",
            "A passage.",
            queue_s=0.5,
            prompt_tokens=100,
            cached_tokens=60,
            completion_tokens=20,
            decode_s=9.0,
        ),
        stage(
            "answer", "It is so.", queue_s=0.25, prompt_tokens=300, cached_tokens=40, completion_tokens=11, decode_s=1.0
        ),
        stage("check", "yes", prompt_tokens=50, completion_tokens=1, decode_s=0.0),
    ]
    count(metrics, answer(stages))
    sums = {name: value(metrics, f"{name}_sum", model_name=MODEL) for name in VLLM}
    assert sums == pytest.approx(
        {
            "time_to_first_token_seconds": 0.5,
            "inter_token_latency_seconds": 0.1,  # ten tokens after the first of the call that wrote the answer
            "e2e_request_latency_seconds": 2.0,
            "request_queue_time_seconds": 1.0,
            "request_prefill_time_seconds": 0.3,
            "request_decode_time_seconds": 10.0,
            "request_prompt_tokens": 450,
            "request_generation_tokens": 32,
        }
    )
    assert {value(metrics, f"{name}_count", model_name=MODEL) for name in VLLM} == {1}
    assert value(metrics, "prompt_tokens_total", model_name=MODEL) == 450
    assert value(metrics, "generation_tokens_total", model_name=MODEL) == 32
    assert value(metrics, "prefix_cache_queries_total", model_name=MODEL) == 450
    assert value(metrics, "prefix_cache_hits_total", model_name=MODEL) == 100
    assert value(metrics, "request_success_total", model_name=MODEL, finished_reason="stop") == 1
    assert value(metrics, "build_info", version="1.2.3", **_python(metrics)) == 1
    assert ("process_resident_memory_bytes",) in read(metrics)


def _python(metrics):
    (key,) = (key for key in read(metrics) if key[0] == "telerag_build_info")
    return {"python_version": dict(key[1:])["python_version"]}


def test_what_an_answer_does_not_have_is_not_observed():
    metrics = Metrics("0")
    count(metrics, answer([stage("answer", "", completion_tokens=1)]), first_token_s=None)
    count(metrics, answer([]))
    samples = read(metrics)
    model = ("model_name", MODEL)
    assert samples["telerag_time_to_first_token_seconds_count", model] == 1
    assert ("telerag_inter_token_latency_seconds_count", model) not in samples
    assert samples["telerag_e2e_request_latency_seconds_count", model] == 2


def test_an_answer_put_together_is_timed_by_its_last_call():
    metrics = Metrics("0")
    stages = [stage("a", "One.", decode_s=4.0), stage("b", "Two.", decode_s=0.4)]
    count(metrics, answer(stages, text="One. Two."))
    assert value(metrics, "inter_token_latency_seconds_sum", model_name=MODEL) == pytest.approx(0.1)
    stages = [stage("answer_2", "It is so. And", decode_s=0.8), stage("check_2", "yes", decode_s=4.0)]
    count(metrics, answer(stages, text="It is so."))  # cut by the request's own stop
    assert value(metrics, "inter_token_latency_seconds_sum", model_name=MODEL) == pytest.approx(0.3)


def test_of_several_answers_the_one_that_was_kept_is_timed():
    metrics = Metrics("0")
    count(metrics, answer([stage("answer_1", "It is so.", decode_s=0.4), stage("answer_2", "No.", decode_s=8.0)]))
    assert value(metrics, "inter_token_latency_seconds_sum", model_name=MODEL) == pytest.approx(0.1)


def test_lookahead_is_counted_by_what_came_of_it():
    metrics = Metrics("0")
    report = join(
        lists_wanted=20,
        lists_hit=12,
        lists_coming=3,
        lists_missed=5,
        lists_moved=10,
        lists_wasted=4,
        bytes_moved=1000,
        bytes_missed=500,
    )
    count(metrics, answer([stage("answer", "It is so.")], [report, report]))
    metrics.joined(join(lists_wanted=10, lists_hit=0, lists_missed=10))
    assert {
        outcome: value(metrics, "lookahead_lists_total", outcome=outcome) for outcome in ("hit", "wasted", "missed")
    } == {"hit": 12, "wasted": 8, "missed": 20}
    assert value(metrics, "lookahead_bytes_total") == 2000
    assert value(metrics, "missed_bytes_total") == 1000
    assert value(metrics, "join_seconds_count") == 3
    assert value(metrics, "join_seconds_sum") == pytest.approx(0.06)
    assert value(metrics, "lookahead_hit_ratio") == pytest.approx(24 / 50)


def test_reasons_are_there_before_they_happen():
    metrics = Metrics("0")
    for reason in ("queue", "size", "key", "host", "not_ready"):
        assert value(metrics, "requests_rejected_total", reason=reason) == 0
        metrics.rejected(reason)
        assert value(metrics, "requests_rejected_total", reason=reason) == 1
    for reason in ("cancelled", "timeout", "failed"):
        assert value(metrics, "requests_ended_total", reason=reason) == 0
        metrics.ended(reason)
        assert value(metrics, "requests_ended_total", reason=reason) == 1


def test_http_requests_have_few_methods():
    metrics = Metrics("0")
    metrics.http("/v1/models/{id}", "GET", 200)
    for number in range(5):
        metrics.http("/v1/models/{id}", f"WORD{number}", 405)
    assert value(metrics, "http_requests_total", route="/v1/models/{id}", method="GET", status="200") == 1
    assert value(metrics, "http_requests_total", route="/v1/models/{id}", method="other", status="405") == 5


def test_the_state_is_read_when_somebody_asks():
    metrics = Metrics("0")
    states = [None]
    metrics.watch(lambda: states[-1])
    loading = read(metrics)
    assert not [key for key in loading if key[0].startswith(("telerag_num_", "telerag_arena", "telerag_llm"))]
    states.append(State(2, 7, SNAPSHOT))
    assert value(metrics, "num_requests_running") == 2
    assert value(metrics, "num_requests_waiting") == 7
    assert [value(metrics, "arena_bytes", state=state) for state in ("capacity", "resident", "moving")] == [
        1000,
        600,
        200,
    ]
    assert [value(metrics, "arena_lists", state=state) for state in ("resident", "moving")] == [6, 2]
    assert value(metrics, "arena_references") == 5
    assert value(metrics, "lookahead_rounds") == 1
    assert [value(metrics, "llm_slots", state=state) for state in ("busy", "free")] == [3, 1]
    assert value(metrics, "llm_calls_waiting") == 2
    assert [value(metrics, "llm_tokens_total", kind=kind) for kind in ("evaluated", "reused", "written")] == [
        100,
        50,
        25,
    ]
    states.append(State(0, 0, replace(SNAPSHOT, references=0)))
    assert value(metrics, "arena_references") == 0


def test_names_begin_alike_and_no_series_tells_when_it_began():
    metrics = Metrics("0")
    metrics.watch(lambda: State(0, 0, SNAPSHOT))
    count(metrics, answer([stage("answer", "It is so.")], [join(lists_wanted=1, lists_hit=1)]))
    names = {key[0] for key in read(metrics)}
    assert {name for name in names if not name.startswith(("telerag_", "process_"))} == set()
    assert {name for name in names if name.endswith("_created")} == set()
    text = metrics.exposition()[0].decode()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            assert f"# HELP {line.split()[2]} " in text


def test_two_servers_in_one_process_count_apart():
    one, other = Metrics("0"), Metrics("0")
    one.ended("failed")
    assert value(other, "requests_ended_total", reason="failed") == 0


def test_rates_are_of_a_window():
    clock = Clock()
    metrics = Metrics("0", clock=clock)
    assert metrics.rates(10.0).hit_ratio is None
    report = join(lists_wanted=10, lists_hit=4, bytes_moved=700, bytes_missed=300)
    count(metrics, answer([stage("a", "x", completion_tokens=30)], [report]))
    clock.now_s += 6.0
    count(metrics, answer([stage("a", "x", completion_tokens=70)], [replace(report, lists_hit=8)]))
    rates = metrics.rates(10.0)
    assert (rates.requests_per_s, rates.tokens_per_s, rates.link_bytes_per_s) == (0.2, 10.0, 200.0)
    assert rates.hit_ratio == pytest.approx(0.6)
    clock.now_s += 6.0
    rates = metrics.rates(10.0)
    assert (rates.requests_per_s, rates.tokens_per_s, rates.hit_ratio) == (0.1, 7.0, 0.8)
    clock.now_s += HIT_WINDOW_S
    assert metrics.rates(10.0).requests_per_s == 0
    assert ("telerag_lookahead_hit_ratio",) not in read(metrics)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 100)), max_size=50))
def test_rates_count_what_is_in_the_window_and_nothing_else(steps):
    clock = Clock()
    metrics = Metrics("0", clock=clock)
    ended = []
    for after_s, tokens in steps:
        clock.now_s += after_s
        count(metrics, answer([stage("a", "x", completion_tokens=tokens)]))
        ended.append((clock.now_s, tokens))
    inside = [tokens for at_s, tokens in ended if at_s > clock.now_s - 10.0]
    rates = metrics.rates(10.0)
    assert rates.requests_per_s == len(inside) / 10
    assert rates.tokens_per_s == sum(inside) / 10


def test_memory_for_rates_is_bounded():
    metrics = Metrics("0", clock=Clock())
    report = join(lists_wanted=1)
    for _ in range(MAX_KEPT + 100):
        metrics.joined(report)
    assert len(metrics._done) == MAX_KEPT


def test_threads_count_while_somebody_reads():
    metrics = Metrics("0")
    metrics.watch(lambda: State(1, 0, SNAPSHOT))
    answered = answer([stage("a", "x")], [join(lists_wanted=2, lists_hit=1)])
    threads = [threading.Thread(target=lambda: [count(metrics, answered) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.exposition()
        metrics.rates()
    for thread in threads:
        thread.join()
    assert value(metrics, "request_success_total", model_name=MODEL, finished_reason="stop") == 200
    assert value(metrics, "lookahead_hit_ratio") == 0.5


def test_a_real_answer_agrees_with_its_own_report(tmp_path):
    world = World(tmp_path)
    engine = world.engine(lambda request: "Owls number 3 live in place 8.", token_s=0.001)
    metrics = Metrics("0")
    metrics.watch(lambda: State(0, 0, snapshot(engine)))
    try:
        answered = asyncio.run(engine.ask(make_pipeline(PipelineName.HYDE), "Where do owls live?"))
        count(metrics, answered)
        (report,) = answered.joins
        assert value(metrics, "lookahead_bytes_total") == report.bytes_moved > 0
        assert value(metrics, "lookahead_lists_total", outcome="missed") == report.lists_missed
        assert value(metrics, "arena_bytes", state="capacity") == engine.retriever.tier.arena_bytes
        assert value(metrics, "arena_bytes", state="resident") > 0
        assert value(metrics, "arena_references") == value(metrics, "lookahead_rounds") == 0
    finally:
        world.close()
