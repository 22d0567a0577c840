"""``telerag search``: passages for questions, without an LLM."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from telerag_cli.cli import console
from telerag_cli.cli.options import Only
from telerag_cli.config import EngineConfig, SearchConfig
from telerag_cli.errors import EXIT_PARTIAL, InputError, UsageError

SHOWN_CHARACTERS = 300


def search(
    config: Annotated[EngineConfig, Only(SearchConfig)],
    question: Annotated[list[str] | None, typer.Argument(help="Questions.", metavar="[QUESTION]...")] = None,
    queries: Annotated[
        str | None, typer.Option(help="A file of questions, one a line or JSONL; - is stdin.", metavar="FILE|-")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a question on stdout.")] = False,
) -> None:
    """Find the passages nearest to questions."""
    if bool(question) == bool(queries):
        raise UsageError(
            "Give questions as arguments or a file of them with --queries.",
            remedy="For example: telerag search INDEX 'What is a generator?'",
        )
    with console.stdout_reserved(), contextlib.ExitStack() as opened_here:
        from telerag_cli.cli.reporting import ConsoleReporter
        from telerag_cli.engine.engine import Engine
        from telerag_cli.engine.questions import Question, read_questions
        from telerag_cli.retrieval.report import JoinReport

        engine = opened_here.enter_context(Engine.open(config, reporter=ConsoleReporter(), generate=False))
        name = ""
        asked: Iterable[Question] = (Question(str(n), text) for n, text in enumerate(question or [], 1))
        if queries:
            lines, name = opened_here.enter_context(open_lines(queries))
            asked = read_questions(lines, name)
        count = failed = lists_failed = 0
        for item in asked:
            count += 1
            if item.problem is not None:
                failed += 1
                console.fail(item.problem)
                if as_json:
                    console.emit_json({"id": item.id, "error": {"message": item.problem}})
                continue
            retrieval = engine.search(item.text)
            lists_failed += retrieval.join.lists_failed
            hits = [
                {
                    "rank": rank,
                    "id": hit.passage.id,
                    "score": hit.score,
                    "text": hit.passage.text,
                    "metadata": hit.passage.metadata,
                }
                for rank, hit in enumerate(retrieval.found, 1)
            ]
            if as_json:
                console.emit_json({"id": item.id, "question": item.text, "passages": hits})
            else:
                _show(item.text, hits)
    if lists_failed:
        console.warn(JoinReport.failures(lists_failed))
    if not count:
        raise no_question(name)
    if failed:
        raise typer.Exit(EXIT_PARTIAL)


def _show(question: str, hits: list[dict[str, Any]]) -> None:
    console.emit(question)
    for hit in hits:
        text = " ".join(hit["text"].split())
        shown = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
        console.emit(f"  {hit['rank']:>2}. {hit['score']:.4f}  {hit['id']}\n      {shown}")


@contextlib.contextmanager
def open_lines(source: str) -> Iterator[tuple[IO[bytes], str]]:
    """Open a file of lines, or stdin for ``-``; yields it and its name for messages.

    Raises:
        InputError: it cannot be read.
    """
    if source == "-":
        yield sys.stdin.buffer, "<stdin>"
        return
    try:
        lines = Path(source).open("rb")  # noqa: SIM115  # the error is about opening only
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}.", remedy="Check the path.") from error
    with lines:
        yield lines, source


def no_question(name: str) -> InputError:
    """The error for a source of questions that holds none."""
    return InputError(f"{name} holds no question.", remedy="Give one a line, or JSON objects with a question.")
