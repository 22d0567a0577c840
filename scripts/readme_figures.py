"""Fill the figures of docs/benchmarks.md from benchmarks/results; with --check, fail when they are stale.

Each folder there holds results of ``telerag bench`` on one machine: the document has its latency by pipeline, what else
it shows in a line each, and its report. A JSON file directly there holds `command`, `hardware`
(`telerag_cli.system.hardware`) and `figures`: rows for the document, each `what` was measured, its `value`, and
optionally what it is compared `against` and the `goal`. Results without `figures` are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from telerag_cli.bench.results import Cell, Key, Ratio, SuiteResult, load_all
from telerag_cli.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = "docs/benchmarks.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
SUITES_BEGIN, SUITES_END = "<!-- suites:begin -->", "<!-- suites:end -->"
BASELINE, OURS, LIMIT = "faiss-ondisk", "refined", "llm-only"
STUDIES = (
    "Each file names the command that made it. The scripts of finished studies are in the history: commit `c766e1c` of "
    "2026-12-01 is the last that has them."
)
COLUMNS = {"what": "what", "value": "measured", "against": "compared with", "goal": "goal"}


def load(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file name, result) of each result that has rows for the document, by name."""
    results = ((path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json")))
    return [(name, result) for name, result in results if result.get("figures")]


def render(results: list[tuple[str, dict[str, Any]]]) -> str:
    """The section in Markdown: a table, the hardware, and where the scripts are."""
    if not results:
        return "Nothing is recorded in `benchmarks/results/` yet."
    lines = ["| " + " | ".join([*COLUMNS.values(), "from"]) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, result in results:
        for row in result["figures"]:
            cells = [str(row.get(column, "")) for column in COLUMNS]
            lines.append("| " + " | ".join([*cells, f"[{name}](../benchmarks/results/{name})"]) + " |")
    machines: dict[str, list[str]] = {}
    for name, result in results:
        machines.setdefault(describe(result["hardware"]), []).append(name)
    for machine, names in machines.items():
        lines += ["", f"{', '.join(names)}: {machine}."]
    return "\n".join([*lines, "", STUDIES])


def describe(hardware: dict[str, Any]) -> str:
    """A machine and what was installed on it, in a line."""
    parts = [hardware["cpu"], f"{hardware['cores']} cores", format_bytes(hardware["memory_bytes"])]
    parts += [*hardware["gpus"], hardware["system"], f"Python {hardware['python']}"]
    return ", ".join([*parts, *(f"{package} {version}" for package, version in sorted(hardware["versions"].items()))])


def render_suites(folders: list[Path]) -> str:
    """The section of ``telerag bench`` in Markdown: each machine's table, other findings, and where all of it is."""
    parts = []
    for folder in folders:
        results = load_all(folder)
        place = folder.relative_to(ROOT)
        parts += [*_latency(results["latency"]), "", *(f"- {line}" for line in _lines(results)), ""]
        parts += [
            "All figures, with plots, how each system is configured, and the commands: "
            f"[{place}/report.md](../{place}/report.md).",
            "",
        ]
        parts += [f"Measured on: {describe(results['latency'].hardware)}."]
    return "\n".join(parts) if parts else "Nothing is recorded yet."


def _latency(result: SuiteResult) -> list[str]:
    """A row a pipeline: medians, ratios with their intervals, hits."""
    shown = [name for name in result.systems if name != LIMIT]
    heads = [
        "pipeline",
        *(f"{name}, s" for name in shown),
        f"{BASELINE} ÷ {OURS}",
        f"{OURS} ÷ {LIMIT}",
        "lists there at the join",
    ]
    rows = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for key in _keys(result):
        cells = {cell.system: cell for cell in result.cells if cell.key == key}
        medians = [f"{cells[name].values['median_e2el_ms'] / 1e3:.2f}" if name in cells else "" for name in shown]
        hit = f"{cells[OURS].values['hit_share']:.0%}" if OURS in cells and "hit_share" in cells[OURS].values else ""
        row = [
            f"`{key['pipeline']}`" if cells else key["pipeline"],
            *medians,
            _told(_ratio(result, key, BASELINE, OURS)),
            _told(_ratio(result, key, OURS, LIMIT)),
            hit,
        ]
        rows.append("| " + " | ".join(row) + " |")
    settings = result.settings
    index = settings["index"]
    about = (
        f"Seconds to an answer, median of {settings['num_prompts'] * settings['repeats']} questions "
        f"one at a time, cold; "
        f"{settings['nprobe']} of {index['nlist']:,} lists of an index of {index['lists_bytes'] / 1e9:.1f} GB, "
        f"{settings['k']} passages, answers up to {settings['max_tokens']} tokens, fast memory "
        f"{format_bytes(settings['fast_memory_bytes'])}, {settings['llm']}. "
        "Ratios are pair by pair, with 95 % intervals."
    )
    return [about, "", *rows]


LIMITS = (("faiss-memory", OURS), (OURS, "resident"), (OURS, LIMIT), ("useless", "fetch"))
STATES = {
    "latency-limits": ("the limits, cold", LIMITS),
    "latency-warm": (
        "warm, the whole index in the page cache and arenas as they were left",
        ((BASELINE, OURS), ("fetch", OURS), (OURS, LIMIT)),
    ),
}
"""What a second and third run of the suite `latency` stand for, and the ratios to tell of them."""


def _lines(results: dict[str, SuiteResult]) -> Iterator[str]:
    """What the other suites found, a sentence each; those that were not run are left out."""
    for name, (what, pairs) in STATES.items():
        if result := results.get(name):
            key = _keys(result)[0]
            found = [(over, under, _ratio(result, key, over, under)) for over, under in pairs]
            told = [f"{over} ÷ {under} {_told(ratio)}" for over, under, ratio in found if ratio]
            yield f"`{key['pipeline']}`, {what}: {'; '.join(told)}."
    if hits := results.get("hit-rate"):
        told = [f"{each.values['hit_share']:.0%} {each.system}" for each in hits.cells if each.key["budget"] == 1.0]
        yield f"Lists in fast memory at the join when as many bytes may be moved as are probed: {', '.join(told)}."
    for name, axis, word in (("nprobe", "nprobe", "lists probed"), ("throughput", "batch_size", "at once")):
        if result := results.get(name):
            told = [f"{_told(_ratio(result, key, BASELINE, OURS))} at {key[axis]} {word}" for key in _keys(result)]
            yield f"{result.title}: {BASELINE} ÷ {OURS} {', '.join(told)}."
    if many := results.get("throughput-schedule"):
        size = max(cell.key["batch_size"] for cell in many.cells)
        by_system = {cell.system: cell.values for cell in many.cells if cell.key["batch_size"] == size}
        told = [
            f"{values['hit_share']:.0%} of the probed lists there at the join, "
            f"{(values['bytes_moved'] + values['bytes_missed']) / 1e6:.0f} MB moved a question, "
            f"{values['request_throughput']:.3f} questions/s {words}"
            for values, words in (
                (by_system["arrival"], "in order of arrival"),
                (by_system[OURS], "similar ones together"),
            )
        ]
        yield f"{size} questions, 8 at once: {'; '.join(told)}."
    if cache := results.get("cache"):
        for skew in dict.fromkeys(cell.key["skew"] for cell in cache.cells):
            cells = [cell for cell in cache.cells if cell.key["skew"] == skew]
            shares = [f"{cell.values['hit_share']:.0%} {cell.system}" for cell in cells]
            asked = f"questions drawn by Zipf's law with exponent {skew:g}" if skew else "every question once"
            yield f"Cache policies, {asked}, lists hit: {', '.join(shares)}."
    if scaling := results.get("scaling"):
        cells = [cell for cell in scaling.cells if cell.system == "replicas"]
        told = [f"{cell.values['request_throughput']:.2f} by {cell.key['replicas']}" for cell in cells]
        yield f"Replicas that share these cores, questions per second: {', '.join(told)}."
    if embed := results.get("embed"):
        rate = next(cell.values["request_throughput"] for cell in embed.cells if cell.system == "telerag")
        times = f"{_told(embed.ratios[0])} times SentenceTransformer.encode"
        yield f"Embedding: {rate:.0f} passages/s, {times}. {embed.checks[0].says}"
    if build := results.get("build"):
        values = build.cells[0].values
        yield (
            f"Building {build.settings['lists_bytes'] / 1e9:.1f} GB, {build.settings['vectors']:,} vectors: "
            f"{values['us_per_vector']:.1f} µs a vector, {build.ratios[0].ratio:.2f} times Faiss's train and add in "
            f"memory, at most {format_bytes(values['peak_rss_bytes'])} of memory."
        )


def _keys(result: SuiteResult) -> list[Key]:
    """Where something was measured, means last."""
    measured: list[Cell | Ratio] = [*result.cells, *result.ratios]
    return list({tuple(each.key.items()): each.key for each in measured}.values())


def _ratio(result: SuiteResult, key: Key, over: str, under: str) -> Ratio | None:
    """End to end, or of whole batches, or of joins."""
    return next(
        (
            each
            for each in result.ratios
            if each.key == key
            and (each.over, each.under) == (over, under)
            and each.metric in ("e2el_ms", "wall_ms", "join_ms")
        ),
        None,
    )


def _told(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"**{ratio.ratio:.2f}** ({ratio.low:.2f} to {ratio.high:.2f})" if ratio.ratio is not None else ratio.note


def fill(document: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """The document with the section between its marks."""
    before, first, rest = document.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        sys.exit(f"error: {DOCUMENT} lacks {begin} or {end}; put both on lines of their own.")
    return f"{before}{begin}\n{section}\n{end}{after}"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description="Fill the figures of docs/benchmarks.md from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when they are stale")
    options = parser.parse_args()
    target = ROOT / DOCUMENT
    found = target.read_text(encoding="utf-8")
    folder = ROOT / "benchmarks" / "results"
    folders = [path.parent for path in sorted(folder.glob("*/latency.json"))]
    wanted = fill(fill(found, render(load(folder))), render_suites(folders), SUITES_BEGIN, SUITES_END)
    if found == wanted:
        return
    if options.check:
        sys.exit(f"error: the figures in {DOCUMENT} are stale; run make docs.")
    target.write_text(wanted, encoding="utf-8")
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
