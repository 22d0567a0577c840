"""``telerag doctor``: what is here, what is wrong, and what mends it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from telerag_cli import console
from telerag_cli.commands.config import rows_of, settings_of
from telerag_cli.commands.options import EmbedderOption, HfRepoOption, ModelOption
from telerag_cli.errors import EXIT_FAILED, UsageError

if TYPE_CHECKING:
    from telerag_cli.engine.health import Finding


def doctor(
    context: typer.Context,
    index: Annotated[
        Path, typer.Argument(help="An index, or the folder to work in.", metavar="[INDEX]")
    ] = Path(),
    model: ModelOption = None,
    hf_repo: HfRepoOption = None,
    embedder: EmbedderOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="All findings and settings as JSON.")] = False,
) -> None:
    """Say what is installed, which devices, memory, disk and models there are, what is set, and how to mend what is wrong.

    Exits with 1 if embedding, building and answering with the defaults could not work.
    """
    with console.stdout_reserved():
        from telerag_cli.engine.health import Finding, Looked, examine

        findings = []
        with console.progress("looking", None) as advance:
            for finding in examine(Looked(index, model, hf_repo, embedder)):
                findings.append(finding)
                advance(1)
        given = {"--model": model, "--hf-repo": hf_repo, "--embedder": embedder}
        settings: list[tuple[str, str, str]] = []
        if isinstance(error := context.find_root().obj, UsageError):
            findings.append(
                Finding("settings", "not usable", error.message.rstrip("."), error.remedy, fatal=True)
            )
        else:
            known = settings_of(context)
            findings.append(Finding("settings", str(known.file or "no telerag.toml")))
            findings += [
                Finding("settings", "unknown", words.rstrip("."), "telerag config --all")
                for words in known.unknown
            ]
            settings = [(name, str(value), _origin(context, name, given, origin))
                        for name, _commands, value, origin in rows_of(known, every=as_json)]  # fmt: skip
        settings += [(name, str(value), "option") for name, value in given.items()
                     if value is not None and not any(each[0] == name for each in settings)]  # fmt: skip
        if as_json:
            columns = ("option", "value", "origin")
            told = {
                "ok": not any(finding.fatal for finding in findings),
                "findings": [asdict(each) for each in findings],
                "settings": [dict(zip(columns, each, strict=True)) for each in settings],
            }
            console.emit_json(told, indent=1)
        else:
            _show(findings, settings)
    if any(finding.fatal for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def _origin(context: typer.Context, name: str, given: dict[str, str | None], origin: str) -> str:
    """``option`` for what was given to this command, whatever is set elsewhere."""
    parameter = name.lstrip("-").replace("-", "_")
    source = context.get_parameter_source(parameter)
    return (
        "option"
        if given.get(name) is not None and source is not None and source.name == "COMMANDLINE"
        else origin
    )


def _show(findings: list[Finding], settings: list[tuple[str, str, str]]) -> None:
    console.table("", ("what", "found"), [(each.name, each.value) for each in findings], data=True)
    if settings:
        console.table("Set otherwise than by default", ("option", "value", "origin"), settings, data=True)
    troubles = [each for each in findings if each.trouble]
    for each in troubles:
        console.emit(f"{'error' if each.fatal else 'warning'}: {each.name}: {each.trouble}.")
        if each.mend:
            console.emit(f"  mend: {each.mend}")
    if not troubles:
        console.emit("Nothing is wrong.")
    elif any(each.fatal for each in troubles):
        console.emit("As it is, telerag cannot embed, build an index and answer questions with its defaults.")
