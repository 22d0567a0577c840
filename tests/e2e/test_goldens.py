"""What must not change, whatever happens inside: commands, output lines, files, HTTP. All against golden files.

Only public surfaces are used. ``TELERAG_UPDATE_GOLDENS=1`` writes the golden files anew; read the difference before you
commit it. The LLM is a server that answers by rule. Embeddings and k-means differ in their last bits from processor to
processor: bytes are compared where the fingerprint is that of the golden files, and everything else everywhere.
"""

import enum
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import typing
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from golden_world import QUESTIONS, documents, fingerprint, language_model, long_text

pytestmark = pytest.mark.model

# All that these tests know of the program's inside.
PROGRAM = [sys.executable, "-m", "telerag_cli"]
APP = ("telerag_cli.cli.app", "app")

GOLDENS = Path(__file__).parent / "goldens"
UPDATE = os.environ.get("TELERAG_UPDATE_GOLDENS") == "1"
PIPELINES = ("naive", "hyde", "subquestion", "iterative", "iter_retgen", "flare", "self_rag")
AT_ONCE = {"flare", "self_rag"}
"""Pipelines that ask the LLM several things at once, which end in any order."""
INDEXES = {
    "float32": [],
    "float16": ["--storage", "float16"],
    "int8": ["--storage", "int8"],
    "int8-kept": ["--storage", "int8", "--keep-vectors", "float16"],
}
SEARCHING = ["--tier", "host", "--device", "cpu", "--nprobe", 4, "-k", 3]
TIMELY = {"created", "bytes_moved", "bytes_missed", "orders"}
TIMELY |= {f"lists_{end}" for end in ("hit", "coming", "missed", "moved", "wasted", "in_place")}
"""Fields that depend on how fast things were, beside those that end in ``_s``."""
CLOSE = 1e-4
"""Of scores, where the processor has a say."""
EMBEDDING_CLOSE = 1e-3
FIRST_VECTORS = 4


def application():
    return getattr(importlib.import_module(APP[0]), APP[1])


