"""Between an answer under way and its client: work that ends when the client is gone, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event

from telerag_cli.corpus.passages import Retrieved
from telerag_cli.errors import ModelError
from telerag_cli.llm.base import Generator, Message, counted
from telerag_cli.pipelines.base import ANSWER, together
from telerag_cli.server.errors import ApiError, as_api_error
from telerag_cli.server.replies import choice, cited, event, note, note_outcomes, usage_of
from telerag_cli.server.requests import StreamOptions
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
class TokenCount:
    """Tokens that the LLM has read and written so far for a request."""

    read: int = 0
    written: int = 0
    writing: dict[tuple[int, str], int] = field(default_factory=dict)
    """Tokens of the latest text of each question's stage; ``written`` has those of earlier texts."""
    final: dict[str, Any] | None = None

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's form of it; the final count has what is not known before."""
        written = self.written + sum(list(self.writing.values()))  # a copy, as other threads write
        total = {"prompt_tokens": self.read, "completion_tokens": written, "total_tokens": self.read + written}
        return self.final or total


@dataclass
class _Watching(Watcher):
    """A `Watcher` that puts what becomes of one question into a stream."""

    stream: EventStream
    generator: Generator
    tokens: TokenCount | None
    index: int

    def queued(self, before: int) -> None:
        self._tell({"event": "queued", "position": before})

    def begins(self, stage: str) -> None:
        self._tell({"event": "stage", "stage": stage})

    async def prompted(self, stage: str, messages: Sequence[Message]) -> None:
        if self.tokens:
            self.tokens.read += await counted(self.generator, messages)
            self.tokens.written += self.tokens.writing.pop((self.index, stage), 0)

    def counted(self, stage: str, tokens: int) -> None:
        if self.tokens:
            self.tokens.writing[self.index, stage] = tokens

    def retrieving(self) -> None:
        self._tell({"event": "retrieving"})

    def retrieved(self, found: Sequence[Retrieved]) -> None:
        passages = [
            {"rank": rank, "id": hit.passage.id, "title": hit.passage.name, "score": hit.score}
            for rank, hit in enumerate(found, 1)
        ]
        self._tell({"event": "retrieved", "passages": passages})

    def wrote(self, stage: str, text: str) -> None:
        super().wrote(stage, text)
        if self.stream.events or stage == ANSWER:
            self.stream.add_soon(StageText(self.index, stage, text))

    def _tell(self, body: dict[str, Any]) -> None:
        if self.stream.events:
            self.stream.add(body)


class CompletionChunks:
    """The events of the answers to some prompts, as bytes."""

    def __init__(self, head: dict[str, Any], prompts: int, options: StreamOptions | None) -> None:
        self._head = head
        self._shown = [""] * prompts
        self._usage_at_end = bool(options and options.include_usage)
        self.tokens = TokenCount() if options and options.continuous_usage_stats else None
        """What each chunk says of tokens, if a client wants that."""

    def begin(self) -> bytes:
        """Return what comes before all news."""
        return b""

    def news(self, news: News) -> bytes:
        """Return what has happened; nothing if it is not to be shown."""
        if not isinstance(news, StageText) or news.stage != ANSWER:
            return b""
        more = self._more(news.index, news.text)
        return self._chunk(news.index, self._piece(more)) if more else b""

    def end(self, outcomes: Sequence[AnswerResult]) -> bytes:
        """Return what is left to say when all is answered; raises ModelError if what was shown is not the answer."""
        for shown, outcome in zip(self._shown, outcomes, strict=True):
            answer = outcome.answered.answer.strip()
            if not answer.startswith(shown) and not shown.startswith(answer):
                raise ModelError(
                    f"The answer that began with '{shown:.60}' was broken off, and is another one written anew.",
                    remedy="Ask again.",
                )
        usage = usage_of(outcomes)
        if self.tokens:
            self.tokens.final = usage
        rests = [self._more(index, outcome.answered.answer) for index, outcome in enumerate(outcomes)]
        data = b"".join(self._last(index, rests[index], outcome) for index, outcome in enumerate(outcomes))
        if self._usage_at_end:
            data += event({**self._head, "choices": [], "usage": usage})
        return data

    def _more(self, index: int, text: str) -> str:
        """What to add to what was shown, by all the text so far; nothing if it is another text now."""
        text, shown = text.strip(), self._shown[index]
        if not text.startswith(shown):
            return ""
        self._shown[index] = text
        return text[len(shown) :]

    def _piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _last(self, index: int, rest: str, outcome: AnswerResult) -> bytes:
        return self._chunk(index, self._piece(rest), outcome, telerag=outcome.about)

    def _chunk(self, index: int, content: dict[str, Any], outcome: AnswerResult | None = None, **more: Any) -> bytes:
        body = {**self._head, "choices": [choice(index, content, outcome)], **more}
        if self.tokens or self._usage_at_end:
            body["usage"] = self.tokens.usage if self.tokens else None
        return event(body)


class ChatChunks(CompletionChunks):
    """The events of one conversation's answer, and of what happens before it if a client wants to know."""

    def __init__(self, head: dict[str, Any], prompts: int, options: StreamOptions | None) -> None:
        super().__init__({**head, "object": "chat.completion.chunk"}, prompts, options)

    def begin(self) -> bytes:
        """Return the role."""
        return self._chunk(0, {"delta": {"role": "assistant", "content": ""}})

    def news(self, news: News) -> bytes:
        """Return what has happened, as a piece of the answer or as an event."""
        if not isinstance(news, StageText):
            return self._chunk(0, {"delta": {}}, telerag=news)
        if news.stage != ANSWER:
            about = {"event": "text", "stage": news.stage, "text": news.text.strip()}
            return self._chunk(0, {"delta": {}}, telerag=about)
        return super().news(news)

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _last(self, index: int, rest: str, outcome: AnswerResult) -> bytes:
        data = self._chunk(index, self._piece(rest)) if rest else b""
        return data + self._chunk(index, {"delta": {"annotations": cited(outcome)}}, outcome, telerag=outcome.about)


async def streamed(
    request: Request, service: Service, asked: Sequence[AnswerRequest], chunks: CompletionChunks, *, events: bool
) -> Response:
    """Answer in pieces. The response begins with the first news, so that an error before it has a status of its own."""
    stream = EventStream(events=events)
    answering = asyncio.create_task(
        together(
            service.answer(each, _Watching(stream, service.engine.generator, chunks.tokens, index))
            for index, each in enumerate(asked)
        )
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
            api_error = as_api_error(error, request.state.request_id)
            note(request, outcome="failed", error=None if isinstance(error, ApiError) else repr(error))
            yield event(api_error.body)
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
