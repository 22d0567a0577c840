"""Descriptions of public datasets: a TOML file each, in the folder ``datasets`` of the project and of the package."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError

from telerag_cli.errors import InputError, UsageError
from telerag_cli.files import wrap_os_error

SUFFIX = ".toml"
FileName = Annotated[str, StringConstraints(pattern=r"^[^./\\][^/\\]*$")]
DatasetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Also the name of its folder in the cache."""
Address = Annotated[str, StringConstraints(pattern=r"^https?://")]


class DatasetKind(StrEnum):
    """What a dataset holds."""

    QUESTIONS = "questions"
    PASSAGES = "passages"
    BOTH = "both"


class Parser(StrEnum):
    """Form of a dataset's files."""

    NQ_OPEN = "nq-open"
    HOTPOTQA = "hotpotqa"
    TRIVIAQA = "triviaqa"
    FLASHRAG = "flashrag"
    DPR_PASSAGES = "dpr-passages"
    FLASHRAG_PASSAGES = "flashrag-passages"
    BEIR = "beir"


@dataclass(frozen=True)
class RemoteFile:
    """A file as its publisher offers it; None for what the publisher does not say."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: FileName
    """Name in the cache, and below a mirror's address."""
    address: Address
    bytes: int | None = None
    about_bytes: int | None = None
    """Rounded size, where only that is known; shown and never checked."""
    sha256: str | None = None
    md5: str | None = None
    """Given only where the publisher has nothing better."""
    split: str | None = None
    """Split that the file holds, if it holds one."""
    members: dict[str, str] = field(default_factory=dict)
    """Member of the archive by split."""

    @property
    def size(self) -> int | None:
        """Bytes, perhaps rounded."""
        return self.bytes if self.bytes is not None else self.about_bytes


@dataclass(frozen=True)
class Dataset:
    """A description. The comments of its file say where the facts are from."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: DatasetName
    title: str
    what: str
    homepage: str
    licence: str
    kind: DatasetKind
    parser: Parser
    files: tuple[RemoteFile, ...]
    split: str | None = None
    """Split that is prepared by default; None for passages, which have none."""
    unknown: str = ""
    """What the publisher does not say."""

    @property
    def size(self) -> int | None:
        """Bytes of all files, perhaps rounded; None if one is unknown."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that the description names; an archive may hold more."""
        if self.split is None:
            return ()
        named = [split for file in self.files for split in ((file.split,) if file.split else tuple(file.members))]
        return tuple(dict.fromkeys([*named, self.split]))

    def files_of(self, split: str | None) -> tuple[RemoteFile, ...]:
        """Return the files that a split needs, or all of them for None.

        Raises:
            UsageError: no file holds it, or there are no splits.
        """
        if split is not None and self.split is None:
            raise UsageError(
                f"{self.name} holds only passages, which have no splits, and --split is '{split}'.",
                remedy="Leave out --split.",
            )
        found = tuple(file for file in self.files if None in (split, file.split) or file.split == split)
        if not found:
            raise no_split(self.name, self.splits, split)
        return found


def no_split(name: str, splits: tuple[str, ...], wanted: str | None) -> UsageError:
    """Make the error for a split that is not there."""
    return UsageError(
        f"{name} has the splits {', '.join(splits) or 'none'}, and not '{wanted}'.",
        remedy="Name one of them with --split.",
    )


def names() -> list[str]:
    """Return the names of all datasets, sorted."""
    return sorted(entry.name.removesuffix(SUFFIX) for entry in _folder().iterdir() if entry.name.endswith(SUFFIX))


def describe(name: str) -> Dataset:
    """Return the description of a dataset by its name, or from a TOML file outside the catalogue.

    Raises:
        InputError: the file is missing or is not a description.
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


def _folder() -> Traversable:
    # A link to the project's datasets/ where telerag is run from its sources, a folder where it is installed.
    return resources.files("telerag_cli.datasets") / "descriptions"


def _parse(place: Traversable | Path, label: str) -> Dataset:
    try:
        found = TypeAdapter(Dataset).validate_python(tomllib.loads(place.read_text(encoding="utf-8")))
    except OSError as error:
        raise wrap_os_error(error, Path(label)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{label} is not a description of a dataset: {where or 'it'}: {first['msg']}.",
            remedy="datasets/README.md says what one holds.",
        ) from error
    except ValueError as error:
        raise InputError(f"{label} is not TOML: {error}.", remedy="Correct the file.") from error
    if f"{found.name}{SUFFIX}" != Path(label).name:
        raise InputError(
            f"{label} describes '{found.name}', and a description is named after its dataset.",
            remedy=f"Name the file {found.name}{SUFFIX}.",
        )
    return found
