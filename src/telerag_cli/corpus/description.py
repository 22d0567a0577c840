"""What ``embeddings.json`` says of a folder of embeddings, read as strictly as it was written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from telerag_cli.errors import ArtifactError, invalid_fields
from telerag_cli.files import read_sealed_json

FORMAT = "telerag-embeddings"
DESCRIPTION = "embeddings.json"


@dataclass(frozen=True)
class _DescribedShard:
    """What the description says of a shard."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True)

    name: Annotated[str, StringConstraints(pattern=r"^[^./\\][^/\\]*$")]
    rows: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    checksum: str


@dataclass(frozen=True)
class _Described:
    """What the description of a finished folder may say; nothing else, for that could be the checksum's damaged key."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    dimension: int
    rows: int
    shards: list[_DescribedShard]
    model: str | None = None
    pooling: str | None = None
    normalized: bool | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    weights: str | None = None
    precision: str | None = None
    dtype: str | None = None
    shard_rows: int | None = None
    format: str = FORMAT
    version: int = 1
    complete: bool = True
    synthetic: Any = None
    """What a made-up folder was made of."""


def read_description(folder: Path) -> dict[str, Any]:
    """What ``embeddings.json`` says of a finished folder.

    Raises:
        ArtifactError: of another format, or the folder is not finished, or a shard is missing or of another size.
    """
    description = read_sealed_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ArtifactError(f"{folder / DESCRIPTION} does not describe {FORMAT}.", remedy="Embed the corpus again.")
    if description.get("version") != 1:
        raise ArtifactError(
            f"{folder} is {FORMAT} version {description.get('version')}, and this telerag reads version 1.",
            remedy="Embed the corpus again with this version.",
        )
    if not description.get("complete"):
        raise ArtifactError(f"{folder} is not finished.", remedy="Run the same telerag embed again; it resumes.")
    check_description(description, folder / DESCRIPTION)
    for shard in description["shards"]:
        file = folder / shard["name"]
        size = file.stat().st_size if file.exists() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise ArtifactError(
                f"{file} {found}, and {DESCRIPTION} says {shard['bytes']:,} bytes.", remedy="Restore it or embed again."
            )
    return description


def check_description(description: dict[str, Any], path: Path) -> None:
    """Make sure that what ``embeddings.json`` says of a finished folder is of the right kind and leads nowhere else.

    Raises:
        ArtifactError: a field is missing or wrong.
    """
    try:
        TypeAdapter(_Described).validate_json(json.dumps(description))
    except ValidationError as error:
        raise invalid_fields(f"{path} is not a valid description", error, "Embed the corpus again.") from error
