"""OpenAI's filters over the attributes of passages."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from telerag_cli.server.fields import UNUSABLE, NotEmpty, StrictModel

MAX_DEPTH = 8
MAX_PARTS = 32
MAX_CLAUSES = 256

Scalar = str | bool | int | float
"""What an attribute may be."""


class Equality(StrictModel):
    """Whether an attribute has this value; a passage without the attribute does not."""

    type: Literal["eq", "ne"]
    key: NotEmpty
    value: Scalar


class Comparison(StrictModel):
    """How an attribute compares with this value: numbers by size, texts by their characters."""

    type: Literal["gt", "gte", "lt", "lte"]
    key: NotEmpty
    value: str | int | float


class Membership(StrictModel):
    """Whether an attribute has one of these values."""

    type: Literal["in", "nin"]
    key: NotEmpty
    value: Annotated[list[Scalar], Field(min_length=1, fail_fast=True)]

    @cached_property
    def values(self) -> frozenset[tuple[str, Scalar]]:
        """The values with their sorts."""
        return frozenset((_sort(each), each) for each in self.value)


class Compound(StrictModel):
    """Whether all, or any, of these hold."""

    type: Literal["and", "or"]
    filters: Annotated[list[Filter], Field(min_length=1, max_length=MAX_PARTS)]


Filter: TypeAlias = Annotated[Equality | Comparison | Membership | Compound, Field(discriminator="type")]


def _clause_depths(some: Filter, depth: int = 1) -> Iterator[int]:
    yield depth
    if isinstance(some, Compound):
        for each in some.filters:
            yield from _clause_depths(each, depth + 1)


def _check_bounds(some: Filter) -> Filter:
    depths = list(_clause_depths(some))
    if max(depths) > MAX_DEPTH or len(depths) > MAX_CLAUSES:
        raise PydanticCustomError(
            UNUSABLE,
            "it has {clauses} clauses, {depth} deep; at most {most} clauses, {deepest} deep, are taken",
            {"clauses": len(depths), "depth": max(depths), "most": MAX_CLAUSES, "deepest": MAX_DEPTH},
        )
    return some


BoundedFilter = Annotated[
    Filter,
    AfterValidator(_check_bounds),
    Field(description=f"On attributes; at most {MAX_CLAUSES} clauses, {MAX_DEPTH} deep."),
]


_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


def attributes(metadata: Mapping[str, Any]) -> dict[str, Scalar]:
    """A passage's attributes in OpenAI's sense: of its metadata the texts, booleans and finite numbers."""
    return {name: value for name, value in metadata.items() if _sort(value)}


def passes(some: Filter | None, values: Mapping[str, Scalar]) -> bool:
    """Whether attributes pass a filter; without one, all do.

    A number and a text are never equal, nor is 1 true, and neither comes before the other. What is not there is equal
    to nothing, so that only ``ne`` and ``nin`` let it pass.
    """
    if some is None:
        return True
    if isinstance(some, Compound):
        return (all if some.type == "and" else any)(passes(each, values) for each in some.filters)
    value = values.get(some.key)
    if isinstance(some, Equality):
        return _same(value, some.value) == (some.type == "eq")
    if isinstance(some, Membership):
        return ((_sort(value), value) in some.values) == (some.type == "in")
    return _sort(value) == _sort(some.value) and _COMPARE[some.type](value, some.value)


def _same(value: Any, other: Any) -> bool:
    return _sort(value) == _sort(other) and bool(value == other)


def _sort(value: Any) -> str:
    """What kind of attribute a value is; empty if it is none."""
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return "number"
    return "text" if isinstance(value, str) else ""
