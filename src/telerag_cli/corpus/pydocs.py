"""A corpus that every machine already has: the Python documentation that comes with the interpreter.

Sources are parsed, not imported, because importing some modules does something; only compiled modules, which
have no source, are asked at run time. The passages depend on the Python that runs, and on nothing else.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import InputError

MAX_CHARS = 1000
"""Longer texts are cut between paragraphs; a single longer paragraph is cut between lines."""

MIN_CHARS = 40
"""Shorter docstrings ("Not implemented.") answer nothing."""

_COMPILED = """
    builtins itertools math cmath array time sys gc zlib binascii unicodedata mmap select fcntl marshal errno atexit
    faulthandler
"""
_SKIPPED = """
    test tests idlelib lib2to3 distutils turtledemo pydoc_data ensurepip site-packages dist-packages lib-dynload this
    antigravity
"""
_PUBLIC_NAMES = {"_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime"}
"""Modules whose documented source has a private name, because a compiled twin usually takes its place."""


def python_documentation() -> Iterator[Passage]:
    """Language topics, then compiled modules, then the standard library's sources; each text once.

    Raises:
        InputError: this Python has its standard library's sources nowhere.
    """
    library = Path(sysconfig.get_path("stdlib"))
    if not (library / "json" / "__init__.py").exists():
        raise InputError(
            f"{library} holds no sources of the standard library.", remedy="Use a Python installed with them."
        )
    passages = (_topics(), *map(_compiled, _COMPILED.split()), _docstrings(library, _SKIPPED.split()))
    return _unique(chain.from_iterable(passages))


def harvest(roots: Iterable[Path]) -> Iterator[Passage]:
    """Docstrings of all Python files below ``roots``, each text once; raises InputError if a root is not a folder."""
    roots = list(roots)
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root} is not a folder.", remedy="Name folders that hold Python packages.")
    return _unique(passage for root in roots for passage in _docstrings(root))


def _unique(passages: Iterable[Passage]) -> Iterator[Passage]:
    """Drop texts already seen under another name, and number ids that name two things."""
    texts: set[str] = set()
    ids: dict[str, int] = {}
    for passage in passages:
        body = passage.text.split("\n", 1)[-1]
        if body in texts:
            continue
        texts.add(body)
        count = ids[passage.id] = ids.get(passage.id, 0) + 1
        yield passage if count == 1 else Passage(f"{passage.id}~{count}", passage.text, passage.metadata)


def _passages(name: str, title: str, text: str, module: str, kind: str) -> Iterator[Passage]:
    """One passage for each piece of ``text``; every piece begins with the title, which says what it is on."""
    for number, piece in enumerate(_pieces(text)):
        metadata = {"title": name.split("/")[-1], "module": module, "kind": kind}
        yield Passage(f"{name}#{number + 1}" if number else name, f"{title}\n{piece}", metadata)


def _pieces(text: str) -> Iterator[str]:
    """Pieces of at most ``MAX_CHARS`` characters: whole paragraphs, else whole lines, else parts of a line."""
    return _joined(
        (block for paragraph in re.split(r"\n\s*\n", text.strip("\n")) for block in _joined(_lines(paragraph), "\n")),
        "\n\n",
    )


def _joined(parts: Iterable[str], separator: str) -> Iterator[str]:
    """As many parts together as ``MAX_CHARS`` allows; none that is blank."""
    piece = ""
    for part in parts:
        if piece and len(piece) + len(separator) + len(part) > MAX_CHARS:
            yield piece
            piece = ""
        piece = f"{piece}{separator}{part}" if piece else part
    if piece.strip():
        yield piece


def _lines(paragraph: str) -> Iterator[str]:
    for line in paragraph.splitlines():
        for start in range(0, max(len(line), 1), MAX_CHARS):
            yield line[start : start + MAX_CHARS]


def _topics() -> Iterator[Passage]:
    """The language reference as ``help()`` shows it.

    Large topics contain small ones, so the smallest come first and a paragraph already told is left out.
    """
    from pydoc_data.topics import topics

    told: set[str] = set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for heading, text in _sections(topics[name], told):
            title = f"Python language reference, {name}: {heading}"
            yield from _passages(f"topic:{name}/{heading}", title, text, "", "topic")


def _sections(text: str, told: set[str]) -> Iterator[tuple[str, str]]:
    """(heading, text) of each section, without paragraphs in ``told``, to which the others are added."""
    heading, kept = "", list[str]()
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = paragraph.splitlines()
        if len(lines) == 2 and re.fullmatch(r"([*=~\-^])\1{2,}", lines[1].strip()):
            if kept:
                yield heading, "\n\n".join(kept)
            heading, kept = lines[0].strip(), []
        elif paragraph not in told:
            kept.append(paragraph)
            told.add(paragraph)
    if kept:
        yield heading, "\n\n".join(kept)


def _docstrings(root: Path, skipped: Sequence[str] = ()) -> Iterator[Passage]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if set(skipped) & set(parts):
            continue
        names = [_PUBLIC_NAMES.get(part, part) for part in parts if part != "__init__"]
        if names and not any(_private(name) for name in names):
            yield from _source(path, ".".join(names))


def _source(path: Path, module: str) -> Iterator[Passage]:
    try:
        with warnings.catch_warnings(), tokenize.open(path) as handle:
            warnings.simplefilter("ignore")  # invalid escapes are their author's affair
            tree = ast.parse(handle.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # templates and deliberately broken files exist, and are no documentation
    if doc := _documented(tree):
        yield from _passages(module, f"module {module}", doc, module, "module")
    yield from _members(tree.body, module, module, "function")


def _members(body: list[ast.stmt], owner: str, module: str, kind: str) -> Iterator[Passage]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            handlers = [handler.body for handler in node.handlers] if isinstance(node, ast.Try) else []
            for part in (node.body, node.orelse, *handlers):
                yield from _members(part, owner, module, kind)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or _private(node.name):
            continue
        name = f"{owner}.{node.name}"
        doc = _documented(node)
        if isinstance(node, ast.ClassDef):
            if doc:
                bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
                yield from _passages(name, f"class {name}{bases}", doc, module, "class")
            yield from _members(node.body, name, module, "method")
        elif doc:
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            yield from _passages(name, f"{name}({ast.unparse(node.args)}){returns}", doc, module, kind)


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    doc = ast.get_docstring(node)
    return doc if doc and len(doc) >= MIN_CHARS else None


def _compiled(module: str) -> Iterator[Passage]:
    """Docstrings of a module that has no source, and of its types' methods."""
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        return  # not built into this Python
    found = importlib.import_module(module)
    if len(doc := inspect.getdoc(found) or "") >= MIN_CHARS:
        yield from _passages(module, f"module {module}", doc, module, "module")
    for name, value in sorted(vars(found).items()):
        if _private(name) or inspect.ismodule(value):
            continue
        if inspect.isclass(value):
            yield from _runtime(f"{module}.{name}", value, module, "class")
            for member, method in sorted(vars(value).items()):
                if not _private(member):
                    yield from _runtime(f"{module}.{name}.{member}", method, module, "method")
        elif inspect.isbuiltin(value):
            yield from _runtime(f"{module}.{name}", value, module, "function")


def _runtime(name: str, value: Any, module: str, kind: str) -> Iterator[Passage]:
    doc = inspect.getdoc(value) if inspect.isclass(value) or callable(value) else None
    if doc and len(doc) >= MIN_CHARS:
        try:
            signature = str(inspect.signature(value))
        except (TypeError, ValueError, AttributeError):  # the last one by Python 3.13.0
            signature = ""  # written for C, and not always told to Python
        title = f"class {name}{signature}" if kind == "class" else f"{name}{signature}"
        yield from _passages(name, title, doc, module, kind)


def _private(name: str) -> bool:
    return name.startswith("_")
