"""The main job, end to end, on fewer passages than usual."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from telerag_cli.cli.quickstart import MODES, QUESTIONS
from telerag_cli.errors import EXIT_FAILED
from telerag_cli.index.artifact import Index

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]
PASSAGES = 240


def quickstart(directory, passages=PASSAGES):
    command = [sys.executable, "-m", "telerag_cli", "quickstart", "--dir", directory, "--limit", str(passages)]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart") / "new"
    return directory, quickstart(directory)


def test_it_ends_well_and_answers_every_question_with_sources(finished):
    directory, done = finished
    assert done.returncode == 0, done.stderr
    ids = {json.loads(line)["id"] for line in (directory / "corpus.jsonl").read_text().splitlines()}
    assert len(ids) == PASSAGES
    for number, question in enumerate(QUESTIONS, 1):
        _, _, after = done.stdout.partition(f"{number}. {question}\n")
        answer, _, rest = after.partition("     [1] ")
        assert answer.strip()
        assert any(rest[7:].startswith(name) for name in ids)


def test_lookahead_finds_more_lists_in_fast_memory_and_changes_no_answer(finished):
    _, done = finished
    rows = re.findall(r"^ *(\d) +(off|refined) +(?:[\d.]+ +){4}(\d+) of (\d+) ", done.stdout, re.MULTILINE)
    assert len(rows) == len(QUESTIONS) * len(MODES)
    hits = {mode: sum(int(hit) for _, row_mode, hit, _ in rows if row_mode == mode) for mode in MODES}
    wanted = sum(int(of) for _, mode, _, of in rows if mode == "refined")
    assert hits["off"] < hits["refined"] <= wanted
    assert f"{len(QUESTIONS)} of {len(QUESTIONS)} answers are the same" in done.stdout


def test_what_it_leaves_is_what_the_other_commands_read(finished):
    directory, done = finished
    assert Index.open(directory / "index").manifest.ntotal == PASSAGES
    assert (directory / "questions.txt").read_text().splitlines() == list(QUESTIONS)
    events = json.loads((directory / "trace.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert "LLM" in lanes
    assert any(lane.startswith("link") for lane in lanes)
    for hint in re.findall(rf"{re.escape(str(directory))}/\S+?(?=[\s:])", done.stderr):
        assert Path(hint).exists(), hint


def test_a_folder_of_another_corpus_is_refused_with_what_to_do(finished):
    directory, _ = finished
    index = (directory / "index" / "manifest.json").read_bytes()
    done = quickstart(directory, PASSAGES - 40)
    assert done.returncode == EXIT_FAILED
    assert f"Remove {directory} or choose another --dir." in done.stderr
    assert done.stdout == ""
    assert (directory / "index" / "manifest.json").read_bytes() == index


def test_an_unwritable_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    done = quickstart(tmp_path / "file" / "below")
    assert done.returncode == EXIT_FAILED
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
