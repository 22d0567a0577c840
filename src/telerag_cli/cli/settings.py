"""``telerag.toml`` and ``TELERAG_*``: every option of every command, from the declarations that Typer reads.

In the file, the table ``[run]`` is for ``telerag run`` alone, and ``[global]``, or the top of the file, for all
commands that have an option; in the environment, ``TELERAG_RUN__NPROBE`` and ``TELERAG_NPROBE``. An option that differs
from command to command, like ``--output``, can be set for one at a time only.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from telerag_cli.cli.guard import DEBUG_VARIABLE
from telerag_cli.errors import UsageError

PREFIX = "TELERAG_"
GLOBAL = "global"
FILE_VARIABLE = "TELERAG_CONFIG"
FILE_NAME = "telerag.toml"
NO_OPTIONS = {DEBUG_VARIABLE, FILE_VARIABLE, "TELERAG_KILLS"}
"""Variables that are no options; the last is read by tests."""
ITSELF = "config"
"""The command that shows settings: what it should do is said to it and not set."""
SECRET, HIDDEN = ("api_key",), "(hidden)"
"""Options whose values are nobody's business."""
ENVIRONMENT, FILE, DEFAULT = "environment", "file", "default"


@dataclass(frozen=True)
class Option:
    """An option of a command, as declared."""

    key: str
    """``fast_memory`` for ``--fast-memory``."""
    flag: str
    parameter: str
    annotation: Any
    minimum: float | None
    maximum: float | None
    default: Any
    help: str

    def means(self, other: Option) -> bool:
        """Whether it is the same option, of another command."""
        return (self.help, self.annotation, self.default) == (other.help, other.annotation, other.default)


@dataclass(frozen=True)
class Section:
    """Options that are set together: a command's, or those that mean the same in all commands that have them."""

    name: str
    """``run``, or ``bench-latency`` for a command of a group."""
    options: dict[str, Option]
    path: tuple[str, ...] = ()
    """The command's own name, after that of its group if it has one."""

    def variable(self, key: str) -> str:
        """The environment's name for one of them."""
        own = "" if self.name == GLOBAL else f"{self.name.replace('-', '_').upper()}__"
        return f"{PREFIX}{own}{key.upper()}"


@dataclass(frozen=True)
class Value:
    """What an option is set to, and by what."""

    value: Any
    origin: str
    """Environment, file or default."""
    place: str
    """The variable, or the file and its table."""


@dataclass
class Settings:
    """All that is set, and the file that was read."""

    sections: dict[str, Section]
    file: Path | None = None
    values: dict[tuple[str, str, str], Value] = field(default_factory=dict)
    """By origin, section and key."""
    unknown: list[str] = field(default_factory=list)
    """A sentence for each variable that looks like ours and is none."""

    def of(self, command: str, key: str) -> Value | None:
        """What is set for a command's option: the environment before the file, and in each the command before all."""
        if not self.values:
            return None  # nor any sections, if the settings could not be read
        shared, own = self.sections[GLOBAL].options.get(key), self.sections[command].options[key]
        names = (command, GLOBAL) if shared and shared.means(own) else (command,)
        places = ((origin, name) for origin in (ENVIRONMENT, FILE) for name in names)
        return next((self.values[*place, key] for place in places if (*place, key) in self.values), None)

    def defaults(self) -> dict[str, dict[str, Any]]:
        """For Click's ``default_map``: by command and parameter."""
        made: dict[str, Any] = {}
        for name, section in self.sections.items():
            place = made
            for step in section.path:
                place = place.setdefault(step, {})
            if section.path:
                place |= {
                    option.parameter: found.value
                    for key, option in section.options.items()
                    if (found := self.of(name, key)) is not None
                }
        return made


def sections_of(commands: Mapping[str, Any]) -> dict[str, Section]:
    """The sections that Typer's commands make, the one for all of them first."""
    found = {
        "-".join(path): Section("-".join(path), {option.key: option for option in _options(command)}, path)
        for path, command in _flat(commands)
        if path != (ITSELF,)
    }
    first: dict[str, Option] = {}
    differ: set[str] = set()
    # What a group's commands mean by a key is their own matter: they take the one for all commands if it is theirs too.
    for section in sorted(found.values(), key=lambda section: len(section.path)):
        for key, option in section.options.items():
            if not first.setdefault(key, option).means(option) and len(section.path) == 1:
                differ.add(key)
    shared = {key: option for key, option in first.items() if key not in differ}
    return {GLOBAL: Section(GLOBAL, shared), **found}


