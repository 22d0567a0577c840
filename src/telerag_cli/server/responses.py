"""Responses of OpenAI's routes: what the OpenAPI document says of them.

They are not OpenAI's own classes, which declare dozens of fields that are never sent here, lack those that are added
(``telerag``, file citations), widen the others, and change with the installed client.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Response(BaseModel):
    """A response, or part of one; it may hold more than is named here."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorDetail(_Response):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Response):
    error: ErrorDetail


class PromptDetails(_Response):
    cached_tokens: int


class Usage(_Response):
    """Tokens that the LLM read and wrote, over all its calls for an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class CitedFile(_Response):
    """A passage, and the characters of the answer that rest on it."""

    file_id: str
    filename: str
    index: int
    start_index: int
    end_index: int


class Citation(_Response):
    type: Literal["file_citation"]
    file_citation: CitedFile


class PassageReport(_Response):
    rank: int
    id: str
    title: str
    score: float
    text: str
    metadata: dict[str, Any]


class CallReport(_Response):
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


class CitationReport(_Response):
    """The passage that a stretch of the answer rests on."""

    id: str
    rank: int
    by: str
    start: int
    end: int


class LookaheadReport(_Response):
    """What predicted the lists, and how many lists and bytes were moved, found and missed."""

    mode: Literal["refined", "question", "off"]


class Report(_Response):
    """How an answer came about; ``standalone`` is the question as it was understood from the conversation."""

    pipeline: str
    question: str
    standalone: str | None = None
    queries: list[list[str]]
    passages: list[PassageReport]
    citations: list[CitationReport]
    stages: list[CallReport]
    timings: dict[str, float]
    lookahead: LookaheadReport
    dropped_passages: int
    timeline: Annotated[dict[str, Any] | None, Field(description="Present on request.")] = None


class AnswerMessage(_Response):
    role: Literal["assistant"]
    content: str
    refusal: None = None
    annotations: list[Citation]


class ChatChoice(_Response):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(_Response):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    telerag: Report


class CompletionChoice(_Response):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Completion(_Response):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(_Response):
    """A text's vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Response):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Response):
    """Vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(_Response):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Response):
    object: Literal["list"]
    data: list[Model]


class FileCounts(_Response):
    in_progress: int
    completed: int
    failed: int
    cancelled: int
    total: int


class VectorStore(_Response):
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


class VectorStoreList(_Response):
    object: Literal["list"]
    data: list[VectorStore]
    first_id: str | None
    last_id: str | None
    has_more: bool


class SearchContent(_Response):
    type: Literal["text"]
    text: str


class SearchResult(_Response):
    """A passage that was found; its attributes are the texts, numbers and booleans of its metadata."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, str | bool | float]
    content: list[SearchContent]


class VectorStoreSearchPage(_Response):
    """What was found, best first."""

    object: Literal["vector_store.search_results.page"]
    search_query: list[str]
    data: list[SearchResult]
    has_more: bool
    next_page: str | None
