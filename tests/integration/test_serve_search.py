"""Embeddings and vector-store search over the small world, and how deep searches go beside others."""

import asyncio
import base64
import json
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

import wrapped_app
from animals import ANIMALS, DIMENSION, TEXTS, WordHashes, World
from served import assembled, open_over
from telerag_cli.config import Metric
from telerag_cli.corpus.embeddings import PASSAGE_SCHEMA
from telerag_cli.index.passages import write_passages
from telerag_cli.server import embeddings, vector_stores
from telerag_cli.server.filters import attributes, passes
from telerag_cli.server.requests import VectorSearchRequest
from telerag_cli.server.responses import EmbeddingList, ErrorBody, VectorStore, VectorStoreList, VectorStoreSearchPage
from telerag_cli.server.vector_stores import shown_scores

MAX_TOKENS = 12
MODEL = "embedder"
SEARCH = "/v1/vector_stores/vs_telerag/search"
QUERY = "owls number 3 live in place 8"
OTHER = "bats number 4 live in place 2"
AT_LEAST_20 = {"type": "gte", "key": "number", "value": 20}


class Words(WordHashes):
    """Knows how many words it sees, and can be held up."""

    info = SimpleNamespace(max_tokens=MAX_TOKENS)

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    def count_query_tokens(self, text):
        return len(text.split())

    def encode_queries(self, texts):
        self.batches.append(len(texts))
        assert self.gate.wait(5)
        return super().encode_queries(texts)


def metadata_of(row):
    animal, number = ANIMALS[row // 30], row % 30
    return {
        "animal": animal,
        "number": number,
        "half": number / 2,
        "even": number % 2 == 0,
        "tags": [animal],
        "none": None,
        **({"title": f"About\n{animal}"} if number else {}),
    }


@pytest.fixture(scope="module")
def only_engine(tmp_path_factory):
    """An engine over passages with metadata, whose embedder is `Words`."""
    world = World(tmp_path_factory.mktemp("search") / "index")
    metadata = [json.dumps(metadata_of(n)) for n in range(len(TEXTS))]
    rows = pa.record_batch([[f"p{n}" for n in range(len(TEXTS))], TEXTS, metadata], schema=PASSAGE_SCHEMA)
    assert sum(write_passages([rows], world.index.paths.passages)) == len(TEXTS)
    yield world.engine({}, embedder=Words())
    world.close()


@pytest.fixture
def engine(only_engine):
    only_engine.embedder.batches.clear()
    return only_engine


@pytest.fixture
def batches(engine, monkeypatch):
    """The ``k`` and the number of searches of each batch."""
    noted = []
    usual = engine.retriever.search_batch

    def search_batch(searches, k, nprobe):
        noted.append((k, len(searches)))
        return usual(searches, k, nprobe)

    monkeypatch.setattr(engine.retriever, "search_batch", search_batch)
    return noted


def app_over(engine):
    service, app = assembled(lambda _line: None)
    open_over(service, engine)
    return app


@pytest.fixture
def client(engine):
    return TestClient(app_over(engine))


def page(client, **body):
    response = client.post(SEARCH, json={"query": QUERY} | body)
    assert response.status_code == 200, response.text
    return VectorStoreSearchPage.model_validate(response.json())


def embedded(client, texts, **options):
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": texts} | options)
    assert response.status_code == 200, response.text
    return EmbeddingList.model_validate(response.json())


def ids(found):
    return [result.file_id for result in found.data]


def all_candidates(engine, *queries):
    """Rows and scores of all that the probed lists hold, best first, each once."""
    found = engine.retriever.search(WordHashes().encode_queries(queries), len(TEXTS), engine.nprobe)
    best = {}
    for score, row in zip(found.scores.ravel().tolist(), found.rows.ravel().tolist(), strict=True):
        if row >= 0:
            best[row] = max(score, best.get(row, score))
    return sorted(best.items(), key=lambda item: (-item[1], item[0]))


def error_of(response, status):
    assert response.status_code == status, response.text
    return ErrorBody.model_validate(response.json()).error


# Embeddings


def test_embeddings_are_those_of_questions(client, engine):
    answer = embedded(client, [QUERY, "bats"])
    assert [item.index for item in answer.data] == [0, 1]
    vectors = np.array([item.embedding for item in answer.data], np.float32)
    np.testing.assert_array_equal(vectors, WordHashes().encode_queries([QUERY, "bats"]))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 8
    assert answer.model == MODEL


def test_base64_holds_the_same_numbers(client):
    plain, packed = (embedded(client, QUERY, encoding_format=form) for form in ("float", "base64"))
    data = base64.b64decode(packed.data[0].embedding)
    assert list(struct.unpack(f"<{DIMENSION}f", data)) == plain.data[0].embedding
    assert packed.usage == plain.usage


def test_many_texts_are_embedded_in_batches_and_keep_their_order(client, engine):
    texts = [f"{animal} {n}" for n in range(7) for animal in ANIMALS]
    answer = embedded(client, texts)
    assert engine.embedder.batches == [32, 32, 6]
    assert [item.index for item in answer.data] == list(range(70))
    vectors = np.array([item.embedding for item in answer.data], np.float32)
    np.testing.assert_array_equal(vectors, WordHashes().encode_queries(texts))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5], [(0, 1)]),
        ([2000], [(0, 1)]),
        ([2000, 2000, 1], [(0, 1), (1, 2), (2, 3)]),
        ([1000, 24, 1], [(0, 2), (2, 3)]),
        ([1] * 33, [(0, 32), (32, 33)]),
        ([1] * 64, [(0, 32), (32, 64)]),
    ],
)
def test_a_batch_is_short_in_texts_and_tokens(counts, expected):
    assert list(embeddings.batches(counts)) == expected


