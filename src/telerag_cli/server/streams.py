"""Between an answer under way and its client: work that ends when the client is gone, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event

from telerag_cli.pipelines.base import ANSWER
from telerag_cli.pipelines.found import Retrieved
from telerag_cli.pipelines.together import together
from telerag_cli.server.replies import failed, note_outcomes
from telerag_cli.server.service import AnswerRequest, AnswerResult, Service, Watcher

T = TypeVar("T")

DONE = format_sse_event(data_str="[DONE]")
UNBUFFERED = {"X-Accel-Buffering": "no"}
"""Asks proxies to hand events on at once."""


class ClientGoneError(Exception):
    """The client hung up; nobody reads the response."""


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; if the client hangs up, the work is cancelled and ended, and `ClientGoneError` raised."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class StageText:
    """All that a stage has written so far, for one of several questions."""

    index: int
    stage: str
    text: str


News = StageText | dict[str, Any]
"""A text that grows, or another event as JSON."""


class EventStream:
    """Keeps the news of answers until they are fetched, however slowly: of a growing text only its last state."""

    def __init__(self, *, events: bool) -> None:
        self.events = events
        """Whether more than the answers' texts is wanted."""
        self._loop = asyncio.get_running_loop()
        self._news: deque[News] = deque()
        self._there = asyncio.Event()

    async def news(self, answering: asyncio.Task[Any]) -> AsyncIterator[News]:
        """What happens while answers are written; ends with the task that writes them, whatever becomes of it."""
        answering.add_done_callback(lambda _task: self._there.set())
        while True:
            await self._there.wait()
            self._there.clear()
            while self._news:
                yield self._news.popleft()
            if answering.done():
                return

    def add(self, news: News) -> None:
        """Add news; in the event loop."""
        if (
            isinstance(news, StageText)
            and self._news
            and isinstance(last := self._news[-1], StageText)
            and (last.index, last.stage) == (news.index, news.stage)
        ):
            self._news.pop()
        self._news.append(news)
        self._there.set()

    def add_soon(self, news: News) -> None:
        """Add news; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: the server was stopped by force
            self._loop.call_soon_threadsafe(self.add, news)


@dataclass
class Watching(Watcher):
    """A `Watcher` that puts what becomes of one question into a stream."""

    stream: EventStream
    index: int = 0

    def queued(self, before: int) -> None:
        """See `Watcher`."""
        self._tell({"event": "queued", "position": before})

    def begins(self, stage: str) -> None:
        """See `Watcher`."""
        self._tell({"event": "stage", "stage": stage})

    def retrieving(self) -> None:
        """See `Watcher`."""
        self._tell({"event": "retrieving"})

    def retrieved(self, found: Sequence[Retrieved]) -> None:
        """See `Watcher`."""
        passages = [
            {"rank": rank, "id": hit.passage.id, "title": hit.passage.name, "score": hit.score}
            for rank, hit in enumerate(found, 1)
        ]
        self._tell({"event": "retrieved", "passages": passages})

    def wrote(self, stage: str, text: str) -> None:
        """See `Watcher`."""
        super().wrote(stage, text)
        if self.stream.events or stage == ANSWER:
            self.stream.add_soon(StageText(self.index, stage, text))

    def _tell(self, body: dict[str, Any]) -> None:
        if self.stream.events:
            self.stream.add(body)


class Chunks(Protocol):
    """The events of some answers, as bytes."""

    def begin(self) -> bytes:
        """Before all news."""

    def news(self, news: News) -> bytes:
        """What has happened; nothing if it is not to be shown."""

    def end(self, outcomes: Sequence[AnswerResult]) -> bytes:
        """What is left to say when all is answered."""


async def streamed(
    request: Request, service: Service, asked: Sequence[AnswerRequest], chunks: Chunks, *, events: bool
) -> Response:
    """Answer in pieces. The response begins with the first news, so that an error before it has a status of its own.

    Raises:
        ApiError: it cannot be answered now.
        TeleragError: it cannot be answered.
    """
    stream = EventStream(events=events)
    answering = asyncio.create_task(
        together(service.answer(each, Watching(stream, index)) for index, each in enumerate(asked))
    )
    news = stream.news(answering)

    async def pieces(first: News | None) -> AsyncIterator[bytes]:
        try:
            yield chunks.begin()
            if first is not None and (data := chunks.news(first)):
                yield data
            async for each in news:
                if data := chunks.news(each):
                    yield data
            outcomes = answering.result()
            note_outcomes(request, outcomes)
            yield chunks.end(outcomes) + DONE
        except Exception as error:
            yield failed(request, error)
        finally:
            answering.cancel()

    try:
        first = await until_gone(request, anext(news, None))
        if first is None and (error := answering.exception()):
            raise error
    except BaseException:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        raise
    return EventSourceResponse(pieces(first), headers=UNBUFFERED)
