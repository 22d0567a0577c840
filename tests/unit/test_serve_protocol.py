"""Requests as OpenAI's clients send them: which are taken, and which are refused with which code and values."""

import json
import time

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from openai.types import completion_create_params, embedding_create_params, vector_store_search_params
from openai.types.chat import completion_create_params as chat_create_params

from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.server import requests
from telerag_cli.server.errors import MAX_SHOWN
from telerag_cli.server.requests import ChatRequest, CompletionRequest, EmbeddingRequest, TeleragOptions
from telerag_cli.server.requests import VectorSearchRequest as SearchRequest
from telerag_cli.server.responses import ErrorBody
from telerag_cli.server.validation import JsonRoute, invalid_request

USER = {"role": "user", "content": "Where do owls live?"}
CHAT = {"model": "telerag-naive", "messages": [USER]}
BASES = {
    "chat": CHAT,
    "complete": {"model": "telerag-naive", "prompt": "Where do owls live?"},
    "embed": {"model": "minilm", "input": "owls"},
    "search": {"query": "owls"},
}
EQUAL = {"type": "eq", "key": "animal", "value": "owls"}
MANY = [EQUAL, {"type": "nin", "key": "n", "value": [1, "x", True, 2.5]}] * 16
HALF = "\ud800"
UNSUPPORTED, UNKNOWN, MISSING = "unsupported_parameter", "unknown_parameter", "missing_required_parameter"
TYPE, VALUE = "invalid_type", "invalid_value"


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.router.route_class = JsonRoute

    @app.exception_handler(RequestValidationError)
    async def refused(_request, error):
        return invalid_request(error).response()

    @app.post("/chat")
    async def chat(body: ChatRequest):
        return None

    @app.post("/complete")
    async def complete(body: CompletionRequest):
        return None

    @app.post("/embed")
    async def embed(body: EmbeddingRequest):
        return None

    @app.post("/search")
    async def search(body: SearchRequest):
        return None

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


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def schema(**json_schema):
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat", {"messages": [USER | {"id": "m1", "cache_control": {"type": "ephemeral"}, "name": "me"}]}),
        ("chat", user([{"type": "text", "text": ""}, {"type": "text", "text": "x", "cache_control": {}, "id": 5}])),
        ("chat", {"messages": [USER, {"role": "assistant", "content": "y", "reasoning_content": "z", "x": [1]}, USER]}),
        ("chat", {"messages": [{"role": "system", "content": [{"type": "text", "text": ""}], "id": 1}, USER]}),
        ("chat", {"tool_choice": "none", "parallel_tool_calls": True, "user": "me", "metadata": {"a": "b"}}),
        ("chat", {"temperature": 0, "top_p": 1, "seed": -(2**63) - 1, "max_tokens": 1, "max_completion_tokens": 7.0}),
        ("chat", {"stop": None, "stream": None}),
        ("chat", {"stop": "\n"}),
        ("chat", {"stop": ["a", "b", "c", "d"]}),
        ("chat", {"stop": []}),
        ("chat", {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}),
        ("chat", {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
        ("chat", {"response_format": {"type": "text"}}),
        ("chat", {"response_format": {"type": "json_object"}}),
        ("chat", schema(name="a_1", schema={"type": "object"})),
        ("chat", {"telerag": {"lookahead": "off", "timeline": True, "events": None}}),
        ("chat", {"telerag": None}),
        ("complete", {"n": 1, "prompt": ["a"] * 16}),
        ("embed", {"encoding_format": "base64", "dimensions": 384, "user": "me", "input": ["a"] * 2048}),
        ("search", {"max_num_results": 50, "query": ["a"] * 16}),
        ("search", {"ranking_options": {"ranker": "auto", "score_threshold": 0.5}}),
        ("search", {"filters": nested(8)}),
        ("search", {"filters": {"type": "or", "filters": MANY}}),
    ],
)
def test_what_clients_send_is_taken(client, path, body):
    response = client.post(f"/{path}", json=BASES[path] | body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "body", "param", "code", "values"),
    [
        ("chat", {"n": 2}, "n", UNSUPPORTED, ["2", "null", "1"]),
        ("chat", {"n": True}, "n", UNSUPPORTED, ["true"]),
        ("chat", {"logprobs": True}, "logprobs", UNSUPPORTED, ["false"]),
        ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", UNSUPPORTED, ["function"]),
        ("chat", {"audio": {"voice": "alloy"}}, "audio", UNSUPPORTED, ["alloy"]),
        ("chat", {"frequency_penalty": 0.1}, "frequency_penalty", UNSUPPORTED, ["0.1"]),
        ("chat", {"top_k": 5}, "top_k", UNKNOWN, ["top_k"]),
        ("chat", {"top_k": 5, "model": 1, "a": 1}, "top_k, a", UNKNOWN, ["top_k, a"]),
        ("chat", {"temperature": 2.5}, "temperature", VALUE, ["2.5", "2"]),
        ("chat", {"temperature": "1"}, "temperature", TYPE, ["number", "'1'"]),
        ("chat", {"stream": "true"}, "stream", TYPE, ["boolean", "'true'"]),
        ("chat", {"max_tokens": 1.5}, "max_tokens", TYPE, ["integer", "1.5"]),
        ("chat", {"max_tokens": 0}, "max_tokens", VALUE, ["0", "1"]),
        ("chat", {"temperature": 10**400}, "temperature", TYPE, []),
        ("chat", {"stop": ["a"] * 5}, "stop", VALUE, ["5", "4"]),
        ("chat", {"stop": ["a", ""]}, "stop.1", VALUE, ["''"]),
        ("chat", {"messages": []}, "messages", VALUE, ["0"]),
        ("chat", {"messages": "hello"}, "messages", TYPE, ["list", "'hello'"]),
        ("chat", {"messages": [{"role": "system", "content": "x"}]}, "messages", VALUE, []),
        ("chat", {"messages": [{"role": "user"}]}, "messages.0.content", MISSING, ["messages.0.content"]),
        ("chat", {"messages": [{"content": "x"}]}, "messages.0.role", MISSING, ["messages.0.role"]),
        ("chat", {"messages": [USER, {"role": "tool", "content": "x"}]}, "messages.1.role", VALUE, ["'tool'"]),
        ("chat", user(5), "messages.0.content", TYPE, ["string", "5"]),
        ("chat", user(" \n"), "messages.0.content", VALUE, []),
        ("chat", user("\x1f\ufeff"), "messages.0.content", VALUE, []),
        ("chat", user(None), "messages.0.content", TYPE, ["null"]),
        ("chat", user("a\0b"), "messages.0.content", VALUE, ["2"]),
        ("chat", user([{"type": "text", "text": ""}, {"type": "text", "text": " "}]), "messages.0.content", VALUE, []),
        ("chat", user([{"type": "image_url"}]), "messages.0.content.0.type", VALUE, ["'image_url'", "'text'"]),
        ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", MISSING, []),
        ("chat", schema(name="a b"), "response_format.json_schema.name", VALUE, ["{1,64}"]),
        (
            *("chat", schema(name="a", schema={"type": "array"})),
            *("response_format.json_schema.schema", "invalid_json_schema", ["'object'"]),
        ),
        ("chat", {"telerag": {"lookahead": "on"}}, "telerag.lookahead", VALUE, ["'refined', 'question' or 'off'"]),
        ("complete", {"prompt": ["a"] * 17}, "prompt", VALUE, ["17", "16"]),
        ("complete", {"prompt": [1, 2]}, "prompt", VALUE, []),
        ("complete", {"prompt": " "}, "prompt", VALUE, []),
        ("complete", {"echo": True}, "echo", UNSUPPORTED, []),
        ("embed", {"input": []}, "input", VALUE, ["0"]),
        ("embed", {"input": [[1, 2]]}, "input", VALUE, []),
        ("embed", {"input": ["a", None]}, "input.1", TYPE, ["null"]),
        ("embed", {"encoding_format": "hex"}, "encoding_format", VALUE, ["'float' or 'base64'"]),
        ("search", {"max_num_results": 51}, "max_num_results", VALUE, ["51", "50"]),
        ("search", {"rewrite_query": True}, "rewrite_query", UNSUPPORTED, []),
        ("search", {"ranking_options": {"score_threshold": 1.5}}, "ranking_options.score_threshold", VALUE, ["1.5"]),
        ("search", {"filters": EQUAL | {"type": "like"}}, "filters.type", VALUE, ["'like'"]),
        ("search", {"filters": EQUAL | {"value": {}}}, "filters.value", TYPE, ["string", "boolean", "number"]),
        ("search", {"filters": {"type": "gt", "key": "n", "value": True}}, "filters.value", TYPE, ["integer", "true"]),
        ("search", {"filters": {"type": "and", "filters": [EQUAL, {}]}}, "filters.filters.1.type", MISSING, []),
        ("search", {"filters": nested(9)}, "filters", VALUE, ["9", "8"]),
        ("search", {"filters": {"type": "or", "filters": [EQUAL] * 33}}, "filters.filters", VALUE, ["33", "32"]),
        ("search", {"filters": {"type": "or", "filters": [nested(32)] * 8}}, "filters", VALUE, ["257", "33", "256"]),
        ("search", {"filters": nested(90)}, None, VALUE, []),
    ],
)
def test_what_is_wrong_has_openais_code_and_the_values(client, path, body, param, code, values):
    error = error_of(client.post(f"/{path}", json=BASES[path] | body))
    assert error["code"] == code
    assert [value for value in values if value not in error["message"]] == []
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        ("{", "application/json"),
        ("", "application/json"),
        ("null", "application/json"),
        ("[]", "application/json"),
        (json.dumps(CHAT), "text/plain"),
        (json.dumps(CHAT), ""),
        (json.dumps(CHAT | user(HALF)), "application/json"),
        (json.dumps(CHAT | {HALF: 1}), "application/json"),
        (json.dumps(CHAT | {"temperature": float("nan")}), "application/json"),
        ('{"temperature": 1e999, ' + json.dumps(CHAT)[1:], "application/json"),
    ],
)
def test_a_body_that_is_not_a_request_is_refused(client, content, media_type):
    error_of(client.post("/chat", content=content, headers={"content-type": media_type}))


