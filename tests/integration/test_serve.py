"""The server end to end over a scripted LLM: answers whole and in pieces, errors, limits, disconnects, draining."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import pytest

from animals import World
from served import serving
from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.llm.reasoning import only_reasoning
from telerag_cli.llm.scripted import Reply

ANSWERS = {
    "answers the question": "cats number 3 live in place 8",
    "Question: where do cats": "Cats number 3 live in place 8 and eat food 3. [1]",
    "Complete question:": "where do cats number 3 live exactly",
}
CHAT = "/v1/chat/completions"


class Asking:
    """A server and a client of it."""

    def __init__(self, engine, running, client):
        self.engine, self.running, self.client = engine, running, client
        self.get = client.get

    def post(self, body, path=CHAT, **how):
        return self.client.post(path, json=body, **how)

    def stream(self, body, path=CHAT):
        return self.client.stream("POST", path, json=body | {"stream": True})

    def streamed(self, body, path=CHAT):
        """The JSON of a stream's events, and whether it ended as it should."""
        with self.stream(body, path) as response:
            assert response.headers["content-type"].startswith("text/event-stream"), response.read()
            data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        return [json.loads(each) for each in data if each != "[DONE]"], data[-1] == "[DONE]"


@pytest.fixture
def server(engine_of):
    @contextmanager
    def started(script=ANSWERS, lookahead=Lookahead.REFINED, *, token_s=0.0, max_tokens=20, context=4096, **limits):
        engine = engine_of(script, lookahead, token_s=token_s, max_tokens=max_tokens, context_tokens=context)
        with (
            serving(engine, **limits) as running,
            httpx2.Client(base_url=running.url, timeout=10, trust_env=False) as client,
        ):
            yield Asking(engine, running, client)

    return started


@pytest.fixture(scope="module")
def usual(animal_index):
    """The server of all tests that need nothing special."""
    world = World.over(animal_index)
    engine = world.engine(ANSWERS, token_s=0.002)
    with serving(engine) as running, httpx2.Client(base_url=running.url, timeout=10, trust_env=False) as client:
        yield Asking(engine, running, client)
    world.close()


@pytest.fixture
def made(usual):
    usual.engine.forget()
    usual.engine.generator.requests.clear()
    usual.running.lines.clear()
    yield usual
    usual.running.idle()


def ask(question="where do cats number 3 live", model="telerag-naive", **more):
    return {"model": model, "messages": [{"role": "user", "content": question}], **more}


def test_an_answer_carries_citations_passages_and_times(made):
    response = made.post(ask(model="telerag-hyde", telerag={"timeline": True}))
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "chat.completion"
    message = body["choices"][0]["message"]
    assert message["content"] == ANSWERS["Question: where do cats"]
    (cited,) = message["annotations"]
    passage = body["telerag"]["passages"][0]
    assert cited["file_citation"]["file_id"] == passage["id"]
    assert cited["file_citation"]["index"] == 1
    assert body["telerag"]["question"] == "where do cats number 3 live"
    assert {stage["name"] for stage in body["telerag"]["stages"]} == {"passage", "answer"}
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert {lane["kind"] for lane in body["telerag"]["timeline"]["lanes"]} >= {"llm", "scoring"}
    made.running.idle()
    line = made.running.line()
    assert (line["path"], line["status"], line["outcome"], line["model"]) == (CHAT, 200, "done", "telerag-hyde")
    assert line["request_id"] == response.headers["x-request-id"]


def test_a_stream_is_the_same_answer_in_pieces(made):
    whole = made.post(ask(model="telerag-hyde")).json()
    chunks, complete = made.streamed(ask(model="telerag-hyde", stream_options={"include_usage": True}))
    assert complete
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert len([text for text in texts if text]) > 3
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    *_others, last, usage = chunks
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["delta"]["annotations"] == whole["choices"][0]["message"]["annotations"]
    assert last["telerag"]["passages"] == whole["telerag"]["passages"]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], whole["usage"]["total_tokens"])
    assert all("telerag" not in chunk for chunk in chunks[:-2])


