"""Requests as OpenAI's clients send them: what is taken, what is refused, and in which words."""

import json

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from openai.types import completion_create_params, embedding_create_params, vector_store_search_params
from openai.types.chat import completion_create_params as chat_create_params

from telerag_cli.config import Lookahead
from telerag_cli.pipelines.registry import PipelineName
from telerag_cli.server import protocol
from telerag_cli.server.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ErrorBody,
    TeleragOptions,
    VectorSearchRequest,
    invalid,
)

USER = {"role": "user", "content": "Where do owls live?"}
CHAT = {"model": "telerag-naive", "messages": [USER]}
PROMPT = {"model": "telerag-naive", "prompt": "Where do owls live?"}
INPUT = {"model": "minilm", "input": "owls"}
QUERY = {"query": "owls"}
EQUAL = {"type": "eq", "key": "animal", "value": "owls"}
HALF = "\ud800"


@pytest.fixture(scope="module")
def client():
    app = FastAPI()

    @app.exception_handler(RequestValidationError)
    async def refused(_request, error):
        return invalid(error).response()

    @app.post("/chat")
    async def chat(body: ChatRequest):
        return [message.text for message in body.messages]

    @app.post("/complete")
    async def complete(body: CompletionRequest):
        return body.prompt

    @app.post("/embed")
    async def embed(body: EmbeddingRequest):
        return body.input

    @app.post("/search")
    async def search(body: VectorSearchRequest):
        return body.queries

    @app.get("/list")
    async def listed(limit: int = 1):
        return limit

    with TestClient(app) as client:
        yield client


def error_of(response):
    assert response.status_code == 400, response.text
    ErrorBody.model_validate(response.json())
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    return error


