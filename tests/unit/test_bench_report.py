"""Reports of benchmarks, from results that nobody measured."""

import re
import sys
from dataclasses import replace

import pytest

from bench_results import HYDE, NASTY, fabricated, latencies, latency, result, run, saved
from expect import fails
from telerag_cli.bench import plots, report, wording
from telerag_cli.bench.plots import looks_of, plots_of
from telerag_cli.bench.report import escaped, fenced
from telerag_cli.bench.results import Cell
from telerag_cli.bench.suites import SuiteName
from telerag_cli.errors import EXIT_FAILED, EXIT_OK, ResourceError


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
