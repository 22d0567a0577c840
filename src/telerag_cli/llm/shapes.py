"""What a text must look like, so that a program can read it whatever model wrote it.

A model that samples here gets a grammar of llguidance. An endpoint gets a JSON schema of the same content, and its
reply is turned into the text that the grammar would have given, so that readers know one form only.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NUMBERING = re.compile(r"^(?:\d{1,2}[.):]|[-*•])(?:\s+|$)")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)(?:"|\Z)', re.DOTALL)


class Shape(ABC):
    """A constraint on a text."""

    @abstractmethod
    def grammar(self) -> str:
        """Return the constraint as a grammar of llguidance."""

    @abstractmethod
    def json_schema(self) -> Mapping[str, Any]:
        """Return a JSON schema for the same content, an object at the top."""

    def json_tokens(self) -> int:
        """Most tokens that the schema's JSON takes around the text; 0 if the text is the JSON itself."""
        return 0

    def description(self) -> str:
        """The schema in words."""
        return "JSON of the schema"

    def plain(self, reply: str) -> str:
        """A reply made by the schema, or the beginning of one, as the grammar would have it."""
        return reply

    def allows(self, text: str) -> bool:
        """Whether a whole text that was held to the grammar is what was asked for."""
        return True

    @abstractmethod
    def fits(self, reply: str, *, whole: bool) -> bool:
        """Whether a reply of an endpoint, whole or cut short, is as the schema says."""


@dataclass(frozen=True)
class Choice(Shape):
    """One of some words."""

    options: tuple[str, ...]

    def grammar(self) -> str:
        """See `Shape`."""
        from telerag_cli.llm.constraint import regex_grammar

        return regex_grammar("|".join(map(re.escape, self.options)))

    def json_schema(self) -> Mapping[str, Any]:
        """See `Shape`."""
        return _object("choice", {"type": "string", "enum": list(self.options)})

    def json_tokens(self) -> int:
        """See `Shape`."""
        return 24

    def description(self) -> str:
        """See `Shape`."""
        return f"one of {', '.join(self.options)} in JSON"

    def plain(self, reply: str) -> str:
        """See `Shape`."""
        return next(iter(_values(reply)), "")

    def fits(self, reply: str, *, whole: bool) -> bool:
        """See `Shape`."""
        return self.plain(reply) in self.options


@dataclass(frozen=True)
class Lines(Shape):
    """At least one line and at most ``most``, none of them empty. A text that is cut short is still one."""

    most: int

    def grammar(self) -> str:
        """See `Shape`."""
        from telerag_cli.llm.constraint import regex_grammar

        line = r"[^ \t\r\n][^\r\n]*"
        return regex_grammar(rf"{line}(\n{line}){{0,{self.most - 1}}}")

    def json_schema(self) -> Mapping[str, Any]:
        """See `Shape`."""
        return _object("lines", {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": self.most})

    def json_tokens(self) -> int:
        """See `Shape`."""
        return 24 + 4 * self.most

    def plain(self, reply: str) -> str:
        """See `Shape`."""
        return "\n".join(" ".join(value.split()) for value in _values(reply))

    def fits(self, reply: str, *, whole: bool) -> bool:
        """See `Shape`."""
        if not whole:
            return reply.lstrip().startswith("{")
        try:
            value = json.loads(reply, strict=False)
        except ValueError:
            return False
        return isinstance(value, dict) and "lines" in value

    def read(self, text: str) -> list[str]:
        """The lines, each once, without numbers or bullets before them."""
        lines = (_NUMBERING.sub("", line.strip()).strip() for line in text.splitlines())
        return list(dict.fromkeys(line for line in lines if line))[: self.most]

    def first(self, text: str, default: str) -> str:
        """The first line, or the default if there is none."""
        return next(iter(self.read(text)), default)

    def finished(self, text: str) -> list[str]:
        """The lines that have ended of a text that is still being written."""
        return self.read(text[: text.rfind("\n") + 1])


@dataclass(frozen=True)
class Json(Shape):
    """JSON of a schema."""

    schema: Mapping[str, Any]

    def grammar(self) -> str:
        """See `Shape`."""
        from telerag_cli.llm.constraint import schema_grammar

        return schema_grammar(self.schema)

    def json_schema(self) -> Mapping[str, Any]:
        """See `Shape`."""
        return self.schema

    def allows(self, text: str) -> bool:
        """See `Shape`."""
        return self.fits(text, whole=True)

    def fits(self, reply: str, *, whole: bool) -> bool:
        """See `Shape`."""
        from telerag_cli.llm.json_validation import follows

        return not whole or follows(self.schema, reply)


def _object(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}


def _values(reply: str) -> list[str]:
    """The strings after the first colon of an object with one key, the last one perhaps unfinished."""
    values = []
    for match in _STRING.finditer(reply.partition(":")[2]):
        try:
            values.append(str(json.loads(f'"{match[1]}"', strict=False)))
        except ValueError:  # cut within an escape
            values.append(str(json.loads(f'"{match[1].rpartition(chr(92))[0]}"', strict=False)))
    return values