def nested(depth):
    return EQUAL if depth == 1 else {"type": "and", "filters": [nested(depth - 1)]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "chat",
            {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "tools": []},
        ),
        (
            "chat",
            {"tool_choice": "none", "parallel_tool_calls": True, "user": "me", "metadata": {"a": "b"}, "store": False},
        ),
        (
            "chat",
            {
                "service_tier": "auto",
                "modalities": ["text"],
                "reasoning_effort": None,
                "verbosity": None,
                "prediction": None,
            },
        ),
        (
            "chat",
            {
                "temperature": 0,
                "top_p": 1,
                "seed": -(2**63) - 1,
                "max_tokens": 1,
                "max_completion_tokens": 7.0,
                "stream": None,
            },
        ),
        ("chat", {"stop": None}),
        ("chat", {"stop": "\n"}),
        ("chat", {"stop": ["a", "b", "c", "d"]}),
        ("chat", {"stop": []}),
        ("chat", {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}),
        ("chat", {"response_format": {"type": "text"}}),
        ("chat", {"response_format": {"type": "json_object"}}),
        (
            "chat",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a_1", "schema": {"type": "object"}}}},
        ),
        ("chat", {"telerag": {"lookahead": "off", "timeline": True, "events": None}}),
        ("chat", {"telerag": None}),
        ("complete", {"best_of": 1, "echo": False, "suffix": None, "logprobs": None, "n": 1, "prompt": ["a"] * 16}),
        ("embed", {"encoding_format": "base64", "dimensions": 384, "user": "me", "input": ["a"] * 2048}),
        ("search", {"max_num_results": 50, "rewrite_query": False, "query": ["a"] * 16}),
        ("search", {"ranking_options": {"ranker": "auto", "score_threshold": 0.5}}),
        ("search", {"filters": nested(8)}),
        (
            "search",
            {
                "filters": {
                    "type": "or",
                    "filters": [EQUAL, {"type": "nin", "key": "n", "value": [1, "x", True, 2.5]}] * 16,
                }
            },
        ),
    ],
)
def test_what_clients_send_is_taken(client, path, body):
    base = {"chat": CHAT, "complete": PROMPT, "embed": INPUT, "search": QUERY}[path]
    response = client.post(f"/{path}", json=base | body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "body", "param", "code", "words"),
    [
        ("chat", {"n": 2}, "n", "unsupported_parameter", "cannot be 2 here; leave it out, or give null or 1"),
        ("chat", {"n": True}, "n", "unsupported_parameter", "true"),
        ("chat", {"logprobs": True}, "logprobs", "unsupported_parameter", "or false"),
        (
            "chat",
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools",
            "unsupported_parameter",
            "an array",
        ),
        ("chat", {"audio": {"voice": "alloy"}}, "audio", "unsupported_parameter", "an object"),
        ("chat", {"frequency_penalty": 0.1}, "frequency_penalty", "unsupported_parameter", "0.1"),
        ("chat", {"top_k": 5}, "top_k", "unknown_parameter", "Unrecognized request argument supplied: top_k"),
        (
            "chat",
            {"top_k": 5, "model": 1, "a": 1},
            "top_k, a",
            "unknown_parameter",
            "Unrecognized request arguments supplied: top_k, a",
        ),
        ("chat", {"temperature": 2.5}, "temperature", "invalid_value", "it is 2.5 and must be at most 2"),
        ("chat", {"temperature": "1"}, "temperature", "invalid_type", "expected a number, but got a string"),
        ("chat", {"stream": "true"}, "stream", "invalid_type", "expected a boolean, but got a string"),
        ("chat", {"max_tokens": 1.5}, "max_tokens", "invalid_type", "expected an integer, but got a number"),
        ("chat", {"max_tokens": 0}, "max_tokens", "invalid_value", "at least 1"),
        ("chat", {"temperature": 10**400}, "temperature", "invalid_type", ""),
        ("chat", {"stop": ["a"] * 5}, "stop", "invalid_value", "it has 5 items and must have at most 4"),
        ("chat", {"stop": ["a", ""]}, "stop.1", "invalid_value", "0 characters"),
        ("chat", {"messages": []}, "messages", "invalid_value", "0 items"),
        ("chat", {"messages": "hello"}, "messages", "invalid_type", "expected an array, but got a string"),
        ("chat", {"messages": [{"role": "system", "content": "x"}]}, "messages", "invalid_value", "no question"),
        (
            "chat",
            {"messages": [{"role": "user"}]},
            "messages.0.content",
            "missing_required_parameter",
            "'messages.0.content'",
        ),
        ("chat", {"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter", "role"),
        ("chat", {"messages": [USER, {"role": "tool", "content": "x"}]}, "messages.1.role", "invalid_value", "'tool'"),
        (
            "chat",
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content",
            "invalid_type",
            "got an integer",
        ),
        ("chat", {"messages": [{"role": "user", "content": " \n"}]}, "messages.0.content", "invalid_value", "empty"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "\x1f\ufeff"}]},
            "messages.0.content",
            "invalid_value",
            "empty",
        ),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "messages.0.content", "invalid_type", "got null"),
        ("chat", {"messages": [USER | {"extra": 1}]}, "messages.0.extra", "unknown_parameter", "Unknown parameter"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "invalid_value",
            "Invalid value: 'image_url'",
        ),
        (
            "chat",
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing_required_parameter",
            "",
        ),
        (
            "chat",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
            "invalid_value",
            "must match",
        ),
        (
            "chat",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}},
            "response_format.json_schema.schema",
            "invalid_json_schema",
            "its type must be 'object'",
        ),
        (
            "chat",
            {"telerag": {"lookahead": "on"}},
            "telerag.lookahead",
            "invalid_value",
            "'refined', 'question' or 'off'",
        ),
        ("complete", {"prompt": ["a"] * 17}, "prompt", "invalid_value", "17 items"),
        ("complete", {"prompt": [1, 2]}, "prompt", "invalid_value", "token numbers are not taken; send text"),
        ("complete", {"prompt": " "}, "prompt", "invalid_value", "empty"),
        ("complete", {"echo": True}, "echo", "unsupported_parameter", ""),
        ("embed", {"input": []}, "input", "invalid_value", "0 items"),
        ("embed", {"input": [[1, 2]]}, "input", "invalid_value", "token numbers are not taken; send text"),
        ("embed", {"input": ["a", None]}, "input.1", "invalid_type", "got null"),
        ("embed", {"encoding_format": "hex"}, "encoding_format", "invalid_value", "'float' or 'base64'"),
        ("search", {"max_num_results": 51}, "max_num_results", "invalid_value", "50"),
        ("search", {"rewrite_query": True}, "rewrite_query", "unsupported_parameter", ""),
        (
            "search",
            {"ranking_options": {"score_threshold": 1.5}},
            "ranking_options.score_threshold",
            "invalid_value",
            "1.5",
        ),
        ("search", {"filters": EQUAL | {"type": "like"}}, "filters.type", "invalid_value", "'like'"),
        (
            "search",
            {"filters": EQUAL | {"value": {}}},
            "filters.value",
            "invalid_type",
            "a string or a boolean or a number",
        ),
        (
            "search",
            {"filters": {"type": "gt", "key": "n", "value": True}},
            "filters.value",
            "invalid_type",
            "got a boolean",
        ),
        (
            "search",
            {"filters": {"type": "and", "filters": [EQUAL, {}]}},
            "filters.filters.1.type",
            "missing_required_parameter",
            "",
        ),
        ("search", {"filters": nested(9)}, "filters", "invalid_value", "9 clauses, 9 deep"),
        (
            "search",
            {"filters": {"type": "or", "filters": [EQUAL] * 33}},
            "filters.filters",
            "invalid_value",
            "33 items",
        ),
        (
            "search",
            {"filters": {"type": "or", "filters": [{"type": "and", "filters": [EQUAL] * 31}] * 8}},
            "filters",
            "invalid_value",
            "257 clauses, 3 deep",
        ),
        ("search", {"filters": nested(300)}, None, "invalid_value", "nested too deep"),
    ],
)
def test_what_is_wrong_is_said_as_openai_says_it(client, path, body, param, code, words):
    base = {"chat": CHAT, "complete": PROMPT, "embed": INPUT, "search": QUERY}[path]
    error = error_of(client.post(f"/{path}", json=base | body))
    assert error["code"] == code
    assert words in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("content", "media_type", "words"),
    [
        ("{", "application/json", "not valid JSON"),
        ("", "application/json", "no body"),
        ("null", "application/json", "no body"),
        ("[]", "application/json", "an array"),
        (json.dumps(CHAT), "text/plain", "Content-Type"),
        (json.dumps(CHAT), "", "Content-Type"),
        (json.dumps(CHAT | {"messages": [{"role": "user", "content": HALF}]}), "application/json", "surrogate"),
        (json.dumps(CHAT | {HALF: 1}), "application/json", "surrogate"),
        (json.dumps(CHAT | {"temperature": float("nan")}), "application/json", "finite"),
        ('{"temperature": 1e999, ' + json.dumps(CHAT)[1:], "application/json", "finite"),
    ],
)
def test_a_body_that_is_no_request_is_refused(client, content, media_type, words):
    assert words in error_of(client.post("/chat", content=content, headers={"content-type": media_type}))["message"]


