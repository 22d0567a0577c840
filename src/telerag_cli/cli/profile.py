"""``telerag profile``: what this machine does with an index and an LLM, measured."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli.cli import console
from telerag_cli.cli.options import Only
from telerag_cli.config import DEFAULT_EMBEDDER, EngineConfig, Lookahead, TierKind, format_bytes, parse_bytes
from telerag_cli.errors import UsageError
from telerag_cli.files import wrap_os_error

if TYPE_CHECKING:
    from telerag_cli.planning.hits import Replayed
    from telerag_cli.planning.planner import Planner
    from telerag_cli.planning.profile import Measured, Profile

QUICK_WIDTH = 4
"""Texts that are decoded together at most: contexts for more take seconds to make."""
TYPICAL_PROMPT, TYPICAL_TEXT = 64, 96
"""Tokens read and written before a retrieval, for the plot: those of hyde."""
Row = tuple[str, str, str]
WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(EngineConfig):
    """What is measured; an index is not needed."""

    index: Path = Path()


def profile(
    config: Annotated[
        ProfileConfig,
        Only(
            "nprobe",
            "tier",
            "fast_memory",
            "gpu_memory",
            "require_pinned",
            "generator",
            "model",
            "hf_repo",
            "base_url",
            "timeout",
            "ctx_size",
            "n_gpu_layers",
            "threads",
            "embedder",
            "device",
        ),
    ],
    index: Annotated[
        Path | None,
        typer.Argument(
            help="The index folder; without one, only the machine and the LLM are measured.",
            metavar="INDEX",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the profile goes; - is stdout.  \\[default: where run and chat look for it]",
            metavar="FILE|-",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it, as .png, .svg or .pdf.", metavar="FILE", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer points and repeats: some seconds, and a larger spread.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Measure nothing: say how right the predictions of a run were, from its output.",
            metavar="RUN.jsonl",
            show_default=False,
        ),
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="What telerag run --record wrote: its questions are replayed for the hit rates.  "
            "\\[default: passages of the index]",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    throttle: Annotated[
        str | None,
        typer.Option(
            help="Bytes a second of the link of --tier simulated, like 500MB: to see what a slow one does.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure what lookahead depends on: links, scoring, embedding, the LLM, and how they disturb each other.

    The table goes to stdout, the profile to where run and chat find it.
    """
    if check is not None:
        _check(check)
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
            path = Path(output) if output else _kept(made)
            made.save(path)
            _show(made, planner)
            console.say(f"Profile: {path} ({made.took_s:.0f} s)")
        if plot is not None:
            from telerag_cli.planning.plots import plot as draw

            draw(made, planner, 0.0 if planner is None else _typical_window(planner), plot)
            console.say(f"Plot: {plot}")


def _check(path: Path) -> None:
    from telerag_cli.planning.check import errors_of

    try:
        with path.open("rb") as lines:
            errors = errors_of(lines, path)
    except OSError as error:
        raise wrap_os_error(error, path) from error
    rows = [
        (
            each.function,
            each.kind,
            each.count,
            _figure(each.function, each.predicted),
            _figure(each.function, each.measured),
            f"{each.median:.1%}",
            f"{each.worst:.0%}",
            f"{each.bias:+.1%}",
        )
        for each in errors
    ]
    console.table(
        "", ("function", "inputs", "count", "predicted", "measured", "median error", "worst", "bias"), rows, data=True
    )
    console.say("ahead: predicted before the text was written. given: from the lengths and lists that there were.")


def _figure(name: str, value: float) -> str:
    if name.endswith("_share"):
        return f"{value:.1%}"
    return f"{1e3 * value:.1f} ms" if name.endswith("_s") else format_bytes(value)


@contextlib.contextmanager
def _of_index(config: EngineConfig, recording: Path | None, *, quick: bool) -> Iterator[tuple[Profile, Planner]]:
    from telerag_cli.cli.reporting import ConsoleReporter
    from telerag_cli.engine.opening import open_parts
    from telerag_cli.engine.survey import Replays, survey
    from telerag_cli.planning.averages import Averages
    from telerag_cli.planning.planner import Planner

    replays = Replays(_replayed(recording), recording.name) if recording else Replays()
    with open_parts(config, ConsoleReporter()) as (prepared, generator, retriever):
        identity, versions = prepared.identity
        with console.progress("measuring", None, unit="figures") as advance:
            made = survey(
                prepared.opened,
                prepared.tier,
                retriever,
                generator,
                prepared.nprobe,
                replays,
                identity=identity,
                versions=versions,
                quick=quick,
                advance=advance,
                command=_command(),
            )
        yield made, Planner(made, Averages(), nprobe=prepared.nprobe, arena_bytes=retriever.tier.arena_bytes)


def _replayed(recording: Path) -> list[Replayed]:
    from telerag_cli.errors import ArtifactError
    from telerag_cli.planning.hits import from_recording

    try:
        with recording.open("rb") as lines:
            return from_recording([json.loads(line) for line in lines], recording)
    except OSError as error:
        raise wrap_os_error(error, recording) from error
    except ValueError as error:
        raise ArtifactError(
            f"{recording} is no recording: {error}.", remedy="Name what telerag run --record wrote."
        ) from error


