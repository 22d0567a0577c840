"""What the server counts, read back from the text that Prometheus would read."""

import asyncio
import platform
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.engine.engine import AskResult
from telerag_cli.engine.session import Stage
from telerag_cli.engine.snapshot import Snapshot, snapshot
from telerag_cli.llm.base import Generation, Request
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.retrieval.retriever import Retrieval
from telerag_cli.server.metrics import HIT_WINDOW_S, MAX_KEPT, Metrics

MODEL = "telerag-hyde"
REPORTED = {"version": "1.2.3", "python_version": platform.python_version()}
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


def read(metrics):
    """Each sample: (name, sorted labels) to its value."""
    text, content_type = metrics.exposition()
    assert content_type.startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name.removeprefix("telerag_"), *sorted(sample.labels.items()))
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return samples


def value(metrics, name, **labels):
    return read(metrics)[(name, *sorted(labels.items()))]


def by(metrics, name, label):
    """The values of a metric by its one label."""
    return {key[1][1]: value for key, value in read(metrics).items() if key[0] == name and key[1][0] == label}


def join(**counts):
    return JoinReport(**dict.fromkeys(JoinReport.count_names(), 0) | counts, coarse_s=0.001, score_s=0.002, join_s=0.02)


def stage(name, text, **numbers):
    known = {"prompt_tokens": 10, "completion_tokens": 5, "prefill_s": 0.1, "decode_s": 0.4} | numbers
    generation = Generation(text, "stop", **known)
    return Stage(name=name, request=Request([], 10), generation=generation, began_s=0.0, took_s=0.5, expected=None)


def answer(stages, joins=(), text="It is so."):
    retrievals = [Retrieval((), [], report, 0.0) for report in joins]
    return AskResult("Is it so?", "hyde", Lookahead.REFINED, text, [], [], list(stages), retrievals, [], 0, {})


def count(metrics, answered, **how):
    known = {"waited_s": 0.25, "first_token_s": 0.5, "took_s": 2.0} | how
    metrics.answered(MODEL, answered, **known)


def test_an_answer_is_counted_under_vllms_names():
    metrics = Metrics("1.2.3")
    first = {"queue_s": 0.5, "prompt_tokens": 100, "cached_tokens": 60, "completion_tokens": 20, "decode_s": 9.0}
    second = {"queue_s": 0.25, "prompt_tokens": 300, "cached_tokens": 40, "completion_tokens": 11, "decode_s": 1.0}
    third = {"prompt_tokens": 50, "completion_tokens": 1, "decode_s": 0.0}
    stages = [stage("passage", "A passage.", **first), stage("answer", "It is so.", **second)]
    count(metrics, answer([*stages, stage("check", "yes", **third)]))
    sums = {
        "time_to_first_token_seconds": 0.5,
        "inter_token_latency_seconds": 0.1,  # ten tokens after the first of the call that wrote the answer
        "e2e_request_latency_seconds": 2.0,
        "request_queue_time_seconds": 1.0,
        "request_prefill_time_seconds": 0.3,
        "request_decode_time_seconds": 10.0,
        "request_prompt_tokens": 450,
        "request_generation_tokens": 32,
    }
    assert {name: value(metrics, f"{name}_sum", model_name=MODEL) for name in sums} == pytest.approx(sums)
    assert {value(metrics, f"{name}_count", model_name=MODEL) for name in sums} == {1}
    counters = ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits")
    assert [value(metrics, f"{name}_total", model_name=MODEL) for name in counters] == [450, 32, 450, 100]
    assert value(metrics, "request_success_total", model_name=MODEL, finished_reason="stop") == 1
    assert value(metrics, "build_info", **REPORTED) == 1
    assert ("process_resident_memory_bytes",) in read(metrics)


def test_what_an_answer_does_not_have_is_not_observed():
    metrics = Metrics("0")
    count(metrics, answer([stage("answer", "", completion_tokens=1)]), first_token_s=None)
    count(metrics, answer([]))
    samples = read(metrics)
    model = ("model_name", MODEL)
    assert samples["time_to_first_token_seconds_count", model] == 1
    assert ("inter_token_latency_seconds_count", model) not in samples
    assert samples["e2e_request_latency_seconds_count", model] == 2


@pytest.mark.parametrize(
    ("stages", "text", "token_s"),
    [
        # Put together from several calls: the last one stands for it.
        ([("a", "One.", 4.0), ("b", "Two.", 0.4)], "One. Two.", 0.1),
        # Cut by the request's own stop.
        ([("answer_2", "It is so. And", 0.8), ("check_2", "yes", 4.0)], "It is so.", 0.2),
        # Of several answers the one that was kept.
        ([("answer_1", "It is so.", 0.4), ("answer_2", "No.", 8.0)], "It is so.", 0.1),
    ],
)
def test_the_call_that_wrote_the_answer_is_timed(stages, text, token_s):
    metrics = Metrics("0")
    count(metrics, answer([stage(name, wrote, decode_s=decode_s) for name, wrote, decode_s in stages], text=text))
    assert value(metrics, "inter_token_latency_seconds_sum", model_name=MODEL) == pytest.approx(token_s)


def test_lookahead_is_counted_by_what_came_of_it():
    metrics = Metrics("0")
    lists = {"lists_wanted": 20, "lists_hit": 12, "lists_coming": 3, "lists_missed": 5}
    report = join(**lists, lists_moved=10, lists_wasted=4, bytes_moved=1000, bytes_missed=500)
    count(metrics, answer([stage("answer", "It is so.")], [report, report]))
    metrics.joined(join(lists_wanted=10, lists_hit=0, lists_missed=10))
    assert by(metrics, "lookahead_lists_total", "outcome") == {"hit": 12, "wasted": 8, "missed": 20}
    assert value(metrics, "lookahead_bytes_total") == 2000
    assert value(metrics, "missed_bytes_total") == 1000
    assert value(metrics, "join_seconds_count") == 3
    assert value(metrics, "join_seconds_sum") == pytest.approx(0.06)
    assert value(metrics, "lookahead_hit_ratio") == pytest.approx(24 / 50)


