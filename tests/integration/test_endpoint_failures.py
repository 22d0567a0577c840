"""OpenAI-compatible endpoints that fail, break off, are slow or full: what is tried again, and what is said."""

import asyncio
import email.utils
import json
import socket
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from doubles import answer_in_order
from expect import fails
from scripted_endpoint import ADDRESS, answer, ask, event, raw, refuse, run, stream
from telerag_cli.config import PipelineName
from telerag_cli.engine.batch import Outputs
from telerag_cli.engine.questions import Question
from telerag_cli.errors import ContextError, ModelError
from telerag_cli.llm import refusals as module
from telerag_cli.llm.endpoint import Endpoint


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_tried_again(server, status):
    endpoint = server.endpoint(refuse(status, "Later"), stream("Blue"))
    assert run(endpoint, ask()).text == "Blue"
    assert len(server.bodies) == 2


def test_a_wait_that_the_server_asks_for_is_kept_and_counts_as_waiting(server):
    endpoint = server.endpoint(refuse(429, "Slow down", retry_after="0.3"), stream("Blue"))
    result = run(endpoint, ask())
    assert 0.3 <= result.queue_s < 1
    assert result.prefill_s < 0.2
    date = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=2))  # which has no fractions
    assert run(server.endpoint(refuse(503, "Soon", retry_after=date), stream("Blue")), ask()).queue_s > 0.9
    endpoint = server.endpoint(refuse(429, "Come back tomorrow", retry_after="86400"), stream("Blue"))
    with fails(ModelError, 429, "Come back tomorrow"):
        run(endpoint, ask())


def told(code, message):
    """An error within a stream that has begun."""
    return raw(f"data: {json.dumps({'error': {'message': message, 'code': code}})}\n\n")


CONTEXT = "This model's maximum context length is 64 tokens"


@pytest.mark.parametrize(
    ("reply", "tries", "error", "values"),
    [
        (refuse(429, "Slow down."), 3, ModelError, (429, "Slow down.")),
        (refuse(500, "Out of\nmemory"), 3, ModelError, (500, "Out of memory.")),
        (answer(502, {"detail": "Bad gateway"}), 3, ModelError, (502, "Bad gateway.")),
        (refuse(401, "Wrong key"), 1, ModelError, (401, "Wrong key.", "OPENAI_API_KEY")),
        (refuse(404, "No such model"), 1, ModelError, (404, "No such model", "small, tiny")),
        (refuse(400, "Bad seed"), 1, ModelError, (400, "Bad seed.")),
        (refuse(400, CONTEXT, "context_length_exceeded"), 1, ContextError, (400, CONTEXT)),
        (told(400, "exceeds the context size"), 1, ContextError, (400, "exceeds the context size.")),
        (told(503, "Overloaded"), 3, ModelError, (503, "Overloaded.")),
        (raw("data: {oops\n\n"), 1, ModelError, ("line 1 column 2", "/v1")),
        (raw('data: {"hello": 1}\n\n'), 1, ModelError, ('{"hello": 1}', "/v1")),
        (raw("data: 5\n\n"), 1, ModelError, ("5", "/v1")),
        (stream("a", finish=None), 3, ModelError, (3, 1)),
        (stream("a", finish="tool_calls"), 1, ModelError, ("'tool_calls'",)),
        (raw(event({"refusal": "I will not."}), event({}, "stop")), 1, ModelError, ("small", "I will not.")),
    ],
)
def test_errors_say_what_the_server_said(server, reply, tries, error, values):
    server.models = ["tiny", "small"]
    with fails(error, *values) as caught:
        run(server.endpoint(reply), ask())
    assert len(server.bodies) == tries
    assert "\n" not in str(caught.value)


def cut_short(handler):
    """A body that promises more than it has."""
    handler.begin(content_length="10000")
    handler.piece(event({"content": "Blue"}))


@pytest.mark.parametrize("broken", [cut_short, stream("Bl", finish=None)])
def test_a_stream_that_breaks_is_tried_again_unless_text_was_shown(server, broken):
    assert run(server.endpoint(broken, stream("Green")), ask()).text == "Green"
    assert len(server.bodies) == 2
    seen = []
    with fails(ModelError, 1):
        run(server.endpoint(broken, stream("Green")), ask(), lambda text, _tokens: seen.append(text))
    assert len(seen) == 1
    assert len(server.bodies) == 3


