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


def words(*options):
    """Arguments from words and ``name=value`` pairs."""
    return [part for option in options for part in (f"--{option}".split("=", 1) if "=" in option else [f"--{option}"])]


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


def bench(root, suite, *options):
    common = words(f"dataset={root / 'questions.txt'}", "max-tokens=4", "nprobe=2")
    return telerag("bench", suite, root / "index", "-k", 2, *common, *words(*options))


def test_latency_leaves_a_result_and_a_report(root, tmp_path):
    done = bench(
        root,
        "latency",
        *("pipeline=naive", "num-prompts=2", "system=faiss-memory", "system=refined"),
        *(f"result-dir={tmp_path}", "metadata=disk=fast", "save-detailed", "json"),
    )
    assert done.exit_code == EXIT_OK, done.stderr
    systems = [cell["system"] for cell in json.loads(done.stdout)["cells"]]
    kept = SuiteResult.load(tmp_path / "latency.json")
    assert systems == ["faiss-memory", "refined"] == [cell.system for cell in kept.cells]
    assert kept.metadata == {"disk": "fast"}
    assert kept.settings["num_prompts"] == 2
    assert all(len(cell.detailed) == 2 for cell in kept.cells)
    assert all(check.held for check in kept.checks), kept.checks
    assert kept.hardware["cores"] > 0
    made = telerag("bench", "report", tmp_path, "-o", tmp_path / "report")
    assert made.exit_code == EXIT_OK, made.stderr
    assert "latency-median.png" in (tmp_path / "report" / "report.md").read_text()


def test_tables_are_the_answer_on_stdout(root):
    done = bench(
        root, "breakdown", "pipeline=naive", "num-prompts=1", "num-warmups=0", "system=fetch", "system=llm-only"
    )
    assert done.exit_code == EXIT_OK, done.stderr
    assert "llm-only" in done.stdout
    assert "Memory (host tier" in done.stderr
    assert "Memory (host tier" not in done.stdout


def test_replicas_are_measured_side_by_side(root):
    pytest.importorskip("ray")
    done = bench(root, "scaling", "replicas=1", "replicas=2", "num-prompts=2", "concurrency=2", "json")
    assert done.exit_code == EXIT_OK, done.stderr
    result = json.loads(done.stdout)
    assert [(cell["key"]["replicas"], cell["values"]["completed"]) for cell in result["cells"]] == [(1, 2), (2, 2)]
    assert {check["name"]: check["held"] for check in result["checks"]}["same answers"]
    two = result["cells"][1]["values"]
    assert two["efficiency_share"] == pytest.approx(two["speedup"] / 2, rel=1e-3)
    assert result["settings"]["nprobe"] == 2


@pytest.mark.parametrize(
    ("suite", "options", "code", "value"),
    [
        ("latency", ["metadata=nothing"], EXIT_USAGE, "'nothing'"),
        ("latency", ["dataset=/nowhere.txt"], EXIT_FAILED, "/nowhere.txt"),
        ("latency", ["system=llm-only"], EXIT_USAGE, "llm-only"),
        ("latency", ["system=faster"], EXIT_USAGE, "faster"),
        ("nprobe", ["values=2", "values=99"], EXIT_USAGE, "99"),
        ("cache", ["system=fetch"], EXIT_USAGE, "--policy"),
        ("scaling", ["system=fetch"], EXIT_USAGE, "--system"),
        ("scaling", ["pipeline=hyde", "pipeline=naive"], EXIT_USAGE, "--pipeline"),
    ],
)
def test_what_cannot_be_measured_is_refused(root, suite, options, code, value):
    done = bench(root, suite, *options)
    assert (done.exit_code, done.stdout) == (code, "")
    assert value in " ".join(done.stderr.replace("│", " ").split())


def test_questions_must_be_named(root):
    done = telerag("bench", "latency", root / "index")
    assert done.exit_code == EXIT_USAGE
    assert "--dataset" in done.stderr


def test_embedding_and_building_are_measured_beside_the_usual_way(root, tmp_path):
    options = words("num-prompts=12", "shortest=0", "repeats=1", "json")
    done = telerag("bench", "embed", root / "corpus.jsonl", *options)
    assert done.exit_code == EXIT_OK, done.stderr
    result = json.loads(done.stdout)
    assert {cell["system"] for cell in result["cells"]} == {"telerag", "sentence-transformers"}
    assert all(cell["values"]["request_throughput"] > 0 for cell in result["cells"])
    assert result["checks"][0]["held"]
    done = telerag("bench", "build", root / "embeddings", "-o", tmp_path / "built", "--nlist", 4, "--json")
    assert done.exit_code == EXIT_OK, done.stderr
    ours, theirs = (cell["values"] for cell in json.loads(done.stdout)["cells"])
    assert ours["completed"] == theirs["completed"] == len((root / "corpus.jsonl").read_text().splitlines())
    assert ours["peak_rss_bytes"] > 0
    assert (tmp_path / "built" / "manifest.json").exists()
