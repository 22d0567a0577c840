"""OpenAI-compatible endpoints with ways of their own: parameters, roles, streams, reasoning, addresses, capacity."""

import asyncio
import json
import socket
import threading

import pytest

from expect import fails
from scripted_endpoint import answer, ask, event, raw, refuse, run, stream
from telerag_cli.errors import ModelError, ReasoningError
from telerag_cli.llm.base import Message, Request
from telerag_cli.llm.endpoint import Endpoint
from telerag_cli.llm.shapes import Choice


def picky(*refused, status=400):
    """A server that takes none of these parameters, and says so of one at a time."""

    def reply(handler):
        name = next((name for name in refused if name in handler.body), None)
        told = refuse(status, f"Unsupported parameter: '{name}' is not supported with this model.")
        (told if name else stream("Blue") if handler.body.get("stream") else whole("Blue"))(handler)

    return reply


def whole(content, finish="stop", **more):
    message = {"role": "assistant", "content": content, **more}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return answer(200, {"object": "chat.completion", "choices": choices, "usage": {"completion_tokens": 3}})


def test_parameters_that_are_refused_are_left_out_once_and_for_all(server):
    notices = []
    endpoint = server.endpoint(
        picky("stream_options", "max_tokens", "seed", "temperature", "top_p", "logprobs", "stop"),
        notice=notices.append,
        retries=0,
    )
    request = ask(stop=("END",), logprobs=True)
    assert run(endpoint, request).text == "Blue"
    assert len(server.bodies) == 8
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens", "stream"}
    assert run(endpoint, request).text == "Blue"
    assert (len(server.bodies), len(notices)) == (9, 7)


def test_many_at_once_tell_a_refusal_once(server):
    notices = []
    endpoint = server.endpoint(picky("stream_options", "seed"), notice=notices.append, retries=0)

    async def several():
        return await asyncio.gather(*(endpoint.generate(ask()) for _ in range(6)))

    assert [one.text for one in asyncio.run(several())] == ["Blue"] * 6
    assert len(notices) == 2


def test_a_refusal_that_another_server_passes_on_is_understood(server):
    inner = json.dumps({"error": {"message": "Unsupported parameter: 'seed'"}})
    error = {"message": "Provider returned error", "code": 400, "metadata": {"raw": inner}}

    def reply(handler):
        (answer(400, {"error": error}) if "seed" in handler.body else stream("Blue"))(handler)

    assert run(server.endpoint(reply), ask()).text == "Blue"


def test_a_server_that_does_not_stream_answers_whole(server):
    endpoint = server.endpoint(picky("stream"), retries=0)
    seen = []
    result = run(endpoint, ask(), lambda text, _tokens: seen.append(text))
    assert (result.text, result.completion_tokens, seen) == ("Blue", 3, ["Blue"])
    # One that ignores the wish needs no refusal.
    assert run(server.endpoint(whole("Red", "length")), ask()).finish_reason == "length"


@pytest.mark.parametrize("status", [400, 500])
def test_a_system_message_that_is_refused_goes_to_the_user(server, status):
    notices = []

    def reply(handler):
        system = any(message["role"] == "system" for message in handler.body["messages"])
        (refuse(status, "System role not supported") if system else stream("Blue"))(handler)

    endpoint = server.endpoint(reply, notice=notices.append, retries=0)
    request = Request([Message("system", "Be brief."), Message("user", "Which?")], 8)
    assert [run(endpoint, request).text for _ in range(2)] == ["Blue"] * 2
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Be brief.\n\nWhich?"}]
    assert (len(server.bodies), len(notices)) == (3, 1)


def test_what_is_not_of_the_answer_is_passed_over(server):
    unread = [
        ": OPENROUTER PROCESSING\n\n",
        "data:\n\n",
        "event: ping\ndata: {}\n\n",
        "event: ping\ndata: now\n\n",
        'event: status\ndata: {"type": "queued"}\n\n',
        'data: {"choices": []}\n\n',
        'data: {"choices": null}\n\n',
        'data: {"choices": [null]}\n\n',
        'data: {"choices": [{"index": 0, "delta": null, "finish_reason": null}], "usage": null}\n\n',
        'data: {"choices": [{"index": 0, "delta": {"content": null, "tool_calls": []}}], "error": null}\n\n',
        'data: {"type": "ping"}\n\n',
    ]
    pieces = ["data:" + event({"content": part}).removeprefix("data: ").replace("\n", "\r\n") for part in ("Bl", "ue")]
    end = [event({}, "stop"), 'data: {"usage": {"prompt_tokens": "3", "completion_tokens": 2}}\n\n', "data: [DONE]\n\n"]
    result = run(server.endpoint(raw(*unread, pieces[0], *unread, pieces[1], *unread, *end)), ask())
    assert (result.text, result.finish_reason, result.completion_tokens) == ("Blue", "stop", 2)


