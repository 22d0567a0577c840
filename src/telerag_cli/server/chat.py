"""``POST /v1/chat/completions``: a pipeline's answer in OpenAI's form, whole or in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from telerag_cli.pipelines.base import ANSWER
from telerag_cli.server.asking import chat_asked
from telerag_cli.server.replies import STREAMS_TOO, cited, event, json_response, note, note_outcomes, usage_of
from telerag_cli.server.requests import ChatRequest
from telerag_cli.server.responses import ChatCompletion
from telerag_cli.server.service import Outcome, Service, Watcher
from telerag_cli.server.streaming import streamed
from telerag_cli.server.streams import Growing, News, Text, until_gone


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, tags=["Answers"], responses=STREAMS_TOO)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last user's turn from the index, with the pipeline that the model's name chooses."""
        service.require_ready()
        asked = chat_asked(body, service)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        note(request, model=body.model, stream=bool(body.stream))
        if body.stream:
            wants_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = bool(body.telerag and body.telerag.events)
            return await streamed(request, service, [asked], ChatChunks(head, wants_usage=wants_usage), events=events)
        outcome = await until_gone(request, service.answer(asked, Watcher()))
        note_outcomes(request, [outcome])
        message = {
            "role": "assistant",
            "content": outcome.answered.answer,
            "refusal": None,
            "annotations": cited(outcome),
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": outcome.answered.finish_reason}
        return json_response(
            {
                **head,
                "object": "chat.completion",
                "choices": [choice],
                "usage": usage_of([outcome]),
                "telerag": outcome.about,
            }
        )

    return routes


class ChatChunks:
    """`Chunks` of one conversation's answer."""

    def __init__(self, head: dict[str, Any], *, wants_usage: bool) -> None:
        """Begin.

        Args:
            head: what all chunks have in common.
            wants_usage: whether tokens are counted at the end.
        """
        self._head = {**head, "object": "chat.completion.chunk"}
        self._wants_usage = wants_usage
        self._growing = Growing()

    def begin(self) -> bytes:
        """See `Chunks`."""
        return self._chunk({"role": "assistant", "content": ""})

    def news(self, news: News) -> bytes:
        """See `Chunks`."""
        if not isinstance(news, Text):
            return self._chunk({}, telerag=news.body)
        if news.stage != ANSWER:
            return self._chunk({}, telerag={"event": "text", "stage": news.stage, "text": news.text.strip()})
        more = self._growing.more(news.text)
        return self._chunk({"content": more}) if more else b""

    def end(self, outcomes: Sequence[Outcome]) -> bytes:
        """See `Chunks`."""
        (outcome,) = outcomes
        rest = self._growing.more(outcome.answered.answer)
        data = self._chunk({"content": rest}) if rest else b""
        data += self._chunk({"annotations": cited(outcome)}, outcome.answered.finish_reason, telerag=outcome.about)
        if self._wants_usage:
            data += event({**self._head, "choices": [], "usage": usage_of(outcomes)})
        return data

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head, "choices": [choice], **({"usage": None} if self._wants_usage else {}), **more})