def telerag(*arguments, stdin=None, code=0):
    result = CliRunner().invoke(application(), [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.stderr
    return result.stdout


def lasting(value):
    """What differs from run to run is there and nothing more; numbers are rounded."""
    if isinstance(value, dict):
        return {name: "#" if name.endswith("_s") or name in TIMELY else lasting(item) for name, item in value.items()}
    if isinstance(value, list):
        return [lasting(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def differences(found, wanted, close=CLOSE, where="$"):
    """Where two JSON values differ, in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        if list(found) != list(wanted):
            yield f"{where}: keys {list(found)}, not {list(wanted)}"
        for name in found.keys() & wanted.keys():
            yield from differences(found[name], wanted[name], close, f"{where}.{name}")
    elif isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            yield f"{where}: {len(found)} items, not {len(wanted)}"
        for place, pair in enumerate(zip(found, wanted, strict=False)):
            yield from differences(*pair, close, f"{where}[{place}]")
    elif isinstance(found, float) and isinstance(wanted, float):
        if not abs(found - wanted) <= close:
            yield f"{where}: {found}, not {wanted}"
    elif found != wanted or type(found) is not type(wanted):
        yield f"{where}: {found!r}, not {wanted!r}"


def check(name, found, close=CLOSE):
    """Compare with a golden file, or write it."""
    path = GOLDENS / name
    if UPDATE:
        GOLDENS.mkdir(exist_ok=True)
        path.write_text(found if isinstance(found, str) else json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    wanted = path.read_text()
    if isinstance(found, str):
        assert found == wanted
    else:
        assert list(differences(json.loads(json.dumps(found)), json.loads(wanted), close)) == []


@pytest.fixture(scope="module", autouse=True)
def clean(tmp_path_factory):
    """No settings of the user, and a working folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("TELERAG_", "OPENAI_"))]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(home))
        patch.setenv("COLUMNS", "100")
        patch.chdir(home)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with embeddings and indexes."""
    root = tmp_path_factory.mktemp("goldens")
    corpus = Path("corpus")  # passages are named after the path, so it must not be that of a temporary folder
    corpus.mkdir()
    (corpus / "facts.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents()))
    (corpus / "harbour.md").write_text(long_text())
    for dtype in ("float32", "float16"):
        options = ["--dtype", dtype, "--precision", "float32", "--device", "cpu", "--shard-rows", 100]
        telerag("embed", corpus, "-o", root / f"embeddings-{dtype}", *options)
    for name, options in INDEXES.items():
        source, index = root / "embeddings-float32", root / f"index-{name}"
        told = telerag("build-index", source, "-o", index, "--nlist", 8, "--device", "cpu", *options)
        assert told == f"{index}\n"
    return root


@pytest.fixture(scope="module")
def asking():
    """Options with which questions are answered by the LLM."""
    with language_model() as url:
        llm = ["--generator", "openai", "--base-url", url, "--max-tokens", 40]
        yield [*llm, "--profile", "none", *SEARCHING]


# Files.


def files_of(root):
    """The files of all folders, by their path."""
    return {str(path.relative_to(root)): path for path in sorted(root.glob("*/**/*")) if path.is_file()}


def digest(path):
    """Of a file's bytes; the version of the program in it does not count."""
    return hashlib.sha256(re.sub(rb'"telerag \d[^"]*"', b'"telerag"', path.read_bytes())).hexdigest()


def described(path):
    """A JSON file without checksums, which depend on the last bits, and without the program's version."""

    def bare(value):
        if isinstance(value, dict):
            dropped = ("checksum", "source", "created_by")
            return {name: bare(item) for name, item in value.items() if name not in dropped}
        return [bare(item) for item in value] if isinstance(value, list) else value

    return bare(json.loads(path.read_text()))


def test_files_have_the_same_names_sizes_and_descriptions_everywhere(made):
    files = files_of(made)
    check("sizes.json", {name: path.stat().st_size for name, path in files.items() if path.suffix != ".json"})
    found = {name: described(path) for name, path in files.items() if path.suffix == ".json"}
    check("descriptions.json", found, close=0.05)


def test_bytes_are_the_same_where_the_arithmetic_is(made):
    """Passages, and where lists lie, are the same on any machine; all else where the fingerprint is."""
    sums = {name: digest(path) for name, path in files_of(made).items()}
    everywhere = {name: sums[name] for name in sums if name.endswith(("passages.arrow", "offsets.npy"))}
    assert len(everywhere) == 2 * len(INDEXES)
    check("bytes-everywhere.json", everywhere)
    path = GOLDENS / "bytes.json"
    if UPDATE or json.loads(path.read_text())["fingerprint"] == fingerprint():
        check(path.name, {"fingerprint": fingerprint(), "sha256": sums})


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "float"), ("float16", "halffloat")])
def test_embeddings_hold_the_corpus_and_vectors_close_to_the_golden_ones(made, dtype, stored):
    tables = [pq.read_table(path) for path in sorted((made / f"embeddings-{dtype}").glob("*.parquet"))]
    rows = [row for table in tables for row in table.drop_columns("embedding").to_pylist()]
    check("passages.json", [list(row.values()) for row in rows])
    first = np.array(tables[0]["embedding"].to_pylist()[:FIRST_VECTORS])
    kind = tables[0].schema.field("embedding").type
    assert (str(kind.value_type), kind.list_size) == (stored, first.shape[1])
    path = GOLDENS / "vectors.npy"
    if UPDATE and dtype == "float32":
        np.save(path, first.astype(np.float32))
    np.testing.assert_allclose(first, np.load(path), atol=EMBEDDING_CLOSE)


# Commands.


@pytest.mark.parametrize("name", INDEXES)
def test_search(made, name):
    lines = telerag("search", made / f"index-{name}", "--json", *SEARCHING, *QUESTIONS)
    check(f"search-{name}.json", [lasting(json.loads(line)) for line in lines.splitlines()])


