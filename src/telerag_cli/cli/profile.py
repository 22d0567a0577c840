"""``telerag profile``: what this machine does with an index and an LLM, measured."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.cli.options import Only
from telerag_cli.config import DEFAULT_EMBEDDER, EngineConfig, LlmConfig, TierConfig, TierKind
from telerag_cli.errors import UsageError
from telerag_cli.files import wrap_os_error
from telerag_cli.text import parse_json
from telerag_cli.units import parse_bytes

if TYPE_CHECKING:
    from telerag_cli.planning.hits import Replayed
    from telerag_cli.planning.planner import Planner
    from telerag_cli.planning.profile import Profile

QUICK_WIDTH = 4
"""Texts that are decoded together at most: contexts for more take seconds to make."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(EngineConfig):
    """What is measured; an index is not needed."""

    index: Path = Path()


def profile(
    config: Annotated[ProfileConfig, Only("nprobe", "embedder", TierConfig, LlmConfig, but=("reproducible", "replay"))],
    index: Annotated[
        Path | None,
        typer.Argument(
            help="The index folder; without one, only the machine and the LLM are measured.", metavar="INDEX"
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the profile goes; - is stdout.  \\[default: where run and chat look for it]",
            metavar="FILE|-",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it, as .png, .svg or .pdf.", metavar="FILE")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer points and repeats: some seconds, and a larger spread.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Measure nothing: say how right the predictions of a run were, from its output.", metavar="RUN.jsonl"
        ),
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="What telerag run --record wrote: its questions are replayed for the hit rates.  "
            "\\[default: passages of the index]",
            metavar="FILE",
        ),
    ] = None,
    throttle: Annotated[
        str | None,
        typer.Option(
            help="Bytes a second of the link of --tier simulated, like 500MB: to see what a slow one does.",
            metavar="SIZE",
        ),
    ] = None,
) -> None:
    """Measure what lookahead depends on: links, scoring, embedding, the LLM, and how they disturb each other.

    The table goes to stdout, the profile to where run and chat find it.
    """
    if check is not None:
        from telerag_cli.cli.profile_report import show_errors

        show_errors(check)
        return
    if plot is not None:
        from telerag_cli.planning.plots import check_format

        check_format(plot)
    if throttle is not None and config.tier is not TierKind.SIMULATED:
        raise UsageError(f"--throttle cannot be combined with --tier {config.tier}.", remedy="Add --tier simulated.")
    with console.stdout_reserved(), contextlib.ExitStack() as opened_here:
        if throttle is not None:
            config = replace(config, simulated_link_bytes_per_s=parse_bytes(throttle))
        if index is None:
            made, planner = _machine_only(config, quick=quick), None
        else:
            of_index = replace(config, index=index, concurrency=QUICK_WIDTH if quick else None)
            made, planner = opened_here.enter_context(_of_index(of_index, recording, quick=quick))
        if output == "-":
            console.emit_json(made.as_json(), indent=2)
        else:
            from telerag_cli.cli.profile_report import show_profile
            from telerag_cli.planning.profile import kept_in

            path = Path(output) if output else kept_in(made.identity, made.versions)
            made.save(path)

            show_profile(made, planner)
            console.say(f"Profile: {path} ({made.took_s:.0f} s)")
        if plot is not None:
            from telerag_cli.cli.profile_report import typical_window_s
            from telerag_cli.planning.plots import plot as draw

            draw(made, planner, 0.0 if planner is None else typical_window_s(planner), plot)
            console.say(f"Plot: {plot}")


@contextlib.contextmanager
def _of_index(config: EngineConfig, recording: Path | None, *, quick: bool) -> Iterator[tuple[Profile, Planner]]:
    from telerag_cli.cli.reporting import ConsoleReporter
    from telerag_cli.engine.opening import open_parts, subject_of
    from telerag_cli.planning.averages import Averages
    from telerag_cli.planning.measure import measure
    from telerag_cli.planning.planner import Planner

    replays = (_replayed(recording), recording.name) if recording else ()
    with open_parts(config, ConsoleReporter()) as (prepared, generator, retriever):
        subject = subject_of(prepared, retriever, generator, *replays)
        with console.progress("measuring", None, unit="figures") as advance:
            made = measure(subject, quick=quick, advance=advance, command=_command())
        yield made, Planner(made, Averages(), nprobe=prepared.nprobe, arena_bytes=retriever.tier.arena_bytes)


def _replayed(recording: Path) -> list[Replayed]:
    from telerag_cli.errors import ArtifactError
    from telerag_cli.planning.hits import from_recording

    try:
        with recording.open("rb") as lines:
            return from_recording([parse_json(line) for line in lines], recording)
    except OSError as error:
        raise wrap_os_error(error, recording) from error
    except ValueError as error:
        raise ArtifactError(
            f"{recording} is not a recording: {error}.", remedy="Name what telerag run --record wrote."
        ) from error


def _machine_only(config: EngineConfig, *, quick: bool) -> Profile:
    from telerag_cli.embedding.encoder import Encoder
    from telerag_cli.engine.memory_plan import plan_device, plan_llm
    from telerag_cli.engine.opening import survey_machine

    gpu, name = plan_device(config)
    llm = plan_llm(config, None, console.warn)
    encoder = Encoder.load(config.embedder or DEFAULT_EMBEDDER, device=config.device)
    with contextlib.closing(llm.open()) as generator, console.progress("measuring", None, unit="figures") as advance:
        return survey_machine(gpu, name, encoder, llm, generator, quick=quick, advance=advance, command=_command())


def _command() -> str:
    return shlex.join(["telerag", *sys.argv[1:]])
