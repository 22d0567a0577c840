"""What a Prometheus server reads at ``/metrics``, and the rates that the page shows.

Names are vLLM's where the thing is the same, with ``telerag_`` before them. Everything belongs to one `Metrics`;
nothing is global, so that several servers may run in one process.
"""

from __future__ import annotations

import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from telerag_cli.engine.engine import Answered
from telerag_cli.engine.snapshot import Snapshot
from telerag_cli.pipelines.base import is_answer
from telerag_cli.retrieval.retriever import JoinReport

Rejection = Literal["queue", "size", "key", "host", "not_ready"]
"""Why a request was refused before any work: the queue is full, it is too large, without the key, under another host's name,
or the model is not loaded."""
Ending = Literal["cancelled", "timeout", "failed"]
"""Why a request that had begun has no answer."""

HIT_WINDOW_S = 600.0
"""Over which the ratio of hits is taken."""
MAX_KEPT = 10_000
"""Requests and retrievals that are kept for rates; beyond it the window is shorter."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Others are counted as ``other``: clients may send any word."""

_TOKEN_TIMES_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_JOINS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_TIMES_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
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
"""Of requests answered, by ``model_name``: bounds and meaning."""

MODEL_COUNTERS = {
    "prompt_tokens": "Tokens of prompts of requests answered.",
    "generation_tokens": "Tokens written for requests answered.",
    "prefix_cache_queries": "Tokens of prompts that were looked for among those computed before.",
    "prefix_cache_hits": "Tokens of prompts that had been computed before.",
}
"""Of requests answered, by ``model_name``; their names end with ``_total``, like those of all counters."""

COUNTERS = {
    "lookahead_bytes": "Bytes of lists that lookahead moved.",
    "missed_bytes": "Bytes of lists that a query needed and that were neither in fast memory nor on their way.",
}

REASONS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "lookahead_lists": (
        "outcome",
        ("hit", "wasted", "missed"),
        "Lists by request: moved ahead and probed (hit), moved ahead and not probed (wasted), or neither in fast memory "
        "nor on their way when the query came (missed). What was there for other requests is none of these.",
    ),
    "requests_rejected": ("reason", get_args(Rejection), "Requests refused before any work."),
    "requests_ended": ("reason", get_args(Ending), "Requests that had begun and have no answer."),
}
"""Counters with a label, and all that the label may be; each is there at 0 from the start, so that the first is an increase."""


@dataclass(frozen=True)
class State:
    """The server at this moment."""

    running: int
    """Requests that are being answered."""
    waiting: int
    """Requests in the server's queue."""
    snapshot: Snapshot


@dataclass(frozen=True)
class Rates:
    """What was finished within the last ``window_s`` seconds, by the second; what is still under way counts when it ends."""

    window_s: float
    requests_per_s: float
    tokens_per_s: float
    """Written, in all stages of the requests answered."""
    link_bytes_per_s: float
    """Of lists that lookahead moved or that were missed at the join. Those scored where they lie are counted though not moved."""
    hit_ratio: float | None
    """As the metric of this name, over this window; None without a retrieval."""


@dataclass(frozen=True)
class _Done:
    """A request answered, or a retrieval: what `Rates` needs of it."""

    at_s: float
    requests: int = 0
    tokens: int = 0
    link_bytes: int = 0
    lists_hit: int = 0
    lists_wanted: int = 0