def _flat(commands: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the names that lead to it, those of groups in the place of their group."""
    for name, command in commands.items():
        if hasattr(command, "commands"):
            yield from _flat(command.commands, (*path, name))
        else:
            yield (*path, name), command


def _options(command: Any) -> Iterator[Option]:
    hints = get_type_hints(command.callback, include_extras=True)
    for each in command.params:
        if each.param_type_name == "option" and each.name in hints:
            annotation, declared = get_args(hints[each.name])[:2]
            flag = max(each.opts, key=len)
            yield Option(
                flag.lstrip("-").replace("-", "_"),
                flag,
                each.name,
                annotation,
                declared.min,
                declared.max,
                plain(each.default),
                (each.help or "").replace("\\[", "["),
            )


def plain(value: Any) -> Any:
    """As text, number or truth, or a list of them, which Click, JSON and TOML know."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


def wanted(environment: Mapping[str, str], named: Path | None) -> bool:
    """Whether anything is set at all; if not, nothing needs to be loaded to find out what."""
    return find_file(environment, named) is not None or any(_is_ours(name) for name in environment)


def _is_ours(variable: str) -> bool:
    return variable.startswith(PREFIX) and variable not in NO_OPTIONS


def find_file(environment: Mapping[str, str], named: Path | None) -> Path | None:
    """The file in use: the one named, ``telerag.toml`` here, or the user's own; None if there is none."""
    if named is not None:
        return named
    if variable := environment.get(FILE_VARIABLE):
        return Path(variable)
    for path in places(environment):
        with contextlib.suppress(OSError):  # a folder that may not be entered
            if path.exists():
                return path
    return None


def places(environment: Mapping[str, str]) -> list[Path]:
    """Where a file is looked for."""
    found = [Path(FILE_NAME)]
    with contextlib.suppress(RuntimeError):  # a user without a home
        home = environment.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        found.append(Path(home) / "telerag" / FILE_NAME)
    return found


def load(sections: dict[str, Section], named: Path | None = None) -> Settings:
    """Read both sources.

    Raises:
        UsageError: a file that was named is missing or no TOML, or a key or a value is none that an option takes.
    """
    settings = Settings(sections, find_file(os.environ, named))
    if settings.file is not None:
        for section, table in _tables(settings.file, sections):
            place = f"{settings.file} [{section.name}]"
            for key, value in table.items():
                checked = _checked(section, key, f"{place} {key}", value)
                settings.values[FILE, section.name, key] = Value(checked, FILE, place)
    ours = {name for name in os.environ if _is_ours(name)}
    known = set()
    for section in sections.values():
        for key in section.options:
            known.add(variable := section.variable(key))
            if given := os.environ.get(variable):
                checked = _checked(section, key, variable, given)
                settings.values[ENVIRONMENT, section.name, key] = Value(checked, ENVIRONMENT, variable)
    for name in sorted(ours - known):
        own = _own(name.removeprefix(PREFIX).lower(), sections, lambda s, key: s.variable(key))
        settings.unknown.append(f"{name} is no option{own or _nearest(name, known)}.")
    return settings


def _tables(path: Path, sections: dict[str, Section]) -> Iterator[tuple[Section, dict[str, Any]]]:
    """The file's tables, with underscores in their keys."""
    import tomllib

    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"The settings {path} cannot be read: {(error.strerror or str(error)).lower()}.",
            remedy="Name another file with --config, or make one with telerag config --init.",
        ) from error
    except ValueError as error:
        raise UsageError(f"The settings {path} are no TOML: {error}.", remedy="Correct the file.") from error
    top = {key: value for key, value in raw.items() if not isinstance(value, dict)}
    for name, table in [(GLOBAL, top), *((name, raw[name]) for name in raw if name not in top)]:
        section = sections.get(name.replace("_", "-"))
        if section is None:
            raise UsageError(
                f"{path} has the table [{name}], which is no command{_nearest(name, sections)}.",
                remedy=f"Tables are [{GLOBAL}] and those named like commands.",
            )
        for key in table:
            plain_key = key.replace("-", "_")
            if plain_key not in section.options:
                own = "" if section.name != GLOBAL else _own(plain_key, sections, lambda s, _key: f"[{s.name}]")
                raise UsageError(
                    f"{path} [{section.name}] has '{key}', which is no option there"
                    f"{own or _nearest(key, section.options)}.",
                    remedy="Correct or remove it; telerag config --all lists what there is.",
                )
        yield section, {key.replace("-", "_"): value for key, value in table.items() if value != ""}


def _own(key: str, sections: dict[str, Section], place: Any) -> str:
    """Where to set what is an option of commands, but not the same one in all of them."""
    found = [place(section, key) for section in sections.values() if key in section.options]
    return f" for all commands, as they differ in it; set it with {' or '.join(found)}" if found else ""


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; the nearest is {near[0]}" if near else ""


def _checked(section: Section, key: str, place: str, value: Any) -> Any:
    """A value of the file or the environment, as the option would be given.

    Raises:
        UsageError: the option does not take it.
    """
    from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

    option = section.options[key]
    lists = [kind for kind in (option.annotation, *get_args(option.annotation)) if get_origin(kind) is list]
    kind = get_args(lists[0])[0] if lists else option.annotation
    bounded: Any = Annotated.__class_getitem__((kind, Field(ge=option.minimum, le=option.maximum)))  # type: ignore[attr-defined]
    wanted: Any = GenericAlias(list, (bounded,)) if lists else bounded
    try:
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("should not be true or false")  # which pydantic takes for 1 and 0
        if lists and isinstance(value, str):
            value = json.loads(value)
        made = TypeAdapter(wanted, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)
    except (ValidationError, ValueError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        told = told.removeprefix("Input ").removeprefix("Value error, ")
        shown = HIDDEN if key in SECRET else repr(value)
        raise UsageError(
            f"{place} is {shown}, and it {told[:1].lower()}{told[1:]}.", remedy=f"It is {option.flag}: {option.help}"
        ) from error
    return _home(plain(made))


def _home(value: Any) -> Any:
    """A path under ``~``, which no shell has expanded."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value  # noqa: PTH111
