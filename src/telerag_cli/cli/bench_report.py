"""``telerag bench report`` and ``telerag bench compare``: what benchmarks left, to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from telerag_cli.cli import console


def report(
    folder: Annotated[
        Path, typer.Argument(help="The folder of results that suites left there.", metavar="DIR", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for report.md and the plots; made if needed.  \\[default: DIR]",
            metavar="OUT",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write report.md and plots of all results in a folder; needs the extra bench."""
    from telerag_cli.bench import report as reports

    with console.progress("Drawing", None, unit="files") as advance:
        written = reports.write(folder, output or folder, advance)
    for path in written:
        console.emit(str(path))


def compare(
    first: Annotated[
        Path,
        typer.Argument(help="A result, or a folder of them: what to compare with.", metavar="A", show_default=False),
    ],
    second: Annotated[
        Path, typer.Argument(help="Another of the same suite, or such a folder.", metavar="B", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what changed between two results, or two folders of them, and what is only noise."""
    from dataclasses import asdict

    from telerag_cli.bench import compare as comparing
    from telerag_cli.bench.wording import plain

    comparisons, alone = comparing.compare_paths(first, second)
    if alone:
        console.warn(f"Only one side has {', '.join(alone)}.")
    if as_json:
        console.emit_json({"comparisons": list(map(asdict, comparisons)), "unmatched": alone}, indent=2)
        return
    for comparison in comparisons:
        # Above the tables, which may be narrower than their titles.
        if comparison.differences:
            console.emit(f"{comparison.title}: not the same in A and B")
            rows = [[each["name"], plain(each["a"]), plain(each["b"])] for each in comparison.differences]
            console.table("", ("setting", "A", "B"), rows, data=True)
        console.emit(comparison.title)
        table = comparing.table(comparison)
        console.table("", table.columns, table.rows, data=True)
