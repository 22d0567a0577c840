"""Types of the fields of requests. Requests are parsed strictly: a number in quotes is not a number."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    Tag,
)
from pydantic_core import PydanticCustomError, core_schema

from telerag_cli.text import TextError, checked

NOT_BLANK = r"[^\s\x1c-\x1f\x85\ufeff]"
"""A character that is not white space in any dialect of regular expressions."""

UNSUPPORTED = "unsupported_parameter"
UNUSABLE = "unusable"
"""Kinds of errors that pydantic has no name for; the first is OpenAI's code too."""

A = TypeVar("A")
B = TypeVar("B")


class StrictModel(BaseModel):
    """Part of a request; unknown names are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class LenientModel(StrictModel):
    """Part of a request in which clients put what others made of it; unknown names are ignored."""

    model_config = ConfigDict(extra="ignore")


class OnlyValues:
    """An option that asks for nothing with these values, and for something unavailable with any other."""

    def __init__(self, *values: JsonValue) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, _schema: core_schema.CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.values)}

    def _check(self, value: Any) -> Any:
        # To Python, true is 1.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values):
            allowed = " or ".join(json.dumps(one) for one in self.values)
            raise PydanticCustomError(UNSUPPORTED, "leave it out, or give {allowed}", {"allowed": allowed})
        return value


def _check_text(text: str) -> str:
    try:
        return checked(text)
    except TextError as error:
        raise PydanticCustomError(UNUSABLE, "{reason}", {"reason": str(error)}) from None


def _check_not_blank(text: str) -> str:
    if not re.search(NOT_BLANK, text):
        raise PydanticCustomError(UNUSABLE, "it is empty")
    return text


def check_no_tokens(value: A) -> A:
    """Refuse token numbers where texts are expected."""
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise PydanticCustomError(UNUSABLE, "token numbers are not taken; send text")
    return value


def to_int(value: Any) -> Any:
    """Take 1.0 for 1: JSON has one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


AnyText = Annotated[str, AfterValidator(_check_text)]
Text = Annotated[AnyText, AfterValidator(_check_not_blank), Field(json_schema_extra={"pattern": NOT_BLANK})]
NotEmpty = Annotated[str, Field(min_length=1), AfterValidator(_check_text)]
Integer = Annotated[int, BeforeValidator(to_int)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(to_int)]
OneOrMany = Annotated[
    Annotated[A, Tag("one")] | Annotated[B, Tag("many")],
    Discriminator(lambda value: "many" if isinstance(value, list) else "one"),
]
"""One thing or a list of things; an error speaks of the form that was sent."""

Null = Annotated[Any, OnlyValues(None)]
Zero = Annotated[Any, OnlyValues(None, 0)]
One = Annotated[Any, OnlyValues(None, 1)]
No = Annotated[Any, OnlyValues(None, False)]
NoItems = Annotated[Any, OnlyValues(None, [])]
NoTool = Annotated[Any, OnlyValues(None, "none", "auto")]
