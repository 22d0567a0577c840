"""``search`` and ``run`` as their users run them, over a real index with the real models."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from telerag_cli.cli.app import app
from telerag_cli.retrieval.retriever import Retriever
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.tiers.transport import reads_directly

pytestmark = pytest.mark.model
QUESTIONS = ("What does the with statement do?", "How do I find the median of numbers?", "What is a generator?")


def telerag(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def command(*arguments):
    return [sys.executable, "-m", "telerag_cli", *map(str, arguments)]


@pytest.fixture
def index(documented):
    return documented / "index"


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("\n".join(QUESTIONS) + "\n")
    return path


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_search_prints_passages_and_json(index):
    plain = telerag("search", index, "median of numbers", "-k", 2)
    assert plain.exit_code == 0, plain.stderr
    assert plain.stdout.startswith("median of numbers\n   1. ")
    found = telerag(
        "search", index, "--queries", "-", "--json", "-k", 3, stdin='first question\n{"id": "j", "query": "second"}\n'
    )
    answers = lines_of(found.stdout)
    assert [(answer["id"], len(answer["passages"])) for answer in answers] == [("1", 3), ("j", 3)]
    scores = [hit["score"] for hit in answers[0]["passages"]]
    assert scores == sorted(scores, reverse=True)
    assert {"rank", "id", "score", "text", "metadata"} <= set(answers[0]["passages"][0])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--nprobe", "25", "q"], 2, "nprobe is 25 and the index has 24 lists"),
        (["-k", "100000", "q"], 2, "k is 100,000 and the index has"),
        (["--fast-memory", "4096", "q"], 2, "smaller than the largest list"),
        (["--fast-memory", "lots", "q"], 2, "'lots' is not a size"),
        (["--fast-memory", "900TiB", "q"], 0, None),
        (["--tier", "simulated", "--gpu-memory", "4095", "q"], 2, "Give --gpu-memory at least"),
        (
            ["--tier", "simulated", "--fast-memory", "1MB", "q"],
            2,
            "--fast-memory cannot be combined with --tier simulated",
        ),
        (
            ["--tier", "host", "--gpu-memory", "1MB", "q"],
            2,
            "--gpu-memory cannot be combined with the host tier (as asked)",
        ),
        (
            ["--require-pinned", "--device", "cpu", "q"],
            2,
            "--require-pinned cannot be combined with the host tier (--device cpu)",
        ),
        (["--tier", "cuda", "--device", "cpu", "q"], 2, "--device cpu has no GPU for --tier cuda"),
        (["--tier", "cuda", "--device", "cuda:99", "q"], 1, "GPU 99 was asked for, and torch"),
        (["--tier", "cuda", "--device", "gpu", "q"], 2, "--device is 'gpu', which names no GPU"),
        (["--tier", "simulated", "--gpu-memory", "900TiB", "q"], 0, None),
        (["--gpu-memory", "lots", "q"], 2, "'lots' is not a size"),
        (["--rescore", "4", "q"], 2, "keeps no vectors beside its lists"),
        ([], 2, "Give questions as arguments"),
        (["--queries", "missing.txt"], 1, "missing.txt cannot be read"),
        (["--embedder", "/no/such/model", "q"], 1, "/no/such/model does not exist"),
    ],
)
def test_search_refuses_in_one_sentence(index, arguments, code, message):
    result = telerag("search", index, *arguments)
    assert result.exit_code == code, result.stderr
    if message:
        assert message in " ".join(result.stderr.split())
        assert result.stdout == ""
        assert "Traceback" not in result.stderr


def test_answers_are_the_same_on_every_tier_with_and_without_lookahead(index, tmp_path):
    """The cuda tier's own code runs end to end over the simulated GPU: copies, events, scoring, the join's two ends."""
    stdin = "\n".join(QUESTIONS[:2])
    fixed = ("--pipeline", "hyde", "--ordered", "--max-tokens", 16, "--nprobe", 8, "-k", 2)
    answers, lookaheads = [], []
    for tier, mode, memory in (
        ("host", "off", ["--fast-memory", "256KiB"]),
        ("host", "question", ["--fast-memory", "256KiB"]),
        ("host", "refined", ["--fast-memory", "256KiB"]),
        ("simulated", "refined", ["--gpu-memory", "256KiB"]),
        ("simulated", "refined", ["--require-pinned"]),
    ):
        output, trace = tmp_path / f"{len(answers)}.jsonl", tmp_path / "trace.json"
        told = ("--tier", tier, "--lookahead", mode, *memory, "-o", output, "--trace", trace)
        result = telerag("run", index, *fixed, *told, stdin=stdin)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ""
        assert f"Memory ({tier} tier: as asked)" in result.stderr
        lines = lines_of(output.read_text())
        answers.append([(line["id"], line["answer"], line["passages"]) for line in lines])
        lookaheads.append([line["lookahead"] for line in lines])
        assert {"passage_s", "retrieval_s", "answer_s", "llm_s", "total_s"} <= set(lines[0]["timings"])
        lanes = {each["args"]["name"] for each in json.loads(trace.read_text())["traceEvents"] if each["ph"] == "M"}
        assert {"LLM", "embed", "join"} <= lanes
        assert any(lane.startswith("link") for lane in lanes)
    assert all(each == answers[0] for each in answers)
    assert all(each["lists_wanted"] == 8 and not each["lists_failed"] for run in lookaheads for each in run)
    assert [any(each["bytes_moved"] for each in run) for run in lookaheads] == [False, True, True, True, True]
    assert all(each["lists_moved"] for each in lookaheads[3])
    assert any(each["lists_hit"] for each in lookaheads[4])


def test_a_failing_gpu_costs_no_answer_and_is_told(index, monkeypatch):
    """Once the tier is open, every copy and all scoring there fails: each command goes on and says so at its end."""
    broken = threading.Event()
    monkeypatch.setattr(
        "telerag_cli.tiers.cuda.simulated.SimulatedGpu",
        functools.partial(SimulatedGpu, copy_fails=broken.is_set, work_fails=broken.is_set),
    )
    fails = False
    begin = Retriever.__init__

    def opened(retriever, index, coarse, tier, **options):
        begin(retriever, index, coarse, tier, **options)
        tier.in_place.scoring.observe(1 << 40, 1e6)  # so slow that the link gets all that is missing
        if fails:
            broken.set()

    monkeypatch.setattr(Retriever, "__init__", opened)
    told = "times a list could not be brought to fast memory or scored there; that cost time and changed no result."
    tier = ("--tier", "simulated", "-k", 2)
    outputs = {False: [], True: []}
    for fails in outputs:
        broken.clear()
        ran = telerag("run", index, *tier, "--max-tokens", 8, "--nprobe", 8, stdin=QUESTIONS[0])
        broken.clear()
        searched = telerag("search", index, *QUESTIONS, *tier, "--json")
        broken.clear()
        chatted = telerag("chat", index, *tier, "--max-tokens", 8, stdin=QUESTIONS[0])
        for result in (ran, searched, chatted):
            assert result.exit_code == 0, result.stderr
            assert (told in " ".join(result.stderr.split())) == fails, result.stderr
        lines = lines_of(ran.stdout)
        assert all((line["lookahead"]["lists_failed"] > 0) == fails for line in lines)
        kept = [(line["answer"], line["passages"]) for line in lines]
        outputs[fails] = [kept, searched.stdout, chatted.stdout]
    assert outputs[False] == outputs[True]


def test_run_in_a_shell_pipeline(index, questions):
    run = f"{sys.executable} -m telerag_cli run {index} --questions - --max-tokens 8 --pipeline naive -k 1"
    script = f"cat {questions} | {run}"
    head = subprocess.run(["bash", "-o", "pipefail", "-c", f"{script} | head -1"], capture_output=True, text=True)
    assert head.returncode == 0, head.stderr
    assert "Traceback" not in head.stderr
    assert "Broken pipe" not in head.stderr
    assert json.loads(head.stdout)["question"] in QUESTIONS
    asked = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{script} 2>/dev/null | jq -c .answer"], capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    assert len(asked.stdout.splitlines()) == len(QUESTIONS)


def test_bad_lines_are_answered_with_an_error_and_the_rest_go_on(index):
    stdin = 'good?\n{"id": "b", "question": \n' + json.dumps({"id": "long", "question": "why " * 5000}) + "\n"
    result = telerag("run", index, "--max-tokens", 4, "--pipeline", "naive", "--ordered", stdin=stdin)
    lines = lines_of(result.stdout)
    assert result.exit_code == 3
    assert "answer" in lines[0]
    assert "<stdin>:2 is not JSON" in lines[1]["error"]["message"]
    assert "The question takes" in lines[2]["error"]["message"]


def test_resume_answers_only_what_is_missing(index, questions, tmp_path):
    output = tmp_path / "out.jsonl"
    options = ("run", index, "-q", questions, "-o", output, "--max-tokens", 4, "--pipeline", "naive", "-k", 1)
    assert telerag(*options).exit_code == 0
    whole = output.read_bytes()
    refused = telerag(*options)
    assert refused.exit_code == 1
    assert "already holds" in refused.stderr
    first = whole.split(b"\n")[0] + b"\n"
    output.write_bytes(first + whole.split(b"\n")[1][:40])
    resumed = telerag(*options, "--resume")
    assert resumed.exit_code == 0
    assert "1 skipped" in " ".join(resumed.stderr.split())
    assert output.read_bytes().startswith(first)
    # Two that end at about the same time may do so in either order.
    assert {line["id"]: line["answer"] for line in lines_of(output.read_text())} == {
        line["id"]: line["answer"] for line in lines_of(whole.decode())
    }


def test_batch_lines_are_answered_in_kind(index):
    line = {
        "custom_id": "r-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "x", "messages": [{"role": "user", "content": "What is a list?"}]},
    }
    result = telerag("run", index, "--max-tokens", 4, stdin=json.dumps(line) + "\n")
    (reply,) = lines_of(result.stdout)
    assert reply["custom_id"] == "r-1"
    assert reply["response"]["status_code"] == 200
    assert reply["response"]["body"]["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "/no/such.gguf"], 1, "/no/such.gguf cannot be read"),
        (["--model", __file__], 1, "is not a GGUF model"),
        (["--model", "a.gguf", "--hf-repo", "b/c"], 2, "name two models"),
        (["-o", "/no/such/folder/out.jsonl"], 1, "/no/such/folder/out.jsonl does not exist"),
        (["--trace", "/no/such/folder/t.json"], 1, "The trace cannot be written"),
        (["--n-gpu-layers", "5"], 1, "5 layers were to go to a GPU"),
        (["--pipeline", "naiv"], 2, "naiv"),
    ],
)
def test_run_refuses_in_one_sentence(index, arguments, code, message):
    result = telerag("run", index, *arguments, stdin="q\n")
    assert result.exit_code == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_no_questions_is_an_error(index):
    result = telerag("run", index, stdin="\n\n")
    assert result.exit_code == 1
    assert "<stdin> holds no question" in " ".join(result.stderr.split())


def test_an_interrupt_ends_with_130_and_keeps_what_is_written(index, tmp_path):
    output = tmp_path / "out.jsonl"
    many = tmp_path / "many.txt"
    many.write_text("What is a list?\n" * 200)
    with subprocess.Popen(
        command("run", index, "-q", many, "-o", output, "--max-tokens", 8, "-k", 1), stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 90
        while not (output.exists() and output.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert len(lines_of(output.read_text())) >= 2


def test_a_file_system_without_direct_reads_is_said(index):
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.fail("this machine has no tmpfs at /dev/shm to test on")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        copy = Path(folder) / "index"
        shutil.copytree(index, copy)
        result = telerag("search", copy, "median", "--json")
        assert result.exit_code == 0, result.stderr
        here = telerag("search", index, "median", "--json")
        assert result.stdout == here.stdout
        # Kernels from 6.x on may offer O_DIRECT on tmpfs; then there is nothing to say.
        direct = reads_directly(copy / "lists.bin")
        assert ("without O_DIRECT" in " ".join(result.stderr.split())) == (not direct)


def test_answers_are_the_same_one_at_a_time_and_together_and_when_replayed(index, questions, tmp_path):
    """In the order of the questions, with what was recorded given back in the model's own time."""
    record = tmp_path / "record.jsonl"
    options = "--max-tokens 12 -k 1 --ordered --pipeline iterative --rounds 2"
    common = ("run", index, "-q", questions, *options.split())
    alone = telerag(*common, "--concurrency", 1, "--record", record)
    together = telerag(*common, "--concurrency", 3, "--ctx-size", 2048)
    replayed = telerag(*common, "--concurrency", 2, "--replay", record)
    for result in (alone, together, replayed):
        assert result.exit_code == 0, result.stderr
    answers = [
        [(line["id"], line["answer"], line["queries"]) for line in lines_of(result.stdout)]
        for result in (alone, together, replayed)
    ]
    assert answers[0] == answers[1] == answers[2]
    assert "3 x 2,048 tokens" in together.stderr or "4 x 2,048 tokens" in together.stderr
    recorded = lines_of(record.read_text())
    assert {line["id"] for line in recorded} == {"1", "2", "3"}
    assert all(call["messages"] and call["completion_tokens"] for line in recorded for call in line["generations"])
    other = telerag("run", index, "-q", questions, "--pipeline", "hyde", "--replay", record)
    assert other.exit_code == 3
    assert "has no answer" in lines_of(other.stdout)[0]["error"]["message"]


def test_options_that_do_not_fit_together_are_refused_before_anything_is_loaded(index):
    for options, told in (
        (("--pipeline", "hyde", "--rounds", 2), "--rounds"),
        (("--generator", "openai"), "--generator openai needs the server's address"),
        (("--base-url", "http://127.0.0.1:1/v1"), "cannot be combined with --generator llama.cpp"),
        (
            ("--generator", "openai", "--base-url", "http://127.0.0.1:1/v1", "--n-gpu-layers", 1),
            "--n-gpu-layers 1 cannot be combined",
        ),
        (("--concurrency", 200, "--ctx-size", 8192), "of memory are free"),
    ):
        result = telerag("run", index, *options, stdin="why?\n")
        assert result.exit_code in (1, 2), result.stderr
        assert told in " ".join(result.stderr.split()), result.stderr