@pytest.mark.parametrize("lookahead", ["off", "refined"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_run(made, asking, pipeline, lookahead):
    """With lookahead and without, the answers are the same."""
    options = ["--pipeline", pipeline, "--lookahead", lookahead, "--ordered", "--concurrency", 1, *asking]
    output = telerag("run", made / "index-float32", *options, stdin="\n".join(QUESTIONS))
    lines = [lasting(json.loads(line)) for line in output.splitlines()]
    for line in lines:
        line["timings"] = dict(sorted(line["timings"].items()))
        if pipeline in AT_ONCE:
            line["stages"].sort(key=lambda stage: (stage["name"], stage["text"], stage["prompt_tokens"]))
    assert [line["lookahead"].pop("mode") for line in lines] == [lookahead] * len(QUESTIONS)
    check(f"run-{pipeline}.json", lines)


CHAT = (
    QUESTIONS[0],
    "And with what?",
    "/sources 2",
    "/pipeline naive",
    "/lookahead off",
    QUESTIONS[2],
    "/sources",
    "/save talk.md",
    "/save talk.jsonl",
    "/nonsense",
    "/clear",
    "/help",
    "/quit",
)


def test_chat(made, asking):
    """From a pipe; the unknown command makes the exit code that of a part that failed."""
    said = telerag("chat", made / "index-float32", *asking, stdin="\n".join(CHAT), code=3)
    check("chat.txt", re.sub(r"\b\d\.\d{4}\b", "#", said))  # scores; chat-saved.json has them
    check("chat-saved.md", Path("talk.md").read_text())
    saved = Path("talk.jsonl").read_text().splitlines()
    check("chat-saved.json", [lasting(json.loads(line)) for line in saved])


# The server.


@pytest.fixture(scope="module")
def server(made, asking):
    """The address of a server that is ready."""
    command = [*PROGRAM, "serve-local", made / "index-float32", "--port", 0, "--concurrency", 1, *asking]
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            for line in process.stderr:
                said += line
                if ready := re.search(r"Ready at (http\S+)", line):
                    break
            else:
                pytest.fail(said)
            yield ready[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            process.wait(20)


def fetched(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as response:
        return json.load(response)


def test_the_server_describes_itself(server):
    found = fetched(f"{server}/openapi.json")
    assert found["info"].pop("version")
    check("openapi.json", found)


def test_the_server_answers(server):
    models = fetched(f"{server}/v1/models")
    body = {"model": "telerag-hyde", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
    answer = fetched(f"{server}/v1/chat/completions", body)
    assert answer.pop("id")
    check("http.json", lasting({"models": models, "completion": answer}))


# The command line.


def plain(value):
    """A default or a choice as JSON."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if callable(value):
        return "<made when needed>"
    return value if value is None or isinstance(value, str | int | float) else str(value)


def kind(of):
    """What a parameter takes. Enumerations and literals are their words: their names are not public."""
    annotation = of.type_descriptor.annotation
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return plain(list(annotation))
    return plain(typing.get_args(annotation)) or getattr(annotation, "__name__", str(annotation))


def parameter(of):
    names = [*of.opts, *of.secondary_opts] if of.param_type_name == "option" else of.name
    given = ("default", "required", "multiple", "is_flag", "hidden", "min", "max", "envvar")
    told = {name: plain(getattr(of, name, None)) for name in given}
    more = {name: value for name, value in told.items() if value is not None and value is not False}
    return {of.param_type_name: names, "takes": kind(of), "nargs": of.nargs, **more}


def tree(command):
    # Arguments come in their order, and options in any.
    params = sorted(command.params, key=lambda of: of.opts[0] if of.param_type_name == "option" else "")
    found = {"parameters": [parameter(of) for of in params]}
    if commands := getattr(command, "commands", None):
        found["commands"] = {name: tree(each) for name, each in commands.items()}
    return found


def test_every_option_of_every_command():
    found = tree(typer.main.get_command(application()))
    assert {"run", "search", "serve-local"} <= set(found["commands"])
    check("commands.json", found)


def test_the_program_runs_as_a_module():
    done = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"telerag \d+\.\d+\S*\n", done.stdout)


def test_there_is_no_golden_file_that_nothing_checks():
    known = {"bytes.json", "bytes-everywhere.json", "chat.txt", "chat-saved.json", "chat-saved.md", "commands.json"}
    known |= {"descriptions.json", "http.json", "openapi.json", "passages.json", "sizes.json", "vectors.npy"}
    known |= {f"search-{name}.json" for name in INDEXES} | {f"run-{name}.json" for name in PIPELINES}
    assert {path.name for path in GOLDENS.iterdir()} == known
    assert sum(path.stat().st_size for path in GOLDENS.iterdir()) < 400_000
