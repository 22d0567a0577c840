"""``telerag doctor``: what is here, what is wrong, and what mends it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telerag_cli.cli import console
from telerag_cli.cli.config import COLUMNS, Row, rows_of, settings_of, shown
from telerag_cli.cli.options import one
from telerag_cli.cli.settings import Settings
from telerag_cli.config import GeneratorKind
from telerag_cli.errors import EXIT_FAILED, UsageError

if TYPE_CHECKING:
    from telerag_cli.engine.health import Finding


def doctor(
    context: typer.Context,
    index: Annotated[
        Path,
        typer.Argument(
            help="An index, or the folder to work in.  \\[default: this one]", metavar="INDEX", show_default=False
        ),
    ] = Path(),
    model: Annotated[str | None, one("model")] = None,
    hf_repo: Annotated[str | None, one("hf_repo")] = None,
    embedder: Annotated[str | None, one("embedder")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what is installed, which devices, memory, disk and models there are, what is set, and how to mend faults.

    Exits with 1 if telerag embed, build-index and run with their defaults could not work.
    """
    from telerag_cli.engine.health import Examined, Finding, examine, made_by

    findings: list[Finding] = []
    settings = Settings({})
    try:
        settings = settings_of(context)
        findings.append(Finding("settings", str(settings.file or "no telerag.toml")))
    except UsageError as error:
        findings.append(Finding("settings", "not usable", error.message.rstrip("."), error.remedy, fatal=True))
    findings += [
        Finding("settings", "unknown variable", sentence.rstrip("."), "rename or unset it")
        for sentence in settings.unknown
    ]

    def as_run(key: str, command: str = "run") -> Any:
        found = settings.of(command, key)
        return found.value if found else None

    one_named = model is not None or hf_repo is not None
    examined = Examined(
        index,
        model if one_named else as_run("model"),
        hf_repo if one_named else as_run("hf_repo"),
        embedder or as_run("embedder") or made_by(index) or as_run("model", "embed"),
        None
        if one_named or as_run("generator") != GeneratorKind.OPENAI
        else f"a server at {as_run('base_url') or 'the address given'}",
    )
    with console.stdout_reserved(), console.progress("Examining", None) as advance:
        for finding in examine(examined):
            findings.append(finding)
            advance(1)
    rows = [*_given(context), *rows_of(settings, every=as_json)]
    fatal = any(finding.fatal for finding in findings)
    if as_json:
        console.emit_json(
            {"ok": not fatal, "findings": [asdict(each) for each in findings], "settings": [vars(row) for row in rows]},
            indent=2,
        )
    else:
        _show(findings, rows)
    if fatal:
        raise typer.Exit(EXIT_FAILED)


def _given(context: typer.Context) -> list[Row]:
    """Options of this very command line."""
    rows = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.param_type_name == "option" and source is not None and source.name == "COMMANDLINE":
            value = context.params[option.name or ""]
            rows.append(Row(max(option.opts, key=len), [context.info_name or ""], value, "option", None))
    return rows


def _show(findings: list[Finding], rows: list[Row]) -> None:
    console.table("", ("what", "found"), [(each.name, each.value) for each in findings], data=True)
    if rows:
        console.table("What is set", COLUMNS, [shown(row) for row in rows], data=True)
    troubles = [each for each in findings if each.trouble]
    for each in troubles:
        mend = f" Mend: {each.mend}" if each.mend else ""
        console.emit(f"{each.name}: {each.trouble}.{mend}")
    if any(each.fatal for each in troubles):
        console.emit("As it is, telerag cannot embed, build an index and answer questions with its defaults.")
    elif not troubles:
        console.emit("Nothing is wrong.")
