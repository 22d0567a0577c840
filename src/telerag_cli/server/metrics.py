"""What a Prometheus server reads at ``/metrics``, and the rates that the page shows.

Names are vLLM's where the thing is the same, with ``telerag_`` before them. Each `Metrics` has its own registry:
several servers may run in one process.
"""

from __future__ import annotations

import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, Literal, NamedTuple, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from telerag_cli.engine.engine import AskResult
from telerag_cli.engine.snapshot import Snapshot
from telerag_cli.pipelines.base import is_answer
from telerag_cli.retrieval.report import JoinReport

Rejection = Literal["queue", "size", "key", "host", "not_ready"]
"""Why a request was refused before any work: the queue is full, it is too large, has no key, names another host, or the
model is not loaded."""
Ending = Literal["cancelled", "timeout", "failed"]
"""Why a request that had begun has no answer."""

HIT_WINDOW_S = 600.0
"""Seconds over which the ratio of hits is taken."""
MAX_KEPT = 10_000
"""Requests and retrievals that are kept for rates; beyond it the window is shorter."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""HTTP methods that are counted by name; clients may send any word, so others are counted as ``other``."""

_TOKEN_TIMES_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_JOINS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_TIMES_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_TIMES_S, "From a request's arrival to its answer's first text."),
    "inter_token_latency_seconds": (
        _TOKEN_TIMES_S,
        "Time per token of the answer after its first, once a request: its mean.",
    ),
    "e2e_request_latency_seconds": (_TIMES_S, "From a request's arrival to its end."),
    "request_queue_time_seconds": (
        _TIMES_S,
        "Waiting in the server's queue, and for the LLM, summed over a request's calls of it.",
    ),
    "request_prefill_time_seconds": (_TIMES_S, "Reading prompts, summed over a request's LLM calls."),
    "request_decode_time_seconds": (_TIMES_S, "Writing, summed over a request's LLM calls."),
    "request_prompt_tokens": (_TOKENS, "Tokens of prompts, summed over a request's LLM calls."),
    "request_generation_tokens": (_TOKENS, "Tokens written, summed over a request's LLM calls."),
}
"""Buckets and meaning of the histograms by ``model_name``, of requests answered."""

_MODEL_COUNTERS = {
    "prompt_tokens": "Tokens of prompts of requests answered.",
    "generation_tokens": "Tokens written for requests answered.",
    "prefix_cache_queries": "Tokens of prompts that were looked for among those computed before.",
    "prefix_cache_hits": "Tokens of prompts that had been computed before.",
}
"""Meaning of the counters by ``model_name``, of requests answered."""


ServerState = tuple[int, int, Snapshot]
"""Requests that are being answered, requests in the server's queue, and the engine's state."""


class _Done(NamedTuple):
    """A request answered, or a retrieval: what rates need of it."""

    at_s: float
    requests: int = 0
    tokens: int = 0
    link_bytes: int = 0
    lists_hit: int = 0
    lists_wanted: int = 0