@pytest.mark.parametrize(
    ("body", "status", "param", "values"),
    [
        ({"model": "gpt-5"}, 404, "model", ["gpt-5"]),
        ({"model": "telerag-naive"}, 404, "model", ["telerag-naive", MODEL]),
        ({"dimensions": DIMENSION + 1}, 400, "dimensions", [DIMENSION + 1, DIMENSION]),
        ({"input": "word " * 13}, 400, "input", [13, 12]),
        ({"input": ["a"] * 40 + ["word " * 13]}, 400, "input.40", [13, 12]),
    ],
)
def test_what_cannot_be_embedded_is_refused_before_anything_is(client, engine, body, status, param, values):
    error = error_of(client.post("/v1/embeddings", json={"model": MODEL, "input": "owls"} | body), status)
    assert error.param == param
    assert [value for value in values if str(value) not in error.message] == []
    assert engine.embedder.batches == []


def test_the_models_own_dimension_may_be_named(client):
    assert embedded(client, "word " * MAX_TOKENS, dimensions=DIMENSION)


async def post(app, path, body, gone):
    """The status of a request whose client hangs up once the event is set; nobody is there to read it then."""
    parts = [wrapped_app.body(json.dumps(body).encode())]

    async def receive():
        if parts:
            return parts.pop()
        await gone.wait()
        return wrapped_app.GONE

    headers = [(b"content-type", b"application/json")]
    sent = await wrapped_app.driven(app, receive, [], path=path, headers=headers)
    return sent[0]["status"]


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_long_request_ends_when_its_client_is_gone_and_lets_others_between(engine):
    app, encoder = app_over(engine), engine.embedder

    async def run():
        gone = asyncio.Event()
        encoder.gate.clear()
        long = asyncio.create_task(post(app, "/v1/embeddings", {"model": MODEL, "input": ["a"] * 320}, gone))
        await until(lambda: encoder.batches == [32])
        short = asyncio.create_task(post(app, "/v1/embeddings", {"model": MODEL, "input": ["b"] * 3}, asyncio.Event()))
        await asyncio.sleep(0.02)
        encoder.gate.set()
        assert await short == 200
        assert len(encoder.batches) < 10
        encoder.gate.clear()
        gone.set()
        status = await long
        encoder.gate.set()
        return status

    assert asyncio.run(run()) == 499
    assert sum(encoder.batches) < 323


# Vector stores


def test_the_index_is_the_one_vector_store(client, engine):
    listed = VectorStoreList.model_validate(client.get("/v1/vector_stores").json())
    assert [store.id for store in listed.data] == ["vs_telerag"]
    store = VectorStore.model_validate(client.get("/v1/vector_stores/vs_telerag").json())
    assert store == listed.data[0]
    assert store.file_counts.total == store.file_counts.completed == len(TEXTS)
    assert store.usage_bytes == int(engine.retriever.index.list_bytes.sum())
    empty = VectorStoreList.model_validate(client.get("/v1/vector_stores?after=vs_telerag&limit=5").json())
    assert (empty.data, empty.first_id, empty.has_more) == ([], None, False)
    for limit, code in ((0, "invalid_value"), ("many", "invalid_type")):
        error = error_of(client.get(f"/v1/vector_stores?limit={limit}"), 400)
        assert (error.param, error.code) == ("limit", code)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/vector_stores/vs_1"), ("POST", "/v1/vector_stores/vs_1/search")]
)
def test_there_is_no_other(client, method, path):
    assert "vs_1" in error_of(client.request(method, path, json={"query": "x"}), 404).message


