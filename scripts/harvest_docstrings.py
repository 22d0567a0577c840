"""Make a corpus from the docstrings of Python packages: JSONL, as `telerag embed` reads it.

python scripts/harvest_docstrings.py .venv/lib/python3.11/site-packages -o corpus.jsonl --limit 100000
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from telerag_cli.corpus.pydocs import harvest
from telerag_cli.errors import TeleragError
from telerag_cli.files import writing


def main() -> None:
    """Harvest the folders named on the command line."""
    parser = argparse.ArgumentParser(description="Make a corpus from the docstrings of Python packages.")
    parser.add_argument("roots", nargs="+", type=Path, metavar="ROOT", help="folders of Python packages")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--limit", type=int, help="stop after this many passages")
    options = parser.parse_args()
    count = 0
    try:
        with writing(options.output) as temporary, temporary.open("w", encoding="utf-8") as handle:
            for passage in itertools.islice(harvest(options.roots), options.limit):
                line = {"id": passage.id, "text": passage.text, **passage.metadata}
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
    except TeleragError as error:
        sys.exit(f"error: {error}")
    print(f"{count:,} passages in {options.output}")


if __name__ == "__main__":
    main()