@pytest.mark.parametrize(
    "told",
    [
        'data: {"error": {"message": "The model burnt down."}}\n\n',
        'data: {"error": "The model burnt down."}\n\n',
        'data: {"object": "error", "message": "The model burnt down.", "code": 40001}\n\n',
        'event: error\ndata: {"message": "The model burnt down."}\n\n',
        "event: error\ndata: The model burnt down.\n\n",
    ],
)
def test_an_error_within_the_stream_is_told(server, told):
    with fails(ModelError, "The model burnt down."):
        run(server.endpoint(raw(event({"content": "Bl"}), told)), ask())


@pytest.mark.parametrize(("said", "meant"), [("eos_token", "stop"), ("MAX_TOKENS", "length"), ("end_turn", "stop")])
def test_other_words_for_the_end(server, said, meant):
    assert run(server.endpoint(stream("Blue", finish=said)), ask()).finish_reason == meant


def thoughts(name, *pieces):
    return "".join(event({name: piece, "content": None}) for piece in pieces)


@pytest.mark.parametrize(
    "pieces",
    [
        [thoughts("reasoning_content", "The sea", " is blue.")],
        [thoughts("reasoning", "The sea")],
        [thoughts("reasoning_details", [{"type": "reasoning.text", "text": "The sea"}])],
        [event({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "The sea"}]}]})],
        [event({"content": part}) for part in ("<th", "ink>The", " sea</", "think>", "\n\n")],
        [event({"content": part}) for part in ("<think>The sea</think>", "<THINKING>no</THINKING>\n")],
    ],
)
def test_reasoning_is_not_answered(server, pieces):
    seen = []
    reply = raw(*pieces, event({"content": "Bl"}), event({"content": "ue"}), event({}, "stop"))
    result = run(server.endpoint(reply), ask(), lambda text, _tokens: seen.append(text.strip()))
    assert result.text == "Blue"
    assert set(seen) <= {"", "Bl", "Blue"}
    with fails(ReasoningError, "small", "--max-tokens"):
        run(server.endpoint(raw(*pieces, event({}, "length"))), ask())


def test_reasoning_before_json_and_reasoning_that_nothing_opened(server):
    reply = stream("<think>{", "}</think>", '{"choice": ', '"yes"}')
    assert run(server.endpoint(reply), ask(shape=Choice(("yes", "no")))).text == "yes"
    assert run(server.endpoint(stream("The sea is blue.\n", "</think>\n", "Blue")), ask()).text == "Blue"
    assert run(server.endpoint(whole("<think>a</think>Blue", reasoning_content="b")), ask()).text == "Blue"
    with fails(ReasoningError, "--max-tokens"):
        run(server.endpoint(stream("<think>The sea", finish="length")), ask())


def test_half_characters_and_nuls_do_not_end_a_run(server):
    halves = [r'"\ud83d"', r'"\ude00 a"', r'"\u0000b\ud83d"', r'" c\ude00"', r'"\ud83d"']
    reply = raw(*(event({"content": 0}).replace('"content": 0', f'"content": {half}') for half in halves))

    def ended(handler):
        reply(handler)
        handler.piece(event({}, "stop"))

    seen = []
    result = run(server.endpoint(ended), ask(), lambda text, _tokens: seen.append(text))
    assert result.text == "😀 a�b� c��"
    for text in (*seen, result.text):
        text.encode()
    with fails(ModelError, "�"):
        run(server.endpoint(refuse(400, "No \ud83d here")), ask())


