"""How a setting is declared: once, as a field of a frozen dataclass, checked when the dataclass is made."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from telerag_cli.errors import UsageError
from telerag_cli.units import parse_bytes

AUTO = "auto"
"""The value that leaves a choice to telerag."""


@dataclass(frozen=True)
class Setting:
    """How a field of the tree is shown: as an option, a ``TELERAG_`` variable and a key of ``telerag.toml``.

    All three are derived from the field; see `telerag_cli.cli.options`.
    """

    help: str
    flag: str = ""
    """The option's name where it is not the field's, with ``/`` before that of its opposite."""
    min: float | None = None
    max: float | None = None
    metavar: str | None = None
    panel: str | None = None
    default: str = ""
    """What stands behind None, in words."""
    size: bool = False
    """Whether the value is a size in bytes, like ``2GiB``."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A node of the tree of settings: frozen, and checked once, when it is made.

    Raises:
        UsageError: a value is not one that its field takes.
    """

    def __post_init__(self) -> None:
        for name, (kind, setting) in settings_of(type(self)).items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _checked(name, kind, setting, value))


def settings_of(group: Any) -> dict[str, tuple[Any, Setting]]:
    """The fields of a group that are settings: each one's type without None, and its `Setting`."""
    return _settings_of(group)


@cache
def _settings_of(group: Any) -> dict[str, tuple[Any, Setting]]:
    hints = get_type_hints(group, include_extras=True)
    found = {field.name: declared(hints[field.name]) for field in fields(group)}
    return {name: (kind, setting) for name, (kind, setting) in found.items() if setting is not None}


def declared(hint: Any) -> tuple[Any, Setting | None]:
    """The type of a field without None, and its `Setting` if it is an option."""
    setting = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Setting)), None)
    kind = get_args(hint)[0] if setting else hint
    if get_origin(kind) is not Literal:
        kind = next((each for each in get_args(kind) if each is not NoneType), kind)
    return kind, setting


def _checked(name: str, kind: Any, setting: Setting, value: Any) -> Any:
    """A value as its field's type, if it is one that the field takes."""
    flag = (setting.flag or f"--{name.replace('_', '-')}").partition("/")[0]
    is_enum = isinstance(kind, type) and issubclass(kind, Enum)
    if is_enum or get_origin(kind) is Literal:
        choices = list(kind) if is_enum else get_args(kind)
        if value not in choices:
            raise UsageError(f"{flag} is {value!r}.", remedy=f"Choose one of {', '.join(choices)}.")
        return kind(value) if is_enum else value
    if kind is Path:
        return Path(value)
    if setting.size:
        if value != AUTO:
            parse_bytes(str(value))
        return str(value)
    for bound, beyond, words in ((setting.min, operator.lt, "at least"), (setting.max, operator.gt, "at most")):
        if bound is not None and beyond(value, bound):
            raise UsageError(f"{flag} is {value!r}, and it must be {words} {bound:g}.", remedy=f"It is: {setting.help}")
    return value
