"""OpenAI's filters over what is known of a passage."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from telerag_cli.server.protocol import Compound, Equality, Filter, Membership, Scalar

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
        return any(_same(value, each) for each in some.value) == (some.type == "in")
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