@pytest.mark.parametrize("broken", [b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n', "data: {no\n\n"])
def test_a_chunk_that_cannot_be_read_fails_its_question_only(server, broken):
    def reply(handler):
        bad = "bad" in handler.body["messages"][0]["content"]
        (raw(event({"content": "Bl"}), broken, event({}, "stop")) if bad else stream("Blue"))(handler)

    endpoint = server.endpoint(reply)

    async def both():
        return await asyncio.gather(*(endpoint.generate(ask(text)) for text in ("bad", "good")), return_exceptions=True)

    bad, good = asyncio.run(both())
    assert type(bad) is ModelError
    assert good.text == "Blue"


@pytest.mark.parametrize(
    ("given", "chat"),
    [
        ("", "/v1"),
        ("/v1/v1", "/v1"),
        ("/v1", ""),
        ("/v1/chat/completions", "/v1"),
        ("/v1/models", "/v1"),
        ("/api", "/v1"),
        ("/api", "/api/v1"),
        ("/models", "/v1"),
    ],
)
def test_an_address_beside_the_api_is_told_with_the_right_one(server, given, chat):
    base = server.url.removesuffix("/v1")
    server.chat = f"{chat}/chat/completions"
    for model in ("small", None):
        with fails(ModelError, f"{base}{given}/chat/completions", 404, f"--base-url {base}{chat}."):
            run(Endpoint(f"{base}{given}", model), ask())
    assert server.bodies == []


def test_a_server_that_calls_a_wrong_path_a_success_is_understood(server):
    server.chat = "/v1/chat/completions"
    server.absent = answer(200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"})
    base = server.url.removesuffix("/v1")
    with fails(ModelError, "Unexpected endpoint", f"--base-url {server.url}."):
        run(Endpoint(base, "small"), ask())


@pytest.mark.parametrize("listed", ["small", None, 5])
def test_a_strange_list_of_models_is_no_crash(server, listed):
    server.models = [listed]
    run(Endpoint(server.url), ask())


def test_a_page_at_the_address_is_told(server):
    base = server.url.removesuffix("/v1")

    def reply(handler):
        handler.begin(kind="text/html")
        handler.piece("<!DOCTYPE html>\n<title>Hello</title>")

    endpoint = server.endpoint(reply)
    with fails(ModelError, server.url, "/v1"):
        run(endpoint, ask())
    server.chat = "/v1/chat/completions"
    with fails(ModelError, 404, "--base-url"):
        run(Endpoint(f"{base}/v2", "small"), ask())


def test_a_server_that_is_loading_is_not_crowded(server):
    notices, calls = [], []

    def reply(handler):
        calls.append(1)
        (refuse(503, "Loading model") if len(calls) <= 4 else stream("Blue"))(handler)

    endpoint = server.endpoint(reply, notice=notices.append, parallel=4)

    async def several():
        return await asyncio.gather(*(endpoint.generate(ask()) for _ in range(4)))

    assert [one.text for one in asyncio.run(several())] == ["Blue"] * 4
    assert notices == []


def crowded(most, refusal):
    """A server that stands so many at once and refuses or breaks off any other."""
    lock, running = threading.Lock(), 0

    def reply(handler):
        nonlocal running
        with lock:
            running += 1
            many = running > most
        try:
            (refusal if many else stream("Bl", "ue", pause_s=0.05))(handler)
        finally:
            with lock:
                running -= 1

    return reply


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "refusal",
    [
        refuse(429, "Too many requests"),
        refuse(503, "Busy"),
        refuse(500, "Too many concurrent requests"),
        hang_up,
        raw(event({"content": "Bl"}), "data: [DONE]\n\n"),
        raw(event({"content": "Bl"}), f"data: {json.dumps({'error': {'message': 'Later', 'code': 503}})}\n\n"),
        raw(event({"content": "Bl"}), f"data: {json.dumps({'error': 'Too many concurrent requests'})}\n\n"),
    ],
)
def test_a_server_gets_as_many_at_once_as_it_stands(server, refusal):
    notices = []
    endpoint = server.endpoint(crowded(1, refusal), notice=notices.append, retries=1, parallel=6)

    async def several():
        return await asyncio.gather(*(endpoint.generate(ask(), lambda _text, _tokens: None) for _ in range(6)))

    assert [one.text for one in asyncio.run(several())] == ["Blue"] * 6
    assert len(notices) == 1
    before = len(server.bodies)
    assert [one.text for one in asyncio.run(several())] == ["Blue"] * 6
    assert len(server.bodies) == before + 6  # it is remembered
