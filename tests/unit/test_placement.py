"""Where the index goes: which tier is chosen, what it takes, and what contradicts itself."""

from dataclasses import replace

import numpy as np
import pytest

from expect import fails
from indexes import make_index, make_vectors
from telerag_cli.config import EngineConfig, Metric, Storage, TierConfig, TierKind
from telerag_cli.engine.memory_plan import plan_llm, plan_tier
from telerag_cli.engine.opening import open_retriever
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.index.scoring import best, score_again
from telerag_cli.tiers.cuda import gpu as cuda_gpu
from telerag_cli.tiers.cuda.scoring import WORKSPACE_BYTES
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.units import format_bytes


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("place"), make_vectors(400, 16, 1), 20, Metric.IP, Storage.FLOAT32)[0]


@pytest.fixture
def found(monkeypatch):
    """A machine with one GPU, which is simulated."""
    gpu = SimulatedGpu()

    def find(device):
        if cuda_gpu.gpu_number(device):
            raise ResourceError("not there")
        return gpu

    monkeypatch.setattr(cuda_gpu, "find_gpu", find)
    return gpu


def test_a_machine_without_a_gpu_takes_the_host_tier_and_says_why(index, monkeypatch):
    def none(_device):
        raise ResourceError("none")

    monkeypatch.setattr(cuda_gpu, "find_gpu", none)
    planned = plan_tier(index, TierConfig())
    assert (planned.kind, planned.why) == (TierKind.HOST, "no GPU found")
    for named in (TierConfig(device="cuda:0"), TierConfig(gpu_memory=1 << 20), TierConfig(tier=TierKind.CUDA)):
        with fails(ResourceError, "none"):
            plan_tier(index, named)


def test_a_machine_with_a_gpu_takes_it_unless_told_otherwise(index, found):
    planned = plan_tier(index, TierConfig())
    assert (planned.kind, planned.why) == (TierKind.CUDA, "simulated GPU found")
    assert plan_tier(index, TierConfig(device="cpu")).why == "--device cpu"
    assert plan_tier(index, TierConfig(fast_memory=1 << 20)).why == "--fast-memory"
    assert plan_tier(index, TierConfig(tier=TierKind.HOST)).kind is TierKind.HOST
    with fails(ResourceError, "not there"):
        plan_tier(index, TierConfig(device="cuda:1"))


def test_an_index_larger_than_the_hosts_memory_takes_the_host_tier(index, found, monkeypatch):
    monkeypatch.setattr("telerag_cli.engine.memory_plan.available_bytes", lambda: 1000)
    planned = plan_tier(index, TierConfig())
    assert planned.kind is TierKind.HOST
    assert format_bytes(1000) in planned.why
    # Asked for, it is refused in its own words when it is opened.
    monkeypatch.setattr("telerag_cli.tiers.slow.available_bytes", lambda: 1000)
    with fails(ResourceError, "80.0 KiB", "1000 B"):
        open_retriever(index, plan_tier(index, TierConfig(tier=TierKind.CUDA)), EngineConfig(index="."))


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (TierConfig(tier=TierKind.HOST, gpu_memory=1), ["--gpu-memory", "host"]),
        (TierConfig(tier=TierKind.HOST, require_pinned=True), ["--require-pinned", "host"]),
        (TierConfig(tier=TierKind.CUDA, fast_memory=1), ["--fast-memory", "--tier cuda"]),
        (TierConfig(tier=TierKind.CUDA, device="cpu"), ["--device cpu"]),
        (TierConfig(tier=TierKind.CUDA, device="tpu"), ["tpu"]),
    ],
)
def test_what_contradicts_itself(index, config, values):
    with fails(UsageError, *values):
        plan_tier(index, config)


def test_what_a_tier_takes_where(index):
    total = int(index.list_bytes.sum())
    host = plan_tier(index, TierConfig(tier=TierKind.HOST, fast_memory=8192))
    assert (host.ram_bytes, host.gpu_bytes) == (8192, 0)
    left = plan_tier(index, TierConfig(tier=TierKind.SIMULATED))
    assert (left.ram_bytes, left.gpu_bytes) == (total, 0)
    given = plan_tier(index, TierConfig(tier=TierKind.SIMULATED, gpu_memory=8192))
    assert (given.ram_bytes, given.gpu_bytes) == (total, 8192 + WORKSPACE_BYTES)
    assert ("index lists", "RAM, page-locked", "80.0 KiB") in given.rows
    assert ("arena", "simulated GPU", "8.00 KiB") in given.rows


@pytest.mark.model
def test_an_llm_that_goes_to_a_gpu_whole_is_planned_by_its_memory(index, found, monkeypatch):
    tier = plan_tier(index, TierConfig(tier=TierKind.SIMULATED, gpu_memory=8192))
    monkeypatch.setattr("telerag_cli.llm.llama_model.llama_cpp.llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(found, "free_bytes", lambda: 300 << 20)
    with fails(ResourceError, "16 ", "4,096", "--gpu-memory"):
        plan_llm(EngineConfig(index=".", n_gpu_layers=-1, concurrency=16), tier, print)
    planned = plan_llm(EngineConfig(index=".", n_gpu_layers=-1), tier, print)
    assert planned.concurrency == 1
    assert planned.rows[0][1] == "GPU"


def test_vectors_that_the_index_keeps_are_used(tmp_path):
    """int8 lists lose the order of what is near; scored again from the vectors, most of it is back."""
    vectors = make_vectors(4000, 8, 1)
    index, _ivf = make_index(tmp_path, vectors, 4, Metric.L2, Storage.INT8)
    queries = make_vectors(30, 8, 2)
    distances = np.square(queries[:, None] - vectors).sum(axis=2)
    true = np.argsort(distances, axis=1)[:, :10]
    recall = {}
    for name, kept, rescore in (("bare", None, None), ("again", vectors, None), ("unused", vectors, 0)):
        tier = plan_tier(index, TierConfig(tier=TierKind.SIMULATED))
        retriever = open_retriever(replace(index, vectors=kept), tier, EngineConfig(index=".", rescore=rescore))
        found = retriever.search(queries, 10, 4)
        recall[name] = np.mean([np.isin(rows, truth).mean() for rows, truth in zip(found.rows, true, strict=True)])
        if name == "again":
            np.testing.assert_allclose(found.scores, np.take_along_axis(distances, found.rows, 1), rtol=1e-5)
        retriever.close()
    assert recall["bare"] == recall["unused"] < 0.99
    assert recall["again"] == 1.0
    # Alone or together, a query's scores are the same bits.
    rows = true[:, ::-1].copy()
    together = score_again(queries, rows, vectors, 10, Metric.L2)
    alone = [
        score_again(query[None], row[None], vectors, 10, Metric.L2)[0][0]
        for query, row in zip(queries, rows, strict=True)
    ]
    np.testing.assert_array_equal(together[0], np.array(alone))
    assert best(*together, 10, Metric.L2)[1].tolist() == together[1].tolist()
