"""OpenAI's filters over attributes."""

import pytest

from telerag_cli.server.filters import attributes, passes
from telerag_cli.server.requests import VectorSearchRequest

VALUES = attributes({"text": "b", "number": 2, "truth": True, "list": ["x"], "none": None, "nan": float("nan")})
YES, NO = ("eq", "number", 2), ("eq", "number", 1)


def passing(some):
    return passes(VectorSearchRequest.model_validate({"query": "q", "filters": some}).filters, VALUES)


def compared(kind, key, value):
    return {"type": kind, "key": key, "value": value}


def combined(kind, *parts):
    return {"type": kind, "filters": [part if isinstance(part, dict) else compared(*part) for part in parts]}


def test_attributes_are_texts_truths_and_finite_numbers():
    assert VALUES == {"text": "b", "number": 2, "truth": True}


HOLDING = [
    *(("eq", "text", "b"), ("eq", "number", 2), ("eq", "number", 2.0), ("eq", "truth", True)),
    *(("ne", "text", "a"), ("ne", "other", "b"), ("gt", "number", 1), ("gte", "number", 2), ("lt", "number", 2.5)),
    *(("gt", "text", "a"), ("in", "text", ["a", "b"]), ("nin", "text", ["a"]), ("nin", "other", ["b"])),
]
OTHERS = [
    *(("eq", "text", "B"), ("eq", "number", "2"), ("eq", "number", True), ("eq", "truth", 1), ("eq", "other", "b")),
    *(("ne", "text", "b"), ("gt", "number", 2), ("lte", "number", 1), ("lt", "text", "a"), ("gt", "text", 1)),
    *(("lt", "text", 1), ("gt", "truth", 0), ("gte", "other", 0), ("in", "text", ["a"]), ("nin", "text", ["b"])),
    *(("in", "truth", [1, "true"]), ("in", "list", ["x"])),
]


@pytest.mark.parametrize(("comparisons", "hold"), [(HOLDING, True), (OTHERS, False)])
def test_comparisons(comparisons, hold):
    assert [some for some in comparisons if passing(compared(*some)) != hold] == []


def test_compound_filters_hold_for_all_or_for_any():
    assert passing(combined("and", YES, YES))
    assert not passing(combined("and", YES, NO))
    assert passing(combined("or", NO, YES))
    assert not passing(combined("or", NO, NO))
    assert passing(combined("and", combined("or", NO, YES), YES))
    assert not passing(combined("or", combined("and", NO, YES), NO))
    assert passes(None, {})