def test_reasons_are_there_before_they_happen():
    metrics = Metrics("0")
    for name, count_one, reasons in (
        ("requests_rejected_total", metrics.rejected, ("queue", "size", "key", "host", "not_ready")),
        ("requests_ended_total", metrics.ended, ("cancelled", "timeout", "failed")),
    ):
        assert by(metrics, name, "reason") == dict.fromkeys(reasons, 0)
        for reason in reasons:
            count_one(reason)
        assert by(metrics, name, "reason") == dict.fromkeys(reasons, 1)


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
    assert not [key for key in read(metrics) if key[0].startswith(("num_", "arena", "llm"))]
    states.append((2, 7, SNAPSHOT))
    expected = {"num_requests_running": 2, "num_requests_waiting": 7, "arena_references": 5, "lookahead_rounds": 1}
    assert {name: value(metrics, name) for name in expected} == expected
    assert by(metrics, "arena_bytes", "state") == {"capacity": 1000, "resident": 600, "moving": 200}
    assert by(metrics, "arena_lists", "state") == {"resident": 6, "moving": 2}
    assert by(metrics, "llm_slots", "state") == {"busy": 3, "free": 1}
    assert value(metrics, "llm_calls_waiting") == 2
    assert by(metrics, "llm_tokens_total", "kind") == {"evaluated": 100, "reused": 50, "written": 25}
    states.append((0, 0, replace(SNAPSHOT, references=0)))
    assert value(metrics, "arena_references") == 0


def test_names_begin_alike_and_no_series_tells_when_it_began():
    metrics = Metrics("0")
    metrics.watch(lambda: (0, 0, SNAPSHOT))
    count(metrics, answer([stage("answer", "It is so.")], [join(lists_wanted=1, lists_hit=1)]))
    text = metrics.exposition()[0].decode()
    typed = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert [name for name in typed if not name.startswith(("telerag_", "process_"))] == []
    assert [name for name in typed if name.endswith("_created")] == []
    assert [name for name in typed if f"# HELP {name} " not in text] == []


def test_rates_are_of_a_window():
    clock = SimpleNamespace(now_s=1000.0)
    metrics = Metrics("0", clock=lambda: clock.now_s)
    assert metrics.rates(10.0)["hit_ratio"] is None
    report = join(lists_wanted=10, lists_hit=4, bytes_moved=700, bytes_missed=300)
    count(metrics, answer([stage("a", "x", completion_tokens=30)], [report]))
    clock.now_s += 6.0
    count(metrics, answer([stage("a", "x", completion_tokens=70)], [replace(report, lists_hit=8)]))
    rates = metrics.rates(10.0)
    assert (rates["requests_per_s"], rates["tokens_per_s"], rates["link_bytes_per_s"]) == (0.2, 10.0, 200.0)
    assert rates["hit_ratio"] == pytest.approx(0.6)
    clock.now_s += 6.0
    rates = metrics.rates(10.0)
    assert (rates["requests_per_s"], rates["tokens_per_s"], rates["hit_ratio"]) == (0.1, 7.0, 0.8)
    clock.now_s += HIT_WINDOW_S
    assert metrics.rates(10.0)["requests_per_s"] == 0
    assert ("lookahead_hit_ratio",) not in read(metrics)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 100)), max_size=50))
def test_rates_count_what_is_in_the_window_and_nothing_else(steps):
    clock = SimpleNamespace(now_s=1000.0)
    metrics = Metrics("0", clock=lambda: clock.now_s)
    ended = []
    for after_s, tokens in steps:
        clock.now_s += after_s
        count(metrics, answer([stage("a", "x", completion_tokens=tokens)]))
        ended.append((clock.now_s, tokens))
    inside = [tokens for at_s, tokens in ended if at_s > clock.now_s - 10.0]
    rates = metrics.rates(10.0)
    assert rates["requests_per_s"] == len(inside) / 10
    assert rates["tokens_per_s"] == sum(inside) / 10


def test_memory_for_rates_is_bounded():
    metrics = Metrics("0", clock=lambda: 1000.0)
    metrics.joined(join(lists_wanted=1, lists_hit=1))
    for _ in range(MAX_KEPT):
        metrics.joined(join(lists_wanted=1))
    assert metrics.rates(10.0)["hit_ratio"] == 0


def test_threads_count_while_somebody_reads():
    metrics = Metrics("0")
    metrics.watch(lambda: (1, 0, SNAPSHOT))
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


def test_a_real_answer_agrees_with_its_own_report(engine_of):
    engine = engine_of(lambda request: "Owls number 3 live in place 8.", token_s=0.001)
    metrics = Metrics("0")
    metrics.watch(lambda: (0, 0, snapshot(engine)))
    answered = asyncio.run(engine.aask("Where do owls live?", pipeline=make_pipeline(PipelineName.HYDE)))
    count(metrics, answered)
    (report,) = answered.joins
    assert value(metrics, "lookahead_bytes_total") == report.bytes_moved > 0
    assert value(metrics, "lookahead_lists_total", outcome="missed") == report.lists_missed
    assert value(metrics, "arena_bytes", state="capacity") == engine.retriever.tier.arena_bytes
    assert value(metrics, "arena_bytes", state="resident") > 0
    assert value(metrics, "arena_references") == value(metrics, "lookahead_rounds") == 0