def test_silence_ends_at_its_limit_and_slow_text_does_not(server):
    endpoint = server.endpoint(raw(event({"content": "Bl"}), silence_s=0.6), timeout_s=0.2, retries=1)
    with fails(ModelError, "0.2 s", 2, 1):
        run(endpoint, ask())
    slow = server.endpoint(stream(*"abcdef", pause_s=0.1), timeout_s=0.3, retries=0)
    assert run(slow, ask()).text == "abcdef"


def test_no_server_at_all(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    with socket.create_server((ADDRESS, 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://{ADDRESS}:{port}/v1"
    with fails(ModelError, url, 2, "connection refused"):
        run(Endpoint(url, "small", retries=1), ask())
    with fails(ModelError, url, "connection refused"):
        Endpoint(url, retries=0)


def test_what_tls_and_name_look_ups_say_is_passed_on(server):
    secure = server.url.replace("http:", "https:")
    with fails(ModelError, secure, "[SSL"):
        Endpoint(secure, retries=0)
    nowhere = "http://nowhere.invalid/v1"
    with fails(ModelError, nowhere, socket_says("nowhere.invalid")):
        Endpoint(nowhere, retries=0)


def socket_says(host):
    try:
        socket.getaddrinfo(host, 80)
    except socket.gaierror as error:
        return error.strerror[1:]


def test_at_most_so_many_at_once(server):
    running, most = 0, 0
    lock = threading.Lock()

    def reply(handler):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        stream("a", pause_s=0.1)(handler)
        with lock:
            running -= 1

    endpoint = server.endpoint(reply, parallel=2)

    async def several():
        return await asyncio.gather(*(endpoint.generate(ask()) for _ in range(5)))

    results = asyncio.run(several())
    assert most == 2
    assert sorted(result.queue_s > 0.05 for result in results) == [False, False, True, True, True]


def test_a_cancelled_request_hangs_up_and_frees_its_place(server):
    endpoint = server.endpoint(stream(*["word "] * 1000, pause_s=0.01), parallel=1)

    async def cancel():
        begun = asyncio.Event()
        task = asyncio.create_task(endpoint.generate(ask(), lambda _text, _tokens: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.replies = [stream("Blue")]
        return await asyncio.wait_for(endpoint.generate(ask()), 2)

    assert asyncio.run(cancel()).text == "Blue"
    assert server.hung_up.wait(2)


def test_every_event_loop_has_its_own_connections_and_close_ends_them(server):
    endpoint = server.endpoint(stream("Blue"))
    assert run(endpoint, ask()).text == "Blue"
    assert run(endpoint, ask()).text == "Blue"
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(endpoint.generate(ask())).text == "Blue"
    endpoint.close()
    loop.close()
    endpoint.close()

    async def within():
        await endpoint.generate(ask())
        endpoint.close()

    asyncio.run(within())


TROUBLES = {
    "limited": (refuse(429, "Slow down."), "Slow down."),
    "broken": (refuse(500, "The model burnt down."), "The model burnt down."),
    "malformed": (raw("data: {no json\n\n"), "line 1 column 2"),
    "silent": (raw(silence_s=2.0), "0.3 s"),
    "cut": (raw(event({"content": "Blu"})), "1 token"),
}


def test_each_line_of_a_run_tells_what_became_of_its_question(server, engine_of):
    def by_question(handler):
        text = handler.body["messages"][-1]["content"]
        trouble = next((reply for kind, (reply, _told) in TROUBLES.items() if f"{kind}?" in text), None)
        (trouble or stream("Blue"))(handler)

    endpoint = server.endpoint(by_question, retries=1, timeout_s=0.3)
    texts = ["fine?", *(f"{kind}?" for kind in TROUBLES), "fine again?"]
    engine, lines = engine_of({}), []
    engine.shared = replace(engine.shared, generator=endpoint)
    outputs = Outputs(lines.append, None, lambda _name, _error: None, lambda _count: None)
    questions = [Question(str(number), text) for number, text in enumerate(texts)]
    answer_in_order(engine, PipelineName.NAIVE, questions, outputs, ordered=True)
    assert [line["question"] for line in lines] == texts
    assert lines[0]["answer"] == lines[-1]["answer"] == "Blue"
    for line, (_reply, told) in zip(lines[1:-1], TROUBLES.values(), strict=True):
        assert told in line["error"]["message"], line