def test_an_answer_that_is_only_reasoning_is_an_error_that_names_max_tokens(server, monkeypatch):
    async def think(_request, _on_text=None):
        raise only_reasoning("small", 5)

    with server() as made:
        monkeypatch.setattr(made.engine.generator, "generate", think)
        error = made.post(ask(model="telerag-naive"))
        assert (error.status_code, error.json()["error"]["code"]) == (400, "only_reasoning")
        assert error.json()["error"]["param"] == "max_tokens"
        warming = made.running.service.warm_up(made.engine)
        asyncio.run_coroutine_threadsafe(warming, made.running.loop).result(10)  # which is no failure


@pytest.mark.parametrize(("anew", "told"), [(["Blue", "Blue sky"], "Blue sky"), (["Red"], None)])
def test_a_text_that_begins_anew_goes_on_or_is_an_error(server, monkeypatch, anew, told):
    with server() as made:
        generate = made.engine.generator.generate

        async def begun_twice(request, on_text):
            for text in ["Bl", "Blue", "B", *anew]:
                on_text(text, 1)
                await asyncio.sleep(0.02)
            return replace(await generate(request), text=anew[-1])

        monkeypatch.setattr(made.engine.generator, "generate", begun_twice)
        chunks, _complete = made.streamed(ask(model="telerag-naive"))
        texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if "choices" in chunk]
        errors = [chunk["error"] for chunk in chunks if "error" in chunk]
        assert ("".join(texts), len(errors)) == ((told, 0) if told else ("Blue", 1))


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_every_chunk_can_count_tokens(made, path):
    body = (
        ask(model="telerag-hyde")
        if path == CHAT
        else {"model": "telerag-hyde", "prompt": ["where do cats number 3 live"] * 2}
    )
    whole = made.post(body, path).json()
    chunks, complete = made.streamed(body | {"stream_options": {"continuous_usage_stats": True}}, path)
    assert complete
    counts = [chunk["usage"] for chunk in chunks]
    assert [count["total_tokens"] for count in counts] == [
        count["prompt_tokens"] + count["completion_tokens"] for count in counts
    ]
    for name in ("prompt_tokens", "completion_tokens"):
        assert [count[name] for count in counts] == sorted(count[name] for count in counts)
    assert 0 < counts[1]["completion_tokens"] < counts[-1]["completion_tokens"]
    assert counts[1]["prompt_tokens"] > 0
    assert counts[-1] == whole["usage"]


def test_events_tell_what_goes_on(made):
    chunks, complete = made.streamed(ask(model="telerag-hyde", telerag={"events": True, "timeline": True}))
    told = [chunk["telerag"] for chunk in chunks if "telerag" in chunk]
    kinds = [each.get("event") for each in told]
    assert complete
    assert [kind for kind in dict.fromkeys(kinds) if kind] == ["queued", "stage", "text", "retrieving", "retrieved"]
    written = [each["text"] for each in told if each.get("event") == "text"]
    assert written[-1] == ANSWERS["answers the question"]
    assert told[-1]["timeline"]["total_s"] > 0


def test_a_conversation_is_rewritten_with_its_history(made):
    messages = [
        {"role": "system", "content": "Speak plainly."},
        {"role": "user", "content": "tell me of cats number 3"},
        {"role": "assistant", "content": "They live in place 8."},
        {"role": "user", "content": "and where do they live"},
    ]
    body = made.post({"model": "telerag-naive", "messages": messages}).json()
    assert body["telerag"]["standalone"] == "where do cats number 3 live exactly"
    assert body["telerag"]["question"] == "and where do they live"
    rewriting, answering = made.engine.generator.requests
    assert "They live in place 8." in rewriting.messages[-1].content
    assert answering.messages[0].content.endswith("Speak plainly.")


def test_what_a_request_says_reaches_the_llm(server):
    schema = {"type": "object", "properties": {"place": {"type": "integer"}}, "required": ["place"]}
    said = {"max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": [" STOP"]}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    with server({"Question:": '{"place": 8} STOP more'}) as made:
        body = made.post(ask(**said, response_format=form)).json()
        (request,) = made.engine.generator.requests
        reached = (request.max_tokens, request.temperature, request.top_p, request.seed, list(request.stop))
        assert reached == tuple(said.values())
        assert request.shape.schema == schema
        assert json.dumps(schema) in request.messages[0].content
        assert body["choices"][0]["message"]["content"] == '{"place": 8}'
        assert made.engine.config.max_tokens == 20  # the next request has the server's own again


