"""What stands behind the routes: the engine once it is there, the queue before it, and how one question is answered."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from telerag_cli.config import AnswerConfig, Lookahead, PipelineName
from telerag_cli.engine.admission import AdmissionQueue, Local, Permit, QueueFullError
from telerag_cli.engine.engine import AskResult, Engine
from telerag_cli.engine.lines import answer_body
from telerag_cli.engine.scheduler import Scheduler
from telerag_cli.engine.snapshot import snapshot
from telerag_cli.errors import ContextError, ReasoningError
from telerag_cli.llm.base import Message, Request, counted
from telerag_cli.pipelines.base import ANSWER, Listener, Pipeline
from telerag_cli.pipelines.conversation import Turn
from telerag_cli.server.errors import DO_NOT_RETRY, OVERLOADED, RETRY_S, TIMEOUT, ApiError, shortened, stopping
from telerag_cli.server.metrics import Metrics, ServerState
from telerag_cli.server.timeline import timeline
from telerag_cli.tracing import Span

T = TypeVar("T")

WITHOUT_LOOKAHEAD = PipelineName.NAIVE
"""It writes nothing before it retrieves."""
REMEMBERED = 32
"""Latest answers whose times predict how long a request will wait."""
MAX_RETRY_S = 60
"""OpenAI's clients ignore a longer one."""
RATES_S = 10.0
LONG_TOKEN = 8
"""Characters that a token seldom has on average."""


class Status(StrEnum):
    """Where a server is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True)
class AnswerRequest:
    """A question, and how it is to be answered."""

    pipeline: Pipeline
    question: str
    settings: AnswerConfig
    turns: Sequence[Turn] = ()
    """Said before it."""
    wants_timeline: bool = False
    fresh: bool = False
    """Whether to drop first what is cached of earlier questions."""


class Watcher(Listener):
    """A `Listener` that also hears of the queue, and when the first text of an answer came."""

    first_s: float | None = None
    """By `time.perf_counter`; None until then."""

    def queued(self, before: int) -> None:
        """The question waits behind so many others."""

    def wrote(self, stage: str, text: str) -> None:
        """See `Listener`."""
        if self.first_s is None and stage == ANSWER and text.strip():
            self.first_s = time.perf_counter()


@dataclass(frozen=True)
class AnswerResult:
    """An answer, and how it came about as JSON."""

    answered: AskResult
    about: dict[str, Any]
    waited_s: float
    first_s: float
    """Until the answer's first text, from when the request came."""


