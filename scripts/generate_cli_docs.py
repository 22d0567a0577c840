"""Write docs/cli.md from the commands; with --check, fail and show the difference when it is stale."""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEADER = "<!-- Made by scripts/generate_cli_docs.py from the commands; do not edit. -->\n\n"


def reference() -> str:
    """The reference as Typer writes it; the terminal's width and colours have no say."""
    command = [sys.executable, "-m", "typer", "telerag_cli.cli.app", "utils", "docs", "--name", "telerag"]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return HEADER + "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines()) + "\n"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when it is stale")
    options = parser.parse_args()
    wanted = reference()
    found = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
    if found == wanted:
        return
    if options.check:
        before, after = found.splitlines(keepends=True), wanted.splitlines(keepends=True)
        print("".join(difflib.unified_diff(before, after, "docs/cli.md", "the commands")))
        sys.exit("error: docs/cli.md is stale; run make docs.")
    TARGET.write_text(wanted, encoding="utf-8")
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
