"""Options that suites of ``telerag bench`` share, and how their results are shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from telerag_cli.bench.suites import SystemName
from telerag_cli.cli import console
from telerag_cli.cli.options import one
from telerag_cli.config import NONE, EngineConfig, Lookahead, PipelineName, TierKind

_WHERE = "What is kept"
WORK = "How much"


@dataclass(frozen=True)
class ResultOptions:
    """Options of all suites: where results go."""

    result_dir: Annotated[
        Path | None,
        typer.Option(
            help="Write the result there, as SUITE.json; telerag bench report makes a report of them.  \\[default: nowhere]",
            metavar="DIR",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None
    result_filename: Annotated[
        str | None,
        typer.Option(
            help="Name of that file.  \\[default: SUITE.json]",
            metavar="NAME",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="Keep every request, not only summaries.", rich_help_panel=_WHERE)
    ] = False
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            help="A note to keep with the result; repeatable.",
            metavar="KEY=VALUE",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of tables.", rich_help_panel=_WHERE)
    ] = False


@dataclass(frozen=True)
class BenchOptions:
    """Options of the suites that answer questions."""

    index: Annotated[Path, one("index")]
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Questions: a dataset that telerag data prepared, or a file, one a line or JSONL; repeatable.",
            metavar="NAME|FILE",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None
    system: Annotated[
        list[SystemName] | None,
        typer.Option(help="What is measured, interleaved; repeatable.", show_default=False, rich_help_panel=WORK),
    ] = None
    pipeline: Annotated[
        list[PipelineName] | None,
        typer.Option(help="How questions are answered; repeatable.", show_default=False, rich_help_panel=WORK),
    ] = None
    num_prompts: Annotated[int, typer.Option(min=1, help="Questions of each dataset.", rich_help_panel=WORK)] = 8
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Questions asked before, and not measured.", rich_help_panel=WORK)
    ] = 1
    repeats: Annotated[int, typer.Option(min=1, help="Times that each is asked.", rich_help_panel=WORK)] = 1
    seed: Annotated[
        int, typer.Option(min=0, help="For the choice of questions, and intervals.", rich_help_panel=WORK)
    ] = 0
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Give the texts of a recording (telerag run --record), in the time the LLM takes for as many tokens; "
            "without it the LLM writes.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None
    k: Annotated[int | None, one("k")] = None
    nprobe: Annotated[int | None, one("nprobe")] = None
    tier: Annotated[TierKind, one("tier")] = TierKind.AUTO
    fast_memory: Annotated[str | None, one("fast_memory")] = None
    gpu_memory: Annotated[str, one("gpu_memory")] = "auto"
    require_pinned: Annotated[bool, one("require_pinned")] = False
    embedder: Annotated[str | None, one("embedder")] = None
    device: Annotated[str, one("device")] = "auto"
    model: Annotated[str | None, one("model")] = None
    hf_repo: Annotated[str | None, one("hf_repo")] = None
    ctx_size: Annotated[int, one("ctx_size")] = 4096
    n_gpu_layers: Annotated[int, one("n_gpu_layers")] = 0
    threads: Annotated[int | None, one("threads")] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel="The LLM")] = 64

    def config(self, concurrency: int) -> EngineConfig:
        """What the engines of all systems have in common."""
        own = {"dataset", "system", "pipeline", "num_prompts", "num_warmups", "repeats", "seed", "trace"}
        shared = {name: value for name, value in vars(self).items() if name not in own}
        return EngineConfig(
            **shared,
            lookahead=Lookahead.OFF,
            concurrency=concurrency,
            replay=self.trace and self.trace.resolve(),
            profile=NONE,
        )


def show(result: Any, keeping: ResultOptions, path: Path | None) -> None:
    """Write the result where it was wanted, and print it."""
    from dataclasses import asdict

    from telerag_cli.bench.report import headline_table, ratios_table

    if path:
        result.save(path)
        console.say(f"{path}; telerag bench report {path.parent} makes a report of it.")
    if keeping.as_json:
        console.emit_json(asdict(result))
    else:
        tables = [headline_table(result), *([ratios_table(result)] if result.ratios else [])]
        for each in tables:
            console.table(each.caption, each.columns, each.rows, data=True)
    for check in result.checks:
        if not check.held:
            console.warn(f"{check.name}: {check.says}")


def dataset_name(name: str) -> str:
    """As it stands in results: a file's without folder and ending."""
    return Path(name).stem if Path(name).suffix else name
