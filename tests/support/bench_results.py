"""Results of benchmarks that nobody measured, and the commands that read such."""

from dataclasses import replace

from typer.testing import CliRunner

from telerag_cli.bench.results import Cell, Check, Ratio, SuiteResult
from telerag_cli.bench.suites import SUITES, SuiteName
from telerag_cli.cli.app import app

HARDWARE = {
    "cpu": "Made-up 9000 <two> | cores",
    "cores": 2,
    "memory_bytes": 2 << 30,
    "gpus": [],
    "versions": {"numpy": "0.0.1"},
}
NASTY = 'x <script src="http://example.invalid/a.js">alert(1)</script> & "y" | `z` $1$'


def result(name, cells, ratios=(), **changed):
    suite = SUITES[SuiteName(name)]
    made = SuiteResult(
        name,
        suite.title,
        suite.stands_for,
        "2001-02-03T04:05:06+00:00",
        61.5,
        f"telerag bench {name} no-index --seed 7",
        HARDWARE,
        {"why": "a test"},
        {"index": {"nlist": 8, "bytes": 4096}, "seed": 7},
        {cell.system: {"what": "a system that never ran"} for cell in cells},
        list(suite.axes),
        list(cells),
        list(ratios),
        [Check("made up", True, "3 of 3 were invented.")],
        ["Nothing was measured."],
    )
    return replace(made, **changed)


def latencies(value, std=None):
    figures = {"mean": value + 1.25, "median": value, "std": std or value / 8, "p99": 3 * value}
    return {"completed": 9, "failed": 0, **{f"{which}_e2el_ms": figure for which, figure in figures.items()}}


HYDE, NAIVE = ({"pipeline": name, "dataset": "none", "pages": "cold"} for name in ("hyde", "naive"))
WIDE = "spread too wide: from 0.61 to 2.83 over 9 pairs"


def latency(value=800.5, std=100.0, systems=("faiss-ondisk", "fetch", "refined"), **changed):
    figures = {system: latencies(value + 7 * place, std) for place, system in enumerate(systems)}
    ratios = [
        Ratio(HYDE, "faiss-ondisk", "fetch", "e2el_ms", 9, 1.43, 1.37, 1.51),
        Ratio(HYDE, "faiss-ondisk", "refined", "e2el_ms", 9, None, 0.61, 2.83, WIDE),
        Ratio(NAIVE, "faiss-ondisk", "refined", "e2el_ms", 2, None, 0.0, 0.0, "too few: 2 of 3 pairs"),
        Ratio(NAIVE, "fetch", "refined", "e2el_ms", 9, 1.07, 1.02, 1.13),
    ]
    made = [Cell(system, key, values) for key in (HYDE, NAIVE) for system, values in figures.items()]
    return replace(result("latency", made, ratios), **changed)


def cells(**of_system):
    """Cells from tuples of an axis and values by place: ``cells(refined=("budget", {1.0: {"hit_share": 0.5}}))``."""
    return [
        Cell(system, {axis: place}, values)
        for system, (axis, some) in of_system.items()
        for place, values in some.items()
    ]


def fabricated():
    """One small result for each suite."""
    stages = {"mean_stage_ms": {"passage": 310.5, "retrieval": 42.25, "answer_1": 501.5, "answer_2": 9.75}}
    by_nprobe = "nprobe", {8: latencies(108.5), 64: latencies(164.5)}
    failed = {"completed": 0, "failed": 8, "first_error": NASTY}
    batches = {1: {"completed": 4, "request_throughput": 2.125}, 8: failed}
    long_name = "a builder with a name that goes on and on until no plot has room"
    hits = {
        ("none", 0.2): {"hit_share": 0.375, "median_join_ms": 81.5},
        ("hotness", 0.6): {"hit_share": 0.875, "median_join_ms": 19.5},
    }
    embedded = {"passages_per_s": 191.5, "peak_memory_bytes": 123456789}
    made = [
        latency(),
        result("nprobe", cells(fetch=by_nprobe, refined=by_nprobe)),
        result("hit-rate", cells(refined=("budget", {each: {"hit_share": each / 4} for each in (0.5, 1.0, 3.0)}))),
        result(
            "throughput",
            cells(refined=("batch_size", batches)),
            checks=[Check("all completed", False, "8 of 12 failed <badly>.")],
        ),
        result("breakdown", cells(**dict.fromkeys(("fetch", "refined"), ("pipeline", {"hyde": stages})))),
        result("cache", [Cell(name, {"skew": 0, "cache_fraction": at}, some) for (name, at), some in hits.items()]),
        result("scaling", cells(replicas=("replicas", {2: {"request_throughput": 3.625}}))),
        result("embed", cells(**{"model $x$": ("batch_size", {32: embedded})})),
        result("build", [Cell(long_name, {}, {"duration": 93.5})], metadata={"<b>": NASTY}),
    ]
    return {each.suite: each for each in made}


def saved(folder, **results):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, each in results.items():
        each.save(folder / f"{stem}.json")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])
