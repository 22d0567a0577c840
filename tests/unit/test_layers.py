"""The direction of imports, read from the sources: late and type-checking imports count too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import telerag_cli

PACKAGE = Path(telerag_cli.__file__).parent
BASE = {"arrays", "config", "errors", "files", "tracing", "system", "progress"}
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
"""From top to bottom. A module imports its own part and lower ones; siblings keep apart, save in the base."""

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


def part_of(path: Path) -> str:
    """``index`` for ``index/build.py``, ``config`` for ``config.py``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a module."""
    for node in ast.walk(tree):
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


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def violations(path: Path, tree: ast.Module) -> list[str]:
    importer = part_of(path)
    found = []
    for line, name in imports(tree):
        root, _, rest = name.partition(".")
        if root != "telerag_cli" or not rest:
            continue
        imported = rest.split(".")[0]
        if imported.startswith("__"):  # __version__ lives in the package itself
            continue
        if not allowed(importer, imported):
            found.append(f"{path.relative_to(PACKAGE)}:{line}: {importer} imports {imported}")
    return found


def test_every_part_has_a_layer():
    parts = {part_of(path) for path in sources()}
    assert parts - set(LEVEL) == set()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    assert violations(path, ast.parse(path.read_text())) == []


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
        str(path.relative_to(PACKAGE))
        for path in sources()
        if part_of(path) in ("tiers", "lookahead", "engine", "pipelines")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in direct
    }
    assert users <= {"tiers/transport.py"}


def test_planning_and_accounting_name_no_library_that_touches_a_device():
    """They can be tested anywhere, because they are integers; what is on a device is in a folder of its own."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sources()
        if part_of(path) in ("lookahead", "tiers") and "cuda" not in path.parts
        for line, name in imports(ast.parse(path.read_text()))
        if name.split(".")[0] in ("torch", "llama_cpp", "pyarrow", "sentence_transformers")
    ]
    assert found == []


def test_only_what_opens_a_tier_knows_of_devices():
    """Torch costs seconds, so a host tier must not load it, and no policy may depend on it."""
    users = {
        str(path.relative_to(PACKAGE))
        for path in sources()
        if "cuda" not in path.parts
        for _line, name in imports(ast.parse(path.read_text()))
        if name.startswith("telerag_cli.tiers.cuda")
    }
    assert users == {"engine/tier_plan.py", "engine/llm_plan.py", "engine/survey.py"}


def test_click_is_never_imported():
    """Typer carries its own."""
    for path in sources():
        assert "click" not in {name.split(".")[0] for _, name in imports(ast.parse(path.read_text()))}, path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["embed", "--help"],
        ["chat", "--help"],
        ["serve-local", "--help"],
        ["eval", "--help"],
        ["bench", "latency", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from telerag_cli.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "print(*(name for name in sys.modules if '.' not in name), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert loaded.isdisjoint(HEAVY)
