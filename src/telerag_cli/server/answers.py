"""``POST /v1/chat/completions`` and ``POST /v1/completions``: from OpenAI's requests to answers, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from telerag_cli.config import AnswerConfig, Lookahead, PipelineName
from telerag_cli.engine.engine import Engine
from telerag_cli.errors import TeleragError
from telerag_cli.llm.shapes import Json, Shape
from telerag_cli.pipelines.base import ANSWER, Pipeline
from telerag_cli.pipelines.conversation import Turn
from telerag_cli.pipelines.together import together
from telerag_cli.server.errors import ApiError
from telerag_cli.server.replies import STREAMS_TOO, cited, event, json_response, note, note_outcomes, usage_of
from telerag_cli.server.requests import ChatMessage, ChatRequest, CompletionRequest, ResponseFormat, TeleragOptions
from telerag_cli.server.responses import ChatCompletion, Completion
from telerag_cli.server.service import AnswerRequest, AnswerResult, Service, Watcher
from telerag_cli.server.streams import News, StageText, streamed, until_gone

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
MAX_SCHEMA_CHARACTERS = 2000
"""Of a schema that the LLM is shown; a longer one only constrains it."""
BAD_SCHEMA = (TeleragError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError, IndexError)
"""What making a grammar of a schema may raise."""


def router(service: Service) -> APIRouter:
    """Return both routes."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, tags=["Answers"], responses=STREAMS_TOO)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last user's turn from the index, with the pipeline that the model's name chooses."""
        service.require_ready()
        asked = read_chat(body, service)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        chunks = ChatChunks({**head, "object": "chat.completion.chunk"}, 1, wants_usage=_wants_usage(body))

        def whole(outcomes: Sequence[AnswerResult]) -> dict[str, Any]:
            (outcome,) = outcomes
            answer, annotations = outcome.answered.answer, cited(outcome)
            message = {"role": "assistant", "content": answer, "refusal": None, "annotations": annotations}
            choice = _choice(0, {"message": message}, outcome.answered.finish_reason)
            return {**head, "object": "chat.completion", "choices": [choice], "telerag": outcome.about}

        events = bool(body.telerag and body.telerag.events)
        return await _respond(request, service, body, [asked], chunks, whole, events=events)

    @routes.post("/v1/completions", response_model=Completion, tags=["Answers"], responses=STREAMS_TOO)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Answer each prompt as a question, from the index."""
        service.require_ready()
        asked = read_completion(body, service)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = body.model
        chunks = CompletionChunks(head, len(asked), wants_usage=_wants_usage(body))

        def whole(outcomes: Sequence[AnswerResult]) -> dict[str, Any]:
            choices = [
                _choice(index, {"text": outcome.answered.answer}, outcome.answered.finish_reason)
                for index, outcome in enumerate(outcomes)
            ]
            return {**head, "choices": choices, "telerag": [outcome.about for outcome in outcomes]}

        return await _respond(request, service, body, asked, chunks, whole, events=False)

    return routes


async def _respond(
    request: Request,
    service: Service,
    body: ChatRequest | CompletionRequest,
    asked: Sequence[AnswerRequest],
    chunks: ChatChunks | CompletionChunks,
    whole: Callable[[Sequence[AnswerResult]], dict[str, Any]],
    *,
    events: bool,
) -> Response:
    """Have the questions answered, and say so in pieces (``chunks``) or at the end (``whole``)."""
    note(request, model=body.model, stream=bool(body.stream))
    if body.stream:
        return await streamed(request, service, asked, chunks, events=events)
    outcomes = await until_gone(request, together(service.answer(each, Watcher()) for each in asked))
    note_outcomes(request, outcomes)
    answer = whole(outcomes)
    report = answer.pop("telerag")  # comes last, after what OpenAI's clients look for
    return json_response({**answer, "usage": usage_of(outcomes), "telerag": report})


def read_chat(body: ChatRequest, service: Service) -> AnswerRequest:
    """The last user's turn as a question, what was said before, and how to answer.

    Raises:
        ApiError: there is no such model, or something cannot be done.
    """
    pipeline = service.pipeline_of(body.model)
    turns, question, instructions = read_messages(body.messages)
    shape = _shape(body.response_format, pipeline)
    if isinstance(shape, Json) and len(schema := json.dumps(shape.schema)) <= MAX_SCHEMA_CHARACTERS:
        instructions = f"{instructions}\n\nWrite the answer as JSON of this schema: {schema}".strip()
    settings = replace(_settings(service.engine, body), shape=shape, instructions=instructions)
    wanted = body.telerag or TeleragOptions()
    return AnswerRequest(pipeline, question, settings, turns, bool(wanted.timeline), bool(wanted.fresh))


def read_completion(body: CompletionRequest, service: Service) -> list[AnswerRequest]:
    """A question for each prompt; raises ApiError if there is no such model."""
    pipeline = service.pipeline_of(body.model)
    settings = _settings(service.engine, body)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    wanted = body.telerag or TeleragOptions()
    return [
        AnswerRequest(pipeline, prompt.strip(), settings, (), bool(wanted.timeline), bool(wanted.fresh))
        for prompt in prompts
    ]


def read_messages(messages: Sequence[ChatMessage]) -> tuple[list[Turn], str, str]:
    """The turns before the last user's, that turn, and what system messages say; what follows it is left aside."""
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


