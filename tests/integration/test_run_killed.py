"""A run's output and recording, killed at random moments and resumed: each question once, in both."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

KILLS = int(os.environ.get("TELERAG_KILLS", "5"))
QUESTIONS = 400
RUN = f"""
import sys, time
from pathlib import Path
from telerag_cli.engine.lines import RunFile
from telerag_cli.engine.questions import Question
output, record = map(Path, sys.argv[1:])
with RunFile(output, resume=True) as file, RunFile(record, resume=True, only=file.answered) as recording:
    print("began", flush=True)
    for number in range({QUESTIONS}):
        question = Question(str(number), f"What is {{number}}?")
        if question.key not in file.answered:
            line = {{"id": question.id, "question": question.text, "answer": "é" * 3000}}
            recording.append(line)
            file.append(line)
            time.sleep(0.001)
"""


def test_killed_at_random_moments_each_question_has_one_line(tmp_path):
    """TELERAG_KILLS sets how often; when all is answered the files begin anew."""
    rng = random.Random(0)
    files = [tmp_path / "output.jsonl", tmp_path / "record.jsonl"]
    command = [sys.executable, "-c", RUN, *map(str, files)]
    kills = wholes = 0
    while kills < KILLS or not wholes:
        running = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert running.stdout.readline() == b"began\n"
        if kills < KILLS:
            time.sleep(rng.uniform(0, 0.15))
            running.kill()
            kills += 1
        running.communicate()
        answered, recorded = (Counter(map(id_of, whole_lines(path))) for path in files)
        assert set(answered.values()) | set(recorded.values()) <= {1}
        assert set(answered) <= set(recorded)  # an answer is recorded before it is written
        if running.returncode == 0:
            assert len(answered) == len(recorded) == QUESTIONS
            wholes += 1
            for path in files:
                path.unlink()


def whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def id_of(line: bytes) -> str:
    return json.loads(line)["id"]
