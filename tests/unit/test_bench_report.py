"""Reports and comparisons of benchmarks, from results that nobody measured."""

import json
import re
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from expect import fails
from telerag_cli.bench import plots, report, wording
from telerag_cli.bench.compare import Verdict, compare, compare_paths
from telerag_cli.bench.plots import looks_of, plots_of
from telerag_cli.bench.report import escaped, fenced
from telerag_cli.bench.results import Cell, Check, Ratio, SuiteResult
from telerag_cli.bench.suites import SUITES, SuiteName
from telerag_cli.cli.app import app
from telerag_cli.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ArtifactError, ResourceError, UsageError

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
    cells = [
        Cell(system, key, latencies(value + 7 * place, std))
        for key in (HYDE, NAIVE)
        for place, system in enumerate(systems)
    ]
    ratios = [
        Ratio(HYDE, "faiss-ondisk", "fetch", "e2el_ms", 9, 1.43, 1.37, 1.51),
        Ratio(HYDE, "faiss-ondisk", "refined", "e2el_ms", 9, None, 0.61, 2.83, WIDE),
        Ratio(NAIVE, "faiss-ondisk", "refined", "e2el_ms", 2, None, 0.0, 0.0, "too few: 2 of 3 pairs"),
        Ratio(NAIVE, "fetch", "refined", "e2el_ms", 9, 1.07, 1.02, 1.13),
    ]
    return replace(result("latency", cells, ratios), **changed)


def over(axis, system, values):
    return [Cell(system, {axis: at}, measured) for at, measured in values.items()]


def fabricated():
    """One small result for each suite."""
    stages = {"passage": 310.5, "retrieval": 42.25, "answer_1": 501.5, "answer_2": 9.75}
    made = [
        latency(),
        result(
            "nprobe",
            [
                cell
                for name in ("fetch", "refined")
                for cell in over("nprobe", name, {8: latencies(108.5), 64: latencies(164.5)})
            ],
        ),
        result("hit-rate", over("budget", "refined", {share: {"hit_share": share / 4} for share in (0.5, 1.0, 3.0)})),
        result(
            "throughput",
            over(
                "batch_size",
                "refined",
                {
                    1: {"completed": 4, "request_throughput": 2.125},
                    8: {"completed": 0, "failed": 8, "first_error": NASTY},
                },
            ),
            checks=[Check("all completed", False, "8 of 12 failed <badly>.")],
        ),
        result(
            "breakdown", [Cell(name, {"pipeline": "hyde"}, {"mean_stage_ms": stages}) for name in ("fetch", "refined")]
        ),
        result(
            "cache",
            [
                Cell("none", {"skew": 0, "cache_fraction": 0.2}, {"hit_share": 0.375, "median_join_ms": 81.5}),
                Cell("hotness", {"skew": 0, "cache_fraction": 0.6}, {"hit_share": 0.875, "median_join_ms": 19.5}),
            ],
        ),
        result("scaling", [Cell("replicas", {"replicas": 2}, {"request_throughput": 3.625})]),
        result(
            "embed", over("batch_size", "model $x$", {32: {"passages_per_s": 191.5, "peak_memory_bytes": 123456789}})
        ),
        result(
            "build",
            [Cell("a builder with a name that goes on and on until no plot has room", {}, {"duration": 93.5})],
            metadata={"<b>": NASTY},
        ),
    ]
    return {each.suite: each for each in made}