@pytest.mark.parametrize("k", [1, 10, 50])
def test_search_finds_the_best_of_the_probed_lists(client, engine, k):
    found = page(client, max_num_results=k)
    expected = all_candidates(engine, QUERY)[:k]
    assert ids(found) == [f"p{row}" for row, _score in expected]
    assert [result.score for result in found.data] == [score for _row, score in expected]
    assert found.search_query == [QUERY]
    assert not found.has_more


def test_a_result_tells_what_is_known_of_its_passage(client):
    (result,) = page(client, query=TEXTS[63], max_num_results=1).data
    assert result.file_id == "p63"
    assert result.filename == "About owls"
    assert result.attributes == {"animal": "owls", "number": 3, "half": 1.5, "even": False, "title": "About\nowls"}
    assert [(part.type, part.text) for part in result.content] == [("text", TEXTS[63])]
    (untitled,) = page(client, query=TEXTS[60], max_num_results=1).data
    assert untitled.filename == untitled.file_id == "p60"


def test_of_several_queries_the_best_over_all_are_found_each_once(client, engine):
    queries = [QUERY, OTHER, QUERY]
    found = page(client, query=queries, max_num_results=20)
    expected = all_candidates(engine, *queries)[:20]
    assert ids(found) == [f"p{row}" for row, _score in expected]
    assert len(set(ids(found))) == 20


@pytest.mark.parametrize(
    "some",
    [
        {"type": "eq", "key": "even", "value": True},
        {"type": "ne", "key": "animal", "value": "owls"},
        {"type": "and", "filters": [AT_LEAST_20, {"type": "lt", "key": "half", "value": 12.5}]},
        {"type": "eq", "key": "number", "value": 29},
        {"type": "eq", "key": "animal", "value": "wolves"},
    ],
)
@pytest.mark.parametrize("queries", [[QUERY], [QUERY, OTHER]])
def test_a_filter_looks_as_deep_as_the_probed_lists_go(client, engine, some, queries):
    request = VectorSearchRequest.model_validate({"query": queries, "filters": some})
    expected = [
        row for row, _score in all_candidates(engine, *queries) if passes(request.filters, attributes(metadata_of(row)))
    ]
    found = page(client, query=queries, filters=some, max_num_results=5)
    assert ids(found) == [f"p{row}" for row in expected[:5]]


def test_what_does_not_reach_the_threshold_is_not_found_nor_looked_for(client, engine, batches):
    everything = all_candidates(engine, QUERY)
    threshold = everything[6][1]
    found = page(client, max_num_results=50, ranking_options={"score_threshold": threshold})
    assert ids(found) == [f"p{row}" for row, score in everything if score >= threshold]
    batches.clear()
    nothing = {"type": "eq", "key": "animal", "value": "wolves"}
    assert page(client, filters=nothing, ranking_options={"score_threshold": threshold}).data == []
    assert batches == [(10, 1)]
    batches.clear()
    assert page(client, filters=nothing).data == []
    assert batches[:2] == [(10, 1), (40, 1)]


def test_a_search_that_considers_too_many_says_that_there_are_more(client, engine, monkeypatch):
    monkeypatch.setattr(vector_stores, "MAX_CANDIDATES", 25)
    everything = all_candidates(engine, QUERY)
    nothing = page(client, filters={"type": "eq", "key": "animal", "value": "wolves"})
    assert (nothing.data, nothing.has_more) == ([], True)
    known = metadata_of(everything[24][0])
    last = {"type": "and", "filters": [{"type": "eq", "key": key, "value": known[key]} for key in ("animal", "number")]}
    assert ids(page(client, filters=last, max_num_results=1)) == [f"p{everything[24][0]}"]


def test_distances_become_scores_of_which_larger_is_nearer():
    np.testing.assert_array_equal(shown_scores(np.array([0, 1, 3], np.float32), Metric.L2), [1, 0.5, 0.25])
    np.testing.assert_array_equal(shown_scores(np.array([-1, 2], np.float32), Metric.IP), [-1, 2])


def test_a_search_ends_when_its_client_is_gone(engine):
    app = app_over(engine)

    async def run():
        gone = asyncio.Event()
        engine.embedder.gate.clear()
        asked = asyncio.create_task(post(app, SEARCH, {"query": QUERY}, gone))
        await until(lambda: engine.embedder.batches)
        gone.set()
        status = await asked
        engine.embedder.gate.set()
        return status

    assert asyncio.run(run()) == 499
