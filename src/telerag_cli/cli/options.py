"""The tree of settings as options: a command's parameter that is a group of settings stands for the group's fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from telerag_cli.config import EngineConfig
from telerag_cli.errors import ResourceError
from telerag_cli.setting import Config, Setting, declared, settings_of

EMPTY = inspect.Parameter.empty


class Only:
    """Says which fields of a group a command offers, singly or by a part of the tree; others keep their defaults."""

    def __init__(self, *names: str | type[Config], but: Collection[str] = ()) -> None:
        self._names = {each for name in names for each in ([name] if isinstance(name, str) else settings_of(name))}
        self._but = but

    def offers(self, name: str) -> bool:
        """Whether a field is an option of the command."""
        return name in self._names and name not in self._but


class Without(Only):
    """Says which fields of a group a command does not offer; they keep their defaults."""

    def offers(self, name: str) -> bool:
        """Whether a field is an option of the command."""
        return name not in self._names


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer should see it, with the fields of dataclasses in place of parameters of their types.

    A field of a `Config` is an option if it has a `Setting`; fields of other dataclasses are annotated like a command's
    own parameters.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, list[inspect.Parameter]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *extras = get_args(hints[name]) if hasattr(hints[name], "__metadata__") else (hints[name],)
        is_group = dataclasses.is_dataclass(kind)  # a name of its own, or mypy thinks that it has no hash
        if is_group:
            shown = next((each for each in extras if isinstance(each, Only)), Without())
            groups[name] = kind, [each for each in _parameters(kind) if shown.offers(each.name)]
            parameters += groups[name][1]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
    parameters.sort(key=lambda each: each.default is not EMPTY)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: kind(**{each.name: given.pop(each.name) for each in each_of})
            for name, (kind, each_of) in groups.items()
        }
        command(**made, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


@functools.cache
def _parameters(kind: Any) -> list[inspect.Parameter]:
    """The options that a dataclass stands for; commands share them, and reading them takes milliseconds."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        default = EMPTY if field.default is dataclasses.MISSING else field.default
        annotation = hints[field.name]
        if issubclass(kind, Config):
            _type, setting = declared(annotation)
            if setting is None:
                continue
            annotation = Annotated.__class_getitem__(  # type: ignore[attr-defined]
                (get_args(annotation)[0], option(setting, field.name, default))
            )
        found.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )
    return found


def option(setting: Setting, name: str, default: Any = None) -> Any:
    """A setting as Typer's option, or as its argument if it has to be given."""
    if default is EMPTY:
        return typer.Argument(help=setting.help, metavar=setting.metavar)
    words = f"  \\[default: {setting.default}]" if setting.default else ""
    flags = [setting.flag] if setting.flag else [f"--{name.replace('_', '-')}"] if isinstance(default, bool) else []
    return typer.Option(
        *flags,
        help=setting.help + words,
        min=setting.min,
        max=setting.max,
        metavar=setting.metavar,
        rich_help_panel=setting.panel,
        show_default=default is not None,
    )


def one(name: str, group: type[Config] = EngineConfig) -> Any:
    """A single setting of the tree as Typer's option or argument, for a command that needs no group."""
    field = next(each for each in dataclasses.fields(group) if each.name == name)
    return option(settings_of(group)[name][1], name, EMPTY if field.default is dataclasses.MISSING else field.default)


def check_trace(trace: Path | None) -> None:
    """Refuse a trace file that could not be written at the end.

    Raises:
        ResourceError: its folder does not exist.
    """
    if trace and not trace.parent.is_dir():
        raise ResourceError(
            f"The trace cannot be written: {trace.parent} is not a folder.", remedy="Choose another --trace."
        )
