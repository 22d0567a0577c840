"""``POST /v1/completions``: prompts are questions, each answered by a pipeline."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from telerag_cli.pipelines.base import ANSWER
from telerag_cli.pipelines.together import together
from telerag_cli.server.asking import completion_asked
from telerag_cli.server.replies import STREAMS_TOO, event, json_response, note, note_outcomes, usage_of
from telerag_cli.server.requests import CompletionRequest
from telerag_cli.server.responses import Completion
from telerag_cli.server.service import Outcome, Service, Watcher
from telerag_cli.server.streaming import streamed
from telerag_cli.server.streams import Growing, News, Text, until_gone


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=Completion, tags=["Answers"], responses=STREAMS_TOO)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Answer each prompt as a question, from the index."""
        service.require_ready()
        asked = completion_asked(body, service)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        note(request, model=body.model, stream=bool(body.stream))
        if body.stream:
            wants_usage = bool(body.stream_options and body.stream_options.include_usage)
            chunks = CompletionChunks(head, len(asked), wants_usage=wants_usage)
            return await streamed(request, service, asked, chunks, events=False)
        outcomes = await until_gone(request, together(service.answer(each, Watcher()) for each in asked))
        note_outcomes(request, outcomes)
        choices = [
            {
                "index": index,
                "text": outcome.answered.answer,
                "logprobs": None,
                "finish_reason": outcome.answered.finish_reason,
            }
            for index, outcome in enumerate(outcomes)
        ]
        return json_response(
            {
                **head,
                "choices": choices,
                "usage": usage_of(outcomes),
                "telerag": [outcome.about for outcome in outcomes],
            }
        )

    return routes


class CompletionChunks:
    """`Chunks` of the answers to some prompts."""

    def __init__(self, head: dict[str, Any], prompts: int, *, wants_usage: bool) -> None:
        """Begin.

        Args:
            head: what all chunks have in common.
            prompts: how many there are.
            wants_usage: whether tokens are counted at the end.
        """
        self._head = head
        self._wants_usage = wants_usage
        self._growing = [Growing() for _ in range(prompts)]

    def begin(self) -> bytes:
        """See `Chunks`."""
        return b""

    def news(self, news: News) -> bytes:
        """See `Chunks`."""
        if not isinstance(news, Text) or news.stage != ANSWER:
            return b""
        more = self._growing[news.index].more(news.text)
        return self._chunk(news.index, more) if more else b""

    def end(self, outcomes: Sequence[Outcome]) -> bytes:
        """See `Chunks`."""
        data = b"".join(
            self._chunk(
                index,
                self._growing[index].more(outcome.answered.answer),
                outcome.answered.finish_reason,
                telerag=outcome.about,
            )
            for index, outcome in enumerate(outcomes)
        )
        if self._wants_usage:
            data += event({**self._head, "choices": [], "usage": usage_of(outcomes)})
        return data

    def _chunk(self, index: int, text: str, finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head, "choices": [choice], **({"usage": None} if self._wants_usage else {}), **more})
