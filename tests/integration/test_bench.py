"""The benchmark's systems side by side over a scripted LLM, its figures, and its page cache."""

import asyncio
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from animals import TEXTS, WordHashes, bench_setup
from expect import fails
from telerag_cli.bench import page_cache
from telerag_cli.bench.answering import MEAN, Ask, breakdown, hit_rate, latency, nprobe, throughput
from telerag_cli.bench.baselines import FaissMemory, FaissOnDisk, Recalled
from telerag_cli.bench.measure import Work, checks, comparisons, stages_ms, take_turns, ttft_ms
from telerag_cli.bench.statistics import MIN_PAIRS, mean_ratio, ratio, summary
from telerag_cli.bench.suites import Pages, SystemName
from telerag_cli.bench.systems import Harness
from telerag_cli.config import PipelineName
from telerag_cli.errors import ModelError, ResourceError, UsageError
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.scripted import ScriptedGenerator
from telerag_cli.llm.shapes import Choice
from telerag_cli.pipelines.registry import make_pipeline

QUESTIONS = (
    "Where do owls live?",
    "Where do bees live?",
    "What do ants eat?",
    "What do cows eat?",
    "Where do eels live?",
)
SYSTEMS = (
    SystemName.FAISS_MEMORY,
    SystemName.FAISS_ONDISK,
    SystemName.FETCH,
    SystemName.QUESTION,
    SystemName.REFINED,
    SystemName.USELESS,
    SystemName.RESIDENT,
    SystemName.LLM_ONLY,
)


def script(request):
    """Says of what was asked, so that texts differ from question to question."""
    if isinstance(request.shape, Choice):
        return request.shape.options[0]
    words = request.messages[-1].content.lower().split()
    animal = next((word for word in words if any(text.startswith(f"{word} ") for text in TEXTS)), "owls")
    return f"{animal} number 3 live in place 8 and eat food 3, as is well known to all who have seen them"


@pytest.fixture
def setup(tmp_path):
    return bench_setup(tmp_path / "index", ScriptedGenerator(script, token_s=0.0001))


class Counting:
    """A progress display that counts."""

    def __init__(self, total):
        self.total, self.done = total, 0

    def __enter__(self):
        return self.advance

    def advance(self, count):
        self.done += count

    def __exit__(self, *_error):
        if not any(_error):
            assert self.done == self.total


def ask_of(setup, systems=SYSTEMS, pipelines=(PipelineName.HYDE,), **more):
    given = {"num_warmups": 1, "repeats": 1, "seed": 0, "detailed": True} | more
    return Ask(
        setup,
        systems,
        {"animals": QUESTIONS},
        [make_pipeline(name) for name in pipelines],
        counting=lambda _what, total: Counting(total),
        **given,
    )


def turns_of(setup, systems, questions=QUESTIONS):
    """Each system's turns at HyDE for some questions."""
    works = [Work({}, make_pipeline(PipelineName.HYDE), (question,)) for question in questions]
    with Harness.open(setup, systems) as rig:
        return take_turns(rig, works, systems, (), lambda _count: None)


def test_every_system_finds_and_writes_the_same(setup):
    pipelines = tuple(PipelineName)
    outcome = latency(ask_of(setup, pipelines=pipelines), [Pages.COLD])
    assert [check.name for check in outcome.checks if not check.held] == []
    assert len(outcome.cells) == len(pipelines) * len(SYSTEMS)
    assert all(cell.values["completed"] == 4 and cell.values["failed"] == 0 for cell in outcome.cells)
    by_system = {cell.system: cell.values for cell in outcome.cells if cell.key["pipeline"] == "hyde"}
    assert by_system["resident"]["hit_share"] == 1.0
    assert by_system["fetch"]["bytes_moved"] == 0
    assert by_system["refined"]["hit_share"] > by_system["fetch"]["hit_share"]
    assert by_system["llm-only"]["mean_retrieval_ms"] < by_system["fetch"]["mean_retrieval_ms"]
    assert set(outcome.systems) == set(SYSTEMS)
    assert all(configuration["what"] for configuration in outcome.systems.values())


def test_means_are_over_the_pipelines_that_generate_first(setup):
    systems = (SystemName.FAISS_ONDISK, SystemName.REFINED)
    pipelines = (PipelineName.NAIVE, PipelineName.HYDE, PipelineName.SUBQUESTION)
    outcome = latency(ask_of(setup, systems, pipelines), [Pages.COLD])
    mean = next(each for each in outcome.ratios if each.key["pipeline"] == MEAN)
    parts = [
        each for each in outcome.ratios if each.metric == "e2el_ms" and each.key["pipeline"] in ("hyde", "subquestion")
    ]
    assert mean.pairs == sum(each.pairs for each in parts) == 8
    if mean.ratio and all(each.ratio for each in parts):
        assert mean.ratio == pytest.approx(math.prod(each.ratio for each in parts) ** 0.5, rel=1e-3)


