"""``telerag bench`` as its users run it, over a real index with the real models."""

import json

import pytest
from typer.testing import CliRunner

from telerag_cli.bench.results import SuiteResult
from telerag_cli.cli.app import app
from telerag_cli.corpus.pydocs import python_documentation
from telerag_cli.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE

pytestmark = pytest.mark.model


def telerag(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A corpus, its embeddings, an index, and questions."""
    root = tmp_path_factory.mktemp("bench")
    with (root / "corpus.jsonl").open("w") as lines:
        for number, passage in enumerate(python_documentation()):
            if number % 90 == 0:
                lines.write(json.dumps({"id": passage.id, "text": passage.text}) + "\n")
    assert telerag("embed", root / "corpus.jsonl", "-o", root / "embeddings").exit_code == EXIT_OK
    assert telerag("build-index", root / "embeddings", "-o", root / "index", "--nlist", 4).exit_code == EXIT_OK
    (root / "questions.txt").write_text("What is a list?\nHow do I open a file?\nWhat does lambda do?\n")
    return root


def bench(root, suite, *arguments):
    return telerag(
        "bench",
        suite,
        root / "index",
        "--dataset",
        root / "questions.txt",
        "--max-tokens",
        4,
        "--nprobe",
        2,
        "-k",
        2,
        *arguments,
    )


def test_latency_leaves_a_result_and_a_report(root, tmp_path):
    done = bench(
        root,
        "latency",
        "--pipeline",
        "naive",
        "--num-prompts",
        2,
        "--system",
        "faiss-memory",
        "--system",
        "refined",
        "--result-dir",
        tmp_path,
        "--metadata",
        "disk=fast",
        "--save-detailed",
        "--json",
    )
    assert done.exit_code == EXIT_OK, done.stderr
    printed = json.loads(done.stdout)
    kept = SuiteResult.load(tmp_path / "latency.json")
    assert (
        [cell["system"] for cell in printed["cells"]]
        == ["faiss-memory", "refined"]
        == [cell.system for cell in kept.cells]
    )
    assert kept.metadata == {"disk": "fast"}
    assert kept.settings["num_prompts"] == 2
    assert all(len(cell.detailed) == 2 for cell in kept.cells)
    assert all(check.held for check in kept.checks), kept.checks
    assert kept.hardware["cores"] > 0
    made = telerag("bench", "report", tmp_path, "-o", tmp_path / "page")
    assert made.exit_code == EXIT_OK, made.stderr
    assert "<svg" in (tmp_path / "page" / "report.html").read_text()


def test_tables_are_the_answer_on_stdout(root):
    done = bench(
        root,
        "breakdown",
        "--pipeline",
        "naive",
        "--num-prompts",
        1,
        "--num-warmups",
        0,
        "--system",
        "fetch",
        "--system",
        "llm-only",
    )
    assert done.exit_code == EXIT_OK, done.stderr
    assert "llm-only" in done.stdout
    assert "Memory (host tier" in done.stderr
    assert "Memory (host tier" not in done.stdout


@pytest.mark.parametrize(
    ("suite", "arguments", "code", "message"),
    [
        ("latency", ["--metadata", "nothing"], EXIT_USAGE, "--metadata is 'nothing', which has no KEY=VALUE"),
        ("latency", ["--dataset", "/nowhere.txt"], EXIT_FAILED, "/nowhere.txt is neither a file nor a dataset"),
        ("latency", ["--system", "llm-only"], EXIT_USAGE, "llm-only gives the LLM passages that other systems found"),
        ("nprobe", ["--values", "2", "--values", "99"], EXIT_USAGE, "nprobe is 99 and the index has 4 lists"),
        ("cache", ["--system", "fetch"], EXIT_USAGE, "--system has no part in bench cache"),
        ("latency", ["--system", "faster"], EXIT_USAGE, "faster"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(root, suite, arguments, code, message):
    done = bench(root, suite, *arguments)
    assert done.exit_code == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not done.stdout


def test_questions_must_be_named(root):
    done = telerag("bench", "latency", root / "index")
    assert done.exit_code == EXIT_USAGE
    assert "bench latency needs questions and none are named" in done.stderr


def test_embedding_and_building_are_measured_beside_the_usual_way(root, tmp_path):
    done = telerag(
        "bench", "embed", root / "corpus.jsonl", "--num-prompts", 12, "--shortest", 0, "--repeats", 1, "--json"
    )
    assert done.exit_code == EXIT_OK, done.stderr
    result = json.loads(done.stdout)
    assert {cell["system"] for cell in result["cells"]} == {"telerag", "sentence-transformers"}
    assert all(cell["values"]["request_throughput"] > 0 for cell in result["cells"])
    assert result["checks"][0]["held"]
    done = telerag("bench", "build", root / "embeddings", "-o", tmp_path / "built", "--nlist", 4, "--json")
    assert done.exit_code == EXIT_OK, done.stderr
    ours, theirs = json.loads(done.stdout)["cells"]
    assert (
        ours["values"]["completed"]
        == theirs["values"]["completed"]
        == len((root / "corpus.jsonl").read_text().splitlines())
    )
    assert ours["values"]["peak_rss_bytes"] > 0
    assert (tmp_path / "built" / "manifest.json").exists()
