"""OpenAI-compatible endpoints: a server that does what a test tells it to, and llama-cpp-python's own."""

import math
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from expect import fails
from scripted_endpoint import ADDRESS, ask, event, refuse, run, stream
from telerag_cli.errors import ModelError, UsageError
from telerag_cli.llm import refusals as module
from telerag_cli.llm.base import Message, Request
from telerag_cli.llm.endpoint import Endpoint
from telerag_cli.llm.shapes import Choice, Json, Lines


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
    assert endpoint.dialect.schema_format == "json_object"
    assert len(notices) == 1
    with fails(ModelError, "not 'json_schema'"):
        run(server.endpoint(no, retries=0), ask())  # nothing to do with a request that has no schema


def test_what_a_server_cannot_do_is_refused_before_it_is_asked(server):
    endpoint = server.endpoint(stream("x"))
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
