"""``telerag quickstart``: the main job on a corpus and models that are already here."""

from __future__ import annotations

import itertools
import json
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.build_config import BuildConfig, EmbedConfig
from telerag_cli.cli import console
from telerag_cli.config import NONE, EngineConfig, Lookahead
from telerag_cli.errors import ArtifactError
from telerag_cli.units import format_bytes

if TYPE_CHECKING:
    from telerag_cli.corpus.passages import Passage
    from telerag_cli.embedding.encoder import Encoder
    from telerag_cli.engine.engine import AskResult, Engine
    from telerag_cli.index.artifact import Index
    from telerag_cli.tracing import Tracer

QUESTIONS = (
    "What does the with statement do?",
    "How do I find the median of a list of numbers?",
    "How do I cache the results of a function?",
    "How do I measure how long a small piece of code takes?",
    "How do I make a temporary file that is deleted when I am done?",
)
MODES = (Lookahead.OFF, Lookahead.REFINED)
PASSAGES_PER_LIST = 24
"""Short lists, so that even this small index has enough of them to choose from."""
FAST_SHARE = 3
"""Fast memory holds the index's lists divided by this, so that there is something to move."""
SHARD_ROWS = 1024
K = 3
"""Fewer passages than ``telerag run`` takes: a demonstration should not spend its time on reading prompts."""
MAX_TOKENS = 96


