"""Requests of OpenAI's routes, as this server takes them; the OpenAPI document is made from these classes.

An option of OpenAI's that this server cannot honour is accepted with the values that ask for nothing (`OnlyValues`), so
that clients that send every option work, and refused with any other.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic_core import PydanticCustomError

from telerag_cli.config import PipelineName
from telerag_cli.server.fields import (
    NOT_BLANK,
    UNUSABLE,
    AnyText,
    Integer,
    LenientModel,
    No,
    NoItems,
    NotEmpty,
    NoTool,
    Null,
    One,
    OneOrMany,
    OnlyValues,
    Positive,
    StrictModel,
    Text,
    Zero,
    check_no_tokens,
    to_int,
)
from telerag_cli.server.filters import BoundedFilter

MAX_PROMPTS = 16
MAX_TEXTS = 2048
MAX_RESULTS = 50
DEFAULT_RESULTS = 10

MAX_VALUES = 10_000
"""Values in the arrays and objects of a request; some milliseconds' work."""

NOT_AN_OBJECT = "invalid_json_schema"
"""A kind of error that pydantic has no name for, and OpenAI's code."""


class TextPart(LenientModel):
    """A part of a message."""

    type: Literal["text"]
    text: AnyText


def _check_some_text(parts: list[TextPart]) -> list[TextPart]:
    if not any(re.search(NOT_BLANK, part.text) for part in parts):
        raise PydanticCustomError(UNUSABLE, "it is empty")
    return parts


Parts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
PartsWithText = Annotated[
    Parts,
    AfterValidator(_check_some_text),
    Field(json_schema_extra={"contains": {"properties": {"text": {"pattern": NOT_BLANK}}}}),
]


class _Message(LenientModel):
    role: str
    content: str | list[TextPart] | None
    name: str | None = None

    @property
    def text(self) -> str:
        """All of its text; parts are joined by line ends."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class InstructionMessage(_Message):
    """Instructions for the LLM in addition to those of its pipeline."""

    role: Literal["system", "developer"]
    content: OneOrMany[AnyText, Parts]


class UserMessage(_Message):
    """A question."""

    role: Literal["user"]
    content: OneOrMany[Text, PartsWithText]


class AssistantMessage(_Message):
    """An earlier answer as the client received it; everything but its text is ignored."""

    role: Literal["assistant"]
    content: OneOrMany[AnyText, Parts] | None = None
    refusal: str | None = None
    annotations: list[JsonValue] | None = None
    audio: Null = None
    function_call: Null = None
    tool_calls: NoItems = None


ChatMessage: TypeAlias = Annotated[InstructionMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(StrictModel):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: Annotated[
        bool | None, Field(description="Whether each chunk says how many tokens were read and written so far.")
    ] = None
    include_obfuscation: Annotated[bool | None, Field(description="Accepted; nothing is added.")] = None


class TeleragOptions(StrictModel):
    """Options that OpenAI's protocol does not have."""

    lookahead: Annotated[
        Literal["refined", "question", "off"] | None,
        Field(description="What predicts the lists to prefetch while the LLM writes."),
    ] = None
    timeline: Annotated[bool | None, Field(description="Whether the answer says when each step ran.")] = None
    fresh: Annotated[
        bool | None,
        Field(
            description="Whether cached prompts and lists of earlier questions are dropped first, so that times can be "
            "compared; the next questions of others miss them too."
        ),
    ] = None
    events: Annotated[
        bool | None, Field(description="Whether a stream reports stages, the queue and passages too.")
    ] = None


