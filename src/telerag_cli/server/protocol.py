"""Requests and responses of OpenAI's routes as this server has them, and what a client is told of a request that is wrong.

The OpenAPI document is made from these classes, so what they say of a field is what holds for it. Requests are taken
strictly: a number in quotes is no number. An option of OpenAI's that cannot be had here is taken with the values that
    ask for
nothing (`Only`), so that clients which send every option can be used, and refused with any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from telerag_cli.pipelines.registry import PipelineName
from telerag_cli.server.errors import ApiError

MAX_PROMPTS = 16
MAX_TEXTS = 2048
MAX_RESULTS = 50
DEFAULT_RESULTS = 10
FILTER_DEPTH = 8
FILTER_PARTS = 32
FILTER_CLAUSES = 256
SHOWN = 80
"""Characters of a client's own text in an error, at most."""

NOT_BLANK = r"[^\s\x1c-\x1f\x85\ufeff]"
"""A character that is no white space, whatever a dialect of regular expressions takes for such."""

UNSUPPORTED, NO_OBJECT, NO_TEXT, UNUSABLE = ("unsupported_parameter", "invalid_json_schema", "no_text", "unusable")
"""Kinds of errors that pydantic has no name for; the first two are OpenAI's codes too."""

T = TypeVar("T")


# Requests


class _Body(BaseModel):
    """Part of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class _Request(_Body):
    """A request, which must be text through and through: JSON may write half of a surrogate pair, and no model can read it."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        if isinstance(data, dict):
            try:
                json.dumps(data, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise PydanticCustomError(NO_TEXT, "The request holds half of a surrogate pair.") from None
            except RecursionError:
                raise PydanticCustomError(NO_TEXT, "The request is nested too deep.") from None
        return data


class Only:
    """An option that asks for nothing with these values, and for what cannot be had here with others."""

    def __init__(self, *values: JsonValue) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, _schema: core_schema.CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.values)}

    def _check(self, value: Any) -> Any:
        # To Python, true is 1.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values):
            allowed = " or ".join(json.dumps(one) for one in self.values)
            raise PydanticCustomError(UNSUPPORTED, "leave it out, or give {allowed}", {"allowed": allowed})
        return value


def _not_blank(text: str) -> str:
    if not re.search(NOT_BLANK, text):
        raise PydanticCustomError(UNUSABLE, "it is empty")
    return text


