"""The planner's formulas on numbers, and profiles and averages on disk."""

import json
from dataclasses import replace

import numpy as np
import pytest

from expect import fails
from telerag_cli.errors import ArtifactError
from telerag_cli.planning import formulas
from telerag_cli.planning.averages import Averages
from telerag_cli.planning.check import prediction_errors
from telerag_cli.planning.planner import Planner
from telerag_cli.planning.profile import (
    DecodePoint,
    EmbeddingTimes,
    HitCurve,
    HitPoint,
    Identity,
    IndexFigures,
    Joins,
    LinkPoint,
    LlmRates,
    LossPoint,
    Measured,
    Moving,
    PrefillPoint,
    Probed,
    Profile,
    ScoringRate,
    kept_in,
)

MB, GB = 10**6, 10**9


def exactly(value):
    return Measured(value, value, value, 1)


IDENTITY = Identity("a processor", 2, (), "host", "an index", "a model", "an embedder")
LLM = LlmRates(
    (PrefillPoint(10, exactly(0.1)), PrefillPoint(110, exactly(0.6))),
    (DecodePoint(1, exactly(0.01)), DecodePoint(5, exactly(0.03))),
    decode_context=50,
    context_step_s=1e-5,
)
CURVE = (HitPoint(0.5, 0.4, 0.5), HitPoint(1.0, 0.8, 1.0), HitPoint(2.0, 0.9, 1.2))
INDEX = IndexFigures(
    64,
    1.0 * MB,
    8,
    5,
    "passages",
    (Probed(1, 2.0 * MB), Probed(8, 12.0 * MB), Probed(64, 64.0 * MB)),
    (HitCurve("refined", CURVE), HitCurve("question", tuple(replace(point, hit=point.hit / 2) for point in CURVE))),
)
PROFILE = Profile(
    IDENTITY,
    False,
    1.0,
    "2026-01-01T00:00:00Z",
    {"torch": "1"},
    links=(LinkPoint("disk", "O_DIRECT", 4096, 1, exactly(1e8)),),
    moving=Moving(exactly(2.0 * GB), exactly(1.0 * GB), 1.25),
    scoring=(
        ScoringRate("arena", "float32", exactly(10.0 * GB), 0.001),
        ScoringRate("in place", "float32", exactly(1.0 * GB), 0.0),
    ),
    joins=Joins(0.001, exactly(10.0 * GB), exactly(1.0 * GB), (LossPoint(0.25, 0.4), LossPoint(0.75, 0.6)), 1.0),
    coarse_s=exactly(0.0005),
    embedding=EmbeddingTimes(exactly(0.02), exactly(0.015), 0.01),
    llm=LLM,
    index=INDEX,
)


def planner(averages=None, **chosen):
    return Planner(PROFILE, averages or Averages(), **{"nprobe": 8, "arena_bytes": 1 * GB} | chosen)


@pytest.mark.parametrize(("tokens", "expected_s"), [(10, 0.1), (60, 0.35), (110, 0.6), (210, 1.1), (1, 0.1)])
def test_prefill_is_linear_between_what_was_measured_and_goes_on_beyond(tokens, expected_s):
    assert formulas.prefill_s(LLM, tokens) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("tokens", "width", "prompt", "expected_s"),
    [
        (1, 1, 45, 0.0),
        (11, 1, 44.5, 10 * 0.01),
        (11, 3, 44.5, 10 * 0.02),
        (11, 3, 1044.5, 10 * (0.02 + 3 * 1e-5 * 1000)),
    ],
)
def test_decoding_takes_longer_beside_others_and_after_more(tokens, width, prompt, expected_s):
    assert formulas.decode_s(LLM, tokens, width, prompt) == pytest.approx(expected_s)


def test_cost_of_a_transfer_is_what_does_not_depend_on_its_size():
    points = [
        LinkPoint("disk", "O_DIRECT", size, depth, exactly(size / (50e-6 + size / (2 * GB)) * depth))
        for size in (2**14, 2**18, 2**24)
        for depth in (1, 4)
    ]
    assert formulas.transfer_cost_s(points) == pytest.approx(50e-6)


def test_window_and_budget():
    window_s = formulas.window_s(0.1, 0.8, 1.25, 0.02, 0.015)
    assert window_s == pytest.approx(0.1 + 1.0 + 0.02 - 0.015)
    assert formulas.window_s(0.0, 0.0, 1.0, 0.0, 1.0) == 0.0
    assert formulas.budget_bytes(1.0 * GB, 0.5, 2.0 * GB) == pytest.approx(0.5 * GB)
    assert formulas.budget_bytes(1.0 * GB, 0.5, 0.1 * GB) == pytest.approx(0.1 * GB)


