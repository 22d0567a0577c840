"""What a text must look like, so that a program can read it whatever model wrote it.

A model that samples by a grammar gets it as GBNF, llama.cpp's notation. An endpoint gets a JSON schema of the same
content, and its reply is turned into the text that the grammar would have given, so that readers know one form only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

_NUMBERING = re.compile(r"^(?:\d{1,2}[.):]|[-*•])(?:\s+|$)")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)(?:"|\Z)', re.DOTALL)


class Shape(Protocol):
    """A constraint on a text."""

    @property
    def grammar(self) -> str:
        """The constraint in GBNF; its first rule is ``root``."""

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """A JSON schema for the same content, an object at the top; None if there is no such thing."""

    @property
    def json_tokens(self) -> int:
        """Most tokens that the schema's JSON takes around the text; 0 if the text is the JSON itself."""

    @property
    def description(self) -> str:
        """The schema in words."""

    def plain(self, reply: str) -> str:
        """A reply made by the schema, or the beginning of one, as the grammar would have it."""

    def fits(self, reply: str, *, whole: bool) -> bool:
        """Whether a reply, whole or cut short, is as the schema says."""


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    options: tuple[str, ...]
    json_tokens: ClassVar[int] = 24

    @property
    def grammar(self) -> str:
        """See `Shape`."""
        return "root ::= " + " | ".join(json.dumps(option) for option in self.options)

    @property
    def schema(self) -> Mapping[str, Any]:
        """See `Shape`."""
        return _object("choice", {"type": "string", "enum": list(self.options)})

    @property
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
class Json:
    """JSON of a schema."""

    schema: Mapping[str, Any]
    json_tokens: ClassVar[int] = 0
    description: ClassVar[str] = "JSON of the schema"

    @property
    def grammar(self) -> str:
        """See `Shape`."""
        from llama_cpp.llama_grammar import json_schema_to_gbnf

        gbnf: str = json_schema_to_gbnf(json.dumps(self.schema))
        return gbnf

    def plain(self, reply: str) -> str:
        """See `Shape`."""
        return reply

    def fits(self, reply: str, *, whole: bool) -> bool:
        """See `Shape`."""
        if not whole:
            return reply.lstrip().startswith("{")
        try:
            value = json.loads(reply, strict=False)
        except ValueError:
            return False
        return isinstance(value, dict) and set(self.schema.get("required", ())) <= set(value)


@dataclass(frozen=True)
class Lines:
    """At least one line and at most ``most``, none of them empty. A text that is cut short is still one."""

    most: int
    description: ClassVar[str] = Json.description

    @property
    def grammar(self) -> str:
        """See `Shape`."""
        rest = f' ("\\n" line){{0,{self.most - 1}}}' if self.most > 1 else ""
        return f"root ::= line{rest}\nline ::= [^ \\t\\r\\n] [^\\r\\n]*"

    @property
    def schema(self) -> Mapping[str, Any]:
        """See `Shape`."""
        return _object("lines", {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": self.most})

    @property
    def json_tokens(self) -> int:
        """See `Shape`."""
        return 24 + 4 * self.most

    def plain(self, reply: str) -> str:
        """See `Shape`."""
        return "\n".join(" ".join(value.split()) for value in _values(reply))

    def fits(self, reply: str, *, whole: bool) -> bool:
        """See `Shape`."""
        return Json(self.schema).fits(reply, whole=whole)

    def read(self, text: str) -> list[str]:
        """The lines, each once, without numbers or bullets before them."""
        lines = (_NUMBERING.sub("", line.strip()).strip() for line in text.splitlines())
        return list(dict.fromkeys(line for line in lines if line))[: self.most]

    def finished(self, text: str) -> list[str]:
        """The lines that have ended of a text that is still being written."""
        return self.read(text[: text.rfind("\n") + 1])


@dataclass(frozen=True)
class Gbnf:
    """A grammar in GBNF; endpoints cannot take it."""

    grammar: str
    schema: ClassVar[None] = None
    json_tokens: ClassVar[int] = 0
    description: ClassVar[str] = "text of the grammar"

    def plain(self, reply: str) -> str:
        """See `Shape`."""
        return reply

    def fits(self, reply: str, *, whole: bool) -> bool:
        """See `Shape`."""
        return True


def _object(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}


def _values(reply: str) -> list[str]:
    """The strings after the first colon of an object with one key, the last one perhaps unfinished."""
    _key, colon, rest = reply.partition(":")
    if not colon:
        return []
    values = []
    for match in _STRING.finditer(rest):
        try:
            values.append(str(json.loads(f'"{match[1]}"', strict=False)))
        except ValueError:  # cut within an escape
            values.append(str(json.loads(f'"{match[1].rpartition(chr(92))[0]}"', strict=False)))
    return values
