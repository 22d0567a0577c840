"""Measuring: what is measured is what it says, on doubles whose speed is known, and through the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from expect import fails
from indexes import make_index as real_index
from indexes import make_vectors
from telerag_cli.cli.app import app
from telerag_cli.config import PAGE_BYTES, Lookahead, Metric, PipelineName, Storage
from telerag_cli.engine.explain import written_ahead
from telerag_cli.errors import ArtifactError, ResourceError
from telerag_cli.index.scoring import Coarse
from telerag_cli.llm.base import Generation
from telerag_cli.pipelines.registry import make_pipeline
from telerag_cli.planning.hits import Replayed, first_sentence, from_recording, index_figures
from telerag_cli.planning.links import BUFFERED, disk_points
from telerag_cli.planning.lists import joins_of, make_index, moving_rates, scoring_rates
from telerag_cli.planning.llm import llm_rates, write
from telerag_cli.planning.plots import plot
from telerag_cli.planning.profile import Identity, Profile
from telerag_cli.planning.timing import Effort, times_s
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.cuda.bandwidth import transfers
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.cuda.tier import open_cuda_tier
from telerag_cli.tiers.host import open_host_tier

SHORT = Effort(0.05, 2, 1, 5.0)


def telerag(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_repeats_end_by_count_time_and_limit():
    assert len(times_s(lambda: None, Effort(0.0, 3, 1, 1.0))) == 3
    assert len(times_s(lambda: None, Effort(0.01, 3, 1, 1.0))) > 3
    assert len(times_s(lambda: None, Effort(1.0, 3, 1, 0.0))) == 1


def test_disk_points_are_for_every_size_and_depth_and_once_through_the_cache(tmp_path):
    path = tmp_path / "lists.bin"
    path.write_bytes(np.random.default_rng(0).bytes(40 * PAGE_BYTES))
    points = list(disk_points(path, (PAGE_BYTES, 1 << 20), (1, 2), SHORT))
    found = {(point.way == BUFFERED, point.nbytes, point.depth) for point in points}
    largest = 40 * PAGE_BYTES  # no more than the file has
    assert found == {
        (False, PAGE_BYTES, 1),
        (False, PAGE_BYTES, 2),
        (False, largest, 1),
        (False, largest, 2),
        (True, largest, 2),
    }
    assert all(point.bytes_per_s.value > 0 for point in points)


@pytest.mark.parametrize("bytes_per_s", [1e8, 4e8])
def test_a_throttled_link_is_measured_no_faster_than_it_is(bytes_per_s):
    gpu = SimulatedGpu(bytes_per_s=bytes_per_s)
    found = list(transfers(gpu, (1 << 18, 1 << 20), 1))
    assert not gpu.locked  # it is given back
    assert {each.way for each in found} == {
        f"{kind}, {way} the GPU" for kind in ("pinned", "pageable") for way in ("to", "from")
    }
    assert min(each.depth for each in found) == 1 < max(each.depth for each in found)
    for each in found:
        assert 0 < each.count * each.nbytes / max(each.took_s) <= 1.01 * bytes_per_s


def test_what_cannot_be_locked_is_measured_pageable_alone():
    found = list(transfers(SimulatedGpu(lock_refused="not here"), (1 << 16,), 1))
    assert {each.way for each in found} == {"pageable, to the GPU", "pageable, from the GPU"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    vectors = make_vectors(4000, 32, seed=1)
    index, _ivf = real_index(tmp_path_factory.mktemp("profiled"), vectors, 40, Metric.IP, Storage.FLOAT32)
    return index, Coarse(index.centroids, Metric.IP)


@pytest.mark.parametrize("kind", ["host", "simulated"])
def test_lists_are_measured_through_the_tier_which_is_left_empty(world, kind, tmp_path):
    index, coarse = world
    if kind == "host":
        index.paths.root.mkdir(exist_ok=True)
        tier = open_host_tier(index, coarse, int(index.list_bytes.sum()))
    else:
        tier = open_cuda_tier(index, coarse, SimulatedGpu(bytes_per_s=2e8), None)
    with_retriever = Retriever(index, coarse, tier)
    rates = scoring_rates(index, tier, SHORT)
    assert [rate.place for rate in rates] == (["arena"] if kind == "host" else ["arena", "in place"])
    moving = moving_rates(with_retriever, None, 0, SHORT)
    assert moving.alone.value > 0
    if kind == "simulated":
        assert moving.alone.value <= 1.01 * 2e8
    joins = joins_of(with_retriever, index.centroids[:3], 8)
    assert joins.hit_bytes_per_s.value > 0
    assert joins.missed_bytes_per_s.value > 0
    assert all(0 <= point.loss <= 2 for point in joins.losses)
    assert [point.missed_share for point in joins.losses] == sorted(point.missed_share for point in joins.losses)
    assert tier.absent()[index.list_bytes > 0].all()
    assert tier.occupancy().references == 0
    tier.check_integrity()
    with_retriever.close()


@pytest.mark.parametrize("storage", list(Storage))
def test_made_up_lists_can_be_searched_like_real_ones(storage, tmp_path):
    index, lists = make_index(tmp_path, 16, Metric.IP, storage)
    coarse = Coarse(index.centroids, Metric.IP)
    tier = open_cuda_tier(index, coarse, SimulatedGpu(), int(index.list_bytes.sum()), lists=lists)
    retriever = Retriever(index, coarse, tier)
    found = retriever.search(index.centroids[:2], 5, 64)
    assert (found.rows >= 0).all()
    assert np.isfinite(found.scores).all()
    assert found.report.lists_wanted == 64
    retriever.close()


class Steady:
    """An LLM whose tokens all take the same, and more the more of them are written at once."""

    name, context_tokens, parallel = "steady", 4096, 4

    def __init__(self):
        self.asked = []

    def count_tokens(self, messages):
        return sum(len(message.content.split()) for message in messages)

    async def generate(self, request, on_text=None):
        tokens = self.count_tokens(request.messages)
        self.asked.append((tokens, request.max_tokens, request.ignore_eos))
        for number in range(request.max_tokens):
            if on_text:
                on_text("x" * number, number + 1)
        return Generation("", "length", tokens, request.max_tokens, tokens / 1000, 0.0, cached_tokens=4)

    def close(self):
        pass


def test_the_llm_is_measured_at_the_lengths_and_widths_asked_for():
    llm = Steady()
    told = []
    rates = llm_rates(llm, (8, 64, 5000), (1, 2, 4, 8), 6, SHORT, told.append)
    assert [point.tokens for point in rates.prefill] == [4, 60]  # less what is known already; 5,000 do not fit
    assert rates.prefill[1].took_s.value == pytest.approx(0.064)
    assert [point.width for point in rates.decode] == [1, 2, 4]  # it writes no eight at once
    assert all(ignoring for _tokens, _most, ignoring in llm.asked)
    assert len(told) == 5
    assert rates.context_step_s >= 0


def test_prompts_are_all_different_so_that_nothing_is_known_of_them():
    llm, prompts = Steady(), []
    count = llm.count_tokens
    llm.count_tokens = lambda messages: prompts.append(messages[0].content) or count(messages)
    for _ in range(5):
        write(llm, 2)
    assert len({prompt.split()[0] for prompt in prompts}) == len(prompts) == 5


class Directions:
    """An embedder of texts that name the directions in which they point."""

    def __init__(self, vectors):
        self.vectors = vectors

    def encode_queries(self, texts):
        return np.stack([np.mean([self.vectors[int(word)] for word in text.split()], axis=0) for text in texts])

    embed_approx = encode_queries


def test_hit_curves_rise_to_what_is_worth_moving(world):
    index, _coarse = world
    vectors = np.random.default_rng(3).standard_normal((60, 32)).astype(np.float32)
    replayed = [Replayed(f"{i}", f"{i + 20} {i + 20} {i + 20} {i + 20}") for i in range(20)]
    figures = index_figures(index, Directions(vectors), replayed, "made up", 8, lambda _count: None)
    curves = {curve.lookahead: curve.points for curve in figures.hit_curves}
    for points in curves.values():
        hits, moved = [point.hit for point in points], [point.moved for point in points]
        # An order that is followed to its end sooner is looked at again later, so more budget may be worth a little
        # less.
        assert min(np.diff(hits)) > -0.02
        assert all(hit <= min(point.budget, 1) + 0.2 for hit, point in zip(hits, points, strict=True))
        assert all(share <= point.budget + 1e-9 for share, point in zip(moved, points, strict=True))
    # The text says where to look and the question does not, so only what follows the text finds it.
    assert curves[Lookahead.REFINED.value][-1].hit > curves[Lookahead.QUESTION.value][-1].hit + 0.2
    assert figures.probed[-1].nbytes == pytest.approx(float(index.list_bytes.sum()))
    assert [each.nbytes for each in figures.probed] == sorted(each.nbytes for each in figures.probed)


def test_a_perfect_question_hits_what_it_moves(world):
    index, _coarse = world
    vectors = np.random.default_rng(4).standard_normal((10, 32)).astype(np.float32)
    figures = index_figures(index, Directions(vectors), [Replayed("3", "3")], "made up", 8, lambda _count: None)
    question = next(curve for curve in figures.hit_curves if curve.lookahead == "question")
    for point in question.points:
        assert point.hit == pytest.approx(min(point.moved, 1.0), abs=1e-9)
        assert point.hit > min(point.budget, 1.0) - 0.3  # a list that does not fit the rest is not begun


def test_recordings_give_questions_and_what_was_searched(tmp_path):
    lines = [
        {"question": "q", "retrievals": [{"queries": ["text"], "passages": []}]},
        {"question": "none", "retrievals": []},
    ]
    assert from_recording(lines, tmp_path) == [Replayed("q", "text")]
    with fails(ArtifactError, tmp_path):
        from_recording([{}], tmp_path)


def test_first_sentences():
    assert first_sentence("One is short. Two follows.") == "One is short."
    assert first_sentence("word " * 40) == " ".join(["word"] * 12)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        (PipelineName.NAIVE, []),
        (PipelineName.HYDE, ["passage"]),
        (PipelineName.SUBQUESTION, ["sub_questions"]),
        (PipelineName.ITERATIVE, ["query_1"]),
        (PipelineName.ITER_RETGEN, ["draft_1"]),
        (PipelineName.FLARE, ["sentence_1", "query"]),
        (PipelineName.SELF_RAG, ["need"]),
    ],
)
def test_a_dry_run_finds_what_is_written_before_the_first_retrieval(name, stages):
    assert [text.stage for text in written_ahead(make_pipeline(name), 50)] == stages


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A small index by the real commands."""
    root = tmp_path_factory.mktemp("profile")
    corpus = root / "corpus.jsonl"
    words = ["median", "generator", "list", "window", "bread", "river", "lock", "thread", "parse", "sort"]
    with corpus.open("w") as lines:
        for number in range(60):
            text = f"The {words[number % 10]} of case {number} is about {words[number // 6]}. It is described here."
            lines.write(json.dumps({"id": str(number), "text": text}) + "\n")
    assert telerag("embed", corpus, "-o", root / "embeddings").exit_code == 0
    assert telerag("build-index", root / "embeddings", "-o", root / "index", "--nlist", 8).exit_code == 0
    return root / "index"