@pytest.mark.parametrize("depth", [200, 400, *range(700, 1000, 50)])
def test_no_nesting_is_more_than_an_error(client, depth):
    schema = '{"type": "object", "a": ' + '{"a":' * depth + "1" + "}" * depth + "}"
    form = f'{{"type": "json_schema", "json_schema": {{"name": "a", "schema": {schema}}}}}'
    body = f'{{"response_format": {form}, {json.dumps(CHAT)[1:]}'
    response = client.post("/chat", content=body, headers={"content-type": "application/json"})
    assert response.status_code == (200 if depth == 200 else 400)


def test_a_clients_own_text_is_told_back_only_in_part(client):
    long = "x" * 10_000
    bodies = [
        {long: 1},
        {"stop": {long: 1}},
        {"telerag": {"lookahead": long}},
        {"n": long},
        {"tools": [long]},
        {"messages": [{"role": long, "content": long}]},
        {"messages": [USER | {long: long}]},
    ]
    for body in bodies:
        error = error_of(client.post("/chat", json=CHAT | body))
        assert long[:81] not in json.dumps(error)


def test_a_query_is_refused_as_a_body_is(client):
    error = error_of(client.get("/list?limit=many"))
    assert error["param"] == "limit"
    assert "expected an integer" in error["message"]


@pytest.mark.parametrize(
    ("request_model", "params"),
    [
        (ChatRequest, chat_create_params.CompletionCreateParamsStreaming),
        (ChatRequest, chat_create_params.CompletionCreateParamsNonStreaming),
        (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
        (EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
        (VectorSearchRequest, vector_store_search_params.VectorStoreSearchParams),
    ],
)
def test_every_option_of_openais_client_is_known(request_model, params):
    known = set(params.__required_keys__ | params.__optional_keys__)
    assert known
    assert known - set(request_model.model_fields) == set()


@pytest.mark.parametrize("request_model", [ChatRequest, CompletionRequest, VectorSearchRequest])
def test_the_document_says_which_values_ask_for_nothing(client, request_model):
    path, base = {
        ChatRequest: ("chat", CHAT),
        CompletionRequest: ("complete", PROMPT),
        VectorSearchRequest: ("search", QUERY),
    }[request_model]
    fields = request_model.model_json_schema()["properties"]
    fixed = {name: field["enum"] for name, field in fields.items() if "enum" in field and None in field["enum"]}
    assert fixed
    for name, values in fixed.items():
        for value in values:
            assert client.post(f"/{path}", json=base | {name: value}).status_code == 200, (name, value)
        for value in (True, 1, 2, "x", [1], {"a": 1}):
            taken = any(type(value) is type(one) and value == one for one in values)
            status = client.post(f"/{path}", json=base | {name: value}).status_code
            assert status == (200 if taken else 400), (name, value)


def test_messages_are_texts():
    request = ChatRequest.model_validate(
        CHAT
        | {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Where"}, {"type": "text", "text": "do owls live?"}],
                },
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "tool_calls": None,
                    "annotations": [{"type": "file_citation"}],
                },
                {"role": "user", "content": "And bats?", "name": "me"},
            ]
        }
    )
    assert [message.text for message in request.messages] == ["Be brief.", "Where\ndo owls live?", "", "And bats?"]


def test_options_with_two_forms_are_read_as_one():
    assert ChatRequest.model_validate(CHAT | {"stop": "x"}).stops == ("x",)
    assert ChatRequest.model_validate(CHAT | {"stop": ["x", "y"]}).stops == ("x", "y")
    assert ChatRequest.model_validate(CHAT).stops == ()
    assert ChatRequest.model_validate(CHAT).longest is None
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 5}).longest == 5
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 5, "max_completion_tokens": 3}).longest == 3
    longest = CompletionRequest.model_validate(PROMPT | {"max_tokens": 5.0}).longest
    assert (longest, type(longest)) == (5, int)


def test_what_is_documented_is_what_there_is():
    schema = TeleragOptions.model_json_schema()["properties"]["lookahead"]["anyOf"][0]
    assert schema["enum"] == [mode.value for mode in Lookahead]
    assert [f"telerag-{name}" for name in PipelineName] == protocol.PIPELINES