def _check_object(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if schema.get("type") != "object":
        raise PydanticCustomError(NOT_AN_OBJECT, "its type must be 'object'")
    return schema


ObjectSchema = Annotated[
    dict[str, JsonValue],
    AfterValidator(_check_object),
    Field(json_schema_extra={"properties": {"type": {"const": "object"}}, "required": ["type"]}),
]


class JsonSchema(StrictModel):
    """A schema that the answer follows."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[ObjectSchema | None, Field(alias="schema")] = None
    strict: bool | None = None


class PlainFormat(StrictModel):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]
    json_schema: ClassVar[None] = None


class SchemaFormat(StrictModel):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat: TypeAlias = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]

PIPELINES: list[JsonValue] = [name.model for name in PipelineName]


class _AnswerRequest(StrictModel):
    """Options of both routes that answer."""

    model: Annotated[str, Field(description="A pipeline.", json_schema_extra={"enum": PIPELINES})]
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Integer | None = None
    stop: OneOrMany[NotEmpty, Annotated[list[NotEmpty], Field(max_length=4)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    telerag: TeleragOptions | None = None

    n: One = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[Any, OnlyValues(None, {})] = None
    user: str | None = None

    @property
    def extras(self) -> TeleragOptions:
        """The options that OpenAI's protocol does not have."""
        return self.telerag or TeleragOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens of the answer, if the client gives one."""
        return self.max_tokens


def _check_question(messages: list[ChatMessage]) -> list[ChatMessage]:
    if not any(message.role == "user" for message in messages):
        raise PydanticCustomError(UNUSABLE, "no message is the user's, so there is no question")
    return messages


_FLARE_IN_JSON: dict[str, JsonValue] = {
    "properties": {
        "model": {"const": PipelineName.FLARE.model},
        "response_format": {
            "type": "object",
            "properties": {"type": {"enum": ["json_object", "json_schema"]}},
            "required": ["type"],
        },
    },
    "required": ["model", "response_format"],
}


class ChatRequest(_AnswerRequest):
    """A conversation; its last user message is answered."""

    # What each pipeline can do is decided where pipelines are known; the document must say so all the same.
    model_config = ConfigDict(json_schema_extra={"not": _FLARE_IN_JSON})

    messages: Annotated[
        list[ChatMessage],
        Field(
            min_length=1,
            fail_fast=True,
            json_schema_extra={"contains": {"properties": {"role": {"const": "user"}}, "required": ["role"]}},
        ),
        AfterValidator(_check_question),
    ]
    max_completion_tokens: Positive | None = None
    response_format: ResponseFormat | None = None

    logprobs: No = None
    top_logprobs: Zero = None
    tools: NoItems = None
    tool_choice: NoTool = None
    functions: NoItems = None
    function_call: NoTool = None
    modalities: Annotated[Any, OnlyValues(None, ["text"])] = None
    audio: Null = None
    prediction: Null = None
    moderation: Null = None
    web_search_options: Null = None
    reasoning_effort: Annotated[Any, OnlyValues(None, "none")] = None
    verbosity: Annotated[Any, OnlyValues(None, "medium")] = None
    service_tier: Annotated[Any, OnlyValues(None, "auto", "default")] = None
    store: No = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, JsonValue] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens of the answer, if the client gives one; ``max_tokens`` is the older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_AnswerRequest):
    """Questions, each answered by itself."""

    prompt: Annotated[
        OneOrMany[Text, Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]],
        BeforeValidator(check_no_tokens),
    ]

    best_of: One = None
    echo: No = None
    logprobs: Null = None
    suffix: Annotated[Any, OnlyValues(None, "")] = None


class EmbeddingRequest(StrictModel):
    """Texts to embed as the index's questions are."""

    model: Annotated[str, Field(description="The embedder's name, as `/v1/models` has it.")]
    input: Annotated[
        OneOrMany[NotEmpty, Annotated[list[NotEmpty], Field(min_length=1, max_length=MAX_TEXTS)]],
        BeforeValidator(check_no_tokens),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Positive, Field(description="Only the model's own number is possible.")] | None = None
    user: str | None = None


class RankingOptions(StrictModel):
    """How results are ranked: always by their scores."""

    ranker: Literal["auto", "default-2024-11-15", "none"] | None = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    hybrid_search: Null = None


class VectorSearchRequest(StrictModel):
    """Texts to find passages for; with several, the best over all of them."""

    query: OneOrMany[NotEmpty, Annotated[list[NotEmpty], Field(min_length=1, max_length=MAX_PROMPTS)]]
    max_num_results: Annotated[int, Field(ge=1, le=MAX_RESULTS), BeforeValidator(to_int)] = DEFAULT_RESULTS
    filters: BoundedFilter | None = None
    ranking_options: RankingOptions | None = None
    rewrite_query: No = None

    @property
    def queries(self) -> list[str]:
        """The texts."""
        return [self.query] if isinstance(self.query, str) else self.query