@pytest.mark.model
def test_profile_to_a_file_and_its_use(index, tmp_path, monkeypatch):
    """One after another, as each needs the one before: profile, plot, run with it, check, refuse it elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, run = tmp_path / "profile.json", tmp_path / "run.jsonl"
    plots = [tmp_path / "plot.png"]
    done = telerag("profile", index, "--quick", "-o", path, "--plot", plots[0])
    assert done.exit_code == 0, done.stderr
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    assert all(
        word in done.stdout
        for word in ("O_DIRECT", "page cache", "coarse quantizer", "decoding 4 at once", "window", "budget")
    )
    assert plots[0].read_bytes().startswith(b"\x89PNG")
    made = Profile.load(path)
    assert made.took_s > 0
    assert made.llm.decode[0].step_s.value > 0
    assert made.index.hit_curves[0].points[-1].hit > 0.5

    questions = tmp_path / "questions.txt"
    questions.write_text("What is the median about?\nWhat is a lock?\n")
    answered = telerag(
        "run", index, "-q", questions, "-o", run, "--profile", path, "--explain", "--max-tokens", 4, "-k", 1
    )
    assert answered.exit_code == 0, answered.stderr
    assert "Plan (hyde, one question alone)" in answered.stderr
    lines = [json.loads(line) for line in run.read_text().splitlines()]
    for line in lines:
        (plan,) = line["plan"]
        assert plan["stage"] == "hyde/passage"
        assert (
            set(plan["predicted"])
            == set(plan["measured"])
            == {"window_s", "budget_bytes", "bytes_moved", "hit_share", "join_s"}
        )
        assert plan["measured"]["join_s"] == pytest.approx(line["timings"]["join_s"], abs=1e-5)
        assert plan["measured"]["bytes_moved"] == line["lookahead"]["bytes_moved"]
        assert 0 < plan["measured"]["window_s"] < line["timings"]["total_s"]
        assert line["stages"][0]["expected"]["decode_s"] > 0
    (averages,) = (tmp_path / "cache").rglob("*.averages.json")
    assert "hyde/passage window" in json.loads(averages.read_text())["averages"]
    checked = telerag("profile", "--check", run)
    assert checked.exit_code == 0
    assert all(name in checked.stdout for name in ("prefill_s", "decode_s", "window_s", "budget_bytes", "join_s"))

    raw = json.loads(path.read_text())
    raw["identity"]["index"] = "another index"
    path.write_text(json.dumps(raw))
    refused = telerag("run", index, "-q", questions, "--profile", path)
    assert refused.exit_code == 1
    assert all(part in refused.stderr for part in ("another index", "60 vectors"))
    missing = telerag("run", index, "-q", questions, "--profile", tmp_path / "none.json")
    assert (missing.exit_code, "none.json" in missing.stderr) == (1, True)


@pytest.mark.model
def test_a_run_measures_once_and_keeps_what_it_found(index, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    question = tmp_path / "q.txt"
    question.write_text("What is a lock?\n")
    common = ("run", index, "-q", question, "--max-tokens", 4, "-k", 1, "--profile", "auto", "--prefetch-budget")
    first = telerag(*common, "4KiB")
    assert first.exit_code == 0, first.stderr
    assert "--profile none" in first.stderr
    plan = json.loads(first.stdout)["plan"][0]
    assert plan["predicted"]["budget_bytes"] <= 4096
    assert plan["measured"]["bytes_moved"] <= 4096
    second = telerag(*common, "1MiB")
    assert "--profile none" not in second.stderr
    assert json.loads(second.stdout)["plan"][0]["measured"]["bytes_moved"] > 4096
    (kept,) = [path for path in (tmp_path / "cache").rglob("*.json") if "averages" not in path.name]
    kept.write_text("{}")
    torn = telerag(*common, "1MiB")
    assert torn.exit_code == 0  # what is kept is a convenience
    assert f"{kept} is None" in torn.stderr
    assert json.loads(kept.read_text())["format"] == "telerag-profile"  # measured again


@pytest.mark.model
def test_a_throttled_gpu_and_no_index_at_all(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    throttled = telerag("profile", index, "--quick", "--tier", "simulated", "--throttle", "100MB", "-o", "-")
    assert throttled.exit_code == 0, throttled.stderr
    made = json.loads(throttled.stdout)
    assert made["identity"]["tier"] == "simulated GPU, its link 95.4 MiB/s"
    pcie = [point for point in made["links"] if point["link"] == "PCIe"]
    assert pcie
    assert all(point["bytes_per_s"]["value"] <= 1.01e8 for point in pcie)
    assert {rate["place"] for rate in made["scoring"]} == {"arena", "in place"}
    alone = telerag("profile", "--quick", "--tier", "host", "-o", "-")
    assert alone.exit_code == 0, alone.stderr
    machine = json.loads(alone.stdout)
    assert machine["index"] is None
    assert machine["left_out"]
    assert machine["links"]
    assert not list(Path.cwd().iterdir())  # the file it read from is gone


@pytest.mark.parametrize(
    ("arguments", "code", "values"),
    [
        (("--plot", "x.bmp"), 2, ["x.bmp", "png, svg, pdf"]),
        (("--throttle", "1GB", "--tier", "host"), 2, ["--throttle", "--tier host"]),
        (("--check", "none.jsonl"), 1, ["none.jsonl"]),
        (("index", "--recording", "recording.jsonl"), 1, ["recording.jsonl"]),
        (("none",), 1, ["none "]),
    ],
)
def test_what_cannot_be_profiled_is_refused(arguments, code, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recording.jsonl").write_text("no json\n")
    done = telerag("profile", *arguments)
    assert done.exit_code == code
    assert all(value in done.stderr for value in values)


def test_a_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    identity = Identity("a processor", 2, (), "host", "none", "a model", "an embedder")
    with fails(ResourceError, "matplotlib", "telerag-cli[bench]"):
        plot(Profile(identity, True, 1.0, "2026-01-01T00:00:00Z", {}), None, 0.0, tmp_path / "plot.png")
