"""How right the planner is: a profile, a run with real generation, and the errors of each function.

    python scripts/bench_plan.py INDEX --questions FILE [--nprobe 256 1024] [--limit 30] [-o benchmarks/results/plan.json]

Runs the commands as a user would: `telerag profile INDEX`, then `telerag run` with that profile and no averages from earlier
runs, one question at a time, and takes the predictions and measurements from its output. Further runs over the same questions
with fewer or more lists are made with the same profile, which is measured for the first number.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from telerag_cli.bench_record import record
from telerag_cli.planning.check import Error, errors_of
from telerag_cli.planning.profile import Profile

GOALS = {
    ("budget_bytes", "ahead"): 0.15,
    ("join_s", "ahead"): 0.15,
    ("join_s", "given"): 0.15,
    ("window_s", "ahead"): 0.25,
}


def telerag(*arguments: object, cache: Path) -> None:
    """Run a command with a cache of its own."""
    words = [sys.executable, "-m", "telerag_cli", *map(str, arguments)]
    print("$ telerag", shlex.join(words[3:]), file=sys.stderr)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TELERAG_")}
    subprocess.run(
        words, check=True, env=environment | {"XDG_CACHE_HOME": str(cache)}, stdout=subprocess.DEVNULL
    )


def errors_with(
    index: Path, questions: Path, nprobe: int, profile: Path, options: argparse.Namespace, folder: Path
) -> list[Error]:
    """Of a run with so many lists."""
    out = folder / f"run_{nprobe}.jsonl"
    telerag("run", index, "-q", questions, "-o", out, "--nprobe", nprobe, "--profile", profile, "--concurrency", 1, "--max-tokens",
            options.max_tokens, "--fast-memory", options.fast_memory, "--tier", options.tier, cache=folder / str(nprobe))  # fmt: skip
    with out.open("rb") as lines:
        return errors_of(lines, out)


def figures(
    runs: dict[int, list[Error]], options: argparse.Namespace, nbytes: int, count: int
) -> list[dict[str, str]]:
    """Rows for the README."""
    rows = []
    words = {("window_s", "ahead"): "window", ("budget_bytes", "ahead"): "budget", ("join_s", "ahead"): "join",
             ("join_s", "given"): "join, given the lists that were there"}  # fmt: skip
    for nprobe, errors in runs.items():
        found = {(error.function, error.kind): error for error in errors}
        rows.append({
            "what": f"Planner: median error of what is predicted for {count} HyDE questions, one at a time, {nprobe:,} lists probed of a "
                    f"{nbytes / 1e9:.1f} GB index, arena {options.fast_memory}",
            "value": ", ".join(f"{name} {found[key].median:.0%}" for key, name in words.items()),
            "against": f"measured medians: window {found['window_s', 'ahead'].measured:.2f} s, budget "
                       f"{found['budget_bytes', 'ahead'].measured / 1e6:,.0f} MB, join {1e3 * found['join_s', 'ahead'].measured:.0f} ms",
            "goal": "window 25 %, budget and join 15 %",
        })  # fmt: skip
    return rows


def main() -> None:
    """Profile, run, compare."""
    parser = argparse.ArgumentParser(description="Predictions of the planner against what was measured.")
    parser.add_argument("index", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--nprobe", type=int, nargs="+", default=[256])
    parser.add_argument("--fast-memory", default="2GiB")
    parser.add_argument("--tier", default="host")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = folder / "questions.txt"
        asked = [line for line in options.questions.read_text(encoding="utf-8").splitlines() if line.strip()][
            : options.limit
        ]
        questions.write_text("\n".join(asked) + "\n", encoding="utf-8")
        path = folder / "profile.json"
        telerag("profile", options.index, "-o", path, "--nprobe", options.nprobe[0], "--fast-memory", options.fast_memory, "--tier",
                options.tier, cache=folder / "none")  # fmt: skip
        runs = {
            nprobe: errors_with(options.index, questions, nprobe, path, options, folder)
            for nprobe in options.nprobe
        }
        profile = Profile.load(path)
    for nprobe, errors in runs.items():
        print(f"nprobe {nprobe:,}")
        for error in errors:
            goal = GOALS.get((error.function, error.kind))
            print(f"  {error.function:13} {error.kind:6} median error {error.median:6.1%}  bias {error.bias:+6.1%}"
                  + (f"  (goal {goal:.0%})" if goal else ""))  # fmt: skip
    if options.output:
        nbytes = (options.index / "lists.bin").stat().st_size
        each: dict[str, Any] = {
            str(nprobe): [asdict(error) for error in errors] for nprobe, errors in runs.items()
        }
        result = record(shlex.join(["python", *sys.argv]), figures=figures(runs, options, nbytes, len(asked)), errors=each,
                        profile=profile.as_json())  # fmt: skip
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