def test_warm_keeps_what_earlier_questions_left(setup):
    outcome = latency(ask_of(setup, (SystemName.FAISS_ONDISK, SystemName.FETCH), repeats=2), [Pages.COLD, Pages.WARM])
    hits = {
        (cell.system, cell.key["pages"]): cell.values["hit_share"]
        for cell in outcome.cells
        if "hit_share" in cell.values
    }
    assert hits["fetch", "warm"] > hits["fetch", "cold"] == 0
    assert {"cold", "warm"} <= {check.name for check in outcome.checks}


def test_cold_drops_the_pages_of_the_index(setup, tmp_path):
    path = setup.opened.index.paths.lists
    page_cache.fill(path)
    before = page_cache.share(path)
    page_cache.drop(path)
    after = page_cache.share(path)
    assert before == 1.0
    assert after == 0.0
    turns = turns_of(setup, (SystemName.FAISS_ONDISK, SystemName.FETCH))
    assert max(turn.pages_left for turn in turns) == 0.0


def test_a_cold_run_over_kept_pages_is_told(setup, monkeypatch):
    monkeypatch.setattr(page_cache, "drop", lambda _path: None)
    page_cache.fill(setup.opened.index.paths.lists)
    outcome = breakdown(ask_of(setup, (SystemName.FAISS_ONDISK, SystemName.FETCH)))
    cold = next(check for check in outcome.checks if check.name == "cold")
    assert not cold.held
    assert "100.00%" in cold.says


def test_an_answer_that_differs_is_told(setup):
    turns = turns_of(setup, (SystemName.FETCH, SystemName.REFINED), QUESTIONS[:1])
    assert all(check.held for check in checks(turns, Pages.COLD) if check.name != "cold")
    turns[0].answers[0].found.pop()
    failed = [check.name for check in checks(turns, Pages.COLD) if not check.held]
    assert "same passages" in failed
    assert "same answers" not in failed


def test_systems_take_turns_in_rotating_order_and_llm_only_is_never_first(setup):
    systems = (SystemName.LLM_ONLY, SystemName.FETCH, SystemName.REFINED)
    turns = turns_of(setup, systems)
    orders = [tuple(turn.system for turn in turns[start : start + 3]) for start in range(0, len(turns), 3)]
    assert len(set(orders)) == 3
    assert all(order[0] is not SystemName.LLM_ONLY and set(order) == set(systems) for order in orders)


def test_llm_only_alone_has_nothing_to_give(setup):
    with fails(UsageError, "llm-only"):
        turns_of(setup, (SystemName.LLM_ONLY,))
    with fails(ModelError):
        asyncio.run(Recalled().find(["Where do owls live?"], []))


def test_failed_questions_are_counted_and_the_rest_goes_on(setup):
    def failing(request):
        if "bees" in request.messages[-1].content:
            raise ModelError("the model failed at bees.")
        return script(request)

    broken = replace(setup, generator=ScriptedGenerator(failing))
    outcome = latency(ask_of(broken, (SystemName.FETCH, SystemName.REFINED), num_warmups=0), [Pages.COLD])
    values = outcome.cells[0].values
    assert (values["completed"], values["failed"]) == (4, 1)
    assert "bees" in values["first_error"]
    assert not next(check for check in outcome.checks if check.name == "all completed").held
    assert {each.pairs for each in outcome.ratios} == {4}


def test_nprobe_and_throughput_have_a_cell_for_each_value(setup):
    systems = (SystemName.FAISS_MEMORY, SystemName.REFINED)
    outcome = nprobe(ask_of(setup, systems), [2, 8])
    wanted = {(cell.key["nprobe"], cell.system): cell.values.get("bytes_wanted") for cell in outcome.cells}
    assert wanted[2, "refined"] < wanted[8, "refined"]
    outcome = throughput(ask_of(setup, systems, repeats=3), [1, 3], 2)
    counts = {(cell.key["batch_size"], cell.system): cell.values["completed"] for cell in outcome.cells}
    assert counts == {(1, "faiss-memory"): 3, (1, "refined"): 3, (3, "faiss-memory"): 9, (3, "refined"): 9}
    assert {each.metric for each in outcome.ratios} == {"wall_ms"}


def test_hits_rise_with_the_budget_and_the_perfect_prediction_is_the_limit(setup):
    systems = (SystemName.QUESTION, SystemName.REFINED, SystemName.PERFECT)
    slow = ScriptedGenerator(script, token_s=0.005)
    outcome = hit_rate(ask_of(replace(setup, generator=slow), systems), [0.0, 0.5, 1.0])
    share = {(cell.system, cell.key["budget"]): cell.values["hit_share"] for cell in outcome.cells}
    assert share["perfect", 0.0] == share["question", 0.0] == 0.0
    assert share["perfect", 1.0] > share["perfect", 0.5] > 0.2
    assert share["perfect", 1.0] >= share["question", 1.0]
    assert all(cell.values["bytes_moved"] == 0 for cell in outcome.cells if cell.key["budget"] == 0.0)


