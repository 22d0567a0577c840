"""Reports of benchmarks, from results that nobody measured."""

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import typer
from typer.testing import CliRunner

from telerag_cli.bench import drawings, plots, report, tables
from telerag_cli.bench.compare import Verdict, compare, compare_paths
from telerag_cli.bench.drawings import drawings_of, slots
from telerag_cli.bench.markdown import escaped, fenced
from telerag_cli.bench.results import Cell, Check, Ratio, SuiteResult
from telerag_cli.bench.suites import SUITES, SuiteName
from telerag_cli.cli import bench_report
from telerag_cli.cli.guard import guarded
from telerag_cli.errors import ArtifactError, UsageError

HARDWARE = {
    "cpu": "Made-up 9000 <two> | cores",
    "cores": 2,
    "memory_bytes": 2 << 30,
    "gpus": [],
    "versions": {"numpy": "0.0.1"},
}
WHAT = "a system that never ran"
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
        {cell.system: {"what": WHAT} for cell in cells},
        list(suite.axes),
        list(cells),
        list(ratios),
        [Check("made up", True, "3 of 3 were invented.")],
        ["Nothing was measured."],
    )
    return replace(made, **changed)


def latencies(value, **more):
    return {
        "completed": 9,
        "failed": 0,
        "mean_e2el_ms": value + 1.25,
        "median_e2el_ms": value,
        "std_e2el_ms": value / 8,
        "p99_e2el_ms": 3 * value,
        **more,
    }


def latency(value=800.5, std=100.0, systems=("faiss-ondisk", "fetch", "refined")):
    keys = [{"pipeline": name, "dataset": "none", "pages": "cold"} for name in ("hyde", "naive")]
    cells = [
        Cell(system, key, latencies(value + 7 * place, std_e2el_ms=std))
        for key in keys
        for place, system in enumerate(systems)
    ]
    ratios = [
        Ratio(keys[0], "faiss-ondisk", "fetch", "e2el_ms", 9, 1.43, 1.37, 1.51),
        Ratio(
            keys[0],
            "faiss-ondisk",
            "refined",
            "e2el_ms",
            9,
            None,
            0.61,
            2.83,
            "spread too wide: from 0.61 to 2.83 over 9 pairs",
        ),
        Ratio(keys[1], "faiss-ondisk", "refined", "e2el_ms", 2, None, 0.0, 0.0, "2 pairs are too few, 3 are needed"),
        Ratio(keys[1], "fetch", "refined", "e2el_ms", 9, 1.07, 1.02, 1.13),
    ]
    return result("latency", cells, ratios)


def fabricated():
    """One small result for each suite."""
    served = {
        f"{which}_{name}_ms": number
        for which, number in (("median", 12.5), ("p90", 31.5), ("p99", 77.5))
        for name in ("ttft", "e2el")
    }
    stages = {"passage": 310.5, "retrieval": 42.25, "answer_1": 501.5, "answer_2": 9.75}
    made = [
        latency(),
        result(
            "nprobe",
            [Cell(name, {"nprobe": n}, latencies(100.5 + n)) for name in ("fetch", "refined") for n in (8, 64)],
        ),
        result("hit-rate", [Cell("refined", {"budget": x}, {"hit_share": x / 4}) for x in (0.5, 1.0, 3.0)]),
        result(
            "throughput",
            [
                Cell("refined", {"batch_size": 1}, {"completed": 4, "request_throughput": 2.125}),
                Cell("refined", {"batch_size": 8}, {"completed": 0, "failed": 8, "first_error": NASTY}),
            ],
            checks=[Check("all completed", False, "8 of 12 failed <badly>.")],
        ),
        result(
            "breakdown",
            [
                Cell(name, {"pipeline": "hyde"}, {"completed": 3, "mean_stage_ms": stages})
                for name in ("fetch", "refined")
            ],
        ),
        result(
            "cache",
            [
                Cell("none", {"cache_fraction": 0.2}, {"hit_share": 0.375, "median_join_ms": 81.5}),
                Cell("hotness", {"cache_fraction": 0.6}, {"hit_share": 0.875, "median_join_ms": 19.5}),
            ],
        ),
        result("scaling", [Cell("refined", {"replicas": 2}, {"request_throughput": 3.625})]),
        result(
            "embed", [Cell("refined", {"batch_size": 32}, {"passages_per_s": 191.5, "peak_memory_bytes": 123456789})]
        ),
        result(
            "build",
            [Cell("a builder with a name that goes on and on until no plot has room for it", {}, {"duration": 93.5})],
        ),
        result(
            "serve",
            [Cell("model $x$", {"request_rate": rate}, served) for rate in (2.0, "inf")],
            metadata={"<b>": NASTY},
        ),
    ]
    return {each.suite: each for each in made}