@pytest.mark.parametrize("depth", [150, 400, *range(700, 1000, 50)])
def test_no_nesting_is_more_than_an_error(client, depth):
    schema = '{"type": "object", "a": ' + '{"a":' * depth + "1" + "}" * depth + "}"
    form = f'{{"type": "json_schema", "json_schema": {{"name": "a", "schema": {schema}}}}}'
    body = f'{{"response_format": {form}, {json.dumps(CHAT)[1:]}'
    response = client.post("/chat", content=body, headers={"content-type": "application/json"})
    assert response.status_code == (200 if depth == 150 else 400)


FLOOD = 300_000


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("chat", '{"messages": [' + ",".join(["{}"] * FLOOD) + "]}"),
        ("chat", '{"messages": [' + ",".join(["5"] * 9_000) + "]}"),
        ("chat", '{"messages": [{"role": "user", "content": [' + ",".join(['{"type": 1}'] * 4_000) + "]}]}"),
        ("chat", "{" + ",".join(f'"n{n}": 1' for n in range(9_000)) + "}"),
        ("chat", '{"metadata": {' + ",".join(f'"n{n}": 1' for n in range(9_000)) + "}}"),
        ("chat", '{"stop": [' + ",".join(['""'] * 9_000) + "]}"),
        ("complete", '{"prompt": [' + ",".join(['""'] * FLOOD) + "]}"),
        ("search", '{"query": "q", "filters": {"type": "in", "key": "a", "value": [' + ",".join(["1"] * FLOOD) + "]}}"),
        (
            "search",
            '{"query": "q", "filters": {"type": "in", "key": "a", "value": [' + ",".join(["{}"] * 9_000) + "]}}",
        ),
        ("search", '{"query": "q", "filters": ' + '{"type": "and", "filters": [' * 190 + "]}" * 190 + "}"),
        ("chat", "[" * 100_000),
        ("chat", '{"a": ' * 100_000),
        ("chat", '{"seed": ' + "9" * 900_000 + "}"),
        ("chat", '{"temperature": 1e400}'),
        ("chat", '{"temperature": NaN}'),
        ("chat", '{"user": "\\ud800"}'),
    ],
)
def test_a_hostile_body_takes_no_longer_than_it_takes_to_read_it(client, path, content):
    took_s = []
    for _ in range(3):  # the machine may be busy with other things
        began_s = time.perf_counter()
        error_of(client.post(f"/{path}", content=content, headers={"content-type": "application/json"}))
        took_s.append(time.perf_counter() - began_s)
    assert min(took_s) < 0.15


