"""The house: which part may import which, how large files and signatures get, and what `--help` may load."""

import ast
import functools
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import telerag_cli

PACKAGE = Path(telerag_cli.__file__).parent
ROOT = Path(__file__).parents[2]
BASE = {"arrays", "build_config", "config", "errors", "files", "tracing", "system", "progress", "setting"}
BASE |= {"text", "units"}
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench", "server"},
    {"distributed", "datasets", "evaluation"},
    {"engine"},
    {"planning"},
    {"pipelines"},
    {"retrieval"},
    {"prefetch"},
    {"llm", "embedding"},
    {"tiers"},
    {"index"},
    {"corpus"},
    BASE,
]
"""From top to bottom. A module imports its own part and lower ones; siblings keep apart, except in the base."""

LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
HEAVY = [
    "torch",
    "faiss",
    "llama_cpp",
    "pyarrow",
    "sentence_transformers",
    "transformers",
    "huggingface_hub",
    "numpy",
    "openai",
    "prompt_toolkit",
    "matplotlib",
    "lancedb",
    "lance",
    "ir_measures",
    "pytrec_eval",
    "ray",
    "scipy",
    "pandas",
    "fastapi",
    "uvicorn",
    "prometheus_client",
]


MAX_LINES = 450
MAX_PARAMETERS = 10


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def part_of(path: Path) -> str:
    """``index`` for ``index/build.py``, ``config`` for ``config.py``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a module: late and type-checking imports count too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write it in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or imported == "__init__":
        return True
    if importer in BASE:
        return imported in BASE
    if importer == "embedding" and imported == "index":
        return False  # embeddings are an artifact of their own; the index reads them, not the other way round
    return LEVEL[importer] < LEVEL[imported]


def violations(path: Path, module: ast.Module) -> list[str]:
    importer = part_of(path)
    found = []
    for line, name in imports(module):
        root, _, rest = name.partition(".")
        if root != "telerag_cli" or not rest:
            continue
        imported = rest.split(".")[0]
        if imported.startswith("__"):  # __version__ lives in the package itself
            continue
        if not allowed(importer, imported):
            found.append(f"{name_of(path)}:{line}: {importer} imports {imported}")
    return found


def test_every_part_has_a_layer():
    assert {part_of(path) for path in sources()} - set(LEVEL) == set()


def test_imports_point_downward():
    assert [each for path in sources() for each in violations(path, tree(path))] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("index/a.py", "from telerag_cli.tiers.arena import Arena"),
        ("index/a.py", "def late():\n    import telerag_cli.engine.engine"),
        ("corpus/a.py", "if TYPE_CHECKING:\n    from telerag_cli.index import build"),
        ("embedding/a.py", "from telerag_cli.llm.models import resolve_model"),
        ("embedding/a.py", "from telerag_cli.index.artifact import EmbedderInfo"),
        ("engine/a.py", "from telerag_cli.cli import console"),
        ("files.py", "from telerag_cli.corpus.passages import Passage"),
    ],
)
def test_the_check_itself_finds_what_is_wrong(path, source):
    assert len(violations(PACKAGE / path, ast.parse(source))) == 1


def test_only_the_transport_reads_with_descriptors():
    """Policy and accounting are pure; only the transport knows of files and streams."""
    direct = {"preadv", "pread", "O_DIRECT"}
    users = {
        name_of(path)
        for path in sources()
        if part_of(path) in ("tiers", "prefetch", "retrieval", "engine", "pipelines")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in direct
    }
    assert users <= {"tiers/transport.py"}


def test_policy_and_accounting_name_no_library_that_touches_a_device():
    """They can be tested anywhere, because they are integers; what is on a device is in a folder of its own."""
    device = {"torch", "llama_cpp", "pyarrow", "sentence_transformers"}
    found = [
        f"{name_of(path)}:{line}: {name}"
        for path in sources()
        if part_of(path) in ("prefetch", "retrieval", "tiers") and "cuda" not in path.parts
        for line, name in imports(tree(path))
        if name.split(".")[0] in device
    ]
    assert found == []


def test_only_what_opens_a_tier_knows_of_devices():
    """Torch costs seconds, so a host tier must not load it, and no policy may depend on it."""
    users = {
        name_of(path)
        for path in sources()
        if "cuda" not in path.parts
        for _line, name in imports(tree(path))
        if name.startswith("telerag_cli.tiers.cuda")
    }
    measuring = {f"planning/{name}.py" for name in ("links", "lists", "measure")}
    assert users == {"engine/memory_plan.py", "engine/opening.py"} | measuring


def test_click_is_never_imported():
    """Typer carries its own."""
    roots = {name.split(".")[0] for path in sources() for _line, name in imports(tree(path))}
    assert "typer" in roots
    assert "click" not in roots


def python_files() -> list[Path]:
    """All Python of the project, apart from what is not written by hand."""
    return [path for folder in ("src", "tests", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_too_long_to_read():
    counts = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in python_files()}
    assert {name: lines for name, lines in counts.items() if lines > MAX_LINES} == {}


def test_no_formatter_is_switched_off():
    off = ["# fmt" + ": skip", "# fmt" + ": off"]
    assert [str(path) for path in python_files() if any(mark in path.read_text() for mark in off)] == []


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return len([each for each in named if each.arg not in ("self", "cls")])


def test_no_signature_is_too_wide():
    """Except commands, whose parameters are options, and Triton's kernel, which takes pointers and strides."""
    wide = [
        f"{name_of(path)}: {node.name} has {parameters(node)}"
        for path in sources()
        if part_of(path) != "cli" and name_of(path) != "tiers/cuda/kernel.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and parameters(node) > MAX_PARAMETERS
    ]
    assert wide == []


def test_no_two_classes_have_one_name():
    where = defaultdict(list)
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(name_of(path))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


HELP = """
from telerag_cli.cli.app import app
try: app(sys.argv[1:])
except SystemExit as exit: assert not exit.code, exit.code
"""


def loaded_by(code: str, *arguments: str) -> set[str]:
    """What a new process has imported when it has run this."""
    listing = "print(*(name for name in sys.modules if '.' not in name), file=sys.stderr)"
    command = [sys.executable, "-c", f"import os, sys\n{code}\n{listing}", *arguments]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    return set(subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stderr.split())


@pytest.mark.parametrize(
    "arguments",
    ["", "run", "embed", "chat", "serve-local", "eval", "bench latency"],
    ids=lambda words: words or "telerag",
)
def test_help_loads_nothing_heavy(arguments):
    loaded = loaded_by(HELP, *arguments.split(), "--help")
    assert "typer" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_importing_the_library_loads_nothing_heavy_and_sets_no_variable():
    code = "before = dict(os.environ)\nimport telerag_cli\nassert dict(os.environ) == before"
    assert loaded_by(code).isdisjoint({*HEAVY, "typer"})
