"""From OpenAI's requests to what is asked of the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.engine.engine import Engine
from telerag_cli.engine.session import Settings
from telerag_cli.errors import TeleragError
from telerag_cli.llm.shapes import Json, Shape
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.pipelines.conversation import Turn
from telerag_cli.server.errors import ApiError
from telerag_cli.server.requests import ChatMessage, ChatRequest, CompletionRequest, ResponseFormat, TeleragOptions
from telerag_cli.server.service import Asked, Service

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
MAX_SCHEMA_CHARACTERS = 2000
"""Of a schema that the LLM is shown; a longer one only constrains it."""


def chat_asked(body: ChatRequest, service: Service) -> Asked:
    """The last user's turn as a question, what was said before, and how to answer.

    Raises:
        ApiError: there is no such model, or something cannot be done.
    """
    pipeline = service.pipeline_of(body.model)
    turns, question, instructions = read_messages(body.messages)
    settings = _settings(service.engine, body)
    shape = _shape(body.response_format, pipeline)
    if isinstance(shape, Json) and len(schema := json.dumps(shape.schema)) <= MAX_SCHEMA_CHARACTERS:
        instructions = f"{instructions}\n\nWrite the answer as JSON of this schema: {schema}".strip()
    settings = replace(settings, shape=shape, instructions=instructions)
    wanted = body.telerag or TeleragOptions()
    return Asked(pipeline, question, settings, turns, bool(wanted.timeline), bool(wanted.fresh))


def completion_asked(body: CompletionRequest, service: Service) -> list[Asked]:
    """A question for each prompt.

    Raises:
        ApiError: there is no such model.
    """
    pipeline = service.pipeline_of(body.model)
    settings = _settings(service.engine, body)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    wanted = body.telerag or TeleragOptions()
    return [
        Asked(pipeline, prompt.strip(), settings, (), bool(wanted.timeline), bool(wanted.fresh)) for prompt in prompts
    ]


def read_messages(messages: Sequence[ChatMessage]) -> tuple[list[Turn], str, str]:
    """What was said before the last user's turn, that turn, and what system messages say; what follows it is left aside."""
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    turns: list[Turn] = []
    asked: str | None = None
    for message in messages[:last]:
        if message.role == "user":
            if asked is not None:
                turns.append(Turn(asked, ""))
            asked = message.text
        elif message.role == "assistant" and asked is not None:
            turns.append(Turn(asked, message.text))
            asked = None
    if asked is not None:
        turns.append(Turn(asked, ""))
    told = [message.text.strip() for message in messages if message.role in ("system", "developer")]
    return turns, messages[last].text.strip(), "\n\n".join(text for text in told if text)


def _settings(engine: Engine, body: ChatRequest | CompletionRequest) -> Settings:
    """The server's settings with what the request says otherwise. An answer takes half of the context at most: passages need room."""
    usual = engine.settings
    longest = min(body.longest or usual.max_tokens, engine.generator.context_tokens // 2)
    said: dict[str, Any] = {
        "max_tokens": longest,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": None if body.seed is None else body.seed % 2**32,
        "lookahead": None
        if body.telerag is None or body.telerag.lookahead is None
        else Lookahead(body.telerag.lookahead),
        "stop": tuple(body.stops),
    }
    return replace(usual, **{name: value for name, value in said.items() if value is not None})


def _shape(form: ResponseFormat | None, pipeline: Pipeline) -> Shape | None:
    if form is None or form.type == "text":
        return None
    if pipeline.name == PipelineName.FLARE:
        raise ApiError(
            400,
            "The pipeline flare writes sentence by sentence, and cannot be held to a schema.",
            param="response_format",
            code="unsupported_parameter",
        )
    shape = Json(ANY_OBJECT if form.json_schema is None else form.json_schema.schema_ or ANY_OBJECT)
    try:
        _made = shape.grammar  # so that what is wrong with it is said before the question waits
    except (
        TeleragError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        RecursionError,
        IndexError,
    ) as error:
        raise ApiError(
            400,
            f"The schema cannot be followed: {_short(error)}.",
            param="response_format.json_schema.schema",
            code="invalid_json_schema",
        ) from error
    return shape


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 120 else f"{text[:119]}…"