def _settings(engine: Engine, body: ChatRequest | CompletionRequest) -> AnswerConfig:
    """The server's settings, unless the request says otherwise; an answer leaves half of the context to passages."""
    usual = engine.config
    mode = body.telerag.lookahead if body.telerag else None
    said: dict[str, Any] = {
        "max_tokens": min(body.token_limit or usual.max_tokens, engine.generator.context_tokens // 2),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": None if body.seed is None else body.seed % 2**32,
        "lookahead": None if mode is None else Lookahead(mode),
        "stop": tuple(body.stops),
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
        shape.gbnf()  # so that what is wrong with it is said before the question waits
    except BAD_SCHEMA as error:
        text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        message = f"The schema cannot be followed: {text if len(text) <= 120 else f'{text[:119]}…'}."
        param = "response_format.json_schema.schema"
        raise ApiError(400, message, param=param, code="invalid_json_schema") from error
    return shape


def _wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _choice(index: int, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


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
        self._shown = [""] * prompts

    def begin(self) -> bytes:
        """See `Chunks`."""
        return b""

    def news(self, news: News) -> bytes:
        """See `Chunks`."""
        if not isinstance(news, StageText) or news.stage != ANSWER:
            return b""
        more = self._more(news.index, news.text)
        return self._chunk(news.index, self._piece(more)) if more else b""

    def end(self, outcomes: Sequence[AnswerResult]) -> bytes:
        """See `Chunks`."""
        rests = [self._more(index, outcome.answered.answer) for index, outcome in enumerate(outcomes)]
        data = b"".join(self._last(index, rests[index], outcome) for index, outcome in enumerate(outcomes))
        if self._wants_usage:
            data += event({**self._head, "choices": [], "usage": usage_of(outcomes)})
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
        return self._chunk(index, self._piece(rest), outcome.answered.finish_reason, telerag=outcome.about)

    def _chunk(self, index: int, content: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        usage = {"usage": None} if self._wants_usage else {}
        return event({**self._head, "choices": [_choice(index, content, finish_reason)], **usage, **more})


class ChatChunks(CompletionChunks):
    """`Chunks` of one conversation's answer, and of what happens before it if a client wants to know."""

    def begin(self) -> bytes:
        """See `Chunks`."""
        return self._chunk(0, {"delta": {"role": "assistant", "content": ""}})

    def news(self, news: News) -> bytes:
        """See `Chunks`."""
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
        annotations, finish_reason = {"delta": {"annotations": cited(outcome)}}, outcome.answered.finish_reason
        return data + self._chunk(index, annotations, finish_reason, telerag=outcome.about)
