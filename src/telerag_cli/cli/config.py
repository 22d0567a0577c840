"""``telerag config``: what is set, where, and a file to begin with."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from telerag_cli.cli import console
from telerag_cli.cli.settings import (
    DEFAULT,
    ENVIRONMENT,
    FILE,
    FILE_NAME,
    FILE_VARIABLE,
    GLOBAL,
    HIDDEN,
    ITSELF,
    SECRET,
    Option,
    Section,
    Settings,
    find_file,
    load,
    places,
    sections_of,
)
from telerag_cli.config import KEY_VARIABLE
from telerag_cli.errors import ArtifactError, UsageError
from telerag_cli.files import writing

COLUMNS = ("option", "commands", "value", "origin")
TOLERANT = (ITSELF, "doctor")
"""Commands that help with settings that cannot be used."""


@dataclass(frozen=True)
class Row:
    """An option with the commands in which it has this value from this place."""

    option: str
    commands: list[str]
    value: Any
    origin: str
    place: str | None


def config(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--show", help="Show what is set, to what, and where; the default.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Show every option, and not only those that are set.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    path: Annotated[bool, typer.Option("--path", help="Print the path of the settings file in use.")] = False,
    init: Annotated[
        bool,
        typer.Option("--init", help=f"Write ./{FILE_NAME}, or the --config named, with every option commented out."),
    ] = False,
) -> None:
    """Show the settings: TELERAG_* variables and telerag.toml, which stand behind options and before defaults."""
    if path + init + (show or every or as_json) > 1:
        raise UsageError("--show, --path and --init are three things to do.", remedy="Give one of them.")
    if init:
        _init(_named(context) or Path(FILE_NAME), context)
    elif path:
        _show_path(context)
    else:
        _show(settings_of(context), every=every, as_json=as_json)


def apply(context: typer.Context, named: Path | None) -> None:
    """Have what is set stand in for the defaults of the command that follows.

    Raises:
        UsageError: see `load`; not before a command that helps with it, nor when only help is asked for.
    """
    try:
        settings = load(_sections(context), named)
    except UsageError as error:
        context.obj = error
        if context.invoked_subcommand in TOLERANT:
            return
        if set(context.help_option_names).isdisjoint(sys.argv[1:]):
            raise
        console.warn(str(error))
        return
    if settings.file is not None and named is None and not os.environ.get(FILE_VARIABLE):
        console.say(f"Settings: {settings.file.absolute()}")
        _keep_the_key(settings)
    for sentence in settings.unknown:
        console.warn(sentence)
    context.obj = settings
    context.default_map = settings.defaults()


def _keep_the_key(settings: Settings) -> None:
    """Refuse a file that was found, not named, if it would send the environment's key to a server of its choice.

    Raises:
        UsageError: it would.
    """
    said = {origin: value for (origin, _section, key), value in settings.values.items() if key == "base_url"}
    given = any(argument.split("=")[0] == "--base-url" for argument in sys.argv[1:])
    if os.environ.get(KEY_VARIABLE) and FILE in said and ENVIRONMENT not in said and not given:
        raise UsageError(
            f"{said[FILE].place} has base-url {said[FILE].value}, and {KEY_VARIABLE} would be sent there.",
            remedy=f"Give --base-url yourself, name the file with --config, or unset {KEY_VARIABLE}.",
        )


def settings_of(context: typer.Context) -> Settings:
    """What is set, as the entry point has read it.

    Raises:
        UsageError: it could not be read.
    """
    known = context.find_root().obj
    if isinstance(known, UsageError):
        raise known
    return known if isinstance(known, Settings) else Settings(_sections(context))


def rows_of(settings: Settings, *, every: bool) -> list[Row]:
    """Options that are set, or all of them."""
    rows: dict[tuple[str, str, str | None], Row] = {}
    for command, section in settings.sections.items():
        for key, option in section.options.items() if command != GLOBAL else ():
            found = settings.of(command, key)
            if found or every:
                value, origin, place = (
                    (found.value, found.origin, found.place) if found else (option.default, DEFAULT, None)
                )
                if key in SECRET and value:
                    value = HIDDEN
                rows.setdefault(
                    (option.flag, repr(value), place), Row(option.flag, [], value, origin, place)
                ).commands.append(command)
    return sorted(rows.values(), key=lambda row: row.option.lstrip("-"))


def shown(row: Row) -> tuple[str, str, str, str]:
    """For a table."""
    value = "" if row.value is None else row.value if isinstance(row.value, str) else json.dumps(row.value)
    origin = f"{row.origin}: {row.place}" if row.place else row.origin
    return row.option, ", ".join(row.commands), value, origin


def _sections(context: typer.Context) -> dict[str, Section]:
    program: Any = context.find_root().command
    return sections_of(program.commands)


def _named(context: typer.Context) -> Path | None:
    named: Path | None = context.find_root().params.get("settings")
    return named or (Path(variable) if (variable := os.environ.get(FILE_VARIABLE)) else None)


def _show(settings: Settings, *, every: bool, as_json: bool) -> None:
    rows = rows_of(settings, every=every)
    if as_json:
        file = None if settings.file is None else str(settings.file)
        console.emit_json({"file": file, "settings": [vars(row) for row in rows]}, indent=2)
    elif rows:
        console.table("", COLUMNS, [shown(row) for row in rows], data=True)
    else:
        console.say("Nothing is set. telerag config --all shows what can be, telerag config --init writes a file.")


def _show_path(context: typer.Context) -> None:
    found = find_file(os.environ, _named(context))
    if found is None:
        looked = " nor ".join(str(place) for place in places(os.environ))
        raise ArtifactError(
            f"There is no settings file: neither {looked}.", remedy="Write one with telerag config --init."
        )
    if not found.exists():
        settings_of(context)  # says what is wrong with the one named
    console.emit(str(found))


def _init(path: Path, context: typer.Context) -> None:
    if path.exists():
        raise ArtifactError(
            f"{path} is there already and has {path.stat().st_size:,} bytes, and --init writes a new file.",
            remedy="Edit it, or move it away first.",
        )
    with writing(path) as temporary:
        temporary.write_text("\n".join(template(_sections(context))) + "\n", encoding="utf-8")
    console.emit(str(path))


def template(sections: dict[str, Section]) -> Iterator[str]:
    """Lines of a settings file in which every option stands at its default, commented out."""
    yield '# Settings of telerag: take away the # before a line to set it. "" leaves an option as it is.'
    yield "# The command line counts first, then TELERAG_* variables, then this file."
    shared = sections[GLOBAL].options

    def is_shared(option: Option) -> bool:
        return option.key in several and option.means(shared[option.key])

    used = Counter(
        option.key
        for name, section in sections.items()
        if name != GLOBAL
        for option in section.options.values()
        if option.key in shared and option.means(shared[option.key])
    )
    several = {key for key in shared if used[key] > 1}
    for name, section in sections.items():
        own = [option for option in section.options.values() if is_shared(option) == (name == GLOBAL)]
        if own:
            yield ""
            yield (
                "# For all commands that have the option; each can be set for one of them below, too."
                if name == GLOBAL
                else f"# For telerag {name}."
            )
            yield f"[{name}]"
        for option in own:
            yield from _lines(option)


def _lines(option: Option) -> Iterator[str]:
    yield ""
    yield f"# {' '.join(option.help.split())}"
    default = "" if option.default is None else option.default
    yield f"#{option.key.replace('_', '-')} = {json.dumps(default)}"