def test_probed_bytes_and_the_lists_a_budget_moves_are_inverse():
    assert formulas.probed_bytes(INDEX, 8) == 12 * MB
    assert formulas.probed_bytes(INDEX, 36) == 38 * MB
    for nprobe in (1, 5, 8, 40, 64):
        assert formulas.hidden_nprobe(INDEX, formulas.probed_bytes(INDEX, nprobe) + 1) == nprobe
    assert formulas.hidden_nprobe(INDEX, 1e12) == 64


def test_hits_and_moves_are_level_beyond_the_curve():
    curve = INDEX.hit_curves[0]
    assert formulas.hit_share(curve, 0.75) == pytest.approx(0.6)
    assert formulas.hit_share(curve, 100) == 0.9
    assert formulas.moved_share(curve, 100) == 1.2
    assert formulas.hit_share(curve, 0) == formulas.moved_share(curve, 0) == 0


@pytest.mark.parametrize(
    ("hit", "missed", "expected_s"),
    [
        (0, 0, 0.001),
        (100 * MB, 0, 0.001 + 0.01),
        (0, 100 * MB, 0.001 + 0.1),
        (100 * MB, 100 * MB, 0.001 + 0.1 + 0.5 * 0.01),
    ],
)
def test_join(hit, missed, expected_s):
    assert formulas.join_s(PROFILE.joins, hit, missed) == pytest.approx(expected_s)


def test_loss_is_what_makes_the_join_come_out_as_it_was():
    for loss in (0.0, 0.3, 1.0):
        both_s = 0.1 + loss * 0.04
        assert formulas.overlap_loss(0.1, 0.04, both_s) == pytest.approx(loss)
        assert formulas.overlap_loss(0.04, 0.1, both_s) == pytest.approx(loss)
    assert formulas.overlap_loss(0.1, 0.04, 0.05) == 0.0
    assert formulas.overlap_loss(0.0, 0.04, 0.05) == 0.0


def test_break_even_is_where_both_take_as_long():
    arena, in_place = PROFILE.scoring
    even = formulas.break_even_bytes(2.0 * GB, arena, in_place)
    moved_s = arena.latency_s + even / (2.0 * GB)
    assert moved_s == pytest.approx(formulas.score_s(in_place, even))
    assert formulas.break_even_bytes(0.5 * GB, arena, in_place) == float("inf")


def test_a_line_through_two_points_gives_what_does_not_depend_on_the_size():
    assert formulas.scoring_latency_s(10.0, 0.3, 110.0, 1.3) == pytest.approx(0.2)
    assert formulas.scoring_latency_s(10.0, 0.3, 110.0, 0.2) == formulas.scoring_latency_s(10.0, 0.3, 10.0, 0.9) == 0.0
    assert formulas.join_fixed_s(0.3, 10.0, 1.3, 110.0) == pytest.approx(0.2)
    assert formulas.mean_list_bytes(np.array([0, 4, 8])) == 6.0


def test_outlook_follows_from_the_formulas():
    outlook = planner().outlook(0.009, "refined")
    assert outlook.budget_bytes == pytest.approx(9 * MB)
    assert outlook.hit_share == pytest.approx(0.6)
    assert outlook.bytes_moved == pytest.approx(9 * MB)
    assert outlook.join_s == pytest.approx(formulas.join_s(PROFILE.joins, 7.2 * MB, 4.8 * MB))
    assert planner().outlook(0.009, "question").hit_share == pytest.approx(0.3)


def test_what_is_there_already_need_not_be_moved():
    held = planner().outlook(0.009, "refined", held_share=0.25)
    assert held.hit_share == pytest.approx(0.25 + 0.75 * 0.8)
    assert planner().outlook(0.0, "refined", held_share=1.0).hit_share == 1.0


def test_rounds_share_the_link_and_the_user_bounds_it():
    assert planner().outlook(0.009, "refined", rounds=3).budget_bytes == pytest.approx(3 * MB)
    assert planner(most_bytes=2 * MB).outlook(0.009, "refined").budget_bytes == 2 * MB
    assert planner(arena_bytes=1 * MB, most_bytes=2 * MB).outlook(0.009, "refined").budget_bytes == 1 * MB


def test_averages_correct_what_the_profile_says():
    averages = Averages()
    plain = planner(averages)
    texts = [plain.text(60, 0, 11)]
    before_s, before = plain.window_s(texts, "hyde/passage"), plain.outlook(0.001, "refined").budget_bytes
    averages.observe("hyde/passage", "window", 1.5)
    averages.observe("hyde/passage", "link", 0.5)
    assert plain.window_s(texts, "hyde/passage") == pytest.approx(1.5 * before_s)
    assert plain.window_s(texts, "another") == before_s
    assert plain.outlook(0.001, "refined", stage="hyde/passage").budget_bytes == pytest.approx(0.5 * before)