@dataclass
class Service:
    """One server's engine and everything about it. For one event loop."""

    pipelines: dict[PipelineName, Pipeline]
    metrics: Metrics
    version: str
    max_queue: int = 64
    """Requests that may wait."""
    request_s: float = 300.0
    """Seconds that one may take, waiting included."""
    draining: bool = False
    started_s: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    """Seconds since 1970."""
    _engine: Engine | None = None
    _queue: AdmissionQueue | None = None
    _beside: int = 0
    """Requests under way that need no seat."""
    _took_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _timeouts: set[asyncio.Timeout] = field(default_factory=set)
    """Of the requests under way."""
    _end_s: float = math.inf
    """When those under way must have ended, by the event loop's clock."""

    def __post_init__(self) -> None:
        self.metrics.watch(self._watched)

    @property
    def status(self) -> Status:
        """Where it is in its life."""
        if self.draining:
            return Status.DRAINING
        return Status.READY if self._engine else Status.LOADING

    @property
    def engine(self) -> Engine:
        """What answers; raises ApiError with status 503 if a request cannot be taken on now."""
        return self.require_ready()[0]

    @property
    def embedder_name(self) -> str:
        """The embedder as a model's name."""
        return _embedder_name(self.engine)

    @property
    def models(self) -> list[str]:
        """Names that requests may give: the pipelines, and the embedder."""
        return [*(name.model for name in self.pipelines), self.embedder_name]

    def pipeline_of(self, model: str) -> Pipeline:
        """The pipeline that a model's name stands for; raises ApiError if there is no such model."""
        for pipeline in self.pipelines.values():
            if model == pipeline.model:
                return pipeline
        if model == self.embedder_name:
            raise ApiError(
                404, f"The model `{model}` makes embeddings and does not answer.", param="model", code="model_not_found"
            )
        raise no_model(model)

    async def warm_up(self, engine: Engine) -> None:
        """Use the LLM and the index once, so that the first question finds their pages in memory."""
        with contextlib.suppress(ReasoningError):  # one token may not be an answer
            await engine.generator.generate(Request([Message("user", "Hello")], max_tokens=1))
        await engine.shared.retrievals.find(["warm up"], [])

    def open(self, engine: Engine, scheduler: Scheduler, at_once: int) -> None:
        """Begin to answer."""
        self._engine = engine
        self._queue = AdmissionQueue(scheduler, [Local(engine, at_once)], self.max_queue, eager=True)

    def drain(self, seconds: float) -> None:
        """Take no more requests, and refuse those that are still under way after so many seconds."""
        self.draining = True
        self._end_s = min(self._end_s, asyncio.get_running_loop().time() + seconds)
        for timeout in self._timeouts:
            when_s = timeout.when()
            if when_s is not None and when_s > self._end_s and not timeout.expired():
                timeout.reschedule(self._end_s)

    async def close(self) -> None:
        """Take no more requests. The engine stays the caller's."""
        self.draining = True
        if self._queue:
            await self._queue.close()

    @property
    def under_way(self) -> int:
        """Questions that are being answered, or wait."""
        return self._queue.running + self._queue.waiting if self._queue else 0

    def state(self) -> dict[str, Any]:
        """What the page shows."""
        made: dict[str, Any] = {
            "status": self.status.value,
            "version": self.version,
            "uptime_s": round(time.monotonic() - self.started_s, 1),
            **dict.fromkeys(("model", "embedder", "queue", "llm", "index", "arena", "lookahead")),
            "rates": {**self.metrics.rates(RATES_S), "window_s": RATES_S},
        }
        engine, queue = self._engine, self._queue
        if engine is None or queue is None:
            return made
        now, index = asdict(snapshot(engine)), engine.retriever.index
        arena = ("resident_bytes", "moving_bytes", "lists_resident", "lists_moving", "references")
        return made | {
            "model": engine.generator.name,
            "embedder": _embedder_name(engine),
            "queue": {name: getattr(queue, name) for name in ("running", "waiting", "limit", "at_once")},
            "llm": {name: now[name] for name in ("slots", "running", "waiting")},
            "index": {
                "passages": index.manifest.ntotal,
                "lists": index.manifest.nlist,
                "bytes": int(index.list_bytes.sum()),
            },
            "arena": {"bytes": now["arena_bytes"], **{name: now[name] for name in arena}},
            "lookahead": {"rounds": now["rounds"]},
        }

    async def answer(self, asked: AnswerRequest, watcher: Watcher) -> AnswerResult:
        """Answer a question: wait in the queue, ask the engine, count. If cancelled, nothing is left in the engine."""
        engine, queue = self.require_ready()
        came_s = time.perf_counter()
        await _check_length(asked.question, engine)
        may_look_ahead = bool(asked.turns) or asked.pipeline.name != WITHOUT_LOOKAHEAD
        groups = may_look_ahead and asked.settings.lookahead is not Lookahead.OFF and queue.groups
        watcher.queued(queue.waiting)
        try:
            with contextlib.ExitStack() as listening:
                # From before the seat: lookahead for this question may begin with that of others beside it.
                spans = listening.enter_context(engine.tracer.listening()) if asked.wants_timeline else []
                async with self._in_time(), queue.submit(asked.question, groups=groups) as permit:
                    outcome = await _ask(engine, asked, watcher, permit, came_s, spans)
        except QueueFullError:
            raise self._busy(queue) from None
        except ApiError:  # the time is over
            raise
        except asyncio.CancelledError:
            self.metrics.ended("cancelled")
            raise
        except Exception:
            self.metrics.ended("failed")
            raise
        took_s = time.perf_counter() - came_s
        self._took_s.append(took_s - outcome.waited_s)
        waited_s, first_s = outcome.waited_s, outcome.first_s
        self.metrics.answered(
            asked.pipeline.model, outcome.answered, waited_s=waited_s, first_token_s=first_s, took_s=took_s
        )
        return outcome

    async def within(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work of a request that needs no seat, if fewer are under way than questions may wait, in its time."""
        _engine, queue = self.require_ready()
        if self._beside >= max(self.max_queue, 1):
            work.close()
            raise self._busy(queue)
        self._beside += 1
        try:
            async with self._in_time():
                return await work
        finally:
            self._beside -= 1

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Cancel the block when the time of a request is over, and raise ApiError instead."""
        try:
            async with asyncio.timeout(self.request_s) as limit:
                self._timeouts.add(limit)
                try:
                    yield
                finally:
                    self._timeouts.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            if asyncio.get_running_loop().time() >= self._end_s:
                self.metrics.ended("cancelled")
                raise stopping() from None
            self.metrics.ended("timeout")
            message = f"The answer was not ready within {self.request_s:g} seconds."
            raise ApiError(504, message, TIMEOUT, code="timeout", headers=DO_NOT_RETRY) from None

    def require_ready(self) -> tuple[Engine, AdmissionQueue]:
        """Return what answers and the queue before it; raises ApiError if a request cannot be taken on now."""
        if self._engine and self._queue and not self.draining:
            return self._engine, self._queue
        self.metrics.rejected("not_ready")
        if self.draining:
            raise stopping()
        message = "The server is still loading its model and index."
        raise ApiError(503, message, OVERLOADED, code="loading", headers={"Retry-After": str(RETRY_S)})

    def _busy(self, queue: AdmissionQueue) -> ApiError:
        """What is said when the queue is full; the wait is what those before it will probably take."""
        self.metrics.rejected("queue")
        mean_s = sum(self._took_s) / len(self._took_s) if self._took_s else 1.0
        wait_s = min(max(math.ceil(queue.waiting * mean_s / queue.at_once), 1), MAX_RETRY_S)
        message = f"As many requests are waiting as may, {self.max_queue}; try again in {wait_s} s."
        return ApiError(503, message, OVERLOADED, code="queue_full", headers={"Retry-After": str(wait_s)})

    def _watched(self) -> ServerState | None:
        if self._engine is None or self._queue is None:
            return None
        return self._queue.running, self._queue.waiting, snapshot(self._engine)


async def _check_length(question: str, engine: Engine) -> None:
    """Refuse a question that no context has room for by its beginning, before all of it is tokenized and embedded."""
    room = engine.generator.context_tokens
    beginning = question[: room * LONG_TOKEN]
    if (
        len(question) > len(beginning)
        and (tokens := await counted(engine.generator, [Message("user", beginning)])) > room
    ):
        raise ContextError(
            f"The question takes more than {tokens:,} tokens and the context has room for {room:,}.",
            remedy="Shorten it.",
        )


async def _ask(
    engine: Engine, asked: AnswerRequest, watcher: Watcher, permit: Permit, came_s: float, spans: Sequence[Span]
) -> AnswerResult:
    if asked.fresh:
        await asyncio.to_thread(engine.forget)
    began_s = time.perf_counter()
    answered = await engine.aask(
        asked.question,
        pipeline=asked.pipeline,
        listener=watcher,
        turns=asked.turns,
        batch=permit.batch,
        settings=asked.settings,
    )
    ended_s = time.perf_counter()
    about: dict[str, Any] = {
        "question": asked.question,
        **({"standalone": answered.question} if answered.question != asked.question else {}),
        **answer_body(answered),
    }
    for passage, hit in zip(about["passages"], answered.found, strict=True):
        passage["title"] = hit.passage.name
    if asked.wants_timeline:
        about["timeline"] = timeline(answered, list(spans), began_s, ended_s)
    return AnswerResult(answered, about, began_s - came_s, (watcher.first_s or ended_s) - came_s)


def _embedder_name(engine: Engine) -> str:
    """The last part of the embedder's path or repository: a path would reveal the file system."""
    name = engine.retriever.index.manifest.embedder.model or "embedder"
    return name.rstrip("/").rpartition("/")[2]


def no_model(model: str) -> ApiError:
    """OpenAI's answer to a model that does not exist."""
    return ApiError(404, f"The model `{shortened(model)}` does not exist.", param="model", code="model_not_found")
