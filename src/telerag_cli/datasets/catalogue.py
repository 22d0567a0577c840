"""What is known of each dataset: a TOML file each, in the folder ``datasets`` of the project and of the installed package."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from telerag_cli.errors import InputError, UsageError
from telerag_cli.files import wrap_os_error

SUFFIX = ".toml"


class Kind(StrEnum):
    """What a dataset holds."""

    QUESTIONS = "questions"
    PASSAGES = "passages"
    BOTH = "both"


class Parser(StrEnum):
    """The form of a dataset's files."""

    NQ_OPEN = "nq-open"
    HOTPOTQA = "hotpotqa"
    TRIVIAQA = "triviaqa"
    FLASHRAG = "flashrag"
    DPR_PASSAGES = "dpr-passages"
    FLASHRAG_PASSAGES = "flashrag-passages"
    BEIR = "beir"


@dataclass(frozen=True)
class RemoteFile:
    """One file as its publisher offers it. What the publisher does not tell is None."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    """Of the file in the cache, and below a mirror's address."""
    address: str
    bytes: int | None = None
    about_bytes: int | None = None
    """Its size where only a rounded one is known: to show, and never to check."""
    sha256: str | None = None
    md5: str | None = None
    """Given only where the publisher has nothing better."""
    split: str | None = None
    """The one it holds, if it holds one."""
    members: dict[str, str] = field(default_factory=dict)
    """Of an archive: the member by split."""

    def __post_init__(self) -> None:
        if not self.name or self.name != Path(self.name).name or self.name.startswith("."):
            raise ValueError(f"'{self.name}' is no plain file name")

    @property
    def size(self) -> int | None:
        """Bytes, perhaps rounded."""
        return self.bytes if self.bytes is not None else self.about_bytes


@dataclass(frozen=True)
class Dataset:
    """A description. Its comments say where the facts are from."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    title: str
    what: str
    homepage: str
    licence: str
    kind: Kind
    parser: Parser
    files: tuple[RemoteFile, ...]
    split: str | None = None
    """The one that is prepared if nobody names another; None for passages, which have none."""
    unknown: str = ""
    """What its publisher does not tell."""

    @property
    def size(self) -> int | None:
        """Bytes of all files, perhaps rounded; None if that of one is not known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that the description names; an archive may hold more."""
        named = [split for file in self.files for split in ((file.split,) if file.split else tuple(file.members))]
        if self.split and self.split not in named:
            named.append(self.split)
        return () if self.split is None else tuple(dict.fromkeys(named))

    def files_of(self, split: str | None) -> tuple[RemoteFile, ...]:
        """The files that a split needs, or all of them for None.

        Raises:
            UsageError: no file holds it, or there are no splits.
        """
        if split is not None and self.split is None:
            raise UsageError(
                f"{self.name} holds passages alone, which have no splits, and --split is '{split}'.",
                remedy="Leave --split away.",
            )
        found = tuple(file for file in self.files if None in (split, file.split) or file.split == split)
        if not found:
            raise UsageError(
                f"{self.name} has the splits {', '.join(self.splits)}, and not '{split}'.",
                remedy="Name one of them with --split.",
            )
        return found


def names() -> list[str]:
    """Of all datasets, sorted."""
    return sorted(entry.name.removesuffix(SUFFIX) for entry in _folder().iterdir() if entry.name.endswith(SUFFIX))


def describe(name: str) -> Dataset:
    """The description of a dataset, by its name or as a TOML file of one's own.

    Raises:
        InputError: the file is missing or no description.
        UsageError: there is no dataset of that name.
    """
    if name.endswith(SUFFIX):
        return _parse(Path(name), name)
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        raise UsageError(
            f"There is no dataset '{name}'{f'; the nearest is {near[0]}' if near else ''}.",
            remedy="telerag data list shows them all.",
        )
    return _parse(_folder() / f"{name}{SUFFIX}", f"{name}{SUFFIX}")


def is_dataset(name: str) -> bool:
    """Whether `describe` would look for it in the catalogue and find it."""
    return name in names()


def _folder() -> Traversable:
    # A link to the project's datasets/ where telerag is run from its sources, a folder where it is installed.
    return resources.files("telerag_cli.datasets") / "descriptions"


def _parse(place: Traversable | Path, label: str) -> Dataset:
    try:
        raw = tomllib.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrap_os_error(error, Path(label)) from error
    except ValueError as error:
        raise InputError(f"{label} is no TOML: {error}.", remedy="Correct the file.") from error
    try:
        found = _adapter().validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{label} is no description of a dataset: {where or 'it'}: {first['msg']}.",
            remedy="datasets/README.md says what one holds.",
        ) from error
    if f"{found.name}{SUFFIX}" != Path(label).name:
        raise InputError(
            f"{label} describes '{found.name}', and a description is named like its dataset.",
            remedy=f"Name the file {found.name}{SUFFIX}.",
        )
    return found


@cache
def _adapter() -> TypeAdapter[Dataset]:
    adapter: TypeAdapter[Any] = TypeAdapter(Dataset)
    return adapter