def saved(folder, **results):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, each in results.items():
        each.save(folder / f"{stem}.json")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of all suites."""
    folder = saved(tmp_path_factory.mktemp("bench"), **fabricated())
    (folder / "other.json").write_text("{}")
    report.write(folder, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def text(whole):
    return (whole / "report.md").read_text()


def only_plot(result, name):
    return next(plot for plot in plots_of(result, looks_of([result])) if plot.name == name)


def test_every_figure_is_in_the_report(text):
    values = [value for each in fabricated().values() for cell in each.cells for value in cell.values.values()]
    values += [part for value in values if isinstance(value, dict) for part in value.values()]
    figures = [f"{value:,}".removesuffix(".0") for value in values if isinstance(value, int | float)]
    words = set(re.split(r"[\s|]+", text))
    assert len(figures) > 60
    assert [each for each in figures if each not in words] == []


def test_what_users_write_is_shown_and_never_run(text):
    assert "<script" not in text
    assert escaped(NASTY) in text
    assert "\\| cores" in text


def test_markdown_of_odd_text():
    assert escaped("a|b\nc *d* _e_ f_g [h](i)") == "a\\|b c \\*d\\* \\_e\\_ f_g \\[h\\](i)"
    assert escaped("- no list") == "\\- no list"
    assert fenced("a ``` b").startswith("````sh\n")


def test_every_suite_has_plots_and_every_plot_has_words(whole, text):
    pictures = {path.name: path.read_bytes() for path in whole.glob("*.png")}
    for suite in SuiteName:
        assert any(name.startswith(f"{suite.value}-") for name in pictures)
    for data in pictures.values():
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(data) > 5_000
    named = re.findall(r"^!\[(.+)\]\((.+)\)$", text, re.MULTILINE)
    assert {name for _words, name in named} == set(pictures)
    assert all(len(words) > 20 for words, _name in named)


def test_a_ratio_without_number_says_why(text):
    words = only_plot(latency(), "ratio-e2el_ms").description
    assert "fetch 1.43 (1.37 to 1.51)" in words
    assert "refined spread too wide" in words
    assert "refined too few" in words
    # An interval that exists is shown; one that does not is left out.
    assert "| spread too wide | 0.610 to 2.83 |" in text
    assert f"| too few | {wording.NONE} |" in text


def test_a_check_that_failed_comes_first(text):
    assert "1 of 9 checks did not hold." in text
    assert text.index("1 of 1 checks did not hold") < text.index("8 of 12 failed &lt;badly&gt;.")
    assert text.count("✗ **not held**") == 1


def test_a_cell_that_failed_has_no_number():
    failed = result(
        "latency", [Cell("fetch", HYDE, {"completed": 0, "failed": 3}), Cell("refined", HYDE, latencies(5.5))]
    )
    assert "fetch no request completed" in only_plot(failed, "median").description
    assert report.headline_table(failed).rows[0][3:] == ["fetch", "0", "3", *[wording.NONE] * 2]


def test_nothing_measured_draws_nothing(tmp_path):
    empty = result("nprobe", [Cell("refined", {"nprobe": 4}, {"completed": 0, "failed": 2, "median_e2el_ms": None})])
    saved(tmp_path, empty=empty, none=replace(empty, cells=[], systems={}, checks=[], notes=[]))
    assert report.write(tmp_path, tmp_path) == [tmp_path / "report.md"]
    text = (tmp_path / "report.md").read_text()
    assert "![" not in text
    assert "(none)" in text


def test_a_system_has_one_colour_throughout():
    results = fabricated()
    numbers = looks_of(results.values())
    assert len(set(numbers.values())) == len(numbers)
    drawn = [plot.legend for each in results.values() for plot in plots_of(each, numbers)]
    assert len({legend["refined"][0] for legend in drawn if "refined" in legend}) == 1
    assert looks_of([latency(systems=("refined",))])["refined"] == numbers["refined"]


def test_colours_can_be_told_from_the_paper():
    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(plots.PAPER, colour) for colour in (plots.INK, plots.MUTED)) >= 4.5
    assert min(contrast(plots.PAPER, colour) for colour in plots.COLOURS) >= 3
    assert min(contrast(plots.INK, colour) for colour in plots.STAGES) >= 4.5


def test_stages_of_a_kind_look_the_same_and_keep_their_order():
    plot = only_plot(fabricated()["breakdown"], "mean-stage-ms")
    assert list(plot.legend) == ["passage", "retrieval", "answer"]
    assert "passage 310.5, retrieval 42.25, answer_1 501.5, answer_2 9.75" in plot.description


def test_a_panel_for_each_combination_of_axes():
    keys = [
        {"pipeline": "hyde", "dataset": name, "pages": pages} for name in ("o_ne", "two") for pages in ("cold", "warm")
    ]
    many = result("latency", [Cell("refined", key, latencies(9.5)) for key in keys])
    titles = [panel.title for panel in only_plot(many, "median").panels]
    assert titles == ["o_ne, cold", "o_ne, warm", "two, cold", "two, warm"]


def test_an_unknown_suite_is_drawn_as_bars(tmp_path):
    cells = [Cell("s", {"depth": depth, "kind": "k"}, {"bytes_per_s": depth * 7.5}) for depth in (1, 2)]
    odd = result("build", cells, suite="new", axes=["depth", "kind"])
    assert "depth 1: s 7.5; depth 2: s 15" in only_plot(odd, "bars").description
    report.write(saved(tmp_path, odd=odd), tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5678, "1,234.57"),
        (12345678.9, "12,345,679"),
        (0.00012345, "0.00012345"),
        (1e-9, "1.00000e-09"),
        (True, "yes"),
        (None, wording.NONE),
        (float("nan"), wording.NONE),
        (10_000, "10,000"),
        ([], "none"),
        ([1, "a"], "1, a"),
    ],
)
def test_values_in_words(value, text):
    assert wording.plain(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((0.6, 13.344, None), ["0.60", "13.34", wording.NONE]),
        ((5063.25, 855.5), ["5,063", "856"]),
        ((0.0, 0.0123), ["0.00000", "0.01230"]),
        ((3, 12_000), ["3", "12,000"]),
    ],
)
def test_figures_of_a_column_line_up(values, texts):
    assert wording.column("median_e2el_ms", values) == texts


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("median_e2el_ms", "end to end, median (ms)"),
        ("p99.9_ttft_ms", "first token, p99.9 (ms)"),
        ("hit_share", "hit share"),
        ("passages_per_s", "passages (1/s)"),
        ("peak_memory_bytes", "peak memory"),
        ("open_s", "open (s)"),
    ],
)
def test_fields_have_names_in_words(name, words):
    assert wording.label(name) == words


# Comparing.


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


# The commands.


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_report_prints_what_it_wrote(tmp_path):
    saved(tmp_path / "in", scaling=fabricated()["scaling"])
    done = run("report", tmp_path / "in", "-o", tmp_path / "new/out")
    assert done.exit_code == EXIT_OK, done.output
    names = ["report.md", "scaling-bars.png"]
    assert done.stdout.splitlines() == [str(tmp_path / "new/out" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == names
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["scaling.json"]


def test_report_of_nothing_is_refused(tmp_path):
    done = run("report", tmp_path)
    assert (done.exit_code, done.stdout) == (EXIT_FAILED, "")
    assert str(tmp_path) in done.stderr
    saved(tmp_path, scaling=fabricated()["scaling"])
    (tmp_path / "file").write_text("")
    done = run("report", tmp_path, "-o", tmp_path / "file")
    assert done.exit_code == EXIT_FAILED
    assert str(tmp_path / "file") in done.stderr


def test_a_report_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    saved(tmp_path, scaling=fabricated()["scaling"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with fails(ResourceError, "matplotlib", "pip install 'telerag-cli[bench]'"):
        report.write(tmp_path, tmp_path / "out")


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