def test_averages_weigh_the_first_alike_and_then_the_newest_a_quarter(tmp_path):
    averages = Averages(tmp_path / "kept" / "averages.json")
    for value in (1.0, 2.0, 3.0, 4.0):
        averages.observe("a", "tokens", value)
    assert averages.get("a", "tokens", 0.0) == pytest.approx(2.5)
    averages.observe("a", "tokens", 6.5)
    averages.save()
    again = Averages(tmp_path / "kept" / "averages.json")
    assert again.get("a", "tokens", 0.0) == pytest.approx(3.5)
    again.observe("a", "tokens", 7.5)
    assert again.get("a", "tokens", 0.0) == pytest.approx(4.5)
    assert (again.get("b", "tokens", 9.0), again.get("a", "link", 8.0)) == (9.0, 8.0)


@pytest.mark.parametrize("content", ["[]", '{"format": "telerag-averages", "version": 9}', '{"averages": 3}'])
def test_other_files_are_not_averages(tmp_path, content):
    path = tmp_path / "averages.json"
    path.write_text(content)
    with fails(ArtifactError, path):
        Averages(path)


def test_a_profile_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "profile.json"
    PROFILE.save(path)
    assert Profile.load(path) == PROFILE


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": "telerag-index"}, "telerag-index version 1"),
        ({"version": 2}, "telerag-profile version 2"),
        ({"joins": {"fixed_s": "much"}}, "joins"),
        ({"identity": None}, "identity"),
    ],
)
def test_other_files_are_not_profiles(tmp_path, change, found):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE.as_json() | change))
    with fails(ArtifactError, path, found):
        Profile.load(path)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"cpu": "another"}, ["cpu a processor", "another"]),
        ({"gpus": ("H100", "H100")}, ["gpus none", "H100, H100"]),
        ({"index": "another"}, ["index an index", "another"]),
        ({"model": "another"}, ["model a model", "another"]),
    ],
)
def test_a_profile_of_something_else_is_refused_with_both_named(tmp_path, change, values):
    with fails(ArtifactError, tmp_path, *values):
        PROFILE.check(replace(IDENTITY, **change), tmp_path)
    PROFILE.check(IDENTITY, tmp_path)


def test_a_profile_is_kept_apart_from_those_of_anything_else(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kept_in(IDENTITY, {"torch": "1"})
    assert path.is_relative_to(tmp_path / "telerag")
    others = [kept_in(IDENTITY, {"torch": "2"}), kept_in(replace(IDENTITY, index="another"), {"torch": "1"})]
    assert path not in others
    assert path == kept_in(IDENTITY, {"torch": "1"})


def line(**plan):
    figures = {"window_s": 1.0, "budget_bytes": 100.0, "bytes_moved": 100, "hit_share": 0.5, "join_s": 0.01}
    measured = {name: value * plan.get(name, 1.0) for name, value in figures.items()}
    stages = [{"expected": {"prefill_s": 0.1, "decode_s": 0.2}, "prefill_s": 0.1, "decode_s": 0.4}]
    return {"stages": stages, "plan": [{"predicted": figures, "measured": measured, "join_of_these_lists_s": 0.01}]}


def test_errors_by_function_with_their_direction(tmp_path):
    lines = [line(), line(window_s=2.0), line(window_s=0.8, join_s=0.5), {"error": {"message": "x"}}]
    batch = {"custom_id": "1", "error": None, "response": {"body": {"telerag": line(hit_share=2.0)}}}
    errors = prediction_errors([json.dumps(each).encode() for each in (*lines, batch)] + [b"\n"], tmp_path)
    by_name = {(each.function, each.kind): each for each in errors}
    window = by_name["window_s", "ahead"]
    assert (window.count, window.median, window.worst) == (4, pytest.approx(0.125), pytest.approx(0.5))
    assert by_name["decode_s", "given"].bias == pytest.approx(-0.5)
    assert by_name["prefill_s", "given"].worst == 0
    assert by_name["join_s", "ahead"].worst == pytest.approx(1.0)
    assert by_name["join_s", "given"].count == 4
    assert by_name["hit_share", "ahead"].worst == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("lines", "where"), [([b"no json"], ":1"), ([b"[1]"], ":1"), ([b"{}"], ""), ([b'{"plan": [{}]}'], ":1"), ([], "")]
)
def test_other_files_are_not_runs(tmp_path, lines, where):
    path = tmp_path / "run.jsonl"
    with fails(ArtifactError, f"{path}{where} "):
        prediction_errors(lines, path)