def test_an_answer_takes_half_of_the_context_at_most(server):
    with server(context=400) as made:
        assert made.post(ask(max_tokens=10**9)).status_code == 200
        assert made.engine.generator.requests[0].max_tokens == 200


def test_lookahead_is_chosen_for_each_request(server):
    with server(token_s=0.003, at_once=1) as made:
        off, refined = (
            made.post(ask(model="telerag-hyde", telerag={"lookahead": mode})).json()["telerag"]
            for mode in ("off", "refined")
        )
        assert off["lookahead"]["orders"] == 0
        assert refined["lookahead"]["orders"] >= 1
        assert off["passages"] == refined["passages"]


def test_a_fresh_answer_finds_nothing_of_earlier_ones(made):
    found = [
        made.post(ask(telerag={"lookahead": "off", "fresh": fresh})).json()["telerag"] for fresh in (False, False, True)
    ]
    cold, warm, fresh = (each["lookahead"] for each in found)
    assert (cold["lists_hit"], fresh["lists_hit"]) == (0, 0)
    assert warm["lists_hit"] == cold["lists_wanted"]
    assert found[2]["passages"] == found[0]["passages"]


def test_completions_answer_each_prompt(server):
    prompts = {"model": "telerag-naive", "prompt": ["where do cats live", "what do bees eat"]}
    with server({"where do cats": "Cats. [1]", "what do bees": "Bees hum. [2]"}, token_s=0.002) as made:
        whole = made.post(prompts, "/v1/completions").json()
        assert [choice["text"] for choice in whole["choices"]] == ["Cats. [1]", "Bees hum. [2]"]
        chunks, complete = made.streamed(prompts, "/v1/completions")
        assert complete
        for index, choice in enumerate(whole["choices"]):
            pieces = [c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index]
            assert "".join(pieces) == choice["text"]


def schema_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


