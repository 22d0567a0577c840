"""``telerag run``: answer a file of questions."""

from __future__ import annotations

import contextlib
import os
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.cli.guard import DEBUG_VARIABLE
from telerag_cli.cli.options import check_trace
from telerag_cli.cli.scheduling import open_workers
from telerag_cli.cli.search import no_question, open_lines
from telerag_cli.config import EngineConfig, ReplicaConfig
from telerag_cli.errors import EXIT_PARTIAL, InternalError, TeleragError, UsageError


def run(
    config: EngineConfig,
    replicas: ReplicaConfig,
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
        str, typer.Option("--output", "-o", help="Where answers go, one JSON line each; - is stdout.", metavar="FILE|-")
    ] = "-",
    ordered: Annotated[bool, typer.Option("--ordered", help="Write answers in the order of the questions.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the output file: skip what it has answered.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of the run, for Perfetto.", metavar="FILE")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Keep every prompt, text, query and length, as JSON lines.", metavar="FILE")
    ] = None,
) -> None:
    """Answer questions with an LLM and the passages it needs, moved while it writes."""
    from telerag_cli.pipelines.registry import make_pipeline

    make_pipeline(config.pipeline, **config.pipeline_options)  # what is impossible is said before anything is opened
    check_trace(trace)
    with console.stdout_reserved(), open_lines(questions) as (lines, name), contextlib.ExitStack() as opened_here:
        from telerag_cli.engine.batch import Outputs, answer_all
        from telerag_cli.engine.lines import RunFile
        from telerag_cli.engine.questions import read_questions
        from telerag_cli.server.chat import read_batch_body
        from telerag_cli.tracing import Tracer

        _check_files(questions, output, record)
        file = opened_here.enter_context(RunFile(Path(output), resume=resume)) if output != "-" else None
        known = file.answered if file else None  # a line of the recording without its answer is written again
        recording = opened_here.enter_context(RunFile(record, resume=resume, only=known)) if record else None
        tracer = Tracer(enabled=trace is not None)
        if trace:
            opened_here.callback(tracer.save, trace)
        workers, scheduler = opened_here.enter_context(open_workers(config, replicas, tracer))
        with console.progress("answering", None, unit="questions") as advance:
            write = file.append if file else console.emit_json
            summary = answer_all(
                workers,
                scheduler,
                read_questions(lines, name, partial(read_batch_body, config)),
                Outputs(write, recording.append if recording else None, _tell, advance),
                answered=file.answered if file else set(),
                ordered=ordered,
            )
    for line in summary.lines():
        console.say(line)
    if trace:
        console.say(f"Trace: {trace} (open it at ui.perfetto.dev)")
    if not summary.asked and not summary.skipped:
        raise no_question(name)
    if summary.failed:
        raise typer.Exit(EXIT_PARTIAL)


def _check_files(questions: str, output: str, record: Path | None) -> None:
    """Refuse a file with two uses, which would eat itself."""
    named = [("--questions", questions), ("--output", output), ("--record", str(record) if record else "-")]
    files = [(option, Path(name)) for option, name in named if name != "-" and Path(name).is_file()]
    for place, (option, path) in enumerate(files):
        for other, same in files[:place]:
            if path.samefile(same):
                raise UsageError(f"{other} and {option} are both {path}.", remedy="Name another file for one of them.")


def _tell(name: str, error: TeleragError) -> None:
    console.fail(f"{name}: {error}")
    if isinstance(error, InternalError) and os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error.__cause__)