def _no_tokens(value: T) -> T:
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise PydanticCustomError(UNUSABLE, "token numbers are not taken; send text")
    return value


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _of_object(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if schema.get("type") != "object":
        raise PydanticCustomError(NO_OBJECT, "its type must be 'object'")
    return schema


def _shape(value: object) -> str:
    return "many" if isinstance(value, list) else "one"


Text = Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": NOT_BLANK})]
NotEmpty = Annotated[str, Field(min_length=1)]
Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
One = Tag("one")
Many = Tag("many")
Either = Discriminator(_shape)
"""One thing or a list of them; what is wrong is said of the one that was sent."""

Nothing = Annotated[Any, Only(None)]
Zero = Annotated[Any, Only(None, 0)]
No = Annotated[Any, Only(None, False)]


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


Parts = Annotated[list[TextPart], Field(min_length=1)]


def _joined(content: str | list[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


class InstructionMessage(_Body):
    """What the LLM is told beside what its pipeline tells it."""

    role: Literal["system", "developer"]
    content: Annotated[Annotated[str, One] | Annotated[Parts, Many], Either]
    name: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return _joined(self.content)


class UserMessage(_Body):
    """A question."""

    role: Literal["user"]
    content: Annotated[Annotated[Text, One] | Annotated[Parts, Many], Either]
    name: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return _joined(self.content)


class AssistantMessage(_Body):
    """An earlier answer, as a client got it: what it carries beside its text is left aside."""

    role: Literal["assistant"]
    content: Annotated[Annotated[str, One] | Annotated[Parts, Many], Either] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[JsonValue] | None = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Annotated[Any, Only(None, [])] = None

    @property
    def text(self) -> str:
        """All of its text."""
        return _joined(self.content)


ChatMessage: TypeAlias = Annotated[InstructionMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Body):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Field(description="Accepted; nothing is added.")] = None


class TeleragOptions(_Body):
    """What OpenAI has no option for."""

    lookahead: Annotated[
        Literal["refined", "question", "off"] | None,
        Field(description="What predicts the lists to move while the LLM writes."),
    ] = None
    timeline: Annotated[bool | None, Field(description="Whether the answer says when what happened.")] = None
    fresh: Annotated[
        bool | None,
        Field(
            description="Whether prompts and lists that are kept of earlier questions are dropped before, so that times can be compared; "
            "others' next questions miss them too."
        ),
    ] = None
    events: Annotated[bool | None, Field(description="Whether a stream tells of stages, queue and passages too.")] = (
        None
    )


ObjectSchema = Annotated[
    dict[str, JsonValue],
    AfterValidator(_of_object),
    Field(json_schema_extra={"properties": {"type": {"const": "object"}}, "required": ["type"]}),
]


class JsonSchema(_Body):
    """A schema that the answer follows."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[ObjectSchema | None, Field(alias="schema")] = None
    strict: bool | None = None


class PlainFormat(_Body):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]

    @property
    def json_schema(self) -> None:
        """None in particular."""
        return


class SchemaFormat(_Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat: TypeAlias = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]

PIPELINES: list[JsonValue] = [name.model for name in PipelineName]
Stops = Annotated[Annotated[NotEmpty, One] | Annotated[list[NotEmpty], Field(max_length=4), Many], Either]


class _Answering(_Request):
    """Options of both ways to ask for an answer."""

    model: Annotated[str, Field(description="A pipeline.", json_schema_extra={"enum": PIPELINES})]
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Whole | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    telerag: TeleragOptions | None = None

    n: Annotated[Any, Only(None, 1)] = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[Any, Only(None, {})] = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def longest(self) -> int | None:
        """Tokens of the answer at most, if the client says."""
        return self.max_tokens


def _asks(messages: list[ChatMessage]) -> list[ChatMessage]:
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


class ChatRequest(_Answering):
    """A conversation, of which the last message, the user's, is answered."""

    # Which pipeline can do what is decided where pipelines are known; the document must say so all the same.
    model_config = ConfigDict(json_schema_extra={"not": _FLARE_IN_JSON})

    messages: Annotated[
        list[ChatMessage],
        Field(
            min_length=1,
            json_schema_extra={"contains": {"properties": {"role": {"const": "user"}}, "required": ["role"]}},
        ),
        AfterValidator(_asks),
    ]
    max_completion_tokens: Positive | None = None
    response_format: ResponseFormat | None = None

    logprobs: No = None
    top_logprobs: Zero = None
    tools: Annotated[Any, Only(None, [])] = None
    tool_choice: Annotated[Any, Only(None, "none", "auto")] = None
    functions: Annotated[Any, Only(None, [])] = None
    function_call: Annotated[Any, Only(None, "none", "auto")] = None
    modalities: Annotated[Any, Only(None, ["text"])] = None
    audio: Nothing = None
    prediction: Nothing = None
    moderation: Nothing = None
    web_search_options: Nothing = None
    reasoning_effort: Annotated[Any, Only(None, "none")] = None
    verbosity: Annotated[Any, Only(None, "medium")] = None
    service_tier: Annotated[Any, Only(None, "auto", "default")] = None
    store: No = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, JsonValue] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @property
    def longest(self) -> int | None:
        """Tokens of the answer at most, if the client says; ``max_tokens`` is the older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Answering):
    """Questions, each answered by itself."""

    prompt: Annotated[
        Annotated[Text, One] | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Many],
        Either,
        BeforeValidator(_no_tokens),
    ]

    best_of: Annotated[Any, Only(None, 1)] = None
    echo: No = None
    logprobs: Nothing = None
    suffix: Annotated[Any, Only(None, "")] = None


class EmbeddingRequest(_Request):
    """Texts to embed as the index's questions are."""

    model: Annotated[str, Field(description="The embedder's name, as `/v1/models` has it.")]
    input: Annotated[
        Annotated[NotEmpty, One] | Annotated[list[NotEmpty], Field(min_length=1, max_length=MAX_TEXTS), Many],
        Either,
        BeforeValidator(_no_tokens),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Positive, Field(description="Only the model's own number can be had.")] | None = None
    user: str | None = None


Scalar = str | bool | int | float
"""What an attribute may be."""


class Equality(_Body):
    """Whether an attribute is this value. A passage that has no such attribute is not equal."""

    type: Literal["eq", "ne"]
    key: NotEmpty
    value: Scalar


class Order(_Body):
    """How an attribute compares with this value: a number with a number, a text with a text by its characters."""

    type: Literal["gt", "gte", "lt", "lte"]
    key: NotEmpty
    value: str | int | float


class Membership(_Body):
    """Whether an attribute is one of these values."""

    type: Literal["in", "nin"]
    key: NotEmpty
    value: Annotated[list[Scalar], Field(min_length=1)]


class Compound(_Body):
    """Whether all, or any, of these hold."""

    type: Literal["and", "or"]
    filters: Annotated[list[Filter], Field(min_length=1, max_length=FILTER_PARTS)]


Filter: TypeAlias = Annotated[Equality | Order | Membership | Compound, Field(discriminator="type")]


def _clauses(some: Filter, depth: int = 1) -> Iterator[int]:
    """How deep each clause of a filter lies."""
    yield depth
    if isinstance(some, Compound):
        for each in some.filters:
            yield from _clauses(each, depth + 1)


def _bounded(some: Filter) -> Filter:
    depths = list(_clauses(some))
    if max(depths) > FILTER_DEPTH or len(depths) > FILTER_CLAUSES:
        raise PydanticCustomError(
            UNUSABLE,
            "it has {clauses} clauses, {depth} deep; at most {most} clauses, {deepest} deep, are taken",
            {"clauses": len(depths), "depth": max(depths), "most": FILTER_CLAUSES, "deepest": FILTER_DEPTH},
        )
    return some


class RankingOptions(_Body):
    """How results are ranked: always by their scores."""

    ranker: Literal["auto", "default-2024-11-15", "none"] | None = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    hybrid_search: Nothing = None


class VectorSearchRequest(_Request):
    """Texts for which passages are wanted; of several, the best over all of them."""

    query: Annotated[
        Annotated[NotEmpty, One] | Annotated[list[NotEmpty], Field(min_length=1, max_length=MAX_PROMPTS), Many], Either
    ]
    max_num_results: Annotated[int, Field(ge=1, le=MAX_RESULTS), BeforeValidator(_whole)] = DEFAULT_RESULTS
    filters: (
        Annotated[
            Filter,
            AfterValidator(_bounded),
            Field(description=f"On attributes; at most {FILTER_CLAUSES} clauses, {FILTER_DEPTH} deep."),
        ]
        | None
    ) = None
    ranking_options: RankingOptions | None = None
    rewrite_query: No = None

    @property
    def queries(self) -> list[str]:
        """The texts."""
        return [self.query] if isinstance(self.query, str) else self.query


Compound.model_rebuild()
VectorSearchRequest.model_rebuild()


# Responses


class _Answer(BaseModel):
    """A response, or part of one; there may be more in it than is named here."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """A response that is an error."""

    error: ErrorDetail


class PromptDetails(_Answer):
    """What is known of the prompts' tokens."""

    cached_tokens: int


class Usage(_Answer):
    """Tokens that the LLM read and wrote, over all its calls for an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class CitedFile(_Answer):
    """A passage, and the stretch of the answer that rests on it, in characters."""

    file_id: str
    filename: str
    index: int
    start_index: int
    end_index: int


class Citation(_Answer):
    """An annotation of an answer."""

    type: Literal["file_citation"]
    file_citation: CitedFile


class Passage(_Answer):
    """A passage that an answer was written from."""

    rank: int
    id: str
    title: str
    score: float
    text: str
    metadata: dict[str, Any]


class CallReport(_Answer):
    """One call of the LLM."""

    name: str
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float


class CitationReport(_Answer):
    """Which passage a stretch of the answer rests on."""

    id: str
    rank: int
    by: str
    start: int
    end: int


class LookaheadReport(_Answer):
    """What predicted the lists, and how many lists and bytes were moved, found and missed."""

    mode: Literal["refined", "question", "off"]


class Report(_Answer):
    """How an answer came about."""

    pipeline: str
    question: str
    standalone: Annotated[str | None, Field(description="The question as it was understood from the conversation.")] = (
        None
    )
    queries: list[list[str]]
    passages: list[Passage]
    citations: list[CitationReport]
    stages: list[CallReport]
    timings: dict[str, float]
    lookahead: LookaheadReport
    dropped_passages: int
    timeline: Annotated[dict[str, Any] | None, Field(description="If it was asked for.")] = None


class AnswerMessage(_Answer):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None
    annotations: list[Citation]


class ChatChoice(_Answer):
    """An answer, and why it ended."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(_Answer):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    telerag: Report


class CompletionChoice(_Answer):
    """The answer to one prompt."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Completion(_Answer):
    """The answers to prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(_Answer):
    """A text's vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Answer):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Answer):
    """Vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(_Answer):
    """What may be named as a request's model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Answer):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class FileCounts(_Answer):
    """How many passages there are."""

    in_progress: int
    completed: int
    failed: int
    cancelled: int
    total: int


class VectorStore(_Answer):
    """The index, whose passages are its files."""

    id: str
    object: Literal["vector_store"]
    created_at: int
    name: str
    usage_bytes: int
    file_counts: FileCounts
    status: Literal["completed"]
    expires_after: None = None
    expires_at: None = None
    last_active_at: int | None
    metadata: dict[str, str]


class VectorStoreList(_Answer):
    """All vector stores: there is one."""

    object: Literal["list"]
    data: list[VectorStore]
    first_id: str | None
    last_id: str | None
    has_more: bool


class SearchContent(_Answer):
    """A passage's text."""

    type: Literal["text"]
    text: str


class SearchResult(_Answer):
    """A passage that was found. Of its metadata, texts, numbers and booleans are its attributes."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, str | bool | float]
    content: list[SearchContent]


class VectorStoreSearchPage(_Answer):
    """What was found, best first."""

    object: Literal["vector_store.search_results.page"]
    search_query: list[str]
    data: list[SearchResult]
    has_more: bool
    next_page: str | None


# What is wrong with a request

_WANTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
_BOUNDS = {"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")}
_LENGTHS = {
    "too_short": ("min_length", "at least", "items"),
    "too_long": ("max_length", "at most", "items"),
    "string_too_short": ("min_length", "at least", "characters"),
    "string_too_long": ("max_length", "at most", "characters"),
}
_CODES = {
    "missing": "missing_required_parameter",
    "union_tag_not_found": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    UNSUPPORTED: UNSUPPORTED,
    NO_OBJECT: NO_OBJECT,
    **dict.fromkeys(_WANTED, "invalid_type"),
}
"""OpenAI's ``code`` for pydantic's kinds of errors; ``invalid_value`` for all others."""


def invalid(error: RequestValidationError) -> ApiError:
    """What a client is told of a request that is not as it should be: the first thing that is wrong, in OpenAI's words.

    Names that nobody knows come before anything else, for they are often a misspelling of what is then missing.
    """
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return ApiError(400, f"The request's body is not valid JSON: {shortened(reason)}.")
    if first["loc"] == ("body",):
        return ApiError(400, _no_object(first, error.body))
    unknown = [each["loc"][1] for each in errors if each["type"] == "extra_forbidden" and len(each["loc"]) == 2]
    if unknown:
        names = shortened(", ".join(unknown))
        what = "argument" if len(unknown) == 1 else "arguments"
        return ApiError(400, f"Unrecognized request {what} supplied: {names}", param=names, code="unknown_parameter")
    param = _path(first, error.body)
    # Of alternatives, each says what it would have taken.
    kinds = [each["type"] for each in errors if _path(each, error.body) == param]
    param = shortened(param)
    return ApiError(400, _said(first, param, kinds), param=param, code=_CODES.get(first["type"], "invalid_value"))


def shortened(text: str) -> str:
    """A client's own text as it is told back: 80 characters at most, and all of them characters."""
    text = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
    return text.encode(errors="backslashreplace").decode()


def _no_object(error: Mapping[str, Any], body: Any) -> str:
    """What to say when the body as a whole is not what it should be."""
    if error["type"] == NO_TEXT:
        return str(error["msg"])
    if error["type"] == "missing" or body is None:
        return "The request has no body; it must be a JSON object."
    if isinstance(body, bytes):
        return "The request's body must be JSON, and its header Content-Type must be application/json."
    return f"The request's body must be a JSON object, and it is {_kind(body)}."


def _path(error: Mapping[str, Any], body: Any) -> str:
    """``messages.0.content``: of pydantic's location, those parts that are names and places in the request itself."""
    loc = list(error["loc"][1:])
    if error["loc"][0] != "body":
        return ".".join(map(str, loc))
    # Only what is missing is not there; the other parts are names of alternatives.
    missing = [str(loc.pop())] if error["type"] == "missing" else []
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        missing = [error["ctx"]["discriminator"].strip("'")]
    parts, value = [], body
    for part in loc:
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            value = value[part]
            parts.append(str(part))
    return ".".join(parts + missing)


def _said(error: Mapping[str, Any], param: str, kinds: Sequence[str]) -> str:
    """What is wrong with a parameter; ``kinds`` are those of all errors that there are of it."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind in ("missing", "union_tag_not_found"):
        return f"Missing required parameter: '{param}'."
    if kind == "extra_forbidden":
        return f"Unknown parameter: '{param}'."
    if kind == UNSUPPORTED:
        return f"Unsupported parameter: '{param}' cannot be {_shown(value)} here; {error['msg']}."
    if kind == "literal_error":
        return f"Invalid value: {_shown(value)} for '{param}'. Supported values are: {context['expected']}."
    if kind == "union_tag_invalid":
        return (
            f"Invalid value: {_shown(context['tag'])} for '{param}'. Supported values are: {context['expected_tags']}."
        )
    if kind in _WANTED:
        wanted = list(dict.fromkeys(_WANTED[each] for each in kinds if each in _WANTED))
        wanted = [each for each in wanted if each != "an integer" or "a number" not in wanted]
        return f"Invalid type for '{param}': expected {' or '.join(wanted)}, but got {_kind(value)} instead."
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"Invalid '{param}': it is {_shown(value)} and must be {words} {_shown(context[name])}."
    if kind in _LENGTHS:
        name, words, things = _LENGTHS[kind]
        return f"Invalid '{param}': it has {len(value):,} {things} and must have {words} {context[name]:,}."
    plain = {
        "string_pattern_mismatch": f"it must match {context.get('pattern')}",
        "recursion_depth_exceeded": "it is nested too deep",
    }
    return f"Invalid '{param}': {plain.get(kind, shortened(error['msg']))}."


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names: list[tuple[type, str]] = [
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (list, "an array"),
        (dict, "an object"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def _shown(value: Any) -> str:
    """A value of the client's, short enough to be told back."""
    if isinstance(value, str):
        return f"'{shortened(value)}'"
    return _kind(value) if isinstance(value, list | dict) and value else shortened(json.dumps(value))
