"""Responses in pieces: server-sent events that begin with the first news of an answer and end with the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from fastapi import Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event

from telerag_cli.pipelines.together import together
from telerag_cli.server.replies import failed, note_outcomes
from telerag_cli.server.service import Asked, Outcome, Service
from telerag_cli.server.streams import News, Stream, Watching, until_gone

DONE = format_sse_event(data_str="[DONE]")
UNBUFFERED = {"X-Accel-Buffering": "no"}
"""Asks proxies to hand events on at once."""


class Chunks(Protocol):
    """The events of some answers, as bytes."""

    def begin(self) -> bytes:
        """Before all news."""

    def news(self, news: News) -> bytes:
        """What has happened; nothing if it is not to be shown."""

    def end(self, outcomes: Sequence[Outcome]) -> bytes:
        """What is left to say when all is answered."""


async def streamed(
    request: Request, service: Service, asked: Sequence[Asked], chunks: Chunks, *, events: bool
) -> Response:
    """Answer in pieces. The response begins with the first news, so that what goes wrong before has a status of its own.

    Raises:
        ApiError: it cannot be answered now.
        TeleragError: it cannot be answered.
    """
    stream = Stream(events=events)
    answering = asyncio.create_task(
        together(service.answer(each, Watching(stream, index)) for index, each in enumerate(asked))
    )
    news = stream.news(answering)
    try:
        first = await until_gone(request, anext(news, None))
        if first is None and (error := answering.exception()):
            raise error
    except BaseException:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        raise
    return EventSourceResponse(_events(request, answering, first, news, chunks), headers=UNBUFFERED)


async def _events(
    request: Request,
    answering: asyncio.Task[list[Outcome]],
    first: News | None,
    news: AsyncIterator[News],
    chunks: Chunks,
) -> AsyncIterator[bytes]:
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
