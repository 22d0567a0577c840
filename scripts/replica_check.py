"""Replicas as their user sees them: the answers of one process, and nothing lost or doubled when one of them is killed.

    python scripts/replica_check.py INDEX --questions FILE [-o RESULT.json] [--kills 10]

Each turn is a `telerag run` of its own. In all but the first two, some moments after the first line has come, one replica's
process gets SIGKILL. Every turn must give each question one line with the answer, the passages and the scores of the run
without replicas. At the end nothing of Ray may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telerag_cli.bench_record import record
from telerag_cli.files import write_json

REPLICA = "ray::Replica"
RAY = ("raylet", "gcs_server", REPLICA)


def processes(names: Sequence[str]) -> list[tuple[int, str]]:
    """Processes whose command line begins with or holds one of the names."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if any(name in command for name in names) and "replica_check" not in command:
            found.append((int(entry.name), command))
    return found


def answers(path: Path) -> dict[str, Any]:
    """What each line says; fails on a line without an answer and on two for one question."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        value = json.loads(line)
        if value["id"] in found:
            raise SystemExit(f"question {value['id']} has two lines")
        if "error" in value:
            raise SystemExit(f"question {value['id']}: {value['error']['message']}")
        found[value["id"]] = (
            value["answer"],
            [(passage["id"], passage["score"]) for passage in value["passages"]],
        )
    return found


def turn(
    command: Sequence[str], output: Path, kill_after: int | None, choice: random.Random
) -> dict[str, Any]:
    """One run; ``kill_after`` so many lines a replica dies."""
    killed: list[int] = []

    def kill() -> None:
        while process.poll() is None:
            if output.exists() and output.read_bytes().count(b"\n") >= (kill_after or 0):
                time.sleep(choice.random())
                if there := processes([REPLICA]):
                    killed.append(choice.choice(there)[0])
                    os.kill(killed[-1], signal.SIGKILL)
                return
            time.sleep(0.02)

    began_s = time.perf_counter()
    process = subprocess.Popen(
        [*command, "-o", str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killer = threading.Thread(target=kill) if kill_after is not None else None
    if killer:
        killer.start()
    out, told = process.communicate()
    if killer:
        killer.join()
    if process.returncode or out:
        raise SystemExit(f"exit {process.returncode}, stdout {out!r}:\n{told}")
    wall = re.search(r"answered in ([\d.]+) s", told)
    return {
        "wall_s": round(time.perf_counter() - began_s, 2),
        "answering_s": float(wall[1]) if wall else None,
        "killed": len(killed),
        "killed_after_lines": kill_after,
    }


def figures(turns: Sequence[dict[str, Any]], count: int, replicas: int) -> list[dict[str, str]]:
    """The README's row."""
    killed = [done for done in turns if done["killed"]]
    return [{
        "what": f"Runs of {count} questions by {replicas} replicas, one of which gets SIGKILL on the way, in which every question has "
        "one line with the answer, passages and scores of a run without replicas",
        "value": f"{sum(done['same'] for done in killed)} of {len(killed)}",
        "against": f"nobody killed: {sum(done['same'] for done in turns[1:2])} of 1",
        "goal": f"{len(killed)} of {len(killed)}",
    }]  # fmt: skip


def main() -> None:
    """Run, compare, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=10, help="so many of them")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--fast-memory", default="512MiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    choice = random.Random(options.seed)
    questions = options.questions.read_text().splitlines()[: options.limit]
    base = [str(Path(sys.executable).with_name("telerag")), "run", str(options.index),
            "--profile", "none", "--max-tokens", str(options.max_tokens), "--fast-memory", options.fast_memory]  # fmt: skip
    replicas = [*base, "--replicas", str(options.replicas)]
    count = len(questions)
    turns: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "questions.txt"
        asked.write_text("\n".join(questions) + "\n")
        expected: dict[str, Any] | None = None
        # A kill may come too late; then there is another turn.
        while len(turns) < 2 + options.kills + sum(not done["killed"] for done in turns[2:]):
            number = len(turns)
            output = Path(folder) / f"{number}.jsonl"
            kill_after = choice.randrange(1, count) if number > 1 else None
            done = turn([*(replicas if number else base), "-q", str(asked)], output, kill_after, choice)
            found = answers(output)
            expected = expected or found
            done |= {
                "replicas": options.replicas if number else 1,
                "lines": len(found),
                "same": found == expected,
            }
            print(json.dumps(done), file=sys.stderr)
            turns.append(done)
    deadline_s = time.monotonic() + 10
    while (left := processes(RAY)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    same = sum(done["same"] and done["lines"] == count for done in turns)
    died = sum(done["killed"] for done in turns)
    print(f"{same} of {len(turns)} turns gave every question its answer once; a replica was killed in {died}; "
          f"{len(left)} processes of Ray are left.")  # fmt: skip
    if options.output:
        write_json(options.output, record(
            figures=figures(turns, count, options.replicas),
            what="telerag run with replicas that are killed, against one process", command=shlex.join(["python", *sys.argv]),
            questions=count, turns=turns, turns_same=same, turns_with_a_kill=died, processes_left=len(left),
        ))  # fmt: skip
    if same < len(turns) or left or died < options.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
