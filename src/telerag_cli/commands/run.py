"""``telerag run``: answer a file of questions."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

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
from telerag_cli.commands.search import no_question, open_lines
from telerag_cli.config import DEFAULT_FAST_MEMORY, DEFAULT_GENERATOR, Lookahead, parse_bytes
from telerag_cli.errors import EXIT_PARTIAL, ResourceError
from telerag_cli.pipelines.registry import PipelineName


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
    k: KOption = None,
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
    with (
        console.stdout_reserved(),
        open_lines(questions) as (lines, name),
        contextlib.ExitStack() as opened_here,
    ):
        from telerag_cli.engine.assemble import byte_plan, default_k, default_nprobe, open_engine, open_index
        from telerag_cli.engine.batch import answer_all
        from telerag_cli.engine.engine import Settings
        from telerag_cli.engine.lines import RunFile
        from telerag_cli.engine.questions import read_questions
        from telerag_cli.generation.llamacpp import LlamaCpp
        from telerag_cli.generation.models import resolve_model
        from telerag_cli.tracing import Tracer

        path = resolve_model(model, hf_repo)
        opened = open_index(index, embedder, device)
        probes = nprobe or default_nprobe(opened.index)
        file = opened_here.enter_context(RunFile(Path(output), resume=resume)) if output != "-" else None
        console.table("Memory", ("what", "where", "size"), byte_plan(opened.index, arena_bytes, path))
        tracer = Tracer(enabled=trace is not None)
        if trace:
            opened_here.callback(tracer.save, trace)
        generator = LlamaCpp(path, context_tokens=ctx_size, threads=threads, gpu_layers=n_gpu_layers)
        settings = Settings(
            k or default_k(opened.index), probes, lookahead, max_tokens, temperature, top_p, seed
        )
        engine = open_engine(opened, generator, arena_bytes, settings, tracer=tracer)
        opened_here.callback(engine.close)
        if engine.retriever.tier.note:
            console.warn(engine.retriever.tier.note)
        with console.progress("answering", None, unit="questions") as advance:
            summary = answer_all(
                engine,
                pipeline,
                read_questions(lines, name),
                answered=file.answered if file else set(),
                write=file.append if file else console.emit_json,
                tell=console.fail,
                advance=advance,
            )
    for line in summary.lines():
        console.say(line)
    if trace:
        console.say(f"Trace: {trace} (open it at ui.perfetto.dev)")
    if not summary.asked and not summary.skipped:
        raise no_question(name)
    if summary.failed:
        raise typer.Exit(EXIT_PARTIAL)