class Metrics(Collector):
    """Counts what happens to requests, from any thread; collects the state of queue, LLM and arena when it is read."""

    def __init__(self, version: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing counted; the clock, in seconds, is for the windows of rates."""
        self._clock = clock
        self._state: Callable[[], ServerState | None] = lambda: None
        self._done: deque[_Done] = deque(maxlen=MAX_KEPT)
        self._lock = threading.Lock()
        self._registry = registry = CollectorRegistry()
        # When each series began is left out: it doubles the text, whose format has no place for it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        counter = partial(Counter, namespace="telerag", registry=registry)
        histogram = partial(Histogram, namespace="telerag", registry=registry)
        Info("telerag_build", "The program that is running.", registry=registry).info(
            {"version": version, "python_version": platform.python_version()}
        )
        ProcessCollector(registry=registry)
        self._histograms = {
            name: histogram(name, what, ["model_name"], buckets=buckets)
            for name, (buckets, what) in _HISTOGRAMS.items()
        }
        self._model_counters = {name: counter(name, what, ["model_name"]) for name, what in _MODEL_COUNTERS.items()}
        self._success = counter("request_success", "Requests answered.", ["model_name", "finished_reason"])
        self._bytes_moved = counter("lookahead_bytes", "Bytes of lists that lookahead moved.")
        self._bytes_missed = counter(
            "missed_bytes", "Bytes of lists that a query needed and that were neither in fast memory nor on their way."
        )
        self._lists = counter(
            "lookahead_lists",
            "Lists by request: moved ahead and probed (hit), moved ahead and not probed (wasted), or neither in fast "
            "memory nor on their way when the query came (missed). What was there for other requests is none of these.",
            ["outcome"],
        )
        self._rejected = counter("requests_rejected", "Requests refused before any work.", ["reason"])
        self._ended = counter("requests_ended", "Requests that had begun and have no answer.", ["reason"])
        # Each series is there at 0 from the start, so that the first event is an increase.
        for labelled, values in (
            (self._lists, ("hit", "wasted", "missed")),
            (self._rejected, get_args(Rejection)),
            (self._ended, get_args(Ending)),
        ):
            for value in values:
                labelled.labels(value)
        self._join_s = histogram(
            "join_seconds", "From a query's arrival at the index to its results.", buckets=_JOINS_S
        )
        self._http = counter(
            "http_requests",
            "HTTP requests by their route's template; status 499 where the client left first.",
            ["route", "method", "status"],
        )
        registry.register(self)

    def watch(self, state: Callable[[], ServerState | None]) -> None:
        """Ask this for the server's state whenever somebody reads the metrics; None while there is no engine."""
        self._state = state

    def answered(
        self, model: str, answered: AskResult, *, waited_s: float, first_token_s: float | None, took_s: float
    ) -> None:
        """Count a request that has its answer, and its retrievals; times are from its arrival."""

        def total(name: str) -> Any:
            return sum(getattr(stage.generation, name) for stage in answered.stages)

        prompt_tokens, written_tokens = total("prompt_tokens"), total("completion_tokens")
        observed = {
            "time_to_first_token_seconds": first_token_s,
            "inter_token_latency_seconds": _token_s(answered),
            "e2e_request_latency_seconds": took_s,
            "request_queue_time_seconds": waited_s + total("queue_s"),
            "request_prefill_time_seconds": total("prefill_s"),
            "request_decode_time_seconds": total("decode_s"),
            "request_prompt_tokens": prompt_tokens,
            "request_generation_tokens": written_tokens,
        }
        for name, value in observed.items():
            if value is not None:
                self._histograms[name].labels(model).observe(value)
        counted = (prompt_tokens, written_tokens, prompt_tokens, total("cached_tokens"))
        for name, count in zip(_MODEL_COUNTERS, counted, strict=True):
            self._model_counters[name].labels(model).inc(count)
        self._success.labels(model, answered.finish_reason).inc()
        self._keep(requests=1, tokens=written_tokens)
        for join in answered.joins:
            self.joined(join)

    def joined(self, join: JoinReport) -> None:
        """Count a retrieval; those of `answered` are counted there."""
        self._bytes_moved.inc(join.bytes_moved)
        self._bytes_missed.inc(join.bytes_missed)
        hit = join.lists_moved - join.lists_wasted
        for outcome, lists in (("hit", hit), ("wasted", join.lists_wasted), ("missed", join.lists_missed)):
            self._lists.labels(outcome).inc(lists)
        self._join_s.observe(join.join_s)
        link_bytes = join.bytes_moved + join.bytes_missed
        self._keep(link_bytes=link_bytes, lists_hit=join.lists_hit, lists_wanted=join.lists_wanted)

    def rejected(self, reason: Rejection) -> None:
        """Count a request that was refused before any work."""
        self._rejected.labels(reason).inc()

    def ended(self, reason: Ending) -> None:
        """Count a request that had begun and has no answer."""
        self._ended.labels(reason).inc()

    def http(self, route: str, method: str, status: int) -> None:
        """Count an HTTP request by its route's template, never by what the client wrote: each is a series for ever."""
        self._http.labels(route, method if method in METHODS else "other", str(status)).inc()

    def rates(self, window_s: float = 10.0) -> dict[str, float | None]:
        """Return what was finished per second within the window, and the ratio of hits, None without a retrieval.

        Tokens are those written in all stages of the requests answered; bytes those of lists that lookahead moved or
        that were missed at the join, even if they were scored in place. Unfinished work counts when it ends.
        """
        done = self._since(window_s)
        names = ("requests", "tokens", "link_bytes")
        rates = {f"{name}_per_s": sum(getattr(each, name) for each in done) / window_s for name in names}
        return {**rates, "hit_ratio": _hit_ratio(done)}

    def exposition(self) -> tuple[bytes, str]:
        """Return all metrics now, in Prometheus' text form, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering asks nobody for a state."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield what is known only at the moment of reading."""
        ratio = _hit_ratio(self._since(HIT_WINDOW_S))
        yield _gauge(
            "lookahead_hit_ratio",
            "Lists that were in fast memory when their query came, by lookahead or from before, per list probed: over "
            f"the retrievals of the last {HIT_WINDOW_S:g} s, as far as they are among the last {MAX_KEPT:,} of them "
            "and of requests.",
            ratio if ratio is not None else {},
        )
        state = self._state()
        if state is None:
            return
        running, waiting, now = state
        yield _gauge("num_requests_running", "Requests that are being answered.", running)
        yield _gauge("num_requests_waiting", "Requests in the server's queue.", waiting)
        yield _gauge("lookahead_rounds", "Lookahead rounds that have not ended.", now.rounds)
        yield _gauge("arena_references", "Uses of lists in fast memory that have not ended.", now.references)
        yield _gauge(
            "arena_bytes",
            "Fast memory for lists: all of it, what lists in it hold, and what lists on their way will hold.",
            {"capacity": now.arena_bytes, "resident": now.resident_bytes, "moving": now.moving_bytes},
        )
        yield _gauge(
            "arena_lists",
            "Lists in fast memory, and on their way to it.",
            {"resident": now.lists_resident, "moving": now.lists_moving},
        )
        yield _gauge("llm_slots", "Places for LLM calls.", {"busy": now.running, "free": now.slots - now.running})
        yield _gauge("llm_calls_waiting", "LLM calls that wait for a place.", now.waiting)
        about = (
            "Tokens since the LLM was loaded, for requests without an answer too: of prompts computed (evaluated) or "
            "computed before (reused), and of texts (written)."
        )
        tokens = CounterMetricFamily("telerag_llm_tokens", about, labels=["kind"])
        kinds = {"evaluated": now.computed_tokens, "reused": now.cached_tokens, "written": now.written_tokens}
        for kind, count in kinds.items():
            tokens.add_metric([kind], count)
        yield tokens

    def _keep(self, **counts: int) -> None:
        with self._lock:  # around the clock too, so that they are in order
            self._done.append(_Done(self._clock(), **counts))

    def _since(self, window_s: float) -> list[_Done]:
        """What was kept within the last seconds, latest first."""
        after_s = self._clock() - window_s
        with self._lock:
            kept = list(self._done)
        return list(takewhile(lambda done: done.at_s > after_s, reversed(kept)))


def _gauge(name: str, what: str, value: float | Mapping[str, float]) -> Metric:
    """A gauge, or several by ``state``."""
    if not isinstance(value, Mapping):
        return GaugeMetricFamily(f"telerag_{name}", what, value)
    family = GaugeMetricFamily(f"telerag_{name}", what, labels=["state"])
    for state, each in value.items():
        family.add_metric([state], each)
    return family


def _hit_ratio(done: Sequence[_Done]) -> float | None:
    wanted = sum(each.lists_wanted for each in done)
    return sum(each.lists_hit for each in done) / wanted if wanted else None


def _token_s(answered: AskResult) -> float | None:
    """Seconds per token after the first, of the (last) LLM call that wrote the answer; None without a second token."""
    stages = answered.stages
    wrote = [stage for stage in stages if stage.generation.text == answered.answer]
    last = [None, *(wrote or [stage for stage in stages if is_answer(stage.name)] or stages)][-1]
    if last is None or last.generation.completion_tokens < 2:
        return None
    return last.generation.decode_s / (last.generation.completion_tokens - 1)
