"""Fill the README's figures from benchmarks/results/*.json; with --check, fail when they are stale.

A result is what `telerag_cli.bench_record.record` makes, with `figures`: rows for the README, each `what` was measured,
its `value`, and optionally what it is compared `against` and the `goal`. Results without `figures` are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from telerag_cli.config import format_bytes

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
COLUMNS = {"what": "what", "value": "measured", "against": "compared with", "goal": "goal"}


def load(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file name, result) of each result that has rows for the README, by name."""
    results = (
        (path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))
    )
    return [(name, result) for name, result in results if result.get("figures")]


def render(results: list[tuple[str, dict[str, Any]]]) -> str:
    """The section in Markdown: a table, the hardware, and the command behind each file."""
    if not results:
        return "Nothing is recorded in `benchmarks/results/` yet."
    lines = ["| " + " | ".join([*COLUMNS.values(), "from"]) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, result in results:
        for row in result["figures"]:
            cells = [str(row.get(column, "")) for column in COLUMNS]
            lines.append("| " + " | ".join([*cells, f"[{name}](benchmarks/results/{name})"]) + " |")
    machines: dict[str, list[str]] = {}
    for name, result in results:
        machines.setdefault(describe(result["hardware"]), []).append(name)
    for machine, names in machines.items():
        lines += ["", f"{', '.join(names)}: {machine}."]
    lines += ["", *(f"- `{name}`: `{result['command']}`" for name, result in results)]
    return "\n".join(lines)


def describe(hardware: dict[str, Any]) -> str:
    """A machine and what was installed on it, in a line."""
    parts = [hardware["cpu"], f"{hardware['cores']} cores", format_bytes(hardware["memory_bytes"])]
    parts += [*hardware["gpus"], hardware["system"], f"Python {hardware['python']}"]
    return ", ".join(
        [*parts, *(f"{package} {version}" for package, version in sorted(hardware["versions"].items()))]
    )


def fill(readme: str, section: str) -> str:
    """The README with the section between its marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"error: README.md lacks {BEGIN} or {END}; put both on lines of their own.")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description="Fill the README's figures from benchmarks/results/*.json.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when they are stale")
    options = parser.parse_args()
    target = ROOT / "README.md"
    found = target.read_text(encoding="utf-8")
    wanted = fill(found, render(load(ROOT / "benchmarks" / "results")))
    if found == wanted:
        return
    if options.check:
        sys.exit("error: the figures in README.md are stale; run make docs.")
    target.write_text(wanted, encoding="utf-8")
    print("wrote README.md")


if __name__ == "__main__":
    main()