def test_a_clients_own_text_is_repeated_only_in_part(client):
    long = "x" * 10_000
    for body in (
        {long: 1},
        {"stop": {long: 1}},
        {"telerag": {"lookahead": long}},
        {"n": long},
        {"tools": [long]},
        {"messages": [{"role": long, "content": long}]},
    ):
        error = error_of(client.post("/chat", json=CHAT | body))
        assert long[: MAX_SHOWN + 1] not in json.dumps(error)


@pytest.mark.parametrize(
    ("request_model", "params"),
    [
        (ChatRequest, chat_create_params.CompletionCreateParamsStreaming),
        (ChatRequest, chat_create_params.CompletionCreateParamsNonStreaming),
        (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
        (EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
        (SearchRequest, vector_store_search_params.VectorStoreSearchParams),
    ],
)
def test_every_option_of_openais_client_is_known(request_model, params):
    known = set(params.__required_keys__ | params.__optional_keys__)
    assert known
    assert known - set(request_model.model_fields) == set()


@pytest.mark.parametrize(
    ("path", "request_model"), [("chat", ChatRequest), ("complete", CompletionRequest), ("search", SearchRequest)]
)
def test_the_document_says_which_values_ask_for_nothing(client, path, request_model):
    fields = request_model.model_json_schema()["properties"]
    fixed = {name: field["enum"] for name, field in fields.items() if "enum" in field and None in field["enum"]}
    assert fixed
    for name, values in fixed.items():
        for value in values:
            assert client.post(f"/{path}", json=BASES[path] | {name: value}).status_code == 200, (name, value)
        for value in (True, 1, 2, "x", [1], {"a": 1}):
            taken = any(type(value) is type(one) and value == one for one in values)
            status = client.post(f"/{path}", json=BASES[path] | {name: value}).status_code
            assert status == (200 if taken else 400), (name, value)


def test_messages_are_texts():
    parts = [{"type": "text", "text": "Where"}, {"type": "text", "text": "do owls live?"}]
    citations = [{"type": "file_citation"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": citations},
        {"role": "user", "content": "And bats?", "name": "me"},
    ]
    request = ChatRequest.model_validate(CHAT | {"messages": messages})
    assert [message.text for message in request.messages] == ["Be brief.", "Where\ndo owls live?", "", "And bats?"]


def test_options_with_two_forms_are_read_as_one():
    assert ChatRequest.model_validate(CHAT | {"stop": "x"}).stops == ("x",)
    assert ChatRequest.model_validate(CHAT | {"stop": ["x", "y"]}).stops == ("x", "y")
    assert ChatRequest.model_validate(CHAT).stops == ()
    assert ChatRequest.model_validate(CHAT).token_limit is None
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 5}).token_limit == 5
    assert ChatRequest.model_validate(CHAT | {"max_tokens": 5, "max_completion_tokens": 3}).token_limit == 3
    limit = CompletionRequest.model_validate(BASES["complete"] | {"max_tokens": 5.0}).token_limit
    assert (limit, type(limit)) == (5, int)


def test_what_is_documented_is_what_there_is():
    schema = TeleragOptions.model_json_schema()["properties"]["lookahead"]["anyOf"][0]
    assert schema["enum"] == [mode.value for mode in Lookahead]
    assert [f"telerag-{name}" for name in PipelineName] == requests.PIPELINES