def test_hit_rate_is_for_pipelines_that_retrieve_once(setup):
    for pipeline in (PipelineName.ITER_RETGEN, PipelineName.NAIVE):
        with fails(UsageError, "hit-rate"):
            hit_rate(ask_of(setup, (SystemName.QUESTION,), (pipeline,)), [1.0])


def test_what_does_not_fit_memory_is_refused(setup, monkeypatch):
    monkeypatch.setattr("telerag_cli.bench.systems.available_bytes", lambda: 1000)
    with fails(ResourceError, "faiss-memory", "resident", "1000 B"):
        turns_of(setup, (SystemName.FAISS_MEMORY, SystemName.RESIDENT))


def test_faiss_gpu_is_refused_where_faiss_has_none(setup):
    import faiss

    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this Faiss has GPUs")
    with fails(ResourceError, "faiss-gpu"):
        turns_of(setup, (SystemName.FAISS_GPU, SystemName.FETCH))


def test_the_baselines_are_faiss_bit_for_bit(setup):
    index = setup.opened.index
    coarse = Coarse(index.centroids, index.manifest.metric)
    memory, ondisk = FaissMemory(index, coarse, lambda _count: None), FaissOnDisk(index, coarse)
    ondisk.map()
    queries = WordHashes().encode_queries(QUESTIONS)
    for one, other in zip(memory.find(queries, 5, 6), ondisk.find(queries, 5, 6), strict=True):
        np.testing.assert_array_equal(one, other)
    assert memory.ivf.ntotal == index.manifest.ntotal == len(TEXTS)
    ondisk.unmap()


def test_times_add_up(setup):
    answered = turns_of(setup, (SystemName.FETCH,), QUESTIONS[:1])[0].answers[0]
    stages = stages_ms(answered)
    assert list(stages) == ["passage", "retrieval", "answer"]
    total = 1e3 * answered.timings["total_s"]
    assert sum(stages.values()) <= total * 1.001
    assert stages["passage"] + stages["retrieval"] <= ttft_ms(answered) * 1.001 <= total * 1.001


def test_summaries_have_vllms_names():
    assert summary("ttft_ms", [1.0, 2.0, 3.0, 10.0]) == {
        "mean_ttft_ms": 4.0,
        "median_ttft_ms": 2.5,
        "std_ttft_ms": pytest.approx(3.5355, rel=1e-3),
        "p99_ttft_ms": pytest.approx(9.79),
    }
    assert summary("ttft_ms", []) == {}


def test_ratios_are_of_pairs_and_hold_the_truth():
    random = np.random.default_rng(1)
    speeds = random.lognormal(0, 1, 40)  # the work differs from pair to pair; the ratio does not
    pairs = [(1.5 * speed * noise, speed) for speed, noise in zip(speeds, random.lognormal(0, 0.05, 40), strict=True)]
    found = ratio({}, "a", "b", "e2el_ms", pairs)
    assert found.low < 1.5 < found.high
    assert found.ratio == pytest.approx(1.5, rel=0.05)
    assert found.pairs == 40
    assert not found.note


def test_a_spread_too_wide_gives_no_number():
    found = ratio({}, "a", "b", "e2el_ms", [(1.0, 1.0), (4.0, 1.0), (0.5, 1.0), (3.0, 1.0)])
    assert found.ratio is None
    assert found.note.startswith("spread too wide")
    few = ratio({}, "a", "b", "e2el_ms", [(2.0, 1.0)] * (MIN_PAIRS - 1))
    assert few.ratio is None
    assert "too few" in few.note
    assert ratio({}, "a", "b", "e2el_ms", []).ratio is None


def test_means_weigh_groups_alike():
    found = mean_ratio({}, "a", "b", "e2el_ms", [[(4.0, 1.0)] * 3, [(1.0, 1.0)] * 30])
    assert found.ratio == pytest.approx(2.0)
    assert (found.low, found.high) == (pytest.approx(2.0), pytest.approx(2.0))


def test_the_baseline_is_divided_by_all_others():
    pairs = comparisons((SystemName.FETCH, SystemName.REFINED, SystemName.FAISS_ONDISK, SystemName.LLM_ONLY))
    assert (SystemName.FAISS_ONDISK, SystemName.REFINED) in pairs
    assert (SystemName.REFINED, SystemName.LLM_ONLY) in pairs
    assert (SystemName.FETCH, SystemName.REFINED) in pairs
    assert len(set(pairs)) == len(pairs)


def test_details_are_json(setup):
    outcome = breakdown(ask_of(setup, (SystemName.FETCH, SystemName.LLM_ONLY)))
    detailed = outcome.cells[0].detailed
    assert len(detailed) == 4
    assert json.loads(json.dumps(detailed)) == detailed
    assert {entry["questions"][0] for entry in detailed} == set(QUESTIONS[1:])
