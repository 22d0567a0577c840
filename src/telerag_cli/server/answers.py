"""``POST /v1/chat/completions`` and ``POST /v1/completions``: from OpenAI's requests to answers, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from telerag_cli.config import AnswerConfig, Lookahead, PipelineName
from telerag_cli.engine.engine import Engine
from telerag_cli.errors import InputError
from telerag_cli.llm.constraint import check_schema
from telerag_cli.llm.shapes import Json, Shape
from telerag_cli.pipelines.base import Pipeline, together
from telerag_cli.pipelines.conversation import Turn
from telerag_cli.server.errors import ApiError
from telerag_cli.server.replies import choice, cited, json_response, note, note_outcomes, usage_of
from telerag_cli.server.requests import ChatMessage, ChatRequest, CompletionRequest, ResponseFormat
from telerag_cli.server.responses import ChatCompletion, Completion
from telerag_cli.server.service import AnswerRequest, AnswerResult, Service, Watcher
from telerag_cli.server.streams import ChatChunks, CompletionChunks, streamed, until_gone

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
MAX_SCHEMA_CHARACTERS = 2000
"""Of a schema that the LLM is shown; a longer one only constrains it."""
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
    routes = APIRouter(tags=["Answers"], responses=STREAMS_TOO)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last user's turn from the index, with the pipeline that the model's name chooses."""
        service.require_ready()
        return await _respond(request, service, body, [read_chat(body, service)])

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
    pipeline = service.pipeline_of(body.model)
    turns, question, instructions = read_messages(body.messages)
    shape = _shape(body.response_format, pipeline)
    if isinstance(shape, Json) and len(schema := json.dumps(shape.schema)) <= MAX_SCHEMA_CHARACTERS:
        instructions = f"{instructions}\n\nWrite the answer as JSON of this schema: {schema}".strip()
    settings = replace(_settings(service.engine, body), shape=shape, instructions=instructions)
    return AnswerRequest(pipeline, question, settings, turns, bool(body.extras.timeline), bool(body.extras.fresh))


def read_completion(body: CompletionRequest, service: Service) -> list[AnswerRequest]:
    """A question for each prompt."""
    pipeline = service.pipeline_of(body.model)
    settings = _settings(service.engine, body)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    timeline, fresh = bool(body.extras.timeline), bool(body.extras.fresh)
    return [AnswerRequest(pipeline, prompt.strip(), settings, (), timeline, fresh) for prompt in prompts]


def read_messages(messages: Sequence[ChatMessage]) -> tuple[list[Turn], str, str]:
    """The turns before the last user's, that turn, and what system messages say; what follows it is left aside."""
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    turns: list[Turn] = []
    for message in messages[:last]:
        if message.role == "user":
            turns.append(Turn(message.text, ""))
        elif message.role == "assistant" and turns and not turns[-1].answer:
            turns[-1] = replace(turns[-1], answer=message.text)
    told = [message.text.strip() for message in messages if message.role in ("system", "developer")]
    return turns, messages[last].text.strip(), "\n\n".join(text for text in told if text)


def _settings(engine: Engine, body: ChatRequest | CompletionRequest) -> AnswerConfig:
    """The server's settings, unless the request says otherwise; an answer leaves half of the context to passages."""
    usual = engine.config
    said: dict[str, Any] = {
        "max_tokens": min(body.token_limit or usual.max_tokens, engine.generator.context_tokens // 2),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": None if body.seed is None else body.seed % 2**32,
        "lookahead": body.extras.lookahead and Lookahead(body.extras.lookahead),
        "stop": body.stops,
    }
    return replace(usual, **{name: value for name, value in said.items() if value is not None})


def _shape(form: ResponseFormat | None, pipeline: Pipeline) -> Shape | None:
    if form is None or form.type == "text":
        return None
    if pipeline.name == PipelineName.FLARE:
        message = "The pipeline flare writes sentence by sentence, and cannot be held to a schema."
        raise ApiError(400, message, param="response_format", code="unsupported_parameter")
    shape = Json(ANY_OBJECT if form.json_schema is None else form.json_schema.schema_ or ANY_OBJECT)
    try:
        check_schema(shape.schema)  # so that what is wrong with it is said before the question waits
    except InputError as error:
        message = error.message
        param = "response_format.json_schema.schema"
        raise ApiError(400, message, param=param, code="invalid_json_schema") from error
    return shape
