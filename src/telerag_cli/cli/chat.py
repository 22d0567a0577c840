"""``telerag chat``: questions and answers in a terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.cli.options import Without, check_trace
from telerag_cli.config import EngineConfig
from telerag_cli.errors import EXIT_PARTIAL


def chat(
    config: Annotated[EngineConfig, Without("concurrency", "explain", "replay")],
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of the conversation, for Perfetto.", metavar="FILE")
    ] = None,
) -> None:
    """Ask questions in a terminal, one leaning on another; /help says what else can be typed.

    From a pipe, each line is a question.
    """
    from telerag_cli.pipelines.registry import make_pipeline, make_pipelines

    make_pipeline(config.pipeline, **config.pipeline_options)  # what is impossible is said before anything is opened
    check_trace(trace)
    with console.stdout_reserved() as out, contextlib.ExitStack() as opened_here:
        from telerag_cli.cli.chat_input import Piped, Typed
        from telerag_cli.cli.chat_screen import Screen
        from telerag_cli.cli.chat_session import COMMANDS, Chat, converse
        from telerag_cli.cli.reporting import ConsoleReporter
        from telerag_cli.engine.engine import Engine
        from telerag_cli.tracing import Tracer

        tracer = Tracer()
        if trace:
            opened_here.callback(tracer.save, trace)
        interactive = sys.stdin.isatty()
        screen = Screen(out, sys.stderr, apart=not (interactive and out.isatty()))
        engine = opened_here.enter_context(
            Engine.open(replace(config, concurrency=1), reporter=ConsoleReporter(screen.warn), tracer=tracer)
        )
        talk = Chat(engine, screen, make_pipelines(config.pipeline_options), tracing=trace is not None)
        if interactive:
            screen.note("Ask a question. /help says what else can be typed; Ctrl-D ends.")
            words = {name: command.words for name, command in COMMANDS.items()}
            failed = converse(talk, Typed(words, screen.warn), screen)
        else:
            failed = converse(talk, Piped(sys.stdin.buffer), screen)
    if failed and not interactive:
        raise typer.Exit(EXIT_PARTIAL)
