"""The small version of `scripts/fuzz_artifacts.py`: damaged artifacts, a publisher that swaps, two writers at once."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_artifacts.py"


def test_damage_is_refused_or_harmless_and_of_two_writers_one_wins():
    command = [sys.executable, str(SCRIPT), "--flips", "130", "--openings", "50", "--rounds", "2", "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert len(result.stdout.splitlines()) == 7
    assert re.search("'refused': [0-9]{2}", result.stdout)
    assert "'one index': 50" in result.stdout


def test_the_script_counts_what_should_not_be(tmp_path):
    """A reader that crashes, one that does not notice, and one that ends with an error of its own."""
    spec = importlib.util.spec_from_file_location("fuzz_artifacts", SCRIPT)
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_artifacts"] = fuzz
    spec.loader.exec_module(fuzz)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "file").write_bytes(bytes(100))

    def crashes(folder):
        if any((folder / "file").read_bytes()):
            os.kill(os.getpid(), signal.SIGKILL)

    def all_of(read):
        return fuzz.flips(tmp_path / "artifact", read, 9, 0)

    assert all_of(crashes) == {"CRASH": 9}
    assert all_of(lambda folder: (folder / "file").read_bytes()) == {"SILENTLY WRONG": 9}
    found = all_of(lambda folder: 1 // (not any((folder / "file").read_bytes())))
    assert [outcome.split(":")[0] for outcome in found] == ["TRACEBACK ZeroDivisionError"]
