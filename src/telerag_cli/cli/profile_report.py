"""Tables of a profile, of what follows from it, and of how right a run's predictions were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from telerag_cli.cli import console
from telerag_cli.config import Lookahead
from telerag_cli.engine.explain import outlook_rows
from telerag_cli.files import wrap_os_error
from telerag_cli.planning.check import prediction_errors
from telerag_cli.planning.formulas import transfer_cost_s
from telerag_cli.planning.planner import Planner
from telerag_cli.planning.profile import Measured, Profile
from telerag_cli.units import format_bytes

TYPICAL_PROMPT, TYPICAL_TEXT = 64, 96
"""Tokens read and written before a retrieval: those of hyde."""
WIDTH = 100
Row = tuple[str, str, str]


def show_errors(path: Path) -> None:
    """Print the errors of the predictions in a run's output."""
    try:
        with path.open("rb") as lines:
            errors = prediction_errors(lines, path)
    except OSError as error:
        raise wrap_os_error(error, path) from error
    rows = [
        (
            each.function,
            each.kind,
            each.count,
            _with_unit(each.function, each.predicted),
            _with_unit(each.function, each.measured),
            f"{each.median:.1%}",
            f"{each.worst:.0%}",
            f"{each.bias:+.1%}",
        )
        for each in errors
    ]
    columns = ("function", "inputs", "count", "predicted", "measured", "median error", "worst", "bias")
    console.table("", columns, rows, data=True)
    console.say("ahead: predicted before the text was written. given: from the actual lengths and lists.")


def _with_unit(name: str, value: float) -> str:
    if name.endswith("_share"):
        return f"{value:.1%}"
    return f"{1e3 * value:.1f} ms" if name.endswith("_s") else format_bytes(value)


def typical_window_s(planner: Planner) -> float:
    """Return the window of a question of usual length."""
    return planner.window_s([planner.text(TYPICAL_PROMPT, 0, TYPICAL_TEXT)], "")


def show_profile(profile: Profile, planner: Planner | None) -> None:
    """Print what was measured and, with a planner, what follows from it."""
    for title, rows in _tables(profile):
        if rows:
            console.table(title, ("what", "median", "quartiles"), rows, data=True, width=WIDTH)
    if planner is not None:
        window_s = typical_window_s(planner)
        window = ("window", f"{window_s:.2f} s", f"{TYPICAL_PROMPT} tokens read, {TYPICAL_TEXT} written")
        rows = [window, *outlook_rows(planner, window_s, Lookahead.REFINED)]
        title = "What follows, for a question of usual length asked alone"
        console.table(title, ("what", "expected", "why"), rows, data=True, width=WIDTH)
    for what in profile.left_out:
        console.say(what)


def _tables(profile: Profile) -> Iterator[tuple[str, list[Row]]]:
    yield "Links", list(_links(profile))
    if (moving := profile.moving) is not None:
        yield (
            "Lists of the index",
            [
                _rate("moved by lookahead, the LLM idle", moving.alone),
                _rate("moved by lookahead, the LLM decoding", moving.while_decoding),
                ("decoding while lists move, against alone", f"{moving.decoding_slowed:.2f} x", ""),
            ],
        )
    if (joins := profile.joins) is not None:
        rows = [
            ("whatever is probed", f"{1e3 * joins.fixed_s:.2f} ms", ""),
            _rate("lists in fast memory", joins.hit_bytes_per_s),
            _rate("lists that are not", joins.missed_bytes_per_s),
        ]
        for point in joins.losses:
            what = f"with {point.missed_share:.0%} missed: share of the shorter of both that is not hidden"
            rows.append((what, f"{point.loss:.0%}", ""))
        yield "Joins of replayed queries", rows
    scoring = [] if profile.coarse_s is None else [_time("coarse quantizer, one query", profile.coarse_s)]
    for rate in profile.scoring:
        latency = f"{1e6 * rate.latency_s:.0f} µs beside the bytes"
        scoring.append(_rate(f"{rate.storage}, {rate.place}; {latency}", rate.bytes_per_s))
    yield "Scoring", scoring
    if (embedding := profile.embedding) is not None:
        yield (
            "Embedding",
            [
                _time("a query", embedding.query_s),
                _time("a refinement", embedding.sketch_s),
                ("what a refinement adds to the LLM's time", f"{1e3 * embedding.sketch_costs_llm_s:.1f} ms", ""),
            ],
        )
    if (llm := profile.llm) is not None:
        prefill = [_time(f"first token after {point.tokens:,} tokens", point.took_s) for point in llm.prefill]
        decode = [_time(f"decoding {point.width} at once: a token of each", point.step_s) for point in llm.decode]
        longer = ("what 1,000 tokens of context add to that", f"{1e6 * llm.context_step_s:.2f} ms", "each text")
        yield "LLM", [*prefill, *decode, longer]
    yield "Memory", [(f"free of {each.where}", format_bytes(each.free_bytes), "") for each in profile.memory]


def _links(profile: Profile) -> Iterator[Row]:
    for point in profile.links:
        what = f"{point.link}, {point.way}, {format_bytes(point.nbytes)}, {point.depth} in flight"
        yield _rate(what, point.bytes_per_s)
    for link, way in dict.fromkeys((point.link, point.way) for point in profile.links):
        points = [point for point in profile.links if (point.link, point.way) == (link, way)]
        if len({point.nbytes for point in points}) > 1:
            cost = f"{1e6 * transfer_cost_s(points):.0f} µs"
            yield f"{link}, {way}: cost of a transfer beside its bytes", cost, "fitted"
    if (slot := profile.pcie) is not None:
        now, most = f"generation {slot.generation} x{slot.width}", f"at most {slot.most_generation} x{slot.most_width}"
        yield "PCIe slot, as the driver reports it", now, most


def _rate(what: str, figure: Measured) -> Row:
    quartiles = f"{figure.low / 1e9:.2f}-{figure.high / 1e9:.2f} of {figure.repeats}"
    return what, f"{figure.value / 1e9:.2f} GB/s", quartiles


def _time(what: str, figure: Measured) -> Row:
    quartiles = f"{1e3 * figure.low:.2f}-{1e3 * figure.high:.2f} of {figure.repeats}"
    return what, f"{1e3 * figure.value:.2f} ms", quartiles
