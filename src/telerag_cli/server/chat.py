"""From OpenAI's chat requests to questions, for the server and for the lines of a Batch file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from telerag_cli.config import EngineConfig, Lookahead, PipelineName
from telerag_cli.engine.questions import AskOptions
from telerag_cli.errors import InputError
from telerag_cli.llm.schema_check import check_schema
from telerag_cli.llm.shapes import Json, Shape
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.pipelines.conversation import Turn
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.server.errors import ApiError
from telerag_cli.server.requests import ChatMessage, ChatRequest, CompletionRequest, ResponseFormat
from telerag_cli.server.validation import invalid_request

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
MAX_SCHEMA_CHARACTERS = 2000
"""Of a schema that the LLM is shown; a longer one only constrains it."""


def read_batch_body(config: EngineConfig, body: dict[str, Any]) -> tuple[str, AskOptions]:
    """Return the question of a Batch line's request and how to answer it, as the server would.

    A model's name that is not a pipeline's stands for the pipeline of the run.

    Raises:
        InputError: the request cannot be honoured.
    """
    usual = make_pipeline(config.pipeline, **config.pipeline_options)
    try:
        request = ChatRequest.model_validate({"model": usual.model, **body})
        named = next((name for name in PipelineName if name.model == request.model), None)
        pipeline = make_pipeline(named) if named and named != usual.name else usual
        return chat_options(request, pipeline, config.ctx_size)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise InputError(invalid_request(RequestValidationError(errors, body=body)).message) from None
    except ApiError as error:
        raise InputError(error.message) from None


def chat_options(body: ChatRequest, pipeline: Pipeline, context_tokens: int) -> tuple[str, AskOptions]:
    """Return the last user's turn as a question, and how to answer it: what was said before, and the settings.

    Raises:
        ApiError: the pipeline cannot be held to a schema, or the schema cannot be followed.
    """
    turns, question, instructions = read_messages(body.messages)
    shape = _shape(body.response_format, pipeline)
    if isinstance(shape, Json) and len(schema := json.dumps(shape.schema)) <= MAX_SCHEMA_CHARACTERS:
        instructions = f"{instructions}\n\nWrite the answer as JSON of this schema: {schema}".strip()
    settings = answer_settings(body, context_tokens) | {"shape": shape, "instructions": instructions}
    return question, AskOptions(pipeline, settings, turns)


def read_messages(messages: Sequence[ChatMessage]) -> tuple[list[Turn], str, str]:
    """Return the turns before the last user's, that turn, and what system messages say; what follows it is left out."""
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    turns: list[Turn] = []
    for message in messages[:last]:
        if message.role == "user":
            turns.append(Turn(message.text, ""))
        elif message.role == "assistant" and turns and not turns[-1].answer:
            turns[-1] = replace(turns[-1], answer=message.text)
    told = [message.text.strip() for message in messages if message.role in ("system", "developer")]
    return turns, messages[last].text.strip(), "\n\n".join(text for text in told if text)


def answer_settings(body: ChatRequest | CompletionRequest, context_tokens: int) -> dict[str, Any]:
    """Return the fields of `AnswerConfig` that a request sets; an answer leaves half of the context to passages."""
    said: dict[str, Any] = {
        "max_tokens": None if body.token_limit is None else min(body.token_limit, context_tokens // 2),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": None if body.seed is None else body.seed % 2**32,
        "lookahead": body.extras.lookahead and Lookahead(body.extras.lookahead),
        "stop": body.stops,
    }
    return {name: value for name, value in said.items() if value is not None}


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
