"""OpenAI-compatible endpoints: a server that does what a test tells it to, and llama-cpp-python's own."""

import asyncio
import email.utils
import gc
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from doubles import answer_in_order
from expect import fails
from telerag_cli.config import PipelineName
from telerag_cli.engine.batch import Outputs
from telerag_cli.engine.questions import Question
from telerag_cli.errors import ContextError, ModelError, UsageError
from telerag_cli.llm import endpoint as module
from telerag_cli.llm.base import Message, Request
from telerag_cli.llm.endpoint import Endpoint
from telerag_cli.llm.shapes import Choice, Gbnf, Json, Lines

ADDRESS = "127.0.0.1"


def ask(text="Name a colour.", max_tokens=8, **options):
    return Request([Message("user", text)], max_tokens, **options)


def run(endpoint, request, on_text=None):
    return asyncio.run(endpoint.generate(request, on_text))


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        script = self.server.script
        self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        script.bodies.append(self.body)
        script.keys.append(self.headers["authorization"])
        with script.lock:
            reply = script.replies.pop(0) if len(script.replies) > 1 else script.replies[0]
        try:
            reply(self)
        except (BrokenPipeError, ConnectionResetError):
            script.hung_up.set()

    def do_GET(self):
        assert self.path == "/v1/models"
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.server.script.models]
        answer(200, {"object": "list", "data": data})(self)

    def log_message(self, *_arguments):
        pass

    def piece(self, text):
        self.wfile.write(text.encode())
        self.wfile.flush()

    def begin(self, status=200, kind="text/event-stream", **headers):
        self.send_response(status)
        for name, value in {"content-type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class Script:
    """A server on loopback; its replies are given in order, the last one again and again."""

    def __init__(self):
        self.replies, self.models = [stream("Blue")], ["small"]
        self.bodies, self.keys = [], []
        self.lock, self.hung_up = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer((ADDRESS, 0), Handler)
        self.server.daemon_threads = True
        self.server.script = self
        self.url = f"http://{ADDRESS}:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def endpoint(self, *replies, **options):
        self.replies = list(replies)
        return Endpoint(self.url, "small", **{"retries": 2, **options})

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def collected():
    """What was made before this module is no garbage of its tests, and looking through it again and again takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def server(monkeypatch, collected):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)
    monkeypatch.delenv(module.KEY_VARIABLE, raising=False)
    script = Script()
    yield script
    script.close()
    gc.collect()  # what was left open warns here, and warnings are errors


def answer(status, body, **headers):
    def reply(handler):
        handler.begin(status, "application/json", **headers)
        handler.piece(json.dumps(body))

    return reply


def refuse(status, message, code=None, **headers):
    return answer(status, {"error": {"message": message, "type": "error", "code": code}}, **headers)


def event(delta=None, finish=None, usage=None, **more):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, **more}]
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "small", "choices": choices}
    return f"data: {json.dumps(chunk | ({'usage': usage} if usage else {}))}\n\n"


def stream(*pieces, finish="stop", usage=None, pause_s=0.0, **end):
    def reply(handler):
        handler.begin()
        handler.piece(event({"role": "assistant", "content": ""}))
        for piece in pieces:
            handler.piece(event({"content": piece}))
            time.sleep(pause_s)
        if finish:
            handler.piece(event({}, finish, **end))
        if usage:
            handler.piece(event(usage=usage))
        handler.piece("data: [DONE]\n\n")

    return reply


def raw(*texts, silence_s=0.0):
    def reply(handler):
        handler.begin()
        for text in texts:
            handler.piece(text)
        time.sleep(silence_s)

    return reply


def test_everything_asked_is_passed_on(server):
    messages = [Message("system", "Be brief."), Message("user", "Which?")]
    request = Request(messages, 5, temperature=0.5, top_p=0.9, seed=7, stop=("a", "b"))
    run(server.endpoint(stream("Green")), request)
    body = server.bodies[0]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    wanted = {"model": "small", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["a", "b"]}
    assert {name: body[name] for name in wanted} == wanted
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert "response_format" not in body
    assert "logprobs" not in body


def test_usage_and_times_are_the_servers(server):
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 9},
    }
    endpoint = server.endpoint(stream(" Blue", " and", " red ", usage=usage, pause_s=0.05))
    seen = []
    result = run(endpoint, ask(), lambda text, tokens: seen.append((text, tokens)))
    assert seen == [(" Blue", 1), (" Blue and", 2), (" Blue and red ", 3)]
    assert (result.text, result.finish_reason, result.stopped_by) == ("Blue and red", "stop", None)
    assert (result.prompt_tokens, result.completion_tokens, result.cached_tokens) == (11, 7, 9)
    assert 0 < result.prefill_s < 0.5
    assert 0.08 < result.decode_s < 2  # two pauses


def test_without_usage_the_pieces_are_counted_and_the_prompt_is_estimated(server):
    endpoint = server.endpoint(stream("one", " two", finish="length"))
    request = ask("Zähle ein wenig.")
    result = run(endpoint, request)
    assert (result.completion_tokens, result.finish_reason) == (2, "length")
    assert result.prompt_tokens == endpoint.count_tokens(request.messages) == math.ceil(17 / 3) + 8


def test_a_key_comes_from_the_argument_or_the_environment(server, monkeypatch):
    run(server.endpoint(stream("x")), ask())
    monkeypatch.setenv(module.KEY_VARIABLE, "from-environment")
    run(server.endpoint(stream("x")), ask())
    run(server.endpoint(stream("x"), api_key="given"), ask())
    assert server.keys == ["Bearer none", "Bearer from-environment", "Bearer given"]


def test_more_stop_texts_than_a_server_takes_are_cut_here(server):
    endpoint = server.endpoint(stream("one ", "two ", "three ", "four", pause_s=0.01))
    stop = ("v", "w1", "x", "y", "three")
    seen = []
    result = run(endpoint, ask(stop=stop), lambda text, _tokens: seen.append(text))
    assert server.bodies[0]["stop"] == list(stop[:4])
    assert (result.text, result.finish_reason, result.stopped_by) == ("one two", "stop", "three")
    assert result.completion_tokens == 3
    assert "three" not in "".join(seen)


def test_text_that_turns_out_to_begin_a_stop_text_is_not_shown_shorter(server):
    endpoint = server.endpoint(stream("one ", "thr", "ee ", "four", pause_s=0.01))
    seen = []
    shape = Json({"type": "object"})  # with a schema, stop texts are looked for here
    result = run(endpoint, ask(stop=("three",), shape=shape), lambda text, _tokens: seen.append(text))
    assert seen == ["one ", "one thr"]
    assert (result.text, result.stopped_by) == ("one", "three")


@pytest.mark.parametrize(("told", "known"), [("END", "END"), (128009, None), (None, None)])
def test_the_stop_text_that_a_server_tells(server, told, known):
    result = run(server.endpoint(stream("one", stop_reason=told)), ask(stop=("END",)))
    assert (result.text, result.stopped_by) == ("one", known)


def test_probabilities_are_placed_in_the_text(server):
    def token(text, logprob, raw=None):
        return {"token": text, "logprob": logprob, "bytes": raw and list(raw), "top_logprobs": []}

    def reply(handler):
        handler.begin()
        halves = "é".encode()
        for text, tokens in (
            (" Caf", [token(" Caf", -0.1)]),
            ("é", [token("\\xc3", -0.2, halves[:1]), token("\\xa9", -0.3, halves[1:])]),
            (" au", [token(" au", -0.4)]),
        ):
            handler.piece(event({"content": text}, logprobs={"content": tokens}))
        handler.piece(event({}, "stop", logprobs={"content": [token("<end>", -0.5)]}))

    result = run(server.endpoint(reply), ask(logprobs=True))
    assert (server.bodies[0]["logprobs"], result.text) == (True, "Café au")
    spans = [(result.text[token.start : token.end], token.logprob) for token in result.tokens]
    assert spans == [("Caf", -0.1), ("é", -0.3), (" au", -0.4)]
    assert result.completion_tokens == 4

    def other(handler):
        handler.begin()
        handler.piece(event({"content": "Blue"}, "stop", logprobs={"content": [token("Red", -0.1)]}))

    assert run(server.endpoint(other), ask(logprobs=True)).tokens == ()


def test_a_schema_goes_out_as_openai_wants_it_and_comes_back_as_text(server):
    shape = Choice(("yes", "no"))
    endpoint = server.endpoint(stream('{"cho', 'ice": "', "ye", 's"}'))
    seen = []
    result = run(endpoint, ask(shape=shape, stop=('"',)), lambda text, _tokens: seen.append(text))
    sent = server.bodies[0]
    assert sent["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": shape.json_schema(), "strict": True},
    }
    assert "stop" not in sent  # the quotation mark is JSON's, not the text's
    assert sent["max_tokens"] > 8  # the JSON around the word takes some
    assert (result.text, seen) == ("yes", ["ye", "yes"])
    lines = '{"lines": ["red  wine", "blue"]}'
    assert run(server.endpoint(stream(lines)), ask(shape=Lines(2))).text == "red wine\nblue"
    cut = run(server.endpoint(stream('{"lines": ["red", "bl', finish="length")), ask(shape=Lines(2)))
    assert (cut.text, cut.finish_reason) == ("red\nbl", "length")
    ended = run(server.endpoint(stream(lines)), ask(shape=Lines(2), stop=("\n",)))
    assert (ended.text, ended.stopped_by) == ("red wine", "\n")


@pytest.mark.parametrize(
    ("shape", "reply"),
    [
        (Choice(("yes", "no")), "Yes, I think so."),
        (Choice(("yes", "no")), '{"choice": "maybe"}'),
        (Lines(2), "1. red 2. blue"),
        (Lines(2), '{"queries": ["red"]}'),
        (Json({"type": "object", "required": ["a"]}), '{"a": 1'),
    ],
)
def test_a_server_that_ignores_the_schema_is_found_out(server, shape, reply):
    with fails(ModelError, server.url, repr(reply), shape.description()):
        run(server.endpoint(stream(reply)), ask(shape=shape))


def test_a_server_that_knows_the_older_form_of_schemas_gets_that(server):
    notices = []
    no = refuse(500, "Input should be 'text' or 'json_object', not 'json_schema'")
    endpoint = server.endpoint(no, stream('{"choice": "no"}'), notice=notices.append, retries=0)
    assert run(endpoint, ask(shape=Choice(("yes", "no")))).text == "no"
    assert run(endpoint, ask(shape=Choice(("yes", "no")))).text == "no"
    assert [body["response_format"]["type"] for body in server.bodies] == ["json_schema", "json_object", "json_object"]
    assert server.bodies[1]["response_format"]["schema"] == Choice(("yes", "no")).json_schema()
    assert endpoint.schema_format == "json_object"
    assert len(notices) == 1
    with fails(ModelError, "not 'json_schema'"):
        run(server.endpoint(no, retries=0), ask())  # nothing to do with a request that has no schema


def test_what_a_server_cannot_do_is_refused_before_it_is_asked(server):
    endpoint = server.endpoint(stream("x"))
    with fails(UsageError, "JSON"):
        run(endpoint, ask(shape=Gbnf('root ::= "x"')))
    with fails(UsageError, "max_tokens"):
        run(endpoint, ask(ignore_eos=True))
    with fails(UsageError, "'localhost:8000/v1'"):
        Endpoint("localhost:8000/v1", "small")
    assert server.bodies == []


def test_the_only_model_is_found_and_several_are_listed(server):
    assert Endpoint(server.url).name == "small"
    server.models = ["b", "a"]
    with fails(UsageError, 2, "a, b"):
        Endpoint(server.url)
    server.models = []
    with fails(ModelError, server.url):
        Endpoint(server.url)


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
        (raw('data: {"hello": 1}\n\n'), 1, ModelError, ("choices=None", "/v1")),
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
    outputs = Outputs(lines.append, None, lambda _message: None, lambda _count: None)
    questions = [Question(str(number), text) for number, text in enumerate(texts)]
    answer_in_order(engine, PipelineName.NAIVE, questions, outputs, ordered=True)
    assert [line["question"] for line in lines] == texts
    assert lines[0]["answer"] == lines[-1]["answer"] == "Blue"
    for line, (_reply, told) in zip(lines[1:-1], TROUBLES.values(), strict=True):
        assert told in line["error"]["message"], line


@pytest.fixture(scope="module")
def llama_url(tmp_path_factory):
    from telerag_cli.llm.models import resolve_model

    with socket.create_server((ADDRESS, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(resolve_model(None, None))]
    command += ["--host", ADDRESS, "--port", str(port), "--n_ctx", "1024", "--model_alias", "small"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    url = f"http://{ADDRESS}:{port}/v1"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/models", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.model
def test_llama_answers_streams_and_stops(llama_url):
    endpoint = Endpoint(llama_url, parallel=2)
    assert endpoint.name == "small"
    # The server computes a prompt it has seen in another way, which rounds differently.
    run(endpoint, ask("Name a colour.", 12))
    seen = []
    first = run(endpoint, ask("Name a colour.", 12), lambda text, tokens: seen.append((text, tokens)))
    assert seen[-1][0].strip() == first.text
    assert [tokens for _text, tokens in seen] == list(range(1, first.completion_tokens + 1))
    assert first.prefill_s > 0
    assert first.decode_s > 0
    assert run(endpoint, ask("Name a colour.", 12)).text == first.text
    word = first.text.split()[2]
    stopped = run(endpoint, ask("Name a colour.", 12, stop=(word,)))
    assert (stopped.text, stopped.finish_reason) == (first.text.split(word)[0].strip(), "stop")
    told = run(endpoint, ask("Name a colour.", 12, logprobs=True))
    assert "".join(told.text[token.start : token.end] for token in told.tokens) == told.text
    assert all(token.logprob <= 0 for token in told.tokens)


@pytest.mark.model
def test_llama_keeps_to_shapes(llama_url):
    notices = []
    endpoint = Endpoint(llama_url, "small", notice=notices.append)
    choice = run(endpoint, ask("Is the sky blue?", 8, shape=Choice(("certainly", "hardly"))))
    assert choice.text in ("certainly", "hardly")
    assert len(notices) == 1
    lines = run(endpoint, ask("Name colours.", 40, shape=Lines(3)))
    assert 1 <= len(lines.text.splitlines()) <= 3
    with fails(ModelError, llama_url):
        run(Endpoint(llama_url, "small", retries=0), ask("word " * 2000))