OUTSIDE = schema_of({"type": "object", "$ref": "https://x.org"})
JSON = {"type": "json_object"}
WRONG = [
    (ask(model="gpt-4o"), 404, "model", "model_not_found"),
    (ask(question=""), 400, "messages.0.content", "invalid_value"),
    (ask(n=2), 400, "n", "unsupported_parameter"),
    (ask(frobnicate=1), 400, "frobnicate", "unknown_parameter"),
    (ask(temperature=3), 400, "temperature", "invalid_value"),
    (ask(question="where " * 5000), 400, "messages", "context_length_exceeded"),
    ({"model": "telerag-naive"}, 400, "messages", "missing_required_parameter"),
    (ask(model="telerag-flare", response_format=JSON), 400, "response_format", "unsupported_parameter"),
    (ask(response_format=OUTSIDE), 400, "response_format.json_schema.schema", "invalid_json_schema"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(made, stream):
    for body, status, param, code in WRONG:
        response = made.post(body | {"stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
        assert set(error) == {"message", "type", "param", "code"}
    made.running.idle()


def test_an_error_of_the_engine_says_nothing_of_it(server):
    with server({}) as made:  # the script has no answer
        response = made.post(ask())
        assert response.status_code == 500
        assert response.headers["x-request-id"] in response.json()["error"]["message"]
        assert "script" not in response.text
        assert "script" in made.running.line()["error"]
        made.running.idle()


def test_an_error_in_a_stream_ends_it_without_done(server):
    with server(lambda _request: Reply("Cats live here and there.", fails_after=3), token_s=0.01) as made:
        chunks, complete = made.streamed(ask())
        assert not complete
        assert chunks[-1]["error"]["code"] == "internal_error"
        made.running.idle()


@pytest.mark.parametrize("model", ["telerag-naive", "telerag-hyde"])
def test_who_leaves_frees_everything(server, model):
    script = {"answers the question": "word " * 400, "Question:": "word " * 400}
    with server(script, token_s=0.01, max_tokens=400, at_once=1) as made:
        with made.stream(ask(model=model, telerag={"events": True})) as response:
            next(response.iter_lines())
        made.running.idle()
        with pytest.raises(httpx2.ReadTimeout):
            made.post(ask(model=model), timeout=0.2)
        made.running.idle()
        assert made.engine.generator.running == 0


def test_a_full_queue_refuses_and_says_when_to_come_again(server):
    with server({"Question:": "word " * 30}, token_s=0.015, max_tokens=50, at_once=1, queue=1) as made:
        others = [threading.Thread(target=made.post, args=(ask(),)) for _ in range(2)]
        for other in others:
            other.start()
        deadline = time.monotonic() + 5
        while made.running.service.state()["queue"]["waiting"] < 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        refused = made.post(ask())
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        for other in others:
            other.join()
        assert made.post(ask()).status_code == 200
        assert 'telerag_requests_rejected_total{reason="queue"} 1.0' in made.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_take_only_so_long(server, stream):
    with server({"answers the question": "word " * 400}, token_s=0.01, max_tokens=400, request_s=0.3) as made:
        response = made.post(ask(model="telerag-hyde", stream=stream))
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        made.running.idle()


def test_while_loading_it_is_there_but_not_ready(server):
    with server(is_open=False) as made:
        assert made.get("/health").status_code == 200
        assert made.get("/ready").status_code == 503
        refused = [made.post(ask()), made.post({"query": "a"}, "/v1/vector_stores/vs_telerag/search")]
        refused += [made.post({"model": "a", "input": "a"}, "/v1/embeddings"), made.get("/v1/vector_stores")]
        for response in refused:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
            assert int(response.headers["retry-after"]) > 0
        assert made.get("/telerag/state").json()["status"] == "loading"
        assert made.get("/metrics").status_code == 200


def test_answers_are_not_crossed(server):
    animals = ["cats", "dogs", "owls", "bees", "ants", "eels", "bats", "cows"]
    script = {f"Question: where do {animal}": f"{animal} live there." for animal in animals}

    async def all_at_once(url):
        async with httpx2.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:

            async def one(animal):
                body = ask(f"where do {animal} number 1 live", model=f"telerag-{'hyde' if animal < 'c' else 'naive'}")
                return animal, (await client.post(CHAT, json=body)).json()

            return await asyncio.gather(*map(one, animals * 3))

    script["answers the question"] = "somewhere"
    with server(script, token_s=0.001, at_once=3, queue=64) as made:
        for animal, body in asyncio.run(all_at_once(made.running.url)):
            assert body["choices"][0]["message"]["content"] == f"{animal} live there."
            assert animal in body["telerag"]["question"]
        made.running.idle()


def test_models_are_the_pipelines_and_the_embedder(made):
    names = [model["id"] for model in made.get("/v1/models").json()["data"]]
    assert names[:-1] == [f"telerag-{name}" for name in PipelineName]
    assert len(names) == 8
    assert made.get("/v1/models/telerag-hyde").json()["id"] == "telerag-hyde"
    assert made.get("/v1/models/other").status_code == 404
    assert made.get("/nowhere").json()["error"]["type"] == "not_found_error"


def test_a_question_that_fits_no_context_is_refused_by_its_beginning(server, monkeypatch):
    with server() as made:
        texts = []
        usual = made.engine.generator.count_tokens

        def count_tokens(messages):
            texts.extend(message.content for message in messages)
            return usual(messages)

        monkeypatch.setattr(made.engine.generator, "count_tokens", count_tokens)
        refused = made.post(ask(question="where " * 150_000))
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert [len(text) for text in texts] == [8 * 4096]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/models", "/v1/models"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/models/telerag-hyde", "/v1/models/telerag-hyde"),
        ("/openai/embeddings", "/v1/embeddings"),
        ("/v1/vector_stores/vs_1/files", None),
        ("/v1/images", None),
        ("/nowhere" * 1000, None),
    ],
)
def test_a_missing_or_doubled_v1_is_pointed_out(made, path, meant):
    error = made.client.post(path).json()["error"]
    assert (f"It is at {meant}:" in error["message"]) if meant else ("It is at" not in error["message"])


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_may_ask_for_the_head_alone(made, path):
    usual, head = made.client.get(path), made.client.head(path)
    assert (head.status_code, head.headers["content-type"]) == (usual.status_code, usual.headers["content-type"])
