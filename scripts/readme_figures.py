"""Fill the README's figures from benchmarks/results/*.json; with --check, fail when they are stale.

A result holds `command` (list of words), `hardware` (names to values) and `figures`, a list of rows for the
README: `what` was measured, its `value`, and optionally what it is compared `against` and the `goal`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

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
        machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result["hardware"].items())
        machines.setdefault(machine, []).append(name)
    for machine, names in machines.items():
        lines += ["", f"Hardware and versions ({', '.join(names)}): {machine}.", ""]
    lines += [f"- `{name}`: `{' '.join(result['command'])}`" for name, result in results]
    return "\n".join(lines)


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
