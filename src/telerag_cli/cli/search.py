"""``telerag search``: passages for questions, without an LLM."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from telerag_cli.cli import console
from telerag_cli.cli.options import (
    DeviceOption,
    EmbedderOption,
    FastMemoryOption,
    GpuMemoryOption,
    IndexArgument,
    KOption,
    NprobeOption,
    RequirePinnedOption,
    RescoreOption,
    TierOption,
    tier_options,
)
from telerag_cli.config import TierKind
from telerag_cli.errors import EXIT_PARTIAL, InputError, UsageError

SHOWN_CHARACTERS = 300


def search(
    index: IndexArgument,
    question: Annotated[
        list[str] | None, typer.Argument(help="Questions.", metavar="[QUESTION]...", show_default=False)
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help="A file of questions, one a line or JSONL; - is stdin.", metavar="FILE|-", show_default=False
        ),
    ] = None,
    k: KOption = None,
    nprobe: NprobeOption = None,
    rescore: RescoreOption = None,
    tier: TierOption = TierKind.AUTO,
    fast_memory: FastMemoryOption = None,
    gpu_memory: GpuMemoryOption = "auto",
    require_pinned: RequirePinnedOption = False,
    embedder: EmbedderOption = None,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a question on stdout.")] = False,
) -> None:
    """Find the passages nearest to questions."""
    if bool(question) == bool(queries):
        raise UsageError(
            "Give questions as arguments or a file of them with --queries.",
            remedy="For example: telerag search INDEX 'What is a generator?'",
        )
    with console.stdout_reserved(), contextlib.ExitStack() as opened_here:
        from telerag_cli.cli.opening import Searching, open_search
        from telerag_cli.engine.questions import Question, read_questions
        from telerag_cli.retrieval.report import JoinReport

        where = tier_options(tier, device, fast_memory, gpu_memory, require_pinned)
        searching = Searching(index, embedder, where, k, nprobe, rescore)
        opened, retriever, wanted, probes = opened_here.enter_context(open_search(searching))
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
            found = retriever.search(opened.embedder.encode_queries([item.text]), wanted, probes)
            lists_failed += found.report.lists_failed
            rows = [int(row) for row in found.rows[0] if row >= 0]
            hits = [
                {
                    "rank": rank,
                    "id": passage.id,
                    "score": float(score),
                    "text": passage.text,
                    "metadata": passage.metadata,
                }
                for rank, (passage, score) in enumerate(zip(opened.passages[rows], found.scores[0], strict=False), 1)
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
