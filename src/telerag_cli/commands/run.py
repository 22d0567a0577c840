"""``telerag run``: answer a file of questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telerag_cli import console
from telerag_cli.commands.options import (
    DeviceOption,
    EmbedderOption,
    FastMemoryOption,
    IndexArgument,
    KOption,
    NprobeOption,
)
from telerag_cli.commands.search import open_lines
from telerag_cli.config import DEFAULT_FAST_MEMORY, DEFAULT_GENERATOR, DEFAULT_K, Lookahead, parse_bytes
from telerag_cli.errors import EXIT_PARTIAL, InputError, ResourceError, TeleragError
from telerag_cli.pipelines.registry import PipelineName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from telerag_cli.engine.engine import Engine
    from telerag_cli.engine.questions import Question


def run(
    index: IndexArgument,
    questions: Annotated[
        str,
        typer.Option(
            "--questions",
            "-q",
            help="Questions, one a line, JSONL or OpenAI Batch lines; - is stdin.",
            metavar="FILE|-",
        ),
    ] = "-",
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Where answers go, one JSON line each; - is stdout.", metavar="FILE|-"
        ),
    ] = "-",
    pipeline: Annotated[PipelineName, typer.Option(help="How questions are answered.")] = PipelineName.HYDE,
    lookahead: Annotated[
        Lookahead, typer.Option(help="What predicts the lists to move while the LLM writes.")
    ] = Lookahead.REFINED,
    fast_memory: FastMemoryOption = DEFAULT_FAST_MEMORY,
    nprobe: NprobeOption = None,
    k: KOption = DEFAULT_K,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A GGUF file.  \\[default: {DEFAULT_GENERATOR}]", metavar="GGUF", show_default=False
        ),
    ] = None,
    hf_repo: Annotated[
        str | None,
        typer.Option(
            help="A Hugging Face repository instead, like user/model:Q4_K_M.",
            metavar="USER/MODEL[:QUANT]",
            show_default=False,
        ),
    ] = None,
    ctx_size: Annotated[
        int, typer.Option(min=64, help="Tokens that a prompt and its answer may have together.")
    ] = 4096,
    n_gpu_layers: Annotated[
        int, typer.Option(min=-1, help="Layers of the LLM to put on a GPU, -1 for all.")
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of the LLM.  \\[default: one a core]", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this total probability."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="For sampling at temperatures above 0.")] = 0,
    embedder: EmbedderOption = None,
    device: DeviceOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the output file: skip what it has answered.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write a Chrome trace of the run, for Perfetto.", metavar="FILE", show_default=False
        ),
    ] = None,
) -> None:
    """Answer questions with an LLM and the passages it needs, moved while it writes."""
    arena_bytes = parse_bytes(fast_memory)
    if trace and not trace.parent.is_dir():
        raise ResourceError(
            f"The trace cannot be written: {trace.parent} is no folder.", remedy="Choose another --trace."
        )
    with console.stdout_reserved():
        source, name = open_lines(questions)
        from telerag_cli.engine.assemble import byte_plan, default_nprobe, open_engine, open_index
        from telerag_cli.engine.engine import Settings
        from telerag_cli.engine.lines import RunFile
        from telerag_cli.engine.questions import read_questions
        from telerag_cli.generation.llamacpp import LlamaCpp
        from telerag_cli.generation.models import resolve_model
        from telerag_cli.tracing import Tracer

        path = resolve_model(model, hf_repo)
        opened = open_index(index, embedder, device)
        file = RunFile(Path(output), resume=resume) if output != "-" else None
        console.table("Memory", ("what", "where", "size"), byte_plan(opened.index, arena_bytes, path))
        tracer = Tracer(enabled=trace is not None)
        settings = Settings(
            k, nprobe or default_nprobe(opened.index), lookahead, max_tokens, temperature, top_p, seed
        )
        generator = LlamaCpp(path, context_tokens=ctx_size, threads=threads, gpu_layers=n_gpu_layers)
        engine = open_engine(opened, generator, arena_bytes, settings, tracer=tracer)
        if engine.retriever.tier.note:
            console.warn(engine.retriever.tier.note)
        done = file.answered if file else set()
        try:
            totals = _answer_all(
                engine,
                pipeline,
                read_questions(source, name),
                done,
                file.append if file else console.emit_json,
            )
        finally:
            engine.close()
            if file:
                file.close()
            if trace:
                tracer.save(trace)
    _summarise(totals, output, trace)
    if not totals["asked"] and not totals["skipped"]:
        raise InputError(
            f"{name} holds no question.", remedy="Give one a line, or JSON objects with a question."
        )
    if totals["failed"]:
        raise typer.Exit(EXIT_PARTIAL)


def _answer_all(engine: Engine, pipeline: PipelineName, questions: Iterable[Question], done: set[str],
                write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:  # fmt: skip
    import asyncio

    from telerag_cli.engine.lines import answer_line, error_line
    from telerag_cli.pipelines.registry import PIPELINES

    totals: dict[str, Any] = {
        "asked": 0,
        "failed": 0,
        "skipped": 0,
        "total_s": 0.0,
        "retrieval_s": 0.0,
        "llm_s": 0.0,
        "hit": 0,
        "wanted": 0,
    }
    with asyncio.Runner() as runner, console.progress("answering", None, unit="questions") as advance:
        for question in questions:
            if question.id in done:
                totals["skipped"] += 1
                continue
            totals["asked"] += 1
            try:
                if question.problem:
                    raise InputError(question.problem)
                answered = runner.run(engine.ask(PIPELINES[pipeline], question.text))
            except TeleragError as error:
                totals["failed"] += 1
                console.fail(f"question {question.id}: {error}")
                write(error_line(question, str(error)))
            else:
                write(answer_line(question, answered, pipeline, engine.settings.lookahead))
                for key in ("total_s", "retrieval_s", "llm_s"):
                    totals[key] += answered.timings.get(key, 0.0)
                totals["hit"] += sum(join.lists_hit for join in answered.joins)
                totals["wanted"] += sum(join.lists_wanted for join in answered.joins)
            advance(1)
    return totals


def _summarise(totals: dict[str, Any], output: str, trace: Path | None) -> None:
    answered = totals["asked"] - totals["failed"]
    if answered:
        mean = {key: totals[key] / answered for key in ("total_s", "retrieval_s", "llm_s")}
        share = totals["hit"] / max(totals["wanted"], 1)
        console.say(
            f"{answered} answered: mean {mean['total_s']:.2f} s, of which LLM {mean['llm_s']:.2f} s and retrieval "
            f"{mean['retrieval_s']:.3f} s; {share:.0%} of {totals['wanted']:,} probed lists were in fast memory."
        )
    if totals["failed"] or totals["skipped"]:
        console.say(
            f"{totals['failed']} failed, {totals['skipped']} skipped because {output} has their answers."
        )
    if trace:
        console.say(f"Trace: {trace} (open it at ui.perfetto.dev)")
