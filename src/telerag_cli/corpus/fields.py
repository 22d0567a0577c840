"""From a row of a source to a passage: which column is the text, which the id, and what becomes of the others."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from telerag_cli import text
from telerag_cli.corpus.passages import Passage
from telerag_cli.errors import InputError
from telerag_cli.text import TextError

TEXT_NAMES = ("text", "contents", "page_content", "body", "content", "passage")
ID_NAMES = ("id", "_id", "docid", "doc_id", "pid")


@dataclass(frozen=True)
class Columns:
    """The columns of text and id; None for the first of the usual names that a row has."""

    text: str | None = None
    id: str | None = None

    @property
    def text_names(self) -> tuple[str, ...]:
        """Names of the text column, the first one that is there counts."""
        return (self.text,) if self.text else TEXT_NAMES

    @property
    def id_names(self) -> tuple[str, ...]:
        """Names of the id column, the first one that is there counts."""
        return (self.id,) if self.id else ID_NAMES

    def text_name(self, names: Sequence[str]) -> str | None:
        """Return the text column among these, or None."""
        return next((name for name in self.text_names if name in names), None)

    def known(self, names: Sequence[str]) -> bool:
        """Whether one of these names a text, an id or a title, so that they are a header."""
        return bool({*self.text_names, *self.id_names, "title"} & {name.lower() for name in names})

    def headerless(self) -> tuple[str, str]:
        """Return the names of id and text for a file of two columns without a header."""
        return self.id_names[0], self.text_names[0]

    def need_text(self, label: str, names: Sequence[str]) -> None:
        """Check the header of a file.

        Raises:
            InputError: no column is the text.
        """
        if self.text_name(names) is None:
            raise InputError(
                f"{label} has the columns {', '.join(names)} and none named {' or '.join(self.text_names)}.",
                remedy="Name the column that holds the passages with --text-column.",
            )

    def row(self, names: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
        """Return cells by name, without empty ones; an empty text stays and is refused later."""
        kept = self.text_name(names)
        return {name: cell for name, cell in zip(names, cells, strict=True) if cell or name == kept}

    def passage(self, row: Mapping[str, Any], place: str) -> tuple[Passage, str]:
        """Return a row as a passage, and where its id came from.

        Other columns become metadata, those of an object named ``metadata`` beside them.

        Args:
            row: values by column.
            place: file and line, the id of a row without one.

        Raises:
            TextError: the row has no text, or one that cannot be stored, or its id is neither text nor a number.
        """
        rest = dict(row)
        named = [name for name in self.text_names if name in rest]
        name = next((name for name in named if isinstance(rest[name], str)), named[0] if named else None)
        value = rest.pop(name) if name else None
        if not isinstance(value, str):
            raise TextError("no text" if value is None else f"text is {type(value).__name__}, not a string")
        if not value.strip():
            raise TextError("the text is empty")
        origin = next((name for name in self.id_names if _given(rest.get(name))), None)
        chosen = id_of(rest.pop(origin)) if origin else place
        if not rest.get("title", True):
            del rest["title"]
        nested = rest.get("metadata")
        if isinstance(nested, str):  # what telerag's own embeddings hold
            try:
                nested = text.parse_json(nested)
            except TextError:
                nested = None
        if isinstance(nested, dict):
            rest = {**nested, **{key: value for key, value in rest.items() if key != "metadata"}}
        passage = Passage(text.checked(chosen), text.checked(value), rest)
        text.checked(passage.metadata_json)
        return passage, f"from column {origin}" if origin else "from file and line"


def _given(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


def id_of(value: Any) -> str:
    """Return an id as text: 1.0, as pandas writes a 1, is ``1``, and 16 bytes are a UUID.

    Raises:
        TextError: the value is of another type.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        name = value.decode(errors="replace")
        if name.isprintable() and "\ufffd" not in name:
            return name
        return str(uuid.UUID(bytes=value)) if len(value) == 16 else value.hex()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float | uuid.UUID) and not isinstance(value, bool):
        return str(value)
    raise TextError(f"the id is {type(value).__name__}, not a string or a number")
