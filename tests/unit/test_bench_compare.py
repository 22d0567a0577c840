"""Comparisons of benchmarks, from results that nobody measured."""

import json
import re

import pytest

from bench_results import HARDWARE, HYDE, fabricated, latency, run, saved
from expect import fails
from telerag_cli.bench.compare import Verdict, compare, compare_paths
from telerag_cli.bench.results import Ratio
from telerag_cli.errors import EXIT_OK, EXIT_USAGE, ArtifactError, UsageError


def verdicts(first, second):
    return {(row.system, row.key["pipeline"], row.metric): row.verdict for row in compare(first, second).cells}


def test_a_result_equals_itself():
    same = compare(latency(), latency())
    assert same.differences == []
    assert {row.verdict for row in (*same.cells, *same.ratios)} == {Verdict.EQUAL}


@pytest.mark.parametrize(
    ("std", "value", "metric", "verdict"),
    [
        # Nine requests, a deviation of 100 ms: medians of 800 ms have a standard error of 42 ms.
        (100.0, 850.0, "median_e2el_ms", Verdict.NOISE),
        (100.0, 1400.0, "median_e2el_ms", Verdict.DIFFERS),
        (1.0, 850.0, "median_e2el_ms", Verdict.DIFFERS),
        # Nothing says how a percentile spreads.
        (100.0, 850.0, "p99_e2el_ms", Verdict.UNKNOWN),
    ],
)
def test_noise_is_told_from_a_difference(std, value, metric, verdict):
    assert verdicts(latency(800.0, std), latency(value, std))["fetch", "hyde", metric] == verdict


@pytest.mark.parametrize(
    ("other", "verdict"),
    [((1.45, 1.38, 1.52), Verdict.NOISE), ((2.86, 2.74, 3.02), Verdict.DIFFERS), ((None, 0.5, 3.0), Verdict.MISSING)],
)
def test_ratios_are_compared_by_their_intervals(other, verdict):
    first, second = (
        latency(ratios=[Ratio(HYDE, "faiss-ondisk", "fetch", "e2el_ms", 9, *figures)])
        for figures in ((1.43, 1.37, 1.51), other)
    )
    (row,) = compare(first, second).ratios
    assert row.verdict == verdict
    if verdict is Verdict.DIFFERS:
        assert row.ratio == pytest.approx(2.0)
        assert 1.8 < row.low < 2.0 < row.high < 2.2


def test_settings_that_differ_are_named():
    other = latency(
        hardware={**HARDWARE, "cores": 64, "versions": {"numpy": "0.0.2"}}, settings={"index": {"nlist": 9}, "seed": 7}
    )
    assert {each["name"]: (each["a"], each["b"]) for each in compare(latency(), other).differences} == {
        "hardware.cores": (2, 64),
        "hardware.versions.numpy": ("0.0.1", "0.0.2"),
        "settings.index.nlist": (8, 9),
        "settings.index.bytes": (4096, None),
    }


def test_cells_on_one_side_only():
    found = verdicts(latency(), latency(systems=("faiss-ondisk", "fetch")))
    assert found["refined", "hyde", "median_e2el_ms"] == Verdict.MISSING
    assert found["fetch", "hyde", "median_e2el_ms"] == Verdict.EQUAL


def test_what_cannot_be_compared_is_refused(tmp_path):
    saved(tmp_path / "a", x=latency())
    saved(tmp_path / "b", y=fabricated()["cache"])
    with fails(UsageError, "x.json", "latency", "y.json", "cache"):
        compare_paths(tmp_path / "a/x.json", tmp_path / "b/y.json")
    with fails(ArtifactError, "latency", "cache"):
        compare_paths(tmp_path / "a", tmp_path / "b")
    with fails(UsageError, tmp_path / "a", "y.json"):
        compare_paths(tmp_path / "a", tmp_path / "b/y.json")
    with fails(ArtifactError, tmp_path / "c"):
        compare_paths(tmp_path / "a", tmp_path / "c")


def test_folders_are_compared_suite_by_suite(tmp_path):
    made = fabricated()
    saved(tmp_path / "a", latency=made["latency"], cache=made["cache"], scaling=made["scaling"])
    saved(tmp_path / "b", latency=made["latency"], again=made["cache"], build=made["build"])
    comparisons, alone = compare_paths(tmp_path / "a", tmp_path / "b")
    assert [each.suite for each in comparisons] == ["latency", "cache"]
    assert sorted(alone) == ["build", "scaling"]


def test_compare_prints_a_table(tmp_path):
    saved(tmp_path, a=latency(), b=latency(1400.0, settings={"seed": 8}))
    done = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.exit_code == EXIT_OK, done.output
    assert re.search(r"settings.seed +7 +8", done.stdout)
    assert re.search(r"fetch +median_e2el_ms +807.5 +1,407 +1.742 +1.\d+ to \d.\d+ +differs", done.stdout)
    assert re.search(r"faiss-ondisk ÷ fetch +e2el_ms +1.43 +1.43 +1.000", done.stdout)


def test_compare_as_json(tmp_path):
    saved(tmp_path / "a", latency=latency(), scaling=fabricated()["scaling"])
    saved(tmp_path / "b", latency=latency(900.5))
    done = run("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert done.exit_code == EXIT_OK, done.output
    told = json.loads(done.stdout)
    assert told["unmatched"] == ["scaling"]
    (only,) = told["comparisons"]
    rows = {(each["system"], each["metric"], each["key"]["pipeline"]): each for each in only["cells"]}
    row = rows["fetch", "median_e2el_ms", "naive"]
    assert (row["a"], row["b"]) == (807.5, 907.5)
    assert row["low"] < row["ratio"] < row["high"]
    saved(tmp_path, cache=fabricated()["cache"])
    assert run("compare", tmp_path / "a/latency.json", tmp_path / "cache.json").exit_code == EXIT_USAGE