def saved(folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, each in results.items():
        each.save(folder / f"{stem}.json")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All suites, and the report of them."""
    folder = saved(tmp_path_factory.mktemp("bench"), fabricated())
    (folder / "other.json").write_text("{}")
    report.write(folder, folder / "out")
    return folder


class Page(HTMLParser):
    """What the tests ask of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.ids, self.stack = [], [], [], []
        self.svgs, self.titled, self.captions = 0, 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        self.svgs += tag == "svg"
        self.titled += tag == "title" and self.stack[-1:] == ["svg"]
        self.captions += tag == "caption"
        if tag not in ("meta", "link", "img", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text.append(data)


@pytest.fixture(scope="module")
def page(whole):
    return Page((whole / "out/report.html").read_text())


def figures():
    """All numbers of all cells, as they are written."""
    values = [value for each in fabricated().values() for cell in each.cells for value in cell.values.values()]
    values += [part for value in values if isinstance(value, dict) for part in value.values()]
    return [f"{value:,}".removesuffix(".0") for value in values if isinstance(value, int | float)]


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_every_figure_is_in_the_report(whole, page, name):
    text = "\n".join(page.text) if name.endswith("html") else (whole / "out" / name).read_text()
    words = set(re.split(r"[\s|]+", text))
    assert len(figures()) > 80
    assert [each for each in figures() if each not in words] == []


def test_the_page_refers_to_nothing_elsewhere(whole, page):
    text = (whole / "out/report.html").read_text()
    assert "script" not in {tag for tag, _attributes in page.tags}
    assert "link" not in {tag for tag, _attributes in page.tags}
    for _tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert attributes.get(name, "#").startswith("#")
    assert re.findall(r"@import|url\((?!#)", text) == []


def test_the_page_is_well_formed_and_its_links_arrive(page):
    assert page.stack == []
    assert len(page.ids) == len(set(page.ids))
    targets = [attributes["href"][1:] for _tag, attributes in page.tags if "href" in attributes]
    assert len(targets) > len(SUITES)
    assert set(targets) <= set(page.ids)
    named = {attributes["aria-labelledby"] for _tag, attributes in page.tags if "aria-labelledby" in attributes}
    assert named <= set(page.ids)


def test_the_page_can_be_heard(page):
    """Every picture has words, every table a caption and named columns, headings skip no level."""
    assert page.svgs == page.titled > len(SUITES)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert page.captions == sum(tag == "table" for tag, _attributes in page.tags)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    levels = [int(tag[1]) for tag, _attributes in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_colours_can_be_told_from_the_paper():
    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for mode in (0, 1):
        paper = plots.THEME["paper"][mode]
        assert min(contrast(plots.THEME[name][mode], paper) for name in ("ink", "muted")) >= 4.5
        assert min(contrast(pair[mode], paper) for pair in plots.SERIES) >= 3
    assert min(contrast(plots.ON_STAGE, colour) for colour in plots.STAGES) >= 4.5


def test_what_users_write_is_shown_and_never_run(whole, page):
    assert NASTY in page.text
    summary = (whole / "out/report.md").read_text()
    assert "<script" not in summary
    assert escaped(NASTY) in summary
    assert "\\| cores" in summary


def test_markdown_of_odd_text():
    assert escaped("a|b\nc *d* _e_ f_g [h](i)") == "a\\|b c \\*d\\* \\_e\\_ f_g \\[h\\](i)"
    assert escaped("- no list") == "\\- no list"
    assert fenced("a ``` b").startswith("````sh\n")


def test_every_suite_has_plots(whole):
    pictures = {path.name: path.read_bytes() for path in (whole / "out").glob("*.png")}
    for suite in SuiteName:
        assert any(name.startswith(f"{suite.value}-") for name in pictures)
    for data in pictures.values():
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(data) > 5_000
    named = re.findall(r"^!\[(.+)\]\((.+)\)$", (whole / "out/report.md").read_text(), re.MULTILINE)
    assert {name for _alt, name in named} == set(pictures)
    assert all(len(alt) > 20 for alt, _name in named)


def test_a_ratio_without_number_says_why(whole, page):
    (drawing, *_rest) = drawings_of(latency(), slots([latency()]))
    assert drawing.title == "Speed-up over faiss-ondisk: end to end"
    assert "refined spread too wide" in drawing.alt
    assert "refined 2 pairs are too few, 3 are needed" in drawing.alt
    assert "fetch 1.43 (1.37 to 1.51)" in drawing.alt
    # The interval that is there is shown, one that is none is not.
    assert "0.610 to 2.83" in page.text
    assert not any("0 to 0" in text for text in page.text)
    assert "1.07" in page.text


def test_a_check_that_failed_is_said_first(whole, page):
    text = " ".join(" ".join(page.text).split())
    assert "1 of 10 checks did not hold." in text
    assert text.index("1 of 1 checks did not hold") < text.index("8 of 12 failed <badly>.")
    assert text.count("✗ not held") == 1


def test_a_cell_that_failed_has_no_number():
    failed = result(
        "latency",
        [
            Cell("fetch", {"pipeline": "hyde", "dataset": "d", "pages": "cold"}, {"completed": 0, "failed": 3}),
            Cell("refined", {"pipeline": "hyde", "dataset": "d", "pages": "cold"}, latencies(5.5)),
        ],
    )
    (drawing,) = drawings_of(failed, slots([failed]))
    assert "fetch no request completed" in drawing.alt
    rows = tables.headline_table(failed).rows
    assert rows[0][3:] == ("fetch", "0", "3", *[tables.NONE] * 2)


def test_nothing_measured_draws_nothing(tmp_path):
    empty = result("nprobe", [Cell("refined", {"nprobe": 4}, {"completed": 0, "failed": 2, "median_e2el_ms": None})])
    saved(tmp_path, {"empty": empty, "none": replace(empty, cells=[], systems={}, checks=[], notes=[])})
    written = report.write(tmp_path, tmp_path)
    assert [path.name for path in written] == ["report.html", "report.md"]
    assert (tmp_path / "report.html").read_text().count("Nothing was measured that could be drawn.") == 2
    assert "Latency by lists probed (none)" in (tmp_path / "report.md").read_text()


def test_a_system_has_one_colour_throughout():
    results = fabricated().values()
    numbers = slots(results)
    assert len(set(numbers.values())) == len(numbers)
    found = {}
    for each in results:
        for drawing in drawings_of(each, numbers):
            if each.suite != "breakdown":
                for entry in drawing.legend:
                    found.setdefault(entry.label, set()).add((entry.colour, entry.hatch))
    assert len(found["refined"]) == 1
    assert slots([latency(systems=("refined",))])["refined"] == numbers["refined"]


def test_stages_of_a_kind_look_the_same_and_keep_their_order():
    (drawing,) = drawings_of(fabricated()["breakdown"], {"fetch": 0, "refined": 1})
    assert [entry.label for entry in drawing.legend] == ["passage", "retrieval", "answer"]
    assert "passage 310.5, retrieval 42.25, answer_1 501.5, answer_2 9.75" in drawing.alt


def test_a_panel_for_each_combination_of_axes(tmp_path):
    keys = [
        {"pipeline": "hyde", "dataset": name, "pages": pages} for name in ("one", "two") for pages in ("cold", "warm")
    ]
    many = result("latency", [Cell("refined", key, latencies(9.5)) for key in keys])
    (drawing,) = drawings_of(many, slots([many]))
    assert [panel.title for panel in drawing.panels] == ["one, cold", "one, warm", "two, cold", "two, warm"]


def test_a_suite_that_nobody_knows_is_drawn_over_its_axis():
    odd = replace(
        result("build", []),
        suite="new",
        axes=["depth", "kind"],
        cells=[Cell("s", {"depth": depth, "kind": "k"}, {"bytes_per_s": depth * 7.5}) for depth in (1, 2)],
    )
    (drawing,) = drawings_of(odd, slots([odd]))
    assert drawing.title == "Figures over depth"
    assert "s 7.5 at 1, s 15 at 2" in drawing.alt


def test_rates_that_are_no_numbers_stand_beside_those_that_are():
    assert drawings._positions([4, "inf", 0.5]) == {0.5: 0.0, 4.0: 1.0, "inf": 2.0}
    assert drawings._positions([4, 0.5]) == {4.0: 4.0, 0.5: 0.5}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5678, "1,234.57"),
        (12345678.9, "12,345,679"),
        (0.00012345, "0.00012345"),
        (1e-9, "1.00000e-09"),
        (True, "yes"),
        (None, tables.NONE),
        (float("nan"), tables.NONE),
        (10_000, "10,000"),
        ([], "none"),
        ([1, "a"], "1, a"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert tables.plain(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((0.6, 13.344, None), ["0.60", "13.34", tables.NONE]),
        ((5063.25, 855.5), ["5,063", "856"]),
        ((0.0, 0.0123), ["0.00000", "0.01230"]),
        ((3, 12_000), ["3", "12,000"]),
    ],
)
def test_figures_of_a_column_line_up(values, texts):
    assert tables.column("median_e2el_ms", values) == texts


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
    assert tables.label(name) == words


# Comparing.


def changed(change):
    return {(row.system, row.key["pipeline"], row.metric): row.verdict for row in change.cells}


def test_a_result_equals_itself():
    same = compare(latency(), latency())
    assert same.differences == ()
    assert {row.verdict for row in (*same.cells, *same.ratios)} == {Verdict.EQUAL}


def test_noise_is_told_from_a_difference():
    # Nine requests, a deviation of 100 ms: medians of 800 ms have a standard error of 42 ms.
    near, far = (changed(compare(latency(800.0), latency(value))) for value in (850.0, 1400.0))
    assert near["fetch", "hyde", "median_e2el_ms"] == Verdict.NOISE
    assert far["fetch", "hyde", "median_e2el_ms"] == Verdict.DIFFERS
    assert (
        changed(compare(latency(800.0, std=1.0), latency(850.0, std=1.0)))["fetch", "hyde", "median_e2el_ms"]
        == Verdict.DIFFERS
    )
    # Of a percentile, nothing says how it spreads.
    assert near["fetch", "hyde", "p99_e2el_ms"] == Verdict.UNKNOWN


def test_ratios_are_compared_by_their_intervals():
    def with_ratio(middle, low, high):
        key = {"pipeline": "hyde", "dataset": "none", "pages": "cold"}
        return replace(latency(), ratios=[Ratio(key, "faiss-ondisk", "fetch", "e2el_ms", 9, middle, low, high)])

    first = with_ratio(1.43, 1.37, 1.51)
    assert [row.verdict for row in compare(first, with_ratio(1.45, 1.38, 1.52)).ratios] == [Verdict.NOISE]
    (row,) = compare(first, with_ratio(2.86, 2.74, 3.02)).ratios
    assert row.verdict == Verdict.DIFFERS
    assert row.quotient == pytest.approx(2.0)
    assert 1.8 < row.low < 2.0 < row.high < 2.2
    assert [row.verdict for row in compare(first, with_ratio(None, 0.5, 3.0)).ratios] == [Verdict.MISSING]


def test_settings_that_differ_are_named():
    other = replace(
        latency(),
        hardware={**HARDWARE, "cores": 64, "versions": {"numpy": "0.0.2"}},
        settings={"index": {"nlist": 9}, "seed": 7},
    )
    found = {each.name: (each.first, each.second) for each in compare(latency(), other).differences}
    assert found == {
        "hardware.cores": (2, 64),
        "hardware.versions.numpy": ("0.0.1", "0.0.2"),
        "settings.index.nlist": (8, 9),
        "settings.index.bytes": (4096, None),
    }


def test_cells_on_one_side_only():
    fewer = latency(systems=("faiss-ondisk", "fetch"))
    verdicts = changed(compare(latency(), fewer))
    assert verdicts["refined", "hyde", "median_e2el_ms"] == Verdict.MISSING
    assert verdicts["fetch", "hyde", "median_e2el_ms"] == Verdict.EQUAL


def test_other_suites_are_refused(tmp_path):
    saved(tmp_path / "a", {"x": latency()})
    saved(tmp_path / "b", {"y": fabricated()["cache"]})
    with pytest.raises(UsageError, match=r"x.json is a result of the suite latency and y.json of cache\."):
        compare_paths(tmp_path / "a/x.json", tmp_path / "b/y.json")
    with pytest.raises(ArtifactError, match=r"latency and .* of cache: there is nothing to compare"):
        compare_paths(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UsageError, match=r"is a folder and .* is a file"):
        compare_paths(tmp_path / "a", tmp_path / "b/y.json")
    with pytest.raises(ArtifactError, match="does not exist"):
        compare_paths(tmp_path / "a", tmp_path / "c")


def test_folders_are_compared_suite_by_suite(tmp_path):
    made = fabricated()
    saved(tmp_path / "a", {"latency": made["latency"], "cache": made["cache"], "scaling": made["scaling"]})
    saved(tmp_path / "b", {"latency": made["latency"], "again": made["cache"], "build": made["build"]})
    comparisons, alone = compare_paths(tmp_path / "a", tmp_path / "b")
    assert [each.suite for each in comparisons] == ["latency", "cache"]
    assert sorted(alone) == ["build", "scaling"]


# The commands.

program = typer.Typer()
program.command("report")(guarded(bench_report.report))
program.command("compare")(guarded(bench_report.compare))


def run(*arguments):
    return CliRunner().invoke(program, [str(each) for each in arguments])


def test_report_prints_what_it_wrote(tmp_path):
    saved(tmp_path / "in", {"scaling": fabricated()["scaling"]})
    done = run("report", tmp_path / "in", "-o", tmp_path / "new/out")
    assert done.exit_code == 0, done.output
    names = ["report.html", "report.md", "scaling-curve.png"]
    assert done.stdout.splitlines() == [str(tmp_path / "new/out" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == names
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["scaling.json"]


def test_report_of_nothing_is_one_sentence(tmp_path):
    done = run("report", tmp_path)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path} has no benchmark result.")
    saved(tmp_path, {"scaling": fabricated()["scaling"]})
    (tmp_path / "file").write_text("")
    done = run("report", tmp_path, "-o", tmp_path / "file")
    assert done.exit_code == 1
    assert "is a file, and a report is a folder" in done.stderr


def test_compare_prints_a_table(tmp_path):
    saved(tmp_path, {"a": latency(), "b": replace(latency(1400.0), settings={"seed": 8})})
    done = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.index("not the same in A and B") < done.stdout.index("median_e2el_ms")
    assert re.search(r"settings.seed +7 +8", done.stdout)
    assert re.search(r"fetch +median_e2el_ms +807.5 +1,407 +1.742 +1.\d+ to \d.\d+ +differs", done.stdout)
    assert re.search(r"faiss-ondisk ÷ fetch +e2el_ms +1.43 +1.43 +1.000", done.stdout)


def test_compare_as_json(tmp_path):
    saved(tmp_path / "a", {"latency": latency(), "serve": fabricated()["serve"]})
    saved(tmp_path / "b", {"latency": latency(900.5)})
    done = run("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["unmatched"] == ["serve"]
    assert "Only one side has serve." in done.stderr
    (only,) = told["comparisons"]
    (row,) = [
        each
        for each in only["cells"]
        if (each["system"], each["metric"], each["key"]["pipeline"]) == ("fetch", "median_e2el_ms", "naive")
    ]
    assert (row["a"], row["b"]) == (807.5, 907.5)
    assert row["low"] < row["ratio"] < row["high"]


def test_compare_refuses_what_it_cannot(tmp_path):
    saved(tmp_path, {"a": latency(), "b": fabricated()["cache"]})
    done = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.exit_code == 2
    assert "a.json is a result of the suite latency and b.json of cache." in done.stderr


def test_every_detail_is_counted_and_left_in_the_file(tmp_path):
    cells = [replace(cell, detailed=[{"e2el_ms": 1.0}] * 3) for cell in fabricated()["scaling"].cells]
    saved(tmp_path, {"scaling": replace(fabricated()["scaling"], cells=cells)})
    report.write(tmp_path, tmp_path)
    assert "The file keeps 3 single requests besides." in (tmp_path / "report.md").read_text()
    assert asdict(SuiteResult.load(tmp_path / "scaling.json"))["cells"][0]["detailed"] == [{"e2el_ms": 1.0}] * 3