def quickstart(
    directory: Annotated[Path, typer.Option("--dir", help="Where corpus, embeddings, index and trace go.")] = Path(
        "quickstart"
    ),
    limit: Annotated[int | None, typer.Option(help="Use only so many passages.", min=1)] = None,
) -> None:
    """Ask five questions of the Python documentation, with lookahead off and refined; everything needed is here.

    What is finished in the folder is used again, so a second run only asks.
    """
    from telerag_cli.embedding.encoder import Encoder
    from telerag_cli.files import wrap_os_error
    from telerag_cli.tracing import Tracer

    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "questions.txt").write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    except OSError as error:
        raise wrap_os_error(error, directory) from error
    took_s: dict[str, float] = {}
    tracer = Tracer()
    with console.stdout_reserved():
        with _timed("load the embedder", took_s):
            encoder = Encoder.load()
        index = _prepare(directory, limit, encoder, took_s)
        lists_bytes = int(index.list_bytes.sum())
        arena_bytes = max(lists_bytes // FAST_SHARE, int(index.list_bytes.max()))
        console.say(f"Fast memory: {format_bytes(arena_bytes)} for an index of {format_bytes(lists_bytes)}.")
        answers = {}
        for mode in MODES:
            with _timed(f"ask, lookahead {mode}", took_s):
                answers[mode] = _ask(index, encoder, mode, arena_bytes, tracer)
    tracer.save(directory / "trace.json")
    _show(answers)
    console.table("Seconds", ["stage", "s"], [(name, round(spent_s, 1)) for name, spent_s in took_s.items()], data=True)
    _say_what_next(directory)


def _prepare(directory: Path, limit: int | None, encoder: Encoder, took_s: dict[str, float]) -> Index:
    from telerag_cli.corpus.pydocs import python_documentation
    from telerag_cli.embedding.job import embed
    from telerag_cli.index.build import build_index

    with _timed("make the corpus", took_s):
        passages = list(itertools.islice(python_documentation(), limit))
        _write_corpus(directory / "corpus.jsonl", passages)
    console.say(f"{len(passages):,} passages of Python documentation.")
    try:
        with _timed("embed", took_s):
            config = EmbedConfig(shard_rows=SHARD_ROWS)
            embed(passages, directory / "embeddings", config, encoder=encoder, progress=console.progress)
        with _timed("build the index", took_s):
            lists = BuildConfig(nlist=-(-len(passages) // PASSAGES_PER_LIST))
            return build_index(directory / "embeddings", directory / "index", lists, progress=console.progress)
    except ArtifactError as error:
        # Another Python has other documentation, and another --limit less of it.
        raise ArtifactError(error.message, remedy=f"Remove {directory} or choose another --dir.") from error


def _write_corpus(path: Path, passages: Sequence[Passage]) -> None:
    """As ``telerag embed`` reads it."""
    from telerag_cli.files import writing

    with writing(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        for passage in passages:
            line = {"id": passage.id, "text": passage.text, **passage.metadata}
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _ask(index: Index, encoder: Encoder, mode: Lookahead, arena_bytes: int, tracer: Tracer) -> list[AskResult]:
    """All questions, from an empty arena; the models have run before, so that no mode pays for loading them."""
    import asyncio

    from telerag_cli.cli.reporting import ConsoleReporter
    from telerag_cli.engine.engine import Engine
    from telerag_cli.engine.opening import OpenedIndex, index_passages
    from telerag_cli.llm.base import Message, Request

    config = EngineConfig(
        index=index.paths.root,
        k=min(K, index.manifest.ntotal),
        fast_memory=str(arena_bytes),
        lookahead=mode,
        max_tokens=MAX_TOKENS,
        concurrency=1,
        profile=NONE,
    )
    opened = OpenedIndex(index, index_passages(index), encoder)

    async def ask_all(engine: Engine) -> list[AskResult]:
        encoder.encode_queries(QUESTIONS[:1])
        await engine.generator.generate(Request([Message("user", QUESTIONS[0])], max_tokens=4))
        answered = []
        with console.progress(f"Asking, lookahead {mode}", len(QUESTIONS), unit="questions") as advance:
            for question in QUESTIONS:
                answered.append(await engine.aask(question))
                advance(1)
        return answered

    with Engine.open(config, reporter=ConsoleReporter(), tracer=tracer, opened=opened) as engine:
        return asyncio.run(ask_all(engine))


def _show(answers: Mapping[Lookahead, Sequence[AskResult]]) -> None:
    for number, (question, answered) in enumerate(zip(QUESTIONS, answers[Lookahead.REFINED], strict=True), 1):
        console.emit(f"\n{number}. {question}")
        more = " …" if answered.stages[-1].generation.finish_reason == "length" else ""
        for line in f"{answered.answer}{more}".splitlines():
            console.emit(textwrap.fill(line, 100, initial_indent="   ", subsequent_indent="   "))
        cited = {citation["rank"] for citation in answered.citations}
        for rank, hit in enumerate(answered.found, 1):
            console.emit(f"     [{rank}] {hit.score:.3f}  {hit.passage.id}{'  (cited)' if rank in cited else ''}")
    console.emit("")
    rows = [_row(number, mode, answers[mode][number]) for number in range(len(QUESTIONS)) for mode in MODES]
    columns = ["", "lookahead", "passage", "join ms", "answer", "total", "lists hit", "read"]
    console.table("Seconds by stage; at the join, lists in fast memory and bytes read then", columns, rows, data=True)
    same = sum(off.answer == on.answer for off, on in zip(*(answers[mode] for mode in MODES), strict=True))
    console.emit(f"{same} of {len(QUESTIONS)} answers are the same with lookahead off and refined.\n")


def _row(number: int, mode: Lookahead, answered: AskResult) -> tuple[object, ...]:
    timings, join = answered.timings, answered.joins[0]
    return (
        number + 1,
        str(mode),
        round(timings["passage_s"], 2),
        round(1000 * join.join_s, 1),
        round(timings["answer_s"], 2),
        round(timings["total_s"], 2),
        f"{join.lists_hit} of {join.lists_wanted}",
        format_bytes(join.bytes_missed),
    )


def _say_what_next(directory: Path) -> None:
    console.say(
        f"Everything lies in {directory}: corpus.jsonl, embeddings/, index/, questions.txt, and trace.json for "
        "https://ui.perfetto.dev. Next, for example:"
    )
    console.say(f'  telerag search {directory}/index "How do I sort a list by a key?"')
    console.say(f"  telerag run {directory}/index --questions {directory}/questions.txt --pipeline hyde | jq .answer")
    console.say(f"  telerag serve-local {directory}/index")
    console.say(f"  telerag inspect {directory}/index --verify")


@contextmanager
def _timed(name: str, took_s: dict[str, float]) -> Iterator[None]:
    """Note the seconds spent inside as ``took_s[name]``."""
    began_s = time.perf_counter()
    yield
    took_s[name] = time.perf_counter() - began_s
