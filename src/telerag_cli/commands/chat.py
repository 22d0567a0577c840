"""``telerag chat``: questions and answers in a terminal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from telerag_cli import console
from telerag_cli.commands.options import (
    BaseUrlOption,
    CtxSizeOption,
    DeviceOption,
    EmbedderOption,
    FastMemoryOption,
    FlareThresholdOption,
    GeneratorOption,
    GpuMemoryOption,
    HfRepoOption,
    IndexArgument,
    KOption,
    LookaheadOption,
    MaxTokensOption,
    ModelOption,
    NGpuLayersOption,
    NprobeOption,
    PipelineOption,
    PrefetchBudgetOption,
    ProfileOption,
    RequirePinnedOption,
    RescoreOption,
    RoundsOption,
    SeedOption,
    SentencesOption,
    SubQuestionsOption,
    TemperatureOption,
    ThreadsOption,
    TierOption,
    TimeoutOption,
    TopPOption,
    check_trace,
    tier_options,
)
from telerag_cli.config import (
    DEFAULT_CTX_SIZE,
    DEFAULT_TIMEOUT_S,
    GeneratorKind,
    Lookahead,
    TierKind,
)
from telerag_cli.errors import EXIT_PARTIAL
from telerag_cli.pipelines.registry import PipelineName, make_pipeline


def chat(
    index: IndexArgument,
    pipeline: PipelineOption = PipelineName.HYDE,
    rounds: RoundsOption = None,
    sub_questions: SubQuestionsOption = None,
    flare_threshold: FlareThresholdOption = None,
    sentences: SentencesOption = None,
    lookahead: LookaheadOption = Lookahead.REFINED,
    nprobe: NprobeOption = None,
    k: KOption = None,
    rescore: RescoreOption = None,
    tier: TierOption = TierKind.AUTO,
    fast_memory: FastMemoryOption = None,
    gpu_memory: GpuMemoryOption = "auto",
    require_pinned: RequirePinnedOption = False,
    profile: ProfileOption = "auto",
    prefetch_budget: PrefetchBudgetOption = None,
    generator: GeneratorOption = GeneratorKind.LLAMA,
    model: ModelOption = None,
    hf_repo: HfRepoOption = None,
    base_url: BaseUrlOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    ctx_size: CtxSizeOption = DEFAULT_CTX_SIZE,
    n_gpu_layers: NGpuLayersOption = 0,
    threads: ThreadsOption = None,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    embedder: EmbedderOption = None,
    device: DeviceOption = "auto",
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write a Chrome trace of the conversation, for Perfetto.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Ask questions in a terminal, one leaning on another; /help says what else can be typed.

    From a pipe, each line is a question.
    """
    given = {
        "rounds": rounds,
        "sub_questions": sub_questions,
        "flare_threshold": flare_threshold,
        "sentences": sentences,
    }
    make_pipeline(pipeline, **given)  # what is impossible is said before anything is opened
    check_trace(trace)
    with console.stdout_reserved() as out, contextlib.ExitStack() as opened_here:
        from telerag_cli.commands.chat_input import Piped, Typed
        from telerag_cli.commands.chat_screen import Screen
        from telerag_cli.commands.chat_session import COMMANDS, Chat, converse
        from telerag_cli.commands.opening import Answering, Planned, Searching, open_answering
        from telerag_cli.engine.llm import LlmOptions
        from telerag_cli.tracing import Tracer

        llm_options = LlmOptions(
            generator, model, hf_repo, base_url, ctx_size, n_gpu_layers, threads, timeout
        )
        where = tier_options(tier, device, fast_memory, gpu_memory, require_pinned)
        searching = Searching(index, embedder, where, k, nprobe, rescore)
        answering = Answering(llm_options, 1, lookahead, max_tokens, temperature, top_p, seed)
        tracer = Tracer()
        if trace:
            opened_here.callback(tracer.save, trace)
        interactive = sys.stdin.isatty()
        screen = Screen(out, sys.stderr, apart=not (interactive and out.isatty()))
        engine, _at_once = opened_here.enter_context(
            open_answering(
                searching, answering, tracer, screen.warn, planned=Planned(profile, prefetch_budget)
            )
        )
        talk = Chat(engine, screen, pipeline, given, tracing=trace is not None)
        if interactive:
            screen.note("Ask a question. /help says what else can be typed; Ctrl-D ends.")
            words = {name: command.words for name, command in COMMANDS.items()}
            failed = converse(talk, Typed(words, screen.warn), screen)
        else:
            failed = converse(talk, Piped(sys.stdin.buffer), screen)
    if failed and not interactive:
        raise typer.Exit(EXIT_PARTIAL)