class Metrics:
    """Counts what happens to requests; from any thread."""

    def __init__(self, version: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing counted.

        Args:
            version: of the program.
            clock: seconds, for the windows of rates.
        """
        self._clock = clock
        self._state: Callable[[], State | None] = lambda: None
        self._done: deque[_Done] = deque(maxlen=MAX_KEPT)
        self._lock = threading.Lock()
        self._registry = registry = CollectorRegistry()
        Info("telerag_build", "The program that is running.", registry=registry).info(
            {"version": version, "python_version": platform.python_version()}
        )
        ProcessCollector(registry=registry)

        self._histograms = {
            name: Histogram(f"telerag_{name}", what, ["model_name"], registry=registry, buckets=buckets)
            for name, (buckets, what) in HISTOGRAMS.items()
        }
        self._of_models = {
            name: Counter(f"telerag_{name}", what, ["model_name"], registry=registry)
            for name, what in MODEL_COUNTERS.items()
        }
        self._counters = {name: Counter(f"telerag_{name}", what, registry=registry) for name, what in COUNTERS.items()}
        self._reasons: dict[str, Counter] = {}
        for name, (label, values, what) in REASONS.items():
            self._reasons[name] = Counter(f"telerag_{name}", what, [label], registry=registry)
            for value in values:
                self._reasons[name].labels(value)
        self._success = Counter(
            "telerag_request_success", "Requests answered.", ["model_name", "finished_reason"], registry=registry
        )
        self._join_s = Histogram(
            "telerag_join_seconds",
            "From a query's arrival at the index to its results.",
            registry=registry,
            buckets=_JOINS_S,
        )
        self._http = Counter(
            "telerag_http_requests",
            "HTTP requests by their route's template; status 499 where the client left first.",
            ["route", "method", "status"],
            registry=registry,
        )
        registry.register(_Now(self))

    def watch(self, state: Callable[[], State | None]) -> None:
        """Ask this for the server's state whenever somebody reads the metrics; it says None while there is no engine."""
        self._state = state

    def answered(
        self,
        model: str,
        answered: Answered,
        *,
        waited_s: float,
        first_token_s: float | None,
        took_s: float,
        finish_reason: str,
    ) -> None:
        """Count a request that has its answer, and its retrievals.

        Args:
            model: what the client asked for; it must be one of the server's.
            answered: the answer and how it came about.
            waited_s: in the server's queue.
            first_token_s: from its arrival to the answer's first text; None if it has none.
            took_s: from its arrival to its end.
            finish_reason: what the client was told.
        """
        generations = [stage.generation for stage in answered.stages]
        prompt_tokens = sum(each.prompt_tokens for each in generations)
        written_tokens = sum(each.completion_tokens for each in generations)
        observed = {
            "time_to_first_token_seconds": first_token_s,
            "inter_token_latency_seconds": _token_s(answered),
            "e2e_request_latency_seconds": took_s,
            "request_queue_time_seconds": waited_s + sum(each.queue_s for each in generations),
            "request_prefill_time_seconds": sum(each.prefill_s for each in generations),
            "request_decode_time_seconds": sum(each.decode_s for each in generations),
            "request_prompt_tokens": prompt_tokens,
            "request_generation_tokens": written_tokens,
        }
        for name, value in observed.items():
            if value is not None:
                self._histograms[name].labels(model).observe(value)
        counted = {
            "prompt_tokens": prompt_tokens,
            "generation_tokens": written_tokens,
            "prefix_cache_queries": prompt_tokens,
            "prefix_cache_hits": sum(each.cached_tokens for each in generations),
        }
        for name, count in counted.items():
            self._of_models[name].labels(model).inc(count)
        self._success.labels(model, finish_reason).inc()
        self._keep(requests=1, tokens=written_tokens)
        for join in answered.joins:
            self.joined(join)

    def joined(self, join: JoinReport) -> None:
        """Count a retrieval; those of `answered` are counted there."""
        self._counters["lookahead_bytes"].inc(join.bytes_moved)
        self._counters["missed_bytes"].inc(join.bytes_missed)
        for outcome, lists in (
            ("hit", join.lists_moved - join.lists_wasted),
            ("wasted", join.lists_wasted),
            ("missed", join.lists_missed),
        ):
            self._reasons["lookahead_lists"].labels(outcome).inc(lists)
        self._join_s.observe(join.join_s)
        self._keep(
            link_bytes=join.bytes_moved + join.bytes_missed, lists_hit=join.lists_hit, lists_wanted=join.lists_wanted
        )

    def rejected(self, reason: Rejection) -> None:
        """Count a request that was refused before any work."""
        self._reasons["requests_rejected"].labels(reason).inc()

    def ended(self, reason: Ending) -> None:
        """Count a request that had begun and has no answer."""
        self._reasons["requests_ended"].labels(reason).inc()

    def http(self, route: str, method: str, status: int) -> None:
        """Count an HTTP request. The route is its template, never what the client wrote: each one is a series for ever."""
        self._http.labels(route, method if method in METHODS else "other", str(status)).inc()

    def rates(self, window_s: float = 10.0) -> Rates:
        """What was finished lately."""
        done = list(self._since(window_s))
        return Rates(
            window_s,
            sum(each.requests for each in done) / window_s,
            sum(each.tokens for each in done) / window_s,
            sum(each.link_bytes for each in done) / window_s,
            _hit_ratio(done),
        )

    def exposition(self) -> tuple[bytes, str]:
        """All metrics now, in Prometheus' text form, and its content type."""
        return generate_latest(_Plain(self._registry)), CONTENT_TYPE_PLAIN_0_0_4

    def current(self) -> Iterator[Metric]:
        """What is read when somebody asks: the state of queue, LLM and arena, and the ratio of hits."""
        state = self._state()
        ratio = _hit_ratio(self._since(HIT_WINDOW_S))
        yield _gauge(
            "lookahead_hit_ratio",
            f"Lists that were in fast memory when their query came, by lookahead or from before, per list probed: over the "
            f"retrievals of the last {HIT_WINDOW_S:g} s, as far as they are among the last {MAX_KEPT:,} of them and of requests.",
            {} if ratio is None else {"": ratio},
        )
        if state is None:
            return
        now = state.snapshot
        yield _gauge("num_requests_running", "Requests that are being answered.", {"": state.running})
        yield _gauge("num_requests_waiting", "Requests in the server's queue.", {"": state.waiting})
        yield _gauge("lookahead_rounds", "Lookahead rounds that have not ended.", {"": now.rounds})
        yield _gauge("arena_references", "Uses of lists in fast memory that have not ended.", {"": now.references})
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
        yield _gauge("llm_calls_waiting", "LLM calls that wait for a place.", {"": now.waiting})
        tokens = CounterMetricFamily(
            "telerag_llm_tokens",
            "Tokens since the LLM was loaded, for requests without an answer too: of prompts computed "
            "(evaluated) or computed before (reused), and of texts (written).",
            labels=["kind"],
        )
        tokens.add_metric(["evaluated"], now.computed_tokens)
        tokens.add_metric(["reused"], now.cached_tokens)
        tokens.add_metric(["written"], now.written_tokens)
        yield tokens

    def _keep(self, **counts: int) -> None:
        with self._lock:  # around the clock too, so that they are in order
            self._done.append(_Done(self._clock(), **counts))

    def _since(self, window_s: float) -> Iterator[_Done]:
        """What was kept within the last seconds, latest first."""
        after_s = self._clock() - window_s
        with self._lock:
            kept = list(self._done)
        return takewhile(lambda done: done.at_s > after_s, reversed(kept))


class _Now(Collector):
    """Reads at the moment of asking."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.current()

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks nobody for a state


class _Plain(Collector):
    """All of a registry, without the times at which its series began: they double the page, and the text form has no place for them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if sample.name != f"{family.name}_created"]
            yield family


def _gauge(name: str, what: str, values: Mapping[str, float]) -> Metric:
    """A gauge by ``state``; the state ``""`` stands for a gauge without labels."""
    family = GaugeMetricFamily(f"telerag_{name}", what, labels=[] if "" in values else ["state"])
    for state, value in values.items():
        family.add_metric([state] if state else [], value)
    return family


def _hit_ratio(done: Iterable[_Done]) -> float | None:
    hit = wanted = 0
    for each in done:
        hit += each.lists_hit
        wanted += each.lists_wanted
    return hit / wanted if wanted else None


def _token_s(answered: Answered) -> float | None:
    """Seconds per token after the first, of the LLM call that wrote the answer; None if it wrote no second token.

    Where an answer was put together from several calls, the last one stands for it.
    """
    stages = answered.stages
    wrote = [stage for stage in stages if stage.generation.text == answered.answer]
    for stage in (wrote or [stage for stage in stages if is_answer(stage.name)] or stages)[-1:]:
        if stage.generation.completion_tokens > 1:
            return stage.generation.decode_s / (stage.generation.completion_tokens - 1)
    return None