def _machine_only(config: EngineConfig, *, quick: bool) -> Profile:
    from telerag_cli.embedding.encoder import Encoder
    from telerag_cli.engine.llm_plan import plan_llm
    from telerag_cli.engine.survey import survey_machine
    from telerag_cli.engine.tier_plan import plan_device

    gpu, name = plan_device(config)
    llm = plan_llm(config, None, console.warn)
    encoder = Encoder.load(config.embedder or DEFAULT_EMBEDDER, device=config.device)
    with contextlib.closing(llm.open()) as generator, console.progress("measuring", None, unit="figures") as advance:
        return survey_machine(gpu, name, encoder, llm, generator, quick=quick, advance=advance, command=_command())


def _command() -> str:
    return shlex.join(["telerag", *sys.argv[1:]])


def _kept(made: Profile) -> Path:
    from telerag_cli.planning.profile import kept_in

    return kept_in(made.identity, made.versions)


def _typical_window(planner: Planner) -> float:
    return planner.window_s([planner.text(TYPICAL_PROMPT, 0, TYPICAL_TEXT)], "")


def _show(made: Profile, planner: Planner | None) -> None:
    columns = ("what", "median", "quartiles")
    for title, rows in _tables(made):
        if rows:
            console.table(title, columns, rows, data=True, width=WIDTH)
    if planner is not None:
        console.table(
            "What follows, for a question of usual length asked alone",
            ("what", "expected", "why"),
            _follows(planner),
            data=True,
            width=WIDTH,
        )
    for what in made.left_out:
        console.say(what)


def _tables(made: Profile) -> Iterator[tuple[str, list[Row]]]:
    from telerag_cli.planning.formulas import transfer_cost_s

    links = [
        (
            f"{point.link}, {point.way}, {format_bytes(point.nbytes)}, {point.depth} under way",
            *_rates(point.bytes_per_s),
        )
        for point in made.links
    ]
    for link, way in dict.fromkeys((point.link, point.way) for point in made.links):
        points = [point for point in made.links if (point.link, point.way) == (link, way)]
        if len({point.nbytes for point in points}) > 1:
            links.append(
                (
                    f"{link}, {way}: cost of a transfer beside its bytes",
                    f"{1e6 * transfer_cost_s(points):.0f} µs",
                    "fitted",
                )
            )
    if made.pcie is not None:
        slot = made.pcie
        links.append(
            (
                "PCIe slot, as the driver has it",
                f"generation {slot.generation} x{slot.width}",
                f"at most {slot.most_generation} x{slot.most_width}",
            )
        )
    yield "Links", links
    if made.moving is not None:
        yield (
            "Lists of the index",
            [
                ("moved by lookahead, the LLM idle", *_rates(made.moving.alone)),
                ("moved by lookahead, the LLM decoding", *_rates(made.moving.while_decoding)),
                ("decoding while lists move, against alone", f"{made.moving.decoding_slowed:.2f} x", ""),
            ],
        )
    if made.joins is not None:
        yield (
            "Joins of replayed queries",
            [
                ("whatever is probed", f"{1e3 * made.joins.fixed_s:.2f} ms", ""),
                ("lists in fast memory", *_rates(made.joins.hit_bytes_per_s)),
                ("lists that are not", *_rates(made.joins.missed_bytes_per_s)),
                *(
                    (
                        f"with {point.missed_share:.0%} not there: of the shorter of both, not hidden",
                        f"{point.loss:.0%}",
                        "",
                    )
                    for point in made.joins.losses
                ),
            ],
        )
    scoring = [
        (f"{rate.storage}, {rate.place}; {1e6 * rate.latency_s:.0f} µs beside the bytes", *_rates(rate.bytes_per_s))
        for rate in made.scoring
    ]
    if made.coarse_s is not None:
        scoring.insert(0, ("coarse quantizer, one query", *_times(made.coarse_s)))
    yield "Scoring", scoring
    if made.embedding is not None:
        yield (
            "Embedding",
            [
                ("a query", *_times(made.embedding.query_s)),
                ("a refinement", *_times(made.embedding.sketch_s)),
                ("what a refinement adds to the LLM's time", f"{1e3 * made.embedding.sketch_costs_llm_s:.1f} ms", ""),
            ],
        )
    if made.llm is not None:
        yield (
            "LLM",
            [
                *((f"first token after {point.tokens:,} tokens", *_times(point.took_s)) for point in made.llm.prefill),
                *(
                    (f"decoding {point.width} at once: a token of each", *_times(point.step_s))
                    for point in made.llm.decode
                ),
                ("what 1,000 tokens of context add to that", f"{1e6 * made.llm.context_step_s:.2f} ms", "each text"),
            ],
        )
    yield "Memory", [(f"free of {each.where}", format_bytes(each.free_bytes), "") for each in made.memory]


def _rates(figure: Measured) -> tuple[str, str]:
    return (f"{figure.value / 1e9:.2f} GB/s", f"{figure.low / 1e9:.2f}-{figure.high / 1e9:.2f} of {figure.repeats}")


def _times(figure: Measured) -> tuple[str, str]:
    return (f"{1e3 * figure.value:.2f} ms", f"{1e3 * figure.low:.2f}-{1e3 * figure.high:.2f} of {figure.repeats}")


def _follows(planner: Planner) -> list[Row]:
    from telerag_cli.engine.explain import outlook_rows

    window_s = _typical_window(planner)
    why = f"{TYPICAL_PROMPT} tokens read, {TYPICAL_TEXT} written"
    return [("window", f"{window_s:.2f} s", why), *outlook_rows(planner, window_s, Lookahead.REFINED)]
