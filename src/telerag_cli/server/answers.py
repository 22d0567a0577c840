"""``POST /v1/chat/completions`` and ``POST /v1/completions``: from OpenAI's requests to answers, whole or in pieces."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from telerag_cli.pipelines.base import together
from telerag_cli.server.chat import answer_settings, chat_options
from telerag_cli.server.replies import choice, cited, json_response, note, note_outcomes, usage_of
from telerag_cli.server.requests import ChatRequest, CompletionRequest
from telerag_cli.server.responses import ChatCompletion, Completion
from telerag_cli.server.service import AnswerRequest, AnswerResult, Service, Watcher
from telerag_cli.server.streams import ChatChunks, CompletionChunks, streamed, until_gone
from telerag_cli.server.validation import JsonRoute, TimeShare

SCHEMA_SHARE = 0.5
"""Share of the time in which schemas are checked, one after the other."""
STREAM_SCHEMA = {
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
    "description": "One event; its data is a chunk as JSON, or `[DONE]`.",
}
STREAMS_TOO: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": STREAM_SCHEMA}}}}
"""The usual response comes in pieces too."""


def router(service: Service) -> APIRouter:
    """Return both routes."""
    routes = APIRouter(route_class=JsonRoute, tags=["Answers"], responses=STREAMS_TOO)
    schemas = TimeShare(SCHEMA_SHARE)

    async def read_with_schema(body: ChatRequest) -> AnswerRequest:
        """Read a request whose schema may take seconds to check."""
        async with schemas:
            return await asyncio.to_thread(read_chat, body, service)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last user's turn from the index, with the pipeline that the model's name chooses."""
        service.require_ready()
        if body.response_format is None:
            asked = read_chat(body, service)
        else:
            asked = await until_gone(request, service.within(read_with_schema(body)))
        return await _respond(request, service, body, [asked])

    @routes.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Answer each prompt as a question, from the index."""
        service.require_ready()
        return await _respond(request, service, body, read_completion(body, service))

    return routes


async def _respond(
    request: Request, service: Service, body: ChatRequest | CompletionRequest, asked: Sequence[AnswerRequest]
) -> Response:
    """Have the questions answered, and say so in pieces or at the end."""
    note(request, model=body.model, stream=bool(body.stream))
    is_chat = isinstance(body, ChatRequest)
    head = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "object": "chat.completion" if is_chat else "text_completion",
    }
    if body.stream:
        chunks = (ChatChunks if is_chat else CompletionChunks)(head, len(asked), body.stream_options)
        return await streamed(request, service, asked, chunks, events=bool(is_chat and body.extras.events))
    outcomes = await until_gone(request, together(service.answer(each, Watcher()) for each in asked))
    note_outcomes(request, outcomes)
    choices = [
        choice(index, _message(outcome) if is_chat else {"text": outcome.answered.answer}, outcome)
        for index, outcome in enumerate(outcomes)
    ]
    reports = [outcome.about for outcome in outcomes]
    usage = usage_of(outcomes)
    return json_response({**head, "choices": choices, "usage": usage, "telerag": reports[0] if is_chat else reports})


def _message(outcome: AnswerResult) -> dict[str, Any]:
    answer, annotations = outcome.answered.answer, cited(outcome)
    return {"message": {"role": "assistant", "content": answer, "refusal": None, "annotations": annotations}}


def read_chat(body: ChatRequest, service: Service) -> AnswerRequest:
    """The last user's turn as a question, what was said before, and how to answer."""
    pipeline, engine = service.pipeline_of(body.model), service.engine
    question, options = chat_options(body, pipeline, engine.generator.context_tokens)
    settings, extras = engine.answer_config(**options.settings), body.extras
    return AnswerRequest(pipeline, question, settings, options.turns, bool(extras.timeline), bool(extras.fresh))


def read_completion(body: CompletionRequest, service: Service) -> list[AnswerRequest]:
    """A question for each prompt."""
    pipeline, engine = service.pipeline_of(body.model), service.engine
    settings = engine.answer_config(**answer_settings(body, engine.generator.context_tokens))
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    timeline, fresh = bool(body.extras.timeline), bool(body.extras.fresh)
    return [AnswerRequest(pipeline, prompt.strip(), settings, (), timeline, fresh) for prompt in prompts]
